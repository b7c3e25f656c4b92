"""The writers and readers of a decoder-only transformer, found by one plain pass and the gradients of another.

The residual stream of such a model is a sum. Writers add to it: the embedding, every attention head and every
feed-forward block (MLP). Readers take it, most of them after a norm: the queries, keys and values of every head, every
MLP, and the first module after the last layer.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from coar.components.attention import attention_heads
from coar.components.layers import expert_stack_of, is_linear, unwrapped
from coar.components.ports import Block, Port, ports_of
from coar.components.table import Component
from coar.components.trace import Trace, is_inside, random_tokens, trace
from coar.errors import ComponentError

EXACT, COARSE = 1e-4, 5e-2  # largest error of the sum, as a share of a token's largest entry: float32, lower precision
ROWS, POSITIONS = 2, 5  # texts and tokens of the plain pass


class Writer(NamedTuple):
    """A part of the model that adds to the residual stream.

    Attributes:
        label: `embed`, `L9.H6`, `L9.mlp`, or `L9.attn` for all heads of a layer under one norm.
        site: Path of the module that returns the writer's output; for the embedding, of the first module that reads.
        head: First index and number of the features of the site's input that make up a head; the head writes their
            product with the site's weight. None if the writer writes the whole output.
    """

    label: str
    site: str
    head: tuple[int, int] | None = None


class Reading(NamedTuple):
    """A module that reads the residual stream, and its readers.

    Attributes:
        site: Path of the module.
        norm: Path of the norm between the residual stream and the module; None if there is none.
        before: Number of writers that write before it.
        block: Label of the block that reads: `L10.attn`, `L10.mlp` or `out`.
        labels: A label for each reader: `L10.H0.q`, `L10.mlp` or `out`; `L10.G0.k` if heads share keys and values.
        feeds: For each reader, the labels of the writers that compute their outputs from it: heads, an MLP, or none
            after the last layer.
        rows: The outputs of a projection in the order of its readers, the same number for each; None if the whole
            module is one reader.
    """

    site: str
    norm: str | None
    before: int
    block: str
    labels: tuple[str, ...]
    feeds: tuple[tuple[str, ...], ...]
    rows: tuple[int, ...] | None = None


class DecoderLayer(NamedTuple):
    """A layer of a decoder-only transformer.

    Attributes:
        path: Path of the layer.
        block: Path of its attention block.
        written: Path of the module whose output the attention adds to the residual stream: the output projection, or
            the norm after it.
        mlp: Path of the module whose output the MLP adds to the stream; None if the layer has no MLP.
    """

    path: str
    block: str
    written: str
    mlp: str | None


@dataclass(frozen=True)
class Decoder:
    """The writers and readers of a decoder-only transformer; an edge is a reader and a writer before it.

    Attributes:
        path: Path of the module that takes the tokens' embeddings or numbers, and their attention mask.
        width: Features of the residual stream.
        layers: The layers in their order.
        writers: All writers, in the order in which they write; the embedding is the first.
        readings: All modules that read, in the order in which they do.
    """

    path: str
    width: int
    layers: tuple[DecoderLayer, ...]
    writers: tuple[Writer, ...]
    readings: tuple[Reading, ...]


def find_decoder(model: nn.Module, *, causal: bool = True) -> Decoder:
    """Find the writers and readers of a decoder-only transformer.

    Attention blocks and their heads are those of `attention_heads`. A layer is the part of the model's list of layers
    that contains a block; its MLP consists of its other children with linear layers. Two passes over a few random
    tokens find the rest: norms before and after blocks, parallel blocks, and the outputs of projections that are
    queries, keys and values. The first pass also checks that each module reads the sum of all earlier writes.

    Args:
        model: The model.
        causal: Whether a model whose tokens see later ones is refused.

    Raises:
        ComponentError: When the model is an encoder, has an encoder, is on several devices, or its residual stream is
            not such a sum; the message names the module.
    """
    model = unwrapped(model)
    _check_kind(model)
    passed = trace(model, random_tokens(model, ROWS, POSITIONS))
    layers = _layers(model, passed)
    blocks = [Block(layer.block, _projections(passed, layer), layer.heads) for layer in layers]
    ports = ports_of(model, blocks, causal=causal)
    draft = _Draft(passed)
    found = [_add_layer(draft, layer, block, own) for layer, block, own in zip(layers, blocks, ports, strict=True)]
    draft.read_last()
    return Decoder(_owner(layers), draft.width, tuple(found), tuple(draft.writers), tuple(draft.readings))


@dataclass(frozen=True)
class _Layer:
    """A layer: its path, the label of its number, its attention block with its heads, and its MLP, first to last."""

    path: str
    label: str
    block: str
    heads: tuple[Component, ...]
    mlp: tuple[str, str] | None


def _check_kind(model: nn.Module) -> None:
    places = dict.fromkeys(parameter.device for parameter in model.parameters() if not parameter.is_meta)
    if len(places) > 1:
        raise ComponentError(
            f"{type(model).__name__} is split over {', '.join(map(str, places))}, and edges are found and gated on one "
            f"device; load the model onto one, without device_map, or use attention_heads and modules"
        )
    configs = [getattr(module, "config", None) for module in model.modules()]
    if any(getattr(config, "is_encoder_decoder", False) is True for config in configs):
        raise ComponentError(
            f"{type(model).__name__} is an encoder-decoder; only decoder-only language models, such as GPT-2 or "
            f"Llama, have edges: use attention_heads and modules for this model"
        )


def _layers(model: nn.Module, passed: Trace) -> list[_Layer]:
    """Return the layers in the order in which their attention blocks are called."""
    heads: dict[str, list[Component]] = {}
    for head in attention_heads(model):
        heads.setdefault(head.name.rpartition("head[")[0].removesuffix("."), []).append(head)
    called = sorted((block for block in heads if block in passed), key=passed.index)
    if not called:
        raise ComponentError(f"no attention block of {type(model).__name__} is called with token numbers alone")
    found: list[_Layer] = []
    for block in called:
        path = _layer_of(model, block)
        if any(layer.path == path for layer in found):
            raise ComponentError(
                f"{path!r} calls two attention blocks; edges need layers with one: use attention_heads and modules"
            )
        number = path.rpartition(".")[2]
        label = f"L{number}" if number.isdecimal() else f"L{len(found)}"
        found.append(_Layer(path, label, block, tuple(heads[block]), _mlp(model, passed, path, block)))
    return found


def _layer_of(model: nn.Module, block: str) -> str:
    """Return the path of the part of a list of modules that contains a block; without a list, of the block's parent."""
    path = block
    while path:
        parent = path.rpartition(".")[0]
        if isinstance(model.get_submodule(parent), nn.ModuleList | nn.Sequential):
            return path
        path = parent
    return block.rpartition(".")[0]


