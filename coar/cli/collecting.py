"""The commands plan and collect."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coar.cli.common import (
    EXECUTION,
    SIZES,
    STUDY,
    WHERE,
    AddressOption,
    DeviceOption,
    EngineOption,
    GroupedCommand,
    WorkersOption,
    app,
    cluster,
    log_into,
    report_errors,
    share,
)
from coar.errors import SettingsError

if TYPE_CHECKING:
    from coar.collection.quality import RunQuality
    from coar.store.run import Run
    from coar.study import Study


@app.command(
    cls=GroupedCommand, epilog="Example: coar collect pipelines/digits.py --ablation zero --masks 4000 --precision auto"
)
@report_errors
def collect(
    pipeline: Annotated[Path, typer.Argument(metavar="PIPELINE", help="A pipeline file.")],
    run: Annotated[
        Path | None, typer.Option(help="The run [default: runs/<pipeline>-<ablation>.zarr].", rich_help_panel=STUDY)
    ] = None,
    masks: Annotated[
        int | None,
        typer.Option(help="Training masks [default: the pipeline's, or none with --gradients].", rich_help_panel=SIZES),
    ] = None,
    gradients: Annotated[
        int | None, typer.Option(help="Mask gradients [default: the pipeline's].", rich_help_panel=SIZES)
    ] = None,
    until: Annotated[
        float | None, typer.Option(help="Collect until this correlation on validation masks.", rich_help_panel=SIZES)
    ] = None,
    until_flat: Annotated[
        bool, typer.Option("--until-flat", help="Collect until more passes help little.", rich_help_panel=SIZES)
    ] = False,
    test_masks: Annotated[
        int | None, typer.Option(help="Held-out masks [default: the pipeline's].", rich_help_panel=SIZES)
    ] = None,
    validation_masks: Annotated[
        int, typer.Option(help="Held-out masks for choices along the way.", rich_help_panel=SIZES)
    ] = 0,
    test_fractions: Annotated[
        str | None,
        typer.Option(
            help="Further ablated fractions to test at, as in 0.05,0.2 [default: the pipeline's].",
            rich_help_panel=SIZES,
        ),
    ] = None,
    ablation: Annotated[
        str | None, typer.Option(help="Label, such as mean [default: the pipeline's].", rich_help_panel=STUDY)
    ] = None,
    ablated_fraction: Annotated[
        float | None, typer.Option(help="Share of components ablated in a mask.", rich_help_panel=STUDY)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the masks.", rich_help_panel=STUDY)] = None,
    device: DeviceOption = "auto",
    precision: Annotated[
        str, typer.Option(help="float32, bf16, or auto: bf16 if faster and accurate.", rich_help_panel=EXECUTION)
    ] = "float32",
    precision_tolerance: Annotated[
        float, typer.Option(help="Largest bf16 error, in units of the spread.", rich_help_panel=EXECUTION)
    ] = 0.05,
    batch_size: Annotated[
        int | None, typer.Option(help="Most examples per forward pass [default: measured].", rich_help_panel=EXECUTION)
    ] = None,
    memory_limit: Annotated[
        str | None, typer.Option(help="Memory for activations, as in 4GiB.", rich_help_panel=EXECUTION)
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the model, if that is faster.", rich_help_panel=EXECUTION)
    ] = False,
    mask_block: Annotated[
        int | None, typer.Option(help="Masks per unit of work, for a new run.", rich_help_panel=EXECUTION)
    ] = None,
    example_block: Annotated[
        int | None, typer.Option(help="Examples per unit of work, for a new run.", rich_help_panel=EXECUTION)
    ] = None,
    round_gradients: Annotated[
        bool,
        typer.Option("--round-gradients", help="Store mask gradients in half the bytes.", rich_help_panel=EXECUTION),
    ] = False,
    worker: Annotated[
        str | None, typer.Option(help="Do one share of the units, as in 3/64: the third of 64.", rich_help_panel=WHERE)
    ] = None,
    engine: EngineOption = "local",
    address: AddressOption = None,
    workers: WorkersOption = 2,
    log_file: Annotated[
        Path | None, typer.Option(help="Append events to a file, as lines of JSON.", rich_help_panel=WHERE)
    ] = None,
    gpus_per_worker: Annotated[
        float, typer.Option(help="GPUs, or a share of one, for each.", rich_help_panel=WHERE)
    ] = 0.0,
) -> None:
    """Record the model's outputs under random masks. Run it again to resume, or with more masks to extend the run."""
    from coar.collection.collect import collect as collect_run
    from coar.collection.execution import Execution
    from coar.pipeline import load_pipeline
    from coar.published import is_imported
    from coar.store.run import Run

    if log_file is not None:
        log_into(log_file)
    loaded = load_pipeline(pipeline)
    chosen = {"ablation": ablation, "ablated_fraction": ablated_fraction, "seed": seed}
    imported = run is not None and is_imported(run)
    if run is not None and imported:
        if any(value is not None for value in chosen.values()):
            raise SettingsError(f"{run} was imported, which sets ablation, fraction and seed; leave those options out")
        study, build = loaded.study_of(Run.open(run)), partial(_study_of, pipeline.absolute(), run)
    else:
        study, build = loaded.study(**chosen), partial(_study, pipeline.absolute(), chosen)
    path = run or Path("runs") / f"{loaded.name}-{study.ablation.label}.zarr"
    options: dict[str, Any] = {
        "worker": share(worker) or (1, 1),
        "cluster": cluster(engine, address, study=build, workers=workers, gpus_per_worker=gpus_per_worker),
        "test_masks": loaded.test_masks if test_masks is None else test_masks,
        "test_fractions": loaded.test_fractions if test_fractions is None else _numbers(test_fractions),
        "device": device,
        "precision": precision,
        "execution": Execution(
            batch_size=batch_size,
            memory_limit=memory_limit,
            compile=compiled,
            precision_tolerance=precision_tolerance,
            mask_block=mask_block,
            example_block=example_block,
            round_gradients=round_gradients,
        ),
    }
    if until is not None or until_flat:
        if (until is not None and until_flat) or masks is not None or gradients or worker:
            raise SettingsError(
                "--until and --until-flat choose masks and mask gradients themselves; give one of them alone"
            )
        _print_run(_until(study, path, until, {"validation_masks": validation_masks, **options}))
        return
    sizes = {"masks": masks or 0, "gradients": gradients or 0} if imported else loaded.sizes(masks, gradients)
    options |= {**sizes, "validation_masks": validation_masks}
    _print_run(collect_run(study, path, **options))


