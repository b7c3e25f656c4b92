"""Ground truth: two programs that tracr compiled into transformers, whose circuits a search without the engine finds.

The weights are those of tests/tracr/compile.py. The search runs its own forward pass, in NumPy, on all texts of one
length. A circuit depends on the ablation, since a replacement may already be what a program needs.
"""

import itertools
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import coar
from coar.errors import ComponentError
from coar.gates.gates import Gates

FOLDER = Path(__file__).parent / "tracr"
LETTERS = 4  # of a text, after its first token
RESULTS = {"reverse": "reverse_", "xproportion": "frac_prevs_"}  # first letters of the features that are the result
ABLATIONS = ("zero", "mean", "resample")
EDGES = {"reverse": 77, "xproportion": 23}
Writes = dict[str, np.ndarray]  # (texts, positions, width) or (width,) by writer


@cache
def weights(program: str) -> tuple[dict[str, np.ndarray], list[str], dict[str, int]]:
    """Return a program's weights, the names of the stream's features, and the numbers of its tokens."""
    with safe_open(FOLDER / f"{program}.safetensors", "numpy") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["labels"]), json.loads(file.metadata()["tokens"])


@cache
def texts(program: str) -> np.ndarray:
    """Return (texts, positions) tokens: all texts of one length."""
    tokens = weights(program)[2]
    letters = [number for token, number in tokens.items() if token not in ("BOS", "compiler_pad")]
    return np.array([(tokens["BOS"], *text) for text in itertools.product(letters, repeat=LETTERS)])


def partners(program: str) -> np.ndarray:
    """Return the text whose activations replace those of each text: another one, drawn once."""
    order = np.random.default_rng(0).permutation(len(texts(program)))
    found = np.empty_like(order)
    found[order] = np.roll(order, 1)
    return found


def passed(
    program: str, kept: Callable[[str, str], bool], replaced: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, Writes]:
    """Return the (texts, positions, results) of all texts under a circuit, and what every writer wrote."""
    tensors, labels, _ = weights(program)
    tensors = {key: value.astype(np.float64) for key, value in tensors.items()}
    ids = texts(program)
    written: Writes = {
        "embed": tensors["token_embed.embeddings"][ids] + tensors["pos_embed.embeddings"][: ids.shape[1]]
    }
    bias = np.zeros(len(labels))

    def take(reader: str) -> np.ndarray:
        total = np.zeros_like(written["embed"]) + bias
        for writer, value in written.items():
            own = value.copy() if kept(writer, reader) else np.broadcast_to(replaced[writer], value.shape).copy()
            own[:, 0] = value[:, 0]
            total += own
        return total

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ tensors[f"{name}.w"] + tensors[f"{name}.b"]

    for number in itertools.count():
        layer = f"layer_{number}"
        if f"{layer}.attn.query.w" not in tensors:
            break
        q, k, v = (
            linear(f"{layer}.attn.{name}", take(f"L{number}.H0.{name[0]}")) for name in ("query", "key", "value")
        )
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        z = shares / shares.sum(-1, keepdims=True) @ v
        written[f"L{number}.H0"] = z @ tensors[f"{layer}.attn.linear.w"]
        bias = bias + tensors[f"{layer}.attn.linear.b"]
        hidden = np.maximum(linear(f"{layer}.mlp.linear_1", take(f"L{number}.mlp")), 0)
        written[f"L{number}.mlp"] = linear(f"{layer}.mlp.linear_2", hidden)
    results = [number for number, label in enumerate(labels) if label.startswith(RESULTS[program])]
    return take("out")[..., results], written


@cache
def unablated(program: str) -> tuple[np.ndarray, Writes]:
    """Return the results and writes of the program itself."""
    return passed(program, lambda *_: True, {})


def replacements(program: str, ablation: str) -> Writes:
    """Return what replaces every writer's output."""
    _, written = unablated(program)
    if ablation == "zero":
        return {name: np.zeros(value.shape[-1]) for name, value in written.items()}
    if ablation == "mean":
        return {name: value[:, 1:].mean((0, 1)) for name, value in written.items()}
    return {name: value[partners(program)] for name, value in written.items()}


def changes(program: str, kept: Callable[[str, str], bool], replaced: Mapping[str, np.ndarray]) -> bool:
    """Return whether a circuit gives another result than the program for some text."""
    found, _ = passed(program, kept, replaced)
    size = np.abs(found - unablated(program)[0])[:, 1:].max()
    assert size < 1e-5 or size > 0.1  # results are 0, 1 or shares, so nothing lies between
    return bool(size > 0.1)


