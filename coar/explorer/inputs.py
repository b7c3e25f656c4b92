"""Which parts of a picture and which tokens of a text an example's output depends on: gradient times input."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from coar.examples import call_model, device_of
from coar.explorer.activations import CELLS, SIDE
from coar.forward.copies import device_copy
from coar.outputs.base import RelativeOutput
from coar.study import Study

BATCH = 32  # examples per forward and backward pass


def input_maps(study: Study, rows: np.ndarray, notes: list[str], *, device: str = "auto") -> np.ndarray | None:
    """Return, for examples, the sums of gradient times input over parts of a picture, or at tokens of a text.

    The gradient is that of the study's output in the unablated model, by a picture's pixels or by the embeddings of
    tokens. To first order, a sum is the change of the output when its inputs are kept instead of set to 0 (Shrikumar et
    al. 2016, "Not just a black box").

    Args:
        study: The study.
        rows: Positions of the examples.
        notes: Gets a sentence with the reason where the model has no such gradient.
        device: Where to compute.

    Returns:
        (examples, `CELLS`) sums as shares of the largest magnitude in the example: over `SIDE` x `SIDE` parts of a
        picture, row by row; or at the first tokens of a text, without padding. None where the inputs are neither, the
        output compares with the unablated model, or there is no gradient.
    """
    if isinstance(study.output, RelativeOutput):
        return None
    net = device_copy(study.model, device)
    examples, found = study.examples.subset(rows), []
    for start in range(0, len(examples), BATCH):
        inputs, targets = examples.block(start, start + BATCH)
        try:
            made = _of_block(study, net, inputs, targets.to(device_of(net)))
        except (NotImplementedError, RuntimeError) as error:  # torch's errors for operations without a derivative
            notes.append(f"No maps of inputs: the output has no gradient by them ({str(error).splitlines()[0]}).")
            return None
        if made is None:
            return None
        found.append(made.cpu().numpy())
    whole = np.concatenate(found)
    largest = np.abs(whole).max(axis=1, keepdims=True)
    shares: np.ndarray = whole / np.where(largest > 0, largest, 1)
    return shares


def _of_block(study: Study, net: Any, inputs: Any, targets: Tensor) -> Tensor | None:
    """Return (examples, `CELLS`) sums of gradient times input; None where inputs are neither pictures nor texts."""
    place = targets.device
    if isinstance(inputs, dict) and "input_ids" in inputs and hasattr(net, "get_input_embeddings"):
        kept: list[Tensor] = []

        def keep(module: Any, args: Any, result: Tensor) -> Tensor:  # noqa: ARG001
            kept.append(result.detach().requires_grad_())
            return kept[-1]

        handle = net.get_input_embeddings().register_forward_hook(keep)
        try:
            output = study.output.read(call_model(net, inputs), targets)
        finally:
            handle.remove()
        (gradient,) = torch.autograd.grad(output.sum(), kept[:1])
        return _tokens((gradient * kept[0]).sum(-1).detach(), inputs.get("attention_mask"))
    name = "pixel_values" if isinstance(inputs, dict) else None
    picture = inputs if name is None else inputs.get(name)
    if not isinstance(picture, Tensor) or picture.ndim != 4 or not picture.is_floating_point():
        return None
    picture = picture.to(place).requires_grad_()
    output = study.output.read(call_model(net, picture if name is None else {**inputs, name: picture}), targets)
    (gradient,) = torch.autograd.grad(output.sum(), [picture])
    sums = functional.adaptive_avg_pool2d((gradient * picture).sum(1, keepdim=True), (SIDE, SIDE))
    return sums.flatten(1).detach()


def _tokens(sums: Tensor, there: Tensor | None) -> Tensor:
    """Return (examples, `CELLS`) sums at the first tokens that are no padding; 0 beyond a text."""
    if there is not None:
        present = there.bool().to(sums.device)
        order = (~present).long().argsort(dim=1, stable=True)
        sums = sums.masked_fill(~present, 0).take_along_dim(order, dim=1)
    return functional.pad(sums[:, :CELLS], (0, max(0, CELLS - sums.shape[1])))
