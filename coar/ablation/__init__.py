"""How components are switched off: what replaces them, the gates that apply masks, and permanent folding."""

from coar.ablation.folding import fold, following_batch_norms
from coar.ablation.gates import Gates, called_sites
from coar.ablation.replacements import Ablation, Mean, ZeroWeight, choose_ablation

__all__ = [
    "Ablation",
    "Gates",
    "Mean",
    "ZeroWeight",
    "called_sites",
    "choose_ablation",
    "fold",
    "following_batch_norms",
]