@cache
def needed(program: str, ablation: str) -> tuple[str, ...]:
    """Return the edges of the true circuit: every one of which the program needs, while all others are kept."""
    replaced, pairs = replacements(program, ablation), list[tuple[str, str]]()
    passed(program, lambda writer, reader: pairs.append((writer, reader)) is None, {})
    found = [pair for pair in pairs if changes(program, lambda *other, pair=pair: other != pair, replaced)]
    assert not changes(program, lambda *pair: pair in found, replaced)  # they suffice
    return tuple(f"{writer} -> {reader}" for writer, reader in found)


def spare(program: str, ablation: str) -> list[str]:
    """Return the edges that the true circuit can do without, while its others are kept and all else is ablated."""
    replaced, truth = replacements(program, ablation), needed(program, ablation)
    return [
        edge
        for edge in truth
        if not changes(program, lambda *pair, edge=edge: " -> ".join(pair) in set(truth) - {edge}, replaced)
    ]


class Attention(nn.Module):
    """Attention of one head in both directions."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.num_heads = 1
        self.query, self.key, self.value = (nn.Linear(width, size) for _ in range(3))
        self.out_proj = nn.Linear(size, width)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).transpose(1, 2) / self.query.out_features**0.5
        mixed: Tensor = self.out_proj(scores.softmax(-1) @ self.value(x))
        return mixed


class Layer(nn.Module):
    """Attention and an MLP, without norms."""

    def __init__(self, width: int, size: int, hidden: int) -> None:
        super().__init__()
        self.attn = Attention(width, size)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


class Compiled(nn.Module):
    """A compiled program as a transformer of PyTorch, with its weights."""

    def __init__(self, program: str) -> None:
        super().__init__()
        tensors, labels, _ = weights(program)
        of = {key: torch.from_numpy(value) for key, value in tensors.items()}
        self.tokens = nn.Embedding.from_pretrained(of["token_embed.embeddings"])
        self.positions = nn.Embedding.from_pretrained(of["pos_embed.embeddings"])
        count = sum(key.endswith("query.w") for key in of)
        size, hidden = of["layer_0.attn.query.w"].shape[1], of["layer_0.mlp.linear_1.w"].shape[1]
        self.layers = nn.ModuleList(Layer(len(labels), size, hidden) for _ in range(count))
        for number, layer in enumerate(self.layers):
            attn = layer.attn
            own = {"query": attn.query, "key": attn.key, "value": attn.value, "linear": attn.out_proj}
            parts = {f"attn.{name}": linear for name, linear in own.items()}
            parts |= {"mlp.linear_1": layer.mlp[0], "mlp.linear_2": layer.mlp[2]}
            for name, linear in parts.items():
                linear.weight.data = of[f"layer_{number}.{name}.w"].T.contiguous()
                linear.bias.data = of[f"layer_{number}.{name}.b"]
        results = [number for number, label in enumerate(labels) if label.startswith(RESULTS[program])]
        self.head = nn.Linear(len(labels), len(results), bias=False)
        self.head.weight.data = torch.eye(len(labels))[results]

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.positions.weight[: input_ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        results: Tensor = self.head(x)
        return results


def compiled(program: str) -> nn.Module:
    """Return a program as a model without gradients to weights."""
    return Compiled(program).eval().requires_grad_(False)


@pytest.mark.parametrize("program", RESULTS)
def test_models_compute_their_programs(program: str) -> None:
    """The search's own pass and the model give the reversed text, and the share of the letter x."""
    ids, names = texts(program), {number: token for token, number in weights(program)[2].items()}
    found, _ = unablated(program)
    for text, result in zip(ids, found, strict=True):
        letters = [names[number] for number in text[1:]]
        if program == "reverse":
            assert ["abc"[i] for i in result[1:].argmax(-1)] == letters[::-1]
        else:
            shares = [letters[: i + 1].count("x") / (i + 1) for i in range(LETTERS)]
            np.testing.assert_allclose(result[1:, 0], shares, atol=1e-6)
    np.testing.assert_allclose(compiled(program)(torch.from_numpy(ids)).numpy(), found, atol=1e-5)


@pytest.mark.parametrize("program", RESULTS)
def test_edges_of_attention_in_both_directions(program: str) -> None:
    """Such a model is taken only if asked for, and then with the edges of its definition."""
    model, pairs = compiled(program), list[str]()
    passed(program, lambda writer, reader: pairs.append(f"{writer} -> {reader}") is None, {})
    assert set(coar.edges(model, causal=False).names) == set(pairs)
    assert len(pairs) == EDGES[program]
    assert coar.nodes(model, causal=False).names[:3] == ("embed", "L0.H0", "L0.mlp")
    for finder in (coar.edges, coar.nodes):
        with pytest.raises(ComponentError, match=r"see later ones.*causal=False"):
            finder(model)


