"""Batch norms that alone follow a layer: found in a forward pass and confirmed by comparing outputs."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coar.components.layers import output_channels
from coar.components.table import Components
from coar.equivalence import Kind, compare, fall_back
from coar.examples import device_of, devices_of
from coar.gates.folding import fold
from coar.gates.gates import Gates
from coar.gates.weight import reads_own_weight
from coar.model_copy import independent_copy

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
FROZEN = "FrozenBatchNorm2d"  # how names end of classes of torchvision and transformers, whose scales are buffers too
STATISTICS = ("running_mean", "running_var", "weight", "bias")


def is_batch_norm(module: nn.Module) -> bool:
    """Return whether a module is a batch norm with fixed statistics: torch's, or a frozen one of another library."""
    frozen = type(module).__name__.endswith(FROZEN) and all(name in module._buffers for name in STATISTICS)
    return frozen or (isinstance(module, BATCH_NORMS) and module.running_mean is not None)


def following_batch_norms(
    model: nn.Module, components: Components, *, run: Callable[[nn.Module], Tensor]
) -> dict[str, str]:
    """Find, for sites without a bias, the batch norm that alone consumes their output.

    A batch norm is a candidate when its input is the very tensor that the site returned. A model may also read that
    tensor elsewhere or change it in between, so a candidate counts only if a copy with constants folded into it, and
    gates that fold it into the weights, both give the outputs of gates without folding, for constants of either sign.

    Args:
        model: The model in evaluation mode.
        components: The components of the study.
        run: Runs a model on some examples and returns its outputs, a tensor of any shape.

    Returns:
        Path of the batch norm by path of the site.
    """
    candidates = _candidates(model, components, run)
    constants = _large_constants(model, components, candidates)

    def differs(pairs: dict[str, str], values: Tensor) -> str:
        sites = {(site, "output") for site in pairs}
        rows = [i for i, row in enumerate(components) if (row.site, row.side) in sites and row.position % 2 == 0]
        keep = torch.ones(len(components), dtype=torch.bool, device=device_of(model))
        keep[rows] = False
        results = []
        for norms in ({}, pairs):
            with Gates(model, components, values, batch_norms=norms) as gates:
                gates.set(keep)
                results.append(run(model))
        folded = independent_copy(model)
        flat = np.split(values[components.channels_of(rows)].numpy(), components.sizes_of(rows).cumsum()[:-1])
        replacements = [tuple(own.tolist()) for own in flat]
        fold(folded, [components[i] for i in rows], replacements, batch_norms=pairs)
        results.append(run(folded))
        compared = (compare(results[0], other, Kind.REFORMULATED) for other in results[1:])  # strict in any precision
        return next((f"outputs {one}" for one in compared if not one.agrees), "")

    signs, both = _signs(components, candidates)

    def why_not(pairs: dict[str, str]) -> str:
        return differs(pairs, signs * constants) or (differs(pairs, -signs * constants) if not both else "")

    if not candidates or not why_not(candidates):
        return candidates
    found = {}
    for site, name in candidates.items():
        if reason := why_not({site: name}):
            fall_back(f"folding of the batch norm {name!r} into {site!r}", reason)
        else:
            found[site] = name
    return found


def _large_constants(model: nn.Module, components: Components, candidates: Mapping[str, str]) -> Tensor:
    """Return constants far from a batch norm's statistics: a channel's absolute mean plus one standard deviation."""
    constants = torch.zeros(components.width)
    for (site, side, _), rows in components.sites().items():
        if side == "output" and site in candidates:
            norm, positions = model.get_submodule(candidates[site]), components.positions_of(rows)
            large = norm.running_mean.abs() + norm.running_var.sqrt()  # type: ignore[operator]
            constants[components.channels_of(rows)] = large.float().cpu()[positions]
    return constants


def _signs(components: Components, candidates: Mapping[str, str]) -> tuple[Tensor, bool]:
    """Return signs of constants that alternate over the ablated channels of a site, and whether all sites have both."""
    signs, both = torch.ones(components.width), True
    for (site, side, _), rows in components.sites().items():
        if side == "output" and site in candidates:
            positions = components.positions_of(rows)
            signs[components.channels_of(rows)] = torch.from_numpy(np.where(positions % 4 < 2, 1.0, -1.0)).float()
            both &= bool((positions % 4 == 0).any() and (positions % 4 == 2).any())
    return signs, both


def _candidates(model: nn.Module, components: Components, run: Callable[[nn.Module], Tensor]) -> dict[str, str]:
    sites = {
        site
        for (site, side, _) in components.sites()
        if side == "output" and reads_own_weight(layer := model.get_submodule(site)) and layer.bias is None
    }
    returned: list[tuple[Tensor, str]] = []  # holds the tensors, so that no other tensor gets their identity
    pairs: list[tuple[str, str]] = []

    def record(site: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _module, _args, y: returned.append((y, site))

    def fits(site: str, name: str) -> bool:
        layer, norm = model.get_submodule(site), model.get_submodule(name)
        together = devices_of(layer) == devices_of(norm)
        return together and output_channels(layer) == len(norm.running_mean)  # type: ignore[arg-type]

    def match(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def compare(_module: nn.Module, args: tuple[Any, ...]) -> None:
            pairs.extend((site, name) for y, site in returned if args and args[0] is y and fits(site, name))

        return compare

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name in sites:
                stack.callback(module.register_forward_hook(record(name)).remove)
            if is_batch_norm(module):
                stack.callback(module.register_forward_pre_hook(match(name)).remove)
        run(model)
    once = {site for _, site in returned if sum(other == site for _, other in returned) == 1}
    norms = [name for _, name in pairs]
    return {site: name for site, name in pairs if site in once and norms.count(name) == 1}
