"""The layers of a decoder-only transformer: latents of a plain pass, and logits continued from one latent."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from coar.components.decoder import DecoderLayer
from coar.components.trace import is_inside, random_tokens
from coar.equivalence import Kind, compare, rounding
from coar.errors import ComponentError, ExamplesError
from coar.forward.cut_decoder import CutDecoder, first_tensor, given_latents, with_latents, wrapper
from coar.inputs import Inputs


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

    The model itself computes everything, on a copy. In a continued pass the layers before the start pass on the given
    latent, and the attention of later layers returns constants. So norms, MLPs, the head and whatever the model does
    besides are the model's own. Each latent is continued as a text of one token.

    Args:
        model: The model.
        device: Where it runs; by default where the model is.

    Attributes:
        width: Features of the residual stream.
        vocabulary: Number of logits.
        device: Where the copy is.

    Raises:
        ComponentError: When the model is not a decoder-only transformer, or does something between its layers that a
            latent and constants do not determine; the message names the layer.
    """

    def __init__(self, model: nn.Module, device: torch.device | None = None) -> None:
        self._decoder = CutDecoder(model, device)
        self.width, self.device = self._decoder.width, self._decoder.device
        self._given, self._first = torch.empty(0), 0  # latents and first layer of a continued pass
        self._constants: Tensor | None = None  # of its attention; None in a plain pass
        self._attention: list[Tensor] = []
        for number, layer in enumerate(self._decoder.layers):
            self._switch(number, layer)
        self.vocabulary = self._check()

    def __len__(self) -> int:
        return len(self._decoder)

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
            attention: (layers - start, width) what the attention of each layer that runs adds to the stream; None if
                none does.
        """
        tokens = torch.zeros(len(latents), 1, dtype=torch.long, device=self.device)
        self._given, self._first = latents, start
        self._constants = latents.new_empty(0) if attention is None else attention
        try:
            logits = self._decoder.logits_from(start, latents[:, None], tokens)
        finally:
            self._constants = None
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
            hidden = given_latents(args, kwargs).clone()
            hidden[rows, position] += moves.to(hidden.dtype)
            return with_latents(args, kwargs, hidden)

        module = self._decoder.model.get_submodule(self._decoder.layers[layer].path)
        handle = module.register_forward_pre_hook(move, with_kwargs=True)
        try:
            logits = self._plain(inputs)[2]
        finally:
            handle.remove()
        return logits[rows, position].float()

    def _plain(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Return (layers, texts, positions, width) states and attention, and (texts, positions, vocabulary) logits."""
        self._attention = []
        with torch.no_grad():
            states, logits = self._decoder.latents(inputs)
        attention = torch.stack(self._attention).view_as(states)
        self._attention = []
        return states, attention, logits

    def _switch(self, number: int, layer: DecoderLayer) -> None:
        """Let a layer's attention run, or add a constant to the residual stream."""
        block = self._decoder.model.get_submodule(layer.block)
        run_block = block.forward
        inner = is_inside(layer.written, layer.block)  # so the block returns what is written, else the norm does
        wrap: list[Callable[[Tensor], Any]] = []  # known from the first pass
        features: list[int] = []

        def block_forward(*args: Any, **kwargs: Any) -> Any:
            if self._constants is not None:
                constant = self._constant(number)
                return wrap[0](constant if inner else constant.new_zeros(*constant.shape[:2], features[0]))
            result = run_block(*args, **kwargs)
            wrap[:], features[:] = [wrapper(result, layer.block)], [first_tensor(result).shape[-1]]
            if inner:
                self._attention.append(first_tensor(result))
            return result

        block.forward = block_forward
        if inner:
            return
        norm = self._decoder.model.get_submodule(layer.written)
        run_norm = norm.forward

        def norm_forward(*args: Any, **kwargs: Any) -> Any:
            if self._constants is not None:
                return self._constant(number)
            self._attention.append(run_norm(*args, **kwargs))
            return self._attention[-1]

        norm.forward = norm_forward

    def _constant(self, number: int) -> Tensor:
        """Return (tokens, 1, width) the constant of a layer's attention in the continued pass."""
        if self._constants is None or not len(self._constants):
            raise ComponentError(f"layer {number} runs in a pass that has no constants for its attention")
        return self._constants[number - self._first].to(self._given.dtype).expand(len(self._given), 1, -1)

    def _check(self) -> int:
        """Return the number of logits.

        Raises:
            ComponentError: When a token, continued with its own attention, does not give the model's logits.
        """
        model = self._decoder.model
        tokens = random_tokens(model, 1, 1)
        states, attention, logits = self._plain(tokens)
        for start in range(len(self) + 1):
            latent = states[start, :, 0] if start < len(self) else self._last_state(tokens)
            with torch.no_grad():
                found = self.continued(latent, start, attention[start:, 0, 0])
            compared = compare(logits[:, 0].float(), found, Kind.REORDERED, precision=rounding(model))
            if not compared.agrees:
                place = self._decoder.layers[min(start, len(self) - 1)].path
                raise ComponentError(
                    f"the logits that {type(model).__name__} continues from its own latent at {place!r} {compared}; a "
                    f"lens needs a model whose later layers depend on the residual stream alone"
                )
        return logits.shape[-1]

    def _last_state(self, tokens: Tensor) -> Tensor:
        """Return the (texts, width) residual stream after the last layer at the first token."""
        found: list[Tensor] = []
        last = self._decoder.model.get_submodule(self._decoder.layers[-1].path)
        handle = last.register_forward_hook(lambda _module, _args, result: found.append(first_tensor(result)))
        try:
            self._plain(tokens)
        finally:
            handle.remove()
        return found[0].reshape(len(tokens), -1, self.width)[:, 0]


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
