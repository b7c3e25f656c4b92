"""The context manager that applies masks to a model during its forward passes and then restores the model.

A gate replaces y, a channel of a module's output or input or all that a module returns, by
keep * y + (1 - keep) * replacement, where the replacement is a constant or another example's activation. Where the
module is a convolution or a linear layer, a batch shares one mask and the replacements are constants, the gate changes
the layer's weight and bias instead, which costs one read of the weights and nothing per example. Everywhere else a
forward hook does it; then every row of a batch may have its own mask, and gradients reach the masks.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from coar.components.membership import check_components
from coar.components.table import Components, Side
from coar.errors import AblationError
from coar.examples import device_of
from coar.gates.building import GateRequest
from coar.gates.casting import cast_weights
from coar.gates.gate import Gate
from coar.gates.projections import CalledProjection, called_projections, uncalled_projections
from coar.gates.registry import build_gates


class Gates:
    """Context manager that gates a model's components; inside it, `set` chooses the mask of the next forwards.

    It may be entered any number of times, as long as the model's weights stay the same.

    Args:
        model: The model; its parameters and hooks are as before when the context ends, also after an exception.
        components: The components that a mask refers to.
        replacements: (components.width,) constants that replace what is ablated, one per channel, in table order; or
            (positions, components.width), one per channel and position of a sequence, which needs forward hooks.
        batch_norms: Path of the batch norm that alone follows a site, see `following_batch_norms`; it is folded into
            the gated weights, which saves its pass over the activations.
        use_hooks: Gate every component by forward hooks, so that masks may differ between the rows of a batch and
            carry gradients; parameter slices cannot be gated by hooks.
        resample: Replace what is ablated by the activations of other examples, see `record`; this needs forward hooks
            too.
        weight_dtype: Type in which gated float32 weights are held; by default their own.
        cast_ungated: Whether to hold the float32 weights of linear layers and convolutions without gates in
            `weight_dtype` too.

    Raises:
        ComponentError: When a component is not part of the model.
        AblationError: When replacements have another shape or are missing, two kinds of components claim the same
            weights, or components cannot be gated as requested.
    """

    def __init__(
        self,
        model: nn.Module,
        components: Components,
        replacements: Tensor,
        *,
        batch_norms: Mapping[str, str] | None = None,
        use_hooks: bool = False,
        resample: bool = False,
        weight_dtype: torch.dtype | None = None,
        cast_ungated: bool = False,
    ) -> None:
        check_components(model, components)
        _check_replacements(replacements, components, resample)
        _check_claims(model, components)
        request = GateRequest(
            model=model,
            components=components,
            replacements=replacements.to(device_of(model)),
            batch_norms=batch_norms or {},
            use_hooks=use_hooks,
            resample=resample,
            weight_dtype=weight_dtype,
        )
        self._gates: list[Gate] = build_gates(request)
        self._projections = uncalled_projections(model, [site for gate in self._gates for site in gate.hooked_sites])
        if cast_ungated and weight_dtype is not None:
            self._gates += cast_weights(model, components, self._gates, weight_dtype)
        self._length, self._dtype = len(components), replacements.dtype
        self._stack = ExitStack()
        channels = [one for gate in self._gates for one in gate.channels]
        self._masks = _ChannelIndex([one.mask_index for one in channels], request.replacements.device)
        self._constants = _ChannelIndex([one.constant_index for one in channels], request.replacements.device)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            parts: list[Gate | CalledProjection] = [*self._gates, *self._projections]
            for part in parts:
                stack.callback(part.restore)
                part.install()
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

        Raises:
            AblationError: When the mask has another length, or a gate takes one mask only and rows have their own.
        """
        if keep.shape[-1:] != (self._length,):
            raise AblationError(
                f"the mask has shape {tuple(keep.shape)}; ({self._length},), or one such row per example, was expected"
            )
        numbers = keep if keep.is_floating_point() else keep.to(self._dtype)  # once, and not at every gate
        for gate, keeps in self._by_gate(self._masks.spread(numbers, 1)):
            gate.set(keeps)

    def replace(self, replacements: Tensor) -> None:
        """Choose other (components.width,) constants for the forwards that follow; gradients reach them.

        Raises:
            AblationError: Unless all gates are hooks with constants, without a batch norm folded.
        """
        for gate, constants in self._by_gate(self._constants.spread(replacements, 0)):
            gate.replace(constants)

    def _by_gate(self, values: Sequence[Tensor]) -> list[tuple[Gate, Sequence[Tensor]]]:
        """Return each gate with the values of its own channels."""
        pairs, start = [], 0
        for gate in self._gates:
            stop = start + len(gate.channels)
            pairs.append((gate, values[start:stop]))
            start = stop
        return pairs

    def record(self, run: Callable[[], object]) -> None:
        """Run the plain forward pass of the resample sources and keep their activations for the forwards that follow.

        Args:
            run: Runs the model on the source of every example, in the order of the examples.
        """
        try:
            for gate in self._gates:
                gate.record(True)
            run()
        finally:
            for gate in self._gates:
                gate.record(False)

    def confirm(self) -> None:
        """Raise `AblationError` when no forward pass reached a gate, whose component would then never be ablated."""
        for gate in self._gates:
            gate.confirm()

    def buffers(self) -> list[Tensor]:
        """Return the tensors that replace weights and biases; masks are written into these very tensors."""
        return [buffer for gate in self._gates for buffer in gate.buffers()]


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


class _ChannelIndex:
    """The entry of a mask, or of constants, for each channel of all gates, in the order of the gates.

    Args:
        entries: (channels,) positions for each part; the last position stands for channels without a component.
        device: Where masks and constants are given.
    """

    def __init__(self, entries: Sequence[Tensor], device: torch.device) -> None:
        self._index = torch.cat([part.to(device) for part in entries])
        self._sizes = [len(part) for part in entries]

    def spread(self, values: Tensor, rest: int) -> tuple[Tensor, ...]:
        """Spread (..., entries) values over the channels of all gates; channels without a component get `rest`."""
        extended = torch.cat([values, values.new_full((*values.shape[:-1], 1), rest)], dim=-1)
        index = self._index.expand(*values.shape[:-1], -1)
        return torch.split(extended.gather(-1, index), self._sizes, dim=-1)  # backward, one scatter for all gates


def _check_replacements(replacements: Tensor, components: Components, resample: bool) -> None:
    """Raise `AblationError` unless there is a constant for every channel, or other examples replace components."""
    by_position = replacements.ndim == 2
    if replacements.shape[by_position:] != (components.width,):
        raise AblationError(
            f"replacements have shape {tuple(replacements.shape)}; one constant for each of the {components.width} "
            f"channels of the {len(components)} components was expected"
        )
    if not resample and not by_position and replacements.isnan().any():
        raise AblationError(
            "some components have no single constant, because their ablation resamples or takes means by position; "
            "give Gates(..., resample=True) to resample, and for edits collect with an ablation by constants, such as "
            "Mean(calibration=...)"
        )


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
