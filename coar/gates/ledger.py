"""The arithmetic of gates on edges: the outputs of writers in a pass, the inputs of readers, and the gradients of both.

With the output o[w] of writer w, its replacement c[w] and d[w] = o[w] - c[w], the input of a reader is

    residual - sum over w of lacking[w] * d[w]    or    base + sum over w of (1 - lacking[w]) * d[w],

where lacking is 1 - keep and base is the sum of the replacements and of the biases that belong to no writer. Each form
takes the writers with a term other than 0 in it, so near the full model little is subtracted, in a small circuit
little is added, and rounding loses nothing in either.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK = 32 * 2**20  # bytes of readers' inputs, before their norm, in memory at a time
DENSE = 0.5  # share of writers with a term other than 0 from which on all are taken, which saves a copy of their part
Norm = Callable[[Tensor], Tensor]  # of the last axis


class Projection(NamedTuple):
    """A linear layer with outputs for several readers.

    Attributes:
        plain: The layer, which computes all outputs from one input.
        weight: (readers, size, width).
        bias: (outputs,); None if there is none.
        order: (outputs,) the number of each output in the order of the readers; None if they are in that order.
    """

    plain: Callable[[Tensor], Tensor]
    weight: Tensor
    bias: Tensor | None
    order: Tensor | None

    def __call__(self, normed: Tensor) -> Tensor:
        """Return the (rows, positions, outputs) of (rows, positions, readers, width), those of each from its own."""
        y = torch.einsum("btrd,rsd->btrs", normed, self.weight).flatten(2)
        if self.order is not None:
            y = y[..., self.order]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def descend(self, slopes: Tensor, *, alike: bool) -> Tensor:
        """Return the gradient by the inputs, from that by the (rows, positions, outputs).

        It has shape (rows, positions, readers, width), with one reader for all if they take the same input.
        """
        if self.order is not None:
            slopes = slopes[..., self.order.argsort()]
        if alike:
            return (slopes @ self.weight.flatten(0, 1))[:, :, None]
        return torch.einsum("btrs,rsd->btrd", slopes.reshape(*slopes.shape[:2], *self.weight.shape[:2]), self.weight)


class Module(NamedTuple):
    """What modules with one common input compute from the inputs of their readers.

    Attributes:
        norm: The norm of the readers' inputs; None if there is none.
        projections: The modules, if they are linear layers with several readers; else their one reader's input is the
            result.
    """

    norm: Norm | None
    projections: tuple[Projection, ...]

    def normed(self, taken: Tensor) -> Tensor:
        """Return the norm of (rows, positions, readers, width)."""
        return taken if self.norm is None else self.norm(taken)

    def results(self, normed: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return each module's (rows, positions, features), from (rows, positions, readers, width) or of one reader."""
        normed = normed.to(dtype)
        if not self.projections:
            return (normed[:, :, 0],)
        if normed.shape[2] == 1:
            return tuple(projection.plain(normed[:, :, 0]) for projection in self.projections)
        parts = torch.split(normed, [len(projection.weight) for projection in self.projections], 2)
        return tuple(projection(part) for projection, part in zip(self.projections, parts, strict=True))

    def descend(self, slopes: Sequence[Tensor], *, alike: bool) -> Tensor:
        """Return the (rows, positions, readers, width) gradient by the normed inputs, from those by the results.

        If all readers take the same input, there is one reader.
        """
        if not self.projections:
            return slopes[0][:, :, None]
        pairs = zip(self.projections, slopes, strict=True)
        parts = [projection.descend(part, alike=alike) for projection, part in pairs]
        if alike:
            return torch.stack(parts).sum(0)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


class Terms(NamedTuple):
    """The terms of the sums that are the readers' inputs.

    Attributes:
        weights: (rows, readers, writers) factors of the entries of writers, or (1, readers, writers) for all rows.
        writers: Numbers of these writers; None for all before the readers.
        added: Whether they are added to the base; otherwise to the residual stream.
    """

    weights: Tensor
    writers: Tensor | None
    added: bool

    @property
    def alike(self) -> bool:
        """Whether there is no term, so that all readers take the same input."""
        return not self.weights.shape[2]


