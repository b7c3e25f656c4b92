"""Passes over facts with corrupted subjects, in which clean states are restored at some layers and positions."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from coar.components.trace import token_embedding
from coar.equivalence import Kind, compare, rounding
from coar.errors import ComponentError
from coar.forward.cut_decoder import CutDecoder, first_tensor, wrapper
from coar.forward.logit_positions import ARGUMENT, takes
from coar.tracing.facts import Facts

KINDS = ("attention", "mlp", "layer")
LOGIT_BYTES = 64 * 2**20  # of the logits of one pass


class Cell(NamedTuple):
    """A part of the model whose clean state is restored.

    Attributes:
        kind: `attention`, `mlp`, or `layer` for the residual stream after it.
        first: Number of the first restored layer.
        last: Number of the last.
        place: Name of the restored positions.
    """

    kind: str
    first: int
    last: int
    place: str


class Restoring:
    """A decoder on facts: clean, with corrupted subjects, and with clean states restored.

    Args:
        model: The model.
        facts: The facts.
        device: Where it runs.
        kinds: Kinds of the cells to restore; clean states of other kinds are not kept.
        places: Names of their places; likewise.

    Attributes:
        facts: The facts.
        layers: Number of layers.
        embeddings: (facts, positions, width) embeddings of the tokens.
        clean: (facts,) probabilities of the answers.
        right: (facts,) booleans, True where the answer is the most probable token.
    """

    def __init__(
        self, model: nn.Module, facts: Facts, device: torch.device, kinds: Collection[str], places: Collection[str]
    ) -> None:
        self._decoder = CutDecoder(model, device)
        self.facts, self.layers = facts, len(self._decoder)
        self._embedding = token_embedding(self._decoder.model)
        self._takes = takes(self._decoder.model, ARGUMENT)
        sites: dict[str, list[str | None]] = {
            "attention": [layer.written for layer in self._decoder.layers],
            "mlp": [layer.mlp for layer in self._decoder.layers],
            "layer": [layer.path for layer in self._decoder.layers],
        }
        self._sites = {kind: sites[kind] for kind in kinds}
        self._kept = torch.stack([facts.places[name] for name in places]).any(0)  # positions with clean states
        self._row = torch.zeros_like(self._kept, dtype=torch.long)  # of each such position among the clean states
        self._row[self._kept] = torch.arange(int(self._kept.sum()), device=device)
        with torch.no_grad():
            self._record()

    def corrupted(self, subjects: Tensor, rows: Tensor, cell: Cell | None = None) -> Tensor:
        """Return probabilities of the answers with other embeddings at the subjects' tokens, with gradients by these.

        Args:
            subjects: (rows, positions, width) embeddings, of which those at subjects' tokens are taken.
            rows: Numbers of the facts.
            cell: A cell whose clean state is restored.
        """
        part = self.facts.subset(rows)
        with ExitStack() as stack:
            stack.enter_context(self._with_subjects(subjects, part.subject))
            if cell is not None:
                stack.enter_context(self._with_clean(rows, [cell] * len(rows)))
            return self._probabilities(part, self._decoder.logits(self._inputs(part.inputs)))

    def states(self, subjects: Tensor, rows: Tensor) -> Tensor:
        """Return the (layers, rows, positions, width) latents before each layer with corrupted subjects.

        Args:
            subjects: (rows, positions, width) embeddings, of which those at subjects' tokens are taken.
            rows: Numbers of the facts.
        """
        parts = []
        for own in self.passes(len(rows)):
            part = self.facts.subset(rows[own])
            with torch.no_grad(), self._with_subjects(subjects[own], part.subject):
                parts.append(self._decoder.latents(self._inputs(part.inputs))[0])
        return torch.cat(parts, dim=1)

    def unpatched(self, states: Tensor, rows: Tensor) -> Tensor:
        """Return (rows,) probabilities of the answers in the corrupted pass.

        Args:
            states: What `states` returned.
            rows: Numbers of the facts.
        """
        found = []
        for own in self.passes(len(rows)):
            part = self.facts.subset(rows[own])
            with torch.no_grad():
                logits = self._decoder.logits_from(self.layers - 1, states[-1][own], self._inputs(part.inputs))
                found.append(self._probabilities(part, logits))
        return torch.cat(found)

    def restored(self, states: Tensor, rows: Tensor, cells: Sequence[Cell]) -> Tensor:
        """Return (cells, rows) probabilities of the answers with clean states restored in the corrupted pass.

        A pass starts at the first restored layer, since earlier ones compute what they did in the corrupted pass.

        Args:
            states: What `states` returned.
            rows: Numbers of the facts.
            cells: The cells, all with the same first layer.
        """
        n, start, found = len(rows), cells[0].first, []
        for pairs in self.passes(len(cells) * n):
            own = [cells[i] for i in (pairs // n).tolist()]
            part = self.facts.subset(rows[pairs % n])
            with torch.no_grad(), self._with_clean(rows[pairs % n], own):
                inputs = self._inputs(part.inputs)
                logits = self._decoder.logits_from(start, states[start][pairs % n], inputs)
                found.append(self._probabilities(part, logits))
        return torch.cat(found).view(len(cells), n)

    def _record(self) -> None:
        """Run the clean pass: probabilities, embeddings, and the states at the places."""
        parts: list[dict[str, Any]] = []
        for rows in self.passes(len(self.facts)):
            part = self.facts.subset(rows)
            seen: dict[tuple[str, int], Tensor] = {}
            with ExitStack() as stack:
                for kind, paths in self._sites.items():
                    for number, path in enumerate(paths):
                        if path is not None:
                            stack.enter_context(self._recording(path, (kind, number), rows, seen))
                embedded: list[Tensor] = []
                hook = self._embedding.register_forward_hook(lambda _m, _a, out, to=embedded: to.append(out))
                stack.callback(hook.remove)
                logits = self._decoder.logits(part.inputs)
            self._takes = self._takes and self._agrees(part, logits)
            read = logits[torch.arange(len(part)), part.read].float()
            right = read.argmax(1) == part.answer
            parts.append({"p": self._chosen(read, part), "right": right, "embedded": embedded[0], "seen": seen})
        keys = ("p", "right", "embedded")
        self.clean, self.right, self.embeddings = (torch.cat([part[key] for part in parts]) for key in keys)
        self._clean = {key: torch.cat([p["seen"][key] for p in parts]) for key in parts[0]["seen"]}

    @contextmanager
    def _recording(
        self, path: str, key: tuple[str, int], rows: Tensor, seen: dict[tuple[str, int], Tensor]
    ) -> Iterator[None]:
        """Record what a module returns at the places of some facts, as (positions, width)."""

        def record(_module: nn.Module, _args: Any, result: Any) -> None:
            seen[key] = self._by_position(first_tensor(result), len(rows), path)[self._kept[rows]]

        handle = self._decoder.model.get_submodule(path).register_forward_hook(record)
        try:
            yield
        finally:
            handle.remove()

    def _by_position(self, value: Tensor, rows: int, path: str) -> Tensor:
        positions = self.facts.subject.shape[1]
        if value.numel() != rows * positions * self._decoder.width:
            raise ComponentError(
                f"{path!r} returned {tuple(value.shape)} for {rows} texts of {positions} tokens; a trace needs "
                f"{(rows, positions, self._decoder.width)}"
            )
        return value.view(rows, positions, self._decoder.width)

    @contextmanager
    def _with_clean(self, rows: Tensor, cells: list[Cell]) -> Iterator[None]:
        """Restore clean states, those of fact rows[i] in cell cells[i]."""
        where = torch.stack([self.facts.places[cell.place][row] for cell, row in zip(cells, rows, strict=True)])
        with ExitStack() as stack:
            for kind, number in {(cell.kind, n) for cell in cells for n in range(cell.first, cell.last + 1)}:
                chosen = [i for i, c in enumerate(cells) if c.kind == kind and c.first <= number <= c.last]
                own, columns = where[chosen].nonzero().T
                own = torch.tensor(chosen, device=rows.device)[own]
                values = self._clean[kind, number][self._row[rows[own], columns]]
                stack.enter_context(self._restoring(kind, number, own, columns, values))
            yield

    @contextmanager
    def _restoring(self, kind: str, number: int, rows: Tensor, columns: Tensor, values: Tensor) -> Iterator[None]:
        path = self._sites[kind][number]
        if path is None:
            raise ComponentError(f"layer {number} has no {kind}; leave this kind out")

        def restore(_module: nn.Module, _args: Any, result: Any) -> Any:
            tensor = first_tensor(result)
            value = tensor.view(-1, self.facts.subject.shape[1], self._decoder.width).clone()
            value[rows, columns] = values
            return wrapper(result, path)(value.view_as(tensor))

        handle = self._decoder.model.get_submodule(path).register_forward_hook(restore)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _with_subjects(self, subjects: Tensor, where: Tensor) -> Iterator[None]:
        def replace(_module: nn.Module, _args: Any, embedded: Tensor) -> Tensor:
            return torch.where(where[..., None], subjects.to(embedded.dtype), embedded)

        handle = self._embedding.register_forward_hook(replace)
        try:
            yield
        finally:
            handle.remove()

    def passes(self, count: int) -> Sequence[Tensor]:
        """Return the rows of each pass, so that its logits take at most `LOGIT_BYTES`."""
        columns = len(self._columns()) if self._takes else self.facts.subject.shape[1]
        size = max(1, LOGIT_BYTES // (4 * self._embedding.num_embeddings * columns))
        return torch.split(torch.arange(count, device=self._decoder.device), size)

    def _agrees(self, part: Facts, logits: Tensor) -> bool:
        """Return whether the model gives the same logits where only those that are read are requested."""
        found = self._decoder.logits(self._inputs(part.inputs))
        expected = logits[:, self._columns()]
        return compare(expected, found, Kind.REORDERED, precision=rounding(self._decoder.model)).agrees

    def _columns(self) -> Tensor:
        columns: Tensor = torch.unique(self.facts.read)
        return columns

    def _inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return inputs | {ARGUMENT: self._columns()} if self._takes else inputs

    def _probabilities(self, part: Facts, logits: Tensor) -> Tensor:
        columns = torch.searchsorted(self._columns(), part.read) if self._takes else part.read
        return self._chosen(logits[torch.arange(len(part)), columns].float(), part)

    def _chosen(self, logits: Tensor, part: Facts) -> Tensor:
        return logits.softmax(1)[torch.arange(len(part)), part.answer]
