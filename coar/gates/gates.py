"""Gates: apply masks to a model during its forward passes and leave nothing behind.

A gate turns what a component is, a channel y of a module's output or input or all that a module returns, into
keep * y + (1 - keep) * replacement; the replacement is a constant, or what another example's pass held there. Where
the module is a convolution or a linear layer, a batch shares one mask and constants replace, the same is done to the
layer's weight and bias instead, which costs as much as reading the weights once and nothing per example. Everywhere
else a forward hook does it, and then every row of a batch may have a mask of its own and gradients reach the mask.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from coar.components.layers import input_channels, output_channels, stack_of
from coar.components.membership import check_components
from coar.components.table import Components, Side
from coar.errors import AblationError
from coar.gates.channels import Channels
from coar.gates.experts import ExpertGate
from coar.gates.hook import Hooked, HookGate, ModuleGate, ModuleSide, PositionGate, ResampleGate
from coar.gates.projections import called_projections, uncalled_projections
from coar.gates.weight import FoldedNorm, LayerGate, LowWeight, SliceGate, reads_own_weight

USUAL = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # layers whose weight nothing but the layer itself reads


class Gates:
    """Context manager that gates a model's components; inside it, `set` chooses the mask of the next forwards.

    It may be entered again and again, as long as the model's weights stay as they are.

    Args:
        model: The model; its parameters and hooks are as before when the context ends, also after an exception.
        components: The components a mask speaks of.
        replacements: (components.width,) constants that replace what is ablated, one per channel, in table order; or
            (positions, components.width) for as many at each position of a sequence, which is done by forward hooks.
        batch_norms: Path of the batch norm that alone follows a site, see `following_batch_norms`; it is folded into
            the gated weights, which saves its pass over the activations.
        through_outputs: Gate every component by forward hooks, so that masks may differ between the rows of a batch
            and carry gradients; parameter slices cannot be gated so.
        donors: Replace what is ablated by what other examples' plain pass held there, see `record`; this too is done
            by forward hooks.
        dtype: Type in which gated float32 weights are held; by default their own.
        others: Hold the float32 weights of the usual layers that are not gated in this type too.

    Raises:
        ComponentError: When a component is not part of the model.
        AblationError: When two kinds of components claim the same weights, or `use_hooks` or `sources` is asked
            of a parameter slice.
    """

    def __init__(
        self,
        model: nn.Module,
        components: Components,
        replacements: Tensor,
        *,
        batch_norms: Mapping[str, str] | None = None,
        use_hooks: bool = False,
        sources: bool = False,
        dtype: torch.dtype | None = None,
        others: bool = False,
    ) -> None:
        check_components(model, components)
        by_position = replacements.ndim == 2
        if replacements.shape[by_position:] != (components.width,):
            raise AblationError(
                f"replacements have shape {tuple(replacements.shape)}; one constant for each of the {components.width} "
                f"channels of the {len(components)} components was expected"
            )
        if not sources and not by_position and replacements.isnan().any():
            raise AblationError(
                "there are components without one constant, as resampling and means by position leave them, and no "
                "donors are at hand; for edits collect with an ablation by constants, such as Mean(calibration=...), "
                "and of gates ask donors"
            )
        _check_claims(model, components)
        values = replacements.to(next(model.parameters()).device)
        self._length, self._type = len(components), values.dtype
        self._stack = ExitStack()
        self._gates: list[_Gate] = []
        hooked = use_hooks or sources or by_position
        modules: dict[str, dict[ModuleSide, list[int]]] = {}
        for (site, side, _), indices in components.sites().items():
            if side == "parameter":
                self._gates.append(_slice_gate(model, components, indices, values, hooked))
            elif side == "expert":
                self._gates.append(_route_gate(model, components, indices, values, sources))
            else:
                modules.setdefault(site, {})[side] = indices
        for site, sides in modules.items():
            norm = model.get_submodule(batch_norms[site]) if batch_norms and site in batch_norms else None
            layer = model.get_submodule(site)
            if sources:
                self._gates += [LayerGate(layer, None, None, norm)] if norm is not None else []
                self._gates += [ResampleGate(*place) for place in _places(layer, components, sides, values)]
            elif by_position:
                self._gates += [PositionGate(*place) for place in _places(layer, components, sides, values)]
            else:
                self._gates += _module_gates(layer, components, sides, values, norm, use_hooks, dtype)
        if others and dtype is not None:
            swapped = {gate.layer for gate in self._gates if isinstance(gate, LayerGate | FoldedNorm)}
            self._gates += _low_weights(model, components, swapped, dtype)
        self._blocks = uncalled_projections(model, [gate.site for gate in self._gates if isinstance(gate, Hooked)])
        parts = [part for gate in self._gates for part in gate.channels]
        self._masks = _Order([part.lookup for part in parts])
        self._constants = _Order([part.constants for part in parts])

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for part in self._gates:
                stack.callback(part.restore)
                part.install()
            for block in self._blocks:
                stack.callback(block.restore)
                block.install()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def set(self, keep: Tensor) -> None:
        """Choose the mask of the forwards that follow.

        Args:
            keep: (components,) mask, or (rows, components) with one mask per row of the batch; True or 1 keeps.
                With `use_hooks`, a floating-point mask that requires gradients receives them. A module inside
                the model may see several entries per row of the batch, such as both sentences of a pair, if they lie
                side by side: its batch axis is then cut into as many equal parts as there are masks.
        """
        if keep.shape[-1:] != (self._length,):
            raise AblationError(
                f"the mask has shape {tuple(keep.shape)}; ({self._length},), or one such row per example, was expected"
            )
        start = 0
        numbers = keep if keep.is_floating_point() else keep.to(self._type)  # once, and not at every gate
        gathered = self._masks.spread(numbers, 1)
        for gate in self._gates:
            stop = start + len(gate.channels)
            gate.set(gathered[start:stop])
            start = stop

    def replace(self, replacements: Tensor) -> None:
        """Choose other (components.width,) constants for the forwards that follow; gradients reach them.

        Raises:
            AblationError: Unless all gates are hooks, without a batch norm folded.
        """
        parts = iter(self._constants.spread(replacements, 0))
        for gate in self._gates:
            if not isinstance(gate, HookGate | ModuleGate | ExpertGate):
                raise AblationError("constants are replaced in hooks only; give Gates(..., through_outputs=True)")
            gate.replace(next(parts))

    def record(self, run: Callable[[], object]) -> None:
        """Run the donors' plain forward pass and keep what passes the gates, for the forwards that follow.

        Args:
            run: Runs the model on as many donors as there will be examples, in their order.
        """
        gates = [gate for gate in self._gates if isinstance(gate, ResampleGate)]
        try:
            for gate in gates:
                gate.record(True)
            run()
        finally:
            for gate in gates:
                gate.record(False)

    def confirm(self) -> None:
        """Raise `AblationError` when a gate saw no forward pass, which would make its component silently immune."""
        for gate in self._gates:
            gate.confirm()

    def buffers(self) -> list[Tensor]:
        """Return the tensors in the place of weights and biases; masks are written into these very tensors."""
        held = [gate.weight for gate in self._gates if isinstance(gate, LowWeight)]
        return held + [buffer for gate in self._gates if isinstance(gate, LayerGate) for buffer in gate.buffers]


def called_sites(model: nn.Module, components: Components, *, run: Callable[[nn.Module], object]) -> set[str]:
    """Return the sites whose module is called when the gated model runs; others are read by weight, or not at all."""
    called: set[str] = set()
    sites = {site for site, side, _ in components.sites() if side != "parameter"}
    with ExitStack() as stack:
        stack.enter_context(called_projections(model, sites))
        for site in sites:
            module = model.get_submodule(site)
            handle = module.register_forward_hook(lambda _module, _args, _y, site=site: called.add(site))
            stack.callback(handle.remove)
        run(model)
    return called


class _Order:
    """Which entry of a mask, or of constants, each channel of all gates in a row takes.

    Args:
        entries: (channels,) positions for each part; the last counts for channels without a component.
    """

    def __init__(self, entries: Sequence[Tensor]) -> None:
        self._order = torch.cat(list(entries))
        self._sizes = [len(part) for part in entries]

    def spread(self, values: Tensor, rest: int) -> tuple[Tensor, ...]:
        """Spread (..., entries) values over the channels of all gates; channels without a component get `rest`."""
        extended = torch.cat([values, values.new_full((*values.shape[:-1], 1), rest)], dim=-1)
        order = self._order.expand(*values.shape[:-1], -1)
        return torch.split(extended.gather(-1, order), self._sizes, dim=-1)  # backward, one scatter for all gates


class _Gate(Protocol):
    channels: tuple[Channels, ...]  # those whose masks `set` takes

    def install(self) -> None: ...
    def restore(self) -> None: ...
    def set(self, keeps: Sequence[Tensor]) -> None: ...
    def confirm(self) -> None: ...


def _slice_gate(
    model: nn.Module, components: Components, indices: list[int], values: Tensor, hooked: bool
) -> SliceGate:
    first = components[indices[0]]
    if hooked:
        raise AblationError(
            f"{first.name!r} is a parameter slice: it has no output to gate per row, to resample or to take gradients "
            f"through; use conv_filters, neurons, input_features or attention_heads"
        )
    parameter = model.get_parameter(first.site)
    return SliceGate(parameter, first.axis, Channels.of(parameter.shape[first.axis], components, indices, values))


def _route_gate(
    model: nn.Module, components: Components, indices: list[int], values: Tensor, sources: bool
) -> ExpertGate:
    first = components[indices[0]]
    if sources:
        raise AblationError(
            f"{first.name!r} is an expert, and a donor's tokens are sent to other experts; use an ablation by constants"
        )
    mixture = model.get_submodule(first.site)
    stack = stack_of(mixture)
    experts = len(stack.weight) if stack else 0  # it is one, or `check_components` would have refused it
    return ExpertGate(mixture, first.site, experts, Channels.of_experts(experts, components, indices, values))


def _module_gates(
    layer: nn.Module,
    components: Components,
    sides: Mapping[ModuleSide, list[int]],
    values: Tensor,
    norm: nn.Module | None,
    use_hooks: bool,
    dtype: torch.dtype | None,
) -> list[_Gate]:
    """Return one gate in a layer's weights for its outputs and inputs together, or one hook for each of the two."""
    places = _places(layer, components, sides, values)
    hooks: list[_Gate] = [ModuleGate(*place) if place[2] == "module" else HookGate(*place) for place in places]
    if not reads_own_weight(layer) or "module" in sides:
        return hooks
    channels = {place[2]: place[4] for place in places}
    if not use_hooks:
        return [LayerGate(layer, channels.get("output"), channels.get("input"), norm, dtype)]
    if norm is None or list(sides) != ["output"]:
        return hooks
    folded = FoldedNorm(layer, channels["output"], norm, dtype)
    return [folded, HookGate(*places[0], (folded.kept, folded.ablated))]