def terms_of(lacking: Tensor, dtype: torch.dtype) -> Terms:
    """Return the terms of the form with fewer writers.

    Args:
        lacking: (rows, readers, writers), of all writers before the readers; or (1, readers, writers) for all rows.
        dtype: Type of the factors.
    """
    lacking = lacking.detach()
    some, kept = ((lacking != value).flatten(0, 1).any(0) for value in (0, 1))
    added = int(kept.sum()) < int(some.sum())
    weights, taken = (1 - lacking, kept) if added else (-lacking, some)
    writers = None if int(taken.sum()) > DENSE * len(taken) else taken.nonzero()[:, 0]
    return Terms((weights if writers is None else weights[..., writers]).to(dtype), writers, added)


class Ledger:
    """The outputs of all writers in one forward pass, less their replacements.

    It takes rows x positions x writers x width numbers of memory, and the same again in a backward pass. Positions up
    to the first token of all rows, where nothing is replaced, are not in it.

    Args:
        writers: Number of writers.
        first: (rows,) the position of each row's first token; nothing is replaced up to and at it.
        stream: (rows, positions, width) the residual stream; the ledger is on its device.
        dtype: Type of the entries.
        chunk: Bytes of readers' inputs in memory at a time; the backward pass recomputes their norms, chunk by chunk.

    Attributes:
        skipped: Number of first positions that have no entries.
        kept: (rows, positions) booleans, True where nothing is replaced.
        entries: (rows, positions - skipped, writers, width).
        gradient: The gradient of the loss by the entries, of the same shape, during a backward pass.
    """

    def __init__(self, writers: int, first: Tensor, stream: Tensor, dtype: torch.dtype, chunk: int = CHUNK) -> None:
        rows, positions, width = stream.shape
        self.skipped = min(int(first.min()) + 1, positions)
        self.kept = torch.arange(positions, device=stream.device) <= first.to(stream.device)[:, None]
        self._ragged = bool(self.kept[:, self.skipped :].any())
        self.entries = stream.new_empty(rows, positions - self.skipped, writers, width, dtype=dtype)
        self.gradient: Tensor | None = None
        self._chunk = chunk

    def token(self) -> Tensor:
        """Return the token of a new pass.

        It goes into all reads and writes, and each write returns the next one, so that the backward pass runs what came
        later first. The ledger does not hold it, since the graph of the pass holds the ledger.
        """
        return self.entries.new_zeros(1, dtype=torch.float32).requires_grad_(torch.is_grad_enabled())

    def write(self, token: Tensor, number: int, outputs: Tensor, replacement: Tensor | None) -> Tensor:
        """Enter the outputs of one or more consecutive writers, and return the next token.

        Args:
            token: The token of the last write.
            number: Number of the first writer.
            outputs: (rows, positions, writers, width).
            replacement: (writers, width) constants, or a tensor of the entries' shape; None for zeros.
        """
        following: Tensor = _Write.apply(token, outputs, replacement, self, number)
        return following

    def read(
        self,
        token: Tensor,
        x: Tensor,
        residual: Tensor,
        base: Tensor | None,
        lacking: Tensor,
        terms: Terms,
        module: Module,
    ) -> tuple[Tensor, ...]:
        """Return the (rows, positions, features) that modules with one common input compute.

        Args:
            token: The token of the last write.
            x: (rows, positions, width) their common input in the pass.
            residual: (rows, positions, width) the residual stream that it was computed from.
            base: (width,) or (rows, positions, width), what terms are added to, if they are added to a base.
            lacking: (rows | 1, readers, writers), to which gradients flow.
            terms: The terms of this.
            module: The modules.
        """
        start = residual if base is None else torch.where(self.kept[:, :, None], residual, base.to(residual.dtype))
        result: tuple[Tensor, ...] = _Read.apply(token, start, lacking, x.detach(), terms, self, module)
        return result

    def clear(self, values: Tensor) -> None:
        """Set (rows, positions - skipped, writers, width) values to 0 where nothing is replaced."""
        if self._ragged:
            values.masked_fill_(self.kept[:, self.skipped :, None, None], 0)

    def chunks(self, readers: int, *, alike: bool) -> Iterator[tuple[slice, slice, bool]]:
        """Yield rows and positions to be computed together, and whether all readers take the same input there.

        Args:
            readers: Number of readers.
            alike: Whether they take the same input everywhere.
        """
        rows, width, positions = len(self.entries), self.entries.shape[-1], self.kept.shape[1]
        together = max(1, self._chunk // (readers * width * self.entries.element_size()))
        ends = [0, positions] if alike else [0, self.skipped, positions]
        for start, stop in pairwise(ends):
            step = max(1, together // max(1, stop - start))
            for row in range(0, rows, step):
                for at in range(start, stop, together):
                    yield slice(row, row + step), slice(at, min(at + together, stop)), alike or start < self.skipped

    def part(self, whole: Tensor, rows: slice, positions: slice) -> Tensor:
        """Return the part of the entries, or their gradient, at rows and positions of the pass."""
        return whole[rows, positions.start - self.skipped : positions.stop - self.skipped]

    def taken(self, start: Tensor, terms: Terms, rows: slice, positions: slice) -> Tensor:
        """Return (rows, positions, readers, width) inputs of readers, before their norm."""
        part = self.part(self.entries, rows, positions)
        weights, readers = terms.weights, terms.weights.shape[1]
        part = part[:, :, : weights.shape[2]] if terms.writers is None else part.index_select(2, terms.writers)
        n, length, _, width = part.shape
        sums = part.new_empty(n, length, readers, width)
        if len(weights) == 1:
            torch.bmm(weights.expand(n * length, -1, -1), part.flatten(0, 1), out=sums.view(-1, readers, width))
        else:
            for own, of_row, entries in zip(sums, weights[rows], part, strict=True):
                torch.bmm(of_row.expand(length, -1, -1), entries, out=own)
        own_start = start[rows, positions, None]
        return sums.add_(own_start) if sums.dtype == start.dtype else sums + own_start

    def descend_lacking(self, slopes: Tensor, rows: slice, positions: slice, by_lacking: Tensor) -> None:
        """Add the gradients by what is lacking, from (rows, positions, readers, width) slopes."""
        entries = self.part(self.entries, rows, positions)[:, :, : by_lacking.shape[2]]
        for i, (own, of_row) in enumerate(zip(slopes.to(entries.dtype), entries, strict=True)):
            product = torch.bmm(own, of_row.transpose(1, 2)).to(by_lacking.dtype).sum(0)
            by_lacking[0 if len(by_lacking) == 1 else rows.start + i] -= product

    def descend_entries(self, slopes: Tensor, rows: slice, positions: slice, terms: Terms) -> None:
        """Add the gradients by the entries, from (rows, positions, readers, width) slopes."""
        if self.gradient is None:
            self.gradient = torch.zeros_like(self.entries)
        gradient, weights = self.part(self.gradient, rows, positions), terms.weights
        for i, (own, by_entry) in enumerate(zip(slopes.to(gradient.dtype), gradient, strict=True)):
            factors = weights[0 if len(weights) == 1 else rows.start + i].T.expand(len(own), -1, -1)
            if terms.writers is None:
                by_entry[:, : weights.shape[2]].baddbmm_(factors, own)
            else:
                by_entry.index_add_(1, terms.writers, torch.bmm(factors, own))


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, token: Tensor, outputs: Tensor, replacement: Tensor | None, ledger: Ledger, number: int
    ) -> Tensor:
        part = ledger.entries[:, :, number : number + outputs.shape[2]]
        later = outputs[:, ledger.skipped :]
        if replacement is None:
            part.copy_(later)
        else:
            torch.sub(later, replacement, out=part)
        ledger.clear(part)
        ctx.ledger, ctx.number, ctx.shape, ctx.dtype = ledger, number, outputs.shape, outputs.dtype
        ctx.replacement = None if replacement is None else (replacement.shape, replacement.dtype)
        return token.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ledger: Ledger = ctx.ledger
        by_outputs = by_replacement = None
        if ledger.gradient is not None:
            part = ledger.gradient[:, :, ctx.number : ctx.number + ctx.shape[2]]
            ledger.clear(part)
            if ctx.needs_input_grad[1]:
                by_outputs = torch.nn.functional.pad(part.to(ctx.dtype), (0, 0, 0, 0, ledger.skipped, 0))
            if ctx.needs_input_grad[2]:
                by_replacement = -part.to(_wide(part.dtype)).sum((0, 1))
        elif ctx.needs_input_grad[2]:
            by_replacement = gradients[0].new_zeros(ctx.replacement[0])
        return gradients[0], by_outputs, by_replacement, None, None


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        _token: Tensor,
        start: Tensor,
        lacking: Tensor,
        x: Tensor,
        terms: Terms,
        ledger: Ledger,
        module: Module,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(start, lacking, terms.weights)
        ctx.ledger, ctx.terms, ctx.module, ctx.precision = ledger, terms, module, _autocast(start)
        if terms.alike and not terms.added:  # the residual stream
            return module.results(x.clone()[:, :, None], x.dtype)
        parts = []
        for rows, positions, alike in ledger.chunks(lacking.shape[1], alike=terms.alike):
            with _exactly(start):
                taken = start[rows, positions, None] if alike else ledger.taken(start, terms, rows, positions)
            parts.append((rows, positions, module.results(module.normed(taken), x.dtype)))
        if len(parts) == 1:
            return parts[0][2]
        shape = start.shape[:2]
        results = tuple(part.new_empty(*shape, part.shape[-1]) for part in parts[0][2])
        for rows, positions, own in parts:
            for result, part in zip(results, own, strict=True):
                result[rows, positions] = part
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        start, lacking, weights = ctx.saved_tensors
        ledger, terms, module = ctx.ledger, ctx.terms._replace(weights=weights), ctx.module
        readers = lacking.shape[1]
        if lacking.shape[2] == ledger.entries.shape[2]:  # the last reader, with which a backward pass begins
            ledger.gradient = None
        by_start = torch.zeros_like(start)
        by_lacking = torch.zeros_like(lacking, dtype=_wide(lacking.dtype))
        for rows, positions, kept in ledger.chunks(readers, alike=False):
            alike = kept or terms.alike
            together = kept or (terms.alike and not ctx.needs_input_grad[2])
            with _exactly(start):
                if alike:
                    taken = start[rows, positions, None].expand(-1, -1, 1 if together else readers, -1)
                else:
                    taken = ledger.taken(start, terms, rows, positions)
            taken = taken.detach().requires_grad_()
            with ctx.precision():
                slopes = module.descend([gradient[rows, positions] for gradient in gradients], alike=together)
                if module.norm is not None:
                    with torch.enable_grad():
                        normed = module.norm(taken)
                    (slopes,) = torch.autograd.grad(normed, taken, slopes.to(normed.dtype))
            by_start[rows, positions] = slopes.sum(2)
            if not kept:
                with _exactly(start):
                    if ctx.needs_input_grad[2]:
                        ledger.descend_lacking(slopes, rows, positions, by_lacking)
                    if not alike:
                        ledger.descend_entries(slopes, rows, positions, terms)
        return torch.zeros(1, device=start.device), by_start, by_lacking.to(lacking.dtype), *[None] * 4


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which sums over positions are made: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def _autocast(like: Tensor) -> Callable[[], AbstractContextManager[Any]]:
    """Return a function that makes a context with the present state of automatic mixed precision."""
    kind = like.device.type
    on, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype, enabled=on)


def _exactly(like: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which products have the type of their factors."""
    return torch.autocast(like.device.type, enabled=False)
