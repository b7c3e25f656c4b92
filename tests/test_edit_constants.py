"""Constants made for a goal: against arithmetic by hand, a constant known beforehand, and the bound."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import coar
from coar.editing.evaluate import GatedEvaluator, SelectionContext
from coar.editing.goal import Objective
from coar.editing.train import train_constants
from coar.errors import EditError
from tests.synthetic import fit

FILTERS = 6
ARCHITECTURE = """
def net():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 3),
    )
"""
PLAIN = f"""
import sys
sys.modules["coar"] = None  # whoever imports it fails
import numpy as np, torch
from safetensors.torch import load_file
from torch import nn
{ARCHITECTURE}
model = net().eval()
model.load_state_dict(load_file(sys.argv[1]))
with torch.no_grad():
    np.save(sys.argv[3], model(torch.from_numpy(np.load(sys.argv[2]))).numpy())
"""


def pictures(count, seed):
    """Three classes of 6 x 6 pictures that overlap a little."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    patterns = np.random.default_rng(0).standard_normal((3, 1, 6, 6))
    x = patterns[labels] + 1.2 * rng.standard_normal((count, 1, 6, 6))
    return coar.Examples(inputs=torch.tensor(x, dtype=torch.float32), targets=torch.tensor(labels))


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A trained convolutional net of six filters, attributions under means, and further pictures to choose on."""
    studied, scope = pictures(90, 1), {"nn": nn}
    exec(ARCHITECTURE, scope)
    torch.manual_seed(0)
    model = scope["net"]()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(studied.inputs), studied.targets).backward()
        optimizer.step()
    model.eval()
    ablation = coar.Mean(calibration=studied)
    study = coar.Study(model=model, examples=studied, components=coar.conv_filters(model), ablation=ablation)
    run = coar.collect(study, tmp_path_factory.mktemp("c") / "r.zarr", masks=100, device="cpu", progress=False)
    return study, fit(run), pictures(60, 2)


GOAL = coar.EditGoal(targets="label == 1", references="label != 1", direction="decrease")


def folded(model, edit):
    """The model with an edit's constants in place by hand: filters of zeros, and running means moved by constants."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for component, constant in zip(edit.components, edit.replacements, strict=True):
        state["0.weight"][component.position] = 0
        state["1.running_mean"][component.position] -= constant
    return state


def margins(model, state, examples):
    """Correct logit less the largest other one, with these weights."""
    with torch.no_grad():
        logits = torch.func.functional_call(model, state, (examples.inputs,))
    rows = torch.arange(len(logits))
    correct = logits[rows, examples.targets].clone()
    logits[rows, examples.targets] = -torch.inf
    return (correct - logits.amax(1)).numpy()


def judged(model, parts, edit):
    """The trade-off, accuracy lost by each class of references, and the standard error of its mean, by hand."""
    base, now = (
        np.concatenate([margins(model, state, part) for part in parts])
        for state in (model.state_dict(), folded(model, edit))
    )
    labels = np.concatenate([part.targets.numpy() for part in parts])
    level = lambda m: 1 / (1 + np.exp(m))  # noqa: E731
    value, lost, variance = level(-now[labels == 1]).mean(), [], 0.0
    for c in (0, 2):
        old, new = base[labels == c], now[labels == c]
        value += 12 / 2 * level(new).mean()
        change = (old > 0).astype(float) - (new > 0)
        lost.append(change.mean())
        variance += change.var() / len(change)
    return value, lost, math.sqrt(variance) / 2


def select(case, **options):
    study, attributions, more = case
    options = {"choosing": more, "device": "cpu", "progress": False, **options}
    return coar.select(attributions, study.model, study.examples, GOAL, **options)


@pytest.mark.parametrize("bound", [0.02, 0.05, 0.3])
def test_constants_for_the_goal_are_better_and_within_the_bound(case, bound):
    study, attributions, more = case
    parts, limit = (study.examples, more), coar.Bound(mean=bound, group=2 * bound)
    found, usual = (select(case, bound=limit, constants=kind) for kind in ("goal", "run"))
    assert usual.constants == "run"
    better = found.after.value < usual.after.value
    assert better == (found.constants == "goal")
    assert better or bound == 0.02
    for one in (found, usual):
        value, lost, error = judged(study.model, parts, one.edit)
        np.testing.assert_allclose([one.after.value, one.after.lost], [value, np.mean(lost)], rtol=1e-4, atol=1e-9)
        assert np.mean(lost) + error <= bound
        assert max(lost) <= 2 * bound
    means = attributions.origin.constants
    rows = [study.components.index(one.name) for one in usual.edit.components]
    assert usual.edit.replacements == tuple(means[row] for row in rows)


