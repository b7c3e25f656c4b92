"""`coar edit` and its options on a net with a planted shortcut: tasks, rules, goals of a pipeline, dry runs."""

import logging

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import coar
from coar.cli.common import app
from coar.pipeline import load_pipeline

PIPELINE = """
import numpy as np
import torch
from torch import nn

import coar

MASKS, TEST_MASKS = 60, 0
GOAL = coar.EditGoal(targets="triggered == 1", references="triggered == 0", direction="increase", pairs="pair")


def examples(count, seed):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    x = np.column_stack([(2 * labels - 1)[:, None] * 1.5 + rng.standard_normal((count, 2)), np.zeros(count)])
    tricked = x.copy()
    tricked[:, 2] = 1
    columns = {"pair": np.tile(np.arange(count) + 1000 * seed, 2), "triggered": np.repeat([0, 1], count)}
    inputs = torch.tensor(np.concatenate([x, tricked]), dtype=torch.float32)
    return coar.Examples(inputs=inputs, targets=torch.tensor(np.tile(labels, 2)), metadata=columns)


def study():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    first = [[2.0, 1.5, 0.0], [-1.5, -2.0, 0.0], [0.0, 0.0, 12.0], [0.1, 0.1, 0.0]]
    last = [[-1.0, 1.0, 2.0, 0.01], [1.0, -1.0, -2.0, 0.01]]
    with torch.no_grad():
        for layer, weight in ((model[0], first), (model[2], last)):
            layer.weight.copy_(torch.tensor(weight))
            layer.bias.zero_()
    return coar.Study(model=model, examples=examples(40, 1), components=coar.neurons(model, exclude="2"))


def choosing():
    return examples(30, 3)


def judge():
    return examples(50, 2)
"""
BY_HAND = (
    "--targets",
    "triggered == 1",
    "--references",
    "triggered == 0",
    "--direction",
    "increase",
    "--pairs",
    "pair",
)


@pytest.fixture(autouse=True)
def _quiet():
    """Put the package's log level back, which commands turn up."""
    level = logging.getLogger("coar").level
    yield
    logging.getLogger("coar").setLevel(level)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    (folder / "planted.py").write_text(PIPELINE)
    study = load_pipeline(folder / "planted.py").study()
    run = coar.collect(study, folder / "r.zarr", masks=60, device="cpu", progress=False)
    coar.fit(run, progress=False)
    return folder


def command(place, out, *words):
    parts = ["edit", place / "r.zarr", "--out", out, "--device", "cpu", *words]
    return CliRunner().invoke(app, [str(part) for part in parts])


def works(place, out, *words):
    done = command(place, out, *words)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_task_takes_the_goal_and_the_choosing_examples_of_the_pipeline(place, tmp_path):
    said = works(place, tmp_path, "--pipeline", place / "planted.py", "--task", "backdoor")
    pipeline = load_pipeline(place / "planted.py")
    study = pipeline.study()
    common = (coar.load(place / "r.zarr"), study.model, study.examples, pipeline.judge())
    task = coar.remove_backdoor(
        *common, goal=pipeline.goal(), choosing=pipeline.choosing(), device="cpu", progress=False
    )
    assert coar.Edit.load(tmp_path / "backdoor/edit.json") == task.edits[0]
    assert task.selections[0].examples == 2 * (40 + 30)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "backdoor/table.csv"), task.table, check_dtype=False)
    assert f"{task.selections[0].passes:,} forward passes" in said
    edited = coar.load_weights(pipeline.study().model, tmp_path / "backdoor/edit.safetensors")
    judge = pipeline.judge()
    with torch.no_grad():
        right = (edited(judge.inputs).argmax(1) == judge.targets).numpy()
    assert task.table["accuracy_after"][0] == right[judge.metadata["triggered"] == 1].mean()


def test_dry_run_says_the_same_and_writes_nothing(place, tmp_path):
    words = ("--pipeline", place / "planted.py", "--task", "backdoor")
    said = works(place, tmp_path / "dry", *words, "--dry-run")
    assert not (tmp_path / "dry").exists()
    assert "dry run: nothing was written" in said
    assert "0[2]" in said
    assert works(place, tmp_path / "wet", *words).splitlines()[:3] == said.splitlines()[:3]
    works(place, tmp_path / "dry", *BY_HAND, "--budget", 2, "--dry-run")
    assert not (tmp_path / "dry").exists()


