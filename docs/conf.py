"""How Sphinx builds the documentation: `sphinx-build -W -b html docs docs/_build`."""

import re
from pathlib import Path

_VERSION = Path(__file__).parents[1] / "coar" / "_version.py"

project = "coar"
author = "the coar authors"
project_copyright = f"2026, {author}"
release = re.findall(r'"([^"]+)"$', _VERSION.read_text(), re.MULTILINE)[-1]

extensions = ["myst_parser"]
myst_heading_anchors = 2  # links to sections
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"coar {release}"
