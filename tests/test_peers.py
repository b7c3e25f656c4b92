"""Peers' attributions by captum against derivatives taken by hand along the path, and against closed forms."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

import coar
from benchmarks import peers
from coar.components.table import Component, Components
from coar.errors import AblationError, ExamplesError, MismatchError
from coar.peers import path_scores

CLOSE = {"rtol": 1e-4, "atol": 1e-6}
STEPS = 7
METHODS = ("conductance", "internal_influence")


class Net(nn.Module):
    """Two convolutions with in-place activations after them, and two linear layers."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 5, 3)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(5, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.fc1 = nn.Linear(4, 6)
        self.fc2 = nn.Linear(6, 6)

    def forward(self, x):
        x = self.relu(self.conv1(x))
        x = self.relu(self.norm(self.conv2(x)))
        return self.fc2(torch.tanh(self.fc1(x.mean((2, 3)))))


class Words(nn.Module):
    """Word and position embeddings, then a gated mean over the words that the mask keeps."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(11, 3), nn.Embedding(5, 3)
        self.hidden, self.out = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, ids, mask):
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        return self.out((torch.tanh(self.hidden(x)) * mask[..., None]).sum(1))


def nodes(count):
    """Gauss-Legendre points and weights on [0, 1]."""
    places, weights = np.polynomial.legendre.leggauss(count)
    return (places + 1) / 2, weights / 2


def by_hand(head, tail, x, targets):
    """Conductance and internal influence, (examples, channels) each, of what `head` returns, one point at a time."""

    def derivatives(row, target, places):
        for place in places:
            y = head(place * row[None]).detach().requires_grad_()
            tail(y)[0, target].backward()
            yield y.detach(), y.grad

    flows, influences = [], []
    for row, target in zip(x, targets, strict=True):
        along = list(derivatives(row, target, nodes(STEPS + 1)[0]))
        flows.append(sum((b - a) * g for (a, g), (b, _) in pairwise(along)))
        places, weights = nodes(STEPS)
        influences.append(sum(w * g for w, (_, g) in zip(weights, derivatives(row, target, places), strict=True)))
    return [torch.cat(rows).reshape(len(x), rows[0].shape[1], -1).sum(2).numpy() for rows in (flows, influences)]


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    net = Net().eval().double()
    for layer in (net.conv1, net.conv2, net.fc1, net.fc2):
        nn.init.normal_(layer.weight, std=0.5)
    nn.init.uniform_(net.norm.running_mean, -0.5, 0.5)
    x, y = torch.randn(5, 2, 7, 7).double(), torch.tensor([0, 3, 5, 1, 3])
    heads = Components(Component(f"fc2 head {i}", "head", "fc2", "input", -1, 2 * i, 2) for i in range(3))
    study = coar.Study(
        model=net,
        examples=coar.Examples(inputs=x, targets=y),
        components=coar.conv_filters(net) + coar.neurons(net, exclude="fc2") + heads,
        output=coar.ClassLogit(),
    )
    return study, x, y


@pytest.fixture(scope="module")
def expected(case):
    """Scores of all 18 components, each site cut out of the net by hand."""
    study, x, y = case
    net, relu = study.model, torch.relu

    def end(z):
        return net.fc2(torch.tanh(z))

    def middle(z):
        return net.fc1(relu(net.norm(z)).mean((2, 3)))

    def first(z):
        return relu(net.conv1(z))

    sites = [
        (net.conv1, lambda z: end(middle(net.conv2(relu(z))))),
        (lambda z: net.conv2(first(z)), lambda z: end(middle(z))),
        (lambda z: middle(net.conv2(first(z))), end),
        (lambda z: torch.tanh(middle(net.conv2(first(z)))), net.fc2),
    ]
    found = [by_hand(head, tail, x, y) for head, tail in sites]
    heads = [part.reshape(5, 3, 2).sum(2) for part in found[3]]
    return [np.concatenate([*[site[i] for site in found[:3]], heads[i]], 1) for i in range(2)]


@pytest.mark.parametrize("batch_size", [2, 5, 9, 24, None])
def test_scores_are_derivatives_by_hand(case, expected, batch_size):
    for method, truth in zip(METHODS, expected, strict=True):
        found = path_scores(case[0], method, STEPS, batch_size=batch_size)
        assert found.weights.dtype == np.float32
        assert found.weights.shape == truth.shape == (5, 18)
        assert np.abs(truth).max() > 0.01
        np.testing.assert_allclose(found.weights, truth, **CLOSE)


def test_passes_are_counted(case):
    for method, points in zip(METHODS, (STEPS + 1, STEPS), strict=True):
        found = path_scores(case[0], method, STEPS)
        assert (found.forwards, found.backwards, found.sites) == (4 * points, 4 * points, 4)
        assert found.seconds > 0


def test_linear_net_has_closed_forms():
    """Through a linear net flow weight times activation, and the influence is the weight."""
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)).double()
    x, y = torch.randn(6, 3).double(), torch.tensor([0, 1, 0, 1, 1, 0])
    parts = coar.neurons(net, include="0")
    study = coar.Study(
        model=net, examples=coar.Examples(inputs=x, targets=y), components=parts, output=coar.ClassLogit()
    )
    last = net[1].weight.detach()[y].numpy()
    places, _ = nodes(STEPS + 1)
    flows = last * net[0](x).detach().numpy() * (places[-1] - places[0])
    np.testing.assert_allclose(path_scores(study, "conductance", STEPS).weights, flows, **CLOSE)
    np.testing.assert_allclose(path_scores(study, "internal_influence", STEPS).weights, last, **CLOSE)


def test_conductance_of_a_layer_adds_up_to_the_change_of_the_output(case):
    study, x, y = case
    study = replace(study, components=coar.conv_filters(study.model, include="conv1"))
    start = torch.full((1, 2, 7, 7), 0.3).double()
    found = path_scores(study, "conductance", 200, baseline=start, batch_size=500)
    with torch.no_grad():
        change = (study.model(x) - study.model(start))[torch.arange(5), y]
    assert change.abs().max() > 0.05
    np.testing.assert_allclose(found.weights.sum(1), change, atol=0.01 * float(change.abs().max()))


def test_tokens_move_along_the_path_by_their_embeddings():
    net = Words().eval()
    ids, targets = torch.randint(11, (4, 5)), torch.tensor([0, 2, 1, 1])
    mask = torch.ones(4, 5, dtype=torch.long)
    mask[1, 3:] = 0
    examples = coar.Examples(inputs={"ids": ids, "mask": mask}, targets=targets)
    study = coar.Study(
        model=net, examples=examples, components=coar.neurons(net, include="hidden"), output=coar.ClassLogit()
    )
    truth = []
    for row, kept, target in zip(ids, mask, targets, strict=True):
        words = net.words(row).detach()
        places, weights = nodes(STEPS)
        total = 0
        for place, weight in zip(places, weights, strict=True):
            y = net.hidden(place * words + net.places.weight).detach().requires_grad_()
            net.out((torch.tanh(y) * kept[:, None]).sum(0))[target].backward()
            total = total + weight * y.grad
        truth.append(total.sum(0))
    found = path_scores(study, "internal_influence", STEPS, embedding="words", batch_size=10)
    np.testing.assert_allclose(found.weights, torch.stack(truth), **CLOSE)
    assert (found.forwards, found.backwards) == (STEPS + 1, STEPS)  # one pass reads the embeddings
    with pytest.raises(ExamplesError, match="name the embedding"):
        path_scores(study, "conductance", STEPS)


def test_entries_of_an_example_are_added_up():
    """Both halves of a pair pass through the model side by side; a sum over them is one net on each half."""

    class Pairs(Words):
        def forward(self, ids):
            whole = super().forward(ids.flatten(0, 1), torch.ones(2 * len(ids), 5))
            return whole.unflatten(0, (-1, 2)).sum(1)

    net = Pairs().eval()
    ids, targets = torch.randint(11, (3, 2, 5)), torch.tensor([0, 2, 1])
    pairs = coar.Study(
        model=net,
        examples=coar.Examples(inputs={"ids": ids}, targets=targets),
        components=coar.neurons(net, include="hidden"),
        output=coar.ClassLogit(),
    )
    single = Words().eval()
    single.load_state_dict(net.state_dict())
    inputs = {"ids": ids.flatten(0, 1), "mask": torch.ones(6, 5)}
    halves = coar.Examples(inputs=inputs, targets=targets.repeat_interleave(2))
    for method in METHODS:
        truth = path_scores(replace(pairs, model=single, examples=halves), method, STEPS, embedding="words").weights
        for batch_size in (3, 20, None):
            found = path_scores(pairs, method, STEPS, embedding="words", batch_size=batch_size)
            np.testing.assert_allclose(found.weights, truth.reshape(3, 2, 4).sum(1), **CLOSE)


@pytest.mark.parametrize("batch_size", [2, None])
def test_layer_feature_ablation_is_leave_one_out(case, tmp_path, batch_size):
    study = replace(case[0], components=Components([*case[0].components[:3], *case[0].components[5:9]]))
    run = coar.collect(study, tmp_path / "r.zarr", masks=2, device="cpu", progress=False)
    one = coar.leave_one_out(study, run, device="cpu", progress=False)
    found = peers.layer_feature_ablation(study, batch_size=batch_size)
    np.testing.assert_allclose(found.weights, one.weights(), rtol=1e-3, atol=1e-5)
    assert found.forwards == 2 * 2 + len(study.components) + 1  # filters 3 and 4 of the first site are no components
    assert found.backwards == 0


def test_the_model_stays_as_it_is(case):
    study = case[0]
    before = {name: value.clone() for name, value in study.model.state_dict().items()}
    path_scores(study, "internal_influence", 2)
    assert all(torch.equal(value, before[name]) for name, value in study.model.state_dict().items())
    assert study.model.relu.inplace
    assert all(parameter.requires_grad for parameter in study.model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in study.model.modules())


def test_parameter_slices_are_refused(case):
    study = replace(case[0], components=coar.parameter_slices(case[0].model, "fc1.weight"))
    for peer in (
        lambda s: path_scores(s, "conductance", 2),
        lambda s: path_scores(s, "internal_influence", 2),
        peers.layer_feature_ablation,
    ):
        with pytest.raises(AblationError, match="parameter slices"):
            peer(study)


def test_path_methods_are_fits_of_a_run(case, tmp_path):
    """They are exact for the unablated model, and scored like any fit."""
    study, x, y = case
    run = coar.collect(study, tmp_path / "r.zarr", masks=20, test_masks=20, device="cpu", progress=False)
    for store, method in ((coar.conductance, "conductance"), (coar.internal_influence, "internal_influence")):
        found = store(study, run, steps=STEPS, device="cpu")
        np.testing.assert_array_equal(found.weights(), path_scores(study, method, STEPS, device="cpu").weights)
        with torch.no_grad():
            whole = study.model(x)[torch.arange(5), y]
        np.testing.assert_allclose(found.predict(np.ones((1, 18), dtype=bool))[0], whole, rtol=1e-3, atol=1e-3)
    assert coar.evaluate(run).table["fit"].tolist() == ["conductance", "internal_influence"]
    with pytest.raises(MismatchError):
        coar.conductance(replace(study, output=coar.CrossEntropy()), run)