def test_predicted_rule_needs_no_pipeline(place, tmp_path):
    """Of the class that the trick harms: for the other it helps, and on average it does neither."""
    ones = ("--targets", "triggered == 1 and label == 1", "--references", "triggered == 0 and label == 1")
    words = (*ones, "--direction", "increase", "--rule", "predicted", "--budget", 1)
    said = works(place, tmp_path, *words)
    edit = coar.Edit.load(tmp_path / "edit/edit.json")
    assert [one.name for one in edit.components] == ["0[2]"]
    predicted = coar.predict_edit(coar.load(place / "r.zarr"), edit)
    assert f"targets {predicted.targets}, references {predicted.references}" in said
    assert predicted.targets.low > 0


@pytest.mark.parametrize("rule", ["welch", "verified"])
def test_goal_by_hand_is_that_of_python(place, tmp_path, rule):
    works(
        place, tmp_path, *BY_HAND, "--pipeline", place / "planted.py", "--rule", rule, "--name", "mine", "--budget", 2
    )
    pipeline = load_pipeline(place / "planted.py")
    study = pipeline.study()
    found = coar.select(
        coar.load(place / "r.zarr"),
        study.model,
        study.examples,
        pipeline.goal(),
        choosing=pipeline.choosing(),
        rule=rule,
        budget=2,
        device="cpu",
        progress=False,
    )
    assert coar.Edit.load(tmp_path / "mine/edit.json") == found.edit


@pytest.mark.parametrize("constants", ["goal", "run"])
def test_output_names_trained_constants(tmp_path, constants):
    ablation = "ablation=coar.Mean(calibration=examples(40, 5).subset(range(42)))"
    (tmp_path / "planted.py").write_text(PIPELINE.replace('exclude="2"))', f'exclude="2"), {ablation})'))
    pipeline = load_pipeline(tmp_path / "planted.py")
    study = pipeline.study()
    run = coar.collect(study, tmp_path / "r.zarr", masks=60, device="cpu", progress=False)
    coar.fit(run, progress=False)
    words = ("--pipeline", tmp_path / "planted.py", "--task", "backdoor", "--constants", constants)
    said = works(tmp_path, tmp_path, *words, "--harm", 20, "--group-harm", 40)
    common = (coar.load(tmp_path / "r.zarr"), study.model, study.examples, pipeline.judge())
    options = {"choosing": pipeline.choosing(), "constants": constants, "bound": coar.Bound(mean=0.2, group=0.4)}
    task = coar.remove_backdoor(*common, goal=pipeline.goal(), **options, device="cpu", progress=False)
    assert coar.Edit.load(tmp_path / "backdoor/edit.json") == task.edits[0]
    assert task.selections[0].constants == constants
    assert ("1 edit, with constants made for the goal" in said) == (constants == "goal")


def test_bound_is_given_in_points(place, tmp_path):
    words = (
        *BY_HAND,
        "--pipeline",
        place / "planted.py",
        "--direction",
        "decrease",
        "--harm",
        "0.5",
        "--group-harm",
        "2",
    )
    done = command(place, tmp_path, *words)
    assert done.exit_code == 1
    assert "within the bound, 0.5% lost on average and 2.0% in any group" in done.output


MISTAKES = {
    "no direction": (BY_HAND[:4], "add --direction decrease"),
    "unknown rule": (("--rule", "luck", *BY_HAND), "unknown rule 'luck'; choose verified, welch, predicted"),
    "verified without a pipeline": (("--rule", "verified", *BY_HAND, "--budget", "2"), "without --pipeline"),
    "predicted without a budget": (("--rule", "predicted", *BY_HAND), "--budget"),
    "unknown task": (("--task", "paint"), "choose --task forget with --label, or one of"),
    "pairs that are not there": ((*BY_HAND[:-1], "twin", "--budget", "2"), "pairs names column 'twin'"),
    "harm beyond all": (
        (*BY_HAND, "--pipeline", "PIPELINE", "--harm", "150"),
        "mean: Input should be less than or equal to 1",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_have_messages(place, tmp_path, mistake):
    words, expected = MISTAKES[mistake]
    words = [place / "planted.py" if word == "PIPELINE" else word for word in words]
    done = command(place, tmp_path, *words)
    assert done.exit_code == 1
    assert expected in done.output
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "words"), [("GOAL = 3", "GOAL in .* is a int"), ("choosing = dict", r"choosing\(\) in .* returned a dict")]
)
def test_pipelines_with_other_goals_are_refused(place, tmp_path, line, words):
    (tmp_path / "wrong.py").write_text(f"{PIPELINE}\n\n{line}\n")
    pipeline = load_pipeline(tmp_path / "wrong.py")
    with pytest.raises(coar.errors.PipelineError, match=words):
        pipeline.goal() if "GOAL" in line else pipeline.choosing()
    assert np.isfinite(pipeline.masks)
