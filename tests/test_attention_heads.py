"""Attention heads: which there are, that a slice is a head, and blocks that are not understood."""

from copy import deepcopy

import peft
import pytest
import timm
import torch
import torchvision
import transformers
import vit_pytorch
from diffusers.models.attention_processor import Attention as DiffusersAttention
from torch import nn

import coar
from coar.components.table import Component
from coar.errors import ComponentError
from coar.gates.gates import Gates
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


@pytest.mark.parametrize("use_hooks", [False, True])
@pytest.mark.parametrize("kind", tiny.MODELS)
def test_ablating_a_head_silences_its_values(kind, use_hooks):
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
        with Gates(model, heads, zero, use_hooks=use_hooks) as gates, torch.no_grad():
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
        (
            {},
            {"o_proj": 12},
            ["attributes are {}", "OwnAttention of o_proj (Linear)", "ModuleDict of mixer (OwnAttention)"],
        ),
        ({"num_heads": 4}, {"o_proj": 12, "out_proj": 12}, ["'mixer.o_proj': 12, 'mixer.out_proj': 12"]),
        ({"num_heads": 4}, {"mix": 12}, ["mix (Linear)", "have inputs {}"]),
    ],
)
def test_a_block_that_is_not_understood_is_an_error_that_says_what_was_seen(attributes, layers, seen):
    model = nn.ModuleDict({"mixer": OwnAttention(attributes, **layers)})
    with pytest.raises(ComponentError, match="cannot determine the heads of 'mixer'") as raised:
        coar.attention_heads(model)
    assert [part for part in seen if part not in str(raised.value)] == []


FAMILIES = {  # blocks whose projection is in a sequence, or whose name does not say attention; layer and row of values
    "vit_pytorch": (lambda: vit_pytorch.vit.Attention(16, heads=2, dim_head=8), "to_qkv", 32),
    "diffusers": (lambda: DiffusersAttention(16, heads=2, dim_head=8), "to_v", 0),
    "maxvit": (lambda: torchvision.models.maxvit.RelativePositionalMultiHeadAttention(16, 8, 4), "to_qkv", 32),
    "cross-covariance": (lambda: timm.models.xcit.XCA(16, num_heads=2), "qkv", 32),
    "convit": (lambda: timm.models.convit.MHSA(16, num_heads=2), "qkv", 32),
    "gated positions": (lambda: timm.models.convit.GPSA(16, num_heads=2), "v", 0),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_heads_of_other_families_are_their_values(name):
    make, layer, start = FAMILIES[name]
    model = oracles.rough(make().eval()).requires_grad_(False)
    x = torch.randn(2, 3, 4, 16) if name == "maxvit" else torch.randn(2, 4, 16)
    heads = coar.attention_heads(model)
    for head in (0, 1):
        silent = deepcopy(model)
        for values in silent.get_submodule(layer).parameters():
            values[start + 8 * head : start + 8 * head + 8] = 0
        with Gates(model, heads, torch.zeros(heads.width), use_hooks=True) as gates, torch.no_grad():
            gates.set(torch.arange(2) != head)
            y = model(x)
        torch.testing.assert_close(y, oracles.forward(silent, x), rtol=0, atol=1e-5)
        assert (y - oracles.forward(model, x)).abs().max() > 0.01


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # of peft's call
def test_an_adapter_around_the_projection_must_be_merged():
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2))
    settings = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(plain, peft.LoraConfig(**settings))
    with pytest.raises(
        ComponentError, match=r"peft\.tuners\.lora\.layer\.Linear, wraps .* 'o_proj'; merge .*merge_and_unload"
    ):
        coar.attention_heads(model)
    assert len(coar.attention_heads(model.merge_and_unload())) == 2


def test_two_output_projections_and_alternating_heads_are_errors():
    joint = DiffusersAttention(16, heads=2, dim_head=8, added_kv_proj_dim=8, context_pre_only=False)
    with pytest.raises(ComponentError, match=r"'to_out\.0': 16, 'to_add_out': 16"):
        coar.attention_heads(joint)
    with pytest.raises(ComponentError, match=r"timm\.models\.nest\.Attention, alternate"):
        coar.attention_heads(timm.models.nest.Attention(16, num_heads=2))


