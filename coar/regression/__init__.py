"""From masks and outputs to attributions: one linear model per example."""

from coar.regression.fitting import METHODS, fit, fit_share

__all__ = ["METHODS", "fit", "fit_share"]
