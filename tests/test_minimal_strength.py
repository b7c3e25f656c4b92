"""Edits in part: activations go some of the way to their constants, no further than the targets ask for."""

import json
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch

import coar
from coar.editing.evaluate import SelectionContext
from coar.editing.goal import Objective
from coar.editing.judge import effect_curve
from coar.editing.train import minimal_strengths
from coar.errors import EditError, SettingsError
from coar.gates.folding import fold
from coar.gates.gates import Gates
from tests import architectures, oracles
from tests import test_edit_constants as constants_tests
from tests import test_originals as undo_tests
from tests.test_originals import CHOSEN, bits, edit_of

case, model, FILTERS = constants_tests.case, undo_tests.model, constants_tests.FILTERS
STRENGTHS = (0.3, 1.0, 0.55, 0.125, 0.8)
GOALS = {
    "decrease": coar.EditGoal(targets="label == 1", references="label != 1", direction="decrease"),
    "increase": coar.EditGoal(targets="label == 1", references="label != 1", direction="increase"),
}


def by_hooks(net, edit, x):
    """The outputs with each activation y of the edit's components turned into (1 - s) y + s c where it comes about."""
    handles = []
    for component, constant, strength in zip(edit.components, edit.replacements, edit.strengths, strict=True):

        def faded(y, at=component.position, constant=constant, strength=strength):
            y = y.clone()
            y[:, at] = (1 - strength) * y[:, at] + strength * constant
            return y

        layer = net.get_submodule(component.site)
        if component.side == "input":
            handles.append(layer.register_forward_pre_hook(lambda _, args, faded=faded: faded(args[0])))
        else:
            handles.append(layer.register_forward_hook(lambda _, __, y, faded=faded: faded(y)))
    with torch.no_grad():
        found = net(x)
    for handle in handles:
        handle.remove()
    return found


