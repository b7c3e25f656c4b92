"""Constants that say what a component usually computes: its mean and its peak over calibration examples."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from coar.ablation.by_hook import check_features, hook
from coar.ablation.by_route import Routes, check_weighed
from coar.ablation.padding import tokens_of, without_padding
from coar.ablation.projections import called_projections
from coar.ablation.replacements import Calibrated, call
from coar.components import Components, Side
from coar.errors import AblationError
from coar.examples import Examples

Place = tuple[str, Side, int]  # a site, which side of it, and where the first channel is: 0 but for experts
Visit = Callable[[Place, Tensor], None]  # takes (values, channels), as often as a module is called
Take = Callable[[Place, Tensor, Tensor | None], Tensor]  # makes values of (..., channels) and of what is no padding


class Mean(Calibrated):
    """Replace each channel of a component by its mean over calibration examples and positions.

    Positions are pixels or tokens; those where an `attention_mask` among the inputs is 0 are padding, and do not count.
    """

    label: ClassVar[str] = "mean"

    def replacements(self, model: nn.Module, components: Components, *, batch_size: int) -> Tensor:
        """Return each channel's mean; raise `AblationError` where there are no activations to take it from."""
        means, _ = moments(model, components, self.calibration, batch_size=batch_size)
        return means


class Peak(Calibrated):
    """Replace each channel of a component by the peak of its distribution over calibration examples and positions.

    That is what it computes most often (Pochinkov et al. 2024, "Investigating neuron ablation in attention heads: the
    case for peak activation centering"). Two passes over the examples fill a histogram of each channel between its
    smallest and its largest activation; the constant is the mean of those in the fullest bin, the lowest of several.

    Attributes:
        bins: Bins of a histogram, so its resolution is the range of the activations over their number.
    """

    label: ClassVar[str] = "peak"

    bins: int = Field(default=128, ge=2)

    def replacements(self, model: nn.Module, components: Components, *, batch_size: int) -> Tensor:
        """Return each channel's peak; raise `AblationError` where there are no activations to take it from."""
        ends: dict[Place, tuple[Tensor, Tensor]] = {}

        def widen(place: Place, values: Tensor) -> None:
            low, high = values.amin(0).double(), values.amax(0).double()
            if place in ends:
                low, high = torch.minimum(low, ends[place][0]), torch.maximum(high, ends[place][1])
            ends[place] = low, high

        sums: dict[Place, Tensor] = {}  # (2, bins x channels): how many values, and their sum

        def count(place: Place, values: Tensor) -> None:
            low, high = ends[place]
            wide = values.double()  # half precision does not tell bins apart
            share = (wide - low) / torch.where(high > low, high - low, 1)  # of the range, (values, channels)
            bins = (share * self.bins).long().clamp(0, self.bins - 1)
            flat = (bins * len(low) + torch.arange(len(low), device=low.device)).flatten()
            both = torch.stack([torch.ones_like(wide), wide]).flatten(1)
            if place not in sums:
                sums[place] = both.new_zeros(2, self.bins * len(low))
            sums[place].index_add_(1, flat, both)

        walk(model, components, self.calibration, batch_size=batch_size, visit=widen)
        walk(model, components, self.calibration, batch_size=batch_size, visit=count)
        return _spread(components, {place: _peaks(both, len(ends[place][0])) for place, both in sums.items()})


def _peaks(both: Tensor, channels: int) -> Tensor:
    """Return each channel's mean in its fullest bin, from counts and sums by bin and channel."""
    counts, sums = both.view(2, -1, channels)
    fullest = counts.argmax(0, keepdim=True)  # the first of equals
    peaks: Tensor = sums.gather(0, fullest)[0] / counts.gather(0, fullest)[0]
    return peaks


