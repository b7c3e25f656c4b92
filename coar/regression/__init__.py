"""From masks and outputs to attributions: one linear model per example."""

from coar.regression.fitting import fit, fit_share
from coar.regression.solvers import METHODS

__all__ = ["METHODS", "fit", "fit_share"]
