"""How components are switched off: what replaces them, the gates that apply masks, and permanent folding."""

from coar.ablation.choice import ABLATIONS, choose_ablation
from coar.ablation.folding import Constant, check_permanent, fold, following_batch_norms
from coar.ablation.gates import Gates, called_sites
from coar.ablation.optimal import Optimal
from coar.ablation.positions import PositionMean
from coar.ablation.replacements import Ablation, Calibrated, Resample, ZeroActivation, ZeroWeight
from coar.ablation.sharing import SharedPasses
from coar.ablation.statistics import Mean, Peak

__all__ = [
    "ABLATIONS",
    "Ablation",
    "Calibrated",
    "Constant",
    "Gates",
    "Mean",
    "Optimal",
    "Peak",
    "PositionMean",
    "Resample",
    "SharedPasses",
    "ZeroActivation",
    "ZeroWeight",
    "called_sites",
    "check_permanent",
    "choose_ablation",
    "fold",
    "following_batch_norms",
]
