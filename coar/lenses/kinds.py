"""Kinds of lenses: how each maps a latent to logits, where its parameters start, and how they are trained."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from coar.errors import SettingsError
from coar.lenses.layer_stack import LayerStack

Parameters = dict[str, Tensor]
MakeOptimizer = Callable[[Sequence[Tensor], float], torch.optim.Optimizer]


class Moments(NamedTuple):
    """(layers, width) means and standard deviations of what each layer's attention adds to the residual stream."""

    mean: Tensor
    deviation: Tensor


class LensKind(NamedTuple):
    """One kind of lens.

    Attributes:
        logits: Maps (tokens, width) latents before a layer to (tokens, vocabulary) logits by that layer's parameters.
        start: Returns a layer's parameters by name before training; none are trained if there is no optimizer.
        optimizer: Makes the optimizer of all trained parameters at a learning rate.
        learning_rate: Its usual learning rate.
        largest_gradient: Norm to which the gradients of all trained parameters together are clipped.
    """

    logits: Callable[[LayerStack, Parameters, Tensor, int], Tensor]
    start: Callable[[LayerStack, Moments, int], Parameters]
    optimizer: MakeOptimizer | None = None
    learning_rate: float = 0.0
    largest_gradient: float = float("inf")


def _unembedded(stack: LayerStack, _own: Parameters, latents: Tensor, _layer: int) -> Tensor:
    return stack.continued(latents, len(stack))


def _translated(stack: LayerStack, own: Parameters, latents: Tensor, _layer: int) -> Tensor:
    moved = latents.float() @ own["weight"].T + own["bias"]
    return stack.continued(latents + moved.to(latents.dtype), len(stack))


def _with_means(stack: LayerStack, own: Parameters, latents: Tensor, layer: int) -> Tensor:
    return stack.continued(latents, layer, own["attention"])


def _with_constants(stack: LayerStack, own: Parameters, latents: Tensor, layer: int) -> Tensor:
    return stack.continued(latents, layer, own["mean"] + own["deviation"] * own["moved"])


def _nothing(_stack: LayerStack, _moments: Moments, _layer: int) -> Parameters:
    return {}


def _identity(stack: LayerStack, _moments: Moments, _layer: int) -> Parameters:
    weight = torch.zeros(stack.width, stack.width, device=stack.device)
    return {"weight": weight.requires_grad_(), "bias": torch.zeros(stack.width, device=stack.device).requires_grad_()}


def _means(_stack: LayerStack, moments: Moments, layer: int) -> Parameters:
    return {"attention": moments.mean[layer:]}


def _unmoved(_stack: LayerStack, moments: Moments, layer: int) -> Parameters:
    mean, deviation = moments.mean[layer:], moments.deviation[layer:]
    return {"mean": mean, "deviation": deviation, "moved": torch.zeros_like(mean).requires_grad_()}


def _adam(parameters: Sequence[Tensor], rate: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=rate)


def _nesterov(parameters: Sequence[Tensor], rate: float) -> torch.optim.Optimizer:
    momentum = 0.9  # which lengthens steps tenfold
    return torch.optim.SGD(parameters, lr=rate * (1 - momentum), momentum=momentum, nesterov=True, weight_decay=1e-3)


LENS_KINDS = {
    "optimal": LensKind(_with_constants, _unmoved, _adam, 0.05),
    "mean": LensKind(_with_means, _means),
    "tuned": LensKind(_translated, _identity, _nesterov, 1.0, 1.0),
    "logit": LensKind(_unembedded, _nothing),
}


def lens_kind(name: str) -> LensKind:
    """Return a kind of lens by name; raise `SettingsError` when there is none."""
    if name not in LENS_KINDS:
        raise SettingsError(f"{name!r} is no kind of lens; choose one of {', '.join(LENS_KINDS)}")
    return LENS_KINDS[name]
