"""The documentation is run, page by page, and names what the package names."""

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
from typer.testing import CliRunner

import coar
from coar.cli.common import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
FENCE = re.compile(r"^```([{}\w]+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
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


@pytest.mark.parametrize("page", TEXTS, ids=name)
def test_relative_links_resolve(page):
    links = [link for link in LINK.findall(page.read_text()) if not re.match(r"https?:|mailto:|#", link)]
    assert [link for link in links if not (page.parent / link.split("#")[0]).exists()] == []


@pytest.mark.parametrize("page", TEXTS, ids=name)
def test_fences_are_of_known_languages(page):
    known = {"python", "bash", "console", "text", "bibtex", "{toctree}"}
    assert {block.language for block in blocks(page)} <= known
    assert page.read_text().count("\n```") == 2 * len(blocks(page))  # none is left open or without a language


@pytest.mark.parametrize("page", TEXTS, ids=name)
def test_lines_fit_in_120_columns(page):
    prose = re.sub(r"^```text\n.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert [line for line in prose.splitlines() if len(line) > 120] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_on_a_page_exist_with_their_options(page):
    for block in blocks(page):
        if block.language in ("bash", "console"):
            for line in block.code.replace("\\\n", " ").splitlines():
                check_command(line)


def check_command(line):
    words = shlex.split(line, comments=True)
    if words[:1] == ["coar"]:
        known = {option for parameter in COMMANDS[words[1]].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, line


def test_every_page_is_in_the_index():
    listed = next(block.code for block in blocks(DOCS / "index.md") if block.language == "{toctree}").split()
    assert {page.stem for page in DOCS.glob("*.md")} - {"index"} == set(listed) - {":maxdepth:", "1"}


@pytest.mark.parametrize("public", coar.__all__)
def test_a_public_name_is_in_the_index(public):
    assert f"`coar.{public}`" in (DOCS / "index.md").read_text()


def error_classes():
    tree = ast.parse((ROOT / "coar" / "errors.py").read_text())
    return [node.name for node in tree.body if isinstance(node, ast.ClassDef)]


@pytest.mark.parametrize("kind", error_classes())
def test_an_error_has_symptom_cause_and_cure(kind):
    entries = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", (DOCS / "errors.md").read_text(), re.M | re.S))
    assert re.findall(r"^- \*\*(\w+)\.\*\*", entries[kind], re.M) == ["Symptom", "Cause", "Cure"]


def test_no_entry_is_for_an_error_that_is_gone():
    assert re.findall(r"^## (\w+)$", (DOCS / "errors.md").read_text(), re.M) == error_classes()


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_has_an_example_whose_options_exist(command):
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "400", "NO_COLOR": "1"})
    text = " ".join(COLOUR.sub("", shown.output).split())
    assert shown.exit_code == 0
    assert "Example" in text
    examples = re.findall(r"coar " + command + r" [^;]*", text[text.rindex("Example") :])
    assert examples
    for example in examples:
        check_command(example)