def _owner(layers: list[_Layer]) -> str:
    """Return the path of the module that holds the list of all layers."""
    owners = {layer.path.rpartition(".")[0].rpartition(".")[0] for layer in layers}
    if len(owners) > 1:
        raise ComponentError(f"attention blocks are in several lists of layers, of {sorted(owners)}; edges need one")
    return owners.pop()


def _mlp(model: nn.Module, passed: Trace, path: str, block: str) -> tuple[str, str] | None:
    """Return the first and the last called of a layer's children, besides its attention, that have linear layers."""
    found = []
    for name, child in model.get_submodule(path).named_children():
        own = f"{path}.{name}" if path else name
        holds = any(is_linear(part) or expert_stack_of(part) is not None for part in _with_weights(child))
        if holds and own in passed and not (block == own or is_inside(block, own)):
            found.append(own)
    found.sort(key=passed.index)
    return (found[0], found[-1]) if found else None


def _with_weights(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if part._parameters]


def _projections(passed: Trace, layer: _Layer) -> tuple[str, ...]:
    """Return the paths of the linear layers of a block that read the block's input."""
    last = layer.heads[0].site
    linear = [c for c in passed.calls if is_linear(c.module) and is_inside(c.path, layer.block) and c.path != last]
    for call in linear:
        passed.index(call.path)
        first = linear[0].values[0]
        if call.values[0] is None or first is None or not torch.equal(call.values[0], first):
            raise ComponentError(
                f"{call.path!r} reads neither the input nor the heads of {layer.block!r}; low-rank projections have "
                f"no edges here: use attention_heads and modules"
            )
    if not linear:
        raise ComponentError(f"{layer.block!r} has no linear layer that computes queries, keys and values")
    return tuple(call.path for call in linear)


def _add_layer(draft: "_Draft", layer: _Layer, block: Block, ports: dict[str, tuple[Port, ...]]) -> DecoderLayer:
    """Add a layer's readers and writers in their order in the pass, and return the layer."""
    groups = sorted({port.heads for own in ports.values() for port in own if port.kind != "q"})
    before, stream = len(draft.writers), draft.stream(block.projections[0], layer.path)
    site, normed = draft.written(layer.heads[0].site, layer.path)
    for path in block.projections:
        labels: list[str] = []
        feeds: list[tuple[str, ...]] = []
        rows: list[int] = []
        for port in ports[path]:
            grouped = port.kind != "q" and len(groups) < len(layer.heads)
            name = f"G{groups.index(port.heads)}" if grouped else f"H{port.heads[0]}"
            labels.append(f"{layer.label}.{name}.{port.kind}")
            feeds.append((f"{layer.label}.attn",) if normed else tuple(f"{layer.label}.H{h}" for h in port.heads))
            rows += port.rows
        draft.read(path, layer.path, f"{layer.label}.attn", labels, feeds, tuple(rows))
    if normed:
        draft.write([Writer(f"{layer.label}.attn", site)], site)
    else:
        heads = [Writer(f"{layer.label}.H{i}", site, (h.position, h.size)) for i, h in enumerate(layer.heads)]
        draft.write(heads, site)
    if layer.mlp is None:
        return DecoderLayer(layer.path, layer.block, site, None)
    first, last = layer.mlp
    parallel = stream is not None and draft.stream(first, layer.path) is stream
    own = f"{layer.label}.mlp"
    draft.read(first, layer.path, own, [own], [(own,)], before=before if parallel else None)
    last_site, _ = draft.written(last, layer.path)
    draft.write([Writer(own, last_site)], last_site)
    return DecoderLayer(layer.path, layer.block, site, last_site)


