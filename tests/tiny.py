"""Transformers of every kind of attention, small and with random weights, each mapping a tensor to (rows, width)."""

import math

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    ViTConfig,
    ViTModel,
)

import coar
from tests import oracles

WIDTH, LAYERS, HEADS, FEED, WORDS, TOKENS = 24, 2, 4, 32, 50, 6
COMMON = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": FEED,
    "attn_implementation": "eager",
}
TEXT = COMMON | {"vocab_size": WORDS, "max_position_embeddings": 32}
IMAGE = COMMON | {"image_size": 16, "patch_size": 8}
GPT2 = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_inner": FEED, "vocab_size": WORDS, "n_positions": 32}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0, "attn_implementation": "eager"}

MODELS = {
    "bert": lambda: BertModel(BertConfig(**TEXT), add_pooling_layer=False),
    "gpt2": lambda: GPT2Model(GPT2Config(**GPT2)),
    "llama": lambda: LlamaModel(LlamaConfig(**TEXT, num_key_value_heads=2, head_dim=8)),  # grouped queries, no biases
    "vit": lambda: ViTModel(ViTConfig(**IMAGE), add_pooling_layer=False),
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**IMAGE)),
}
PROJECTION = {  # what the feed-forward block's second layer is called, and the attention's output projection
    "bert": ("body.encoder.layer.{}.output.dense", "body.encoder.layer.{}.attention.output.dense"),
    "gpt2": ("body.h.{}.mlp.c_proj", "body.h.{}.attn.c_proj"),
    "llama": ("body.layers.{}.mlp.down_proj", "body.layers.{}.self_attn.o_proj"),
    "vit": ("body.layers.{}.mlp.fc2", "body.layers.{}.attention.o_proj"),
    "clip": ("body.encoder.layers.{}.mlp.fc2", "body.encoder.layers.{}.self_attn.out_proj"),
}
BLOCK = {  # what computes the heads
    "bert": "body.encoder.layer.{}.attention.self",
    "gpt2": "body.h.{}.attn",
    "llama": "body.layers.{}.self_attn",
    "vit": "body.layers.{}.attention",
    "clip": "body.encoder.layers.{}.self_attn",
}


class Pooled(nn.Module):
    """A transformer's last hidden states, averaged over positions."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x).last_hidden_state.mean(1)


def lively(net, seed=0):
    """The model with weights that keep signals alive, and biases and norms of which none is 0 or 1, for evaluation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 2:
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(drawn * 1.2 / math.sqrt(parameter.shape[-1]))
    return oracles.rough(net, seed)


def model(kind, seed=0):
    """A transformer whose last hidden states are averaged, with lively weights."""
    return lively(Pooled(MODELS[kind]()), seed)


def inputs(kind, rows=5, seed=1):
    """Tokens (rows, tokens) or pictures (rows, 3, 16, 16)."""
    generator = torch.Generator().manual_seed(seed)
    if kind in ("vit", "clip"):
        return torch.randn(rows, 3, 16, 16, generator=generator)
    return torch.randint(WORDS, (rows, TOKENS), generator=generator)


def classifier():
    """A BERT that separates three classes of texts, with weights that keep signals alive."""
    config = BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20, vocab_size=30, num_labels=3
    )
    net = BertForSequenceClassification(config).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.3)
    return net


def sentences(lengths, seed=4):
    """Texts of these lengths, padded to the longest, with an attention mask."""
    words = torch.randint(1, 30, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    there = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    inputs = {"input_ids": words * there, "attention_mask": there}
    return coar.Examples(inputs=inputs, targets=torch.tensor([i % 3 for i in range(len(lengths))]))
