"""Circuits: graphs, scores, choices and judgements against explicit loops and the edge oracle."""

import functools
import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import coar
from coar.circuits.choosing import starting_constants
from coar.circuits.evaluator import CircuitEvaluator
from coar.circuits.graph import EdgeGraph
from coar.circuits.learned import HardConcrete, UniformGradientSampling, writers_of
from coar.errors import AblationError, CircuitError, ComponentError, OutputError, SettingsError
from tests import edge_oracle
from tests.edge_oracle import WORDS, build

LENGTH, COUNT = 5, 6


def texts(seed: int, count: int = COUNT) -> coar.Examples:
    """Return texts of random tokens with an answer and a wrong answer; n and n + count / 2 are a pair."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, WORDS, (count, LENGTH), generator=draw)
    answers = torch.stack([torch.randperm(WORDS - 2, generator=draw)[:2] + 2 for _ in range(count)])
    return coar.token_examples(
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        answers=answers[:, 0],
        wrong=answers[:, 1],
        metadata={"pair": np.arange(count) % (count // 2)},
    )


def study_of(
    family: str = "llama",
    ablation: coar.Ablation | None = None,
    find: Callable[..., coar.Components] = coar.edges,
    examples: coar.Examples | None = None,
) -> coar.Study:
    """Return a study of a small model's edges under mean ablation."""
    model = build(family)
    return coar.Study(
        model=model,
        examples=examples or texts(0),
        components=find(model),
        output=coar.LogitDifference(),
        ablation=ablation or coar.Mean(calibration=texts(7)),
    )


@functools.cache
def shared() -> coar.CircuitScores:
    """Return scores of the small Llama's edges by the gradient at the full model."""
    return coar.circuit_scores(study_of(), "eap", device="cpu", progress=False)


def last_logits(study: coar.Study, family: str, n: int, kept: dict[str, float], constants: np.ndarray) -> Tensor:
    """Return the oracle's logits of the last token of example n, where unnamed edges are kept."""
    first = {row.name.split(" -> ")[0]: row.position for row in study.components}
    size = study.components[0].size

    def replacement(label: str, _: int) -> Tensor:
        return torch.from_numpy(constants)[first[label] : first[label] + size]

    ids = study.examples.inputs["input_ids"][n]
    keep = lambda w, r: kept.get(f"{w} -> {r}", kept.get(w, 1.0))  # noqa: E731
    with torch.no_grad():
        return edge_oracle.logits(family, study.model, ids, keep, replacement)[-1]


def difference(study: coar.Study, n: int, logits: Tensor) -> float:
    """Return the logit of an example's answer less that of its wrong answer."""
    targets = study.examples.targets[n, -1]
    return float(logits[targets[0, 0]] - logits[targets[1, 0]])


def divergence(study: coar.Study, family: str, n: int, logits: Tensor, constants: np.ndarray) -> float:
    """Return the KL divergence from the unablated model's next token."""
    plain = last_logits(study, family, n, {}, constants).double().softmax(-1)
    return float((plain * (plain.log() - logits.double().log_softmax(-1))).sum())


def paths(kept: list[str], groups: dict[str, list[str]]) -> set[str]:
    """Return the edges on a path from `embed` to `out`, by walking over all paths."""
    found: set[str] = set()

    def walk(writer: str, path: list[str]) -> None:
        for name in kept:
            source, reader = name.split(" -> ")
            if source != writer:
                continue
            if reader == "out":
                found.update([*path, name])
            for following in groups.get(reader, []):
                walk(following, [*path, name])

    walk("embed", [])
    return found


