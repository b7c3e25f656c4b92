"""The gate on all edges between the writers and readers of a decoder.

The model runs unchanged, so its residual stream is the true sum of the writers' outputs in this pass. Hooks record the
stream before norms and enter the writers' outputs in a ledger. Modules that read get, or compute, the inputs of their
readers.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from coar.components.decoder import Decoder, Reading, Writer, find_decoder
from coar.components.edges import component_of_pairs
from coar.components.layers import is_dense, output_axis
from coar.components.table import Components
from coar.errors import AblationError
from coar.gates.building import GatedSite, GateKind, GateRequest
from coar.gates.channels import Channels
from coar.gates.edge_pass import EdgePass, Joint, joints_of
from coar.gates.gate import Gate
from coar.gates.hook import hook
from coar.gates.ledger import Module, Projection


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
        self._joints = joints_of(decoder)
        self._stack = ExitStack()
        self._numbers: dict[str, int] = {}  # first writer of each site
        for number, writer in enumerate(decoder.writers):
            self._numbers.setdefault(writer.site, number)

    def install(self) -> None:
        """Register hooks and replace the forward of projections; without a mask, the model runs unchanged."""
        self._keep: Tensor | None = None
        self._pass: EdgePass | None = None
        self._source: EdgePass | None = None
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
            for joint in self._joints:
                hook_readers = self._hook_reader if joint.readings[0].rows is None else self._hook_projections
                stack.callback(hook_readers(joint))
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
        """Return recorded outputs of writers, and which (rows, positions) may be replaced.

        Outputs have shape (rows, last positions, writers, width), and begin after the first token of all rows.

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
        tokens = None if mask is None else mask.bool()
        self._pass = EdgePass(self._model, self._decoder, self._joints, keep, self._constants, source, tokens)

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
            current = self._pass
            if current is None:
                return
            self._seen.add(site)

            def written() -> Tensor:
                """Return the (rows, positions, writers, width) outputs of the site's writers."""
                if writers[0].head is None:
                    y: Tensor = result[0] if isinstance(result, tuple) else result
                    return y.reshape(*current.shape, 1, self._decoder.width)
                z = args[0] if args else next(iter(kwargs.values()))
                return _by_head(module, z.reshape(*current.shape, len(writers), -1))

            current.write(self._numbers[site], len(writers), written)

        return module.register_forward_hook(after, with_kwargs=True).remove

    def _norm(self, joint: Joint) -> Callable[[Tensor], Tensor] | None:
        path = joint.readings[0].norm
        return self._model.get_submodule(path).forward if path else None

    def _hook_reader(self, joint: Joint) -> Callable[[], None]:
        """Give a module with one reader that reader's input; return a function that undoes this."""
        (reading,) = joint.readings
        module = Module(self._norm(joint), ())

        def whole(x: Tensor) -> Tensor:
            self._seen.add(reading.site)
            if self._pass is None or self._recording or self._pass.is_plain(joint):
                return x
            (read,) = self._pass.read(joint, x, module)
            return read.reshape(x.shape).to(x.dtype)

        return hook(self._model.get_submodule(reading.site), "input", whole).remove

    def _hook_projections(self, joint: Joint) -> Callable[[], None]:
        """Make projections compute each reader's outputs from its own input; return a function that undoes this.

        The first one that is called computes the outputs of all.
        """
        sites = [reading.site for reading in joint.readings]
        modules = [self._model.get_submodule(site) for site in sites]
        orders = [_order(reading.rows) for reading in joint.readings if reading.rows is not None]
        plain, norm, stack = [module.forward for module in modules], self._norm(joint), ExitStack()

        def forward(x: Tensor, number: int) -> Any:
            self._seen.add(sites[number])
            if self._pass is None or self._recording or self._pass.is_plain(joint):
                return plain[number](x)
            waiting = self._pass.results
            if sites[number] not in waiting:
                parts = map(_projection, joint.readings, modules, plain, orders)
                waiting.update(zip(sites, self._pass.read(joint, x, Module(norm, tuple(parts))), strict=True))
            return waiting.pop(sites[number])

        for number, module in enumerate(modules):
            own = {key: value for key, value in vars(module).items() if key == "forward"}

            def undo(module: nn.Module = module, own: dict[str, Any] = own) -> None:
                vars(module).pop("forward", None)
                vars(module).update(own)

            stack.callback(undo)
            module.forward = partial(forward, number=number)
        return stack.close


def _by_head(projection: nn.Module, z: Tensor) -> Tensor:
    """Return (rows, positions, heads, width) products of a projection with (rows, positions, heads, size) inputs z."""
    _, _, heads, size = z.shape
    return torch.einsum("bths,hsd->bthd", z, _weight(projection).T.view(heads, size, -1))


def _projection(
    reading: Reading, module: nn.Module, plain: Callable[[Tensor], Tensor], order: Tensor | None
) -> Projection:
    """Return a projection whose outputs are those of a reading's readers; `order` sorts them by reader."""
    weight, bias = _weight(module), module.bias
    ordered = weight if order is None else weight[order]
    by_reader = ordered.view(len(reading.labels), -1, weight.shape[1])
    back = None if order is None else order.argsort()
    return Projection(plain, by_reader, bias if isinstance(bias, Tensor) else None, back)


def _order(rows: Sequence[int]) -> Tensor | None:
    """Return the outputs of a projection in the order of its readers; None if they are in that order."""
    order = torch.tensor(rows)
    return None if torch.equal(order, torch.arange(len(order))) else order


def _weight(projection: nn.Module) -> Tensor:
    """Return the (outputs, inputs) weight of a linear layer."""
    weight: Tensor = projection.weight  # type: ignore[assignment]
    if not is_dense(weight):
        raise AblationError(
            f"a {type(projection).__name__} has a weight of {type(weight).__name__}, and gates on edges read the "
            f"projections' weights; load the model without quantisation, or choose attention_heads and input_features"
        )
    return weight.T if output_axis(projection) == 1 else weight


def edge_gate(model: nn.Module, components: Components, replacements: Tensor, *, resample: bool = False) -> EdgeGate:
    """Return the gate on all edges of a model.

    Args:
        model: The model.
        components: Edges, or writers for all their edges.
        replacements: (components.width,) constants, on the model's device.
        resample: Whether ablated edges carry the writer's output for another example.

    Raises:
        ComponentError: When components are of another model, or overlap, or the model is on several devices.
    """
    decoder = find_decoder(model, causal=False)  # a table of its edges exists
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
