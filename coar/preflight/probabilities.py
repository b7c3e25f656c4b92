"""A check of what an output reads: logits, and not the probabilities that a softmax or sigmoid makes of them."""

import torch
from torch import nn

from coar.errors import OutputError
from coar.examples import Examples
from coar.forward.devices import full_float32
from coar.forward.model_runner import ModelRunner
from coar.outputs.base import Output, find_logits
from coar.outputs.labels import BinaryMargin

SUM = 1e-3  # distance from 1 of the sum of a row of probabilities
ANSWERS = 8  # examples that are read, and numbers from which on answers between 0 and 1 alone are probabilities


def probabilities_read(model: nn.Module, output: Output, examples: Examples, *, batch_size: int | None = None) -> str:
    """Return in words that a model returns probabilities where an output reads logits, or "".

    Args:
        model: A copy made by `device_copy`.
        output: The scalar read per example.
        examples: A few examples.
        batch_size: Most examples per pass.
    """
    if output.reads_logits_of is None or (isinstance(output, BinaryMargin) and 0 < output.threshold < 1):
        return ""
    block = ModelRunner(model, output, batch_size=batch_size).load(examples, 0, len(examples))
    parts = []
    for inputs, _ in block.batches:
        with torch.inference_mode(), full_float32():
            result = model(**inputs) if isinstance(inputs, dict) else model(inputs)
        try:
            parts.append(find_logits(result).float())
        except OutputError:  # an output of one's own may read something else
            return ""
    logits = torch.cat(parts)
    if not logits.numel() or bool((logits < 0).any()) or not bool((logits <= 1).all()):
        return ""
    if output.reads_logits_of == "classes":
        found = logits.ndim > 1 and logits.shape[-1] > 1 and bool(((logits.sum(-1) - 1).abs() < SUM).all())
        seen, made, undone = "rows of numbers of at least 0 that sum to 1", "softmax", "torch.log"
    else:
        found = logits.numel() >= ANSWERS and bool((logits > 0.5).any()) and bool((logits < 0.5).any())
        seen, made, undone = "numbers between 0 and 1 alone", "sigmoid", "torch.logit"
    if not found:
        return ""
    return (
        f"{type(model).__name__} returns {seen}, which look like the probabilities after a {made}, and "
        f"{type(output).__name__} reads logits, so its numbers would not be what its formula says, and nearly equal "
        f"for all examples that the model is sure about: let the model return what it gives to the {made}, or {undone} "
        f"of what it returns"
    )