def fed(family: str) -> dict[str, list[str]]:
    """Return the writers that each reader feeds, by the names of a two-layer model."""
    found: dict[str, list[str]] = {}
    for layer in range(2):
        found[f"L{layer}.mlp"] = [f"L{layer}.mlp"]
        for head in range(4):
            found[f"L{layer}.H{head}.q"] = [f"L{layer}.H{head}"]
            for port in "kv":
                found[f"L{layer}.H{head}.{port}"] = [f"L{layer}.H{head}"]
                found.setdefault(f"L{layer}.G{head // 2}.{port}", []).append(f"L{layer}.H{head}")
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_connected_edges_are_those_on_a_path(family: str) -> None:
    """Random sets of a grouped, an ungrouped and a parallel model, against a walk over all paths."""
    model = build(family)
    edges = coar.edges(model)
    graph, draw = EdgeGraph(model, edges), torch.Generator().manual_seed(1)
    keeps = torch.rand(12, len(edges), generator=draw) < torch.tensor([0.1, 0.2, 0.3]).repeat(4)[:, None]
    sizes = set()
    for keep, found in zip(keeps, graph.connected(keeps.float()), strict=True):
        expected = paths([name for name, kept in zip(edges.names, keep, strict=True) if kept], fed(family))
        assert {name for name, kept in zip(edges.names, found, strict=True) if kept} == expected
        sizes.add(len(expected))
    assert len(sizes) > 4
    assert bool(graph.connected(torch.ones(len(edges))).all())


