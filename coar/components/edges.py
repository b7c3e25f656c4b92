"""The finders of edges between the writers and readers of a decoder-only transformer, and of its writers alone."""

from torch import nn

from coar.components.decoder import Decoder, find_decoder
from coar.components.table import Component, Components
from coar.errors import ComponentError

ARROW = " -> "


def edges(model: nn.Module, *, ports: bool = True) -> Components:
    """Find the edges of a decoder-only transformer: one component per reader and writer before it.

    Writers add to the residual stream: the embedding (with positions), every attention head and every MLP; where a norm
    follows the attention's output projection (Gemma 2 and 3), all heads of a layer are one writer. Readers take the
    stream, most after a norm: the queries of every head, the keys and the values of every head or of every group that
    shares them, every MLP, and what comes after the last layer. GPT-2 small has 32,491 edges.

    An ablated edge changes what its reader takes: instead of what its writer wrote in this very pass it takes the
    writer's replacement. So r, what a reader takes before its norm, is

        r = residual + sum over writers w of (1 - keep[w, r]) * (replacement[w] - o[w])

    and what a reader then computes reaches all that follows. Replacements are constants of writers, which all edges of
    a writer share. The bias of an output projection is no writer's and always there. Nothing is replaced up to the
    first token of a text, to which many heads attend when they have nothing to do.

    Edges are labelled `L9.H6 -> L10.H0.q`: from head 6 of layer 9 to the queries of head 0 of layer 10. The other
    labels are `embed`, `L9.mlp` and `L9.attn` of writers, and `L10.H0.k`, `L10.G0.k` of a group, `L10.mlp` and `out` of
    readers.

    Args:
        model: The model, or one that holds it; it must run on token numbers alone.
        ports: Whether queries, keys and values of each head are readers of their own; else each layer's attention is
            one reader, `L10.attn`.

    Raises:
        ComponentError: When the model is no decoder-only transformer, or something else than a sum of what was written
            before is read; the message names the module.
    """
    decoder = find_decoder(model)
    rows: dict[str, Component] = {}
    for reading in decoder.readings:
        for label in reading.labels if ports else (reading.block,):
            for number, writer in enumerate(decoder.writers[: reading.before]):
                name = f"{writer.label}{ARROW}{label}"
                if name not in rows:
                    first = number * decoder.width
                    rows[name] = Component(name, "edge", reading.site, "edge", -1, first, decoder.width)
    return Components(rows.values())


def nodes(model: nn.Module) -> Components:
    """Find the writers of a decoder-only transformer: one component for all edges that leave a writer.

    They are the embedding, every attention head and every MLP, labelled `embed`, `L9.H6` and `L9.mlp`; see `edges`.

    Args:
        model: The model, or one that holds it; it must run on token numbers alone.

    Raises:
        ComponentError: As `edges` does.
    """
    decoder = find_decoder(model)
    width = decoder.width
    return Components(
        Component(writer.label, "node", writer.site, "edge", -1, number * width, width)
        for number, writer in enumerate(decoder.writers)
    )


def component_of_pairs(decoder: Decoder, components: Components) -> list[int]:
    """Return which component each pair of a reader and a writer before it belongs to, reader by reader.

    A pair that no component has gets the number of components.

    Raises:
        ComponentError: When a component is no edge or writer of this model, or two have the same pair.
    """
    index, none = {row.name: i for i, row in enumerate(components)}, len(components)
    used: set[int] = set()
    found: list[int] = []
    for reading in decoder.readings:
        for label in reading.labels:
            for writer in decoder.writers[: reading.before]:
                names = {f"{writer.label}{ARROW}{label}", f"{writer.label}{ARROW}{reading.block}", writer.label}
                own = [index[name] for name in names if name in index]
                if len(own) > 1:
                    raise ComponentError(
                        f"{components[own[0]].name!r} overlaps {components[own[1]].name!r}; leave one out of the table"
                    )
                found.append(own[0] if own else none)
                used.update(own)
    strange = set(range(none)) - used
    if strange:
        raise ComponentError(
            f"this model has no {components[min(strange)].name!r}; the components belong to another model: find those "
            f"of this one with coar.edges"
        )
    return found
