"""The graph of a decoder's edges: which kept edges lie on a path from the embedding to the output."""

import torch
from torch import Tensor, nn

from coar.components.decoder import find_decoder
from coar.components.edges import component_of_pairs
from coar.components.table import Components
from coar.errors import ComponentError


class EdgeGraph:
    """The pairs of a reader and a writer before it, their components, and the writers that each reader feeds.

    Args:
        model: The decoder.
        components: Its edges, or writers for all their edges; pairs without a component are always kept.

    Raises:
        ComponentError: When the components are no edges, or are of another model.
    """

    def __init__(self, model: nn.Module, components: Components) -> None:
        if not components.of_edges:
            raise ComponentError(
                f"a circuit consists of edges or nodes, and the first component is the {components[0].kind} "
                f"{components[0].name!r}; use coar.edges(model) or coar.nodes(model)"
            )
        decoder = find_decoder(model, causal=False)  # a table of its edges exists
        numbers = {writer.label: i for i, writer in enumerate(decoder.writers)}
        self._writers, self._size = len(decoder.writers), len(components)
        self._readings = [(reading.before, len(reading.labels)) for reading in decoder.readings]
        self._feeds = [_incidence(reading.feeds, numbers) for reading in decoder.readings]
        self._component = torch.tensor(component_of_pairs(decoder, components))

    def connected(self, keep: Tensor) -> Tensor:
        """Return (..., components) booleans: the kept components with a pair on a path from the embedding to the end.

        A path alternates between kept edges and heads or MLPs. What does not reach the end has no effect. A writer that
        no input reaches writes the same for all inputs, except at the first token, so a constant can replace it.

        Args:
            keep: (..., components) masks; what is above 0 is kept.
        """
        pairs = self._pairs(keep)
        live = pairs & self._forward(pairs)
        return self._components(live & self._backward(live), keep)

    def reaching_end(self, keep: Tensor) -> Tensor:
        """Return (..., components) booleans: the kept components whose removal can change the model's result."""
        pairs = self._pairs(keep)
        return self._components(pairs & self._backward(pairs), keep)

    def attachable(self, keep: Tensor) -> Tensor:
        """Return (..., components) booleans: what would be connected if it were added to a connected mask alone."""
        pairs = self._pairs(keep)
        return self._components(self._forward(pairs) & self._backward(pairs), keep)

    def _pairs(self, keep: Tensor) -> Tensor:
        """Return (masks, pairs) booleans."""
        rows = (keep > 0).reshape(-1, self._size).cpu()
        everything = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.bool)], 1)
        return everything[:, self._component]

    def _components(self, pairs: Tensor, like: Tensor) -> Tensor:
        """Return (..., components) booleans, True where any of a component's pairs is."""
        found = torch.zeros(len(pairs), self._size + 1, dtype=torch.int32)
        found.index_add_(1, self._component, pairs.int())
        return (found[:, :-1] > 0).reshape(like.shape).to(like.device)

    def _forward(self, pairs: Tensor) -> Tensor:
        """Return the pairs whose writer is the embedding, or computes its output from an input that it reaches."""
        reached = torch.zeros(len(pairs), self._writers, dtype=torch.bool)
        reached[:, 0] = True
        parts, at = [], 0
        for (before, readers), feeds in zip(self._readings, self._feeds, strict=True):
            own = pairs[:, at : at + readers * before].view(-1, readers, before)
            from_reached = reached[:, None, :before].expand_as(own)
            parts.append(from_reached.flatten(1))
            reached |= ((own & from_reached).any(2).float() @ feeds) > 0
            at += readers * before
        return torch.cat(parts, 1)

    def _backward(self, pairs: Tensor) -> Tensor:
        """Return the pairs whose reader is the last one, or feeds a writer that reaches it."""
        reaching = torch.zeros(len(pairs), self._writers, dtype=torch.bool)
        parts, stop = [], pairs.shape[1]
        for (before, readers), feeds in zip(reversed(self._readings), reversed(self._feeds), strict=True):
            own = pairs[:, stop - readers * before : stop].view(-1, readers, before)
            useful = (reaching.float() @ feeds.T) > 0 if feeds.any() else torch.ones(len(pairs), readers).bool()
            parts.append(useful[:, :, None].expand_as(own).flatten(1))
            reaching[:, :before] |= (own & useful[:, :, None]).any(1)
            stop -= readers * before
        return torch.cat(parts[::-1], 1)


def _incidence(feeds: tuple[tuple[str, ...], ...], numbers: dict[str, int]) -> Tensor:
    """Return (readers, writers) numbers, 1 where a reader feeds a writer."""
    found = torch.zeros(len(feeds), len(numbers))
    for reader, labels in enumerate(feeds):
        found[reader, [numbers[label] for label in labels]] = 1
    return found
