"""The command line: every command is one call of the package."""

from coar.cli import all_steps, circuits, collecting, editing, fitting, inspecting, language, sharing, starting
from coar.cli.common import app

__all__ = [
    "all_steps",
    "app",
    "circuits",
    "collecting",
    "editing",
    "fitting",
    "inspecting",
    "language",
    "main",
    "sharing",
    "starting",
]


def main() -> None:
    """Run the command line."""
    app()
