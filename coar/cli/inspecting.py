"""The commands report, explore, info, verify, copy and merge."""

import socket
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from coar.cli.common import (
    DeviceOption,
    OutOption,
    PipelineOption,
    RunArgument,
    app,
    report_errors,
    reports,
    written,
)
from coar.errors import CoarError, PipelineError


@app.command(epilog="Example: coar report runs/digits-mean.zarr --pipeline pipelines/digits.py")
@report_errors
def report(
    run: RunArgument,
    pipeline: Annotated[
        Path | None, typer.Option(help="The run's pipeline; adds pictures or texts, predictions and activations.")
    ] = None,
    fit_name: Annotated[str | None, typer.Option("--fit", help="Name of the fit [default: the best one].")] = None,
    out: OutOption = None,
) -> None:
    """Write one interactive HTML page of a run: its examples, components, predictions, edits and evaluation."""
    from coar.explorer.page import write_page
    from coar.pipeline import load_pipeline
    from coar.store.run import Run

    opened = Run.open(run)
    try:
        source = None if pipeline is None else load_pipeline(pipeline).source(opened)
    except CoarError as error:
        raise PipelineError(
            f"{error}; 'coar report {run}' without --pipeline writes a page of what the run itself holds"
        ) from error
    written([write_page(opened, out or reports(run), fit=fit_name, source=source)])


@app.command(epilog="Example: coar explore runs/digits-mean.zarr --pipeline pipelines/digits.py")
@report_errors
def explore(
    run: RunArgument,
    pipeline: PipelineOption,
    fit_name: Annotated[str | None, typer.Option("--fit", help="Name of the fit [default: the best one].")] = None,
    port: Annotated[int, typer.Option(help="Port to serve on; 0 for any free one.")] = 0,
    host: Annotated[str, typer.Option(help="Address to serve on; others let other machines in.")] = "127.0.0.1",
    device: DeviceOption = "auto",
    out: OutOption = None,
) -> None:
    """Serve the page of a run to this machine, with a what-if that runs the model; stop it with Ctrl-C."""
    from coar.explorer.server import serve_page
    from coar.pipeline import load_pipeline
    from coar.store.run import Run

    opened = Run.open(run)
    source = load_pipeline(pipeline).source(opened)
    server = serve_page(opened, out or reports(run), source, fit=fit_name, host=host, port=port, device=device)
    typer.echo(f"open {server.url} in a browser; stop with Ctrl-C")
    if not _has_browser():
        tunnel = f"ssh -L {server.server_port}:{host}:{server.server_port} {socket.gethostname()}"
        typer.echo(f"no browser was found here: after '{tunnel}' on another machine the address works there, too")
        typer.echo("'coar report' writes the page as a file to take elsewhere, without the model behind it")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        typer.echo("stopped")
    finally:
        server.server_close()


def _has_browser() -> bool:
    try:
        webbrowser.get()
    except webbrowser.Error:
        return False
    return True


@app.command(epilog="Example: coar info runs/digits-mean.zarr --watch 10")
@report_errors
def info(
    run: RunArgument,
    watch: Annotated[float | None, typer.Option(help="Repeat every N seconds until complete.")] = None,
    metrics_file: Annotated[Path | None, typer.Option(help="Write the progress for Prometheus, too.")] = None,
    log_file: Annotated[Path | None, typer.Option(help="Count lost workers in the log of coar collect.")] = None,
) -> None:
    """Print the contents and progress of a run."""
    from coar.cli.watching import watched, write_metrics
    from coar.description import describe
    from coar.store.fits import fit_names
    from coar.store.run import Run

    opened = Run.open(run)
    for heading, words in {**describe(opened), "fits": ", ".join(fit_names(opened)) or "none"}.items():
        typer.echo(f"{heading:11} {words}")
    for glance in watched(opened.path, every=watch, log_file=log_file):
        if metrics_file is not None:
            write_metrics(glance, metrics_file)
        if watch is not None:
            typer.echo(str(glance))


@app.command(epilog="Example: coar verify runs/digits-mean.zarr --repair")
@report_errors
def verify(
    run: RunArgument,
    repair: Annotated[bool, typer.Option("--repair", help="Delete what is damaged and can be made again.")] = False,
) -> None:
    """Read every chunk of a run and name what is missing or damaged; exit with 1 when anything is."""
    from coar.store.integrity import repair as repair_run
    from coar.store.integrity import verify as verify_run
    from coar.store.run import Run

    opened = Run.open(run)
    problems = verify_run(opened)
    for problem in problems:
        remedy = f"'{problem.mended_by}' makes it again" if problem.mended_by else "only a copy can restore it"
        typer.echo(f"{problem.chunk}: {problem.what}; {remedy}")
    if not problems:
        typer.echo(f"{run}: every chunk is present and whole")
        return
    if not repair:
        typer.echo(f"{len(problems)} problems; --repair deletes what can be made again")
        raise typer.Exit(1)
    left = repair_run(opened, problems)
    typer.echo(
        f"{len(problems) - len(left)} of {len(problems)} problems cleared; collect and fit again to fill the gaps"
    )
    raise typer.Exit(1 if left else 0)


@app.command(epilog="Example: coar copy runs/digits-mean.zarr s3://bucket/digits-mean.zarr")
@report_errors
def copy(
    run: RunArgument, destination: Annotated[Path, typer.Argument(metavar="DEST", help="A path or an address.")]
) -> None:
    """Copy a run, and check every chunk of the source and of the copy."""
    from coar.store.copying import copy as copy_run

    typer.echo(f"{copy_run(run, destination).path}: every chunk of the source is present and whole")


@app.command(epilog="Example: coar merge runs/part-1.zarr runs/part-2.zarr --into runs/whole.zarr")
@report_errors
def merge(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN ...", help="Runs of one study.")],
    into: Annotated[Path, typer.Option(help="The new run.")],
) -> None:
    """Combine several runs of one study, each with some of its units, into a new run."""
    from coar.store.copying import merge as merge_runs

    made = merge_runs(runs, into=into)
    missing = len(made.missing_units())
    typer.echo(f"{made.path}: {len(made.plan)} masks, {missing} of {len(made.units())} units left to collect")
