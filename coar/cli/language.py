"""The commands trace and lens, for language models."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from coar.cli.common import EXECUTION, DeviceOption, app, report_errors, show, written
from coar.errors import SettingsError

FileArgument = Annotated[Path, typer.Argument(metavar="PIPELINE", help="A pipeline file, such as pipelines/facts.py.")]
FolderOption = Annotated[Path | None, typer.Option("--out", help="Folder to write to [default: reports/<pipeline>].")]
SeedOption = Annotated[int, typer.Option(help="Seed of draws and of training.")]


@app.command(epilog="Example: coar trace pipelines/facts.py --corruption optimal,noise --windows 1,5")
@report_errors
def trace(
    pipeline: FileArgument,
    corruption: Annotated[str, typer.Option(help="optimal, noise, mean, resample, counterfactual.")] = "optimal",
    kinds: Annotated[str, typer.Option(help="Restored parts: attention, mlp, layer.")] = "attention,mlp,layer",
    windows: Annotated[str, typer.Option(help="Numbers of layers that are restored together, odd.")] = "1",
    places: Annotated[str, typer.Option(help="Positions at which they are restored.")] = "subject_last,last",
    facts: Annotated[int | None, typer.Option(help="Use only this many facts, spread over all.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of training a constant.")] = 60,
    per_cell: Annotated[bool, typer.Option("--per-cell", help="Train a constant for each cell.")] = False,
    draws: Annotated[int, typer.Option(help="Draws of noise and of other subjects.")] = 5,
    seed: SeedOption = 0,
    out: FolderOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Find where a language model recalls the facts of a pipeline, one table and heat map for each corruption."""
    import numpy as np

    from coar.pipeline import load_pipeline
    from coar.report import write_trace
    from coar.tracing.trace import trace as trace_facts

    numbers = [_whole(word) for word in _words(windows)]
    loaded = load_pipeline(pipeline)
    given, model = loaded.facts(), loaded.study().model
    if facts is not None:
        given = given.subset(np.unique(np.linspace(0, len(given) - 1, facts).round().astype(int)))
    for name in _words(corruption):
        found = trace_facts(
            model,
            given,
            corruption=name,
            kinds=_words(kinds),
            windows=numbers,
            places=_words(places),
            steps=steps,
            per_cell=per_cell,
            draws=draws,
            seed=seed,
            device=device,
            progress=sys.stderr.isatty(),
        )
        scored = found.per_fact["fact"].nunique()
        typer.echo(
            f"\n{name}: {scored} facts scored, {len(found.learning)} for constants, {len(found.left_out)} left out"
        )
        best = found.table.sort_values("aie", ascending=False).groupby(["kind", "window", "place"], sort=False).head(1)
        show(best.sort_index())
        written(write_trace(found, out or Path("reports") / loaded.name))


@app.command(epilog='Example: coar lens pipelines/gpt2.py --kind optimal,tuned --text "The capital of France is"')
@report_errors
def lens(
    pipeline: FileArgument,
    kind: Annotated[str, typer.Option(help="optimal, mean, tuned, logit.")] = "optimal,mean,tuned,logit",
    layers: Annotated[str | None, typer.Option(help="Numbers of layers [default: all].")] = None,
    steps: Annotated[int, typer.Option(help="Steps of training.")] = 200,
    texts_per_step: Annotated[int, typer.Option(help="Texts of a step.")] = 8,
    text: Annotated[str | None, typer.Option(help="A text to read with each lens.")] = None,
    seed: SeedOption = 0,
    out: FolderOption = None,
    device: DeviceOption = "auto",
    folder: Annotated[
        Path | None,
        typer.Option(help="Where lenses are kept [default: runs/<pipeline>-lens].", rich_help_panel=EXECUTION),
    ] = None,
) -> None:
    """Train lenses on the texts of a pipeline, and compare them with the model on held-out texts."""
    import pandas as pd

    from coar.lenses.training import lens as train_lens
    from coar.pipeline import load_pipeline
    from coar.report import write_lenses

    numbers = None if layers is None else [_whole(word) for word in _words(layers)]
    loaded = load_pipeline(pipeline)
    (training, held_out), model = loaded.texts(), loaded.study().model
    place, tables, readings = folder or Path("runs") / f"{loaded.name}-lens", [], {}
    for name in _words(kind):
        made = train_lens(
            model,
            training,
            name,
            layers=numbers,
            steps=steps,
            texts_per_step=texts_per_step,
            seed=seed,
            folder=place / name,
            device=device,
            progress=sys.stderr.isatty(),
        )
        tables.append(made.summary(held_out))
        if text is not None:
            readings[name] = made.read(text, loaded.tokenizer())
    table = pd.concat(tables, ignore_index=True)
    typer.echo("mean KL(model || lens) on held-out texts, in nats, before each layer")
    show(table.pivot_table(index="layer", columns="kind", values="kl", sort=False).reset_index())
    written(write_lenses(table, readings, out or Path("reports") / loaded.name))


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _whole(word: str) -> int:
    if not word.isdecimal():
        raise SettingsError(f"{word!r} is no whole number; write numbers with commas between them, such as 1,5,9")
    return int(word)
