"""How Sphinx builds the documentation: `make docs`, or `sphinx-build -W -b html docs docs/_build/html`.

Pages are the Markdown files of this folder. Tutorials are notebooks in Markdown and are executed, unless
`-D nb_execution_mode=off` is given; results are kept in docs/_build/.jupyter_cache. A tutorial whose data is not at
hand is not executed, with a message.
"""

import os
import re
import sys
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.typing import stringify_annotation

ROOT = Path(__file__).parents[1]
NEEDED = {  # files without which a tutorial is not executed
    "tutorials/vision.md": Path(os.environ.get("COAR_DATA", ROOT / "data/cifar10")),
    "tutorials/language_model.md": ROOT / "data/smollm2",
}
ABSENT = [page for page, place in NEEDED.items() if not place.exists()]
ARRAY_LIKE = stringify_annotation(ArrayLike, "smart")
API = "api"  # the page that gets the docstrings of all public names

sys.path.insert(0, str(ROOT))
os.environ["COAR_ROOT"] = str(ROOT)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

project = "coar"
author = "the coar authors"
project_copyright = f"2026, {author}"
release = re.findall(r'"([^"]+)"$', (ROOT / "coar/_version.py").read_text(), re.MULTILINE)[-1]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3  # links to sections
suppress_warnings = [
    "myst.xref_missing",
    "myst.header",
]  # links to files outside of docs; the generated table of models
default_role = "code"  # of single backticks in docstrings
nb_execution_mode = "cache"
nb_execution_cache_path = str(ROOT / "docs/_build/.jupyter_cache")
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_execution_excludepatterns = ABSENT
nb_merge_streams = True
autodoc_typehints = "description"
autodoc_member_order = "bysource"
autodoc_default_options = {"exclude-members": "model_config"}
napoleon_use_ivar = True
exclude_patterns = ["_build"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["notebooks.css"]
html_title = f"coar {release}"


def add_docstrings(app: Sphinx, docname: str, source: list[str]) -> None:  # noqa: ARG001
    """Append the docstrings of all public names to the page of the API."""
    if docname != API:
        return
    import coar

    for name in sorted(coar.__all__, key=str.lower):
        kind = "class" if isinstance(getattr(coar, name), type) else "function"
        if name == "errors":
            source[0] += "\n## coar.errors\n\n```{eval-rst}\n.. automodule:: coar.errors\n   :members:\n```\n"
        elif not name.startswith("__"):
            members = "   :members:\n" if kind == "class" else ""
            source[0] += f"\n## coar.{name}\n\n```{{eval-rst}}\n.. auto{kind}:: coar.{name}\n{members}```\n"


def escape_bars(app: Sphinx, what: str, name: str, found: object, options: object, lines: list[str]) -> None:  # noqa: ARG001
    """Escape the bars in a docstring's formulas, such as |A|, which are substitutions in reStructuredText."""
    lines[:] = [line.replace("|", r"\|") for line in lines]


def name_arrays(app: Sphinx, *signature: object) -> None:  # noqa: ARG001
    """Write the name of `ArrayLike` in the types of arguments, where Sphinx wrote what it stands for."""
    for types in app.env.current_document.autodoc_annotations.values():
        for argument, found in types.items():
            types[argument] = found.replace(ARRAY_LIKE, "~numpy.typing.ArrayLike")


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect the page of the API."""
    app.connect("source-read", add_docstrings)
    app.connect("autodoc-process-docstring", escape_bars)
    app.connect("autodoc-process-signature", name_arrays, priority=600)  # after Sphinx has noted the types
    for page in ABSENT:
        logging.getLogger(__name__).info("%s is not executed: %s does not exist", page, NEEDED[page])
    return {"parallel_read_safe": True}
