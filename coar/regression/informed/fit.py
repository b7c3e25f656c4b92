"""The informed fit: weights from mask gradients, then corrected example by example by masks.

For one example with weights w0 from the shared model (see `shared_model`), training masks X and outputs y, the fit is

    w = w0 + argmin_v ||(y - X w0)c - Xc v||^2 + penalty sum_j (v_j / column_j)^2,

where c centres over masks and column_j is the typical size of component j's weights over examples. Without masks, w is
w0. The intercept makes the mean prediction over all mask gradients and masks equal to the mean output.
"""

import dataclasses
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from coar.forward.malloc import return_freed
from coar.regression.fit_plan import FitPlan
from coar.regression.informed.correction import Correction, DecomposedCorrection
from coar.regression.informed.iterative_correction import IterativeCorrection
from coar.regression.informed.prior import Prior, PriorWeights, learn_prior, learning_examples
from coar.regression.ridge import LinearFit
from coar.regression.sums import FitBlock, Gram
from coar.store.records import FitLearned, PriorQualityRecord
from coar.store.run import Run


@dataclass(frozen=True)
class Informed:
    """What an informed fit learns of a run before any example is solved.

    Attributes:
        prior: What mask gradients give.
        correction: What masks correct; None without masks.
        known: What mask gradients give for all examples; None where the prior is learned from some of them.
    """

    prior: Prior
    correction: Correction | None
    known: PriorWeights | None

    @classmethod
    def of(cls, run: Run, rows: np.ndarray, rounds: int, plan: FitPlan, *, gram: Gram | None = None) -> Self:
        """Learn from mask gradients and, where there are any, masks.

        Args:
            run: A complete run.
            rows: Row numbers of the training masks to use; may be empty.
            rounds: How many rounds of mask gradients to use.
            plan: How to compute.
            gram: The sums over these masks; only where there are more of them than components.

        Raises:
            RegressionError: When there are too few mask gradients, or all are zero.
        """
        examples = learning_examples(run, plan.learning)
        prior, found = learn_prior(run, rounds, examples, plan.device)
        block = FitBlock(run, rows, examples)
        correction: Correction | None = None
        if len(rows) >= 2:
            return_freed()  # what learning took, so that the peaks of the two do not add up
            if plan.way == "decomposed":
                correction = DecomposedCorrection.of(block, prior, found, gram=gram)
            else:
                correction = IterativeCorrection.of(block, prior, found, plan)
        return cls(prior, correction, found if examples.step == 1 else None)

    def learned(self) -> FitLearned:
        """Return what was learned for all examples."""
        quality = self.prior.quality
        return FitLearned(
            stages=dict(self.prior.shared.stages),
            mask_penalty=self.correction.penalty if self.correction else None,
            prior_quality=PriorQualityRecord(**dataclasses.asdict(quality), reachable=quality.reachable),
        )

    def solve(self, block: FitBlock) -> LinearFit:
        """Fit a block of examples."""
        examples, masks, rounds = block.examples, len(block.rows), len(self.prior.kept)
        mask_gradients = self.prior.mask_gradients(block.run)
        count = sum(mask_gradients.rounds[:rounds])
        found = self.prior.weights(mask_gradients, examples) if self.known is None else self.known[examples]
        weights, outputs = found.weights, found.mean
        groups, places = np.unique(mask_gradients.group_of(examples), return_inverse=True)
        share = torch.from_numpy(mask_gradients.kept_in(range(rounds), groups) / np.float32(count))
        seen = share[torch.from_numpy(places)].double()  # (examples, components)
        if self.correction:
            weights, mean = self.correction.apply(block, weights)
            outputs = (outputs * count + mean * masks) / (count + masks)
            seen = (seen * count + self.correction.mean_mask() * masks) / (count + masks)
        intercept = outputs - (weights.double() * seen).sum(1)
        standard_error = self._error(block.run).sqrt() * found.spread[:, None]
        return LinearFit(weights, intercept, standard_error, torch.zeros(len(weights)))

    def _error(self, run: Run) -> Tensor:
        """Return the (components,) expected squared errors of weights, for outputs of a spread of 1."""
        prior, fraction = self.prior, run.sampler.ablated_fraction
        share = max(prior.quality.error, prior.quality.deviation)  # an estimate below its own error says little
        error = prior.column**2 * share / (fraction * (1 - fraction)) / float((prior.column**2).sum())
        return error * self.correction.unknown() if self.correction else error