def test_what_does_not_reach_the_end_has_no_effect() -> None:
    """The model computes the same without it; what is left are all edges with a path of kept edges to the end."""
    scores = shared()
    keep = (torch.rand(scores.evaluator.components, generator=torch.Generator().manual_seed(5)) < 0.25).float()
    less = scores.evaluator.graph.reaching_end(keep).float()
    assert 0 < less.sum() < keep.sum()
    kept = [name for name, one in zip(scores.components.names, keep, strict=True) if one]

    def leads(name: str) -> bool:
        reader = name.partition(" -> ")[2]
        after = fed("llama").get(reader, [])
        return reader == "out" or any(leads(other) for other in kept if other.partition(" -> ")[0] in after)

    found = [name for name, one in zip(scores.components.names, less, strict=True) if one]
    assert found == [name for name in kept if leads(name)]
    np.testing.assert_allclose(scores.evaluator.measure(less).output, scores.evaluator.measure(keep).output, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_measures_are_those_of_the_oracle(family: str) -> None:
    """KL and output of hard masks, one for each example."""
    study = study_of(family)
    evaluator = CircuitEvaluator(study, device="cpu", batch_size=4)
    masks = (torch.rand(COUNT, len(study.components), generator=torch.Generator().manual_seed(2)) < 0.7).float()
    found = evaluator.measure(masks)
    constants = evaluator.constants.numpy()
    for n in (0, 5):
        logits = last_logits(
            study, family, n, dict(zip(study.components.names, masks[n].tolist(), strict=True)), constants
        )
        assert found.output[n] == pytest.approx(difference(study, n, logits), abs=1e-4)
        assert found.kl[n] == pytest.approx(divergence(study, family, n, logits, constants), abs=1e-4)
        plain = last_logits(study, family, n, {}, constants)
        assert found.agreement[n] == float(plain.argmax() == logits.argmax())
    assert evaluator.passes == 2 * COUNT  # plain passes, and gated ones


def test_gradients_are_slopes_of_the_oracle() -> None:
    """Of the KL divergence by masks, one for each example, and by constants, at random gates."""
    study = study_of()
    evaluator = CircuitEvaluator(study, device="cpu", batch_size=4)
    draw = torch.Generator().manual_seed(3)
    masks = torch.rand(COUNT, len(study.components), generator=draw)
    found = evaluator.gradients(masks)
    constants = evaluator.constants.double().numpy()

    def loss(n: int, mask: Tensor, values: np.ndarray) -> float:
        kept = dict(zip(study.components.names, mask.tolist(), strict=True))
        return divergence(study, "llama", n, last_logits(study, "llama", n, kept, values.astype(np.float32)), constants)

    step = 2e-2
    for n in (1, 4):
        for i in found.by_keep[n].abs().topk(2).indices.tolist():
            up, down = masks[n].clone(), masks[n].clone()
            up[i] += step
            down[i] -= step
            slope = (loss(n, up, constants) - loss(n, down, constants)) / (2 * step)
            assert float(found.by_keep[n, i]) == pytest.approx(slope, rel=0.03, abs=1e-3)
    i = int(found.by_constants.abs().argmax())
    ends = []
    for sign in (1, -1):
        moved = constants.copy()
        moved[i] += sign * step
        ends.append(sum(loss(n, masks[n], moved) for n in range(COUNT)))
    assert float(found.by_constants[i]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=0.03)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_gradients_by_constants_alone_are_slopes_of_the_oracle(family: str, share: float) -> None:
    """Under one hard mask, in which most readers have no edge, some or almost all; they are those of `gradients`."""
    study = study_of(family)
    evaluator = CircuitEvaluator(study, device="cpu", batch_size=4)
    keep = (torch.rand(len(study.components), generator=torch.Generator().manual_seed(4)) < share).float()
    keep[[name.endswith("output") for name in study.components.names]] = 1.0
    losses, found = evaluator.constant_gradients(keep)
    both = evaluator.gradients(keep)
    torch.testing.assert_close(losses, both.losses)
    torch.testing.assert_close(found, both.by_constants, rtol=1e-4, atol=1e-6)
    kept = dict(zip(study.components.names, keep.tolist(), strict=True))
    constants, step = evaluator.constants.numpy(), 1e-2
    for i in found.abs().topk(2).indices.tolist():
        ends = []
        for sign in (1, -1):
            moved = constants.copy()
            moved[i] += sign * step
            logits = [last_logits(study, family, n, kept, moved) for n in range(COUNT)]
            ends.append(sum(divergence(study, family, n, each, constants) for n, each in enumerate(logits)))
        assert float(found[i]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=0.03)


def test_constants_have_no_gradient_where_nothing_is_ablated() -> None:
    """The loss is the unablated model's."""
    evaluator = CircuitEvaluator(study_of(), device="cpu")
    losses, found = evaluator.constant_gradients(evaluator.everything())
    assert float(losses.abs().max()) < 1e-5
    assert not found.any()


def test_the_score_eap_is_the_mean_gradient_of_the_output(tmp_path) -> None:
    """It is the baseline `mask_gradient` of a run, averaged over examples, and a run's fit is a method by its name."""
    scores, study = shared(), shared().evaluator.study
    run = coar.collect(study, tmp_path / "run.zarr", masks=2, device="cpu", progress=False)
    weights = coar.mask_gradient(study, run, device="cpu", progress=False).weights()
    np.testing.assert_allclose(scores.values, weights.mean(0), atol=1e-5)
    fitted = coar.circuit_scores(study, "mask_gradient", run=run, device="cpu", progress=False)
    np.testing.assert_allclose(fitted.values, scores.values, atol=1e-5)
    assert scores.passes == 3 * COUNT + COUNT  # gradients, and plain passes for the divergence
    with pytest.raises(SettingsError, match=r"unknown method 'best'; choose gradual, eap, .*run="):
        coar.circuit_scores(study, "best", device="cpu")


@pytest.mark.parametrize(("method", "settings"), [("eap", {}), ("eap_ig", {"steps": 2}), ("random_masks", {})])
def test_gradients_of_the_first_examples(method: str, settings: dict) -> None:
    """`most` gives what an evaluator of these examples alone gives."""
    evaluator = shared().evaluator
    few = evaluator.on(evaluator.study.examples.subset(range(3)))
    expected = coar.circuit_scores(few.study, method, evaluator=few, progress=False, **settings)
    found, every = (
        coar.circuit_scores(evaluator.study, method, evaluator=evaluator, progress=False, most=most, **settings)
        for most in (3, None)
    )
    np.testing.assert_allclose(found.values, expected.values, atol=1e-6)
    assert not np.allclose(found.values, every.values)


def test_paths_of_gradients_end_at_the_full_model() -> None:
    """One step is the gradient at the full model; with more, only edges of the embedding move along the inputs."""
    scores = shared()
    given = {"evaluator": scores.evaluator, "progress": False}
    for path in ("inputs", "activations"):
        one = coar.circuit_scores(scores.evaluator.study, "eap_ig", steps=1, path=path, **given)
        np.testing.assert_allclose(one.values, scores.values, atol=1e-5)
        two = coar.circuit_scores(scores.evaluator.study, "eap_ig", steps=2, path=path, **given)
        moving = [name.startswith("embed") or path == "activations" for name in scores.components.names]
        keep = torch.where(torch.tensor(moving), 0.5, 1.0)
        half = -scores.evaluator.gradients(keep, loss="output").by_keep.numpy() / COUNT
        np.testing.assert_allclose(two.values, (half + scores.values) / 2, atol=1e-5)


def test_exact_scores_are_those_of_the_oracle() -> None:
    """The increase of the KL divergence when one writer is ablated."""
    study = study_of(find=coar.nodes)
    scores = coar.circuit_scores(study, "exact", device="cpu", progress=False)
    constants = scores.evaluator.constants.numpy()
    for i in (0, 4, len(study.components) - 1):
        kept = {study.components[i].name: 0.0}
        losses = [
            divergence(study, "llama", n, last_logits(study, "llama", n, kept, constants), constants)
            for n in range(COUNT)
        ]
        assert scores.values[i] == pytest.approx(np.mean(losses), abs=1e-4)


def test_greedy_removal_is_that_of_the_oracle() -> None:
    """ACDC over writers, at two thresholds, in explicit loops."""
    examples = texts(0, 2)
    study = study_of(find=coar.nodes, examples=examples)
    thresholds = (0.2, 0.45)
    scores = coar.circuit_scores(study, "acdc", thresholds=thresholds, device="cpu", progress=False)
    constants = scores.evaluator.constants.numpy()

    def loss(removed: set[str]) -> float:
        kept = dict.fromkeys(removed, 0.0)
        return float(
            np.mean(
                [
                    divergence(study, "llama", n, last_logits(study, "llama", n, kept, constants), constants)
                    for n in range(len(examples))
                ]
            )
        )

    expected = dict.fromkeys(study.components.names, 0.0)
    for threshold in thresholds:
        removed: set[str] = set()
        present = 0.0
        for name in reversed(study.components.names):
            tried = loss(removed | {name})
            if tried - present < threshold:
                removed, present = removed | {name}, tried
        expected |= dict.fromkeys(set(expected) - removed, threshold)
    assert dict(zip(study.components.names, scores.values.tolist(), strict=True)) == expected
    assert len(set(expected.values())) == 3


def test_gradients_in_the_window_are_unbiased() -> None:
    """UGS, for a loss with an interaction whose expectation under independent masks is known."""
    method, draw = UniformGradientSampling(), torch.Generator().manual_seed(0)
    theta = torch.tensor([1.0, -0.5, 2.0])
    p, linear, product = torch.sigmoid(theta), torch.tensor([1.0, -2.0, 0.5]), 3.0
    uniform = torch.rand(400_000, 3, generator=draw)
    masks = method.sampled(theta, uniform)
    assert ((masks.mean(0) - p).abs() < 0.005).all()
    slopes = linear.expand_as(masks).clone()
    slopes[:, 0] += product * masks[:, 1]
    slopes[:, 1] += product * masks[:, 0]
    expected = (linear + product * torch.tensor([p[1], p[0], 0.0])) * p * (1 - p)
    found = method.slopes(theta, uniform, slopes / len(uniform))
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0.02)


