"""Text summaries of a run's contents and of an estimated cost."""

import math
from typing import TYPE_CHECKING

from coar.store.gradients import MaskGradients
from coar.store.run import Run

if TYPE_CHECKING:
    from coar.collection.cost import Estimate


def describe(run: Run) -> dict[str, str]:
    """Return a summary of a run as text by heading."""
    plan, mask_gradients = run.plan, MaskGradients(run)
    missing = len(run.missing_units()) + len(mask_gradients.missing_units())
    precision = run.facts.precision
    measured = "" if precision.error is None else f", error {precision.error:.4f} of the spread"
    counts = [f"{plan.count(s.split, s.ablated_fraction)} {s.split} at {s.ablated_fraction:g}" for s in plan.segments]
    units = len(run.units()) + len(mask_gradients.units())
    preflight = run.facts.preflight
    accepted = {f"accepted: {check}": seen for check, seen in preflight.accepted.items()} if preflight else {}
    imported = run.published
    source = {} if imported is None else {"published": f"{imported.setup}, {imported.dtype}, from {imported.file}"}
    if imported is not None and imported.not_finite:
        zero = f"weights of {len(imported.zeroed)} components 0" if imported.zeroed else ""
        source["not finite"] = f"{imported.not_finite} numbers; {zero or f'{len(imported.left_out)} examples left out'}"
    return {
        "run": str(run.path),
        **source,
        "components": repr(run.components).removeprefix("Components(").removesuffix(")"),
        "examples": str(run.n_examples),
        "masks": ", ".join(dict.fromkeys(counts)) or "none",
        "gradients": str(mask_gradients.count or "none"),
        "ablation": str(run.fingerprint["ablation"]["name"]),
        "output": ", ".join(f"{key}={value}" for key, value in run.fingerprint["output"].items()),
        "precision": f"{precision.name}{measured}",
        "checks": f"passed: {', '.join(preflight.passed)}" if preflight else "not made",
        **accepted,
        "collected": f"{units - missing} of {units} units" + ("" if missing else ", complete"),
    }


def describe_estimate(estimate: "Estimate") -> dict[str, str]:
    """Return a summary of a run's estimated cost as text by heading."""
    ratio = estimate.seconds_per_gradient / estimate.seconds_per_mask
    gradient_pass = "none: these components have no gradient" if math.isnan(ratio) else f"{ratio:.2f} masks"
    words = {
        "one mask": f"{estimate.seconds_per_mask:.3g} s over all examples",
        "one gradient": gradient_pass,
        "preparation": f"{estimate.seconds_to_prepare:.3g} s on each worker",
        "passes": f"{estimate.passes:,.0f}",
        "time": f"{estimate.hours:.3g} h on all workers",
        "disk": f"{estimate.disk_bytes / 2**20:,.0f} MiB, with one fit",
        "memory to fit": f"{estimate.fit_bytes / 2**20:,.0f} MiB",
    }
    if estimate.pilot:
        pilot, more = estimate.pilot, estimate.passes_per_hundredth
        words["pilot"] = (
            f"correlation {pilot.correlation:.3f} from {pilot.gradients} mask gradients and {pilot.masks} masks "
            f"on a few "
            f"examples; {pilot.ceiling()}"
        )
        words["0.01 more"] = f"about {more:,.0f} passes" if math.isfinite(more) else "beyond what is reachable"
    return words
