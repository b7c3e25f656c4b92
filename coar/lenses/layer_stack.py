"""A decoder-only transformer cut between its layers: latents of a plain pass, and logits continued from a latent."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from coar.components.decoder import DecoderLayer, find_decoder
from coar.components.layers import unwrapped
from coar.components.trace import is_inside, random_tokens
from coar.equivalence import Kind, compare, rounding
from coar.errors import ComponentError, ExamplesError
from coar.examples import call_model
from coar.inputs import Inputs
from coar.model_copy import independent_copy
from coar.outputs.base import find_logits


class Latents(NamedTuple):
    """The numbers of a plain pass over texts, at every token but the first of each text.

    Attributes:
        states: (layers, tokens, width) residual stream before each layer.
        attention: (layers, tokens, width) what each layer's attention adds to it.
        logits: (tokens, vocabulary) float32 logits of the model.
        text: (tokens,) number of the text of each token.
        position: (tokens,) its position.
    """

    states: Tensor
    attention: Tensor
    logits: Tensor
    text: Tensor
    position: Tensor


class LayerStack:
    """The layers of a decoder-only transformer, run from any of them on.

    The model itself computes everything, on a copy whose layers and attention blocks are switched: in a plain pass they
    run and their tensors are recorded; in a continued pass the layers before the start return the given latent, and
    the attention of later layers returns constants. So norms, MLPs, the head and whatever the model does besides are
    the model's own. Each latent is continued as a text of one token.

    Args:
        model: The model.

    Attributes:
        layers: The layers in their order.
        width: Features of the residual stream.
        vocabulary: Number of logits.
        device: Where the model is.

    Raises:
        ComponentError: When the model is not a decoder-only transformer, or does something between its layers that a
            latent and constants do not determine; the message names the layer.
    """

    def __init__(self, model: nn.Module) -> None:
        decoder = find_decoder(model)
        self.layers, self.width = decoder.layers, decoder.width
        self._model = independent_copy(unwrapped(model)).eval().requires_grad_(False)
        self.device = next(self._model.parameters()).device
        for module in self._model.modules():
            config = getattr(module, "config", None)
            with suppress(AttributeError):
                config.use_cache = False  # type: ignore[union-attr]
        self._start: int | None = None  # None: a plain pass
        self._latent = torch.empty(0)
        self._constants: Tensor | None = None
        self._states: list[Tensor] = []
        self._attention: list[Tensor] = []
        for number, layer in enumerate(self.layers):
            self._switch(number, layer)
        self._check()

    def __len__(self) -> int:
        return len(self.layers)

    def latents(self, inputs: Inputs) -> Latents:
        """Run the model on texts and return the numbers at every token but the first of each text.

        The first token is left out because many heads attend to it by default, so its latents are unlike others.
        """
        states, attention, logits = self._plain(inputs)
        real = _attention_mask(inputs, logits.shape[:2]).to(self.device)
        text, position = torch.where(real & (real.cumsum(1) > 1))
        read = (slice(None), text, position)
        return Latents(states[read], attention[read], logits[text, position].float(), text, position)

    def continued(self, latents: Tensor, start: int, attention: Tensor | None = None) -> Tensor:
        """Return (tokens, vocabulary) float32 logits that the layers from `start` on make of latents.

        Args:
            latents: (tokens, width) residual stream before layer `start`.
            start: Number of the first layer that runs; the number of layers if none does.
            attention: (layers - start, width) what the attention of each layer that runs adds to the stream.
        """
        self._start, self._latent, self._constants = start, latents[:, None], attention
        try:
            logits = find_logits(self._model(torch.zeros(len(latents), 1, dtype=torch.long, device=self.device)))
        finally:
            self._start = self._constants = None
        return logits[:, 0].float()

    def steered(self, inputs: Inputs, layer: int, position: Tensor, moves: Tensor) -> Tensor:
        """Return (texts, vocabulary) float32 logits of the model with moved latents, at the moved positions.

        Args:
            inputs: The texts.
            layer: Number of the layer before which latents are moved.
            position: (texts,) position of the moved latent of each text.
            moves: (texts, width) what is added to it.
        """
        rows = torch.arange(len(position), device=self.device)

        def move(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = _given(args, kwargs).clone()
            hidden[rows, position] += moves.to(hidden.dtype)
            return _replaced(args, kwargs, hidden)

        module = self._model.get_submodule(self.layers[layer].path)
        handle = module.register_forward_pre_hook(move, with_kwargs=True)
        try:
            logits = self._plain(inputs)[2]
        finally:
            handle.remove()
        return logits[rows, position].float()

    def _plain(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Return (layers, texts, positions, width) states and attention, and (texts, positions, vocabulary) logits."""
        self._states, self._attention = [], []
        with torch.no_grad():
            logits = find_logits(call_model(self._model, inputs))
        shape = (len(self.layers), *logits.shape[:2], self.width)
        states, attention = (torch.stack(values).reshape(shape) for values in (self._states, self._attention))
        self._states, self._attention = [], []
        return states, attention, logits

    def _switch(self, number: int, layer: DecoderLayer) -> None:
        """Give a layer and its attention block forwards that either run or return what a continued pass gives."""
        module, block = self._model.get_submodule(layer.path), self._model.get_submodule(layer.block)
        run_layer, run_block = module.forward, block.forward
        inner = is_inside(layer.written, layer.block)  # so the block returns what is written, else the norm does
        shapes: dict[str, Callable[[Tensor], Any]] = {}

        def layer_forward(*args: Any, **kwargs: Any) -> Any:
            if self._start is None:
                self._states.append(_given(args, kwargs))
                result = run_layer(*args, **kwargs)
                shapes["layer"] = _shape_of(result, layer.path)
                return result
            hidden = self._latent if number == 0 else _given(args, kwargs)
            if number < self._start:
                return shapes["layer"](hidden)
            args, kwargs = _replaced(args, kwargs, hidden)
            return run_layer(*args, **kwargs)

        def block_forward(*args: Any, **kwargs: Any) -> Any:
            if self._start is None:
                result = run_block(*args, **kwargs)
                shapes["block"] = _shape_of(result, layer.block)
                first = _first(result)
                shapes["zeros"] = lambda hidden: hidden.new_zeros(*hidden.shape[:2], first.shape[-1])
                if inner:
                    self._attention.append(first)
                return result
            return shapes["block"](self._constant(number) if inner else shapes["zeros"](self._latent))

        module.forward, block.forward = layer_forward, block_forward
        if inner:
            return
        norm = self._model.get_submodule(layer.written)
        run_norm = norm.forward

        def norm_forward(*args: Any, **kwargs: Any) -> Any:
            if self._start is not None:
                return self._constant(number)
            self._attention.append(run_norm(*args, **kwargs))
            return self._attention[-1]

        norm.forward = norm_forward

    def _constant(self, number: int) -> Tensor:
        if self._constants is None or self._start is None:
            raise ComponentError(f"layer {number} runs in a pass that has no constants for its attention")
        constant = self._constants[number - self._start]
        return constant.to(self._latent.dtype).expand(len(self._latent), 1, -1)

    def _check(self) -> None:
        """Raise `ComponentError` unless a token, continued with its own attention, gives the model's logits."""
        inputs = random_tokens(self._model, 1, 1)
        states, attention, logits = self._plain(inputs)
        self.vocabulary = logits.shape[-1]
        for start in range(len(self.layers) + 1):
            latent = states[start, :, 0] if start < len(self.layers) else self._last_state(inputs)
            with torch.no_grad():
                found = self.continued(latent, start, attention[start:, 0, 0])
            compared = compare(logits[:, 0].float(), found, Kind.REORDERED, precision=rounding(self._model))
            if not compared.agrees:
                place = self.layers[min(start, len(self.layers) - 1)].path
                raise ComponentError(
                    f"the logits that {type(self._model).__name__} continues from its own latent at {place!r} "
                    f"{compared}; a lens needs a model whose later layers depend on the residual stream alone"
                )

    def _last_state(self, inputs: Inputs) -> Tensor:
        """Return the (texts, width) residual stream after the last layer at the first token."""
        found: list[Tensor] = []
        last = self._model.get_submodule(self.layers[-1].path)
        handle = last.register_forward_hook(lambda _module, _args, result: found.append(_first(result)))
        try:
            self._plain(inputs)
        finally:
            handle.remove()
        return found[0].reshape(-1, found[0].shape[-2], self.width)[:, 0]


