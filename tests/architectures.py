"""Architectures, kinds of components and ablations: what each cell gives, beside hooks and copies made by hand."""

import math
from copy import deepcopy
from dataclasses import dataclass

import torch
import transformers
from torch import nn
from torchvision.models import resnet18
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

import coar
from coar.components.table import Components
from coar.errors import CoarError
from coar.gates.gates import Gates
from tests import oracles, tiny

ABLATIONS = ("zero", "zero_activation", "mean", "position_mean", "peak", "optimal", "resample")
ROWS, HEADS = 4, 2
NOT_MEANT = {  # what an ablation has no meaning for, and why
    ("module", "zero"): "a module's weights and biases are many layers'",
    ("expert", "resample"): "other examples' tokens are sent to other experts",
    ("expert", "position_mean"): "tokens are sent to experts without their positions",
    ("torchvision ResNet", "position_mean"): "pictures are no sequences",
    ("torchvision Swin", "position_mean"): "windows of pictures are no sequences",
}


class Encoder(nn.Module):
    """Torch's own encoder, whose fused path calls no module inside."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, HEADS, 16, batch_first=True, dropout=0.0)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.body(x).mean(1)


class Logits(nn.Module):
    """A language model's logits at the last position."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x).logits[:, -1]


def mixture(config, **settings):
    shape = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    shape |= {"intermediate_size": 16, "vocab_size": tiny.WORDS, "num_experts_per_tok": 2}
    model = transformers.AutoModelForCausalLM.from_config(config(**shape, **settings), attn_implementation="eager")
    return Logits(model)


def lively(model):
    """Weights that keep signals alive, and biases and norms of which none is 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                drawn = torch.randn(parameter.shape, generator=generator)
                fan = parameter[0].numel() if parameter.ndim != 3 else parameter.shape[-1]
                parameter.copy_(drawn * 1.3 / math.sqrt(fan))
    return oracles.rough(model).requires_grad_(False)


@dataclass(frozen=True)
class Architecture:
    """How to make a small model, its inputs, and the components of each kind."""

    make: object
    inputs: object
    kinds: dict


def random(*shape):
    return lambda seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def words(rows=ROWS):
    return lambda seed: torch.randint(tiny.WORDS, (rows, tiny.TOKENS), generator=torch.Generator().manual_seed(seed))


def of_tiny(kind, first):
    """A transformer of tests/tiny.py; `first` is the pattern of its feed-forward block's first layer."""
    feed, block = tiny.PROJECTION[kind][0], tiny.BLOCK[kind].format("*")
    return Architecture(
        lambda: tiny.model(kind).requires_grad_(False),
        lambda seed: tiny.inputs(kind, rows=ROWS, seed=seed),
        {
            "neuron": lambda model: coar.neurons(model, include=first),
            "input feature": lambda model: coar.input_features(model, include=feed.format("[0-9]")),
            "attention head": coar.attention_heads,
            "module": lambda model: coar.modules(model, block),
        },
    )


def of_blocks(make, inputs, first, second, blocks):
    """A model whose attention reads its projection without calling it."""
    return Architecture(
        lambda: lively(make()),
        inputs,
        {
            "neuron": lambda model: coar.neurons(model, include=first),
            "input feature": lambda model: coar.input_features(model, include=second),
            "attention head": coar.attention_heads,
            "module": lambda model: coar.modules(model, blocks),
        },
    )


def of_mixture(make):
    return Architecture(
        lambda: lively(make()),
        words(),
        {"expert": coar.experts, "attention head": coar.attention_heads},
    )


