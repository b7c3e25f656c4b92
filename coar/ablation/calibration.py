"""Passes of calibration examples through a model: the activations of its components, and their mean and spread."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from coar.ablation.padding import Padding, without_padding
from coar.ablation.writers import writer_moments
from coar.components.table import Components, Side
from coar.errors import AblationError
from coar.examples import Examples, call_model
from coar.gates.experts import Routing, check_weighted
from coar.gates.hook import check_features, hook, layout_at
from coar.gates.layouts import Layout, know_layouts
from coar.gates.projections import called_projections

log = logging.getLogger(__name__)

Place = tuple[str, Side, int]  # site, side, and position of the first channel, which is not 0 only for experts
Visit = Callable[[Place, Tensor], None]  # receives (values, channels) at every call of a module
Take = Callable[[Place, Tensor, Tensor | None], Tensor]  # turns (..., channels), and which tokens are text, into values


def activation_moments(
    model: nn.Module, components: Components, calibration: Examples, *, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Return (components.width,) means and standard deviations over examples and positions.

    Those of edges are their writers', without each text's first position, see `writer_moments`.

    Raises:
        AblationError: When a component has no activations, or its module is never called.
    """
    if components.of_edges:
        return writer_moments(model, components, calibration, batch_size=batch_size)
    sums: dict[Place, Tensor] = {}  # (3, channels): number of values, their sum, and the sum of their squares

    def add(place: Place, values: Tensor) -> None:
        wide = values.double()
        here = torch.stack([torch.full_like(wide[0], len(wide)), wide.sum(0), wide.square().sum(0)])
        sums[place] = sums[place] + here if place in sums else here

    walk(model, components, calibration, batch_size=batch_size, visit=add)
    means = {place: total / count for place, (count, total, _) in sums.items()}
    squares = {place: square / count for place, (count, _, square) in sums.items()}
    deviations = {place: (squares[place] - means[place].square()).clamp_min(0).sqrt() for place in sums}
    return per_channel(components, means), per_channel(components, deviations)


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
    """Run examples through the model and pass the activations of components to a function.

    Args:
        model: The model in evaluation mode.
        components: The components, none of them a slice of a parameter.
        examples: The examples.
        batch_size: Largest number of examples per forward pass.
        visit: Called with the place and (values, channels) at every call of a module.
        take: Turns activations into these values; by default all activations except those of padding.

    Raises:
        AblationError: When a component has no activations, its module is never called, or padding is unknown.
    """
    _check_featured(components)
    know_layouts(model, examples)
    observer, sites = _Observer(components, visit, take), components.sites()
    with ExitStack() as stack, torch.inference_mode():
        stack.enter_context(called_projections(model, [site for site, _, _ in sites]))
        for (site, side, axis), rows in sites.items():
            module = model.get_submodule(site)
            if side == "expert":
                handle = module.register_forward_pre_hook(observer.routes(site, rows), with_kwargs=True)
            elif side != "parameter" and side != "edge":  # noqa: PLR1714 - so mypy narrows the type
                layout = layout_at(model, site, side, axis)
                show = observer.tensors((site, side, 0), axis, components[rows[0]].size, layout)
                handle = hook(module, side, show)
            stack.callback(handle.remove)
        for start in range(0, len(examples), batch_size):
            inputs, targets = examples.block(start, start + batch_size)
            observer.rows = len(targets)
            observer.padding = Padding(model, inputs)
            if start == 0 and observer.padding.unread:
                log.warning(
                    "the inputs %s are not read as masks of padding, so means count all positions",
                    ", ".join(observer.padding.unread),
                )
            call_model(model, inputs)
    observer.confirm()


class _Observer:
    """Passes the activations of components on to a function, and records which of the components were reached.

    Attributes:
        padding: The padding of the current batch.
        rows: Number of its examples.
    """

    def __init__(self, components: Components, visit: Visit, take: Take) -> None:
        self.padding: Padding
        self.rows = 0
        self._components, self._visit, self._take = components, visit, take
        self._called: set[Place] = set()

    def tensors(self, place: Place, axis: int, features: int, layout: Layout) -> Callable[[Tensor], Tensor]:
        """Return a hook that passes on a tensor, examples first and features last, and leaves it unchanged."""

        def show(y: Tensor) -> Tensor:
            if place[1] == "module":
                check_features(y, place[0], axis, features)
            arranged = layout.arranged(y.detach(), max(1, y.shape[layout.axis] // self.rows))
            values = arranged.movedim(axis, -1)
            self._see(place, self._take(place, values, self.padding.at(place[0], values.shape[:-1])))
            return y

        return show

    def routes(self, site: str, rows: list[int]) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        """Return a hook that, before a mixture runs, passes on each expert's outputs for the tokens sent to it."""

        def show(mixture: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            routes = Routing.of(mixture, site, args, kwargs)
            check_weighted(mixture.forward, site, routes)
            tokens = self.padding.at(site, routes.experts.shape[:1])
            returned = without_padding(routes.returned(mixture.forward), tokens)
            experts = without_padding(routes.experts, tokens).flatten()
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
        """Raise `AblationError` for the first component that no activation reached."""
        for place, rows in places(self._components).items():
            if place in self._called:
                continue
            site, side, _ = place
            if side == "expert":
                raise AblationError(
                    f"{self._components[rows[0]].name!r} was sent none of the calibration examples' tokens, so it has "
                    f"no activations to average; give more calibration examples, or leave it out of the components"
                )
            raise AblationError(
                f"module {site!r} was never called while the calibration examples passed through the model, so its "
                f"{side}s have no activations to average; exclude it from the components"
            )


def places(components: Components) -> dict[Place, list[int]]:
    """Group row numbers by place: a side of a site, or an expert."""
    groups: dict[Place, list[int]] = {}
    for i, row in enumerate(components):
        groups.setdefault((row.site, row.side, row.position if row.side == "expert" else 0), []).append(i)
    return groups


def per_channel(components: Components, by_place: dict[Place, Tensor]) -> Tensor:
    """Return (components.width,) float32 values on the CPU from (channels,) values by place."""
    values = torch.zeros(components.width)
    for place, rows in places(components).items():
        own = by_place[place].float().cpu()
        values[components.channels_of(rows)] = own[components.positions_of(rows) - place[2]]
    return values


def _check_featured(components: Components) -> None:
    """Raise `AblationError` for the first component without activations to take constants from."""
    for row in components:
        if row.side == "edge":
            raise AblationError(
                f"{row.name!r} is an edge, or a writer of edges, which takes constants of this kind from no activation "
                f"of its own; use Mean(calibration=...), Optimal(calibration=...), ZeroActivation() or Resample()"
            )
        if row.side == "parameter":
            raise AblationError(
                f"{row.name!r} is a slice of a parameter and has no activations to take a constant from; use "
                f"ZeroWeight(), or components found by conv_filters, neurons or input_features"
            )
        if row.side == "module" and row.axis == 0:
            raise AblationError(
                f"{row.name!r} is a whole module, and the axis of its features is unknown; find it with "
                f"modules(..., axis=, size=), or use ZeroActivation() or Resample()"
            )
