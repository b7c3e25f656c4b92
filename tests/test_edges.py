"""Finding edges: numbers, labels, and models that have none."""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import coar
from coar.errors import ComponentError
from tests.edge_oracle import COMMON, DEEP, FEED, GROUPED, HEADS, IDS, LAYERS, MODELS, WIDTH, build

ATTENTION = 3 * HEADS  # readers of a layer without groups


def expected_count(readers: int, *, parallel: bool = False, normed: bool = False) -> int:
    """Return how many edges a model has with so many readers in the attention of each layer."""
    heads = 1 if normed else HEADS
    total, writers = 0, 1
    for _ in range(LAYERS):
        total += readers * writers + writers + (0 if parallel else heads)
        writers += heads + 1
    return total + writers


@pytest.mark.parametrize("family", MODELS)
def test_number_of_edges(family: str) -> None:
    """Grouped, fused, parallel and post-norm models have the edges that their layout says."""
    readers = {"gpt2": ATTENTION, "opt": ATTENTION, "neox": ATTENTION, "phi": ATTENTION, "gemma": HEADS + 2}
    model = build(family)
    before = [module.training for module in model.modules()]
    edges = coar.edges(model)
    kinds = {"parallel": family in ("neox", "phi"), "normed": family in ("gemma2", "gemma3")}
    assert len(edges) == expected_count(readers.get(family, HEADS + 4), **kinds)
    assert set(edges.kinds) == {"edge"}
    assert edges.width == len(coar.nodes(model)) * WIDTH
    assert len(coar.edges(model, ports=False)) == expected_count(1, **kinds)
    assert [module.training for module in model.modules()] == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_gpt2_small_has_32491_edges() -> None:
    """As published; with all 27,648 outputs of its projections, none of which may be mistaken by chance."""
    model = GPT2LMHeadModel(GPT2Config(n_layer=12, n_head=12, n_inner=8, vocab_size=20, n_positions=8))
    assert len(coar.edges(model)) == 32_491


def test_labels() -> None:
    """Writers and readers are called by layer and role; groups by G."""
    names = coar.edges(build("llama")).names
    assert names[0] == "embed -> L0.H0.q"
    for name in ("L0.H3 -> L1.H2.q", "L0.mlp -> L1.G1.v", "L1.H0 -> L1.mlp", "L1.mlp -> out", "embed -> out"):
        assert name in names
    assert "L1.H0 -> L1.H1.q" not in names
    assert "L0.attn -> L1.mlp" in coar.edges(build("gemma2")).names
    assert "L0.H3 -> L1.attn" in coar.edges(build("llama"), ports=False).names
    assert coar.nodes(build("llama")).names[:3] == ("embed", "L0.H0", "L0.H1")
    assert "L0.H0 -> L0.mlp" not in coar.edges(build("phi")).names  # parallel


def test_the_model_may_train_and_lie_inside_another() -> None:
    """Dropout is off while edges are found, and on again afterwards; paths start at the outer model."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build("gpt2").train()

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.inner(tokens).logits

    outer = Outer().train()
    edges = coar.edges(outer)
    assert edges.names == coar.edges(build("gpt2")).names
    assert edges[0].site.startswith("inner.transformer.h.0")
    assert all(module.training for module in outer.modules())


def test_mixtures_of_experts_are_writers() -> None:
    """A mixture in the place of an MLP is one writer and one reader."""
    model = MixtralForCausalLM(MixtralConfig(**GROUPED, num_local_experts=3))
    assert "L0.mlp -> L1.mlp" in coar.edges(model).names


LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
WITHOUT = {
    "encoder": (lambda: BertModel(BertConfig(**DEEP)), "see later ones"),
    "encoder-decoder": (lambda: T5ForConditionalGeneration(T5Config(d_model=32, num_layers=1)), "encoder-decoder"),
    "no transformer": (lambda: nn.Sequential(nn.Linear(3, 3)), "no attention block|no embedding"),
    "post-norm": (
        lambda: OPTForCausalLM(
            OPTConfig(**COMMON, **IDS, ffn_dim=FEED, word_embed_proj_dim=WIDTH, do_layer_norm_before=False)
        ),
        r"'model.decoder.layers.0.final_layer_norm' returned it",
    ),
    "scaled": (
        lambda: GraniteForCausalLM(GraniteConfig(**GROUPED, residual_multiplier=0.5)),
        r"'model.layers.0.self_attn.o_proj' has written",
    ),
    "norm over heads": (lambda: Olmo2ForCausalLM(Olmo2Config(**DEEP)), r"acts on heads \[0, 1, 2, 3\]"),
    "low rank": (lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**DEEP, **LATENT)), "q_b_proj.*low-rank"),
}


@pytest.mark.parametrize("kind", WITHOUT)
def test_models_without_edges(kind: str) -> None:
    """Each is refused in words that name what stands in the way."""
    make, message = WITHOUT[kind]
    with pytest.raises(ComponentError, match=message):
        coar.edges(make().eval())