ARCHITECTURES = {
    "torchvision ResNet": Architecture(
        lambda: lively(resnet18(num_classes=6)),
        random(ROWS, 3, 32, 32),
        {
            "conv filter": coar.conv_filters,
            "neuron": coar.neurons,
            "input feature": coar.input_features,
            "module": lambda model: coar.modules(model, ["layer?.1.conv2", "layer?.0.downsample"]),
        },
    ),
    "torch TransformerEncoder": of_blocks(
        Encoder, random(ROWS, 5, 12), "*.linear1", "*.linear2", ["*.self_attn", "*.linear2"]
    ),
    "torchvision ViT": of_blocks(
        lambda: VisionTransformer(16, 8, 2, HEADS, 12, 16, num_classes=6),
        random(ROWS, 3, 16, 16),
        "*.mlp.0",
        "*.mlp.3",
        "*.self_attention",
    ),
    "torchvision Swin": of_blocks(
        lambda: SwinTransformer([2, 2], 8, [2, 2], [2, 4], [3, 3], num_classes=6, stochastic_depth_prob=0.0),
        random(ROWS, 3, 16, 16),
        "*.mlp.0",
        "*.mlp.3",
        "*.attn",
    ),
    "BERT": of_tiny("bert", "*.intermediate.dense"),
    "GPT-2": of_tiny("gpt2", "*.mlp.c_fc"),
    "Llama": of_tiny("llama", "*.mlp.up_proj"),
    "ViT": of_tiny("vit", "*.fc1"),
    "CLIP": of_tiny("clip", "*.fc1"),
    "Mixtral": of_mixture(lambda: mixture(transformers.MixtralConfig, num_local_experts=4)),
    "GPT-OSS": of_mixture(
        lambda: mixture(transformers.GptOssConfig, num_local_experts=4, head_dim=6, sliding_window=4, swiglu_limit=7.0)
    ),
    "Qwen MoE": of_mixture(
        lambda: mixture(
            transformers.Qwen2MoeConfig, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16
        )
    ),
}
CELLS = [(name, kind, label) for name, of in ARCHITECTURES.items() for kind in of.kinds for label in ABLATIONS]


def reason(name, kind, label):
    """Why an ablation of a kind of component has no meaning in an architecture; None where it has."""
    return NOT_MEANT.get((kind, label)) or NOT_MEANT.get((name, label))


