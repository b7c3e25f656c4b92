"""Tables that read back, and figures that open and show the numbers they are made from."""

import csv
import io

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

import coar
from coar.charts import accuracy_curves
from coar.description import describe
from coar.editing.result import TaskResult
from coar.errors import StorageError
from coar.report import evaluation_figure, write_edit, write_evaluation, write_task
from coar.weights import weights_fingerprint
from tests.synthetic import fit, linear, make, weights

HOSTILE = "<script>alert('coar')</script>"
FRACTION = 0.1
TESTS = [0.05, FRACTION, 0.2]
EXAMPLES = coar.Examples(inputs=torch.linspace(-1, 1, 15).view(3, 5), targets=torch.arange(3))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a hostile name, two fits and test masks at three fractions; read only."""
    path = tmp_path_factory.mktemp("run") / "<script>alert(1)<b>.zarr"
    steps = [{**{("test", fraction): 20 for fraction in TESTS}, ("train", FRACTION): 60}]
    made = make(path, linear(weights(), noise=2.0), steps=steps, ablated_fraction=FRACTION)
    fit(made)
    fit(made, method="ols")
    return made


@pytest.fixture(scope="module")
def evaluation(run):
    return coar.evaluate(run)


@pytest.fixture
def result():
    """A task's tables with hostile words in them, and no edits."""
    table = pd.DataFrame({"id": [3, 4], "group": [HOSTILE, "größe & co"], "points": [0.1234, -5.0]})
    accuracy = {"targets": [1.0, 0.5, 0.0], "others": [0.9, 0.9, 0.8]}
    curve = pd.DataFrame(
        {"components": i, "group": group, "accuracy": value}
        for group, values in accuracy.items()
        for i, value in enumerate(values)
    )
    return TaskResult("fix-<img src=x onerror=alert(1)>", (), table, curve)


