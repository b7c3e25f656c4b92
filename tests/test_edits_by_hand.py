"""Edits of named components, made without a run, equal those that are made from a run's attributions."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import coar
from coar.errors import ComponentError, EditError
from tests.synthetic import fit


@pytest.fixture(scope="module")
def study(digits):
    whole = digits.study()
    return replace(whole, examples=whole.examples.subset(range(40)))


def test_an_edit_by_hand_is_that_of_a_run(study, tmp_path):
    attributions = fit(coar.collect(study, tmp_path / "r.zarr", masks=20, device="cpu", progress=False))
    goal = coar.EditGoal(targets="label == 3", references="label != 3", direction="decrease")
    chosen = coar.edit(attributions, goal, budget=7)
    by_hand = coar.Edit.of(study, [component.name for component in chosen.components], goal=goal, device="cpu")
    assert by_hand.components == chosen.components
    assert by_hand.batch_norms == chosen.batch_norms != {}
    assert (by_hand.ablation, by_hand.weights, by_hand.goal) == (chosen.ablation, chosen.weights, chosen.goal)
    np.testing.assert_allclose(by_hand.replacements, chosen.replacements, rtol=1e-5, atol=1e-6)
    mine, theirs = (edit.apply(study.model).state_dict() for edit in (by_hand, chosen))
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-5, atol=1e-6)
    kept = by_hand.keep(study.model)
    restored = kept.undo(kept.apply(study.model)).state_dict()
    assert all(torch.equal(value, restored[name]) for name, value in study.model.state_dict().items())


def test_constants_may_come_from_another_ablation(study):
    names = study.components.names[5:7]
    zero = coar.Edit.of(study, names, ablation=coar.ZeroActivation(), strength=0.5, device="cpu")
    assert zero.replacements == (0.0, 0.0)
    assert zero.strengths == (0.5, 0.5)
    assert zero.ablation == "ZeroActivation"
    resampling = replace(study, ablation=coar.Resample())
    with pytest.raises(EditError, match="replaced by another example's activations"):
        coar.Edit.of(resampling, names, device="cpu")
    assert coar.Edit.of(resampling, names, ablation=coar.ZeroActivation(), device="cpu") == replace(
        zero, strengths=(1.0, 1.0)
    )


def test_the_text_of_an_edit_is_short_and_names_the_strongest(study):
    names = study.components.names[:40]
    edit = coar.Edit.of(study, names, device="cpu")
    assert repr(edit) == f"Edit(40 of strength 1, Mean ablation: {names[0]}, {names[1]}, {names[2]}, ...)"
    uneven = replace(edit, strengths=tuple(0.125 + (i == 7) / 2 for i in range(40)))
    assert (
        repr(uneven) == f"Edit(40 of strength 0.125 to 0.625, Mean ablation: {names[7]}, {names[0]}, {names[1]}, ...)"
    )
    assert repr(coar.Edit.of(study, names[:1], device="cpu")) == f"Edit(1 of strength 1, Mean ablation: {names[0]})"


def test_wrong_names_are_refused(study):
    name = study.components.names[0]
    with pytest.raises(ComponentError, match=r"no component has the name 'conv9\[0\]'"):
        coar.Edit.of(study, ["conv9[0]"])
    for names in ([], name, [name, name]):
        with pytest.raises(EditError, match="name one or more different components in a list"):
            coar.Edit.of(study, names)
    with pytest.raises(EditError, match="give one for each, above 0 and at most 1"):
        coar.Edit.of(study, [name], strength=0.0, device="cpu")