def test_edited_checkpoint_is_what_was_tried_out_without_the_package(case, tmp_path):
    study, _, more = case
    edit = select(case, bound=coar.Bound(mean=0.3, group=0.6)).edit
    edit.save(tmp_path / "edit.json")
    assert coar.Edit.load(tmp_path / "edit.json") == edit
    coar.save_weights(coar.Edit.load(tmp_path / "edit.json").apply(study.model), tmp_path / "edited.safetensors")
    np.save(tmp_path / "x.npy", more.inputs.numpy())
    (tmp_path / "plain.py").write_text(PLAIN)
    words = [sys.executable, "plain.py", "edited.safetensors", "x.npy", "y.npy"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = torch.func.functional_call(study.model, folded(study.model, edit), (more.inputs,))
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected.numpy(), rtol=1e-5, atol=1e-5)


def test_gradients_by_constants_and_gates_are_differences(case):
    study, attributions, more = case
    evaluator = GatedEvaluator(attributions, study.model, more, device="cpu")
    rows, gates = np.array([3, 10, 41]), np.array([1, 0, 1, 1, 0.25, 0.5])
    weights, constants = np.array([1.0, -2.0, 0.5]), np.linspace(-0.5, 0.5, FILTERS, dtype=np.float32)

    def weighted(gates, values):
        conv, *rest = study.model.double()
        with torch.no_grad():
            y = conv(more.inputs[rows].double())
            keep, values = (torch.tensor(part)[:, None, None] for part in (gates, values))
            y = keep * y + (1 - keep) * values
            for layer in rest:
                y = layer(y)
        study.model.float()
        labels = more.targets[rows]
        smooth = [row[c] - torch.cat([row[:c], row[c + 1 :]]).logsumexp(0) for row, c in zip(y, labels, strict=True)]
        return float(weights @ np.array(smooth))

    found = evaluator.weighted_gradients(gates, rows, constants=constants, slopes=lambda _: weights)
    for number, gradient in enumerate(found):
        expected = np.zeros(FILTERS)
        for i in range(FILTERS):
            ends = []
            for step in (1e-4, -1e-4):
                moved = [constants.astype(float), gates.astype(float)]
                moved[number] = moved[number] + step * np.eye(FILTERS)[i]
                ends.append(weighted(moved[1], moved[0]))
            expected[i] = (ends[0] - ends[1]) / 2e-4
        np.testing.assert_allclose(gradient, expected, atol=1e-4)
    assert evaluator.passes == 3 * len(rows)


def peaked():
    """A net whose margin is 3 - 4 |y - 1| for class 1, where y is the first feature, and that of the second for 0."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[1].weight.copy_(torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]]))
        model[1].bias.copy_(torch.tensor([-1.0, 1, 0, 0]))
        model[3].weight.copy_(torch.tensor([[0.0, 0, 9, 0], [-4, -4, 0, 0]]))
        model[3].bias.copy_(torch.tensor([0.0, 3]))
    return model


def test_the_best_constant_is_found_where_it_is_known(tmp_path):
    """Without y, targets are right by 3 where it becomes 1, and wrong with its mean, 2."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    x = np.column_stack([np.where(labels, rng.choice([-2.0, 6.0], 60), 2.0), np.where(labels, 0.0, 2.0)])
    x[labels == 1, 0] -= x[:, 0].mean() - 2
    inputs = torch.tensor(x, dtype=torch.float32)
    examples, model = coar.Examples(inputs=inputs, targets=torch.tensor(labels)), peaked()
    components = coar.neurons(model, include="0")
    study = coar.Study(model=model, examples=examples, components=components, ablation=coar.Mean(calibration=examples))
    attributions = fit(coar.collect(study, tmp_path / "r.zarr", masks=40, device="cpu", progress=False))
    goal = coar.EditGoal(targets="label == 1", references="label == 0", direction="increase")
    context = SelectionContext.of(attributions, model, examples, device="cpu")
    columns = {"label": labels}
    objective = Objective.of(goal, columns, context.base, tradeoff=coar.TradeOff(), bound=coar.Bound())
    start = context.exact.constants
    trained = train_constants(context.exact, objective, (0,), start=start)
    assert trained[1] == start[1]  # that of a component which is kept
    np.testing.assert_allclose(trained[0], 1.0, atol=0.1)
    found = coar.select(attributions, model, examples, goal, device="cpu", progress=False)
    assert (found.constants, found.after.targets, found.after.lost) == ("goal", 1.0, 0.0)
    with pytest.raises(EditError, match="constants trained for its goal"):
        coar.predict_edit(attributions, found.edit)


def test_experts_keep_their_constants(case):
    study, attributions, more = case
    evaluator = GatedEvaluator(attributions, study.model, more, device="cpu")
    evaluator.table = type(study.components)(one._replace(side="expert") for one in study.components)
    assert train_constants(evaluator, None, (1, 4), start=evaluator.constants).tolist() == evaluator.constants.tolist()
    assert evaluator.passes == 0