def check_picture(content):
    """A real PNG, large enough to read, with lines of several colours on white."""
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.format == "PNG"
        assert picture.width >= 600
        assert picture.height >= 400
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert 0.5 < (pixels == 255).all(1).mean() < 0.99
    saturated = pixels[np.ptp(pixels.astype(int), axis=1) > 80]
    assert len({tuple(pixel // 64) for pixel in saturated}) >= 2


def test_evaluation_is_written_as_tables_and_a_picture(evaluation, tmp_path):
    files = write_evaluation(evaluation, tmp_path / "deep/er")
    assert [file.name for file in files] == ["evaluation.csv", "evaluation_per_example.csv", "evaluation.png"]
    pd.testing.assert_frame_equal(pd.read_csv(files[0]), evaluation.table, check_dtype=False)
    pd.testing.assert_frame_equal(pd.read_csv(files[1]), evaluation.per_example, check_dtype=False)
    check_picture(files[2].read_bytes())


def test_evaluation_figure_shows_the_scores(evaluation):
    left, right = evaluation_figure(evaluation).axes
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["ols", "ridge"]
    for container, name in zip(right.containers, ("ols", "ridge"), strict=True):
        rows = evaluation.table[evaluation.table["fit"] == name]
        np.testing.assert_array_equal(container[0].get_xdata(), TESTS)
        np.testing.assert_array_equal(container[0].get_ydata(), rows["pearson"])


def test_evaluation_figure_is_of_the_fraction_that_was_fitted(evaluation):
    left, _ = evaluation_figure(evaluation).axes
    assert left.get_xlabel() == "held-out correlation at fraction 0.1"
    for line, name in zip(left.lines, ("ols", "ridge"), strict=True):
        rows = evaluation.per_example[evaluation.per_example["fit"] == name]
        scores = rows[rows["ablated_fraction"] == FRACTION]["pearson"]
        np.testing.assert_array_equal(np.sort(scores), line.get_xdata()[1:])


def test_evaluation_figure_of_one_fraction_names_the_fits_beside_their_means(tmp_path):
    run = make(tmp_path / "r.zarr", linear(weights()), test_masks=9)
    fit(run)
    fit(run, method="ols")
    evaluation = coar.evaluate(run)
    _, right = evaluation_figure(evaluation).axes
    assert right.get_xlabel() == "mean held-out correlation"
    assert [text.get_text() for text in right.get_yticklabels()] == list(evaluation.table["fit"])
    for container, score in zip(right.containers, evaluation.table["pearson"], strict=True):
        assert container[0].get_xdata().tolist() == [score]


def test_evaluation_figure_with_undefined_examples(tmp_path):
    def outputs(masks):
        return linear(weights())(masks) * (np.arange(20) != 4)

    run = make(tmp_path / "r.zarr", outputs, test_masks=9)
    fit(run)
    check_picture(write_evaluation(coar.evaluate(run), tmp_path)[2].read_bytes())


def test_task_is_written_as_tables_and_a_picture(result, tmp_path):
    files = write_task(result, nn.Identity(), tmp_path / "deep/er", EXAMPLES)
    assert [file.name for file in files] == ["table.csv", "curve.csv", "curve.png"]
    with files[0].open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file))[1] == ["3", HOSTILE, "0.1234"]
    assert len(pd.read_csv(files[1])) == 6
    check_picture(files[2].read_bytes())


def test_curve_figure_marks_the_chosen_numbers(result):
    axes = accuracy_curves(None, result.curve, title="a title", counts=[2, 1, 2])
    lines = {line.get_label(): line for line in axes.lines}
    np.testing.assert_array_equal(lines["targets"].get_ydata(), [100, 50, 0])
    np.testing.assert_array_equal(lines["others"].get_xdata(), [0, 1, 2])
    marks = [line.get_xdata()[0] for line in axes.lines if line.get_label() not in ("targets", "others")]
    assert marks == [1, 2]
    assert axes.get_title() == "a title"


def chosen_edit(run, model):
    """An edit of a linear layer that has the components' names and sites."""
    goal = coar.EditGoal(targets=[0, 1], references=[2, 3, 4], direction="decrease")
    edit = coar.edit(coar.load(run.path), goal, budget=2)
    return type(edit)(**{**edit.__dict__, "weights": weights_fingerprint(model)})


class Layers(nn.ModuleDict):
    """Linear layers whose outputs are added up."""

    def __init__(self, bias=True):
        super().__init__({f"layer{i}": nn.Linear(5, 4, bias=bias) for i in range(3)})

    def forward(self, x):
        return sum(layer(x) for layer in self.values())


@pytest.fixture
def model():
    return Layers()


def test_edit_is_written_with_its_weights(run, model, tmp_path):
    edit = chosen_edit(run, model)
    files = write_edit(edit, model, tmp_path, EXAMPLES, stem="mine")
    assert [file.name for file in files] == ["mine.json", "mine.safetensors"]
    assert coar.Edit.load(files[0]) == edit
    loaded = coar.load_weights(Layers(), files[1])
    for component, value in zip(edit.components, edit.replacements, strict=True):
        assert not loaded[component.site].weight[component.position].any()
        np.testing.assert_allclose(loaded[component.site].bias[component.position].item(), value, rtol=1e-6)


def test_code_is_written_that_loads_the_weights_of_an_edit_with_new_biases(run, tmp_path):
    model = Layers(bias=False)
    edit = chosen_edit(run, model)
    files = write_edit(edit, model, tmp_path, EXAMPLES)
    assert [file.name for file in files] == ["edit.json", "edit.safetensors", "edit-loading.py"]
    scope = {"model": Layers(bias=False)}
    exec(files[2].read_text(), scope)
    assert torch.equal(scope["model"](EXAMPLES.inputs), edit.apply(model)(EXAMPLES.inputs))


def test_several_edits_are_numbered(run, model, result, tmp_path):
    edit = chosen_edit(run, model)
    files = write_task(TaskResult("two", (edit, edit), result.table, result.curve), model, tmp_path, EXAMPLES)
    names = ["edit-0.json", "edit-0.safetensors", "edit-1.json", "edit-1.safetensors"]
    assert sorted(file.name for file in files if "edit" in file.name) == names


def test_description_counts_what_is_there(tmp_path):
    run = make(tmp_path / "r.zarr", linear(weights()), masks=40, test_masks=8)
    facts = describe(run)
    assert (facts["examples"], facts["masks"]) == ("20", "8 test at 0.3, 40 train at 0.3")
    assert (facts["ablation"], facts["precision"]) == ("Mean", "float32")
    assert facts["collected"] == "9 of 9 units, complete"
    (run.path / "outputs/c/1/2").unlink()
    assert describe(run)["collected"] == "8 of 9 units"


WRITERS = {
    "evaluation": lambda run, evaluation, result, model, place: write_evaluation(evaluation, place),
    "task": lambda run, evaluation, result, model, place: write_task(result, model, place, EXAMPLES),
    "edit": lambda run, evaluation, result, model, place: write_edit(chosen_edit(run, model), model, place, EXAMPLES),
}


@pytest.mark.parametrize("place", ["file", "file/folder"])
@pytest.mark.parametrize("what", WRITERS)
def test_unwritable_place_is_a_storage_error(run, evaluation, result, model, tmp_path, what, place):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(StorageError, match="file"):
        WRITERS[what](run, evaluation, result, model, tmp_path / place)
    assert (tmp_path / "file").read_text() == "kept"