def test_architectures_that_are_not_understood_are_errors():
    small = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    convbert = transformers.ConvBertModel(transformers.ConvBertConfig(**small, vocab_size=20, embedding_size=24))
    with pytest.raises(ComponentError, match=r"ConvBertSelfAttention .* ConvBertAttention"):
        coar.attention_heads(convbert)  # half of what its projection reads is no head's
    config = transformers.XLNetConfig(d_model=24, n_layer=1, n_head=4, d_inner=32, vocab_size=20)
    with pytest.raises(ComponentError, match="XLNetRelativeAttention"):
        coar.attention_heads(transformers.XLNetModel(config))  # its projection is a bare parameter


ATTENTION = {  # torch's own attention in every form that it can be given
    "fused": {"batch_first": True},
    "odd heads": {"batch_first": True, "num_heads": 3},
    "batch second": {},
    "without biases": {"batch_first": True, "bias": False},
    "with further keys": {"batch_first": True, "add_bias_kv": True, "add_zero_attn": True},
    "keys of another width": {"kdim": 10, "vdim": 10, "batch_first": True},
}


class Attending(nn.Module):
    """Torch's own attention between layers, with or without its weights asked for."""

    def __init__(self, needed, **settings):
        super().__init__()
        self.inner = nn.MultiheadAttention(12, **{"num_heads": 2, **settings})
        self.needed = needed

    def forward(self, x):
        keys = x if self.inner.kdim == x.shape[-1] else x[..., : self.inner.kdim]
        y, weights = self.inner(x, keys, keys, need_weights=self.needed)
        return (y * 2, weights) if self.needed else y * 2


def head_by_head(attention, x, left_out):
    """What torch's attention returns without some heads: a sum over heads, by their definition."""
    x = x if attention.batch_first else x.transpose(0, 1)
    size, total = attention.head_dim, torch.zeros_like(x)
    if attention.out_proj.bias is not None:
        total = total + attention.out_proj.bias
    if attention.in_proj_weight is None:
        matrices = attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight
    else:
        matrices = attention.in_proj_weight.chunk(3)
    biases = [0.0] * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
    q, k, v = (x[..., : w.shape[1]] @ w.T + b for w, b in zip(matrices, biases, strict=True))
    if attention.bias_k is not None:
        nothing = torch.zeros_like(k[:, :1])
        k = torch.cat([k, attention.bias_k.expand(len(k), 1, -1), nothing], 1)
        v = torch.cat([v, attention.bias_v.expand(len(v), 1, -1), nothing], 1)
    for head in range(attention.num_heads):
        part = slice(head * size, (head + 1) * size)
        if head not in left_out:
            shares = (q[..., part] @ k[..., part].transpose(1, 2) / size**0.5).softmax(-1)
            total = total + shares @ v[..., part] @ attention.out_proj.weight[:, part].T
    return total if attention.batch_first else total.transpose(0, 1)


@pytest.mark.parametrize("use_hooks", [False, True])
@pytest.mark.parametrize("needed", [False, True])
@pytest.mark.parametrize("form", ATTENTION)
def test_heads_of_torchs_own_attention_are_left_out_one_by_one(form, needed, use_hooks):
    model = oracles.rough(Attending(needed, **ATTENTION[form])).requires_grad_(False)
    x, heads = torch.randn(4, 5, 12), coar.attention_heads(model)
    assert [row.site for row in heads] == ["inner.out_proj"] * model.inner.num_heads
    before = oracles.snapshot(model)
    plain = oracles.forward(model, x)
    for left_out in ([], [0], [1], list(range(len(heads)))):
        keep = torch.tensor([head not in left_out for head in range(len(heads))])
        with Gates(model, heads, torch.zeros(heads.width), use_hooks=use_hooks) as gates, torch.no_grad():
            gates.set(keep)
            y = model(x)
            gates.confirm()
        if needed:
            assert torch.equal(y[1], plain[1])  # the weights that the block returns stay
        found = y[0] if needed else y
        torch.testing.assert_close(found, 2 * head_by_head(model.inner, x, left_out), rtol=0, atol=1e-5)
    oracles.assert_same(before, oracles.snapshot(model))