def _attention_mask(inputs: Inputs, shape: torch.Size) -> Tensor:
    """Return (texts, positions) booleans, True where there is a token."""
    mask = inputs.get("attention_mask") if isinstance(inputs, dict) else None
    if mask is None:
        return torch.ones(shape, dtype=torch.bool)
    if mask.shape != shape:
        raise ExamplesError(
            f"the attention mask has shape {tuple(mask.shape)} and the logits {tuple(shape)}; a lens needs texts with "
            f"a mask over their tokens: make them with coar.token_examples"
        )
    return mask.bool()


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the residual stream among a layer's arguments: the first floating-point tensor."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.is_floating_point())


def _replaced(args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a layer's arguments with another residual stream."""
    old = _given(args, kwargs)
    return tuple(hidden if a is old else a for a in args), {k: hidden if a is old else a for k, a in kwargs.items()}


def _first(result: Any) -> Tensor:
    tensor: Tensor = result if isinstance(result, Tensor) else result[0]
    return tensor


def _shape_of(result: Any, path: str) -> Callable[[Tensor], Any]:
    """Return what wraps a tensor as a module wraps its result: the tensor itself, or first in a tuple."""
    if isinstance(result, Tensor):
        return lambda tensor: tensor
    if isinstance(result, tuple) and result and isinstance(result[0], Tensor):
        rest = (None,) * (len(result) - 1)
        return lambda tensor: (tensor, *rest)
    raise ComponentError(
        f"{path!r} returns a {type(result).__name__}; a lens needs layers that return a tensor, or a tuple that starts "
        f"with one"
    )
