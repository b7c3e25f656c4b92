"""The documentation is run, page by page, and names what the package names."""

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import pytest
import typer
from typer.testing import CliRunner

import coar
from coar.cli.common import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BUILT = DOCS / "_build"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
TEXTS = [*PAGES, *sorted((DOCS / "tutorials").glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
FENCE = re.compile(r"^```([{}\w-]+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
COMMANDS = typer.main.get_command(app).commands


class Block(NamedTuple):
    """A fenced block of a page and the number of its first line."""

    language: str
    code: str
    line: int


def blocks(page):
    text = page.read_text()
    return [Block(m[1], m[2], text.count("\n", 0, m.start(2)) + 1) for m in FENCE.finditer(text)]


def name(path):
    return str(path.relative_to(ROOT))


@pytest.fixture
def place(digits, tmp_path, monkeypatch):
    """A folder to run a page in, with the project's pipelines and data; the net is trained before."""
    for folder in ("pipelines", "data"):
        (ROOT / folder).mkdir(exist_ok=True)
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_python(page, block, namespace):
    """Run a block, its lines numbered as in the page; one that starts with a file's name is written there as well."""
    filed = re.match(r"# (\w+\.py)\n", block.code)
    if filed:
        Path(filed[1]).write_text(block.code)
    exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), namespace)


def run_bash(page, block):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-eu", "-c", block.code], env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.fail(f"{name(page)}, line {block.line}: exit {done.returncode}\n{done.stdout}{done.stderr}")


@pytest.mark.parametrize("page", [p for p in PAGES if {"python", "bash"} & {b.language for b in blocks(p)}], ids=name)
def test_a_page_runs(page, place):
    namespace = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "python":
            run_python(page, block, namespace)
        if block.language == "bash":
            run_bash(page, block)


def test_relative_links_resolve():
    broken = []
    for page in TEXTS:
        links = [link for link in LINK.findall(page.read_text()) if not re.match(r"https?:|mailto:|#", link)]
        broken += [(name(page), link) for link in links if not (page.parent / link.split("#")[0]).exists()]
    assert broken == []


def test_tests_that_are_named_on_pages_exist():
    named = {file for page in TEXTS for file in re.findall(r"`(?:tests/)?((?:\w+/)?test_\w+\.py)`", page.read_text())}
    assert [file for file in sorted(named) if not (ROOT / "tests" / file).is_file()] == []
    assert len(named) > 5


def test_fences_are_of_known_languages():
    known = {"python", "bash", "console", "text", "bibtex", "{toctree}", "{code-cell}"}
    found = {name(page): {block.language for block in blocks(page)} - known for page in TEXTS}
    assert {page: languages for page, languages in found.items() if languages} == {}
    fences = {name(page): (page.read_text().count("\n```"), 2 * len(blocks(page))) for page in TEXTS}
    assert {page: counts for page, counts in fences.items() if counts[0] != counts[1]} == {}  # open, or no language


def test_lines_fit_in_120_columns():
    long = []
    for page in TEXTS:
        prose = re.sub(r"^```text\n.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        long += [(name(page), line) for line in prose.splitlines() if len(line) > 120]
    assert long == []


def unknown_options(line):
    """Options of a command line that its command does not have, the command itself where there is none."""
    words = shlex.split(line, comments=True)
    if words[:1] != ["coar"]:
        return set()
    if words[1] not in COMMANDS:
        return {words[1]}
    known = {option for parameter in COMMANDS[words[1]].params for option in parameter.opts}
    return {word for word in words if word.startswith("--")} - known


def test_commands_on_pages_exist_with_their_options():
    lines = [
        (name(page), line)
        for page in PAGES
        for block in blocks(page)
        if block.language in ("bash", "console")
        for line in block.code.replace("\\\n", " ").splitlines()
    ]
    assert [(*line, unknown) for line in lines if (unknown := unknown_options(line[1]))] == []
    assert sum(line.startswith("coar ") for _, line in lines) > 10


def test_every_page_is_in_the_index():
    """The site has the pages that lists of contents name, in the folders of these lists."""
    listed, sources = ["index"], [page for page in DOCS.rglob("*.md") if BUILT not in page.parents]
    for page in sources:
        trees = [block.code for block in blocks(page) if block.language == "{toctree}"]
        entries = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
        listed += [(page.parent / entry).relative_to(DOCS).as_posix() for entry in entries]
    pages = {
        page.relative_to(DOCS).with_suffix("").as_posix() for page in DOCS.rglob("*.md") if BUILT not in page.parents
    }
    assert pages == set(listed)
    assert len(listed) == len(set(listed))


TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))
NOTEBOOKS = [page for page in TUTORIALS if page.stem != "index"]


