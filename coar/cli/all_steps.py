"""The command that does all steps in one process: collect, fit, baselines, evaluate and edit."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coar.cli.common import DeviceOption, OutOption, app, report_errors, reports, written
from coar.cli.editing import Asked, check_options, run_task
from coar.cli.summary import changes, heading, scores
from coar.errors import SettingsError

if TYPE_CHECKING:
    from coar.attributions import Attributions
    from coar.evaluation import Evaluation
    from coar.pipeline import Pipeline
    from coar.store.run import Run
    from coar.study import Study

WIDTH = 88  # columns up to the seconds of a step


@app.command(name="all", epilog="Example: coar all pipelines/digits.py --task forget --label 3 --task fix")
@report_errors
def all_steps(
    pipeline: Annotated[Path, typer.Argument(metavar="PIPELINE", help="A pipeline file.")],
    run: Annotated[Path | None, typer.Option(help="The run [default: runs/<pipeline>-<ablation>.zarr].")] = None,
    ablation: Annotated[str | None, typer.Option(help="Label, such as mean [default: the pipeline's].")] = None,
    masks: Annotated[
        int | None, typer.Option(help="Training masks [default: the pipeline's, or none with --gradients].")
    ] = None,
    gradients: Annotated[
        int | None, typer.Option(help="Mask gradients [default: the pipeline's, or none with --masks].")
    ] = None,
    method: Annotated[str, typer.Option("--fit", help="auto, informed, ridge, lasso or ols.")] = "auto",
    task: Annotated[list[str] | None, typer.Option(help="An edit; may be given several times.")] = None,
    label: Annotated[int | None, typer.Option(help="The class of --task forget.")] = None,
    device: DeviceOption = "auto",
    out: OutOption = None,
) -> None:
    """Do every missing step, from collecting to edits, and write one page of the results.

    The steps are those of coar collect, fit, baselines, evaluate, edit and report. Steps whose results are in the run
    are not repeated, except edits.
    """
    if label is not None and "forget" not in (task or ()):
        raise SettingsError("--label names the class of --task forget; add that task, or leave --label out")
    tasks = [Asked(name, None, "edit", label if name == "forget" else None) for name in task or ()]
    logging.getLogger("coar").setLevel(logging.WARNING)  # each step prints a line of its own
    logging.getLogger("coar.pipelines").setLevel(logging.INFO)
    loaded, study = _define(pipeline, ablation, tasks)
    path = run or Path("runs") / f"{loaded.name}-{study.ablation.label}.zarr"
    collected = _collect(loaded, study, path, loaded.sizes(masks, gradients), device)
    attributions = _fit(collected, method)
    _baselines(study, collected, device)
    folder = out or reports(path)
    evaluation = _evaluate(collected, folder)
    comparison = loaded.comparison()
    if comparison is not None and comparison.ablation == study.ablation.label:
        typer.echo(f"\n{comparison}")
    for asked in tasks:
        _edit(loaded, study, attributions, asked, folder, device)
    _page(loaded, study, collected, folder, evaluation)


@contextmanager
def _step(name: str) -> Iterator[list[str]]:
    """Print a step's name at its start on a terminal, and at its end one line: name, result and seconds."""
    watched, began = sys.stdout.isatty(), time.monotonic()
    if watched:
        typer.echo(f"{name:10}...", nl=False)
    summary: list[str] = []
    try:
        yield summary
    except BaseException:
        if watched:
            typer.echo()  # log messages begin on a line of their own
        raise
    start = "\r" if watched else ""
    typer.echo(f"{start}{f'{name:10}{summary[0]}':{WIDTH}}{time.monotonic() - began:6.1f} s")


def _define(pipeline: Path, ablation: str | None, tasks: list[Asked]) -> "tuple[Pipeline, Study]":
    with _step("study") as summary:
        from coar.pipeline import load_pipeline

        for asked in tasks:
            check_options(asked.task, None, None, asked.name, asked.label, None)
        loaded = load_pipeline(pipeline)
        study = loaded.study(ablation=ablation)
        what = repr(study.components).removeprefix("Components(").partition(", from")[0]
        summary.append(f"{loaded.name}: {what}, {len(study.examples)} examples, ablation {study.ablation.label}")
    return loaded, study


def _collect(loaded: "Pipeline", study: "Study", path: Path, sizes: dict[str, Any], device: str) -> "Run":
    with _step("collect") as summary:
        from coar.collection.collect import collect
        from coar.store.gradients import MaskGradients

        tests: dict[str, Any] = {"test_masks": loaded.test_masks, "test_fractions": loaded.test_fractions}
        run = collect(study, path, **sizes, **tests, device=device, progress=sys.stderr.isatty())
        counts = {
            "mask gradients": MaskGradients(run).count,
            "masks": run.plan.count("train", run.sampler.ablated_fraction),
            "test masks": sum(run.plan.count("test", fraction) for fraction in run.plan.fractions("test")),
        }
        summary.append(", ".join(f"{count:,} {what}" for what, count in counts.items() if count) + f" in {path}")
    return run


def _fit(run: "Run", method: str) -> "Attributions":
    with _step("fit") as summary:
        from coar.regression.fitting import fit

        attributions = fit(run, method=method, progress=sys.stderr.isatty())
        used = {"mask gradients": attributions.fit.gradients, "masks": attributions.fit.masks}
        sizes = " and ".join(f"{count:,} {what}" for what, count in used.items() if count)
        summary.append(f"{attributions.fit.method}, from {sizes}")
    return attributions


def _baselines(study: "Study", run: "Run", device: str) -> None:
    with _step("baselines") as summary:
        from coar.baselines import BASELINES, applicable

        names = applicable(run)
        for name in names:
            BASELINES[name](study, run, device=device, progress=sys.stderr.isatty())
        summary.append(", ".join(names))


def _evaluate(run: "Run", folder: Path) -> "Evaluation":
    with _step("evaluate") as summary:
        from coar.evaluation import evaluate
        from coar.report import write_evaluation

        evaluation = evaluate(run)
        write_evaluation(evaluation, folder)
        summary.append("predicted against true outputs, under masks that no fit has seen")
    typer.echo(scores(evaluation))
    return evaluation


def _edit(
    loaded: "Pipeline", study: "Study", attributions: "Attributions", asked: Asked, folder: Path, device: str
) -> None:
    typer.echo()
    with _step("edit") as summary:
        from coar.report import write_task

        options = {"device": device, "progress": sys.stderr.isatty()}
        result = run_task(loaded, study, attributions, asked, options)
        write_task(result, study.model, folder / result.name, study.examples)
        summary.append(heading(result, len(study.components)))
    typer.echo(changes(result))


def _page(loaded: "Pipeline", study: "Study", run: "Run", folder: Path, evaluation: "Evaluation") -> None:
    from coar.explorer.page import write_page

    typer.echo()
    written([write_page(run, folder, source=loaded.source(run, study), evaluation=evaluation)])
    typer.echo(f"open the page in a browser; 'coar info {run.path}' says what the run holds")
