"""Outputs of models that embed: similarity of a pair."""

from typing import Any

from torch import Tensor
from torch.nn import functional

from coar.errors import OutputError
from coar.outputs.base import Output


class CosineSimilarity(Output):
    """Cosine similarity of the two embeddings of a pair, between -1 and 1; targets are not read."""

    def __call__(self, result: Any, targets: Tensor) -> Tensor:
        """Return (examples,) similarities from the model's (examples, 2, width) embeddings.

        Raises:
            OutputError: When the model returned something else.
        """
        shape = tuple(result.shape) if isinstance(result, Tensor) else None
        if shape is None or len(shape) != 3 or shape[:2] != (len(targets), 2):
            given = f"a tensor of shape {shape}" if shape is not None else f"a {type(result).__name__}"
            raise OutputError(
                f"the model returned {given} for {len(targets)} pairs; a tensor of shape (pairs, 2, width) was "
                f"expected: wrap the model so that it returns both embeddings of each pair"
            )
        first, second = result.float().unbind(1)
        return functional.cosine_similarity(first, second, dim=1)
