"""`coar all`: the steps of the other commands in one process, on one page."""

import json
import re
from types import SimpleNamespace

import pandas as pd
import pytest

import coar
from coar.cli.summary import changes, heading
from coar.comparison import Comparison
from coar.errors import PipelineError
from tests.synthetic import files
from tests.test_cli import TINY, coar_command, works

SMALL = TINY.replace("range(50)", "range(30)").replace('include="layer2.*"', 'include="layer2.conv1"')
COSTS = {
    "ablation": "mean",
    "date": "2026-11-29",
    "machine": "a processor",
    "informed": {"method": "informed", "masks": 0, "gradients": 64, "seconds": 9.4, "correlation": 0.956},
    "classic": {"method": "ridge", "masks": 3000, "gradients": 0, "seconds": 36.5, "correlation": 0.9575},
}
DEVICE = ("--device", "cpu")


@pytest.fixture(scope="module")
def place(digits, tmp_path_factory):
    """A folder with a pipeline that names a comparison, and what `coar all` made of it and said; read only."""
    folder = tmp_path_factory.mktemp("all")
    (folder / "costs.json").write_text(json.dumps(COSTS))
    (folder / "small.py").write_text(f"{SMALL}\n\nCOMPARISON = {str(folder / 'costs.json')!r}\n")
    run, out = folder / "small.zarr", folder / "out"
    said = works("all", folder / "small.py", "--run", run, "--out", out, "--task", "forget", "--label", 3, *DEVICE)
    (folder / "said.txt").write_text(said)
    return folder


def test_run_and_edit_are_those_of_the_single_commands(place, tmp_path):
    run, pipeline = tmp_path / "small.zarr", place / "small.py"
    works("collect", pipeline, "--run", run, *DEVICE)
    works("fit", run)
    works("baselines", run, "--pipeline", pipeline, *DEVICE)
    works("evaluate", run, "--out", tmp_path / "out")
    words = ("--pipeline", pipeline, "--task", "forget", "--label", 3, *DEVICE, "--out", tmp_path / "out")
    works("edit", run, *words)
    works("report", run, "--out", tmp_path / "out")
    assert files(run) == files(place / "small.zarr")
    made, expected = files(place / "out"), files(tmp_path / "out")
    assert made.keys() == expected.keys()
    numbers = [name for name in made if name.endswith((".json", ".csv", ".safetensors"))]
    assert [name for name in numbers if made[name] != expected[name]] == []


def test_page_has_a_line_per_step_and_the_numbers_of_the_tables(place):
    said = (place / "said.txt").read_text()
    steps = re.findall(r"^(\w+) +\S.* +\d+\.\d s$", said, re.MULTILINE)
    assert steps == ["study", "collect", "fit", "baselines", "evaluate", "edit"]
    assert "60 masks, 24 test masks" in said
    scored = pd.read_csv(place / "out/evaluation.csv").query("ablated_fraction == 0.1")
    assert len(scored) == 3
    for row in scored.itertuples():
        assert re.search(rf"  {row.fit} .* {row.pearson:.3f} +{row.low:.3f} to {row.high:.3f}", said)
    judged = pd.read_csv(place / "out/forget-3/table.csv")
    for row in judged.drop(index=2)[:3].itertuples():  # without the average of groups
        interval = f"{100 * row.low:.1f} to {100 * row.high:.1f} %"
        assert re.search(rf"  {row.group} +{row.examples} .*{row.accuracy_after:.1%} +{interval}", said)
    assert "average of groups" not in said
    assert "references: " not in said  # the other groups are in the table
    assert f"wrote {place / 'out/index.html'}\n" in said


def test_comparison_is_shown_as_it_was_measured(place):
    said = (place / "said.txt").read_text()
    assert "measured on 2026-11-29 on one core of a processor" in said
    assert re.search(r"64 mask gradients +informed +9 s +correlation 0\.956\n", said)
    assert re.search(r"3,000 masks +ridge +36 s +correlation 0\.958\n", said)


def test_what_is_there_is_not_made_again_and_other_sizes_and_fits_join(place, tmp_path):
    before = {file: file.stat().st_mtime_ns for file in (place / "small.zarr").rglob("*") if file.is_file()}
    words = ("all", place / "small.py", "--run", place / "small.zarr", *DEVICE, "--out", tmp_path)
    works(*words)
    assert before == {file: file.stat().st_mtime_ns for file in (place / "small.zarr").rglob("*") if file.is_file()}
    run = tmp_path / "zero.zarr"
    said = works(
        "all", place / "small.py", "--run", run, "--ablation", "zero", "--masks", 20, "--gradients", 8,
        "--fit", "ridge", *DEVICE, "--out", tmp_path,
    )  # fmt: skip
    assert "8 mask gradients, 20 masks, 24 test masks" in said
    assert "ridge, from 20 masks" in said
    assert "measured on" not in said  # which is of another ablation
    assert coar.load(run).fit.method == "ridge"


MISTAKES = {
    "unknown task": (("--task", "paint"), "choose --task forget with --label"),
    "forgetting nothing": (("--task", "forget"), "choose --task forget with --label"),
    "a class and nothing to forget": (("--task", "fix", "--label", "3"), "--label names the class of --task forget"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_refused_before_anything_is_made(place, tmp_path, mistake):
    words, message = MISTAKES[mistake]
    result = coar_command("all", place / "small.py", "--run", tmp_path / "n.zarr", *DEVICE, *words)
    assert result.exit_code == 1
    assert f"error: {message}" in result.stderr
    assert not (tmp_path / "n.zarr").exists()


@pytest.mark.parametrize(
    "text", ["", "[1]", "{}", json.dumps(COSTS | {"informed": 3}), json.dumps(COSTS | {"more": 1})], ids=str
)
def test_a_file_that_is_no_comparison_is_refused(tmp_path, text):
    (tmp_path / "costs.json").write_text(text)
    with pytest.raises(PipelineError, match=r"costs\.json|Comparison cannot be made"):
        Comparison.read(tmp_path / "costs.json")


def test_errors_have_a_row_each():
    columns = {"id": [794, 905], "label": [8, 8], "components": [5, 0], "strength": [0.423, 0.0], "points": [0.25, 0.0]}
    columns |= {"corrected": [True, False], "margin_before": [-0.743, -2.3], "margin_after": [0.1, -2.3]}
    table = pd.DataFrame(columns | {"judge_before": [0.98, 0.98], "judge_after": [0.9825, 0.98]})
    result = SimpleNamespace(name="fix", table=table, edits=(1,), selections=(SimpleNamespace(passes=1234),))
    assert heading(result, 336) == "fix: 1 of 2 errors corrected (1,234 passes of one example)"
    lines = [" ".join(line.split()) for line in changes(result).splitlines()]
    assert lines[1] == "id 794 8 yes 5 0.42 -0.74 to +0.10 98.0% to 98.2%"
    assert lines[2] == "id 905 8 no 0 0.00 -2.30 to -2.30 98.0% to 98.0%"
