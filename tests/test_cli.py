"""The command line: every step on a small run, the same numbers as in Python, and errors of one line."""

import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import coar
from coar.cli.common import app
from coar.pipeline import load_pipeline
from tests.pages import content
from tests.synthetic import files

ROOT = Path(__file__).parent.parent

TINY = """
from dataclasses import replace

import torch

import coar
from pipelines import digits

MASKS, TEST_MASKS, TEST_FRACTIONS = 60, 12, (0.3,)


def study(*, ablation="mean", ablated_fraction=0.1, seed=0):
    whole = digits.study(ablation=ablation, ablated_fraction=ablated_fraction, seed=seed)
    with torch.no_grad():
        wrong = whole.model(whole.examples.inputs).argmax(1) != whole.examples.targets
    rows = sorted({*range(50), *torch.nonzero(wrong)[:, 0].tolist()})
    return replace(
        whole,
        examples=whole.examples.subset(rows),
        components=coar.conv_filters(whole.model, include="layer2.*"),
    )


def judge():
    return digits.judge().subset(range(80))
"""


@pytest.fixture(autouse=True)
def _quiet():
    """Put the package's log level back, which commands turn up."""
    level = logging.getLogger("coar").level
    yield
    logging.getLogger("coar").setLevel(level)


def coar_command(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def works(*words):
    result = coar_command(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def place(digits, tmp_path_factory):
    """A folder with a pipeline, and a run taken through collect, fit and baselines; read only."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "tiny.py").write_text(TINY)
    said = works("collect", folder / "tiny.py", "--run", folder / "tiny.zarr", "--device", "cpu")
    assert re.search(r"tiny\.zarr: 84 masks x 5\d examples, complete\n$", said)
    works("fit", folder / "tiny.zarr")
    works("baselines", folder / "tiny.zarr", "--pipeline", folder / "tiny.py", "--device", "cpu")
    return folder


@pytest.fixture
def copy(place, tmp_path):
    shutil.copytree(place / "tiny.zarr", tmp_path / "copy.zarr")
    return tmp_path / "copy.zarr"


def test_command_line_and_python_give_identical_files(place, tmp_path):
    study = load_pipeline(place / "tiny.py").study()
    run = coar.collect(
        study, tmp_path / "r.zarr", masks=60, test_masks=12, test_fractions=(0.3,), device="cpu", progress=False
    )
    coar.fit(run, progress=False)
    coar.leave_one_out(study, run, device="cpu", progress=False)
    coar.mask_gradient(study, run, device="cpu", progress=False)
    one, other = files(place / "tiny.zarr"), files(tmp_path / "r.zarr")
    assert one.keys() == other.keys()
    assert any(name.startswith("outputs/c/") for name in one)
    assert any(name.startswith("attributions/ridge/weight/c/") for name in one)
    assert [name for name in one if one[name] != other[name]] == []


def test_options_of_collect_are_those_of_python(place, tmp_path):
    options = {"--masks": 7, "--test-masks": 3, "--validation-masks": 2, "--test-fractions": "0.05,0.4", "--seed": 9}
    options |= {"--ablation": "zero", "--ablated-fraction": 0.2, "--batch-size": 20, "--mask-block": 4}
    words = [word for pair in options.items() for word in pair]
    works("collect", place / "tiny.py", "--run", tmp_path / "c.zarr", "--example-block", 30, "--device", "cpu", *words)
    run = coar.collect(
        load_pipeline(place / "tiny.py").study(ablation="zero", ablated_fraction=0.2, seed=9),
        tmp_path / "p.zarr",
        masks=7,
        test_masks=3,
        validation_masks=2,
        test_fractions=[0.05, 0.4],
        execution=coar.Execution(batch_size=20, mask_block=4, example_block=30),
        device="cpu",
        progress=False,
    )
    assert files(tmp_path / "c.zarr") == files(run.path)
    assert len(run.plan) == 7 + 2 + 3 * 3


def test_memory_limit_and_compile_reach_collect(place, tmp_path, monkeypatch):
    given, collect = {}, coar.collection.collect.collect

    def spy(*args, **settings):
        given.update(settings["execution"].model_dump(include={"memory_limit", "compile"}))
        return collect(*args, **settings | {"execution": coar.Execution()})

    monkeypatch.setattr("coar.collection.collect.collect", spy)
    words = ("--run", tmp_path / "m.zarr", "--masks", 5, "--test-masks", 0, "--device", "cpu")
    works("collect", place / "tiny.py", *words, "--memory-limit", "4GiB", "--compile")
    assert given == {"memory_limit": "4GiB", "compile": True}
    works("collect", place / "tiny.py", *words)
    assert given == {"memory_limit": None, "compile": False}


def test_options_of_fit_are_those_of_python(copy):
    works("fit", copy, "--method", "ridge", "--masks", 40, "--name", "short")
    expected = coar.fit(coar.Run.open(copy), masks=40, name="again", progress=False)
    found = coar.load(copy, "short")
    np.testing.assert_array_equal(found.weights(), expected.weights())
    assert found.fit == expected.fit
    description = copy / "attributions/short/zarr.json"
    before = description.stat().st_ino, description.stat().st_mtime_ns
    works("fit", copy, "--masks", 40, "--name", "short")
    assert before == (description.stat().st_ino, description.stat().st_mtime_ns)
    works("fit", copy, "--masks", 40, "--name", "short", "--refit")
    assert before != (description.stat().st_ino, description.stat().st_mtime_ns)


def test_collect_goes_on_and_extends(place, copy, tmp_path):
    before = files(copy / "outputs/c")
    assert "complete" in works("collect", place / "tiny.py", "--run", copy, "--device", "cpu")
    assert files(copy / "outputs/c") == before
    works("collect", place / "tiny.py", "--run", copy, "--device", "cpu", "--masks", 70)
    assert coar.Run.open(copy).plan.count("train", 0.1) == 70
    assert "70 masks" in works("fit", copy)


def test_default_places_are_runs_and_reports(place, copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    works("evaluate", copy)
    works("report", copy)
    assert {path.name for path in (tmp_path / "reports/copy").iterdir()} == {
        "evaluation.csv",
        "evaluation_per_example.csv",
        "evaluation.png",
        "index.html",
    }
    (tmp_path / "own.py").write_text(
        "import coar, torch\nmodel = torch.nn.Linear(3, 2)\nMASKS, TEST_MASKS = 4, 0\n"
        "def study():\n    examples = coar.Examples(inputs=torch.eye(3), targets=torch.tensor([0, 1, 0]))\n"
        "    return coar.Study(model=model, examples=examples, components=coar.neurons(model))\n"
    )
    assert "runs/own-zero.zarr: 4 masks x 3 examples" in works("collect", "own.py", "--device", "cpu")
    coar.Run.open("runs/own-zero.zarr").require_complete()


def test_evaluate_prints_and_writes_the_table(place, tmp_path):
    said = works("evaluate", place / "tiny.zarr", "--out", tmp_path / "out")
    table = coar.evaluate(coar.Run.open(place / "tiny.zarr")).table
    assert len(table) == 3 * 2
    for row in table.itertuples():
        assert re.search(rf"{row.fit} .*{row.pearson:.3f}", said)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "out/evaluation.csv"), table, check_dtype=False)


GOAL = ("--targets", "label == 3", "--references", "label != 3", "--direction", "decrease")


def test_edit_by_a_goal_is_that_of_python(place, tmp_path):
    words = ("--budget", 4, "--direction", "increase", "--name", "mine", "--out", tmp_path)
    said = works("edit", place / "tiny.zarr", *GOAL, *words)
    goal = coar.EditGoal(targets="label == 3", references="label != 3", direction="increase")
    expected = coar.edit(coar.load(place / "tiny.zarr"), goal, budget=4)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.glob("**/*.*")] == ["mine/edit.json"]
    assert coar.Edit.load(tmp_path / "mine/edit.json") == expected
    assert all(component.name in said for component in expected.components)


@pytest.mark.parametrize("budget", [6, None])
def test_edit_by_a_goal_with_a_pipeline_is_applied_and_judged(place, digits, tmp_path, budget):
    words = ("--pipeline", place / "tiny.py", "--fit", "leave_one_out", "--device", "cpu", "--out", tmp_path)
    said = works("edit", place / "tiny.zarr", *GOAL, *words, *(("--budget", budget) if budget else ()))
    pipeline = load_pipeline(place / "tiny.py")
    goal = coar.EditGoal(targets="label == 3", references="label != 3", direction="decrease")
    common = (coar.load(place / "tiny.zarr", "leave_one_out"), digits.model(), pipeline.study().examples)
    expected = coar.reach_goal(*common, pipeline.judge(), goal=goal, name="edit", budget=budget, device="cpu")
    edit = coar.Edit.load(tmp_path / "edit/edit.json")
    assert (edit,) == expected.edits
    edited = coar.load_weights(digits.DigitsNet(), tmp_path / "edit/edit.safetensors").state_dict()
    for name, value in edit.apply(digits.model()).state_dict().items():
        assert torch.equal(value, edited[name]), name
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "edit/table.csv"), expected.table, check_dtype=False)
    for row in expected.table.itertuples():
        assert re.search(rf"{row.group} .*{row.accuracy_after:.3f}", said)


def test_tasks_are_written_and_reported(place, tmp_path):
    common = ("--pipeline", place / "tiny.py", "--device", "cpu", "--out", tmp_path)
    works("edit", place / "tiny.zarr", "--task", "forget", "--label", 3, "--budget", 5, *common)
    works("edit", place / "tiny.zarr", "--task", "fix", *common)
    works("evaluate", place / "tiny.zarr", "--out", tmp_path)
    assert 1 <= len(coar.Edit.load(tmp_path / "forget-3/edit.json")) <= 5
    fixes = pd.read_csv(tmp_path / "fix/table.csv")
    made = len(list((tmp_path / "fix").glob("edit*.json")))
    assert made == (fixes["components"] > 0).sum() > 0
    assert len(list((tmp_path / "fix").glob("edit*.safetensors"))) == 2 * made  # the weights, and what an edit keeps
    assert f"wrote {tmp_path / 'index.html'}\n" == works("report", place / "tiny.zarr", "--out", tmp_path)
    page = content((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert [(task["name"], task["all"]) for task in page["edits"]["tasks"]] == [("fix", made), ("forget-3", 1)]
    assert page["pipeline"] is None


def test_info_says_what_a_run_holds(place):
    said = works("info", place / "tiny.zarr")
    for words in ("96 conv filters", "12 test at 0.1, 12 test at 0.3, 60 train at 0.1", "Mean", "float32", "complete"):
        assert words in said
    assert "leave_one_out, mask_gradient, ridge" in said


def test_info_starts_without_the_libraries_that_it_does_not_need(place):
    code = (
        "import sys, coar.cli\n"
        f"sys.argv = ['coar', 'info', {str(place / 'tiny.zarr')!r}, '--watch', '1']\n"
        "try:\n    coar.cli.main()\nexcept SystemExit as end:\n    code = end.code\n"
        "print(code, sorted({'torch', 'scipy', 'sklearn', 'matplotlib', 'pandas', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "96 conv filters" in done.stdout
    assert done.stdout.endswith("\n0 []\n")


def test_a_study_starts_without_the_compiler():
    code = (
        "import sys, torch, coar\n"
        "net, examples = torch.nn.Linear(3, 2), coar.Examples(inputs=torch.eye(3), targets=torch.tensor([0, 1, 0]))\n"
        "coar.Study(model=net, examples=examples, components=coar.neurons(net)).fingerprint()\n"
        "print('torch._dynamo' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_verify_says_so_when_all_is_well(place):
    assert "every chunk is present and whole" in works("verify", place / "tiny.zarr")


def test_verify_names_damage_and_repairs_what_it_can(place, copy):
    (copy / "outputs/c/0/0").write_bytes(b"spoilt")
    (copy / "attributions/ridge/weight/c/0/0").unlink()
    found = coar_command("verify", copy)
    assert found.exit_code == 1
    assert "outputs/c/0/0: damaged; 'coar collect' makes it again" in found.stdout
    assert "attributions/ridge/weight/c/0/0: missing; 'coar fit or coar baselines' makes it again" in found.stdout
    assert "2 problems" in found.stdout
    assert "2 of 2 problems cleared" in works("verify", copy, "--repair")
    assert coar_command("verify", copy).exit_code == 1  # a unit is missing until it is collected again
    works("collect", place / "tiny.py", "--run", copy, "--device", "cpu")
    works("fit", copy)
    works("verify", copy)
    assert files(copy / "outputs") == files(place / "tiny.zarr/outputs")
    assert files(copy / "attributions/ridge") == files(place / "tiny.zarr/attributions/ridge")


def test_verify_exits_with_1_when_something_cannot_be_mended(copy):
    (copy / "example/label/c/0").write_bytes(b"spoilt")
    found = coar_command("verify", copy, "--repair")
    assert found.exit_code == 1
    assert "example/label/c/0: damaged; only a copy can restore it" in found.stdout
    assert "0 of 1 problems cleared" in found.stdout


TASK = ("edit", "RUN", "--pipeline", "PIPELINE", "--out", "OUT", "--task")
MISTAKES = {
    "no such run": (("fit", "OUT/none.zarr"), "there is no run at"),
    "a folder of other things": (("info", "HERE"), "not a run; check the path"),
    "a file": (("evaluate", "PIPELINE"), "not a run; check the path"),
    "another version": (("verify", "FUTURE"), "has format 99"),
    "a bucket": (("info", "s3://bucket"), "has no path"),
    "a new run in a bucket": (("collect", "PIPELINE", "--run", "s3://bucket"), "has no path"),
    "no such pipeline": (("collect", "OUT/none.py"), "is not a Python file"),
    "no such pipeline to edit": (("baselines", "RUN", "--pipeline", "OUT/none.py"), "is not a Python file"),
    "unknown device": (("collect", "PIPELINE", "--run", "OUT/n.zarr", "--device", "tpu"), "unknown device 'tpu'"),
    "bad fraction": (
        ("collect", "PIPELINE", "--run", "OUT/n.zarr", "--ablated-fraction", "1.5"),
        "ablated fraction 1.5",
    ),
    "bad test fraction": (("collect", "PIPELINE", "--run", "OUT/n.zarr", "--test-fractions", "0.1,7"), "fraction 7.0"),
    "no fractions": (
        ("collect", "PIPELINE", "--run", "OUT/n.zarr", "--test-fractions", "a,b"),
        "not a list of fractions",
    ),
    "unknown ablation": (("collect", "PIPELINE", "--run", "OUT/n.zarr", "--ablation", "median"), "median"),
    "negative masks": (("collect", "PIPELINE", "--run", "OUT/n.zarr", "--masks", "-1"), "-1 train masks"),
    "empty mask block": (
        ("collect", "PIPELINE", "--run", "OUT/n.zarr", "--mask-block", "0"),
        "mask_block: Input should be greater than or equal to 1",
    ),
    "unknown precision": (("collect", "PIPELINE", "--run", "OUT/n.zarr", "--precision", "fp8"), "unknown precision"),
    "another seed": (("collect", "PIPELINE", "--run", "RUN", "--seed", "5"), "sampler: the run has"),
    "unknown method": (("fit", "RUN", "--method", "elastic"), "unknown method 'elastic'"),
    "too many masks": (("fit", "RUN", "--masks", "9999"), "the run has 60"),
    "bad name": (("fit", "RUN", "--name", "a/b"), "cannot name a fit"),
    "misspelt column": (
        ("edit", "RUN", "--targets", "lable == 3", *GOAL[2:], "--budget", "3"),
        "no metadata column 'lable'; there are id, label",
    ),
    "code for a condition": (
        ("edit", "RUN", "--targets", "exit(3)", *GOAL[2:], "--budget", "3"),
        "not allowed in an expression",
    ),
    "task and targets": ((*TASK, "fix", "--targets", "label == 3"), "--task sets targets"),
    "neither task nor targets": (("edit", "RUN"), "give --targets and --references, or --task"),
    "no direction": (("edit", "RUN", *GOAL[:4], "--budget", "3"), "add --direction decrease"),
    "no budget": (("edit", "RUN", *GOAL), "--budget"),
    "budget too large": (("edit", "RUN", *GOAL, "--budget", "161"), "a budget of 161 was given; choose 1 to 96"),
    "budget of nothing": (("edit", "RUN", *GOAL, "--budget", "0"), "a budget of 0 was given; choose 1 to 96"),
    "budget too large to forget": (
        (*TASK, "forget", "--label", "3", "--budget", "161"),
        "a budget of 161 was given; choose 1 to 96",
    ),
    "budget too large to fix": ((*TASK, "fix", "--budget", "161"), "a budget of 161 was given; choose 1 to 96"),
    "unknown direction": (("edit", "RUN", *GOAL, "--budget", "3", "--direction", "up"), "direction"),
    "unknown task": ((*TASK, "paint"), "choose --task forget with --label"),
    "forgetting nothing": ((*TASK, "forget"), "choose --task forget with --label"),
    "fixing a class": ((*TASK, "fix", "--label", "3"), "choose --task forget with --label"),
    "a class that is not there": ((*TASK, "forget", "--label", "17"), "label == 17"),
    "a task without a pipeline": (("edit", "RUN", "--task", "fix"), "without --pipeline"),
    "unknown fit": (("edit", "RUN", *GOAL, "--budget", "3", "--fit", "elastic"), "no finished fit 'elastic'"),
    "a port that is none": (("explore", "RUN", "--pipeline", "PIPELINE", "--port", "99999"), "port 99999 of 127.0.0.1"),
    "unwritable folder": (("report", "RUN", "--out", "PIPELINE"), "choose another folder"),
    "unwritable place for an edit": (("edit", "RUN", *GOAL, "--budget", "3", "--out", "PIPELINE"), "another path"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_messages_of_mistakes(place, tmp_path, monkeypatch, mistake):
    words, message = MISTAKES[mistake]
    if "FUTURE" in words:
        shutil.copytree(place / "tiny.zarr", tmp_path / "future.zarr")
        description = tmp_path / "future.zarr/zarr.json"
        content = json.loads(description.read_text())
        content["attributes"]["coar"]["format"] = 99
        description.write_text(json.dumps(content))
    places = {
        "RUN": place / "tiny.zarr",
        "PIPELINE": place / "tiny.py",
        "HERE": place,
        "OUT": tmp_path,
        "FUTURE": tmp_path / "future.zarr",
    }
    words = [re.sub(r"^(RUN|PIPELINE|HERE|OUT|FUTURE)\b", lambda m: str(places[m[0]]), word) for word in words]
    if "s3://bucket/run.zarr" in words:
        shutil.copytree(ROOT / "data/digits", tmp_path / "data/digits")
        monkeypatch.chdir(tmp_path)
    result = coar_command(*words)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("error: ") or "\nerror: " in result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "n.zarr").exists()
    assert not (tmp_path / "s3:").exists()


COMMANDS = (
    "all",
    "new",
    "collect",
    "fit",
    "baselines",
    "evaluate",
    "edit",
    "undo",
    "report",
    "explore",
    "info",
    "verify",
    "plan",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_names_real_options(command):
    said = " ".join(re.sub(r"[^\x20-\x7e]", " ", works(command, "--help")).split())
    examples = re.search(r"Examples?: (.*)", said)[1]
    assert examples.startswith(f"coar {command} ")
    known = set(re.findall(r"--[a-z-]+", said[: said.index("Example")]))
    assert set(re.findall(r"--[a-z-]+", examples)) <= known


def test_options_of_collect_are_listed_under_headings():
    said = works("collect", "--help")
    places = [
        said.index(f"\n{heading}:\n") for heading in ("Arguments", "Study", "Sizes", "Execution", "Where", "Options")
    ]
    firsts = [said.index(word) for word in ("A pipeline file", "--run", "--masks", "--device", "--worker", "--help")]
    assert sorted([*places, *firsts]) == [place for pair in zip(places, firsts, strict=True) for place in pair]


@pytest.mark.parametrize("words", [("--probes", "64"), ("--probes=64",)], ids=str)
def test_an_old_option_is_refused_with_the_new_name(words):
    result = coar_command("collect", "pipelines/digits.py", *words)
    assert result.exit_code == 2
    assert "--probes does not exist any more; use --gradients" in " ".join(result.stderr.split())


def test_help_lists_every_command():
    said = works("--help")
    assert all(command in said for command in COMMANDS)


@pytest.mark.parametrize(
    "words", [("paint",), ("fit",), ("fit", "x", "--nonsense"), ("collect", "x.py", "--masks", "many")]
)
def test_commands_that_make_no_sense_exit_with_2(words):
    result = coar_command(*words)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [(("info", "none.zarr"), 1, "error: there is no run at none.zarr"), (("--help",), 0, "Example: coar collect")],
)
def test_installed_command(tmp_path, words, code, message):
    command = Path(sys.executable).with_name("coar")
    done = subprocess.run([command, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