def test_weights_do_what_is_done_to_activations(model):
    edit = edit_of(model, strengths=STRENGTHS)
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, before, whole = edit.apply(model)(x), model(x), edit_of(model).apply(model)(x)
    expected = by_hooks(model, edit, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert min(float((expected - other).abs().max()) for other in (before, whole)) > 1e-2


PARTS = {
    "whole module": (lambda net: coar.modules(net, "hidden"), lambda rows: [0]),
    "parameter slices": (lambda net: coar.parameter_slices(net, "*.weight"), lambda rows: range(1, rows, 3)),
    "stacked experts": (coar.experts, lambda rows: [1, 6]),
}


@pytest.mark.parametrize("kind", PARTS)
def test_other_kinds_are_ablated_in_part_as_by_gates(model, kind):
    """Gates between 0 and 1 are held against oracles of their own elsewhere."""
    find, rows_of = PARTS[kind]
    net, x = model, torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    if kind == "stacked experts":
        architecture = architectures.ARCHITECTURES["GPT-OSS"]
        net, x = architecture.make(), architecture.inputs(1)
    components = find(net)
    rows = list(rows_of(len(components)))
    constants = torch.randn(components.width, generator=torch.Generator().manual_seed(2))
    if kind == "parameter slices":
        constants.zero_()
    values = [tuple(constants[components.channels_of([i])].tolist()) for i in rows]
    strengths = np.linspace(0.2, 0.9, len(rows)).tolist()
    gates, edited = torch.ones(len(components)), deepcopy(net)
    gates[rows] -= torch.tensor(strengths)
    fold(edited, [components[i] for i in rows], values, batch_norms={}, strengths=strengths)
    with Gates(net, components, constants, use_hooks=kind != "parameter slices") as gated:
        gated.set(gates)
        expected = oracles.forward(net, x)
    torch.testing.assert_close(oracles.forward(edited, x), expected, rtol=0, atol=1e-5)
    assert float((expected - oracles.forward(net, x)).abs().max()) > 1e-3


def test_components_of_one_layer_are_ablated_in_part_in_any_order(model):
    some = {
        undo_tests.component("last", 4, "input", -1): 0.25,
        undo_tests.component("last", 1, axis=-1): 0.5,
        undo_tests.component("last", 2, "input", -1): -0.75,
    }
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    edit = edit_of(model, some, strengths=(0.4, 0.5, 0.6))
    back = edit_of(model, dict(reversed(some.items())), strengths=(0.6, 0.5, 0.4))
    for one in (edit, back):
        torch.testing.assert_close(one.apply(model)(x), by_hooks(model, edit, x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_undo_gives_back_every_bit(model, kind):
    other = model.to(kind)
    edit = edit_of(other, strengths=STRENGTHS).keep(other)
    before = {name: value.view(torch.uint8) for name, value in other.state_dict().items() if value.ndim}
    after = edit.undo(edit.apply(other)).state_dict()
    assert all(torch.equal(after[name].view(torch.uint8), value) for name, value in before.items())


def test_strengths_survive_the_disk_and_are_full_in_older_files(model, tmp_path):
    edit = edit_of(model, strengths=STRENGTHS)
    edit.save(tmp_path / "edit.json")
    assert coar.Edit.load(tmp_path / "edit.json") == edit != edit_of(model)
    assert edit.to_pandas()["strength"].tolist() == list(STRENGTHS)
    content = json.loads((tmp_path / "edit.json").read_text())
    for row in content["components"]:
        del row["strength"]
    (tmp_path / "old.json").write_text(json.dumps({**content, "format": 2}))
    assert coar.Edit.load(tmp_path / "old.json") == edit_of(model)
    content["components"][0]["strength"] = 0
    (tmp_path / "wrong.json").write_text(json.dumps(content))
    with pytest.raises(EditError, match="above 0 and at most 1"):
        coar.Edit.load(tmp_path / "wrong.json")


@pytest.mark.parametrize("strengths", [(0.5,), (0.0, *STRENGTHS[1:]), (1.5, *STRENGTHS[1:]), (float("nan"),) * 5])
def test_strengths_out_of_range_are_refused(model, strengths):
    with pytest.raises(EditError, match=r"edit of 5 components.*one for each, above 0 and at most 1"):
        edit_of(model, strengths=strengths)


def test_joined_edits_keep_their_strengths(model):
    items, ways = list(CHOSEN.items()), STRENGTHS
    one = edit_of(model, dict(items[:3]), strengths=ways[:3])
    other = edit_of(model, dict(items[2:]), strengths=ways[2:])
    assert bits((one + other).apply(model).state_dict()) == bits(
        edit_of(model, strengths=ways).apply(model).state_dict()
    )
    with pytest.raises(EditError, match=r"by 0\.5 at a strength of 0\.55 in one edit and by 0\.5 at 1 in the other"):
        one + edit_of(model, dict(items[2:]))


def objective_of(context, goal, labels):
    parts = {"tradeoff": coar.TradeOff(target_scale=0.5), "bound": coar.Bound(mean=1, group=1)}
    return Objective.of(goal, {"label": labels}, context.base, **parts)


def scanned(net, one, constants, examples, strengths):
    """(strengths, examples) margins with filters of the first layer turned part of the way into constants."""
    rows = torch.arange(len(examples.targets))
    found = []
    for strength in strengths:

        def fade(_, __, y, strength=strength):
            y[:, list(one)] *= 1 - strength
            y[:, list(one)] += strength * torch.tensor(constants[list(one)])[:, None, None]

        handle = net[0].register_forward_hook(fade)
        with torch.no_grad():
            logits = net(examples.inputs)
        handle.remove()
        correct = logits[rows, examples.targets].clone()
        logits[rows, examples.targets] = -torch.inf
        found.append((correct - logits.amax(1)).numpy())
    return np.array(found)


@pytest.mark.parametrize("targets", [1, 30])
@pytest.mark.parametrize("direction", GOALS)
def test_minimal_strengths_are_those_of_a_scan(case, direction, targets):
    study, attributions, _ = case
    labels = study.examples.targets.numpy()
    context = SelectionContext.of(attributions, study.model, study.examples, device="cpu")
    sign = -1 if direction == "decrease" else 1  # a target is as wanted where sign * margin > 0
    open_ones = np.flatnonzero((labels == 1) & (sign * context.base < 0))
    rows = open_ones[np.argsort(-sign * context.base[open_ones])][:targets]
    references = tuple(np.flatnonzero(labels != 1).tolist())
    goal = coar.EditGoal(targets=tuple(rows.tolist()), references=references, direction=direction)
    objective = objective_of(context, goal, labels)
    sets = [(i,) for i in range(FILTERS)] + [(0, 3), (1, 2, 4), tuple(range(FILTERS))]
    constants, strengths = context.exact.constants, np.linspace(0, 1, 401)
    found = minimal_strengths(context.exact, objective, sets, constants)
    partly = 0
    for one, strength in zip(sets, found, strict=True):
        signed = sign * scanned(study.model, one, constants, study.examples.subset(rows), [*strengths, strength])
        wanted = (signed[-2] > 0).sum()
        enough = (signed >= 0.5 * 0.2 - 1e-4).sum(1) >= wanted
        if wanted == 0 or not enough[-2]:
            assert strength == 1
            continue
        partly += 1
        assert enough[-1]
        if (np.diff(enough[:-1].astype(int)) >= 0).all():  # the effect grows with the strength
            assert strengths[enough.argmax() - 1] <= strength < strengths[enough.argmax()] + 0.05
    assert partly > 1


def test_curves_are_those_of_the_edited_model(case):
    study, attributions, more = case
    edit = coar.edit(attributions, GOALS["decrease"], budget=3)
    edit = replace(edit, strengths=(0.2, 0.9, 0.5))
    order = [study.components.index(one.name) for one in edit.components]
    how = {"counts": [0, 2, 3], "strengths": edit.strengths}
    found = effect_curve(study.model, attributions, order, more, **how, device="cpu")
    some = replace(
        edit, **{name: getattr(edit, name)[:2] for name in ("components", "replacements", "scores", "strengths")}
    )
    for row, net in zip(found, (study.model, some.apply(study.model), edit.apply(study.model)), strict=True):
        state = net.state_dict()
        np.testing.assert_allclose(row, constants_tests.margins(study.model, state, more), rtol=0, atol=1e-4)


def wrong_ones(study):
    base = constants_tests.margins(study.model, study.model.state_dict(), study.examples)
    right = tuple(np.flatnonzero(base > 0).tolist())
    return [
        coar.EditGoal(targets=(i,), references=right, direction="increase") for i in np.flatnonzero(base <= 0).tolist()
    ]


def test_a_correction_in_part_does_less_to_the_others(case):
    """Each error is corrected, barely, and the margins of all others move less than under whole ablations."""
    study, attributions, more = case
    plain = constants_tests.margins(study.model, study.model.state_dict(), more)
    options = {"bound": coar.Bound(mean=0.5, group=1), "constants": "run", "tradeoff": coar.TradeOff(harm_weight=0.1)}
    options |= {"choosing": more, "device": "cpu", "progress": False}
    moved = {"full": [], "minimal": []}
    for goal in wrong_ones(study)[:4]:
        for strength, sizes in moved.items():
            found = coar.select(attributions, study.model, study.examples, goal, strength=strength, **options)
            state = found.edit.apply(study.model).state_dict()
            (margin,) = constants_tests.margins(study.model, state, study.examples.subset(list(goal.targets)))
            assert margin > 0
            assert found.after.targets == 1
            sizes.append(np.abs(constants_tests.margins(study.model, state, more) - plain).mean())
            if strength == "minimal":
                assert 0.2 - 1e-3 <= margin < 0.4  # a fifth of the usual scale, and little more
                assert max(found.edit.strengths) < 1
    assert len(moved["minimal"]) >= 2
    assert np.less(moved["minimal"], moved["full"]).all()


def test_full_ablation_alone_is_predicted(case):
    _, attributions, _ = case
    edit = coar.edit(attributions, GOALS["decrease"], budget=2)
    coar.predict_edit(attributions, edit)
    with pytest.raises(EditError, match=r"in part, at a strength of 0\.40"):
        coar.predict_edit(attributions, replace(edit, strengths=(0.4, 1.0)))


def test_unknown_strength_is_refused(case):
    study, attributions, _ = case
    with pytest.raises(SettingsError, match="unknown strength 'most'; choose full, minimal or per_component"):
        coar.select(attributions, study.model, study.examples, GOALS["decrease"], strength="most")


def test_strengths_of_their_own_are_not_for_rankings(case):
    study, attributions, _ = case
    with pytest.raises(SettingsError, match="trained by the rule 'verified'"):
        coar.select(
            attributions, study.model, study.examples, GOALS["decrease"], strength="per_component", rule="welch"
        )
