"""The command line: every command is one call of the package."""

from coar.cli import collecting, editing, fitting, inspecting
from coar.cli.common import app

__all__ = ["app", "collecting", "editing", "fitting", "inspecting", "main"]


def main() -> None:
    """Run the command line."""
    app()
