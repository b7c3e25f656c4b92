"""The application, and the options and output functions that commands share."""

import functools
import json
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from coar.errors import CoarError, SettingsError
from coar.renamed import OPTIONS
from coar.store.storage_errors import storage_errors

if TYPE_CHECKING:
    import pandas as pd

    from coar.cluster import RayCluster

P = ParamSpec("P")
T = TypeVar("T")


class CommandGroup(TyperGroup):
    """The group of all commands; it refuses old names of options with a message that gives the new name."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Look for old names in all arguments, those of the command included, before parsing."""
        for word in args:
            old = word.partition("=")[0]
            if old in OPTIONS:
                typer.secho(f"error: {old} does not exist any more; use {OPTIONS[old]}", fg=typer.colors.RED, err=True)
                raise typer.Exit(2)
        return super().parse_args(ctx, args)


class GroupedCommand(TyperCommand):
    """A command whose help lists options under headings, given by their `rich_help_panel`."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write a section for each heading, in the order of its first option."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                kind = "Arguments" if parameter.param_type_name == "argument" else "Options"
                heading = getattr(parameter, "rich_help_panel", None) or kind
                sections.setdefault(heading, []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


app = typer.Typer(
    name="coar",
    cls=CommandGroup,
    help="Component attribution: which parts of a network made a prediction, and how to change that for good.",
    epilog="Example: coar collect pipelines/digits.py, then coar fit, evaluate, edit and report on the run it names.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

STUDY, SIZES, EXECUTION, WHERE = "Study", "Sizes", "Execution", "Where"  # headings of options in the help of collect

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run, such as runs/digits-mean.zarr.")]
PipelineOption = Annotated[Path, typer.Option("--pipeline", help="The pipeline file that the run was collected from.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.", rich_help_panel=EXECUTION)]
EngineOption = Annotated[str, typer.Option(help="local, or ray: workers on a cluster.", rich_help_panel=WHERE)]
AddressOption = Annotated[
    str | None, typer.Option(help="The Ray cluster's address [default: start one here].", rich_help_panel=WHERE)
]
WorkersOption = Annotated[int, typer.Option(help="Workers on the Ray cluster.", rich_help_panel=WHERE)]
OutOption = Annotated[Path | None, typer.Option("--out", help="Folder to write to [default: reports/<run>].")]


def report_errors(command: Callable[P, T]) -> Callable[P, T]:
    """Print a user's mistake as one message, and after an interruption the next step."""

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


def share(text: str | None) -> tuple[int, int] | None:
    """Parse the number of this worker and of all workers."""
    if text is None:
        return None
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal()):
        raise SettingsError(f"--worker {text} is not a share; write the number of the worker and of all, as in 3/64")
    return int(number), int(count)


def cluster(engine: str, address: str | None, **settings: Any) -> "RayCluster | None":
    """Return the cluster that the options name, or None for this process."""
    from coar.cluster import RayCluster

    if engine not in ("local", "ray"):
        raise SettingsError(f"unknown engine {engine!r}; choose local or ray")
    if engine == "ray":
        return RayCluster(address=address, **settings)
    if address is not None:
        raise SettingsError("--address names a Ray cluster; add --engine ray, or leave it out")
    return None


EVENT_FIELDS = ("event", "unit", "done", "units", "seconds", "idle")


class JsonLines(logging.Formatter):
    """Formats an event as a line of JSON: time, level, logger, message, and fields about units."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of one event."""
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": when, "level": record.levelname, "from": record.name, "message": record.getMessage()}
        return json.dumps(line | {key: vars(record)[key] for key in EVENT_FIELDS if key in vars(record)})


def log_into(path: Path) -> None:
    """Append events to a file, as lines of JSON; raise `StorageError` when it cannot be written."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path)
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("coar")
    logger.addHandler(handler)
    for shown in logging.getLogger().handlers:
        shown.setLevel(logging.INFO)
    logger.setLevel(logging.DEBUG)


def show(table: "pd.DataFrame") -> None:
    """Print a table."""
    typer.echo(table.to_string(index=False, float_format=lambda value: f"{value:.3f}"))


def written(files: list[Path]) -> None:
    """Print the names of the files that were written."""
    shown = ", ".join(str(file) for file in files[:6])
    typer.echo(f"wrote {shown}" + (f" and {len(files) - 6} more" if len(files) > 6 else ""))


def reports(run: Path) -> Path:
    """Return the output folder of a run."""
    return Path("reports") / run.stem
