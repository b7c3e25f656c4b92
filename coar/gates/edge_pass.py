"""One forward pass with gates on edges: the residual stream where modules read it, and what each of them takes."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from coar.components.decoder import Decoder, Reading
from coar.errors import AblationError
from coar.gates.ledger import Ledger, Module, Terms, terms_of


class Joint(NamedTuple):
    """Modules that read with one common norm.

    Attributes:
        readings: They and their readers.
        first: Number of the first of their pairs of a reader and a writer before it, among all.
    """

    readings: tuple[Reading, ...]
    first: int

    @property
    def before(self) -> int:
        """Number of writers before them."""
        return self.readings[0].before

    @property
    def pairs(self) -> slice:
        """Where their pairs are among all."""
        return slice(self.first, self.first + self.before * sum(len(reading.labels) for reading in self.readings))


def joints_of(decoder: Decoder) -> list[Joint]:
    """Return the modules that read, those with one common norm together."""
    found: list[Joint] = []
    first = 0
    for _, readings in groupby(decoder.readings, lambda one: (one.norm, one.block, one.before)):
        found.append(Joint(tuple(readings), first))
        first = found[-1].pairs.stop
    return found


class EdgePass:
    """One forward pass: the residual stream at every place that reads it, and the ledger of the writers' outputs.

    Args:
        model: The model.
        decoder: The writers and readers.
        joints: The modules that read.
        keep: (pairs,) mask, or (rows, pairs) masks; None to record the writers' outputs.
        constants: (writers, width) replacements.
        source: Recorded outputs for another example each, which then are the replacements.
        tokens: (rows, positions) booleans, False at padding; None if every position is a token.

    Attributes:
        streams: The residual stream at every place that reads it.
        results: Results of modules that read together, until they are called, by path.
        ledger: The writers' outputs.
        tokens: As given.
        shape: Rows and positions.
    """

    def __init__(
        self,
        model: nn.Module,
        decoder: Decoder,
        joints: Sequence[Joint],
        keep: Tensor | None,
        constants: Tensor,
        source: "EdgePass | None",
        tokens: Tensor | None,
    ) -> None:
        self.streams: dict[str, Tensor] = {}
        self.results: dict[str, Tensor] = {}
        self.ledger: Ledger | None = None
        self.tokens = tokens
        self.shape = (0, 0)
        self._model, self._decoder, self._joints = model, decoder, joints
        self._keep, self._constants, self._source = keep, constants, source
        self._lacking: dict[Joint, Tensor] = {}
        self._terms: dict[Joint, Terms] = {}
        self._token = constants.new_zeros(1)
        self._needed: Tensor | None = None
        self._by_mask = False
        self._summed: tuple[int, Tensor | int] = (0, 0)

    def watch(self, site: str, stream: Tensor) -> None:
        """Record the residual stream at a place that reads it; the first one is the embedding's output."""
        self.streams[site] = stream
        if self.ledger is None:
            self._start(stream)
            self.write(0, 1, lambda: stream[:, :, None])

    def write(self, number: int, count: int, outputs: Callable[[], Tensor]) -> None:
        """Enter (rows, positions, writers, width) outputs of consecutive writers, if a reader takes one of them.

        Args:
            number: The first writer.
            count: Number of writers.
            outputs: Computes their outputs.
        """
        ledger, writers = self.started(), slice(number, number + count)
        if self._needed is not None and not self._needed[writers].any():
            return
        replacement: Tensor | None = None
        if self._source is not None:
            replacement = self._of_source(writers)
        elif self._keep is not None:
            replacement = self._constants[writers]
        self._token = ledger.write(self._token, number, outputs(), replacement)

    def _of_source(self, writers: slice) -> Tensor:
        """Return the (rows, positions, writers, width) outputs for other examples, at the ledger's positions."""
        entries = self._source.started().entries  # type: ignore[union-attr]
        there = entries[:, entries.shape[1] - self.started().entries.shape[1] :, writers]
        return there.repeat(self.shape[0] // len(there), 1, 1, 1)

    def is_plain(self, joint: Joint) -> bool:
        """Return whether modules compute from the residual stream itself, and no gradient by a mask needs more."""
        terms = self._terms[joint]
        return terms.alike and not terms.added and not self._by_mask

    def read(self, joint: Joint, x: Tensor, module: Module) -> tuple[Tensor, ...]:
        """Return the (rows, positions, features) that modules compute from the inputs of their readers.

        Args:
            joint: The modules.
            x: Their input in the pass.
            module: Their norm and projections.
        """
        first, shape, terms = joint.readings[0], (*self.shape, self._decoder.width), self._terms[joint]
        stream = self.streams[first.norm or first.site].view(shape)
        base = self._base(joint.before) if terms.added else None
        return self.started().read(self._token, x.view(shape), stream, base, self._lacking[joint], terms, module)

    def _base(self, before: int) -> Tensor:
        """Return the sum of the replacements of the first writers, and of the biases that belong to no writer.

        It has shape (width,), or (rows, positions, width) where outputs for other examples are the replacements.
        """
        biases = [
            self._model.get_submodule(site).bias
            for site, writers in groupby(self._decoder.writers[1:before], lambda writer: writer.site)
            if next(writers).head is not None
        ]
        total = sum((bias for bias in biases if isinstance(bias, Tensor)), self._constants.new_zeros(1))
        if self._source is None:
            return self._constants[:before].sum(0) + total
        number, summed = self._summed
        if before > number:
            summed = summed + self._of_source(slice(number, before)).sum(2)
            self._summed = before, summed
        return pad(summed + total, (0, 0, self.started().skipped, 0))

    def started(self) -> Ledger:
        """Return the ledger; raise `AblationError` if the residual stream was not read yet."""
        if self.ledger is None:
            raise AblationError(
                f"a layer of {self._decoder.path!r} wrote before the first one read the residual stream; call the "
                f"model as a whole"
            )
        return self.ledger

    def _start(self, stream: Tensor) -> None:
        self.shape = rows, positions = self._check_shape(stream)
        first = torch.zeros(rows, dtype=torch.long, device=stream.device)
        if self.tokens is not None:
            first = self.tokens.long().argmax(1)
        if self._source is not None:
            self._check_source(rows, positions)
        kind = stream.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else stream.dtype
        self.ledger = Ledger(len(self._decoder.writers), first, stream, dtype)
        self._token = self.ledger.token()
        if self._keep is not None:
            keep = self._keep if self._keep.ndim == 2 else self._keep[None]
            if rows % len(keep):
                raise AblationError(
                    f"{len(keep)} masks were given for {rows} rows; give a number of masks that divides {rows}"
                )
            self._set_terms(1 - (keep if len(keep) == 1 else keep.repeat_interleave(rows // len(keep), 0)), dtype)

    def _set_terms(self, lacking: Tensor, dtype: torch.dtype) -> None:
        """Split (rows, pairs) of what is lacking by modules, and find the writers that any reader takes."""
        self._by_mask = torch.is_grad_enabled() and lacking.requires_grad
        needed = torch.full((len(self._decoder.writers),), self._by_mask, device=lacking.device)
        for joint in self._joints:
            own = self._lacking[joint] = lacking[:, joint.pairs].view(len(lacking), -1, joint.before)
            terms = self._terms[joint] = terms_of(own, dtype)
            needed[slice(joint.before) if terms.writers is None else terms.writers] = True
        self._needed = needed.cpu()

    def _check_shape(self, stream: Tensor) -> tuple[int, int]:
        if stream.ndim != 3 or (self.tokens is not None and self.tokens.shape != stream.shape[:2]):
            mask = None if self.tokens is None else tuple(self.tokens.shape)
            raise AblationError(
                f"the first layer of {self._decoder.path!r} was given a tensor of shape {tuple(stream.shape)} with an "
                f"attention mask of shape {mask}; (texts, positions, features) and (texts, positions) were expected"
            )
        return stream.shape[0], stream.shape[1]

    def _check_source(self, rows: int, positions: int) -> None:
        """Raise `AblationError` unless the other examples have a token at every position of a token of the examples."""
        source = self._source
        shape = source.shape if source is not None else (0, 0)
        fits = shape[1] == positions and shape[0] and rows % shape[0] == 0
        if fits and source is not None and source.tokens is not None:
            there = source.tokens.repeat(rows // shape[0], 1)
            own = torch.ones_like(there) if self.tokens is None else self.tokens
            fits = not bool((own & ~there).any())
        if not fits:
            raise AblationError(
                f"ablated edges carry outputs for other examples, position by position: {rows} texts of {positions} "
                f"positions were given, and other texts of shape {tuple(shape)} that lack tokens there; give pairs of "
                f"texts with the same number of tokens, padded on the same side"
            )
