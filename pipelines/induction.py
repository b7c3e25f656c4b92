"""Induction: a sequence of random tokens is repeated, on a model of two attention layers that is trained here.

    coar collect pipelines/induction.py --ablation counterfactual --gradients 32

    export COAR_PROMPTS_COMPONENTS=heads   # optional: attention heads, or nodes, instead of edges

After "a b ... a" comes b. Olsson et al. (2022, "In-context learning and induction heads") found that two layers of
attention suffice: a head of the first layer writes at each token which token is before it, and a head of the second
layer attends to the token after an earlier occurrence. The model has no MLPs. On first use it learns sequences of 8 to
16 random tokens that are repeated, in half a minute on one core, and is kept under data/induction.

A prompt ends in the repetition. Both prompts of a pair differ in one token: the one that the answer repeats. So the
answer of one is the wrong answer of the other, and each is the other's counterfactual.
"""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

import coar
from pipelines import prompts, training

GRADIENTS, TEST_MASKS = 64, 100

FOLDER = Path("data/induction")
RECIPE = training.Recipe(epochs=24, batch=64, learning_rate=4e-3, weight_decay=0.01)
VOCABULARY, PERIODS = 64, (8, 16)  # tokens, and fewest and most of a sequence before it is repeated
LENGTH, PROMPT = 32, 24  # tokens of a sequence that is learnt, and of a prompt
WIDTH, HEADS, LAYERS = 64, 4, 2
SEQUENCES = 4_096  # that the model is trained on
PAIRS = {"studied": 64, "calibration": 64, "judge": 64}  # of prompts, after those that the model gets wrong
SPARE = 1.25  # pairs tried for one that is used
Part = Literal["studied", "calibration", "judge"]


class Attention(nn.Module):
    """Causal attention of several heads."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Return (examples, length, width) sums of the heads' outputs."""
        q, k, v = (p(x).unflatten(2, (HEADS, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A norm and attention, added to the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), Attention()

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual stream after the layer."""
        return x + self.attention(self.norm(x))


class AttentionOnly(nn.Module):
    """A causal language model of attention layers without MLPs, with learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return (examples, length, vocabulary) logits of the next tokens."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.tokens(input_ids) + self.positions(places)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def sequences(count: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return (count, length) sequences of different tokens that are repeated again and again, and their periods."""
    draw = torch.Generator().manual_seed(seed)
    periods = torch.randint(PERIODS[0], PERIODS[1] + 1, (count,), generator=draw)
    once = torch.rand(count, VOCABULARY, generator=draw).argsort(1)
    return once.gather(1, torch.arange(length) % periods[:, None]), periods


def training_examples(count: int = SEQUENCES, seed: int = 0) -> coar.Examples:
    """Return sequences of which the repetition is to be predicted."""
    ids, periods = sequences(count, LENGTH, seed)
    made = coar.token_examples({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    targets = made.targets.where(torch.arange(LENGTH) >= periods[:, None], -100)
    return coar.Examples(inputs={"input_ids": ids}, targets=targets)


def repetition_loss(model: nn.Module, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of the tokens of the repetition, in nats."""
    return functional.cross_entropy(model(**inputs).flatten(0, 1), targets.flatten())


def repeated_tokens_found(model: nn.Module) -> dict[str, float]:
    """Return the share of correctly predicted tokens in the repetition of new sequences."""
    inputs, targets = training_examples(256, seed=1).block(0, 256)
    with torch.inference_mode():
        found = model(**inputs).argmax(2)[targets >= 0] == targets[targets >= 0]
    return {"repeated token": float(found.float().mean())}


def model(training_seed: int = 0) -> nn.Module:
    """Return the model, trained on first use and kept under data/induction."""
    return training.fitted(
        AttentionOnly,
        training_examples(),
        RECIPE,
        loss=repetition_loss,
        folder=FOLDER,
        seed=training_seed,
        about="half a minute on one core",
        report=repeated_tokens_found,
    )


def examples(part: Part, net: nn.Module) -> coar.Examples:
    """Return the prompts of a part that the model gets right, in pairs."""
    count, seed = round(SPARE * PAIRS[part]), 2 + list(PAIRS).index(part)
    ids, periods = sequences(count, PROMPT, seed)
    rows, place = torch.arange(count), PROMPT - periods  # of the token that the answer repeats
    unused = (torch.arange(VOCABULARY) != ids[..., None]).all(1)  # (count, vocabulary)
    drawn = unused.float().multinomial(1, generator=torch.Generator().manual_seed(seed))
    answers = torch.cat([ids[rows, place][:, None], drawn], 1)
    both = torch.stack([ids, ids.where(ids != answers[:, :1], drawn)], 1).flatten(0, 1)  # wherever the token occurs
    made = coar.token_examples(
        {"input_ids": both, "attention_mask": torch.ones_like(both)},
        answers=answers.flatten(),
        wrong=answers.flip(1).flatten(),
        positions={"repeated": place.repeat_interleave(2), "before_repeated": (place - 1).repeat_interleave(2)},
        metadata={"pair": rows.repeat_interleave(2).numpy()},
    )
    without_mask = coar.Examples(
        inputs={"input_ids": both}, targets=made.targets, metadata=made.metadata, positions=made.positions
    )
    return prompts.right_pairs(net, without_mask, most=PAIRS[part], what="repeated sequences")


def study(
    *, ablation: str = "counterfactual", ablated_fraction: float = 0.05, seed: int = 0, training_seed: int = 0
) -> coar.Study:
    """Define the study of 128 prompts; constants are computed on 128 other prompts."""
    net = model(training_seed)
    sampler = coar.BernoulliSampler(ablated_fraction=ablated_fraction, seed=seed)
    return prompts.study_of(net, examples("studied", net), examples("calibration", net), ablation, sampler)


def judge() -> coar.Examples:
    """Return prompts that no attribution has seen."""
    return examples("judge", model())
