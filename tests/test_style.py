"""The project's own rules, as far as no tool checks them; ruff and import-linter hold to the others."""

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "coar"
MARKERS = re.compile(r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "X" * 3]) + r")\b")


def imported(path):
    """Dotted names of what a file imports of the package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add(node.module or ".")
    return {name for name in found if name.split(".")[0] in ("coar", "")}


def test_pipelines_use_only_what_the_package_offers():
    found = {path.name: imported(path) - {"coar"} for path in (ROOT / "pipelines").glob("*.py")}
    assert {name: names for name, names in found.items() if names} == {}
    assert len(found) > 5


def test_oracles_share_no_code_with_the_package():
    assert imported(ROOT / "tests" / "oracles.py") == set()


def test_the_design_lists_every_layer():
    """Rows of the table are the layers of import-linter's contract, from the lowest on."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    names = [name for layer in reversed(layers) for name in re.findall(r"\w+", layer)]
    files = {path.stem: path for path in PACKAGE.iterdir()}
    expected = [files[name].name + "/" * files[name].is_dir() for name in names]
    assert re.findall(r"^\| `([\w/.]+)` \|", (ROOT / "docs" / "design.md").read_text(), re.MULTILINE) == expected


def test_nothing_is_left_to_do():
    """In texts; ruff's FIX looks at comments."""
    texts = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "Makefile", ROOT / "pyproject.toml"]
    assert [path.name for path in texts if MARKERS.search(path.read_text())] == []


def test_the_lock_names_public_registries_only():
    hosts = set(re.findall(r"\w+://([^/\"\s]+)", (ROOT / "uv.lock").read_text()))
    assert hosts <= {"pypi.org", "files.pythonhosted.org"}
