"""Ablations by their labels."""

from coar.ablation.base import Ablation, Calibrated
from coar.ablation.means import Mean, Peak, PositionMean
from coar.ablation.optimal import Optimal
from coar.ablation.resample import Counterfactual, Resample
from coar.ablation.zero import ZeroActivation, ZeroWeight
from coar.errors import SettingsError
from coar.examples import Examples

ABLATIONS: dict[str, type[Ablation]] = {
    cls.label: cls for cls in (ZeroWeight, ZeroActivation, Mean, PositionMean, Peak, Optimal, Resample, Counterfactual)
}


def choose_ablation(label: str, *, calibration: Examples) -> Ablation:
    """Return the ablation with a label, with default settings.

    Args:
        label: `zero` (weights), `zero_activation`, `mean`, `position_mean`, `peak`, `optimal`, `resample` or
            `counterfactual`.
        calibration: The examples that means, peaks and optimal constants are computed from; others ignore them.

    Raises:
        SettingsError: When there is no such ablation.
    """
    if label not in ABLATIONS:
        raise SettingsError(f"unknown ablation {label!r}; choose one of {', '.join(ABLATIONS)}")
    kind = ABLATIONS[label]
    return kind(calibration=calibration) if issubclass(kind, Calibrated) else kind()
