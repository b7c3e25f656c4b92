"""The divergence of a lens from its model, token by token, in bounded memory."""

from collections.abc import Iterator

from torch import Tensor

from coar.examples import Examples
from coar.lenses.kinds import LensKind, Parameters
from coar.lenses.layer_stack import Latents, LayerStack

TEXTS = 16  # texts per plain pass
LOGIT_BYTES = 64 * 2**20  # of one array of logits


def passes(stack: LayerStack, texts: Examples) -> Iterator[tuple[int, Latents]]:
    """Yield the plain passes over texts, each with the number of its first text."""
    for first in range(0, len(texts), TEXTS):
        inputs, _ = texts.block(first, min(first + TEXTS, len(texts)))
        yield first, stack.latents(inputs)


def chunks(stack: LayerStack, tokens: int) -> Iterator[slice]:
    """Yield slices of tokens, so that their logits take at most `LOGIT_BYTES`."""
    size = max(1, LOGIT_BYTES // (4 * stack.vocabulary))
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


def divergences(kind: LensKind, stack: LayerStack, own: Parameters, passed: Latents, layer: int) -> Iterator[Tensor]:
    """Yield KL(model || lens) = sum over v of p_v (log p_v - log q_v) at each token, chunk by chunk, in nats."""
    for part in chunks(stack, len(passed.text)):
        model = passed.logits[part].log_softmax(1)
        lens = kind.logits(stack, own, passed.states[layer][part], layer).log_softmax(1)
        yield (model.exp() * (model - lens)).sum(1)
