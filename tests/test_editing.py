"""Choosing components, edits on disk and in weights, and the ready tasks on trained digits."""

import json
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch

import coar
from coar.editing.judge import effect_curve
from coar.editing.select import welch_t
from coar.errors import EditError, GoalError, SettingsError, StorageError
from tests.synthetic import fit, linear, make, table, weights

N, D = 30, 12
LABELS = np.arange(N) % 3
PLANTED = {"decrease": 5, "increase": 7}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Attributions where component 5 raises, and component 7 lowers, the outputs of label 1 alone."""
    truth = weights(N) * 0.2
    truth[LABELS == 1, 5] += 3
    truth[LABELS == 1, 7] -= 3
    path = tmp_path_factory.mktemp("run") / "r.zarr"
    metadata = {"label": LABELS, "group": np.where(LABELS == 0, "land", "sea")}
    run = make(path, linear(truth, 0.7, 0.3), metadata=metadata, batch_norms={"layer1": "norm1", "layer2": "norm2"})
    return fit(run)


def goal(**changes):
    parts = {"targets": "label == 1", "references": "label != 1", "direction": "decrease"}
    return coar.EditGoal(**{**parts, **changes})


def margins(model, examples):
    """Correct logit less the largest other one."""
    with torch.no_grad():
        logits = model(examples.inputs)
    rows = torch.arange(len(logits))
    correct = logits[rows, examples.targets].clone()
    logits[rows, examples.targets] = -torch.inf
    return (correct - logits.amax(1)).numpy()


def test_welch_t_is_that_of_scipy(found):
    w = found.weights().astype(float)
    expected = scipy.stats.ttest_ind(w[LABELS == 1], w[LABELS != 1], equal_var=False).statistic
    np.testing.assert_allclose(welch_t(found, goal()), expected, rtol=1e-9)


def test_welch_t_over_more_examples_than_are_read_at_once(tmp_path):
    n = 2_500
    run = make(
        tmp_path / "r.zarr", linear(weights(n), 0.7), masks=40, blocks=(40, n), metadata={"label": np.arange(n) % 7}
    )
    attributions = fit(run)
    w, chosen = attributions.weights().astype(float), np.arange(n) % 7 == 2
    expected = scipy.stats.ttest_ind(w[chosen], w[~chosen], equal_var=False).statistic
    np.testing.assert_allclose(
        welch_t(attributions, goal(targets="label == 2", references="label != 2")), expected, rtol=1e-9
    )


def test_single_target_is_measured_in_standard_errors_of_the_references(found):
    w = found.weights().astype(float)
    rest = w[LABELS == 0]
    expected = (w[4] - rest.mean(0)) / np.sqrt(rest.var(0, ddof=1) / len(rest))
    single = goal(targets=[4], references="label == 0")
    np.testing.assert_allclose(welch_t(found, single), expected, rtol=1e-9)


@pytest.mark.parametrize("direction", PLANTED)
@pytest.mark.parametrize("targets", ["label == 1", [4]], ids=["class", "single"])
def test_planted_component_is_found(found, direction, targets):
    edit = coar.edit(found, goal(targets=targets, references="label == 0", direction=direction), budget=2)
    assert edit.components[0].name == table(D)[PLANTED[direction]].name
    assert np.sign(edit.scores[0]) == {"decrease": 1, "increase": -1}[direction]


@pytest.mark.parametrize("direction", PLANTED)
@pytest.mark.parametrize("budget", [1, 5, D])
def test_edit_takes_the_best_scores_in_order(found, direction, budget):
    edit = coar.edit(found, goal(direction=direction), budget=budget)
    scores = welch_t(found, goal())
    order = sorted(range(D), key=lambda i: -scores[i] if direction == "decrease" else scores[i])[:budget]
    assert [component.name for component in edit.components] == [table(D)[i].name for i in order]
    assert len(edit) == budget
    np.testing.assert_allclose(edit.scores, scores[order])
    np.testing.assert_allclose(edit.replacements, np.linspace(-1, 1, D)[order], rtol=1e-6)
    assert edit.goal == goal(direction=direction)
    assert (edit.ablation, edit.weights) == ("Mean", "0" * 64)
    sites = {component.site for component in edit.components}
    assert edit.batch_norms == {site: f"norm{site[-1]}" for site in ("layer1", "layer2") if site in sites}
    frame = edit.to_pandas()
    assert frame["name"].tolist() == [table(D)[i].name for i in order]
    assert frame["score"].tolist() == list(edit.scores)


def test_attributions_from_a_file_give_the_same_edit(found, tmp_path):
    found.to_safetensors(tmp_path / "a.safetensors")
    assert coar.edit(coar.load(tmp_path / "a.safetensors"), goal(), budget=4) == coar.edit(found, goal(), budget=4)


@pytest.mark.parametrize("budget", [0, -1, D + 1])
def test_budget_outside_the_components_is_refused(found, budget):
    with pytest.raises(SettingsError, match=f"budget of {budget} .*1 to 12"):
        coar.edit(found, goal(), budget=budget)


ALIKE = {
    "list": [1, 4, 7],
    "tuple": (7, 4, 1, 1),
    "array": np.array([4, 1, 7]),
    "condition": "id in [1, 4, 7]",
    "truth values": np.isin(np.arange(N), [1, 4, 7]),
}


@pytest.mark.parametrize("kind", ALIKE)
def test_goals_are_resolved_to_ascending_positions(found, kind):
    targets, references = goal(targets=ALIKE[kind], references="label == 2").resolve(found.metadata)
    assert targets.tolist() == [1, 4, 7]
    assert references.tolist() == list(range(2, N, 3))


UNRESOLVED = {
    "no targets": ({"targets": "label == 9"}, "targets='label == 9' selects none of the 30"),
    "no references": ({"references": []}, r"references=\(\) selects none"),
    "empty text": ({"targets": ""}, "cannot read"),
    "overlap": ({"references": "label >= 1"}, "10 examples are targets and references at once, first 1"),
    "overlapping positions": ({"targets": [3, 4], "references": [9, 4]}, "1 examples .* first 4"),
    "misspelt column": ({"targets": "lable == 1"}, "'lable'; there are group, id, label"),
    "position too large": ({"targets": [4, 30]}, "targets names example 30, but there are 30"),
    "negative position": ({"references": [-1, 2]}, "references names example -1"),
    "huge position": ({"targets": [2**70]}, "targets"),
    "word for a number": ({"targets": "label == 'one'"}, "a word is compared with a number"),
    "one reference": ({"references": [0]}, "one reference"),
    "direction": ({"direction": "up"}, "direction: .*'decrease' or 'increase'"),
    "fractions": ({"targets": [1.5]}, "targets"),
    "words": ({"targets": ["one"]}, "targets"),
    "a number": ({"targets": 3}, "targets"),
    "a number in an array": ({"targets": np.array(3)}, "targets"),
    "nothing": ({"references": None}, "references"),
    "unknown field": ({"budget": 3}, "budget"),
}


@pytest.mark.parametrize("mistake", UNRESOLVED)
def test_goals_that_make_no_sense_are_refused(found, mistake):
    changes, words = UNRESOLVED[mistake]
    with pytest.raises(GoalError, match=words):
        coar.edit(found, goal(**changes), budget=1)


@pytest.mark.parametrize("targets", ["label == 1", [4, 7]], ids=["condition", "positions"])
def test_edit_survives_the_disk(found, tmp_path, targets):
    edit = coar.edit(found, goal(targets=targets, references="label == 0"), budget=4)
    edit.save(tmp_path / "deep/er/edit.json")
    assert coar.Edit.load(tmp_path / "deep/er/edit.json") == edit
    assert [path.name for path in (tmp_path / "deep/er").iterdir()] == ["edit.json"]


def without(key):
    return lambda content: {name: value for name, value in content.items() if name != key}


def with_component(**changes):
    return lambda content: {**content, "components": [{**content["components"][0], **changes}]}


KEYS = ("format", "goal", "ablation", "weights", "batch_norms", "components")
DAMAGE = {
    **{f"no {key}": without(key) for key in KEYS},
    "no score": lambda c: {**c, "components": [{k: v for k, v in c["components"][0].items() if k != "score"}]},
    "a list": lambda c: [c],
    "nothing": lambda c: None,
    "goal without targets": lambda c: {**c, "goal": {"references": [1], "direction": "decrease"}},
    "format in words": lambda c: {**c, "format": "one"},
    "components by name": lambda c: {**c, "components": {}},
    "components as text": lambda c: {**c, "components": "conv1[0]"},
    "batch norms as a list": lambda c: {**c, "batch_norms": []},
    "replacement of null": with_component(replacement=None),
    "position in words": with_component(position="one"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_edit_is_refused(found, tmp_path, damage):
    file = tmp_path / "edit.json"
    coar.edit(found, goal(), budget=2).save(file)
    file.write_text(json.dumps(DAMAGE[damage](json.loads(file.read_text()))))
    with pytest.raises(EditError, match=r"edit\.json does not hold an edit.*Edit\.save"):
        coar.Edit.load(file)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"weights", b"[" * 50_000], ids=lambda b: repr(b[:4]))
def test_file_that_is_no_json_is_refused(tmp_path, content):
    (tmp_path / "edit.json").write_bytes(content)
    with pytest.raises(EditError, match="does not hold an edit"):
        coar.Edit.load(tmp_path / "edit.json")


def test_missing_and_future_edits_are_refused(found, tmp_path):
    with pytest.raises(EditError, match="does not hold an edit"):
        coar.Edit.load(tmp_path / "none.json")
    coar.edit(found, goal(), budget=2).save(tmp_path / "edit.json")
    content = json.loads((tmp_path / "edit.json").read_text())
    (tmp_path / "edit.json").write_text(json.dumps({**content, "format": 99}))
    with pytest.raises(EditError, match=r"format 99.*update coar"):
        coar.Edit.load(tmp_path / "edit.json")


def test_unwritable_place_is_a_storage_error(found, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="choose another path"):
        coar.edit(found, goal(), budget=2).save(tmp_path / "file/edit.json")


@pytest.fixture(scope="module", params=["mean", "zero"])
def case(request, digits, tmp_path_factory):
    """A study of digits, its attributions from 1,000 masks, and scans that no choice has seen."""
    whole = digits.study(ablation=request.param)
    wrong = np.flatnonzero(margins(whole.model, whole.examples) <= 0)
    rows = np.union1d(np.arange(250), wrong)
    study = replace(whole, examples=whole.examples.subset(rows))
    path = tmp_path_factory.mktemp("digits") / f"{request.param}.zarr"
    run = coar.collect(study, path, masks=1_000, device="cpu", progress=False)
    return study, fit(run), digits.judge()


def digit_goal(label=3, direction="decrease"):
    return goal(targets=f"label == {label}", references=f"label != {label}", direction=direction)


@pytest.mark.parametrize("budget", [1, 12, 60])
def test_edited_model_is_a_plain_one_that_does_what_gates_do(case, digits, budget):
    study, attributions, judge = case
    before = {name: value.clone() for name, value in study.model.state_dict().items()}
    edit = coar.edit(attributions, digit_goal(), budget=budget)
    edited = edit.apply(study.model)
    for name, value in study.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert type(edited) is type(study.model)
    assert list(edited.state_dict()) == list(before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in edited.modules())
    order = [study.components.index(component.name) for component in edit.components]
    gated = effect_curve(study.model, attributions, order, judge, counts=[0, budget], device="cpu")
    np.testing.assert_allclose(margins(edited, judge), gated[1], atol=1e-4)
    np.testing.assert_allclose(margins(study.model, judge), gated[0], atol=1e-4)
    assert np.abs(gated[1] - gated[0]).max() > 1e-2
    loaded = digits.DigitsNet().eval()
    loaded.load_state_dict(edited.state_dict())
    np.testing.assert_array_equal(margins(loaded, judge), margins(edited, judge))


def test_other_weights_are_refused(case, digits):
    study, attributions, _ = case
    edit = coar.edit(attributions, digit_goal(), budget=3)
    other = digits.DigitsNet().eval()
    with pytest.raises(EditError, match="DigitsNet has others"):
        edit.apply(other)
    other.load_state_dict(study.model.state_dict())
    with torch.no_grad():
        other.linear.bias[0] += 1e-6
    with pytest.raises(EditError, match="made for weights"):
        edit.apply(other)


def test_judging_is_arithmetic_on_margins(case):
    study, attributions, judge = case
    edit = coar.edit(attributions, digit_goal(), budget=15)
    found = coar.judge_edit(edit, study.model, judge, device="cpu").set_index("group")
    before, after = margins(study.model, judge), margins(edit.apply(study.model), judge)
    labels = judge.targets.numpy()
    for group, chosen in (("targets", labels == 3), ("references", labels != 3)):
        row = found.loc[group]
        assert (row["examples"], row["components"]) == (chosen.sum(), 15)
        expected = {
            "accuracy_before": (before[chosen] > 0).mean(),
            "accuracy_after": (after[chosen] > 0).mean(),
            "points": 100 * ((after[chosen] > 0).mean() - (before[chosen] > 0).mean()),
            "margin_before": before[chosen].mean(),
            "margin_after": after[chosen].mean(),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(row[name], value, rtol=1e-4, atol=1e-4, err_msg=name)
    points = {
        c: 100 * float((after[c == labels] > 0).mean() - (before[c == labels] > 0).mean()) for c in {*range(10)} - {3}
    }
    np.testing.assert_allclose(found.loc["average of groups", "points"], np.mean(list(points.values())), rtol=1e-6)
    worst = min(points, key=points.get)
    np.testing.assert_allclose(found["points"].iloc[3], points[worst], rtol=1e-6)
    assert found.index[3] == f"most harmed: {worst}"
    assert found["points"].iloc[3:].is_monotonic_increasing
    assert {*found.index[4:]} == {f"references: {c}" for c in points if c != worst}
    for c, expected in points.items():
        row = found.loc[f"most harmed: {c}" if c == worst else f"references: {c}"]
        assert row["examples"] == (labels == c).sum()
        np.testing.assert_allclose(row["points"], expected, rtol=1e-6)
    alike = goal(targets=[0, 5], references=[1, 2, 3], groups="even")
    twos = replace(judge, metadata={**judge.metadata, "even": np.zeros(len(judge))})
    other = coar.judge_edit(edit, study.model, twos, goal=alike, device="cpu")
    np.testing.assert_allclose(other["margin_after"], [after[[0, 5]].mean(), after[[1, 2, 3]].mean()], rtol=1e-4)
