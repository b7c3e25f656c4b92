"""Scores from mask gradients: at the full model, on two paths to it, and under random masks."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from coar.circuits.evaluator import CircuitEvaluator, Loss
from coar.circuits.method import Report, Scored, ScoringMethod, on_cpu


class MaskGradient(ScoringMethod):
    """The mean gradient of the output by each gate at the full model: edge attribution patching (EAP).

    The score of an edge is the mean over examples of (o[w] - replacement[w]) times the gradient of the output by the
    reader's input (Syed, Rager and Conmy 2023, "Attribution patching outperforms automated circuit discovery"). The KL
    divergence has no gradient at the full model, where it is smallest.

    Attributes:
        most: Use the first so many examples; by default all.
    """

    label: ClassVar[str] = "eap"

    most: int | None = Field(default=None, ge=1)

    def steps_of(self, evaluator: CircuitEvaluator) -> int:  # noqa: ARG002
        """Return 1."""
        return 1

    def score(self, evaluator: CircuitEvaluator, report: Report) -> Scored:
        """Return mean gradients."""
        rows = _first(evaluator, self.most)
        slopes = evaluator.gradients(evaluator.everything(), loss="output", rows=rows).by_keep
        report(1)
        return Scored(on_cpu(-slopes / len(rows)))


class PathGradient(ScoringMethod):
    """The mean gradient by each gate along a path from the ablated to the full model: EAP with integrated gradients.

    With `path="inputs"` the edges of the embedding go from ablated to kept, as the embedding does in Hanna, Pezzelle
    and Belinkov (2024, "Have faith in faithfulness"), and with `path="activations"` all edges do at once. The factor
    o[w] - replacement[w] is that of the pass on the path, where the paper takes the clean pass.

    Attributes:
        steps: Points k / steps on the path, k = 1, ..., steps; each costs a gradient on every example.
        path: `inputs` or `activations`.
        loss: `output`, whose gradient is positive for edges that raise it, or `kl`.
        most: Use the first so many examples; by default all.
    """

    label: ClassVar[str] = "eap_ig"

    steps: int = Field(default=5, ge=1)
    path: Literal["inputs", "activations"] = "inputs"
    loss: Loss = "output"
    most: int | None = Field(default=None, ge=1)

    def steps_of(self, evaluator: CircuitEvaluator) -> int:  # noqa: ARG002
        """Return the number of points."""
        return self.steps

    def score(self, evaluator: CircuitEvaluator, report: Report) -> Scored:
        """Return mean gradients."""
        moving = torch.ones(evaluator.components, dtype=torch.bool)
        if self.path == "inputs":
            moving = torch.tensor([row.position == 0 for row in evaluator.study.components])
        rows, total = _first(evaluator, self.most), torch.zeros(evaluator.components, device=evaluator.device)
        for step in range(1, self.steps + 1):
            keep = evaluator.everything()
            keep[moving] = step / self.steps
            total += evaluator.gradients(keep, loss=self.loss, rows=rows).by_keep
            report(1)
        return Scored(on_cpu(-total / (self.steps * len(rows))))


class RandomMaskGradient(ScoringMethod):
    """The mean gradient by each gate under random masks, one mask for each example and pass.

    Attributes:
        passes: Gradients on every example.
        keep_rate: Share of kept components, or `drawn`: uniform between `lowest` and 1, for each example and pass.
        lowest: Smallest drawn share.
        loss: `output` or `kl`.
        most: Use the first so many examples; by default all.
        seed: Seed of the masks.
    """

    label: ClassVar[str] = "random_masks"

    passes: int = Field(default=5, ge=1)
    keep_rate: float | Literal["drawn"] = 0.97
    lowest: float = Field(default=0.9, ge=0, lt=1)
    loss: Loss = "output"
    most: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63)

    def steps_of(self, evaluator: CircuitEvaluator) -> int:  # noqa: ARG002
        """Return the number of passes."""
        return self.passes

    def score(self, evaluator: CircuitEvaluator, report: Report) -> Scored:
        """Return mean gradients."""
        draw, rows = torch.Generator().manual_seed(self.seed), _first(evaluator, self.most)
        total = torch.zeros(evaluator.components, device=evaluator.device)
        for _ in range(self.passes):
            masks = self._masks(len(rows), evaluator.components, draw).to(evaluator.device)
            total += evaluator.gradients(masks, loss=self.loss, rows=rows).by_keep.sum(0)
            report(1)
        return Scored(on_cpu(-total / (self.passes * len(rows))))

    def _masks(self, examples: int, components: int, draw: torch.Generator) -> Tensor:
        if self.keep_rate == "drawn":
            rates = self.lowest + (1 - self.lowest) * torch.rand(examples, 1, generator=draw)
        else:
            rates = torch.full((examples, 1), self.keep_rate)
        return (torch.rand(examples, components, generator=draw) < rates).float()


class RandomScore(ScoringMethod):
    """Random scores, to compare with.

    Attributes:
        seed: Seed of the draw.
    """

    label: ClassVar[str] = "random"

    seed: int = Field(default=0, ge=0, lt=2**63)

    def steps_of(self, evaluator: CircuitEvaluator) -> int:  # noqa: ARG002
        """Return 1."""
        return 1

    def score(self, evaluator: CircuitEvaluator, report: Report) -> Scored:
        """Return uniform numbers."""
        draw = torch.Generator().manual_seed(self.seed)
        report(1)
        return Scored(torch.rand(evaluator.components, generator=draw, dtype=torch.float64))


def _first(evaluator: CircuitEvaluator, most: int | None) -> range:
    """Return the positions of the examples to use."""
    return range(min(most or len(evaluator), len(evaluator)))
