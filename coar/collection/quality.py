"""The quality of an unfinished run, its predicted rise with more passes, and its estimated ceiling."""

import dataclasses
import math

from coar.attributions import Attributions

FIRST_GRADIENTS, FIRST_MASKS = 32, 256


VALIDATION_MASKS = 64


@dataclasses.dataclass(frozen=True)
class RunQuality:
    """The quality of a run so far.

    Attributes:
        gradients, masks: Numbers of mask gradients and masks.
        correlation: Mean correlation of the fit on validation masks.
        reachable: Estimated correlation of the best linear model; NaN without mask gradients.
        deviation: Approximate standard error of `reachable`; NaN likewise.
        error: Estimated share of the outputs' variance that errors of the weights cost.
        explained: Share of the outputs' variance that the weights explain.
    """

    gradients: int
    masks: int
    correlation: float
    reachable: float = math.nan
    deviation: float = math.nan
    error: float = math.nan
    explained: float = math.nan

    def rise(self, gradients: int, masks: int, components: int) -> float:
        """Predict the rise in correlation from more mask gradients or masks.

        Errors from mask gradients fall as one over their number. Masks shrink them by 1 / (1 + masks * error /
        (components * noise)), as ridge regression does when components are alike. Without mask gradients, errors fall
        as one over the number of masks.
        """
        gain = self._left(self.gradients, self.masks, components)
        gain -= self._left(self.gradients + gradients, self.masks + masks, components)
        return math.sqrt(self.correlation**2 + max(gain, 0.0)) - self.correlation

    def ceiling(self) -> str:
        """Return a sentence with the estimated ceiling of the best linear model."""
        if math.isnan(self.reachable):
            return "the linear model's ceiling cannot be estimated from masks alone"
        return f"the linear model's ceiling is estimated at {self.reachable:.3f} +- {self.deviation:.3f}"

    def _left(self, gradients: int, masks: int, components: int) -> float:
        """Return the share of variance that errors cost with these numbers."""
        if not self.gradients:
            return self.error * self.masks / max(masks, 1)
        noise = max(1 - self.explained - self.error, 1e-3)
        left = self.error * self.gradients / gradients
        return left / (1 + masks * left / (components * noise))


def quality_of(fitted: Attributions, gradients: int, masks: int, before: RunQuality | None) -> RunQuality:
    """Return the quality of a fit on validation masks; `before` is the quality of the previous step, if any."""
    correlation, quality = fitted.fit.require_validation(), fitted.fit.prior_quality
    if quality is not None:
        # a mean of squares cannot be below zero, though its estimate can
        error = max(quality.error, quality.deviation / 2)
        width = quality.deviation / (2 * max(quality.reachable, 0.1))
        return RunQuality(gradients, masks, correlation, quality.reachable, width, error, quality.explained)
    # from masks alone, errors fall as one over their number: the last rise gives the remaining error
    rise = correlation**2 - before.correlation**2 if before else 0.25
    error = max(rise * (before.masks / (masks - before.masks) if before and masks > before.masks else 1.0), 0.0)
    return RunQuality(gradients, masks, correlation, error=error, explained=correlation**2)
