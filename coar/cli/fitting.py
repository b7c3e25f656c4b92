"""The commands fit, baselines and evaluate."""

from typing import Annotated, Any

import typer

from coar.cli.common import (
    EXECUTION,
    AddressOption,
    DeviceOption,
    EngineOption,
    OutOption,
    PipelineOption,
    RunArgument,
    WorkersOption,
    app,
    cluster,
    report_errors,
    reports,
    share,
    show,
    written,
)
from coar.errors import SettingsError


@app.command(epilog="Example: coar fit runs/digits-mean.zarr --method ols")
@report_errors
def fit(
    run: RunArgument,
    method: Annotated[str, typer.Option(help="auto, informed, ridge, lasso or ols.")] = "auto",
    masks: Annotated[int | None, typer.Option(help="Use only this many training masks, the first.")] = None,
    gradients: Annotated[int | None, typer.Option(help="Use only this many mask gradients, the first.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the fit [default: the method].")] = None,
    refit: Annotated[bool, typer.Option("--refit", help="Fit again even if the run has this fit.")] = False,
    worker: Annotated[str | None, typer.Option(help="Make one share of the sums, as in 3/64, and stop there.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Add up the workers' sums and solve.")] = False,
    engine: EngineOption = "local",
    address: AddressOption = None,
    workers: WorkersOption = 2,
    memory_limit: Annotated[
        str | None, typer.Option(help="Most memory, as in 4GiB [default: half of the free memory].")
    ] = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda or cuda:N; mps has no float64.", rich_help_panel=EXECUTION)
    ] = "auto",
) -> None:
    """Fit attributions to a collected run and write them into the run."""
    from coar.regression.fitting import fit as fit_run
    from coar.regression.fitting import fit_share
    from coar.store.run import Run

    one, crew = share(worker), cluster(engine, address, workers=workers)
    if (one is not None) + merge + (crew is not None) > 1:
        raise SettingsError("--worker, --merge and --engine ray exclude each other; give one of them")
    if one is not None:
        if gradients is not None or refit:
            raise SettingsError("--worker makes sums over masks; give --refit and --gradients with --merge")
        fit_share(Run.open(run), one, method=method, masks=masks, name=name)
        typer.echo(f"{run}: sums of worker {worker} made; once all are, run the same with --merge")
        return
    options: dict[str, Any] = {"method": method, "masks": masks, "gradients": gradients, "name": name, "refit": refit}
    options |= {"memory_limit": memory_limit, "device": device}
    attributions = fit_run(Run.open(run), **options, merge=merge, cluster=crew)
    record = attributions.fit
    with_gradients = f" and {record.gradients} mask gradients" if record.gradients else ""
    typer.echo(f"{run}: {attributions!r}, fitted on {record.masks} masks{with_gradients}")


@app.command(epilog="Example: coar baselines runs/digits-mean.zarr --pipeline pipelines/digits.py")
@report_errors
def baselines(run: RunArgument, pipeline: PipelineOption, device: DeviceOption = "auto") -> None:
    """Compute the leave-one-out and mask gradient baselines, to compare fits with."""
    from coar.baselines import BASELINES, applicable
    from coar.pipeline import load_pipeline
    from coar.store.run import Run

    opened = Run.open(run)
    study = load_pipeline(pipeline).study_of(opened)
    names = applicable(opened)
    for name, baseline in BASELINES.items():
        if name in names:
            baseline(study, opened, device=device)
            typer.echo(f"{run}: {name} done")
        else:
            typer.echo(f"{run}: {name} left out, since parameter slices have no output to gate")


@app.command(epilog="Example: coar evaluate runs/digits-mean.zarr")
@report_errors
def evaluate(run: RunArgument, out: OutOption = None) -> None:
    """Score the run's fits and baselines on masks that no fit has seen."""
    from coar.evaluation import evaluate as evaluate_run
    from coar.report import compact, write_evaluation
    from coar.store.run import Run

    evaluation = evaluate_run(Run.open(run))
    show(compact(evaluation.table))
    written(write_evaluation(evaluation, out or reports(run)))