@pytest.mark.parametrize("masked", [False, True])
def test_each_row_has_heads_and_gradients_of_its_own_in_a_fused_encoder_also_with_padding(masked):
    layer = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True)
    model = oracles.rough(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).requires_grad_(False)
    x, heads = torch.randn(3, 5, 12), coar.attention_heads(model)
    padding = torch.arange(5)[None] >= torch.tensor([5, 3, 4])[:, None] if masked else None
    keep = torch.tensor([[True, False, True, True], [False, True, False, True], [True, True, False, False]])

    def run(net, rows=slice(None)):
        return net(x[rows], src_key_padding_mask=None if padding is None else padding[rows])

    with Gates(model, heads, torch.zeros(heads.width), use_hooks=True) as gates:
        live = keep.float().requires_grad_()
        gates.set(live)
        y = run(model)
        (gradient,) = torch.autograd.grad(y.square().sum(), live)
        for column, step in ((0, 1e-3), (3, 1e-3)):
            ends = []
            for sign in (1, -1):
                moved = keep.float()
                moved[:, column] += sign * step
                gates.set(moved)
                ends.append(run(model).double().square().sum((1, 2)))
            slopes = (ends[0] - ends[1]) / (2 * step)
            torch.testing.assert_close(gradient[:, column].double(), slopes, rtol=0.02, atol=0.05)
    for row, kept in enumerate(keep):
        net = deepcopy(model)
        for layer in (0, 1):
            heads_out = [head for head in (0, 1) if not kept[2 * layer + head]]
            features = [6 * head + i for head in heads_out for i in range(6)]
            oracles.swap_heads(net, f"layers.{layer}.self_attn", features)
        with torch.no_grad():
            expected = run(net, slice(row, row + 1))
        torch.testing.assert_close(y[row : row + 1].detach(), expected, rtol=0, atol=1e-5)


def test_blocks_left_out_need_not_be_understood():
    model = nn.ModuleDict(
        {"odd": OwnAttention({"num_heads": 5}, o_proj=12), "even": OwnAttention({"num_heads": 4}, o_proj=12)}
    )
    with pytest.raises(ComponentError, match="heads of 'odd'"):
        coar.attention_heads(model)
    assert len(coar.attention_heads(model, exclude="odd")) == 4


def test_a_model_may_mix_torchs_own_attention_with_another():
    config = transformers.SiglipVisionConfig(**{**tiny.IMAGE, "num_hidden_layers": 1})
    model = transformers.SiglipVisionModel(config)  # it pools with torch's own attention
    heads = coar.attention_heads(model)
    assert len(heads) == 2 * tiny.HEADS
    assert {row.site.rpartition(".")[2] for row in heads} == {"out_proj"}


class Unnamed(nn.Module):
    """A block with queries and a projection whose number of heads is known to its forward pass alone."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)


def test_a_block_whose_number_of_heads_is_not_known_is_not_passed_over_in_silence(caplog):
    with pytest.raises(ComponentError, match=r"no attention block; 'mixer', a .*Unnamed, has queries"):
        coar.attention_heads(nn.ModuleDict({"mixer": Unnamed()}))
    model = nn.ModuleDict({"mixer": Unnamed(), "other": OwnAttention({"num_heads": 4}, o_proj=12)})
    assert len(coar.attention_heads(model)) == 4
    assert "'mixer', a tests.test_attention_heads.Unnamed, has queries" in caplog.text


class Clipped(nn.Module):
    """A linear layer between two clips, as in Gemma 4."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 12, bias=False)
        self.register_buffer("largest", torch.tensor(6.0))

    def forward(self, x):
        return self.linear(x.clamp(max=self.largest)).clamp(max=self.largest)


def test_a_projection_may_be_the_only_layer_of_a_module():
    block = OwnAttention({"num_heads": 4}, o_proj=12)
    block.o_proj = Clipped()
    assert [(row.site, row.size) for row in coar.attention_heads(block)] == [("o_proj.linear", 3)] * 4
