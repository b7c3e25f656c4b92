"""What all commands share: the application, their common options, and how they print."""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ParamSpec, TypeVar

import typer

from coar.errors import CoarError

if TYPE_CHECKING:
    import pandas as pd

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


def show(table: "pd.DataFrame") -> None:
    """Print a table."""
    typer.echo(table.to_string(index=False, float_format=lambda value: f"{value:.3f}"))


def written(files: list[Path]) -> None:
    """Say which files were written."""
    shown = ", ".join(str(file) for file in files[:6])
    typer.echo(f"wrote {shown}" + (f" and {len(files) - 6} more" if len(files) > 6 else ""))


def reports(run: Path) -> Path:
    """Return the folder for what is made of a run."""
    return Path("reports") / run.stem
