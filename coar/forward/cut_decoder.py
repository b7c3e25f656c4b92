"""Passes of a decoder-only transformer that record the latents before its layers, or start from them at any layer."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from coar.components.decoder import find_decoder
from coar.components.layers import unwrapped
from coar.errors import ComponentError
from coar.examples import call_model, device_of
from coar.forward.copies import plain_copy
from coar.inputs import Inputs
from coar.outputs.base import find_logits


class CutDecoder:
    """A copy of a decoder-only transformer whose layers run, or pass on the latents that they are given.

    Args:
        model: The model.
        device: Where the copy is, on one device; by default that of the model's first weight.

    Attributes:
        model: The copy, in evaluation mode.
        layers: The layers in their order.
        width: Features of the residual stream.
        device: Where the copy is.

    Raises:
        ComponentError: When the model is not a decoder-only transformer.
        SettingsError: When the copy takes more memory than is free on the device.
    """

    def __init__(self, model: nn.Module, device: torch.device | None = None) -> None:
        self.device = device or device_of(model)
        self.model = plain_copy(unwrapped(model), self.device).eval().requires_grad_(False)
        decoder = find_decoder(self.model)
        self.layers, self.width = decoder.layers, decoder.width
        for module in self.model.modules():
            with suppress(AttributeError):
                module.config.use_cache = False  # type: ignore[union-attr]
        self._start, self._latents = 0, torch.empty(0)
        self._recorded: list[Tensor] | None = None
        for number, layer in enumerate(self.layers):
            self._switch(number, self.model.get_submodule(layer.path), layer.path)

    def __len__(self) -> int:
        return len(self.layers)

    def logits(self, inputs: Inputs) -> Tensor:
        """Return the (texts, positions, vocabulary) logits of a plain pass."""
        return find_logits(call_model(self.model, inputs))

    def latents(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Return the (layers, texts, positions, width) latents before each layer in a plain pass, and its logits."""
        self._recorded = []
        try:
            logits = self.logits(inputs)
            return torch.stack(self._recorded), logits
        finally:
            self._recorded = None

    def logits_from(self, start: int, latents: Tensor, inputs: Inputs) -> Tensor:
        """Return the logits of a pass in which layers before `start` return the latents that layer `start` is given.

        Args:
            start: Number of the first layer that runs; the number of layers if none does.
            latents: (texts, positions, width) latents before that layer.
            inputs: As many texts of as many tokens, for what layers are given besides latents, such as masks.
        """
        self._start, self._latents = start, latents
        try:
            return self.logits(inputs)
        finally:
            self._start, self._latents = 0, torch.empty(0)

    def _switch(self, number: int, module: nn.Module, path: str) -> None:
        run = module.forward
        wrap: list[Callable[[Tensor], Any]] = []  # known from the first pass

        def forward(*args: Any, **kwargs: Any) -> Any:
            if number == 0 and self._latents.numel():
                args, kwargs = with_latents(args, kwargs, self._latents)
            if number < self._start:
                return wrap[0](given_latents(args, kwargs))
            if self._recorded is not None:
                self._recorded.append(given_latents(args, kwargs))
            result = run(*args, **kwargs)
            wrap[:] = [wrapper(result, path)]
            return result

        module.forward = forward


def given_latents(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the residual stream among a layer's arguments: the first floating-point tensor."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.is_floating_point())


def with_latents(args: tuple[Any, ...], kwargs: dict[str, Any], latents: Tensor) -> tuple[Any, Any]:
    """Return a layer's arguments with another residual stream."""
    old = given_latents(args, kwargs)
    return tuple(latents if a is old else a for a in args), {k: latents if a is old else a for k, a in kwargs.items()}


def first_tensor(result: Any) -> Tensor:
    """Return a module's result, or the first tensor of its tuple."""
    tensor: Tensor = result if isinstance(result, Tensor) else result[0]
    return tensor


def wrapper(result: Any, path: str) -> Callable[[Tensor], Any]:
    """Return what wraps a tensor as a module wraps its result: the tensor itself, or first in a tuple.

    Raises:
        ComponentError: When the module returns something else.
    """
    if isinstance(result, Tensor):
        return lambda tensor: tensor
    if isinstance(result, tuple) and result and isinstance(result[0], Tensor):
        rest = (None,) * (len(result) - 1)
        return lambda tensor: (tensor, *rest)
    raise ComponentError(
        f"{path!r} returns a {type(result).__name__}; passes that start at a layer need layers and attention blocks "
        f"that return a tensor, or a tuple that starts with one"
    )