@app.command(epilog="Example: coar plan pipelines/cifar10.py --masks 4000 --gradients 128 --workers 8")
@report_errors
def plan(
    pipeline: Annotated[Path, typer.Argument(metavar="PIPELINE", help="A pipeline file.")],
    masks: Annotated[
        int | None, typer.Option(help="Training masks [default: the pipeline's, or none with --gradients].")
    ] = None,
    gradients: Annotated[int | None, typer.Option(help="Mask gradients [default: the pipeline's].")] = None,
    workers: Annotated[int, typer.Option(help="Machines like this one that share the work.")] = 1,
    ablation: Annotated[str | None, typer.Option(help="Label, such as mean [default: the pipeline's].")] = None,
    device: DeviceOption = "auto",
    precision: Annotated[str, typer.Option(help="float32, bf16, or auto.")] = "float32",
    batch_size: Annotated[int | None, typer.Option(help="Most examples per forward pass.")] = None,
    round_gradients: Annotated[
        bool, typer.Option("--round-gradients", help="Store mask gradients in half the bytes.")
    ] = False,
) -> None:
    """Time a few passes, make a small pilot run, and print the estimated cost of a run."""
    from coar.collection.cost import estimate
    from coar.collection.execution import Execution
    from coar.description import describe_estimate
    from coar.pipeline import load_pipeline

    loaded = load_pipeline(pipeline)
    study = loaded.study(ablation=ablation)
    found = estimate(
        study,
        **loaded.sizes(masks, gradients),
        test_masks=loaded.test_masks * len({study.sampler.ablated_fraction, *loaded.test_fractions}),
        workers=workers,
        device=device,
        precision=precision,
        execution=Execution(batch_size=batch_size, round_gradients=round_gradients),
    )
    for heading, words in describe_estimate(found).items():
        typer.echo(f"{heading:16} {words}")


def _step(now: "RunQuality") -> None:
    typer.echo(f"{now.gradients} mask gradients, {now.masks} masks: correlation {now.correlation:.3f}; {now.ceiling()}")


def _until(study: "Study", path: Path, correlation: float | None, options: dict[str, Any]) -> "Run":
    from coar.collection.adaptive import collect_until
    from coar.collection.quality import VALIDATION_MASKS

    options["validation_masks"] = options["validation_masks"] or VALIDATION_MASKS
    finished, why = collect_until(study, path, correlation=correlation, report=_step, **options)
    typer.echo(why)
    return finished


def _print_run(run: "Run") -> None:
    """Print the sizes of the run and how much of it is missing."""
    from coar.store.gradients import MaskGradients

    mask_gradients = MaskGradients(run)
    also = f" and {mask_gradients.count} mask gradients" if mask_gradients.count else ""
    missing = len(run.missing_units()) + len(mask_gradients.missing_units())
    far = f"{missing} units left to other workers" if missing else "complete"
    typer.echo(f"{run.path}: {len(run.plan)} masks{also} x {run.n_examples} examples, {far}")


def _study(pipeline: Path, options: dict[str, Any]) -> "Study":
    """Build the study; on a cluster each worker calls this."""
    from coar.pipeline import load_pipeline

    return load_pipeline(pipeline).study(**options)


def _study_of(pipeline: Path, run: Path) -> "Study":
    """Build the study of an imported run; on a cluster each worker calls this."""
    from coar.pipeline import load_pipeline
    from coar.store.run import Run

    return load_pipeline(pipeline).study_of(Run.open(run))


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise SettingsError(f"{text!r} is not a list of fractions; write it as in 0.05,0.2") from None
