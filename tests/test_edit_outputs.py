"""Edits of models that are no classifiers: what is tried out and judged is a margin of their own."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import coar
from coar.errors import OutputError
from coar.examples import UNREAD

NEURONS, CLASSES, LENGTH = 8, 3, 4
LAST = coar.TokenMargin(reduction="last")
GOAL = coar.EditGoal(targets="label == 1", references="label != 1", direction="decrease")
OPTIONS = {"bound": coar.Bound(mean=0.1, group=0.3), "device": "cpu", "progress": False}


def points(count, seed):
    """Three classes of points in six dimensions that overlap a little."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    x = np.random.default_rng(0).standard_normal((CLASSES, 6))[labels] + rng.standard_normal((count, 6))
    return coar.Examples(
        inputs=torch.tensor(x, dtype=torch.float32), targets=torch.tensor(labels), metadata={"label": labels}
    )


def texts(examples):
    """Texts of which the last of four tokens is an example and its class comes next; the others are noise, unread."""
    count, labels = len(examples), examples.targets
    noise = torch.randn(count, LENGTH - 1, 6, generator=torch.Generator().manual_seed(5))
    targets = torch.full((count, LENGTH), UNREAD)
    targets[:, -1] = labels
    inputs = torch.cat([noise, examples.inputs[:, None]], 1)
    return coar.Examples(inputs=inputs, targets=targets, metadata={"label": labels.numpy()})


@pytest.fixture(scope="module")
def trained():
    """A net that reads points, and texts token by token."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, NEURONS), nn.ReLU(), nn.Linear(NEURONS, CLASSES))
    examples, optimizer = points(90, 1), torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(50):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(examples.inputs), examples.targets).backward()
        optimizer.step()
    return model


def attributed(model, examples, output, path):
    parts = {"model": model, "examples": examples, "components": coar.neurons(model, exclude="2"), "output": output}
    study = coar.Study(**parts, ablation=coar.Mean(calibration=examples))
    return study, coar.fit(coar.collect(study, path, masks=200, device="cpu", progress=False), progress=False)


@pytest.fixture(scope="module")
def by_class(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("classes") / "r.zarr"
    study, attributions = attributed(trained, points(90, 1), coar.CorrectClassMargin(), path)
    selection = coar.select(attributions, trained, study.examples, GOAL, choosing=points(60, 2), **OPTIONS)
    return selection, coar.judge_edit(selection.edit, trained, points(300, 3), device="cpu")


@pytest.fixture(scope="module")
def read(trained, tmp_path_factory):
    """A study of texts under the means of the points, and its attributions."""
    path = tmp_path_factory.mktemp("texts") / "r.zarr"
    study, attributions = attributed(trained, texts(points(90, 1)), LAST, path)
    _, plain = attributed(trained, points(90, 1), coar.CorrectClassMargin(), path.with_name("plain.zarr"))
    return study, replace(attributions, origin=plain.origin)  # noise is in the texts' means


@pytest.mark.parametrize("output", [LAST, coar.ChoiceMargin(answers=(0, 1, 2))])
def test_an_edit_of_a_language_model_is_that_of_the_classifier_it_amounts_to(trained, by_class, read, output):
    study, attributions = read
    options = {**OPTIONS, "output": output}
    found = coar.select(attributions, trained, study.examples, GOAL, choosing=texts(points(60, 2)), **options)
    expected, table = by_class
    assert found.after.targets < found.before.targets
    assert {one.name for one in found.edit.components} == {one.name for one in expected.edit.components}
    np.testing.assert_allclose(found.after.value, expected.after.value, rtol=1e-3)
    judged = coar.judge_edit(found.edit, trained, texts(points(300, 3)), device="cpu", output=output)
    assert judged["accuracy_after"].tolist() == table["accuracy_after"].tolist()
    np.testing.assert_allclose(judged["margin_after"], table["margin_after"], atol=0.02)


def test_tasks_choose_and_judge_by_the_given_output(trained, by_class, read):
    study, attributions = read
    result = coar.reach_goal(
        attributions,
        trained,
        study.examples,
        texts(points(300, 3)),
        goal=GOAL,
        name="forget",
        choosing=texts(points(60, 2)),
        output=LAST,
        **OPTIONS,
    )
    assert result.table["accuracy_after"].tolist() == by_class[1]["accuracy_after"].tolist()
    whole = result.curve[result.curve["components"] == len(result.edits[0])].set_index("group")["accuracy"]
    assert whole["targets"] == result.table["accuracy_after"][0]


def test_an_output_that_is_no_margin_is_refused(trained, read):
    study, attributions = read
    for output in (coar.TokenLogProbability(reduction="last"), coar.TokenMargin(reduction="mean")):
        with pytest.raises(OutputError, match=f"{type(output).__name__}.* does not say what is right and wrong"):
            coar.select(attributions, trained, study.examples, GOAL, output=output, **OPTIONS)
    with pytest.raises(OutputError, match="does not say what is right"):
        coar.judge_edit(
            coar.edit(attributions, GOAL, budget=1), trained, texts(points(9, 3)), output=coar.CrossEntropy()
        )


def test_without_an_output_texts_say_what_to_give(trained, read):
    study, attributions = read
    with pytest.raises(OutputError, match=r"give an edit of a language model output=coar\.TokenMargin"):
        coar.select(attributions, trained, study.examples, GOAL, **OPTIONS)