class _Draft:
    """The readers and writers found so far, and the sums of the writers' outputs.

    Args:
        passed: The plain pass.
    """

    def __init__(self, passed: Trace) -> None:
        self.writers: list[Writer] = []
        self.readings: list[Reading] = []
        self.width = 0
        self._passed = passed
        self._sums: list[tuple[int, Tensor]] = []  # (number of writers, sum of their outputs)
        self._last, self._since = "", "the embedding"

    def stream(self, site: str, within: str) -> Tensor | None:
        """Return the tensor of the pass that is the residual stream a module reads, before its norm."""
        norm = self._norm(site, within)
        return self._passed[norm or site].given

    def _norm(self, site: str, within: str) -> str | None:
        maker = self._passed.maker(self._passed[site], within)
        if maker is None or maker.given is None or maker.returned is None:
            return None
        return maker.path if maker.given.numel() == maker.returned.numel() else None

    def read(
        self,
        site: str,
        within: str,
        block: str,
        labels: list[str],
        feeds: list[tuple[str, ...]],
        rows: tuple[int, ...] | None = None,
        before: int | None = None,
    ) -> None:
        """Add the readers of a module; check first that it reads the sum of all earlier writes."""
        norm = self._norm(site, within)
        residual = self._passed[norm or site].values[0]
        if residual is None:
            raise ComponentError(f"{site!r} was given no tensor, so it does not read the residual stream")
        if not self.writers:
            self.writers.append(Writer("embed", norm or site))
            self.width = residual.shape[-1]
            self._sums.append((1, residual.double()))
        count = len(self.writers) if before is None else max(before, 1)
        total = next(total for number, total in self._sums if number == count)
        self._check(residual, total, norm or site)
        self.readings.append(Reading(site, norm, count, block, tuple(labels), tuple(feeds), rows))
        self._last = site

    def _check(self, residual: Tensor, total: Tensor, reader: str) -> None:
        if residual.shape[-1] == self.width and residual.numel() == total.numel():
            found, expected = residual.double().reshape(-1, self.width), total.reshape(-1, self.width)
            scale = expected.abs().amax(1).clamp_min(1e-6)
            error = float(((found - expected).abs().amax(1) / scale).max())
            allowed = EXACT if residual.dtype in (torch.float32, torch.float64) else COARSE
            if error <= allowed:
                return
            seen = f"a difference of {error:.1e} of the largest entry of a token, where {allowed:.1g} is allowed"
        else:
            seen = f"its shape is {tuple(residual.shape)}, of {self.width} features"
        maker = self._passed.maker(self._passed[reader], "")
        culprit = f"{maker.path!r} returned it" if maker else f"only {self._since} has written since"
        raise ComponentError(
            f"the input of {reader!r} is not the sum of all earlier writes to the residual stream ({seen}): the sum "
            f"was right at {self._last!r}, and {culprit}; edges need a model that adds the outputs of its blocks to a "
            f"stream unchanged: use attention_heads and modules for this one"
        )

    def written(self, site: str, within: str) -> tuple[str, bool]:
        """Return the path of the module whose output is written, and whether it is a norm after the site."""
        call = self._passed[site]
        taker = self._passed.taker(call, within)
        width = None if call.returned is None else call.returned.numel()
        if taker is not None and taker.returned is not None and taker.returned.numel() == width:
            return taker.path, True
        return site, False

    def write(self, writers: list[Writer], site: str) -> None:
        """Add writers whose outputs sum to a module's output, except for a bias."""
        self.writers += writers
        values = self._passed[site].values[1]
        _, total = self._sums[-1]
        if values is None or values.numel() != total.numel():
            shape = None if values is None else tuple(values.shape)
            raise ComponentError(
                f"{site!r} returned {shape}, which cannot be added to a residual stream of {tuple(total.shape)}; edges "
                f"need a model that adds the outputs of its blocks to a stream: use attention_heads and modules for "
                f"this one"
            )
        self._sums.append((len(self.writers), total + values.double().view_as(total)))
        self._since = repr(site)

    def read_last(self) -> None:
        """Add the reader after the last layer: the first module with weights that is called after the last writer."""
        start = self._passed.index(self.writers[-1].site) + 1
        for call in self._passed.calls[start:]:
            leaf = not any(True for _ in call.module.children()) and call.module._parameters
            if leaf and call.given is not None and call.given.shape[-1] == self.width:
                self.read(call.path, call.path, "out", ["out"], [()])
                return
        raise ComponentError("no module reads the residual stream after the last layer, such as a norm or a head")