def test_true_circuits_depend_on_the_ablation() -> None:
    """The search finds the known circuits of *xproportion*, and three of *reverse*."""
    sizes = {(program, ablation): len(needed(program, ablation)) for program in RESULTS for ablation in ABLATIONS}
    assert [sizes["xproportion", ablation] for ablation in ABLATIONS] == [5, 5, 3]
    assert [sizes["reverse", ablation] for ablation in ABLATIONS] == [10, 6, 2]
    # without the length's only use, what the length is computed from does not matter
    assert {key: spare(*key) for key in sizes if spare(*key)} == {("reverse", "zero"): ["embed -> L0.H0.k"]}


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("program", RESULTS)
def test_exact_patching_finds_the_true_circuit(program: str, ablation: str) -> None:
    """Gates that leave one edge out find the circuit of the search, which alone gives the model's results."""
    model, ids = compiled(program), torch.from_numpy(texts(program))
    edges, truth = coar.edges(model, causal=False), needed(program, ablation)
    written, resample = replacements(program, ablation), ablation == "resample"
    labels = coar.nodes(model, causal=False).names
    constants = torch.zeros(edges.width)
    if not resample:
        constants = torch.from_numpy(np.concatenate([written[label] for label in labels])).float()
    with torch.no_grad(), Gates(model, edges, constants, use_hooks=True, resample=resample) as gates:
        if resample:
            gates.record(lambda: model(ids[torch.from_numpy(partners(program))]))
        gates.set(torch.ones(len(edges)))
        full, found = model(ids), []
        for number, name in enumerate(edges.names):
            mask = torch.ones(len(edges))
            mask[number] = 0
            gates.set(mask)
            if (model(ids) - full)[:, 1:].abs().max() > 1e-3:
                found.append(name)
        assert set(found) == set(truth)
        gates.set(torch.tensor([name in truth for name in edges.names]))
        assert (model(ids) - full)[:, 1:].abs().max() < 1e-4


class Mixture(coar.Output):
    """The sum of all results after the first token, each times a number of its own: the targets."""

    def __call__(self, result: Tensor, targets: Tensor) -> Tensor:
        return (result[:, 1:] * targets).sum((1, 2))


def area(scores: np.ndarray, truth: np.ndarray) -> float:
    """Return how often an edge of the circuit has a larger score than another edge; half if they are equal."""
    inside, outside = scores[truth][:, None], scores[~truth]
    return float(((inside > outside) + (inside == outside) / 2).mean())


@pytest.mark.parametrize(
    ("program", "ablation"),
    [
        ("reverse", "zero"),
        *[pytest.param(*rest, marks=pytest.mark.slow) for rest in itertools.product(RESULTS, ABLATIONS[::2])][1:],
    ],
)
def test_scores_rank_the_true_circuit_first(program: str, ablation: str, tmp_path: Path) -> None:
    """Exact patching and ridge put all its edges first; gradients at the full model miss some that zeros disable."""
    model, ids = compiled(program), torch.from_numpy(texts(program))
    factors = torch.randn(len(ids), LETTERS, model(ids[:1]).shape[-1], generator=torch.Generator().manual_seed(0))
    study = coar.Study(
        model=model,
        examples=coar.Examples(inputs=ids, targets=factors),
        components=coar.edges(model, causal=False),
        output=Mixture(),
        ablation=coar.ZeroActivation() if ablation == "zero" else coar.Resample(),
        sampler=coar.BernoulliSampler(ablated_fraction=0.05),
    )
    run = coar.collect(study, tmp_path / "run.zarr", masks=200, gradients=32, device="cpu", progress=False)
    fits = {
        "leave-one-out": coar.leave_one_out(study, run, device="cpu", progress=False),
        "mask gradient": coar.mask_gradient(study, run, device="cpu", progress=False),
        "ridge": coar.fit(run, method="ridge", progress=False),
        "informed": coar.fit(run, method="informed", progress=False),
    }
    truth = np.isin(study.components.names, needed(program, ablation))
    areas = {name: area(np.abs(fit.weights()).mean(0), truth) for name, fit in fits.items()}
    areas["gradients under masks"] = area(np.abs(run.array("gradient_kept")[:]).mean((0, 1)), truth)
    assert areas["leave-one-out"] == areas["ridge"] == 1
    least = {"mask gradient": 0.94, "gradients under masks": 0.94, "informed": 0.99}
    for name, bar in least.items():
        assert areas[name] >= (bar if (program, ablation) == ("reverse", "zero") else 1)