def test_hard_concrete_gates_have_their_gradient() -> None:
    """Slopes of parameters are those of finite differences, with the same uniform numbers; the cost is a frequency."""
    method, draw = HardConcrete(), torch.Generator().manual_seed(0)
    theta, uniform = torch.randn(4, generator=draw), torch.rand(200_000, 4, generator=draw)
    weights, step = torch.randn(200_000, 4, generator=draw) / 1000, 1e-2

    def loss(parameters: Tensor) -> Tensor:
        return (weights * method.sampled(parameters, uniform)).double().sum(0)

    expected = (loss(theta + step) - loss(theta - step)) / (2 * step)
    torch.testing.assert_close(method.slopes(theta, uniform, weights).double(), expected, atol=5e-3, rtol=1e-2)
    open_share = lambda t: (method.sampled(t, uniform) > 0).double().mean(0)  # noqa: E731
    rise = (open_share(theta + 0.1) - open_share(theta - 0.1)) / 0.2
    cost = method.cost(theta, torch.zeros(4, dtype=torch.long)).double()
    torch.testing.assert_close(cost, method.penalty * rise, atol=5e-6, rtol=0.05)


@pytest.mark.parametrize(("penalty", "node_penalty", "node"), [(1e-3, None, 2e-4), (1e-4, None, 5e-5), (0.1, 0.3, 0.3)])
def test_the_cost_of_edges_and_of_their_writers(penalty: float, node_penalty: float | None, node: float) -> None:
    """UGS: slopes are those of the expected number of kept edges and writers, times what each costs."""
    method = UniformGradientSampling(penalty=penalty, node_penalty=node_penalty)
    names = ("embed -> L0.H0.q", "L0.H0 -> out", "embed -> out")
    theta = torch.tensor([0.3, -1.0, 0.8], requires_grad=True)
    p = torch.sigmoid(theta)
    expected = penalty * p.sum() + node * ((1 - (1 - p[0]) * (1 - p[2])) + p[1])
    (slopes,) = torch.autograd.grad(expected, theta)
    torch.testing.assert_close(method.cost(theta.detach(), writers_of(names)), slopes)


