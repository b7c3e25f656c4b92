"""Checks of gates: gating by weights and by outputs agree for every site, and what is gated is what the model reads."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as trees

from coar.components.table import Components
from coar.equivalence import ROUNDINGS, SMALLEST, compare, difference, rounding
from coar.equivalence import Kind as Difference
from coar.examples import Examples
from coar.forward.runner import FastRunner, ReferenceRunner
from coar.outputs.base import Output
from coar.preflight.passes import COARSE, rounded
from coar.preflight.tracing import rounding_of

log = logging.getLogger(__name__)
Parts = tuple[nn.Module, Components, Tensor, Output]
ALLOWED = 1e-3  # difference of two ways to ablate, relative to what the ablation changes
NOISE = 3e-4  # the same, relative to the largest output
LAYERS = ("torch.nn.modules.conv", "torch.nn.modules.linear")  # which return one tensor
SITES = 8  # sites whose returned tensors are tried, those with several first


def compare_with_reference(
    fast: FastRunner, parts: Parts, examples: Examples, masks: np.ndarray, called: set[str], *, split: bool = False
) -> tuple[float | None, dict[str, str]]:
    """Compare a fast runner with a reference runner.

    They are compared under the first and the last mask, and under one that ablates one component of every site.
    Components that have no output are kept.

    Args:
        fast: A fast runner in float32.
        parts: Its model, components, replacements and output.
        examples: The examples.
        masks: (masks, components) boolean masks, all of which the fast runner runs.
        called: Sites whose module is called, see `called_sites`.
        split: Whether the reference runner gets the examples in two batches.

    Returns:
        The largest difference of their outputs, relative to the largest output, which is None when no component has an
        output, or both runners resample in hooks; and by name of a check, in words how they disagree, or "".
    """
    model, components, constants, output = parts
    rows = [i for i, row in enumerate(components) if row.side != "parameter" and row.site in called]
    block = fast.load(examples, 0, len(examples))
    if not rows or block.sources:
        return None, {"gates": ""}
    chosen, own = components, constants
    if len(rows) < len(components):
        chosen = Components(components[i] for i in rows)
        own = constants[..., torch.from_numpy(components.channels_of(rows))]
    size, precision = min(fast.batch_size, len(examples)), rounding(model)

    def of_reference(keeps: np.ndarray, batch_size: int, given: Examples = examples) -> np.ndarray:
        reference = ReferenceRunner(model, chosen, own, output, batch_size=batch_size)
        return reference.outputs(reference.load(given, 0, len(given)), keeps)

    def outputs(keeps: np.ndarray, batch_size: int = size) -> tuple[np.ndarray, np.ndarray]:
        whole = np.ones((len(keeps), len(components)), dtype=bool)
        whole[:, rows] = keeps
        ends = _ends(keeps)
        return of_reference(keeps[ends], batch_size), fast.outputs(block, whole)[ends]

    base = of_reference(np.ones((1, len(rows)), dtype=bool), size)
    tried = np.concatenate([masks[:, rows], _one_of_each(chosen)[None]])
    expected, found = outputs(tried, -(-size // 2) if split else size)
    compared = compare(expected, found, Difference.REFORMULATED, precision=precision)
    if not agree(base, expected, found, precision):  # a pass may compute in autocast
        precision = max(precision, rounding_of(lambda: of_reference(tried[:1], size)))
    if agree(base, expected, found, precision):  # what is not finite in both ways is an error of the first unit
        return compared.error, {"gates": ""}
    if split and agree(base, *(together := outputs(tried)), precision):
        moved = of_reference(tried[_ends(tried)], size, rounded(examples))
        amplified = difference(together[0], moved)  # batches of two sizes round differently
        by_rounding = compared.error < min(COARSE, ROUNDINGS * amplified)
        return compared.error, {"gates": "", "batch": "" if by_rounding else _by_batch(model, f"{compared}")}
    return compared.error, {"gates": _disagreement(model, chosen, base, outputs, f"{compared}", precision)}


def _ends(masks: np.ndarray) -> list[int]:
    """Return the numbers of the masks that are compared."""
    return sorted({0, max(len(masks) - 2, 0), len(masks) - 1})


def _by_batch(model: nn.Module, seen: str) -> str:
    return (
        f"under masks {type(model).__name__} gives outputs that {seen} in batches of another size, though without "
        f"masks it does not, as where a condition depends on the whole batch, so all numbers would depend on the batch "
        f"size: let the model compute each example alone"
    )


def _one_of_each(components: Components) -> np.ndarray:
    """Return a mask that ablates one component of every site, in its middle."""
    keep = np.ones(len(components), dtype=bool)
    keep[[rows[len(rows) // 2] for rows in components.sites().values()]] = False
    return keep


def agree(base: np.ndarray, expected: np.ndarray, found: np.ndarray, precision: float) -> bool:
    """Return whether two ways agree under every mask, relative to what the mask changes of the base outputs."""
    finite = np.isfinite(expected)
    if not np.array_equal(finite, np.isfinite(found)):
        return False
    base, expected, found = (np.where(finite, values, 0) for values in (base, expected, found))
    error = np.abs(found - expected).max(1)
    effect = np.abs(expected - base).max(1)
    allowed = max(NOISE, ROUNDINGS * precision) * np.abs(expected).max() + ALLOWED * effect
    return bool((error <= np.maximum(allowed, SMALLEST)).all())


def _disagreement(
    model: nn.Module,
    components: Components,
    base: np.ndarray,
    outputs: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    seen: str,
    precision: float,
) -> str:
    """Return in words at which site two ways to ablate disagree by themselves."""
    everything = np.ones(len(components), dtype=bool)
    guilty = ""
    for (site, side, _), rows in components.sites().items():
        keep = everything.copy()
        keep[rows] = False
        if not agree(base, *outputs(keep[None]), precision):
            guilty = f" at the {side} of {site!r}, a {type(model.get_submodule(site)).__name__}"
            break
    return (
        f"ablating by weights and by outputs gives outputs that {seen}{guilty}: some layer does not compute the "
        f"function of its type, or the model uses its weight or its output in another way, so weights "
        f"of its components would depend on how they are ablated; exclude it"
    )


def unread_outputs(model: nn.Module, components: Components, run: Callable[[nn.Module], np.ndarray]) -> str:
    """Return in words which module's first returned tensor the model does not read, though it reads others; or "".

    Gates change the first tensor that a module returns. A module of which no tensor is read is a warning.

    Args:
        model: The model.
        components: The components.
        run: Runs the model on a few examples and returns their outputs.
    """
    sites = [site for site, side, _ in components.sites() if side in ("output", "module")]
    kinds = {site: type(model.get_submodule(site)) for site in sites}
    sites = [site for site in sites if kinds[site] is nn.Identity or not kinds[site].__module__.startswith(LAYERS)]
    if not sites:
        return ""
    tensors: dict[str, int] = {}  # returned by each site

    def count(site: str, returned: Any) -> None:
        tensors[site] = sum(_moves(leaf) for leaf in trees.tree_leaves(returned))

    plain = _hooked(model, sites, count, lambda: run(model))
    for site in sorted(tensors, key=lambda site: tensors[site] == 1)[:SITES]:
        if not np.array_equal(_changed(model, site, True, run), plain, equal_nan=True):
            continue
        kind = kinds[site].__name__
        if tensors[site] == 1 or np.array_equal(_changed(model, site, False, run), plain, equal_nan=True):
            log.warning(
                "no output of the first examples changes when all that module %r, a %s, returns is 0: the model drops "
                "it, or multiplies it by 0, so the weights of its components are noise around 0 unless other examples "
                "use it",
                site,
                kind,
            )
        else:
            return (
                f"module {site!r}, a {kind}, returns several tensors, and the model reads others than the first, which "
                f"gates change: ablating its components changes no output, so their weights would be 0; choose "
                f"components of a module inside it, or of the one that reads it"
            )
    return ""


def _moves(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _hooked(model: nn.Module, sites: list[str], see: Callable[[str, Any], Any], run: Callable[[], Any]) -> Any:
    with ExitStack() as stack:
        for site in sites:
            hook = model.get_submodule(site).register_forward_hook(lambda _m, _args, y, site=site: see(site, y))
            stack.callback(hook.remove)
        return run()


def _changed(model: nn.Module, site: str, first: bool, run: Callable[[nn.Module], np.ndarray]) -> np.ndarray:
    """Return outputs with zeros for the first tensor that a module returns, or for all others."""

    def change(_site: str, returned: Any) -> Any:
        leaves, structure = trees.tree_flatten(returned)
        numbers = [i for i, leaf in enumerate(leaves) if _moves(leaf)]
        for i in numbers[:1] if first else numbers[1:]:
            leaves[i] = torch.zeros_like(leaves[i])
        return trees.tree_unflatten(leaves, structure)

    found: np.ndarray = _hooked(model, [site], change, lambda: run(model))
    return found