def moments(
    model: nn.Module, components: Components, calibration: Examples, *, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Return (components.width,) means and standard deviations over examples and positions.

    Raises:
        AblationError: When a component has no activations, or its module is never called.
    """
    sums: dict[Place, Tensor] = {}  # (3, channels): how many values, their sum, and that of their squares

    def add(place: Place, values: Tensor) -> None:
        wide = values.double()
        here = torch.stack([torch.full_like(wide[0], len(wide)), wide.sum(0), wide.square().sum(0)])
        sums[place] = sums[place] + here if place in sums else here

    walk(model, components, calibration, batch_size=batch_size, visit=add)
    means = {place: total / count for place, (count, total, _) in sums.items()}
    squares = {place: square / count for place, (count, _, square) in sums.items()}
    spread = {place: (squares[place] - means[place].square()).clamp_min(0).sqrt() for place in sums}
    return _spread(components, means), _spread(components, spread)


def _without_padding(_place: Place, y: Tensor, tokens: Tensor | None) -> Tensor:
    return without_padding(y, tokens)


def walk(
    model: nn.Module,
    components: Components,
    examples: Examples,
    *,
    batch_size: int,
    visit: Visit,
    take: Take = _without_padding,
) -> None:
    """Run examples through the model and show what its gated sites return or are given.

    Args:
        model: The model in evaluation mode.
        components: The components, none of them a slice of a parameter.
        examples: The examples.
        batch_size: Most examples per forward pass.
        visit: Called with the place and (values, channels) at every call of a module.
        take: Makes these values; by default all but those of padding.

    Raises:
        AblationError: When a component has no activations, its module is never called, or padding cannot be told.
    """
    _check_featured(components)
    watch, sites = _Watch(components, visit, take), components.sites()
    with ExitStack() as stack, torch.inference_mode():
        stack.enter_context(called_projections(model, [site for site, _, _ in sites]))
        for (site, side, axis), rows in sites.items():
            module = model.get_submodule(site)
            if side == "expert":
                handle = module.register_forward_pre_hook(watch.routes(site, rows), with_kwargs=True)
            elif side != "parameter":
                handle = hook(module, side, watch.tensors((site, side, 0), axis, components[rows[0]].size))
            stack.callback(handle.remove)
        for start in range(0, len(examples), batch_size):
            inputs = examples.block(start, start + batch_size)[0]
            watch.tokens = tokens_of(model, inputs)
            call(model, inputs)
    watch.confirm()


class _Watch:
    """Shows what passes the sites of components, without padding, and knows which of them were called.

    Attributes:
        tokens: (texts, positions) truth values of the batch that passes, False at padding; None where there is none.
    """

    def __init__(self, components: Components, visit: Visit, take: Take) -> None:
        self.tokens: Tensor | None = None
        self._components, self._visit, self._take = components, visit, take
        self._called: set[Place] = set()

    def tensors(self, place: Place, axis: int, features: int) -> Callable[[Tensor], Tensor]:
        """Return what shows a tensor, whose features lie along an axis, and hands it on."""

        def show(y: Tensor) -> Tensor:
            if place[1] == "module":
                check_features(y, place[0], axis, features)
            self._see(place, self._take(place, y.detach().movedim(axis, -1), self.tokens))
            return y

        return show

    def routes(self, site: str, rows: list[int]) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        """Return what shows, before a mixture is called, what each expert will return for the tokens sent to it."""

        def show(mixture: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            routes = Routes.of(mixture, site, args, kwargs)
            check_weighed(mixture.forward, site, routes)
            returned = without_padding(routes.returned(mixture.forward), self.tokens)
            experts = without_padding(routes.experts, self.tokens).flatten()
            for component in (self._components[i] for i in rows):
                own = returned[experts == component.position // component.size]
                self._see((site, "expert", component.position), own)

        return show

    def _see(self, place: Place, values: Tensor) -> None:
        if not values.isfinite().all():
            raise AblationError(
                f"{place[0]!r} has activations that are not finite while the calibration examples pass through the "
                f"model, so no constant can be taken from them; leave such examples out, or use float32"
            )
        if len(values):  # an expert may be sent no token of a batch
            self._called.add(place)
            self._visit(place, values)

    def confirm(self) -> None:
        """Raise `AblationError` for the first component of which nothing was seen."""
        for place, rows in places(self._components).items():
            if place in self._called:
                continue
            site, side, _ = place
            if side == "expert":
                raise AblationError(
                    f"{self._components[rows[0]].name!r} was sent none of the calibration examples' tokens, so nothing "
                    f"is known of what it returns; give more calibration examples, or leave it out of the components"
                )
            raise AblationError(
                f"module {site!r} was never called while the calibration examples passed through the model, so nothing "
                f"is known of its {side}s; exclude it from the components"
            )


def places(components: Components) -> dict[Place, list[int]]:
    """Group row numbers by what is seen at one place: a side of a site, or an expert."""
    groups: dict[Place, list[int]] = {}
    for i, row in enumerate(components):
        groups.setdefault((row.site, row.side, row.position if row.side == "expert" else 0), []).append(i)
    return groups


def _spread(components: Components, by_place: dict[Place, Tensor]) -> Tensor:
    """Return (components.width,) float32 values on the CPU from (channels,) values by place."""
    values = torch.zeros(components.width)
    for place, rows in places(components).items():
        own = by_place[place].float().cpu()
        values[components.channels_of(rows)] = own[components.positions_of(rows) - place[2]]
    return values


def _check_featured(components: Components) -> None:
    """Raise `AblationError` for the first component whose channels have no constants of their own."""
    for row in components:
        if row.side == "parameter":
            raise AblationError(
                f"{row.name!r} is a slice of a parameter and has no activations to take a constant from; use "
                f"ZeroWeight(), or components found by conv_filters, neurons or input_features"
            )
        if row.side == "module" and row.axis == 0:
            raise AblationError(
                f"{row.name!r} is a whole module, and nothing is known of where its features lie; find it with "
                f"modules(..., axis=, size=), or use ZeroActivation() or Resample()"
            )