LIVE = ("embed", "L0.H1", "L1.H2", "L1.mlp")  # the writers of the planted model


@functools.cache
def planted() -> CircuitEvaluator:
    """Return an evaluator of a model in which all writers but four write nothing."""
    study = study_of(examples=texts(3, 12))
    for number, layer in enumerate(study.model.model.layers):
        for head in range(4):
            if f"L{number}.H{head}" not in LIVE:
                layer.self_attn.o_proj.weight[:, 8 * head : 8 * head + 8] = 0
        if f"L{number}.mlp" not in LIVE:
            layer.mlp.down_proj.weight.zero_()
    return CircuitEvaluator(study, device="cpu")


def lives(name: str) -> bool:
    """Return whether a planted model's edge connects writers that write."""
    writer, reader = name.split(" -> ")
    return writer in LIVE and (reader == "out" or any(one in LIVE for one in fed("llama")[reader]))


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("eap", {}),
        ("eap_ig", {"loss": "kl"}),
        ("eap_ig", {"path": "activations", "steps": 3}),
        ("gradual", {"steps": 30}),
        ("ugs", {"steps": 50, "examples": 2, "masks": 4, "penalty": 0.03}),
        ("hcgs", {"steps": 50, "examples": 2, "masks": 4, "penalty": 0.03}),
        ("random_masks", {"passes": 3, "keep_rate": 0.8}),
        ("random_masks", {"passes": 3, "keep_rate": "drawn", "lowest": 0.6, "loss": "kl"}),
        ("exact", {}),
    ],
)
def test_methods_find_a_planted_circuit(method: str, settings: dict) -> None:
    """Edges with an effect have larger scores than edges of writers that write nothing, in nearly all pairs."""
    evaluator = planted()
    scores = coar.circuit_scores(evaluator.study, method, evaluator=evaluator, progress=False, **settings)
    live = np.array([lives(name) for name in scores.components.names])
    sizes = np.abs(scores.values)
    above = (sizes[live][:, None] > sizes[~live]).mean()
    assert above > 0.9
    assert scores.passes > 0


def test_a_circuit_has_the_best_connected_edges() -> None:
    """They are those on paths of the longest top of the ranking that has at most as many as asked."""
    scores = coar.circuit_scores(shared().evaluator.study, "random", evaluator=shared().evaluator, progress=False)
    order = [scores.components.names[i] for i in scores.ranking()]
    tops = [paths(order[:count], fed("llama")) for count in range(len(order))]
    for edges in (12, 25):
        chosen = coar.circuit(scores, edges=edges, constant_steps=0, progress=False)
        assert set(chosen.edges) == max((top for top in tops if len(top) <= edges), key=len)
    assert max(count for count, top in enumerate(tops) if len(top) <= 12) > 12
    whole = coar.circuit(scores, edges=len(scores.components), constant_steps=0, progress=False)
    assert whole.edges == scores.components.names