def some(components, count=12):
    """Components of every part of the model."""
    step = max(1, len(components) // count)
    return Components(components[i] for i in range(step // 2, len(components), step))


def ablation_of(label, inputs):
    calibration = coar.Examples(inputs=inputs(9), targets=torch.arange(ROWS) % 4)
    if label == "optimal":
        return coar.Optimal(calibration=calibration, steps=10, ablated_fraction=0.5)
    return coar.choose_ablation(label, calibration=calibration)


def constants_of(model, components, label, given, calibration):
    """The constants of every component, by its name, as an oracle has them; `given` is read for trained ones only."""
    places = {(row.site, row.side) for row in components if row.side != "expert"}
    blind = {row.site: block_of(model, row) for row in components if block_of(model, row)}
    seen = oracles.held(model, calibration, [place for place in places if place[0] not in blind])
    seen |= {(site, "input"): oracles.heads_of(model, block, calibration) for site, block in blind.items()}
    mixtures = {row.site for row in components if row.side == "expert"}
    sent = {site: oracles.experts_returned(model, site, calibration) for site in mixtures}
    trained = iter(given.tolist()) if label == "optimal" else None
    found = {}
    for row in components:
        if label in ("mean", "peak"):
            if row.side == "expert":
                values = sent[row.site][row.position // row.size].T.tolist()
            else:
                channels = slice(row.position, row.position + row.size)
                passed = [t.movedim(row.axis, 0)[channels] for t in seen[row.site, row.side]]
                values = torch.cat([t.flatten(1) for t in passed], dim=1).tolist()
            own = [sum(part) / len(part) if label == "mean" else oracles.peak(part, 128) for part in values]
        elif label == "position_mean":
            (passed,) = seen[row.site, row.side]
            own = [
                [
                    sum(text[at].tolist()[n] for text in passed) / len(passed)
                    for n in range(row.position, row.position + row.size)
                ]
                for at in range(passed.shape[1])
            ]
        elif label == "optimal":
            own = [next(trained) for _ in range(row.size)]
        else:
            site = model.get_submodule(row.site)
            own = [0.0] * row.size
            if label == "zero" and row.side == "output" and site.bias is not None:
                own = [float(site.bias[row.position])]
            if label == "zero" and row.side == "expert":
                own = last_bias(model, row)
        found[row.name] = own
    return found


def numbered(count):
    """As many examples, of which only the number matters."""
    return coar.Examples(inputs=torch.zeros(count), targets=torch.zeros(count))


def truth(model, x, components, masks, label, given, calibration):
    """(rows, ...) what the oracle returns, row i under mask i; `given` constants are read for trained ones only."""
    known = constants_of(model, components, label, given, calibration) if label != "resample" else {}
    sources = coar.Resample().sources(numbered(len(x))) if label == "resample" else None
    seen = {(row.site, row.side) for row in components if row.side != "expert" and not block_of(model, row)}
    found = []
    for n, mask in enumerate(masks):
        chosen = [row for row, kept in zip(components, mask, strict=True) if not kept]
        source = None if sources is None else x[sources[n] : sources[n] + 1]
        held = {} if source is None else oracles.held(model, source, seen)
        patches = [
            (
                row.site,
                row.side,
                None if row.side == "module" and held else row.axis,
                row.position,
                row.position + row.size,
                held[row.site, row.side] if held else torch.tensor(known[row.name]),
            )
            for row in chosen
            if (row.site, row.side) in seen
        ]
        net = without_heads(model, [row for row in chosen if block_of(model, row)], source, known)
        net = without_experts(net, [row for row in chosen if row.side == "expert"], known)
        found.append(oracles.patched(net, x[n : n + 1], patches)[0])
    return torch.stack(found)


def block_of(model, row):
    """The path of the attention block whose projection is read without a call, if the component is its head."""
    parent = row.site.rpartition(".")[0]
    names = (
        {kind.__name__ for kind in type(model.get_submodule(parent)).__mro__} if row.kind == "attention head" else set()
    )
    return parent if names & {"MultiheadAttention", "ShiftedWindowAttention"} else None


def without_heads(model, rows, source, known):
    """A copy in which some heads are constants, or those of a resample source."""
    by_block = {}
    for row in rows:
        by_block.setdefault(block_of(model, row), []).append(row)
    net = deepcopy(model)
    for path, heads in by_block.items():
        features = [n for row in heads for n in range(row.position, row.position + row.size)]
        constants = torch.cat([torch.tensor(known[row.name]) for row in heads], dim=-1) if known else None
        oracles.swap_heads(net, path, features, source, constants)
    return net


def last_bias(model, row):
    """The bias of an expert's last projection, or zeros."""
    bias = getattr(model.get_submodule(row.site), "down_proj_bias", None)
    return [0.0] * row.size if bias is None else bias[row.position // row.size].tolist()


def without_experts(model, rows, known=None):
    """A copy in which some experts return constants, or nothing."""
    by_site = {}
    for row in rows:
        constants = by_site.setdefault(row.site, {})
        constants[row.position // row.size] = known[row.name] if known else [0.0] * row.size
    net = deepcopy(model) if rows else model
    for path, constants in by_site.items():
        oracles.with_module(net, path, lambda inner, constants=constants: oracles.PlainExperts(inner, constants))
    return net


def cell(name, kind, label):
    """The largest error of an output in a cell, by weights or by hooks, and the largest effect; or the refusal."""
    architecture = ARCHITECTURES[name]
    model, x = architecture.make(), architecture.inputs(1)
    components = some(architecture.kinds[kind](model))
    ablation = ablation_of(label, architecture.inputs)
    masks = torch.rand(ROWS, len(components), generator=torch.Generator().manual_seed(3)) < 0.5
    try:
        constants = ablation.replacements(model, components, batch_size=ROWS)
    except CoarError as error:
        return str(error)
    expected = truth(model, x, components, masks, label, constants, architecture.inputs(9))
    effect = float((expected - oracles.forward(model, x)).abs().max())
    sources = ablation.sources(numbered(ROWS))
    errors = []
    for hooks in (False, True):
        if sources is not None and not hooks:
            continue
        gates = Gates(model, components, constants, use_hooks=hooks, resample=sources is not None)
        with gates, torch.no_grad():
            if sources is not None:
                gates.record(lambda: model(x[sources]))
            if hooks:
                gates.set(masks)
                y = model(x)
            else:
                y = torch.stack([(gates.set(mask), model(x)[n])[1] for n, mask in enumerate(masks)])
            gates.confirm()
        errors.append(float((y - expected).abs().max()))
    return max(errors), effect
