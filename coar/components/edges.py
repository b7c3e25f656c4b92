"""The finders of a decoder-only transformer's edges between writers and readers, and of its writers alone."""

from torch import nn

from coar.components.decoder import Decoder, find_decoder
from coar.components.table import Component, Components
from coar.errors import ComponentError

ARROW = " -> "


def edges(model: nn.Module, *, ports: bool = True, causal: bool = True) -> Components:
    """Find the edges of a decoder-only transformer: one component for each reader and each writer before it.

    Writers add to the residual stream: the embedding (with positions), every attention head and every MLP. If a norm
    follows the attention's output projection (Gemma 2 and 3), all heads of a layer are one writer. Readers take the
    stream, most after a norm: the queries of every head, the keys and the values of every head or of every group that
    shares them, every MLP, and the first module after the last layer. GPT-2 small has 32,491 edges.

    If an edge is ablated, its reader takes the writer's replacement instead of the writer's output in the same pass. So
    the input r of a reader, before its norm, is

        r = residual + sum over writers w of (1 - keep[w, r]) * (replacement[w] - o[w])

    and the reader's result reaches all later modules. Replacements are constants of writers; all edges of a writer
    share them. The bias of an output projection belongs to no writer and is always kept. Nothing is replaced up to and
    at the first token of a text, since many heads attend to it by default.

    The label `L9.H6 -> L10.H0.q` stands for the edge from head 6 of layer 9 to the queries of head 0 of layer 10. Other
    labels of writers are `embed`, `L9.mlp` and `L9.attn`; other labels of readers are `L10.H0.k`, `L10.G0.k` for a
    group, `L10.mlp` and `out`.

    Args:
        model: The model, or a module that contains it; it must run on token numbers alone.
        ports: Whether the queries, keys and values of each head are separate readers; otherwise each layer's attention
            is one reader, `L10.attn`.
        causal: Whether a model whose tokens see later ones is refused. With False such models are taken too, if their
            residual stream is a plain sum; their first token is kept as well.

    Raises:
        ComponentError: When the model is not a decoder-only transformer, or a module reads something other than the sum
            of all earlier writes; the message names the module.
    """
    decoder = find_decoder(model, causal=causal)
    rows: dict[str, Component] = {}
    for reading in decoder.readings:
        for label in reading.labels if ports else (reading.block,):
            for number, writer in enumerate(decoder.writers[: reading.before]):
                name = f"{writer.label}{ARROW}{label}"
                if name not in rows:
                    first = number * decoder.width
                    rows[name] = Component(name, "edge", reading.site, "edge", -1, first, decoder.width)
    return Components(rows.values())


def nodes(model: nn.Module, *, causal: bool = True) -> Components:
    """Find the writers of a decoder-only transformer: one component for all edges that leave a writer.

    They are the embedding, every attention head and every MLP, labelled `embed`, `L9.H6` and `L9.mlp`; see `edges`.

    Args:
        model: The model, or a module that contains it; it must run on token numbers alone.
        causal: As in `edges`.

    Raises:
        ComponentError: As `edges` does.
    """
    decoder = find_decoder(model, causal=causal)
    width = decoder.width
    return Components(
        Component(writer.label, "node", writer.site, "edge", -1, number * width, width)
        for number, writer in enumerate(decoder.writers)
    )


def component_of_pairs(decoder: Decoder, components: Components) -> list[int]:
    """Return the component of each pair of a reader and a writer before it, reader by reader.

    A pair without a component gets the number of components.

    Raises:
        ComponentError: When a component is not an edge or writer of this model, or two components share a pair.
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
            f"this model has no {components[min(strange)].name!r}; the components belong to another model: find this "
            f"model's with coar.edges"
        )
    return found
