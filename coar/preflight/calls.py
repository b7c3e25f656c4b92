"""Checks of calls: modules of components run, or their weights matter without a call."""

import numpy as np

from coar.components.table import Components
from coar.examples import Examples
from coar.forward.batches import ExampleBlock
from coar.forward.runner import FastRunner
from coar.gates.gates import called_sites

MANY = 256  # examples that pass through a model before a module counts as not called
READ = 32  # modules that are not called of which each is ablated by itself


def uncalled_modules(runner: FastRunner, examples: Examples, first: Examples, called: set[str]) -> str:
    """Return in words which module is not called, and changes no output when it is ablated in its weights, or "".

    Args:
        runner: A runner of masks.
        examples: The examples of the study.
        first: The first few of them.
        called: Sites whose module is called by these, see `called_sites`.
    """
    components = runner.components
    rows = {site: rows for (site, side, _), rows in components.sites().items() if side != "parameter"}
    left = [site for site in rows if site not in called]
    if not left:
        return ""
    count = min(MANY, len(examples))
    block = runner.load(examples, 0, count)
    own = Components(components[rows[site][0]] for site in left)
    seen = called_sites(runner.model, own, run=lambda _model: runner.base_output(block))
    left = [site for site in left if site not in seen]
    few = runner.load(first, 0, len(first))
    silent = _without_effect(runner, few, [rows[site] for site in left])
    unused = [site for site, none in zip(left, silent, strict=True) if none]
    if not unused:
        return ""
    kind = type(runner.model.get_submodule(unused[0])).__name__
    others = f", as of {len(unused) - 1} other modules" if len(unused) > 1 else ""
    return (
        f"module {unused[0]!r}, a {kind}, is not called when {count} examples pass through the model, and no output "
        f"changes when it is ablated, so the weights of its components would be noise around 0{others}: exclude it, or "
        f"give examples that reach it"
    )


def _without_effect(runner: FastRunner, block: ExampleBlock, sites: list[list[int]]) -> list[bool]:
    """Return for each site, given by its rows, whether ablating it changes no output by any bit."""
    everything = np.ones((1, len(runner.components)), dtype=bool)
    base = runner.outputs(block, everything)

    def changes(rows: list[int]) -> bool:
        keep = everything.copy()
        keep[:, rows] = False
        return not np.array_equal(runner.outputs(block, keep), base, equal_nan=True)

    if not changes([row for rows in sites for row in rows]):
        return [True] * len(sites)
    return [not changes(rows) for rows in sites[:READ]] + [False] * len(sites[READ:])