def cells(page):
    """The cells of a notebook without their options, each with the number of its first line."""
    found = [block for block in blocks(page) if block.language == "{code-cell}"]
    return [block._replace(code=re.sub(r"^:.*$", "", block.code, flags=re.MULTILINE)) for block in found]


@pytest.mark.parametrize("page", NOTEBOOKS, ids=name)
def test_a_tutorial_is_a_notebook(page):
    assert page.read_text().startswith("---\nfile_format: mystnb\nkernelspec:\n")
    assert len(cells(page)) > 5
    for cell in cells(page):
        compile(cell.code, name(page), "exec")


@pytest.mark.slow
@pytest.mark.parametrize("page", NOTEBOOKS, ids=name)
def test_a_page_runs_as_a_tutorial(page, place, monkeypatch):
    needed = {"vision": Path(os.environ.get("COAR_DATA", "none")), "language_model": ROOT / "data/smollm2"}
    if page.stem in needed and not needed[page.stem].exists():
        pytest.skip(f"needs {needed[page.stem]}")
    monkeypatch.delenv("COAR_ROOT", raising=False)
    namespace = {"__name__": "__main__"}
    for cell in cells(page):
        run_python(page, cell, namespace)
    plt.close("all")


@pytest.mark.slow
def test_the_site_is_built_without_warnings(tmp_path):
    """All pages and docstrings; tutorials are not executed. `make docs` installs Sphinx."""
    pytest.importorskip("sphinx", reason="needs the packages of make docs")
    options = ["-W", "-q", "-b", "html", "-D", "nb_execution_mode=off"]
    command = [sys.executable, "-m", "sphinx", *options, str(DOCS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    api = (tmp_path / "api.html").read_text()
    assert [public for public in coar.__all__ if not public.startswith("__") and f"coar.{public}" not in api] == []


def test_public_names_are_in_the_index():
    index = (DOCS / "index.md").read_text()
    assert [public for public in coar.__all__ if f"`coar.{public}`" not in index] == []


def test_every_error_has_symptom_cause_and_cure():
    text = (DOCS / "errors.md").read_text()
    entries = re.findall(r"^## (\w[\w, ]*)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    described = [kind for kinds, _ in entries for kind in kinds.split(", ")]
    tree = ast.parse((ROOT / "coar" / "errors.py").read_text())
    assert described == [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    parts = {kinds: re.findall(r"^- \*\*(\w+)\.\*\*", entry, re.MULTILINE) for kinds, entry in entries}
    assert {kinds: found for kinds, found in parts.items() if found != ["Symptom", "Cause", "Cure"]} == {}


def test_help_has_examples_whose_options_exist():
    wrong = {}
    for command in COMMANDS:
        shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "400", "NO_COLOR": "1"})
        text = " ".join(COLOUR.sub("", shown.output).split())
        _, heading, below = text.rpartition("Example")
        examples = re.findall(r"coar " + command + r" [^;]*", below)
        unknown = [unknown_options(example) for example in examples]
        if shown.exit_code or not heading or not examples or any(unknown):
            wrong[command] = (shown.exit_code, examples, unknown)
    assert wrong == {}


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
INDEX_HINT = re.compile(
    r"(?:install|uv add|uvx)[\s'\"`f]+(?:coar|" + PROJECT["name"] + r")(?![\w-])|(?<![\w.-])coar\[[a-z]", re.IGNORECASE
)
SUFFIXES = (".py", ".md", ".toml", ".txt", ".yaml", ".sbatch")


def tracked():
    """Text files that git follows, or without git all of the folders that it would."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split(
        "\n"
    )
    folders = ("coar", "pipelines", "docs", "benchmarks", "deploy", "tests")
    there = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    found = [ROOT / line for line in listed if line] or [*ROOT.glob("*"), *there]
    return [path for path in found if path.is_file() and (path.suffix in SUFFIXES or path.name == "Makefile")]


def test_no_hint_installs_a_package_of_our_name_from_an_index():
    """PyPI's `coar` is another package, and it has none of ours: hints name the clone, as in '.[text]'."""
    texts = {name(path): path.read_text(encoding="utf-8") for path in tracked() if path != Path(__file__)}
    assert "coar/errors.py" in texts
    assert [file for file, text in texts.items() if INDEX_HINT.search(text)] == []
    hinted = {extra for text in texts.values() for extra in re.findall(r"pip install '\.\[(\w+)\]'", text)}
    assert {"ray", "text"} <= hinted <= PROJECT["optional-dependencies"].keys()


@pytest.mark.parametrize(
    "hint",
    ["pip install coar", "pip install 'coar[text]'", "pip install \"\n    f\"'coar-attribution[s3]'", "coar[ray]"],
)
def test_such_a_hint_is_seen(hint):
    assert INDEX_HINT.search(hint)
