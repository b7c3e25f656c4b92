"""The arithmetic of a gate: keep * (y + kept) + (1 - keep) * ablated and its gradients, in few passes over y."""

from typing import Any

import torch
from torch import Tensor

from coar.gates.channels import along


def blend(
    y: Tensor, keep: Tensor, ablated: Tensor, offset: Tensor | None, axis: int, out: Tensor | None = None
) -> Tensor:
    """Return y blended channel by channel.

    Args:
        y: The activations; axis 0 is the batch.
        keep: (channels,) mask, or (batch, channels) with one mask per entry of the batch.
        ablated: (channels,) constants that replace what is ablated.
        offset: (channels,) constants: `kept` minus `ablated`; None where all are 0.
        axis: Axis of y along which the channels lie.
        out: Tensor for the result under one mask, which then has no gradients; it may be y itself.
    """
    if keep.ndim == 1:
        shape = along(axis, y)
        mask = keep.to(y.dtype).view(shape)
        constant = ablated if offset is None else ablated + keep.to(ablated) * offset
        constant = constant.to(y.dtype).view(shape)
        if out is not None and y.stride(axis) == 1:  # at other strides it is several times slower than two passes
            return torch.addcmul(constant, y, mask, out=out)
        return y * mask + constant if out is None else torch.mul(y, mask, out=out).add_(constant)
    if torch._C._functorch.peek_interpreter_stack() is not None:  # inside of vmap, which takes no such Function
        rows = [len(y), *along(axis, y)[1:]]
        constant = ablated if offset is None else ablated + keep.to(ablated) * offset
        return y * keep.to(y.dtype).view(rows) + constant.to(y.dtype).view(
            rows if constant.ndim > 1 else along(axis, y)
        )
    blended: Tensor = _Blend.apply(y, keep, ablated, offset, axis)
    return blended


class _Blend(torch.autograd.Function):
    """One mask per entry of the batch, with gradients by activations, mask and constants."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, keep: Tensor, ablated: Tensor, offset: Tensor | None, axis: int) -> Tensor:
        ctx.axis, ctx.offset = axis % y.ndim, offset
        constant = ablated if offset is None else ablated + keep.to(ablated) * offset
        mask = keep.to(y.dtype)
        ctx.save_for_backward(y, mask)
        return _scale(y, mask, constant.to(y.dtype), ctx.axis)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = gradients
        y, mask = ctx.saved_tensors
        others = [i for i in range(1, y.ndim) if i != ctx.axis]
        by_keep = _sum(slope * y.conj(), others)
        by_ablated = by_offset = None
        if ctx.offset is not None:
            by_constant = _sum(slope, others)  # (batch, channels)
            by_keep = by_keep + by_constant * ctx.offset
            if ctx.needs_input_grad[2]:
                by_ablated, by_offset = by_constant.sum(0), (by_constant * mask).sum(0)
        by_y = _scale(slope, mask, None, ctx.axis) if ctx.needs_input_grad[0] else None
        return by_y, by_keep, by_ablated, by_offset, None


def _scale(y: Tensor, mask: Tensor, constant: Tensor | None, axis: int) -> Tensor:
    """Return y * mask + constant, with (batch, channels) masks and (channels,) or (batch, channels) constants.

    Where channels are innermost in memory, mask and constant are first repeated along a row of pixels: kernels run
    several times faster over long inner loops (ten times for 16 channels in bfloat16 on a CPU).
    """
    rows = len(y)
    if constant is not None and constant.ndim == 1:
        constant = constant.expand(1, -1)
    if y.ndim == 4 and axis == 1 and y.is_contiguous(memory_format=torch.channels_last):
        _, channels, height, width = y.shape
        out = torch.empty_like(y)  # not a view of the product, which layers that follow could not write into
        flat, flat_out = (t.permute(0, 2, 3, 1).view(rows, height, width * channels) for t in (y, out))
        many = mask.repeat(1, width)[:, None]
        _multiply_add(flat, many, None if constant is None else constant.repeat(1, width)[:, None], flat_out)
        return out
    shape = along(axis, y)[1:]
    constant = None if constant is None else constant.reshape(len(constant), *shape)
    return _multiply_add(y, mask.view(rows, *shape), constant, None)


def _multiply_add(y: Tensor, mask: Tensor, constant: Tensor | None, out: Tensor | None) -> Tensor:
    return torch.mul(y, mask, out=out) if constant is None else torch.addcmul(constant, y, mask, out=out)


def _sum(values: Tensor, axes: list[int]) -> Tensor:
    """Sum over all axes except batch and channels."""
    real = values.real if values.is_complex() else values  # masks and constants are
    return real.sum(axes).float() if axes else real.float()
