"""The project's own rules, held to by reading the code."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "coar"
MODULES = sorted(PACKAGE.rglob("*.py"))
PIPELINES = sorted((ROOT / "pipelines").glob("*.py"))
TESTED = sorted((ROOT / "tests").rglob("*.py"))
MOST_IN_A_FUNCTION = 65  # docstrings aside: what a function says of itself may be long
ORDER = re.findall(r"^\| `([\w/]+)\.py` \|", (ROOT / "docs" / "design.md").read_text(), re.MULTILINE)
MARKERS = re.compile(r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "X" * 3]) + r")\b")


def name(path):
    return str(path.relative_to(ROOT))


def nodes(path):
    return list(ast.walk(ast.parse(path.read_text())))


def docstring_lines(function):
    text = ast.get_docstring(function, clean=False)
    return len(text.splitlines()) if text else 0


def dotted(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path):
    """Dotted names of what a file imports of the package, submodules that it imports by name included."""
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & {dotted(module) for module in MODULES}
            found |= inside or {node.module or "."}
    return {found_name for found_name in found if found_name.split(".")[0] in ("coar", "")}


def ranks():
    """Where a module stands in the order of docs/design.md; a folder stands where the last of its modules does."""
    places = {f"coar.{row.replace('/', '.')}": i for i, row in enumerate(ORDER)}
    return places | {row.rpartition(".")[0]: i for row, i in places.items() if row.count(".") >= 2}


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_no_assert_and_no_print(path):
    calls = [node for node in nodes(path) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert [node.lineno for node in calls if node.func.id == "print"] == []
    assert [node.lineno for node in nodes(path) if isinstance(node, ast.Assert)] == []


@pytest.mark.parametrize("path", MODULES + PIPELINES, ids=name)
def test_functions_are_short(path):
    functions = [node for node in nodes(path) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 - docstring_lines(node) for node in functions}
    assert {function: lines for function, lines in lengths.items() if lines > MOST_IN_A_FUNCTION} == {}


def test_the_design_lists_every_module_once():
    listed = [f"coar.{row.replace('/', '.')}" for row in ORDER]
    assert sorted(listed) == [dotted(path) for path in MODULES if path.name != "__init__.py"]


@pytest.mark.parametrize("path", [path for path in MODULES if path != PACKAGE / "__init__.py"], ids=name)
def test_imports_point_one_way(path):
    """A module imports from rows above its own; the face of a folder imports from the folder and above."""
    places, me = ranks(), dotted(path)
    allowed = places[me] if path.name != "__init__.py" else places[me] + 1
    assert [other for other in imported(path) if places[other] >= allowed] == []


@pytest.mark.parametrize("path", PIPELINES, ids=name)
def test_pipelines_use_only_what_the_package_offers(path):
    assert imported(path) <= {"coar"}


def test_oracles_share_no_code_with_the_package():
    assert imported(ROOT / "tests" / "oracles.py") == set()


@pytest.mark.parametrize("path", MODULES + PIPELINES, ids=name)
def test_no_relative_imports(path):
    assert [node.lineno for node in nodes(path) if isinstance(node, ast.ImportFrom) and node.level] == []


def test_nothing_is_left_to_do():
    texts = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "Makefile", ROOT / "pyproject.toml"]
    code = [*MODULES, *PIPELINES, *TESTED, *(ROOT / "benchmarks").rglob("*.py")]
    assert [name(path) for path in [*texts, *code] if MARKERS.search(path.read_text())] == []


def test_the_lock_names_public_registries_only():
    hosts = set(re.findall(r"\w+://([^/\"\s]+)", (ROOT / "uv.lock").read_text()))
    assert hosts <= {"pypi.org", "files.pythonhosted.org"}
