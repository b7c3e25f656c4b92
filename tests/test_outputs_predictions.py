"""Outputs of models that predict numbers: against loops, and as what edits go by."""

import numpy as np
import pytest
import torch
from torch import nn

import coar


def test_predictions_and_squared_errors_are_those_of_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted, targets = torch.randn(9, 3, generator=generator), torch.randn(9, 3, generator=generator)
    for index in range(3):
        read = coar.PredictedValue(index=index)(predicted, targets)
        assert read.tolist() == [float(row[index]) for row in predicted]
    for row, found in enumerate(coar.SquaredError()(predicted, targets)):
        errors = [float(p - y) ** 2 for p, y in zip(predicted[row], targets[row], strict=True)]
        assert float(found) == pytest.approx(sum(errors) / 3, rel=1e-5)


def test_the_tolerance_margin_is_positive_exactly_within_the_tolerance() -> None:
    generator = torch.Generator().manual_seed(1)
    predicted, targets = torch.randn(50, 2, generator=generator), torch.randn(50, 2, generator=generator)
    hard, smooth = (
        coar.ToleranceMargin(tolerance=0.7, against=a)(predicted, targets) for a in ("largest", "logsumexp")
    )
    within = ((predicted - targets).abs() < 0.7).all(1)
    assert 0 < int(within.sum()) < 50
    assert torch.equal(hard > 0, within)
    assert bool((smooth <= hard + 1e-5).all())
    assert float((hard - smooth).max()) <= np.log(2) + 1e-5
    single = coar.ToleranceMargin(tolerance=0.7)(predicted[:, 0], targets[:, :1])
    assert torch.allclose(single, 10 - (predicted[:, 0] - targets[:, 0]).abs() * 10 / 0.7, atol=1e-4)


@pytest.mark.parametrize(
    ("output", "predicted", "targets", "word"),
    [
        (coar.PredictedValue(index=2), torch.zeros(3, 2), torch.zeros(3), "outside the model's 2 predicted values"),
        (coar.SquaredError(), torch.zeros(3, 2), torch.zeros(3), "give targets of shape"),
        (coar.SquaredError(), torch.zeros(3, 2, 2), torch.zeros(3), "wrap the model"),
        (coar.ToleranceMargin(tolerance=1.0), torch.zeros(3, dtype=torch.complex64), torch.zeros(3), "real"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(
    output: coar.Output, predicted: torch.Tensor, targets: torch.Tensor, word: str
) -> None:
    with pytest.raises(coar.errors.OutputError, match=word):
        output.read(predicted, targets)


def test_a_tolerance_must_be_positive() -> None:
    with pytest.raises(coar.errors.SettingsError, match="tolerance"):
        coar.ToleranceMargin(tolerance=0.0)


def test_an_edit_corrects_a_prediction_that_is_out_of_tolerance(tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1)).eval()
    inputs = torch.randn(24, 6)
    predicted = model(inputs).detach()[:, 0]
    targets = predicted.clone()
    targets[0] -= 0.12  # one prediction is too large
    output = coar.ToleranceMargin(tolerance=0.1)
    examples = coar.Examples(inputs=inputs, targets=targets)
    study = coar.Study(
        model=model, examples=examples, components=coar.neurons(model, exclude="2"), output=output,
        sampler=coar.BernoulliSampler(ablated_fraction=0.1),
    )  # fmt: skip
    attributions = coar.fit(coar.collect(study, tmp_path / "run.zarr", masks=200, progress=False), progress=False)
    goal = coar.EditGoal(targets=[0], references=list(range(1, 24)), direction="increase")
    bound = coar.Bound(mean=0.5, group=0.5)
    edit = coar.select(attributions, model, examples, goal, output=output, bound=bound, strength="minimal").edit
    table = coar.judge_edit(edit, model, examples, goal=goal, output=output)
    errors = (edit.apply(model)(inputs).detach()[:, 0] - targets).abs()
    assert table["accuracy_before"].tolist()[:2] == [0.0, 1.0]
    assert table["accuracy_after"].tolist()[:2] == [
        float(errors[0] < 0.1),
        pytest.approx(float((errors[1:] < 0.1).float().mean())),
    ]
    assert float(errors[0]) < 0.1