def test_trained_constants_and_swaps_lower_the_divergence() -> None:
    """Of the learning examples; each is on top of the other."""
    scores = shared()
    plain, trained, swapped = (
        coar.circuit(scores, edges=30, constant_steps=steps, refinement=rounds, progress=False)
        for steps, rounds in ((0, 0), (60, 0), (60, 4))
    )
    losses = [coar.faithfulness(one, scores.evaluator).kl for one in (plain, trained, swapped)]
    assert losses[0] > 1.2 * losses[1] > 1.2 * losses[2]
    assert len(swapped) <= 30
    assert len(set(trained.edges) & set(swapped.edges)) < len(trained)


def test_a_circuit_starts_from_the_best_constants() -> None:
    """Those of the method at the nearest size, of another circuit or of the ablation: by the divergence they give."""
    scores = shared()
    evaluator, keep = scores.evaluator, torch.from_numpy(np.isin(np.arange(len(scores.values)), scores.ranking()[:30]))
    trained = coar.circuit(scores, edges=30, constant_steps=60, progress=False)
    bad = np.full(scores.components.width, 30, dtype=np.float32)
    near, far = (
        replace(scores, constants={40: own, 2: other}) for own, other in ((trained.constants, bad), (bad,) * 2)
    )
    own = starting_constants(near, keep.float())
    np.testing.assert_array_equal(own.numpy(), trained.constants)
    np.testing.assert_array_equal(near.constants_at(5), bad)
    assert starting_constants(far, keep.float()) is evaluator.constants
    started = starting_constants(far, keep.float(), start=trained)
    np.testing.assert_array_equal(started.numpy(), trained.constants)
    assert scores.constants_at(30) is None


def test_gradual_pruning_trains_constants_for_every_size() -> None:
    """Sizes fall from the largest to the smallest; constants at a size beat those at another there."""
    evaluator = planted()
    settings = {"steps": 40, "largest": 0.9, "smallest": 0.2, "first": 5}
    scores = coar.circuit_scores(evaluator.study, "gradual", evaluator=evaluator, progress=False, **settings)
    sizes = list(scores.constants)
    count = len(scores.values)
    assert (sizes[0], sizes[-1]) == (round(0.9 * count), round(0.2 * count))
    assert sizes == sorted(sizes, reverse=True)
    keep = torch.zeros(count)
    keep[torch.from_numpy(scores.ranking()[: sizes[-1]].copy())] = 1
    last, ablation = (
        evaluator.measure(keep, constants=constants).kl.mean()
        for constants in (torch.from_numpy(scores.constants[sizes[-1]]), evaluator.constants)
    )
    assert last < ablation


def test_a_circuit_runs_as_the_oracle_says(tmp_path) -> None:
    """It is stored with its constants, read again and applied to the model."""
    scores = shared()
    study = scores.evaluator.study
    made = coar.circuit(scores, edges=30, constant_steps=10, progress=False)
    assert repr(made) == f"Circuit(30 of {len(scores.components)} edges by eap, Mean ablation)"
    made.save(tmp_path / "circuit.json")
    read = coar.Circuit.load(tmp_path / "circuit.json")
    assert (read.edges, read.table, read.size, read.method) == (made.edges, "edges", len(scores.components), "eap")
    np.testing.assert_array_equal(read.constants, made.constants)
    kept = {name: float(name in made.edges) for name in scores.components.names}
    with torch.no_grad(), read.applied(study.model):
        logits = study.model(study.examples.inputs["input_ids"]).logits[:, -1]
    for n in (0, 3):
        torch.testing.assert_close(logits[n], last_logits(study, "llama", n, kept, made.constants), atol=1e-4, rtol=0)
    with torch.no_grad():
        assert not torch.allclose(logits, study.model(study.examples.inputs["input_ids"]).logits[:, -1], atol=0.1)


