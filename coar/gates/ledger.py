"""The arithmetic of gates on edges: the outputs of writers in a pass, the inputs of readers, and the gradients of both.

With the output o[w] of writer w and its replacement c[w], the input of a reader is
residual - sum over w of lacking[w] * (o[w] - c[w]), where lacking is 1 - keep. Near the full model little is
subtracted, so rounding loses nothing there. A module whose readers lack nothing takes the residual unchanged, at no
cost.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

CHUNK = 32 * 2**20  # bytes of readers' inputs, before their norm, in memory at a time
Compute = Callable[[Tensor], Tensor]  # from (rows, positions, readers, width) to (rows, positions, features)


class Ledger:
    """The outputs of all writers in one forward pass, less their replacements.

    It takes rows x positions x writers x width numbers of memory, and the same again in a backward pass.

    Args:
        writers: Number of writers.
        first: (rows,) the position of each row's first token; nothing is replaced up to and at it.
        stream: (rows, positions, width) the residual stream; the ledger is on its device.
        dtype: Type of the entries.
        chunk: Bytes of readers' inputs in memory at a time; the backward pass recomputes what readers compute, chunk by
            chunk.

    Attributes:
        entries: (rows, positions, writers, width).
        gradient: The gradient of the loss by the entries, of the same shape, during a backward pass.
        kept: (rows, positions) booleans, True where nothing is replaced.
    """

    def __init__(self, writers: int, first: Tensor, stream: Tensor, dtype: torch.dtype, chunk: int = CHUNK) -> None:
        rows, positions, width = stream.shape
        self.entries = torch.empty(rows, positions, writers, width, device=stream.device, dtype=dtype)
        self.gradient: Tensor | None = None
        self.kept = torch.arange(positions, device=stream.device) <= first.to(stream.device)[:, None]
        self._chunk = chunk
        # an input of all reads and later writes, so that the backward pass runs these first
        self._token = torch.zeros(1, device=stream.device, requires_grad=torch.is_grad_enabled())

    def write(self, number: int, outputs: Tensor, replacement: Tensor | None) -> None:
        """Enter the outputs of one or more consecutive writers.

        Args:
            number: Number of the first writer.
            outputs: (rows, positions, writers, width).
            replacement: (writers, width) constants, or a tensor of the outputs' shape; None for zeros.
        """
        self._token = _Write.apply(self._token, outputs, replacement, self, number)

    def read(self, residual: Tensor, lacking: Tensor, compute: Compute) -> Tensor:
        """Return the (rows, positions, features) that a module computes from the inputs of its readers.

        Args:
            residual: (rows, positions, width).
            lacking: (rows, readers, writers), of the first writers; or (1, readers, writers), the same for all rows.
            compute: The function of the module, position by position.
        """
        result: Tensor = _Read.apply(self._token, residual, lacking, self, compute)
        return result

    def chunks(self, readers: int) -> Iterator[tuple[slice, slice]]:
        """Yield rows and positions to be computed together."""
        rows, positions, _, width = self.entries.shape
        together = max(1, self._chunk // (readers * width * self.entries.element_size()))
        if together >= positions:
            step = together // positions
            yield from ((slice(at, at + step), slice(None)) for at in range(0, rows, step))
        else:
            for row in range(rows):
                yield from ((slice(row, row + 1), slice(at, at + together)) for at in range(0, positions, together))

    def taken(self, residual: Tensor, lacking: Tensor, rows: slice, positions: slice, *, whole: bool) -> Tensor:
        """Return (rows, positions, readers, width) inputs of readers; with `whole`, nothing is lacking."""
        if whole:
            return residual[rows, positions, None].expand(-1, -1, lacking.shape[1], -1)
        part = self.entries[rows, positions, : lacking.shape[2]]
        n, length, _, width = part.shape
        readers = lacking.shape[1]
        lost = part.new_empty(n, length, readers, width)
        if len(lacking) == 1:
            torch.bmm(lacking.expand(n * length, -1, -1), part.flatten(0, 1), out=lost.view(-1, readers, width))
        else:
            for own, of_row, entries in zip(lost, lacking[rows], part, strict=True):
                torch.bmm(of_row.expand(length, -1, -1), entries, out=own)
        return residual[rows, positions, None] - lost

    def descend_lacking(self, slopes: Tensor, rows: slice, positions: slice, by_lacking: Tensor) -> None:
        """Add the gradients by what is lacking, from (rows, positions, readers, width) slopes."""
        entries = self.entries[rows, positions, : by_lacking.shape[2]]
        for i, (own, of_row) in enumerate(zip(slopes.to(entries.dtype), entries, strict=True)):
            product = torch.bmm(own, of_row.transpose(1, 2)).float().sum(0)
            by_lacking[0 if len(by_lacking) == 1 else rows.start + i] -= product

    def descend_entries(self, slopes: Tensor, rows: slice, positions: slice, lacking: Tensor) -> None:
        """Add the gradients by the entries, from (rows, positions, readers, width) slopes."""
        if self.gradient is None:
            self.gradient = torch.zeros_like(self.entries)
        gradient = self.gradient[rows, positions, : lacking.shape[2]]
        for i, (own, by_entry) in enumerate(zip(slopes.to(gradient.dtype), gradient, strict=True)):
            weights = lacking[0 if len(lacking) == 1 else rows.start + i].T
            by_entry.baddbmm_(weights.expand(len(own), -1, -1), own, alpha=-1)


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, token: Tensor, outputs: Tensor, replacement: Tensor | None, ledger: Ledger, number: int
    ) -> Tensor:
        part = ledger.entries[:, :, number : number + outputs.shape[2]]
        part.copy_(outputs if replacement is None else outputs - replacement)
        part.masked_fill_(ledger.kept[:, :, None, None], 0)
        ctx.ledger, ctx.number, ctx.writers, ctx.dtype = ledger, number, outputs.shape[2], outputs.dtype
        return token.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ledger: Ledger = ctx.ledger
        if ledger.gradient is None:
            return gradients[0], None, None, None, None
        part = ledger.gradient[:, :, ctx.number : ctx.number + ctx.writers]
        part.masked_fill_(ledger.kept[:, :, None, None], 0)
        by_outputs = part.to(ctx.dtype) if ctx.needs_input_grad[1] else None
        by_replacement = -part.float().sum((0, 1)) if ctx.needs_input_grad[2] else None
        return gradients[0], by_outputs, by_replacement, None, None


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, _token: Tensor, residual: Tensor, lacking: Tensor, ledger: Ledger, compute: Compute
    ) -> Tensor:
        ctx.ledger, ctx.compute, ctx.precision = ledger, compute, _autocast(residual)
        ctx.whole = whole = not bool(lacking.any())
        ctx.save_for_backward(residual, lacking)
        weights = lacking.to(ledger.entries.dtype)
        parts = []
        for rows, positions in ledger.chunks(lacking.shape[1]):
            with _exactly(residual):
                taken = ledger.taken(residual, weights, rows, positions, whole=whole)
            parts.append((rows, positions, compute(taken)))
        if len(parts) == 1:
            return parts[0][2]
        result = parts[0][2].new_empty(*residual.shape[:2], parts[0][2].shape[-1])
        for rows, positions, part in parts:
            result[rows, positions] = part
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        residual, lacking = ctx.saved_tensors
        ledger: Ledger = ctx.ledger
        weights = lacking.to(ledger.entries.dtype)
        if lacking.shape[2] == ledger.entries.shape[2]:  # the last reader, with which a backward pass begins
            ledger.gradient = None
        by_residual, by_lacking = torch.zeros_like(residual), torch.zeros_like(lacking, dtype=torch.float32)
        for rows, positions in ledger.chunks(lacking.shape[1]):
            with _exactly(residual):
                taken = ledger.taken(residual, weights, rows, positions, whole=ctx.whole).requires_grad_()
            with torch.enable_grad(), ctx.precision():
                part = ctx.compute(taken)
            (slopes,) = torch.autograd.grad(part, taken, gradients[0][rows, positions].to(part.dtype))
            by_residual[rows, positions] = slopes.sum(2)
            with _exactly(residual):
                if ctx.needs_input_grad[2]:
                    ledger.descend_lacking(slopes, rows, positions, by_lacking)
                if not ctx.whole:
                    ledger.descend_entries(slopes, rows, positions, weights)
        return torch.zeros(1, device=residual.device), by_residual, by_lacking.to(lacking.dtype), None, None


def _autocast(like: Tensor) -> Callable[[], AbstractContextManager[Any]]:
    """Return a function that makes a context with the present state of automatic mixed precision."""
    kind = like.device.type
    on, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype, enabled=on)


def _exactly(like: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which products have the type of their factors."""
    return torch.autocast(like.device.type, enabled=False)
