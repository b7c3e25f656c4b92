"""The commands edit and undo."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from coar.cli.common import DeviceOption, OutOption, RunArgument, app, report_errors, reports, show, written
from coar.errors import SettingsError

if TYPE_CHECKING:
    import numpy as np

    from coar.attributions import Attributions
    from coar.editing.goal import EditGoal
    from coar.editing.result import TaskResult
    from coar.editing.select import RuleName
    from coar.pipeline import Pipeline
    from coar.study import Study

LISTED = 10  # groups in a message
RULES = ("verified", "welch", "predicted")


@app.command(
    epilog="Examples: coar edit runs/digits-mean.zarr --pipeline pipelines/digits.py --task forget --label 3; "
    "coar edit runs/digits-mean.zarr --targets 'label == 3' --references 'label != 3' --direction decrease --budget 20"
)
@report_errors
def edit(
    run: RunArgument,
    targets: Annotated[str | None, typer.Option(help="Condition over metadata columns: what to change.")] = None,
    references: Annotated[str | None, typer.Option(help="Condition of the same kind: what not to change.")] = None,
    direction: Annotated[str | None, typer.Option(help="decrease or increase the targets' output.")] = None,
    groups: Annotated[str | None, typer.Option(help="Column of the groups over which harm is bounded.")] = None,
    pairs: Annotated[str | None, typer.Option(help="Column that matches each target with a reference.")] = None,
    clusters: Annotated[str | None, typer.Option(help="Column that marks versions of one thing.")] = None,
    budget: Annotated[int | None, typer.Option(help="Most components to ablate [default: the best trade-off]")] = None,
    task: Annotated[str | None, typer.Option(help="forget, fix, group, backdoor or typographic.")] = None,
    label: Annotated[int | None, typer.Option(help="The class to forget.")] = None,
    group: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN[=VALUE]",
            help="Column of the groups of --task group, and the group to strengthen [default: the worst].",
        ),
    ] = None,
    rule: Annotated[str | None, typer.Option(help="verified (default with --pipeline), welch or predicted.")] = None,
    constants: Annotated[
        str | None,
        typer.Option(help="goal to train constants for the goal, run for the run's [default: depends on the task]."),
    ] = None,
    strength: Annotated[
        str | None,
        typer.Option(
            help="full, minimal (the smallest sufficient strength) or per_component [default: depends on the task]."
        ),
    ] = None,
    harm: Annotated[float | None, typer.Option(help="Points that references may lose on average.")] = None,
    group_harm: Annotated[float | None, typer.Option(help="Points that any group of references may lose.")] = None,
    name: Annotated[str, typer.Option(help="Name of an edit by --targets, and of its folder.")] = "edit",
    pipeline: Annotated[Path | None, typer.Option(help="The run's pipeline; needed to test and judge edits.")] = None,
    fit_name: Annotated[str | None, typer.Option("--fit", help="Name of the fit [default: the best one].")] = None,
    precision: Annotated[str, typer.Option(help="float32, or bf16 for a faster search.")] = "float32",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the result and write nothing.")] = False,
    device: DeviceOption = "auto",
    out: OutOption = None,
) -> None:
    """Choose components to ablate permanently; with a pipeline, test them, apply the edit and judge it."""
    from coar.attributions import load
    from coar.editing.goal import EditGoal
    from coar.pipeline import load_pipeline
    from coar.store.run import Run

    check_options(task, targets, references, name, label, rule)
    if group is not None and task != "group":
        raise SettingsError("--group names the column of --task group; add that task, or leave --group out")
    attributions = load(run, fit_name)
    folder = out or reports(run)
    goal = None
    if targets is not None:
        if direction is None:
            raise SettingsError(
                "--targets needs --direction: add --direction decrease, to make a model fail on the targets, "
                "or --direction increase, to make it get them right"
            )
        conditions = {"targets": targets, "references": references, "direction": direction}
        goal = EditGoal(**conditions, groups=groups, pairs=pairs, clusters=clusters)
    if pipeline is None or rule == "predicted":
        by = cast("RuleName", rule or "welch")
        _without_trying(attributions, goal, by, budget, None if dry_run else folder / name / "edit.json")
        return
    asked = Asked(task, goal, name, label, group)
    options = {"budget": budget, "rule": rule or "verified", "precision": precision, "device": device}
    how = {"constants": constants, "strength": strength}
    options |= {**_bound(harm, group_harm), **{key: value for key, value in how.items() if value is not None}}
    loaded = load_pipeline(pipeline)
    study = loaded.study_of(Run.open(run))
    _print_result(run_task(loaded, study, attributions, asked, options), study, None if dry_run else folder)


@app.command(
    epilog="Example: coar undo reports/digits-mean/forget-3/edit.safetensors "
    "--edit reports/digits-mean/forget-3/edit.json --out original.safetensors"
)
@report_errors
def undo(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="The edited weights.")],
    made_by: Annotated[Path, typer.Option("--edit", help="The edit that made them, as JSON.")],
    out: Annotated[Path, typer.Option("--out", help="Where to write the original weights, as safetensors.")],
) -> None:
    """Restore the original weights of an edited checkpoint, bit for bit."""
    from coar.editing.edit import Edit
    from coar.weights import read_state, save_state

    made = Edit.load(made_by)
    save_state(made.kept().restore(read_state(checkpoint), original=made.weights), out)
    written([out])


@dataclass(frozen=True)
class Asked:
    """The purpose of an edit: a task by name, or a goal with a name of its own.

    Attributes:
        task: Name of a task.
        goal: A goal, without a task.
        name: Name of an edit by a goal.
        label: The class to forget.
        group: The column of groups, and after `=` the group to strengthen.
    """

    task: str | None
    goal: "EditGoal | None"
    name: str
    label: int | None
    group: str | None = None

    def of_group(self, metadata: "Mapping[str, np.ndarray]") -> dict[str, Any]:
        """Return the arguments of `strengthen_group` for the group that is asked for."""
        column, named, value = str(self.group).partition("=")
        if not named:
            return {"column": column}
        known = {str(one): one for one in sorted(set(metadata[column].tolist()))} if column in metadata else {}
        if value not in known:
            there = ", ".join([*known][:LISTED]) or f"there is no such column, only {', '.join(metadata)}"
            raise SettingsError(f"--group {self.group} names no group; {column!r} has: {there}")
        return {"column": column, "group": known[value]}


def check_options(
    task: str | None, targets: str | None, references: str | None, name: str, label: int | None, rule: str | None
) -> None:
    """Raise `SettingsError` unless the options name one task or one goal, and a known rule."""
    from coar.editing.tasks import TASKS

    if rule is not None and rule not in RULES:
        raise SettingsError(f"unknown rule {rule!r}; choose {', '.join(RULES)}")
    if task is None:
        if targets is None or references is None:
            raise SettingsError("give --targets and --references, or --task with --pipeline")
        if label is not None:
            raise SettingsError("--label names the class of --task forget; add that task, or leave --label out")
        return
    if targets is not None or references is not None or name != "edit":
        raise SettingsError("--task sets targets, references and name; leave those options out")
    if task not in TASKS or (task == "forget") != (label is not None):
        raise SettingsError(f"choose --task forget with --label, or one of {', '.join(TASKS)} without")


def _bound(harm: float | None, group_harm: float | None) -> dict[str, Any]:
    """Return the bound as an option if the user sets one."""
    from coar.editing.goal import Bound

    given = {"mean": harm, "group": group_harm}
    settings = {key: value / 100 for key, value in given.items() if value is not None}
    return {"bound": Bound(**settings)} if settings else {}


def _without_trying(
    attributions: "Attributions", goal: "EditGoal | None", rule: "RuleName", budget: int | None, file: Path | None
) -> None:
    """Choose by attributions alone, and print the predicted effect."""
    from coar.editing.predict import predict_edit
    from coar.editing.select import edit

    if rule == "verified" or goal is None or budget is None:
        raise SettingsError(
            "without --pipeline, and by the rule predicted, edits are not tested: give --targets, --references and "
            "--budget, and no rule but welch or predicted"
        )
    chosen = edit(attributions, goal, budget=budget, rule=rule)
    show(chosen.to_pandas())
    predicted = predict_edit(attributions, chosen)
    typer.echo(
        f"predicted change of mean outputs, with 95 % intervals: targets {predicted.targets}, references "
        f"{predicted.references}, of these {predicted.group} most: {predicted.worst}"
    )
    if file is not None:
        chosen.save(file)
        written([file])


def run_task(
    loaded: "Pipeline", study: "Study", attributions: "Attributions", asked: Asked, options: dict[str, Any]
) -> "TaskResult":
    """Do a task on the pipeline's examples and with its goal."""
    from coar.editing.evaluate import columns
    from coar.editing.tasks import TASKS, reach_goal

    common = (attributions, study.model, study.examples, loaded.judge())
    options["choosing"] = loaded.choosing()
    if study.output.hard_and_smooth():
        options["output"] = study.output
    if asked.goal is not None:
        return reach_goal(*common, goal=asked.goal, name=asked.name, **options)
    if asked.task == "forget":
        options["label"] = asked.label
    elif asked.group is not None:
        options |= asked.of_group(columns(study.examples))
    elif asked.task != "fix":
        options["goal"] = loaded.goal()
    return TASKS[str(asked.task)](*common, **options)


def _print_result(result: "TaskResult", study: "Study", folder: Path | None) -> None:
    """Print the result of a task, and write it into a folder unless it is a dry run."""
    from coar.report import write_task

    show(result.table)
    passes = sum(chosen.passes for chosen in result.selections)
    count = "1 edit" if len(result.edits) == 1 else f"{len(result.edits)} edits"
    trained = sum(chosen.constants == "goal" for chosen in result.selections)
    which = "" if len(result.edits) == 1 else f" {trained} of them"
    how = f",{which} with constants made for the goal" if trained else ""
    typer.echo(f"{count}{how}, chosen by {passes:,} forward passes of one example")
    if folder is None:
        for made in result.edits:
            show(made.to_pandas())
        typer.echo("dry run: nothing was written")
        return
    written(write_task(result, study.model, folder / result.name, study.examples))
