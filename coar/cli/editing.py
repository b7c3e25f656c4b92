"""The command that edits: choose components, apply, judge."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coar.cli.common import DeviceOption, OutOption, RunArgument, app, reports, show, told, written
from coar.errors import SettingsError

if TYPE_CHECKING:
    from coar.attributions import Attributions
    from coar.editing import EditGoal


@app.command(
    epilog="Examples: coar edit runs/digits-mean.zarr --pipeline pipelines/digits.py --task forget --label 3; "
    "coar edit runs/digits-mean.zarr --targets 'label == 3' --references 'label != 3' --direction decrease --budget 20"
)
@told
def edit(
    run: RunArgument,
    targets: Annotated[str | None, typer.Option(help="Condition over metadata columns: what to change.")] = None,
    references: Annotated[str | None, typer.Option(help="Condition likewise: what to leave alone.")] = None,
    direction: Annotated[str, typer.Option(help="decrease or increase the targets' output.")] = "decrease",
    budget: Annotated[int | None, typer.Option(help="Components to ablate [default: the best trade-off]")] = None,
    task: Annotated[str | None, typer.Option(help="forget (a class) or fix (single errors).")] = None,
    label: Annotated[int | None, typer.Option(help="The class to forget.")] = None,
    name: Annotated[str, typer.Option(help="Name of an edit by --targets, and of its folder.")] = "edit",
    pipeline: Annotated[Path | None, typer.Option(help="The run's pipeline; needed to apply and judge.")] = None,
    fit_name: Annotated[str | None, typer.Option("--fit", help="Name of the fit [default: the best there].")] = None,
    device: DeviceOption = "auto",
    out: OutOption = None,
) -> None:
    """Choose components to ablate for good; with a pipeline, apply the edit and judge it on unseen examples."""
    from coar.attributions import load
    from coar.editing import EditGoal
    from coar.editing import edit as choose

    attributions = load(run, fit_name)
    folder = out or reports(run)
    goal = None
    if task is None:
        if targets is None or references is None:
            raise SettingsError("give --targets and --references, or --task with --pipeline")
        if label is not None:
            raise SettingsError("--label names the class of --task forget; add that task, or leave --label out")
        goal = EditGoal(targets=targets, references=references, direction=direction)
    elif targets is not None or references is not None or name != "edit":
        raise SettingsError("--task sets targets, references and name; leave those options out")
    if pipeline is not None:
        _apply_and_judge(run, pipeline, attributions, folder, task, label, goal, name, budget, device)
        return
    if goal is None or budget is None:
        raise SettingsError("without --pipeline nothing can be tried out: give --targets, --references and --budget")
    chosen = choose(attributions, goal, budget=budget)
    show(chosen.to_pandas())
    chosen.save(folder / name / "edit.json")
    written([folder / name / "edit.json"])


def _apply_and_judge(
    run: Path,
    pipeline: Path,
    attributions: "Attributions",
    folder: Path,
    task: str | None,
    label: int | None,
    goal: "EditGoal | None",
    name: str,
    budget: int | None,
    device: str,
) -> None:
    from coar.editing import fix_errors, forget_class, reach_goal
    from coar.pipeline import load_pipeline
    from coar.report import write_task
    from coar.store import Run

    if task not in (None, "forget", "fix") or (task == "forget") != (label is not None):
        raise SettingsError("choose --task forget with --label, or --task fix without")
    loaded = load_pipeline(pipeline)
    study = loaded.study_of(Run.open(run))
    common = (attributions, study.model, study.examples, loaded.judge())
    if goal is not None:
        result = reach_goal(*common, goal=goal, name=name, budget=budget, device=device)
    elif label is not None:
        result = forget_class(*common, label=label, budget=budget, device=device)
    else:
        result = fix_errors(*common, budget=budget, device=device)
    show(result.table)
    written(write_task(result, study.model, folder / result.name))
