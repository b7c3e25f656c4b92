"""The gate on all edges between the writers and readers of a decoder.

The model runs unchanged, so its residual stream is the true sum of the writers' outputs in this pass. Hooks record the
stream before norms and enter the writers' outputs in a ledger. Modules that read get, or compute, the inputs of their
readers.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from coar.components.decoder import Decoder, Reading, Writer, find_decoder
from coar.components.edges import component_of_pairs
from coar.components.layers import output_axis
from coar.components.table import Components
from coar.errors import AblationError
from coar.gates.building import GatedSite, GateKind, GateRequest
from coar.gates.channels import Channels
from coar.gates.gate import Gate
from coar.gates.hook import hook
from coar.gates.ledger import Compute, Ledger


class EdgeGate(Gate):
    """Gives every reader residual - sum over writers w of (1 - keep[w]) * (o[w] - constants[w]).

    Args:
        model: The model.
        decoder: Its writers and readers.
        channels: The component of every pair of a reader and a writer before it, and the writers' constants.
        resample: Whether ablated edges carry the writer's output for another example, see `record`.
    """

    def __init__(self, model: nn.Module, decoder: Decoder, channels: Channels, *, resample: bool = False) -> None:
        self.channels = (channels,)
        self._model, self._decoder, self._resample = model, decoder, resample
        self._constants = self._by_writer(channels.replacement)
        self._stack = ExitStack()
        self._numbers: dict[str, int] = {}  # first writer of each site
        for number, writer in enumerate(decoder.writers):
            self._numbers.setdefault(writer.site, number)

    def install(self) -> None:
        """Register hooks and replace the forward of projections; without a mask, the model runs unchanged."""
        self._keep: Tensor | None = None
        self._pass: _Pass | None = None
        self._source: _Pass | None = None
        self._recording = False
        self._seen = set[str]()
        writers: dict[str, list[Writer]] = {}
        for writer in self._decoder.writers[1:]:
            writers.setdefault(writer.site, []).append(writer)
        with ExitStack() as stack:
            decoder = self._model.get_submodule(self._decoder.path)
            stack.callback(decoder.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
            for site, own in writers.items():
                stack.callback(self._hook_writers(site, own))
            for site in dict.fromkeys(reading.norm or reading.site for reading in self._decoder.readings):
                stack.callback(hook(self._model.get_submodule(site), "input", self._watch(site)).remove)
            first = 0
            for reading in self._decoder.readings:
                pairs = len(reading.labels) * reading.before
                stack.callback(self._hook_reading(reading, slice(first, first + pairs)))
                first += pairs
            self._stack = stack.pop_all()

    def restore(self) -> None:
        """Remove the hooks, restore the forward of projections and free recorded outputs."""
        self._stack.close()
        self._pass = self._source = None

    def set(self, keeps: Sequence[Tensor]) -> None:
        """Set the (pairs,) mask, or the (rows, pairs) masks, of the next forward passes."""
        (self._keep,) = keeps

    def replace(self, constants: Sequence[Tensor]) -> None:
        """Set other (writers x width,) constants for the next forward passes; gradients reach them."""
        (flat,) = constants
        self._constants = self._by_writer(flat)

    def record(self, on: bool) -> None:
        """Start to record the outputs of writers, which discards earlier recordings; or stop."""
        self._source = None if on else self._pass
        self._recording, self._pass = on, None

    def recorded(self) -> tuple[Tensor, Tensor]:
        """Return (rows, positions, writers, width) recorded outputs, and which (rows, positions) may be replaced.

        Raises:
            AblationError: When nothing was recorded.
        """
        if self._source is None or self._source.ledger is None:
            raise AblationError("no forward pass of the decoder was recorded; call record before and after one")
        return self._source.ledger.entries, ~self._source.ledger.kept

    def confirm(self) -> None:
        """Raise `AblationError` when a writer or reader took no part in the forward passes that ran."""
        missing = [site for site in self._sites() if site not in self._seen]
        if missing:
            raise AblationError(
                f"module {missing[0]!r} was not called in the forward pass, so gates on its edges had no effect; give "
                f"inputs that reach the whole model, or find the edges of the part that they reach"
            )

    def _sites(self) -> list[str]:
        return [*self._numbers, *(reading.site for reading in self._decoder.readings)]

    def _by_writer(self, flat: Tensor) -> Tensor:
        """Return (writers, width) constants from (channels,) constants; the last writers may have none, and get 0."""
        rest = flat.new_zeros(len(self._decoder.writers) * self._decoder.width - len(flat))
        return torch.cat([flat, rest]).view(-1, self._decoder.width)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Start the pass of a call of the decoder, with the mask of its tokens."""
        if self._keep is None and not self._recording:
            self._pass = None
            return
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        mask = given.get("attention_mask", given.get("kwargs", {}).get("attention_mask"))
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            seen = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise AblationError(
                f"{self._decoder.path or type(module).__name__!r} was given an attention mask of {seen}; gates on "
                f"edges need one of shape (texts, positions), to find where each text begins"
            )
        if self._resample and not self._recording and self._source is None:
            raise AblationError("no other examples were recorded for edges; call Gates.record before a forward pass")
        keep, source = (None, None) if self._recording else (self._keep, self._source)
        self._pass = _Pass(self._decoder, keep, self._constants, source, None if mask is None else mask.bool())

    def _watch(self, site: str) -> Callable[[Tensor], Tensor]:
        def watch(stream: Tensor) -> Tensor:
            if self._pass is not None:
                self._seen.add(self._decoder.writers[0].site)
                self._pass.watch(site, stream)
            return stream

        return watch

    def _hook_writers(self, site: str, writers: list[Writer]) -> Callable[[], None]:
        module = self._model.get_submodule(site)

        def after(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            if self._pass is not None:
                self._seen.add(site)
                if writers[0].head is None:
                    y = result[0] if isinstance(result, tuple) else result
                    written = y.reshape(*self._pass.shape, 1, self._decoder.width)
                else:
                    z = args[0] if args else next(iter(kwargs.values()))
                    written = _by_head(module, z.reshape(*self._pass.shape, len(writers), -1))
                self._pass.write(self._numbers[site], written)

        return module.register_forward_hook(after, with_kwargs=True).remove

    def _hook_reading(self, reading: Reading, pairs: slice) -> Callable[[], None]:
        """Make a module compute its outputs from the inputs of its readers; return a function that undoes this."""
        module = self._model.get_submodule(reading.site)
        norm = self._model.get_submodule(reading.norm).forward if reading.norm else None
        rows = None if reading.rows is None else torch.tensor(reading.rows)
        if rows is not None and torch.equal(rows, torch.arange(len(rows))):
            rows = None

        def normed(taken: Tensor) -> Tensor:
            value: Tensor = taken if norm is None else norm(taken)
            return value

        def whole(x: Tensor) -> Tensor:
            """Return the input of a module with one reader."""
            self._seen.add(reading.site)
            if self._pass is None or self._recording:
                return x
            read = self._pass.read(reading, pairs, lambda taken: normed(taken)[:, :, 0])
            return read.reshape(x.shape).to(x.dtype)

        if reading.rows is None:
            return hook(module, "input", whole).remove
        plain, own = module.forward, {key: value for key, value in vars(module).items() if key == "forward"}

        def forward(x: Tensor) -> Any:
            """Return the outputs of a projection, those of each reader from its own input."""
            self._seen.add(reading.site)
            if self._pass is None or self._recording:
                return plain(x)
            return self._pass.read(reading, pairs, lambda taken: _project(module, normed(taken).to(x.dtype), rows))

        def undo() -> None:
            vars(module).pop("forward", None)
            vars(module).update(own)

        module.forward = forward
        return undo


class _Pass:
    """One forward pass: the residual stream at every place that reads it, and the ledger of the writers' outputs.

    Args:
        decoder: The writers and readers.
        keep: (pairs,) mask, or (rows, pairs) masks; None to record the writers' outputs.
        constants: (writers, width) replacements.
        source: Recorded outputs for another example each, which then are the replacements.
        tokens: (rows, positions) booleans, False at padding; None if every position is a token.
    """

    def __init__(
        self, decoder: Decoder, keep: Tensor | None, constants: Tensor, source: "_Pass | None", tokens: Tensor | None
    ) -> None:
        self.streams: dict[str, Tensor] = {}
        self.ledger: Ledger | None = None
        self.tokens = tokens
        self._decoder, self._keep, self._constants, self._source = decoder, keep, constants, source
        self._lacking: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and positions."""
        rows, positions = self._started().entries.shape[:2]
        return rows, positions

    def watch(self, site: str, stream: Tensor) -> None:
        """Record the residual stream at a place that reads it; the first one is the embedding's output."""
        self.streams[site] = stream
        if self.ledger is None:
            self._start(stream)
            self.write(0, stream[:, :, None])

    def write(self, number: int, outputs: Tensor) -> None:
        """Enter (rows, positions, writers, width) outputs of consecutive writers; `number` is the first one's."""
        ledger, writers = self._started(), slice(number, number + outputs.shape[2])
        replacement: Tensor | None = None
        if self._source is not None:
            replacement = self._source._started().entries[:, :, writers]
            replacement = replacement.repeat(len(outputs) // len(replacement), 1, 1, 1)
        elif self._keep is not None:
            replacement = self._constants[writers]
        ledger.write(number, outputs, replacement)

    def read(self, reading: Reading, pairs: slice, compute: Compute) -> Tensor:
        """Return the (rows, positions, features) that a module computes from the inputs of its readers.

        Args:
            reading: The module and its readers.
            pairs: Where the masks of its edges are.
            compute: The function of the module, position by position.
        """
        stream = self.streams[reading.norm or reading.site].view(*self.shape, self._decoder.width)
        if self._lacking is None:
            raise AblationError("the edges have no masks; call Gates.set before a forward pass")
        own = self._lacking[:, pairs].view(-1, len(reading.labels), reading.before)
        return self._started().read(stream, own, compute)

    def _started(self) -> Ledger:
        if self.ledger is None:
            raise AblationError(
                f"a layer of {self._decoder.path!r} wrote before the first one read the residual stream; call the "
                f"model as a whole"
            )
        return self.ledger

    def _start(self, stream: Tensor) -> None:
        rows, positions = self._check_shape(stream)
        first = torch.zeros(rows, dtype=torch.long, device=stream.device)
        if self.tokens is not None:
            first = self.tokens.long().argmax(1)
        if self._source is not None:
            self._check_source(rows, positions)
        kind = stream.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else stream.dtype
        self.ledger = Ledger(len(self._decoder.writers), first, stream, dtype)
        if self._keep is not None:
            keep = self._keep if self._keep.ndim == 2 else self._keep[None]
            if rows % len(keep):
                raise AblationError(
                    f"{len(keep)} masks were given for {rows} rows; give a number of masks that divides {rows}"
                )
            self._lacking = 1 - (keep if len(keep) == 1 else keep.repeat_interleave(rows // len(keep), 0))

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


def _by_head(projection: nn.Module, z: Tensor) -> Tensor:
    """Return (rows, positions, heads, width) products of a projection with (rows, positions, heads, size) inputs z."""
    _, _, heads, size = z.shape
    return torch.einsum("bths,hsd->bthd", z, _weight(projection).T.view(heads, size, -1))


def _project(projection: nn.Module, taken: Tensor, rows: Tensor | None) -> Tensor:
    """Return the (rows, positions, outputs) of a projection, those of each reader from its own input.

    Args:
        projection: The projection.
        taken: (rows, positions, readers, width) inputs of its readers.
        rows: Its outputs in the order of its readers; None if they are in that order.
    """
    weight, bias = _weight(projection), projection.bias
    width = taken.shape[-1]
    ordered = weight if rows is None else weight[rows]
    y = torch.einsum("btrd,rsd->btrs", taken, ordered.view(taken.shape[2], -1, width)).flatten(2)
    if rows is not None:
        y = y[..., rows.argsort()]
    return y if not isinstance(bias, Tensor) else y + bias.to(y.dtype)


def _weight(projection: nn.Module) -> Tensor:
    """Return the (outputs, inputs) weight of a linear layer."""
    weight: Tensor = projection.weight  # type: ignore[assignment]
    return weight.T if output_axis(projection) == 1 else weight


def edge_gate(model: nn.Module, components: Components, replacements: Tensor, *, resample: bool = False) -> EdgeGate:
    """Return the gate on all edges of a model.

    Args:
        model: The model.
        components: Edges, or writers for all their edges.
        replacements: (components.width,) constants, on the model's device.
        resample: Whether ablated edges carry the writer's output for another example.

    Raises:
        ComponentError: When components are of another model, or overlap.
    """
    decoder = find_decoder(model)
    index = torch.tensor(component_of_pairs(decoder, components), device=replacements.device)
    constants = torch.arange(components.width, device=replacements.device)
    return EdgeGate(
        model, decoder, Channels(index, index < len(components), constants, replacements), resample=resample
    )


def _build(request: GateRequest, sites: Sequence[GatedSite]) -> list[Gate]:
    """Return one gate for all edges; raise `AblationError` for constants by position."""
    if not sites:
        return []
    if request.by_position:
        raise AblationError(
            "edges have one constant per feature of their writer, not one per position; use Mean(calibration=...)"
        )
    return [edge_gate(request.model, request.components, request.replacements, resample=request.resample)]


EDGE_GATES = GateKind(lambda _request, gated: "edge" in gated.sides, _build)
