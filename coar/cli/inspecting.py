"""Commands that look at a run: report, info and verify."""

from typing import Annotated

import typer

from coar.cli.common import OutOption, RunArgument, app, reports, told, written


@app.command(epilog="Example: coar report runs/digits-mean.zarr")
@told
def report(run: RunArgument, out: OutOption = None) -> None:
    """Gather what evaluate and edit wrote on one HTML page."""
    from coar.report import write_page
    from coar.store import Run

    written([write_page(Run.open(run), out or reports(run))])


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
