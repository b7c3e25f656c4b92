"""Ablations by their labels."""

from coar.ablation.optimal import Optimal
from coar.ablation.positions import PositionMean
from coar.ablation.replacements import Ablation, Calibrated, Resample, ZeroActivation, ZeroWeight
from coar.ablation.statistics import Mean, Peak
from coar.errors import SettingsError
from coar.examples import Examples

ABLATIONS: dict[str, type[Ablation]] = {
    cls.label: cls for cls in (ZeroWeight, ZeroActivation, Mean, PositionMean, Peak, Optimal, Resample)
}


def choose_ablation(label: str, *, calibration: Examples) -> Ablation:
    """Return the ablation that a label stands for, with its usual settings.

    Args:
        label: `zero` (weights), `zero_activation`, `mean`, `position_mean`, `peak`, `optimal` or `resample`.
        calibration: The examples that means, peaks and optimal constants are computed from.

    Raises:
        SettingsError: When there is no such ablation.
    """
    if label not in ABLATIONS:
        raise SettingsError(f"unknown ablation {label!r}; choose one of {', '.join(ABLATIONS)}")
    kind = ABLATIONS[label]
    return kind(calibration=calibration) if issubclass(kind, Calibrated) else kind()
