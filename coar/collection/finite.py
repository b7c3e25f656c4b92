"""Refusal of units with values that are not finite; the error names the example."""

import numpy as np

from coar.errors import OutputError
from coar.store.gradients import GradientUnit
from coar.store.plan import Unit
from coar.store.run import Run
from coar.study import Study


def check_gradients_finite(
    study: Study, unit: GradientUnit, examples: slice, kept: np.ndarray, ablated: np.ndarray, outputs: np.ndarray
) -> None:
    """Raise `OutputError`, naming round and example, when an output or a mask gradient is not finite."""
    bad = ~np.isfinite(outputs).all(0) | np.isinf(kept).any(1) | np.isinf(ablated).any(1)
    bad |= (np.isnan(kept) & np.isnan(ablated)).any(1)  # a mean over no mask gradients is NaN, but never both means
    if bad.any():
        example = examples.start + int(bad.argmax())
        raise OutputError(
            f"round {unit.round} of mask gradients gives outputs or gradients that are not finite for example "
            f"{_identity(study, example)}; nothing of the unit was stored: use float32, a smaller ablated fraction, or "
            f"leave the example out in a new run"
        )


def check_finite(study: Study, run: Run, unit: Unit, outputs: np.ndarray, base: np.ndarray | None) -> None:
    """Raise `OutputError`, naming mask and example, when an output of a unit is not finite."""
    rows, examples = run.rows_of(unit)
    if base is not None and not np.isfinite(base).all():
        example = examples.start + int((~np.isfinite(base)).argmax())
        raise OutputError(
            f"the unablated model gives {base[example - examples.start]} for example {_identity(study, example)}; "
            f"correct that input or leave it out"
        )
    bad = np.argwhere(~np.isfinite(outputs))
    if len(bad):
        row, example = rows.start + int(bad[0, 0]), examples.start + int(bad[0, 1])
        raise OutputError(
            f"{run.plan.label(row)} gives {outputs[tuple(bad[0])]} for example {_identity(study, example)} ({len(bad)} "
            f"of {outputs.size} outputs in this unit are not finite); nothing of the unit was stored: use float32, a "
            f"smaller ablated fraction, or leave the example out in a new run"
        )


def _identity(study: Study, example: int) -> str:
    identifier = np.asarray(study.examples.metadata["id"])[example]
    return f"{example} (id {identifier})"
