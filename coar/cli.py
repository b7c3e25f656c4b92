"""The command line: every command is one call of the package."""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar

import typer

from coar.errors import CoarError, SettingsError

if TYPE_CHECKING:
    import pandas as pd

    from coar.attributions import Attributions
    from coar.editing import EditGoal
    from coar.planning import Progress

P = ParamSpec("P")
T = TypeVar("T")

app = typer.Typer(
    name="coar",
    help="Component attribution: which parts of a network made a prediction, and how to change that for good.",
    epilog="Example: coar collect pipelines/digits.py, then coar fit, evaluate, edit and report on the run it names.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run, such as runs/digits-mean.zarr.")]
PipelineOption = Annotated[Path, typer.Option("--pipeline", help="The pipeline file that the run was collected from.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
OutOption = Annotated[Path | None, typer.Option("--out", help="Folder to write to [default: reports/<run>].")]


def told(command: Callable[P, T]) -> Callable[P, T]:
    """Print a user's mistake as one message, and an interruption as what to do next."""

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("coar").setLevel(logging.INFO)
        try:
            return command(*args, **kwargs)
        except CoarError as error:
            typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt as interruption:
            typer.secho(str(interruption) or "interrupted", fg=typer.colors.YELLOW, err=True)
            raise typer.Exit(130) from None

    return wrapper


@app.command(epilog="Example: coar collect pipelines/digits.py --ablation zero --masks 4000 --precision auto")
@told
def collect(
    pipeline: Annotated[Path, typer.Argument(metavar="PIPELINE", help="A pipeline file.")],
    run: Annotated[Path | None, typer.Option(help="The run [default: runs/<pipeline>-<ablation>.zarr].")] = None,
    masks: Annotated[int | None, typer.Option(help="Training masks [default: the pipeline's].")] = None,
    probes: Annotated[int, typer.Option(help="Probes, for informed attributions.")] = 0,
    until: Annotated[float | None, typer.Option(help="Go on until validation masks are predicted so well.")] = None,
    until_flat: Annotated[bool, typer.Option("--until-flat", help="Go on until more passes promise little.")] = False,
    test_masks: Annotated[int | None, typer.Option(help="Held-out masks [default: the pipeline's].")] = None,
    validation_masks: Annotated[int, typer.Option(help="Masks kept apart for choices along the way.")] = 0,
    test_fractions: Annotated[
        str | None, typer.Option(help="Further ablated fractions to test at, as in 0.05,0.2 [default: the pipeline's].")
    ] = None,
    ablation: Annotated[str | None, typer.Option(help="mean or zero [default: the pipeline's].")] = None,
    ablated_fraction: Annotated[float | None, typer.Option(help="Share of components ablated in a mask.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the masks.")] = None,
    device: DeviceOption = "auto",
    precision: Annotated[str, typer.Option(help="float32, bf16, or auto: bf16 if faster and near enough.")] = "float32",
    precision_tolerance: Annotated[float, typer.Option(help="Largest bf16 error, in units of the spread.")] = 0.05,
    batch_size: Annotated[int | None, typer.Option(help="Most examples per forward pass [default: measured].")] = None,
    memory_limit: Annotated[str | None, typer.Option(help="Memory for activations, as in 4GiB.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the model, if that is faster.")] = False,
    mask_block: Annotated[int | None, typer.Option(help="Masks per unit of work, for a new run.")] = None,
    example_block: Annotated[int | None, typer.Option(help="Examples per unit of work, for a new run.")] = None,
) -> None:
    """Record the model's outputs under random masks. Run it again to go on, or with more masks to extend the run."""
    from coar.engines import MASK_BLOCK
    from coar.engines import collect as collect_run
    from coar.pipeline import load_pipeline
    from coar.planning import VALIDATION_MASKS, collect_until
    from coar.store import Probes

    loaded = load_pipeline(pipeline)
    study = loaded.study(ablation=ablation, ablated_fraction=ablated_fraction, seed=seed)
    path = run or Path("runs") / f"{loaded.name}-{study.ablation.label}.zarr"
    options: dict[str, Any] = {
        "test_masks": loaded.test_masks if test_masks is None else test_masks,
        "test_fractions": loaded.test_fractions if test_fractions is None else _numbers(test_fractions),
        "device": device,
        "precision": precision,
        "precision_tolerance": precision_tolerance,
        "batch_size": batch_size,
        "memory_limit": memory_limit,
        "compile": compiled,
        "mask_block": MASK_BLOCK if mask_block is None else mask_block,
        "example_block": example_block,
    }
    if until is not None or until_flat:
        if (until is not None and until_flat) or masks is not None or probes:
            raise SettingsError("--until and --until-flat choose masks and probes themselves; give one of them alone")
        judged: dict[str, Any] = {"validation_masks": validation_masks or VALIDATION_MASKS, "report": _step}
        finished, why = collect_until(study, path, correlation=until, **judged, **options)
        typer.echo(why)
    else:
        count = (0 if probes else loaded.masks) if masks is None else masks
        finished = collect_run(study, path, masks=count, probes=probes, validation_masks=validation_masks, **options)
    probed = Probes(finished).count
    also = f" and {probed} probes" if probed else ""
    typer.echo(f"{finished.path}: {len(finished.plan)} masks{also} x {finished.n_examples} examples, complete")


@app.command(epilog="Example: coar plan pipelines/cifar10.py --masks 4000 --probes 128 --workers 8")
@told
def plan(
    pipeline: Annotated[Path, typer.Argument(metavar="PIPELINE", help="A pipeline file.")],
    masks: Annotated[
        int | None, typer.Option(help="Training masks [default: the pipeline's, or 0 with probes].")
    ] = None,
    probes: Annotated[int, typer.Option(help="Probes, for informed attributions.")] = 0,
    workers: Annotated[int, typer.Option(help="Machines like this one that share the work.")] = 1,
    ablation: Annotated[str | None, typer.Option(help="mean or zero [default: the pipeline's].")] = None,
    device: DeviceOption = "auto",
    precision: Annotated[str, typer.Option(help="float32, bf16, or auto.")] = "float32",
    batch_size: Annotated[int | None, typer.Option(help="Most examples per forward pass.")] = None,
) -> None:
    """Time a few passes and make a small pilot run; say what a run would cost before anything is spent."""
    from coar.pipeline import load_pipeline
    from coar.planning import estimate
    from coar.report import describe_estimate

    loaded = load_pipeline(pipeline)
    study = loaded.study(ablation=ablation)
    found = estimate(
        study,
        masks=(0 if probes else loaded.masks) if masks is None else masks,
        probes=probes,
        test_masks=loaded.test_masks * len({study.sampler.ablated_fraction, *loaded.test_fractions}),
        workers=workers,
        device=device,
        precision=precision,
        batch_size=batch_size,
    )
    for heading, words in describe_estimate(found).items():
        typer.echo(f"{heading:16} {words}")


@app.command(epilog="Example: coar fit runs/digits-mean.zarr --method ols")
@told
def fit(
    run: RunArgument,
    method: Annotated[str, typer.Option(help="auto, informed, ridge, lasso or ols.")] = "auto",
    masks: Annotated[int | None, typer.Option(help="Use only the first so many training masks.")] = None,
    probes: Annotated[int | None, typer.Option(help="Use only the first so many probes.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the fit [default: the method].")] = None,
    refit: Annotated[bool, typer.Option("--refit", help="Fit again even when it is there.")] = False,
) -> None:
    """Fit attributions to a collected run and write them into it."""
    from coar.regression import fit as fit_run
    from coar.store import Run

    attributions = fit_run(Run.open(run), method=method, masks=masks, probes=probes, name=name, refit=refit)
    facts = attributions.facts["fit"]
    probed = f" and {facts['probes']} probes" if "probes" in facts else ""
    typer.echo(f"{run}: {attributions!r}, fitted on {facts['masks']} masks{probed}")


@app.command(epilog="Example: coar baselines runs/digits-mean.zarr --pipeline pipelines/digits.py")
@told
def baselines(run: RunArgument, pipeline: PipelineOption, device: DeviceOption = "auto") -> None:
    """Compute leave-one-out and gradient x gate attributions, to compare with."""
    from coar.baselines import BASELINES
    from coar.pipeline import load_pipeline
    from coar.store import Run

    opened = Run.open(run)
    study = load_pipeline(pipeline).study_of(opened)
    for name, baseline in BASELINES.items():
        if name == "gradient_x_gate" and any(component.side == "parameter" for component in opened.components):
            typer.echo(f"{run}: {name} left out, since parameter slices have no output to gate")
            continue
        baseline(study, opened, device=device)
        typer.echo(f"{run}: {name} done")


@app.command(epilog="Example: coar evaluate runs/digits-mean.zarr")
@told
def evaluate(run: RunArgument, out: OutOption = None) -> None:
    """Score the run's fits and baselines on masks that no fit has seen."""
    from coar.evaluation import evaluate as evaluate_run
    from coar.report import compact, write_evaluation
    from coar.store import Run

    evaluation = evaluate_run(Run.open(run))
    _show(compact(evaluation.table))
    _written(write_evaluation(evaluation, out or _reports(run)))


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
    folder = out or _reports(run)
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
    _show(chosen.to_pandas())
    chosen.save(folder / name / "edit.json")
    _written([folder / name / "edit.json"])


@app.command(epilog="Example: coar report runs/digits-mean.zarr")
@told
def report(run: RunArgument, out: OutOption = None) -> None:
    """Gather what evaluate and edit wrote on one HTML page."""
    from coar.report import write_page
    from coar.store import Run

    _written([write_page(Run.open(run), out or _reports(run))])


@app.command(epilog="Example: coar info runs/digits-mean.zarr")
@told
def info(run: RunArgument) -> None:
    """Say what a run holds and how far it is."""
    from coar.report import describe
    from coar.store import Run
    from coar.store.fits import fit_names

    opened = Run.open(run)
    for heading, words in {**describe(opened), "fits": ", ".join(fit_names(opened)) or "none"}.items():
        typer.echo(f"{heading:11} {words}")


@app.command(epilog="Example: coar verify runs/digits-mean.zarr --repair")
@told
def verify(
    run: RunArgument,
    repair: Annotated[bool, typer.Option("--repair", help="Delete what is damaged and can be made again.")] = False,
) -> None:
    """Read every chunk of a run and name what is missing or damaged; exit with 1 when anything is."""
    from coar.store import Run
    from coar.store import repair as repair_run
    from coar.store import verify as verify_run

    opened = Run.open(run)
    problems = verify_run(opened)
    for problem in problems:
        remedy = f"'{problem.mended_by}' makes it again" if problem.mended_by else "only a copy can bring it back"
        typer.echo(f"{problem.chunk}: {problem.what}; {remedy}")
    if not problems:
        typer.echo(f"{run}: every chunk is there and whole")
        return
    if not repair:
        typer.echo(f"{len(problems)} problems; --repair deletes what can be made again")
        raise typer.Exit(1)
    left = repair_run(opened, problems)
    typer.echo(
        f"{len(problems) - len(left)} of {len(problems)} problems cleared; collect and fit again to fill the gaps"
    )
    raise typer.Exit(1 if left else 0)


def main() -> None:
    """Run the command line."""
    app()


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
    _show(result.table)
    _written(write_task(result, study.model, folder / result.name))


def _step(now: "Progress") -> None:
    typer.echo(f"{now.probes} probes, {now.masks} masks: correlation {now.correlation:.3f}; {now.ceiling()}")


def _show(table: "pd.DataFrame") -> None:
    typer.echo(table.to_string(index=False, float_format=lambda value: f"{value:.3f}"))


def _written(files: list[Path]) -> None:
    shown = ", ".join(str(file) for file in files[:6])
    typer.echo(f"wrote {shown}" + (f" and {len(files) - 6} more" if len(files) > 6 else ""))


def _reports(run: Path) -> Path:
    return Path("reports") / run.stem


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise SettingsError(f"{text!r} is no list of fractions; write it as in 0.05,0.2") from None
