"""The trade-off between gain on targets and harm to references, and the bound on harm."""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from pydantic import Field

from coar.editing.goal import Columns, EditGoal
from coar.settings import Settings


class TradeOff(Settings):
    """How gain and harm are weighed.

    The trade-off is the mean over targets of sigmoid(margin / target_scale), or of sigmoid(-margin / target_scale) for
    goals that increase the output, plus `harm_weight` times the mean over groups of references of
    sigmoid(-margin / reference_scale). Smaller is better.

    Attributes:
        harm_weight: How much a point lost on references weighs against a point gained on targets.
        target_scale: Margin over which a target counts as changed, in units of the margin.
        reference_scale: Margin over which a reference counts as kept, in units of the margin.
    """

    harm_weight: float = Field(default=12.0, gt=0)
    target_scale: float = Field(default=1.0, gt=0)
    reference_scale: float = Field(default=1.0, gt=0)


class Bound(Settings):
    """The most accuracy that references may lose on the choosing examples.

    Attributes:
        mean: Share lost on average over groups, with its standard error added, so that it is likely to hold on other
            examples.
        group: Share lost by any one group.
    """

    mean: float = Field(default=0.01, ge=0, le=1)
    group: float = Field(default=0.03, ge=0, le=1)


@dataclass(frozen=True)
class Outcome:
    """The effect of a set of ablated components on the choosing examples.

    Attributes:
        value: The trade-off; smaller is better.
        targets: Accuracy on targets.
        lost: Share of accuracy that references lost, averaged over groups; negative where they gained.
        worst: The same of the group that lost most.
        excess: By how much the bound is exceeded; 0 within it.
    """

    value: float
    targets: float
    lost: float
    worst: float
    excess: float


@dataclass(frozen=True)
class Objective:
    """A trade-off and a bound over fixed examples.

    Attributes:
        weights: (examples,) share of each example among targets, or `harm_weight` times its share among references.
        scales: (examples,) signed margins over which an example counts as changed; the sigmoid of margin over scale
            is what it adds.
        group: (examples,) number of the reference's group, -1 for targets.
        partners: (examples,) position of the reference whose margin a target should reach, -1 for all other examples.
        clusters: (examples,) number of the cluster that counts as one observation in standard errors.
        base: (examples,) margins of the unablated model.
        bound: The bound on harm.
    """

    weights: np.ndarray
    scales: np.ndarray
    group: np.ndarray
    partners: np.ndarray
    clusters: np.ndarray
    base: np.ndarray
    bound: Bound

    @classmethod
    def of(cls, goal: EditGoal, metadata: Columns, base: np.ndarray, *, tradeoff: TradeOff, bound: Bound) -> Self:
        """Set up the objective of a goal from (examples,) margins of the unablated model."""
        targets, references = goal.resolve(metadata)
        weights, scales = np.zeros(len(base)), np.ones(len(base))
        group, partners = np.full(len(base), -2), np.full(len(base), -1)
        weights[targets] = 1 / len(targets)
        scales[targets] = tradeoff.target_scale * (1 if goal.direction == "decrease" else -1)
        group[targets] = -1
        group[references] = np.unique(goal.groups_of(metadata, references), return_inverse=True)[1]
        sizes = np.bincount(group[references])
        weights[references] = tradeoff.harm_weight / len(sizes) / sizes[group[references]]
        scales[references] = -tradeoff.reference_scale
        if goal.pairs is not None and goal.direction == "increase":
            partners[targets] = references[: len(targets)]
        return cls(weights, scales, group, partners, goal.clusters_of(metadata), base, bound)

    def with_harm_weight(self, factor: float) -> Self:
        """Return the objective with references that weigh more by a factor."""
        return replace(self, weights=self.weights * np.where(self.group == -1, 1.0, factor))

    @property
    def targets(self) -> np.ndarray:
        """Positions of the targets."""
        return np.flatnonzero(self.group == -1)

    @property
    def references(self) -> np.ndarray:
        """Positions of the references."""
        return np.flatnonzero(self.group >= 0)

    def unmet_fraction(self, outcome: Outcome) -> float:
        """Return the share of targets that are not as the goal requires."""
        return outcome.targets if self.scales[self.targets[0]] > 0 else 1 - outcome.targets

    def values(self, margins: np.ndarray, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Return the trade-off from (..., examples) margins, of some of the examples where `rows` names them."""
        return np.asarray(_sigmoid(margins / self.scales[rows]) @ self.weights[rows])

    def slopes(self, margins: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return (examples,) derivatives of each example's part of the objective by its margin, without weights.

        For references this is the derivative of the trade-off. A sigmoid is flat for targets that are far from
        changing, which would then be ignored. For targets it is therefore the derivative of
        log(1 + exp(margin / scale)), which is the same for targets that have changed.
        """
        level = _sigmoid(margins / self.scales[rows])
        return np.asarray(level * np.where(self.group[rows] == -1, 1, 1 - level) / self.scales[rows])

    def required_margins(self, before: np.ndarray) -> np.ndarray:
        """Return the (examples,) margins that the goal requires, from those of the unablated model.

        References keep theirs, and a target with a partner gets the partner's; NaN for other targets.
        """
        found = np.where(self.group == -1, np.nan, before)
        paired = self.partners >= 0
        found[paired] = before[self.partners[paired]]
        return found

    def shortfall_slopes(self, margins: np.ndarray, required: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return (examples,) directions like `slopes`, but by how far margins are below the required ones.

        The shortfall counts up to one reference scale. References count in no other way: a larger margin than before
        gains nothing, since a choice with many free numbers would overfit to that. Targets also count as in `slopes`.

        Args:
            margins: (examples,) margins.
            required: (examples,) required margins, see `required_margins`.
            rows: Which examples these are.
        """
        scale = self.scales[self.references[0]]
        lacking = np.nan_to_num(np.clip((margins - required) / scale, 0, 1)) / scale
        wrong = _sigmoid(margins / self.scales[rows]) / self.scales[rows]
        return np.asarray(lacking + np.where(self.group[rows] == -1, wrong, 0))

    def outcome(self, margins: np.ndarray) -> Outcome:
        """Return the trade-off, the accuracies and the excess over the bound at (examples,) margins."""
        chosen = self.references
        lost = (self.base[chosen] > 0).astype(float) - (margins[chosen] > 0)
        group, sizes = self.group[chosen], np.bincount(self.group[chosen])
        by_group = np.bincount(group, lost) / sizes
        mean, worst = float(by_group.mean()), float(by_group.max())
        error = self.error((lost - by_group[group]) / sizes[group] / len(sizes), chosen)
        excess = max(mean + error - self.bound.mean, 0.0) + np.maximum(by_group - self.bound.group, 0).sum()
        right = float((margins[self.targets] > 0).mean())
        return Outcome(float(self.values(margins)), right, mean, worst, float(excess))

    def error(self, parts: np.ndarray, rows: np.ndarray | slice = slice(None)) -> float:
        """Return the standard error of a sum over some of the examples, whose parts are added up within a cluster."""
        return float(np.sqrt((np.bincount(self.clusters[rows], parts) ** 2).sum()))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(-x)) without overflow."""
    return 0.5 + 0.5 * np.tanh(0.5 * x)
