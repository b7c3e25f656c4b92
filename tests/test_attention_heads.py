"""Attention heads: which there are, that a slice is a head, and blocks that are not understood."""

from copy import deepcopy

import pytest
import torch
import transformers
from torch import nn

import coar
from coar.ablation import Gates
from coar.components import Component
from coar.errors import ComponentError
from tests import oracles, tiny

SIZE = {"llama": 8}  # of a head, where it is not the width divided by the number of heads


@pytest.mark.parametrize("kind", tiny.MODELS)
def test_heads_are_slices_that_fill_the_projections_input(kind):
    heads = coar.attention_heads(tiny.model(kind))
    size = SIZE.get(kind, tiny.WIDTH // tiny.HEADS)
    assert list(heads) == [
        Component(
            f"{tiny.BLOCK[kind].format(layer)}.head[{i}]",
            "attention head",
            tiny.PROJECTION[kind][1].format(layer),
            "input",
            -1,
            i * size,
            size,
        )
        for layer in range(tiny.LAYERS)
        for i in range(tiny.HEADS)
    ]


def silence(model, kind, layer, head):
    """Zero the weights that make a head's values, so that all it can return is zero."""
    block, size = model.get_submodule(tiny.BLOCK[kind].format(layer)), SIZE.get(kind, tiny.WIDTH // tiny.HEADS)
    rows = slice(head * size, (head + 1) * size)
    with torch.no_grad():
        if kind == "gpt2":
            rows = slice(2 * tiny.WIDTH + rows.start, 2 * tiny.WIDTH + rows.stop)  # after queries and keys
            block.c_attn.weight[:, rows], block.c_attn.bias[rows] = 0, 0
            return
        values = block.value if kind == "bert" else block.v_proj
        values.weight[rows] = 0
        if values.bias is not None:
            values.bias[rows] = 0


@pytest.mark.parametrize("through_outputs", [False, True])
@pytest.mark.parametrize("kind", tiny.MODELS)
def test_ablating_a_head_silences_its_values(kind, through_outputs):
    model, x = tiny.model(kind), tiny.inputs(kind)
    heads = coar.attention_heads(model)
    shared = 2 if kind == "llama" else 1  # query heads to one head of values
    zero = coar.ZeroWeight().replacements(model, heads, batch_size=8)
    for layer, head in ((0, 1), (1, 0)):
        keep = torch.ones(len(heads), dtype=torch.bool)
        first = layer * tiny.HEADS + head * shared
        keep[first : first + shared] = False
        silent = deepcopy(model)
        silence(silent, kind, layer, head)
        with Gates(model, heads, zero, through_outputs=through_outputs) as gates, torch.no_grad():
            gates.set(keep)
            y = model(x)
        expected = oracles.forward(silent, x)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
        assert (expected - oracles.forward(model, x)).abs().max() > 0.01


def test_patterns_choose_blocks_by_name():
    model = tiny.model("gpt2")
    names = coar.attention_heads(model, include="body.h.1.*").names
    assert names == tuple(f"body.h.1.attn.head[{i}]" for i in range(tiny.HEADS))
    assert coar.attention_heads(model, exclude="*.0.attn").names == names
    assert len(coar.attention_heads(model.body.h[0].attn)) == tiny.HEADS  # the model may be a block itself
    with pytest.raises(ComponentError, match="'mlp' matches no attention block"):
        coar.attention_heads(model, include="mlp")
    with pytest.raises(ComponentError, match="Linear has no attention block"):
        coar.attention_heads(nn.Linear(2, 2))


class OwnAttention(nn.Module):
    """A block of a user's own: attributes and linear layers as given."""

    def __init__(self, attributes, **layers):
        super().__init__()
        vars(self).update(attributes)
        for name, width in layers.items():
            setattr(self, name, nn.Linear(width, 6))


@pytest.mark.parametrize(
    ("attributes", "count"),
    [
        ({"num_heads": 4}, 4),
        ({"n_heads": 2, "head_dim": 6}, 2),
        ({"head_dim": 3}, 4),
        ({"config": transformers.GPT2Config(n_head=6)}, 6),
        ({"num_heads": 3, "config": transformers.GPT2Config(n_head=6)}, 3),
    ],
)
def test_a_block_of_ones_own_is_understood_by_its_roles(attributes, count):
    heads = coar.attention_heads(nn.ModuleDict({"mixer": OwnAttention(attributes, o_proj=12, q_proj=8)}))
    assert heads.names == tuple(f"mixer.head[{i}]" for i in range(count))
    assert {row.size for row in heads} == {12 // count}


def test_a_part_without_parameters_is_no_block_whatever_its_name():
    block = OwnAttention({"num_heads": 4}, o_proj=12)
    block.core = type("CoreAttention", (nn.Identity,), {})()
    assert coar.attention_heads(block).names == tuple(f"head[{i}]" for i in range(4))


@pytest.mark.parametrize(
    ("attributes", "layers", "seen"),
    [
        ({"num_heads": 5}, {"o_proj": 12}, ["'num_heads': 5", "'mixer.o_proj': 12"]),
        ({"num_heads": 4, "head_dim": 2}, {"o_proj": 12}, ["'head_dim': 2"]),
        ({"head_dim": 5}, {"o_proj": 12}, ["'head_dim': 5"]),
        ({"num_heads": [4, 4]}, {"o_proj": 12}, ["[4, 4]"]),
        ({}, {"o_proj": 12}, ["it says {}", "OwnAttention of o_proj (Linear)", "ModuleDict of mixer (OwnAttention)"]),
        ({"num_heads": 4}, {"o_proj": 12, "out_proj": 12}, ["'mixer.o_proj': 12, 'mixer.out_proj': 12"]),
        ({"num_heads": 4}, {"mix": 12}, ["mix (Linear)", "and {} are layers"]),
    ],
)
def test_a_block_that_is_not_understood_is_an_error_that_says_what_was_seen(attributes, layers, seen):
    model = nn.ModuleDict({"mixer": OwnAttention(attributes, **layers)})
    with pytest.raises(ComponentError, match="heads of 'mixer' cannot be told") as raised:
        coar.attention_heads(model)
    assert [part for part in seen if part not in str(raised.value)] == []


def test_architectures_that_are_not_understood_are_errors():
    small = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    convbert = transformers.ConvBertModel(transformers.ConvBertConfig(**small, vocab_size=20, embedding_size=24))
    with pytest.raises(ComponentError, match=r"ConvBertSelfAttention .* ConvBertAttention"):
        coar.attention_heads(convbert)  # half of what its projection reads is no head's
    config = transformers.XLNetConfig(d_model=24, n_layer=1, n_head=4, d_inner=32, vocab_size=20)
    with pytest.raises(ComponentError, match="XLNetRelativeAttention"):
        coar.attention_heads(transformers.XLNetModel(config))  # its projection is a bare parameter


def test_torchs_own_attention_is_an_error_that_offers_slices_which_zero_its_heads():
    layer = oracles.rough(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    with pytest.raises(
        ComponentError, match=r"'self_attn' is torch's .*\n?.*'self_attn.out_proj.weight', axis=1, size=4"
    ):
        coar.attention_heads(layer)
    slices = coar.parameter_slices(layer, "self_attn.out_proj.weight", axis=1, size=4)
    silent = deepcopy(layer)
    with torch.no_grad():
        silent.self_attn.in_proj_weight[16:20] = 0  # the first head's values
        silent.self_attn.in_proj_bias[16:20] = 0
        x = torch.randn(3, 5, 8)
        with Gates(layer, slices, torch.zeros(2)) as gates:
            gates.set(torch.tensor([False, True]))
            torch.testing.assert_close(layer(x), silent(x), rtol=0, atol=1e-5)


def test_blocks_left_out_need_not_be_understood():
    config = transformers.SiglipVisionConfig(**{**tiny.IMAGE, "num_hidden_layers": 1})
    model = transformers.SiglipVisionModel(config)  # it pools with torch's own attention
    with pytest.raises(ComponentError, match=r"head\.attention"):
        coar.attention_heads(model)
    assert len(coar.attention_heads(model, exclude="*head.attention")) == tiny.HEADS
