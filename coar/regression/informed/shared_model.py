"""The shared model: how the mask gradients of an example become its weights, in terms that all examples have in common.

The weights of an example, in units of the spread of its outputs, are

    w = gain_kept * K + gain_ablated * A + curve + phi H.

K and A are its mean mask gradients at the kept and the ablated end. They estimate the two ends of the integral of the
gradient along the path from ablated to kept, which is what least squares estimates (integrated gradients, Sundararajan,
Taly and Yan 2017, between the two ends only). Few mask gradients ablate a component, so A is the noisier end. What A
has in excess of a multiple of K, the curvature, lies near a few directions that examples share in a site; the curve is
the curvature along these directions, with one gain for each band of them. phi places the example among the others, by
the leading directions of their weights, and H is what examples near each other have in common.

`learning` finds the gains, first by site and then by component, and H.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coar.regression.informed.site_gains import members_of


@dataclass(frozen=True)
class Curvature:
    """The directions in which the ablated ends of examples differ from a multiple of the kept ones.

    Attributes:
        sites: (components,) number of each component's site.
        ratio: (components,) multiple of the kept end that is subtracted from the ablated one to leave the curvature.
        curves: (directions, components) leading directions of the curvature, of unit length in each site.
    """

    sites: Tensor
    ratio: Tensor
    curves: Tensor

    def along(self, gradients: Tensor, gain: Tensor) -> Tensor:
        """Return (sums, ..., components) sums of the curvature along each direction.

        Args:
            gradients: (2, ..., components) mask gradients.
            gain: (sums, directions, components) factors on the curvature along each direction.
        """
        curvature = gradients[1] - self.ratio * gradients[0]
        out = curvature.new_zeros(len(gain), *curvature.shape)
        for group in members_of(self.sites).values():
            curves = self.curves[:, group]
            along = curvature[..., group] @ curves.T  # (..., directions)
            for number, factors in enumerate(gain):
                out[number][..., group] = along @ (curves * factors[:, group])
        return out


@dataclass(frozen=True)
class SharedModel:
    """How an example's mask gradients become its weights.

    Attributes:
        placing: (2, components) factors on the ends that give the weights by which an example is placed among others.
        curvature: The leading directions of the curvature.
        gain: (2 + directions, components) factors on the ends, and on the curvature along each direction.
        directions: (components, rank) of the weights by which examples are placed.
        structure: (rank, components) weights of examples in each direction.
        stages: The refinements that were kept, with their penalties, as chosen on held-out rows.
    """

    placing: Tensor
    curvature: Curvature
    gain: Tensor
    directions: Tensor
    structure: Tensor
    stages: tuple[tuple[str, float], ...] = ()

    def to(self, device: torch.device) -> "SharedModel":
        """Return the model on a device."""
        sites, ratio, curves = (
            own.to(device) for own in (self.curvature.sites, self.curvature.ratio, self.curvature.curves)
        )
        gain, directions, structure = (own.to(device) for own in (self.gain, self.directions, self.structure))
        curvature = Curvature(sites, ratio, curves)
        return SharedModel(self.placing.to(device), curvature, gain, directions, structure, self.stages)

    @property
    def rank(self) -> int:
        """Number of directions in which examples are placed."""
        return len(self.structure)

    def weights(self, gradients: Tensor) -> Tensor:
        """Map (2, ..., components) gradients to (..., components) weights, both in units of the spread."""
        weights = weighted_sum(self.gain[:2], gradients)
        if len(self.gain) > 2:
            weights += self.curvature.along(gradients, self.gain[None, 2:])[0]
        if self.structure.any():
            weights += self.places(gradients) @ self.structure
        return weights

    def places(self, gradients: Tensor) -> Tensor:
        """Return the (..., rank) places of examples."""
        return unit(weighted_sum(self.placing, gradients)) @ self.directions


def weighted_sum(gain: Tensor, features: Sequence[Tensor] | Tensor) -> Tensor:
    """Return the (..., components) sum of (features, ..., components) features times (features, components) gains."""
    out: Tensor = features[0] * gain[0]
    for factor, feature in zip(gain[1:], features[1:], strict=True):
        out.addcmul_(feature, factor)
    return out


def unit(weights: Tensor) -> Tensor:
    """Scale the last axis to length 1; zeros stay zeros."""
    length: Tensor = weights.norm(dim=-1, keepdim=True)
    return weights / length.clamp_min(1e-30)
