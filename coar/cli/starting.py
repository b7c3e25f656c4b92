"""The command that writes a new pipeline file."""

from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from coar.cli.common import app, report_errors, written
from coar.errors import SettingsError
from coar.store.storage_errors import storage_errors

KINDS = ("image", "text", "module")


@app.command(epilog="Example: coar new my_pipeline.py --kind text")
@report_errors
def new(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write, such as my_pipeline.py.")],
    kind: Annotated[
        str, typer.Option(help="image for a classifier, text for a language model, module for any other.")
    ] = "image",
) -> None:
    """Write a pipeline file that runs unchanged, with a small random model, as a start for your own."""
    if kind not in KINDS:
        raise SettingsError(f"unknown kind {kind!r}; choose {', '.join(KINDS)}")
    if file.suffix != ".py" or not file.stem.isidentifier():
        raise SettingsError(f"{file} does not name a Python file; give a name such as my_pipeline.py")
    template = files("coar.cli").joinpath("templates", f"{kind}.txt").read_text(encoding="utf-8")
    with storage_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with file.open("x", encoding="utf-8") as new_file:
                new_file.write(template.format(file=file, name=file.stem))
        except FileExistsError:
            raise SettingsError(f"{file} already exists; choose another name, or remove it first") from None
    written([file])
    typer.echo(f"it runs unchanged: coar collect {file}; replace model() and the examples by your own")
