"""Steering: whether a lens predicts what the model does when a latent is moved along a direction."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from coar.errors import SettingsError
from coar.examples import Examples
from coar.lenses.divergence import TEXTS
from coar.lenses.layer_stack import LayerStack

if TYPE_CHECKING:
    import pandas as pd

DIRECTIONS = ("random", "singular")
STEP = 0.01  # of the latents' standard deviation, in the differences that the Jacobian is made of
HALVINGS = 30  # of the interval in which the length of a move is searched
LONGEST = 1e4  # of the latents' standard deviation

Logits = Callable[[Tensor], Tensor]


def steering(
    stack: LayerStack, lens: Logits, texts: Examples, layer: int, kind: str, count: int, kl: float, seed: int
) -> "pd.DataFrame":
    """Return a row per direction and text of moves before a layer, see `Lens.steering`."""
    import pandas as pd

    if kind not in DIRECTIONS:
        raise SettingsError(f"{kind!r} is no kind of direction; choose one of {', '.join(DIRECTIONS)}")
    with torch.no_grad():
        latents, positions, model = _last(stack, texts, layer)
        before, rows = lens(latents), []
        for number, direction in enumerate(_directions(stack, lens, latents, kind, count, seed)):
            move = direction * _length(lens, latents, before, direction, kl)
            after, steered = lens(latents + move), _steered(stack, texts, layer, positions, move)
            changes = after.softmax(1) - before.softmax(1), steered.softmax(1) - model.softmax(1)
            columns = {
                "kl_lens": divergence(before, after),
                "kl_model": divergence(model, steered),
                "similarity": torch.nn.functional.cosine_similarity(*changes),
            }
            values = {name: column.cpu().numpy() for name, column in columns.items()}
            rows.append(pd.DataFrame({"layer": layer, "direction": number, "text": range(len(latents)), **values}))
    return pd.concat(rows, ignore_index=True)


def divergence(first: Tensor, second: Tensor) -> Tensor:
    """Return (rows,) KL(first || second) of (rows, vocabulary) logits, in nats."""
    a, b = first.log_softmax(1), second.log_softmax(1)
    return (a.exp() * (a - b)).sum(1)


def _last(stack: LayerStack, texts: Examples, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return each text's latent before a layer at its last token, that token's position, and the model's logits there.

    Raises:
        SettingsError: When a text has one token.
    """
    latents, positions, logits = [], [], []
    for first in range(0, len(texts), TEXTS):
        inputs, _ = texts.block(first, min(first + TEXTS, len(texts)))
        passed = stack.latents(inputs)
        last = torch.tensor(
            [i for i, row in enumerate(passed.text) if i + 1 == len(passed.text) or passed.text[i + 1] != row]
        )
        latents.append(passed.states[layer][last])
        positions.append(passed.position[last])
        logits.append(passed.logits[last])
    found = torch.cat(latents), torch.cat(positions), torch.cat(logits)
    if len(found[0]) < len(texts):
        raise SettingsError("a text has one token; steering needs at least 2, since the first is not read")
    return found


def _directions(stack: LayerStack, lens: Logits, latents: Tensor, kind: str, count: int, seed: int) -> Tensor:
    """Return (count, width) unit vectors: random ones, or the strongest right singular vectors of the lens.

    The latter are those of the Jacobian of its logits, less their mean, at the mean latent.
    """
    if kind == "random":
        drawn = torch.randn(count, stack.width, generator=torch.Generator().manual_seed(seed)).to(stack.device)
        return torch.nn.functional.normalize(drawn, dim=1)
    step = STEP * float(latents.float().std())
    moves = step * torch.eye(stack.width, device=stack.device)
    mean = latents.float().mean(0)
    slopes = torch.cat([lens(mean + part) - lens(mean - part) for part in torch.split(moves, 64)]) / (2 * step)
    jacobian = (slopes - slopes.mean(1, keepdim=True)).T.double()
    vectors: Tensor = torch.linalg.svd(jacobian, full_matrices=False).Vh
    return vectors[:count].float()


def _length(lens: Logits, latents: Tensor, before: Tensor, direction: Tensor, kl: float) -> float:
    """Return the length of a move along a direction for which the lens's mean divergence is `kl`."""
    low, high = 0.0, LONGEST * float(latents.float().std())
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5 if low else high / 1e3
        moved = float(divergence(before, lens(latents + direction * middle)).mean())
        low, high = (middle, high) if moved < kl else (low, middle)
    return high


def _steered(stack: LayerStack, texts: Examples, layer: int, positions: Tensor, move: Tensor) -> Tensor:
    parts = []
    for first in range(0, len(texts), TEXTS):
        inputs, _ = texts.block(first, min(first + TEXTS, len(texts)))
        rows = positions[first : first + TEXTS]
        parts.append(stack.steered(inputs, layer, rows, move.expand(len(rows), -1)))
    return torch.cat(parts)
