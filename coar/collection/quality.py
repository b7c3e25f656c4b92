"""How well a run predicts so far, how far more passes would take it, and what is reachable."""

import dataclasses
import math

from coar.attributions import Attributions

FIRST_GRADIENTS, FIRST_MASKS = 32, 256


VALIDATION_MASKS = 64


@dataclasses.dataclass(frozen=True)
class RunQuality:
    """Where a run stands.

    Attributes:
        mask gradients, masks: How many there are.
        correlation: Mean correlation of the fit on validation masks.
        reachable: Estimated correlation of the best linear model; NaN where only masks are there to tell.
        deviation: Standard error of `reachable`, roughly; NaN likewise.
        error: Share of the outputs' variance that the weights' errors cost, estimated.
        explained: Share that they explain.
    """

    gradients: int
    masks: int
    correlation: float
    reachable: float = math.nan
    deviation: float = math.nan
    error: float = math.nan
    explained: float = math.nan

    def rise(self, gradients: int, masks: int, components: int) -> float:
        """Predict how far more mask gradients or masks raise the correlation.

        Errors from mask gradients fall as one over their number, and masks shrink them as ridge does for components
        alike, by 1 / (1 + masks * error / (components * noise)). Without mask gradients they fall as one over the
        number of masks.
        """
        gain = self._left(self.gradients, self.masks, components)
        gain -= self._left(self.gradients + gradients, self.masks + masks, components)
        return math.sqrt(self.correlation**2 + max(gain, 0.0)) - self.correlation

    def ceiling(self) -> str:
        """Say how far the best linear model is estimated to reach."""
        if math.isnan(self.reachable):
            return "masks alone do not tell what is reachable"
        return f"the linear model's ceiling is estimated at {self.reachable:.3f} +- {self.deviation:.3f}"

    def _left(self, gradients: int, masks: int, components: int) -> float:
        """Return the share of variance that errors still cost."""
        if not self.gradients:
            return self.error * self.masks / max(masks, 1)
        noise = max(1 - self.explained - self.error, 1e-3)
        left = self.error * self.gradients / gradients
        return left / (1 + masks * left / (components * noise))


def quality_of(fitted: Attributions, gradients: int, masks: int, before: RunQuality | None) -> RunQuality:
    """Return how well a fit predicts validation masks, beside the step before it where there was one."""
    facts = fitted.fit
    correlation = float(facts["validation"])
    quality = facts.get("prior_quality")
    if quality:
        # a mean of squares cannot be below zero, though its estimate can
        error = max(quality["error"], quality["deviation"] / 2)
        width = quality["deviation"] / (2 * max(quality["reachable"], 0.1))
        return RunQuality(gradients, masks, correlation, quality["reachable"], width, error, quality["explained"])
    # from masks alone, errors fall as one over their number: the last rise tells how far there is to go
    rise = correlation**2 - before.correlation**2 if before else 0.25
    error = max(rise * (before.masks / (masks - before.masks) if before and masks > before.masks else 1.0), 0.0)
    return RunQuality(gradients, masks, correlation, error=error, explained=correlation**2)
