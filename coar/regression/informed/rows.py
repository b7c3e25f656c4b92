"""Outputs under masks, example by example, as one linear operator on weights."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class MaskGroup:
    """Rows of one fold that some examples have in common.

    Attributes:
        masks: (rows, components) booleans.
        mean: (components,) mean of the slot's masks in all folds.
        outputs: (rows, examples) outputs less their mean in all folds, in units of each example's spread.
        examples: (examples,) their places among all.
        fold: The fold of the mask gradients.
        rounds: (rows,) the round of each; rows of different rounds are independent.
    """

    masks: Tensor
    mean: Tensor
    outputs: Tensor
    examples: Tensor
    fold: int
    rounds: Tensor


@dataclass(frozen=True)
class Rows:
    """Rows of a set of examples, as one linear operator on their (folds, examples, components) weights.

    Attributes:
        slots: The rows by slot and fold.
        shape: Folds, examples, components.
        kept: Share of the components that a mask keeps.
    """

    mask_groups: tuple[MaskGroup, ...]
    shape: tuple[int, int, int]
    kept: float

    def split(self, fold: int) -> tuple["Rows", "Rows"]:
        """Return the rows of the other folds, and those of one fold."""
        others = tuple(mask_group for mask_group in self.mask_groups if mask_group.fold != fold)
        return replace(self, mask_groups=others), replace(
            self, mask_groups=tuple(mask_group for mask_group in self.mask_groups if mask_group.fold == fold)
        )

    def count(self) -> float:
        """Return the mean number of rows of an example."""
        return sum(mask_group.outputs.numel() for mask_group in self.mask_groups) / self.shape[1]

    def variance(self) -> float:
        """Return the variance of a mask's entry."""
        return self.kept * (1 - self.kept)

    def design(self, mask_group: MaskGroup) -> Tensor:
        """Return the (rows, components) masks less their mean, as the outputs are less theirs."""
        return mask_group.masks.float() - mask_group.mean

    def predict(self, weight: Tensor) -> list[Tensor]:
        """Map (folds, examples, components) weights to (rows, examples) predictions of each slot."""
        return [
            self.design(mask_group) @ weight[mask_group.fold, mask_group.examples].T for mask_group in self.mask_groups
        ]

    def adjoint(self, values: list[Tensor]) -> Tensor:
        """Apply the transpose of `predict`."""
        out = torch.zeros(self.shape)
        for mask_group, value in zip(self.mask_groups, values, strict=True):
            out[mask_group.fold, mask_group.examples] = value.T @ self.design(mask_group)
        return out

    def residual(self, weight: Tensor) -> list[Tensor]:
        """Return what (folds, examples, components) weights leave of the outputs."""
        return [
            mask_group.outputs - part for mask_group, part in zip(self.mask_groups, self.predict(weight), strict=True)
        ]

    def error(self, weight: Tensor) -> float:
        """Return the sum of squared residuals."""
        return float(sum((part**2).sum() for part in self.residual(weight)))