def _low_weights(
    model: nn.Module, components: Components, swapped: set[nn.Module], dtype: torch.dtype
) -> list[LowWeight]:
    """Return what holds weights of the usual layers in a type, but for those that gates swap or cut into slices."""
    sliced = {id(model.get_parameter(site)) for site, side, _ in components.sites() if side == "parameter"}
    return [
        LowWeight(layer, dtype)
        for layer in model.modules()
        if type(layer) in USUAL and layer not in swapped and reads_own_weight(layer)
        if layer.weight.dtype == torch.float32 and id(layer.weight) not in sliced
    ]


_Place = tuple[nn.Module, str, ModuleSide, int, Channels]  # what a gate in a hook needs to know


def _places(
    layer: nn.Module, components: Components, sides: Mapping[ModuleSide, list[int]], values: Tensor
) -> list[_Place]:
    lengths = {"output": output_channels(layer), "input": input_channels(layer)}
    places: list[_Place] = []
    for side, rows in sides.items():
        if side == "module":
            channels = Channels.of_module(components, rows[0], values)
        else:
            channels = Channels.of(lengths[side], components, rows, values)
        places.append((layer, components[rows[0]].site, side, components[rows[0]].axis, channels))
    return places


def _check_claims(model: nn.Module, components: Components) -> None:
    """Raise `AblationError` when a parameter is cut into slices and claimed by other components too."""
    claimed: dict[nn.Parameter, Side] = {}
    for (site, side, _), indices in components.sites().items():
        own = [model.get_parameter(site)] if side == "parameter" else model.get_submodule(site)._parameters.values()
        for parameter in (parameter for parameter in own if parameter is not None):
            if parameter in claimed and "parameter" in (side, claimed[parameter]):
                raise AblationError(
                    f"{components[indices[0]].name!r} and another component claim the same weights, one of them as a "
                    f"parameter slice; keep either the parameter slices or the other kind"
                )
            claimed[parameter] = side
