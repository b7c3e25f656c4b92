"""Figures and tables for notebooks show the numbers they are made from."""

import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import coar
from coar.editing.result import TaskResult
from coar.errors import SettingsError
from tests import tiny
from tests.synthetic import fit, linear, make, weights

HOSTILE = "<b>$x_1$"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    made = make(tmp_path_factory.mktemp("plots") / "r.zarr", linear(weights(), noise=2.0), masks=60, test_masks=30)
    fit(made)
    fit(made, method="lasso")
    return made


@pytest.fixture
def axes():
    """Axes to draw on; all figures are closed afterwards."""
    _, made = plt.subplots()
    yield made
    plt.close("all")


def bars(axes):
    return [patch.get_width() for patch in axes.patches]


def labels(axes):
    return [label.get_text() for label in axes.get_yticklabels()]


def segments(axes):
    """The (low, high) ends of the lines of intervals."""
    (lines,) = [one for one in axes.collections if hasattr(one, "get_segments")]
    return np.array([segment[:, 0] for segment in lines.get_segments()])


def test_an_example_shows_its_strongest_components_with_intervals(run, axes):
    one = coar.load(run.path, "ridge")[3]
    assert one.plot(4, ax=axes) is axes
    order = np.argsort(-one.weight)
    chosen = [*order[:4], *order[-4:]]
    assert labels(axes) == [one.components[j].name for j in chosen]
    np.testing.assert_array_equal(bars(axes), one.weight[chosen])
    half = 1.96 * one.standard_error[chosen]
    np.testing.assert_allclose(segments(axes), np.stack([one.weight[chosen] - half, one.weight[chosen] + half], 1))
    colours = {patch.get_facecolor() for patch in axes.patches}
    assert len(colours) == 2


def test_an_example_without_errors_has_no_intervals(run, axes):
    one = coar.load(run.path, "lasso")[3]
    one.plot(100, ax=axes)
    assert len(bars(axes)) == 12
    assert not axes.collections
    with pytest.raises(SettingsError, match="0 components were asked for; give 1 or more"):
        one.plot(0, ax=axes)


def test_layers_are_the_means_of_their_sums(run, axes):
    attributions = coar.load(run.path, "ridge")
    assert attributions.plot_layers(slice(2, 9), ax=axes) is axes
    part = attributions.weights()[2:9].reshape(7, 3, 4)
    assert labels(axes) == ["layer0", "layer1", "layer2"]
    expected = [*part.clip(min=0).sum(2).mean(0), *part.clip(max=0).sum(2).mean(0)]
    np.testing.assert_allclose(bars(axes), expected, rtol=1e-5)


def test_heads_are_a_grid_of_layers_and_heads(run, axes, tmp_path):
    net = tiny.classifier()
    components = coar.attention_heads(net) + coar.neurons(net, include="*classifier")
    study = coar.Study(model=net, examples=tiny.sentences([6, 2, 4, 5]), components=components)
    made = coar.collect(study, tmp_path / "r.zarr", masks=30, device="cpu", progress=False)
    attributions = coar.fit(made, progress=False)
    attributions.plot_heads(ax=axes)
    (image,) = axes.images
    np.testing.assert_allclose(image.get_array(), attributions.weights()[:, :4].mean(0).reshape(2, 2), rtol=1e-5)
    assert labels(axes) == list(dict.fromkeys(component.site for component in components if component.side == "input"))
    assert image.norm.vmax == -image.norm.vmin == pytest.approx(np.abs(image.get_array()).max())
    with pytest.raises(SettingsError, match="no attention heads to draw; plot_layers draws any components"):
        coar.load(run.path, "ridge").plot_heads(ax=axes)


def test_an_evaluation_shows_the_distribution_of_correlations(run, axes):
    evaluation = coar.evaluate(run)
    assert evaluation.plot(axes) is axes
    for line, name in zip(axes.lines, ("lasso", "ridge"), strict=True):
        scores = evaluation.per_example.loc[evaluation.per_example["fit"] == name, "pearson"]
        np.testing.assert_array_equal(line.get_xdata()[1:], np.sort(scores.dropna()))
        assert line.get_label() == name


def test_an_edit_counts_components_by_layer_and_strength(run, axes):
    goal = coar.EditGoal(targets=[0, 1], references=[2, 3, 4], direction="decrease")
    edit = coar.edit(coar.load(run.path, "ridge"), goal, budget=5)
    edit = type(edit)(**{**edit.__dict__, "strengths": (0.5, 1.0, 0.25, 1.0, 1.0)})
    edit.plot(axes)
    sums = {}
    for component, strength in zip(edit.components, edit.strengths, strict=True):
        sums[component.site] = sums.get(component.site, 0) + strength
    assert dict(zip(labels(axes), bars(axes), strict=True)) == sums


def test_a_task_shows_accuracies_and_marks_its_edits(axes):
    curve = pd.DataFrame({"components": [0, 1, 2], "group": [HOSTILE] * 3, "accuracy": [1.0, 0.5, 0.0]})
    result = TaskResult("forget-3", (), pd.DataFrame({"group": [HOSTILE], "points": [-5.0]}), curve)
    result.plot(axes)
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [100, 50, 0])
    axes.figure.canvas.draw()  # a dollar sign starts no formula
    assert "&lt;b&gt;" in result._repr_html_()
    assert "-5.000" in result._repr_html_()


def test_a_new_figure_is_made_without_axes(run):
    before = plt.get_fignums()
    axes = coar.load(run.path, "ridge").plot_layers()
    assert plt.get_fignums() == [*before, axes.figure.number]
    plt.close(axes.figure)


def test_notebooks_show_a_run(tmp_path):
    made = make(tmp_path / "<b>.zarr", linear(weights()), masks=60, test_masks=30)
    assert repr(made).endswith("<b>.zarr': 12 components, 20 examples)")
    shown = made._repr_html_()
    assert "&lt;b&gt;.zarr" in shown
    assert "<b>" not in shown
    for name, value in (
        ("components", "12 "),
        ("examples", "20<"),
        ("test masks at", "30<"),
        ("train masks at", "60<"),
    ):
        assert re.search(f"<th>{name}.*?</th><td>{value}", shown)


def test_notebooks_show_tables(run):
    attributions = coar.load(run.path, "ridge")
    table = attributions._repr_html_()
    means = attributions.weights().mean(0)
    strongest = int(np.abs(means).argmax())
    assert f"<td>{attributions.components[strongest].name}</td>" in table
    assert f"<td>{means[strongest]:.3f}</td>" in table
    one = attributions[0]
    assert f"<td>{one.weight.max():.3f}</td>" in one._repr_html_()
    evaluation = coar.evaluate(run)
    for row in evaluation.table.itertuples():
        assert f"<td>{row.pearson:.3f}</td>" in evaluation._repr_html_()
    goal = coar.EditGoal(targets=[0, 1], references=[2, 3, 4], direction="decrease")
    edit = coar.edit(attributions, goal, budget=2)
    assert all(f"<td>{component.name}</td>" in edit._repr_html_() for component in edit.components)
