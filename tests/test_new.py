"""`coar new`: each kind of pipeline file runs as it is written, through fit and evaluate."""

import ast
import re

import pytest

import coar
from coar.cli.starting import KINDS
from tests.test_cli import coar_command, works

KIND = {"image": "conv filters", "text": "attention heads", "module": "neurons"}


@pytest.mark.parametrize("kind", KINDS)
def test_new_pipeline_is_collected_as_it_is(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    said = works("new", "my_pipeline.py", "--kind", kind)
    assert said.startswith("wrote my_pipeline.py\n")
    command = re.search(r"coar (collect my_pipeline\.py);", said)[1]
    works(*command.split(), "--device", "cpu")
    run = coar.Run.open("runs/my_pipeline-mean.zarr")
    run.require_complete()
    assert KIND[kind] in repr(run.components)
    assert "informed" in works("fit", run.path)
    works("evaluate", run.path)
    docstring = ast.get_docstring(ast.parse((tmp_path / "my_pipeline.py").read_text()))
    for step in ("collect my_pipeline.py", "fit runs/my_pipeline-mean.zarr", "evaluate runs/my_pipeline-mean.zarr"):
        assert f"coar {step}" in docstring


MISTAKES = {
    "unknown kind": (("new", "own.py", "--kind", "sound"), "unknown kind 'sound'; choose image, text, module"),
    "no Python file": (("new", "own.txt"), "own.txt does not name a Python file"),
    "no module's name": (("new", "my-own.py"), "my-own.py does not name a Python file"),
    "a file that is there": (("new", "there.py"), "there.py already exists"),
    "a folder that is a file": (("new", "there.py/own.py"), "cannot write to there.py"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_refused_and_nothing_is_written(tmp_path, monkeypatch, mistake):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.py").write_text("mine")
    words, message = MISTAKES[mistake]
    result = coar_command(*words)
    assert result.exit_code == 1
    assert message in result.stderr
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("there.py", "mine")]
