"""The attention patterns of heads on some texts of a page."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coar.components.table import Components
from coar.examples import Examples, call_model
from coar.explorer.packing import shares
from coar.forward.copies import device_copy
from coar.study import Study

TEXTS, TOKENS = 8, 48  # whose patterns are on a page, at most
BYTES = 1_500_000  # of all patterns, about; there are fewer texts where heads are many
ANCESTORS = 3  # modules above an output projection that may return the pattern of its heads
ROUNDING = 1e-3


@dataclass(frozen=True)
class Patterns:
    """Attention patterns of heads on texts.

    Attributes:
        examples: (texts,) numbers of the examples among those given.
        heads: (heads,) row numbers of the components.
        lengths: (texts,) tokens of each text, without padding; at most `TOKENS`.
        values: (texts, heads, tokens, tokens) attention of each token (row) to each token (column); 0 beyond a text.
    """

    examples: np.ndarray
    heads: np.ndarray
    lengths: np.ndarray
    values: np.ndarray

    def packed(self, components: np.ndarray) -> dict[str, Any]:
        """Return the patterns of the heads among some components as the page reads them; heads by their place there."""
        place = {int(row): i for i, row in enumerate(components)}
        kept = [k for k, row in enumerate(self.heads.tolist()) if row in place]
        return {
            "examples": self.examples.tolist(),
            "heads": [place[int(self.heads[k])] for k in kept],
            "lengths": self.lengths.tolist(),
            "values": shares(self.values[:, kept]),
        }


def attention_patterns(study: Study, rows: np.ndarray, *, device: str = "auto") -> Patterns | None:
    """Return the patterns of a study's attention heads on some of its texts, evenly spaced.

    The model is one of transformers, which computes patterns with the attention kernel `eager`, or contains one.

    Args:
        study: The study.
        rows: Positions of the examples to choose from.
        device: Where to compute.

    Returns:
        The patterns; None when there are no heads or texts, or the model returns no patterns.
    """
    heads = np.array([i for i, one in enumerate(study.components) if one.kind == "attention head"], dtype=np.int64)
    inputs = study.examples.block(int(rows[0]), int(rows[0]) + 1)[0]
    if not len(heads) or not isinstance(inputs, dict) or "input_ids" not in inputs:
        return None
    net = device_copy(study.model, device)
    for module in net.modules():
        choose: Any = getattr(module, "set_attn_implementation", None)
        if choose is not None:
            choose("eager")
    tokens = min(TOKENS, inputs["input_ids"].shape[1])
    texts = max(1, min(TEXTS, BYTES // (len(heads) * tokens**2)))
    chosen = np.unique(np.linspace(0, len(rows) - 1, texts).round().astype(np.int64))
    found = [_of_text(net, study.components, heads, study.examples.subset([int(rows[one])])) for one in chosen]
    known = [one for one in found if one is not None]
    if len(known) < len(found):
        return None
    lengths = np.array([one.shape[-1] for one in known])
    values = np.zeros((len(known), len(heads), lengths.max(), lengths.max()), dtype=np.float32)
    for whole, one in zip(values, known, strict=True):
        whole[:, : one.shape[-1], : one.shape[-1]] = one
    return Patterns(chosen, heads, lengths, values)


def _of_text(net: nn.Module, components: Components, heads: np.ndarray, text: Examples) -> np.ndarray | None:
    """Return the (heads, tokens, tokens) patterns on one text without its padding; None where some are unknown."""
    inputs: Any = text.block(0, 1)[0]
    sites = list(dict.fromkeys(components[int(row)].site for row in heads))
    length = inputs["input_ids"].shape[1]
    with torch.no_grad(), _recorded(net, sites, length) as recorded:
        call_model(net, inputs)
    if set(recorded) != set(sites):
        return None
    there = np.flatnonzero(inputs["attention_mask"][0].cpu().numpy()) if "attention_mask" in inputs else range(length)
    kept = np.asarray(there)[:TOKENS]
    patterns = []
    for row in heads:
        one = components[int(row)]
        of_site = recorded[one.site]
        number = one.position // one.size
        if number >= len(of_site):
            return None
        patterns.append(of_site[number][np.ix_(kept, kept)])
    return np.stack(patterns)


@contextmanager
def _recorded(net: nn.Module, sites: list[str], length: int) -> Iterator[dict[str, np.ndarray]]:
    """Record the (heads, tokens, tokens) pattern that the nearest module above each output projection returns."""
    modules, recorded, handles = dict(net.named_modules()), dict[str, np.ndarray](), []
    depth: dict[str, int] = {}

    def enter(site: str, above: int, result: Any) -> None:
        found = [one for one in result if _is_pattern(one, length)] if isinstance(result, tuple) else []
        if found and above < depth.get(site, ANCESTORS + 1):
            depth[site], recorded[site] = above, found[0][0].float().cpu().numpy()

    for site in sites:
        parts = site.split(".")
        for above in range(1, min(ANCESTORS, len(parts) - 1) + 1):
            module = modules[".".join(parts[:-above])]
            handles.append(
                module.register_forward_hook(lambda _, __, out, site=site, above=above: enter(site, above, out))
            )
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def _is_pattern(value: Any, length: int) -> bool:
    """Return whether a value is (1, heads, tokens, tokens) of shares: none below 0, and no row's sum above 1."""
    if not isinstance(value, Tensor) or value.ndim != 4 or value.shape[0] != 1 or value.shape[2:] != (length, length):
        return False
    return bool(value.min() >= 0 and value.sum(-1).max() <= 1 + ROUNDING)
