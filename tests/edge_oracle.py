"""Edge ablation written out: one text, one position, one reader at a time, from the weights of each family.

It shares no code with the engine. Norms, MLPs, embeddings and heads of models are called as they are; attention, the
residual stream and everything about edges is done here in loops, in float64 where the model allows it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

WORDS, WIDTH, LAYERS, HEADS, FEED = 40, 32, 2, 4, 24
COMMON = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "vocab_size": WORDS,
    "max_position_embeddings": 32,
}
DEEP = COMMON | {"intermediate_size": FEED}
GROUPED = DEEP | {"num_key_value_heads": 2}
IDS = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
GPT2 = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_inner": FEED, "vocab_size": WORDS, "n_positions": 32}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2, bos_token_id=1, eos_token_id=1)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED, head_dim=8)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED)),  # biases of queries, keys and values
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=6)),  # norms of queries and keys
    "mistral": lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=3)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**DEEP, **IDS, num_key_value_heads=1, head_dim=8)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**GROUPED, **IDS, head_dim=8, attn_implementation="eager")),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**GROUPED, **IDS, head_dim=8, sliding_window=3)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**DEEP, **IDS)),  # parallel, one norm
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**GROUPED, **IDS)),  # fused
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**DEEP, **IDS)),  # parallel, two norms, fused head by head
    "opt": lambda: OPTForCausalLM(OPTConfig(**COMMON, **IDS, ffn_dim=FEED, word_embed_proj_dim=WIDTH)),
}


@dataclass
class Layer:
    """What a layer of any family consists of: matrices are (features, inputs), heads first."""

    norm: Callable[[Tensor], Tensor]
    q: Tensor
    k: Tensor
    v: Tensor
    biases: tuple[Tensor, Tensor, Tensor]
    out: Tensor  # (heads, size, width)
    out_bias: Tensor
    mlp_norm: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]
    scale: float
    after: Callable[[Tensor], Tensor] | None = None  # a norm of the whole attention's output
    after_mlp: Callable[[Tensor], Tensor] = field(default=lambda x: x)
    qk: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] = field(default=(lambda x: x, lambda x: x))
    rotary: tuple[int, float] | None = None  # dimensions and base
    window: int = 1000
    cap: float | None = None
    parallel: bool = False


def build(family: str, seed: int = 0) -> nn.Module:
    """Return a model of a family with lively random weights."""
    torch.manual_seed(seed)
    model = MODELS[family]().eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        scale = 0.3 if "norm" in name or "ln_" in name or name.endswith("bias") else 0.25
        parameter.add_(torch.randn(parameter.shape, generator=draw) * scale)
    return model


def _heads(matrix: Tensor, heads: int) -> Tensor:
    return matrix.reshape(heads, -1, matrix.shape[-1])


def _split(linears: list[nn.Module], heads: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    counts = (heads[0], heads[1], heads[1])
    parts = [_heads(linear.weight, n) for linear, n in zip(linears, counts, strict=True)]
    zero = [torch.zeros(linear.weight.shape[0]) if linear.bias is None else linear.bias for linear in linears]
    return (*parts, tuple(bias.reshape(n, -1) for bias, n in zip(zero, counts, strict=True)))


def layers_of(family: str, model: nn.Module) -> list[Layer]:
    """Read the layers of a model off its weights."""
    special = {"gpt2": gpt2_layers, "opt": opt_layers, "neox": neox_layers}
    return special[family](model) if family in special else llama_layers(family, model)


def gpt2_layers(model: nn.Module) -> list[Layer]:
    """Queries, keys and values side by side in one transposed matrix."""
    found = []
    for block in model.transformer.h:
        attn = block.attn
        q, k, v = (_heads(part, HEADS) for part in attn.c_attn.weight.T.split(WIDTH))
        biases = tuple(bias.reshape(HEADS, -1) for bias in attn.c_attn.bias.split(WIDTH))
        out = attn.c_proj.weight.reshape(HEADS, -1, WIDTH)
        own = (out, attn.c_proj.bias, block.ln_2, block.mlp, (WIDTH // HEADS) ** -0.5)
        found.append(Layer(block.ln_1, q, k, v, biases, *own))
    return found


def opt_layers(model: nn.Module) -> list[Layer]:
    """Separate projections; the MLP is two layers of the block itself."""
    found = []
    for block in model.model.decoder.layers:
        attn = block.self_attn
        parts = _split([attn.q_proj, attn.k_proj, attn.v_proj], (HEADS, HEADS))
        out = attn.out_proj.weight.T.reshape(HEADS, -1, WIDTH)

        def mlp(x: Tensor, block: nn.Module = block) -> Tensor:
            return block.fc2(torch.relu(block.fc1(x)))

        own = (attn.out_proj.bias, block.final_layer_norm, mlp, (WIDTH // HEADS) ** -0.5)
        found.append(Layer(block.self_attn_layer_norm, *parts, out, *own))
    return found


def neox_layers(model: nn.Module) -> list[Layer]:
    """Query, key and value of one head after another in one matrix; the MLP beside the attention."""
    found, size, rope = [], WIDTH // HEADS, model.config.rope_parameters
    for block in model.gpt_neox.layers:
        fused, last = block.attention.query_key_value, block.attention.dense
        matrix, bias = fused.weight.view(HEADS, 3, size, WIDTH), fused.bias.view(HEADS, 3, size)
        own = (last.bias, block.post_attention_layernorm, block.mlp, size**-0.5)
        layer = Layer(
            block.input_layernorm, *matrix.unbind(1), bias.unbind(1), last.weight.T.reshape(HEADS, size, WIDTH), *own
        )
        layer.rotary, layer.parallel = (int(size * rope["partial_rotary_factor"]), rope["rope_theta"]), True
        found.append(layer)
    return found


def llama_layers(family: str, model: nn.Module) -> list[Layer]:
    """Llama and what has its names."""
    config, found = model.config, []
    size = getattr(config, "head_dim", None) or WIDTH // HEADS
    groups = getattr(config, "num_key_value_heads", None) or HEADS
    for number, block in enumerate(model.model.layers):
        attn = block.self_attn
        if family == "phi3":
            split = attn.qkv_proj.weight.split([HEADS * size, groups * size, groups * size])
            q, k, v = (_heads(part, n) for part, n in zip(split, (HEADS, groups, groups), strict=True))
            parts = (q, k, v, tuple(torch.zeros(part.shape[:2]) for part in (q, k, v)))
        else:
            parts = _split([attn.q_proj, attn.k_proj, attn.v_proj], (HEADS, groups))
        last = attn.dense if family == "phi" else attn.o_proj
        bias = torch.zeros(WIDTH) if last.bias is None else last.bias
        out = last.weight.T.reshape(HEADS, size, WIDTH)
        layer = Layer(block.input_layernorm, *parts, out, bias, nn.Identity(), block.mlp, size**-0.5)
        _adapt(layer, family, block, config, number, size)
        found.append(layer)
    return found


def _adapt(layer: Layer, family: str, block: nn.Module, config: Any, number: int, size: int) -> None:
    """Set what sets a family apart from Llama."""
    rope = config.rope_parameters
    if family == "phi":
        layer.mlp_norm, layer.parallel = block.input_layernorm, True
        layer.rotary = (int(size * rope["partial_rotary_factor"]), rope["rope_theta"])
        return
    layer.mlp_norm = block.post_attention_layernorm
    kind = config.layer_types[number] if getattr(config, "layer_types", None) else ""
    layer.rotary = (size, rope[kind]["rope_theta"] if kind in rope else rope["rope_theta"])
    if family in ("gemma2", "gemma3"):
        layer.after, layer.mlp_norm = block.post_attention_layernorm, block.pre_feedforward_layernorm
        layer.after_mlp, layer.scale = block.post_feedforward_layernorm, config.query_pre_attn_scalar**-0.5
        layer.cap = config.attn_logit_softcapping
    if family in ("qwen3", "gemma3"):
        layer.qk = (block.self_attn.q_norm, block.self_attn.k_norm)
    if family == "mistral" or kind.startswith("sliding"):
        layer.window = config.sliding_window


def embedded(family: str, model: nn.Module, ids: Tensor, start: int) -> Tensor:
    """Return (positions, width) embeddings of a text whose first token is at a position of the batch."""
    if family == "gpt2":
        return model.transformer.wte(ids) + model.transformer.wpe(torch.arange(start, start + len(ids)))
    if family == "opt":
        return model.model.decoder.embed_tokens(ids) + model.model.decoder.embed_positions.weight[2 : 2 + len(ids)]
    return model.get_input_embeddings()(ids)


def finish(family: str, model: nn.Module, x: Tensor) -> Tensor:
    """Return the logits of what the last reader takes."""
    norms = {"gpt2": "transformer.ln_f", "opt": "model.decoder.final_layer_norm", "neox": "gpt_neox.final_layer_norm"}
    name = "model.final_layernorm" if family == "phi" else norms.get(family, "model.norm")
    logits = model.get_output_embeddings()(model.get_submodule(name)(x))
    cap = getattr(model.config, "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits


def rotated(x: Tensor, position: int, rotary: tuple[int, float] | None) -> Tensor:
    """Turn the first dimensions of a (..., size) query or key by the angles of a position."""
    if rotary is None:
        return x
    dims, base = rotary
    half = dims // 2
    angles = torch.tensor([position / base ** (2 * i / dims) for i in range(half)])
    cos, sin = angles.cos(), angles.sin()
    a, b, rest = x[..., :half], x[..., half:dims], x[..., dims:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def logits(
    family: str,
    model: nn.Module,
    ids: Tensor,
    keep: Callable[[str, str], float],
    replacement: Callable[[str, int], Tensor],
    *,
    start: int = 0,
    written: dict[tuple[str, int], Tensor] | None = None,
) -> Tensor:
    """Return the (positions, vocabulary) logits of one text under one mask.

    Args:
        family: The family.
        model: The model.
        ids: (positions,) tokens of the text, without padding.
        keep: From the labels of a writer and a reader to how much of their edge is kept.
        replacement: From a writer's label and a position to what replaces what it writes there.
        start: Position of the first token in the padded batch.
        written: Takes what every writer wrote, by label and position.
    """
    layers = layers_of(family, model)
    stream = embedded(family, model, ids, start)
    caches: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in layers]
    rows = []
    for t in range(len(ids)):
        before: list[tuple[str, Tensor]] = [("embed", stream[t])]
        bias = torch.zeros(WIDTH)  # of output projections so far

        def take(reader: str, writers: list[tuple[str, Tensor]], extra: Tensor, t: int = t) -> Tensor:
            total = extra.clone()
            for label, value in writers:
                k = 1.0 if t == 0 else keep(label, reader)
                total = total + k * value + ((1 - k) * replacement(label, t) if k != 1 else 0)
            return total

        for number, (layer, (keys, values)) in enumerate(zip(layers, caches, strict=True)):
            name = f"L{number}"
            entering, entering_bias = list(before), bias
            position = start + t
            groups = len(layer.k)
            letter = "H" if groups == HEADS else "G"
            new_keys, new_values = [], []
            for g in range(groups):
                x = layer.norm(take(f"{name}.{letter}{g}.k", entering, bias)[None])[0]
                key = layer.qk[1](layer.k[g] @ x + layer.biases[1][g])
                new_keys.append(rotated(key, position, layer.rotary))
                x = layer.norm(take(f"{name}.{letter}{g}.v", entering, bias)[None])[0]
                new_values.append(layer.v[g] @ x + layer.biases[2][g])
            keys.append(torch.stack(new_keys))
            values.append(torch.stack(new_values))
            heads = []
            for h in range(HEADS):
                x = layer.norm(take(f"{name}.H{h}.q", entering, bias)[None])[0]
                query = rotated(layer.qk[0](layer.q[h] @ x + layer.biases[0][h]), position, layer.rotary)
                g = h * groups // HEADS
                seen = range(max(0, t + 1 - layer.window), t + 1)
                scores = torch.stack([query @ keys[s][g] for s in seen]) * layer.scale
                if layer.cap:
                    scores = torch.tanh(scores / layer.cap) * layer.cap
                weights = scores.softmax(0)
                z = sum(w * values[s][g] for w, s in zip(weights, seen, strict=True))
                heads.append((f"{name}.H{h}", z @ layer.out[h]))
            if layer.after is not None:
                whole = sum(value for _, value in heads) + layer.out_bias
                before.append((f"{name}.attn", layer.after(whole[None])[0]))
            else:
                before += heads
                bias = bias + layer.out_bias
            source, extra = (entering, entering_bias) if layer.parallel else (before, bias)
            x = layer.mlp_norm(take(f"{name}.mlp", source, extra)[None])
            before.append((f"{name}.mlp", layer.after_mlp(layer.mlp(x[None])[0])[0]))
        if written is not None:
            written.update({(label, t): value for label, value in before})
        rows.append(finish(family, model, take("out", before, bias)[None])[0])
    assert not math.isnan(float(rows[-1].detach().sum()))
    return torch.stack(rows)
