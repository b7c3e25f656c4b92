"""Parts of gates, and the interface of a kind of gate.

To add a kind of gate, write one module with the gate and its `GateKind`, and add the kind to `coar.gates.registry`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coar.components.layers import input_channels, output_channels
from coar.components.table import Components, Side
from coar.errors import AblationError
from coar.examples import devices_of
from coar.gates.channels import Channels
from coar.gates.gate import Gate

TENSOR_SIDES: tuple[Side, ...] = ("output", "input", "module")  # of one module, which one kind of gate gates together


@dataclass(frozen=True)
class GatedSite:
    """A module or parameter, and the components on those of its sides that one kind of gate gates together.

    Attributes:
        site: Path of the module or parameter.
        sides: Row numbers of the components by side.
    """

    site: str
    sides: Mapping[Side, Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class GateRequest:
    """Everything that gates are built from.

    Attributes:
        model: The model.
        components: The components that a mask refers to.
        replacements: (components.width,) or (positions, components.width) constants, on the device of the model's
            inputs.
        batch_norms: Path of the batch norm to fold into a site's weights, by path of the site.
        use_hooks: Whether every component is gated by forward hooks.
        resample: Whether ablated components take the activations of other examples.
        weight_dtype: Type in which gated float32 weights are held; None for their own.
    """

    model: nn.Module
    components: Components
    replacements: Tensor
    batch_norms: Mapping[str, str]
    use_hooks: bool
    resample: bool
    weight_dtype: torch.dtype | None

    @property
    def by_position(self) -> bool:
        """Whether there are constants for each position of a sequence."""
        return self.replacements.ndim == 2

    def batch_norm(self, gated: GatedSite) -> nn.Module | None:
        """Return the batch norm to fold into the weights of a site; None where there is none."""
        return self.model.get_submodule(self.batch_norms[gated.site]) if gated.site in self.batch_norms else None

    def channels(self, gated: GatedSite, side: Side) -> Channels:
        """Map the channels on one tensor side of a module to components and constants, on the module's device.

        Raises:
            AblationError: When two components overlap.
        """
        rows = list(gated.sides[side])
        if side == "module":
            if len(rows) > 1:
                raise AblationError(
                    f"{self.components[rows[1]].name!r} overlaps another component of the table; leave one out"
                )
            found = Channels.of_module(self.components, rows[0], self.replacements)
        else:
            layer = self.model.get_submodule(gated.site)
            length = input_channels(layer) if side == "input" else output_channels(layer)
            found = Channels.of(length, self.components, rows, self.replacements)
        places = devices_of(self.model.get_submodule(gated.site))
        return found.on(places[0]) if places else found


@dataclass(frozen=True)
class GateKind:
    """One kind of gate: the sites that it gates, and how it builds their gates.

    Attributes:
        accepts: Returns whether this kind gates a site; of all kinds, the first that accepts a site gates it.
        build: Builds the gates of all the sites that the kind accepted; raises `AblationError` for components that
            cannot be gated as requested.
    """

    accepts: Callable[[GateRequest, GatedSite], bool]
    build: Callable[[GateRequest, Sequence[GatedSite]], Sequence[Gate]]


def sites_of(components: Components) -> Iterator[GatedSite]:
    """Group components by site, in table order; outputs, inputs and whole modules of one module are one site.

    Raises:
        AblationError: When components of one side of a site lie along different axes.
    """
    modules: dict[str, dict[Side, Sequence[int]]] = {}
    for (site, side, _), rows in components.sites().items():
        if side not in TENSOR_SIDES:
            yield GatedSite(site, {side: rows})
        elif side in modules.setdefault(site, {}):
            raise AblationError(
                f"{components[rows[0]].name!r} lies along another axis of the {side} of {site!r} than other components "
                f"there; keep the components along one axis"
            )
        else:
            modules[site][side] = rows
    for site, sides in modules.items():
        yield GatedSite(site, sides)
