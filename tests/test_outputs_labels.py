"""Outputs of classifiers with one logit, and of several labels: against loops, and as what edits go by."""

import numpy as np
import pytest
import torch
from torch import nn

import coar


def test_the_binary_margin_is_positive_exactly_where_the_answer_is_correct() -> None:
    logits, targets = torch.tensor([2.0, -1.0, 0.5, -3.0]), torch.tensor([1, 1, 0, 0])
    found = coar.BinaryMargin()(logits, targets)
    assert found.tolist() == [2.0, -1.0, -0.5, 3.0]
    assert torch.equal(coar.BinaryMargin()(logits[:, None], targets.float()), found)
    assert coar.BinaryMargin(threshold=1.0)(logits, targets).tolist() == [1.0, -2.0, 0.5, 4.0]


def test_the_multi_label_margin_is_the_smallest_signed_logit_or_its_smooth_bound() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 5, generator=generator)
    targets = torch.randint(0, 2, (20, 5), generator=generator)
    hard = coar.MultiLabelMargin(against="largest")(logits, targets)
    smooth = coar.MultiLabelMargin()(logits, targets)
    for row in range(20):
        signed = [float(z) if y else -float(z) for z, y in zip(logits[row], targets[row], strict=True)]
        assert float(hard[row]) == pytest.approx(min(signed))
        assert float(smooth[row]) == pytest.approx(-np.log(np.sum(np.exp(-np.array(signed)))), abs=1e-5)
    assert bool((smooth <= hard).all())
    right = ((logits > 0).long() == targets).all(1)
    assert torch.equal(hard > 0, right)
    one = coar.MultiLabelMargin(label=2)(logits, targets)
    assert torch.equal(one > 0, (logits[:, 2] > 0).long() == targets[:, 2])


@pytest.mark.parametrize(
    ("output", "logits", "targets", "word"),
    [
        (coar.BinaryMargin(), torch.zeros(3, 2), torch.zeros(3).long(), "CorrectClassMargin"),
        (coar.BinaryMargin(), torch.zeros(3), torch.tensor([0, 1, 2]), "0 or 1 was expected"),
        (coar.BinaryMargin(), torch.zeros(3), torch.tensor([0.0, float("nan"), 1.0]), "0 or 1 was expected"),
        (coar.MultiLabelMargin(), torch.zeros(3, 2), torch.zeros(3, 4), r"\(examples, labels\)"),
        (coar.MultiLabelMargin(label=2), torch.zeros(3, 2), torch.zeros(3, 2), "outside the model's 2 labels"),
        (coar.CorrectClassMargin(), torch.zeros(3, 1), torch.zeros(3).long(), "coar.BinaryMargin"),
        (coar.CrossEntropy(), torch.zeros(3, 1), torch.zeros(3).long(), "coar.BinaryMargin"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(
    output: coar.Output, logits: torch.Tensor, targets: torch.Tensor, word: str
) -> None:
    with pytest.raises(coar.errors.OutputError, match=word):
        output.read(logits, targets)


@pytest.mark.parametrize("labels", [1, 3])
def test_edits_of_such_models_are_chosen_and_judged_by_these_margins(labels: int, tmp_path) -> None:
    torch.manual_seed(labels)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, labels)).eval()
    inputs = torch.randn(30, 6)
    logits = model(inputs).detach()
    targets, output = (logits > 0).long(), coar.BinaryMargin() if labels == 1 else coar.MultiLabelMargin()
    examples = coar.Examples(inputs=inputs, targets=targets[:, 0] if labels == 1 else targets)
    study = coar.Study(
        model=model, examples=examples, components=coar.neurons(model, exclude="2"), output=output,
        sampler=coar.BernoulliSampler(ablated_fraction=0.3),
    )  # fmt: skip
    attributions = coar.fit(coar.collect(study, tmp_path / "run.zarr", masks=60, progress=False), progress=False)
    goal = coar.EditGoal(targets=[0], references=list(range(1, 30)), direction="decrease")
    chosen = coar.select(attributions, model, examples, goal, output=output, bound=coar.Bound(mean=1.0, group=1.0))
    edit = chosen.edit
    table = coar.judge_edit(edit, model, examples, goal=goal, output=output)
    assert table["accuracy_before"].tolist()[:2] == [1.0, 1.0]
    edited = edit.apply(model)
    right = ((edited(inputs) > 0).long() == targets).all(1).float()
    assert float(table["accuracy_after"][0]) == float(right[0])
    assert float(table["accuracy_after"][1]) == pytest.approx(float(right[1:].mean()))
    assert float(table["margin_after"][0]) < float(table["margin_before"][0])