def test_faithfulness_is_that_of_the_oracle() -> None:
    """On held-out examples: the circuit, the model without it, and the ends of the scale."""
    scores = shared()
    held = texts(9, 4)
    made = coar.circuit(scores, edges=40, constant_steps=5, progress=False)
    found = coar.faithfulness(made, scores.evaluator, held)
    study = study_of(examples=held)
    names = study.components.names
    kept = {name: float(name in made.edges) for name in names}
    masks = (kept, {name: 1 - one for name, one in kept.items()}, dict.fromkeys(names, 0.0), {})
    runs = [[last_logits(study, "llama", n, mask, made.constants) for n in range(4)] for mask in masks]
    outputs = [np.mean([difference(study, n, logits) for n, logits in enumerate(run)]) for run in runs]
    kls = [
        np.mean([divergence(study, "llama", n, logits, made.constants) for n, logits in enumerate(run)]) for run in runs
    ]
    assert found.edges == len(made)
    assert (found.kl, found.complement_kl) == pytest.approx((kls[0], kls[1]), abs=1e-4)
    expected = (outputs[0], outputs[1], outputs[2], outputs[3])
    given = (found.output, found.complement_output, found.empty_output, found.full_output)
    assert given == pytest.approx(expected, abs=1e-4)
    assert found.faithfulness == pytest.approx((outputs[0] - outputs[2]) / (outputs[3] - outputs[2]), abs=1e-3)
    assert found.accuracy == np.mean([difference(study, n, logits) > 0 for n, logits in enumerate(runs[0])])


def test_areas_of_a_curve_are_trapezoids() -> None:
    """CPR and CMD by hand; one of the circuits has a larger output than the whole model."""
    scores = shared()
    curve = coar.faithfulness_curve(scores, shares=(0.2, 0.95, 1.0), progress=False)
    f = curve.table["faithfulness"].tolist()
    assert f[0] < 1 < f[1]
    assert f[-1] == pytest.approx(1)
    assert curve.table["kl"].iloc[-1] == pytest.approx(0, abs=1e-6)
    assert curve.cpr == pytest.approx(0.75 * (f[0] + f[1]) / 2 + 0.05 * (f[1] + f[2]) / 2)
    assert curve.cmd == pytest.approx(0.75 * (1 - f[0] + f[1] - 1) / 2 + 0.05 * (f[1] - 1) / 2, abs=1e-6)
    assert curve.table["edges"].tolist() == [round(s * len(scores.components)) for s in (0.2, 0.95, 1.0)]
    with pytest.raises(SettingsError, match="a circuit of 0 edges was requested"):
        coar.faithfulness_curve(scores, shares=(0.0, 1.0), progress=False)


def test_comparison() -> None:
    """Shared edges and nodes, and their shares, counted by hand."""
    made = coar.circuit(shared(), edges=20, constant_steps=0, progress=False)
    facts = {"table": "edges", "size": 99, "weights": "w", "ablation": "Mean", "method": "eap", "constants": None}
    first = coar.Circuit(edges=("embed -> out", "embed -> L0.mlp", "L0.mlp -> out"), **facts)
    second = coar.Circuit(edges=("embed -> out", "embed -> L1.mlp", "L1.mlp -> out"), **facts)
    found = first.compare(second)
    assert found.shared == ("embed -> out",)
    assert found.only_second == ("embed -> L1.mlp", "L1.mlp -> out")
    assert (found.shared_nodes, found.overlap, found.node_overlap) == (("embed",), 1 / 5, 1 / 3)
    assert made.compare(made).overlap == 1
    with pytest.raises(CircuitError, match="compare circuits of one model and one table"):
        made.compare(first)


def test_counterfactual_circuits_take_the_partners_outputs() -> None:
    """Without constants: what an ablated edge carries is what the writer writes for the partner."""
    study = study_of(ablation=coar.Counterfactual())
    scores = coar.circuit_scores(study, "eap", device="cpu", progress=False)
    made = coar.circuit(scores, edges=40, progress=False)
    assert made.constants is None
    found = scores.evaluator.measure(torch.from_numpy(made.mask(study.components)).float())
    kept = {name: float(name in made.edges) for name in study.components.names}
    for n in (0, 4):
        other: dict[tuple[str, int], Tensor] = {}
        ids = study.examples.inputs["input_ids"]
        with torch.no_grad():
            everything = lambda *_: 1.0  # noqa: E731
            partner = ids[(n + COUNT // 2) % COUNT]
            edge_oracle.logits("llama", study.model, partner, everything, lambda *_: torch.zeros(1), written=other)
            logits = edge_oracle.logits(
                "llama",
                study.model,
                ids[n],
                lambda w, r: kept[f"{w} -> {r}"],
                lambda label, t, other=other: other[label, t],
            )
        assert found.output[n] == pytest.approx(difference(study, n, logits[-1]), abs=1e-4)
    with pytest.raises(AblationError, match="takes no constants"):
        scores.evaluator.measure(scores.evaluator.everything(), constants=torch.zeros(study.components.width))
    with pytest.raises(CircuitError, match="judge it with a study of its own ablation"):
        coar.faithfulness(made, shared().evaluator)


def test_partners_of_other_lengths_are_refused() -> None:
    """A partner must have a token wherever the example has one."""
    plain = texts(0)
    mask = torch.ones(COUNT, LENGTH, dtype=torch.long)
    mask[1, :2] = 0
    inputs = {"input_ids": plain.inputs["input_ids"] * mask, "attention_mask": mask}
    examples = coar.Examples(inputs=inputs, targets=plain.targets, metadata=plain.metadata)
    study = study_of(ablation=coar.Counterfactual(), examples=examples)
    with pytest.raises(AblationError, match="give pairs of texts with the same number of tokens"):
        coar.circuit_scores(study, "eap", device="cpu", progress=False)


def test_wrong_requests_are_refused() -> None:
    """More edges than there are, a part of a table, other components, and an output without positions."""
    scores, study = shared(), shared().evaluator.study
    with pytest.raises(SettingsError, match=r"a circuit of 1000 edges was requested; this table has \d+: give"):
        coar.circuit(scores, edges=1000)
    with pytest.raises(CircuitError, match="include no path of at most 1 edges"):
        coar.circuit(coar.circuit_scores(study, "random", seed=3, evaluator=scores.evaluator, progress=False), edges=1)
    part = study_of(find=lambda model: coar.edges(model)[:30])
    with pytest.raises(CircuitError, match="is not the whole table of this model"):
        coar.circuit(coar.circuit_scores(part, "eap", device="cpu", progress=False), edges=10)
    with pytest.raises(ComponentError, match="a circuit consists of edges or nodes, and the first component is the"):
        coar.circuit_scores(study_of(find=coar.attention_heads, ablation=coar.ZeroActivation()))
    blind = coar.Study(
        model=study.model,
        examples=study.examples,
        components=study.components,
        output=coar.CrossEntropy(),
        ablation=study.ablation,
    )
    with pytest.raises(OutputError, match="does not say at which positions it reads next tokens"):
        coar.circuit_scores(blind, "eap", device="cpu", progress=False)


def test_a_circuit_of_another_model_is_refused(tmp_path) -> None:
    """By its weights, its table, and its file."""
    made = coar.circuit(shared(), edges=20, constant_steps=0, progress=False)
    with (
        pytest.raises(CircuitError, match="load the model that the circuit was found in"),
        made.applied(build("llama", 1)),
    ):
        pass
    other = CircuitEvaluator(study_of(find=coar.nodes), device="cpu")
    with pytest.raises(CircuitError, match="judge it with a study of its own table"):
        coar.faithfulness(made, other)
    with pytest.raises(CircuitError, match="of another table of components"):
        made.mask(coar.nodes(build("llama")))
    file = tmp_path / "c.json"
    made.save(file)
    content = json.loads(file.read_text())
    for change in ({"format": 9}, {"edges": []}, {"size": "9"}, {"table": "heads"}, {"constants": "?"}):
        file.write_text(json.dumps(content | change))
        with pytest.raises(CircuitError, match=r"does not hold a circuit|has format 9"):
            coar.Circuit.load(file)
    with pytest.raises(CircuitError, match="does not hold a circuit"):
        coar.Circuit.load(tmp_path / "missing.json")
