"""Constants that are statistics of a component's activations: mean, mean by position, and peak."""

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from coar.ablation.base import Calibrated
from coar.ablation.calibration import Place, activation_moments, per_channel, places, walk
from coar.components.table import Components
from coar.errors import AblationError
from coar.gates.positions import no_positions


class Mean(Calibrated):
    """Replace each channel of a component by its mean over calibration examples and positions.

    r_j = E_{x,t}[h_{j,t}(x)], over calibration examples x and positions t, which are pixels or tokens. Positions of
    padding do not count; masks among the inputs show them, such as `attention_mask`.
    """

    label: ClassVar[str] = "mean"

    def replacements(self, model: nn.Module, components: Components, *, batch_size: int) -> Tensor:
        """Return each channel's mean.

        Raises:
            AblationError: When there are no activations to average.
        """
        means, _ = activation_moments(model, components, self.calibration, batch_size=batch_size)
        return means


class Peak(Calibrated):
    """Replace each channel of a component by the peak of its distribution over calibration examples and positions.

    The peak is the value that a channel takes most often (Pochinkov et al. 2024, "Investigating neuron ablation in
    attention heads: the case for peak activation centering"). Two passes over the examples fill a histogram of h_j with
    `bins` equal bins between its smallest and its largest value. r_j is the mean of the values in the fullest bin; of
    several, in the lowest.

    Attributes:
        bins: Number of bins of a histogram.
    """

    label: ClassVar[str] = "peak"

    bins: int = Field(default=128, ge=2)

    def replacements(self, model: nn.Module, components: Components, *, batch_size: int) -> Tensor:
        """Return each channel's peak.

        Raises:
            AblationError: When there are no activations to take it from.
        """
        ends: dict[Place, tuple[Tensor, Tensor]] = {}

        def widen(place: Place, values: Tensor) -> None:
            low, high = values.amin(0).double(), values.amax(0).double()
            if place in ends:
                low, high = torch.minimum(low, ends[place][0]), torch.maximum(high, ends[place][1])
            ends[place] = low, high

        sums: dict[Place, Tensor] = {}  # (2, bins x channels): number of values, and their sum

        def count(place: Place, values: Tensor) -> None:
            low, high = ends[place]
            wide = values.double()  # half precision cannot resolve the bins
            relative = (wide - low) / torch.where(high > low, high - low, 1)  # to the range, (values, channels)
            bins = (relative * self.bins).long().clamp(0, self.bins - 1)
            flat = (bins * len(low) + torch.arange(len(low), device=low.device)).flatten()
            both = torch.stack([torch.ones_like(wide), wide]).flatten(1)
            if place not in sums:
                sums[place] = both.new_zeros(2, self.bins * len(low))
            sums[place].index_add_(1, flat, both)

        walk(model, components, self.calibration, batch_size=batch_size, visit=widen)
        walk(model, components, self.calibration, batch_size=batch_size, visit=count)
        return per_channel(components, {place: _peaks(both, len(ends[place][0])) for place, both in sums.items()})


def _peaks(both: Tensor, channels: int) -> Tensor:
    """Return each channel's mean in its fullest bin, from counts and sums by bin and channel."""
    counts, sums = both.view(2, -1, channels)
    fullest = counts.argmax(0, keepdim=True)  # the first of equals
    peaks: Tensor = sums.gather(0, fullest)[0] / counts.gather(0, fullest)[0]
    return peaks


class PositionMean(Calibrated):
    """Replace each channel of a component, at each position of a sequence, by its mean there over calibration examples.

    r_{j,t} = E_x[h_{j,t}(x)], over the calibration examples x with a token at position t. An ablated component keeps
    information on the position of a token and loses the information on the text, as the mean ablation over templates of
    Wang et al. (2023, "Interpretability in the wild"). Positions are counted along the inputs, padding included; a text
    does not count where it has padding. These means suit sequences with the same structure at every position, no longer
    than those of the calibration examples. They cannot become permanent in the weights.
    """

    label: ClassVar[str] = "position_mean"

    def replacements(self, model: nn.Module, components: Components, *, batch_size: int) -> Tensor:
        """Return (positions, components.width) means, NaN where no calibration example has a token.

        Raises:
            AblationError: When there are no activations to average, or they have no positions.
        """
        for row in components:
            if row.side == "expert":
                raise AblationError(
                    f"{row.name!r} is an expert, and tokens are sent to it without their positions; use "
                    f"Mean(calibration=...)"
                )
        sums: dict[Place, Tensor] = {}  # (positions, channels + 1): sums over texts, and the number of these

        def add(place: Place, values: Tensor) -> None:
            total = values.double().sum(0)
            if place in sums and sums[place].shape != total.shape:
                raise no_positions(place[0], f"{len(sums[place])} and then {len(total)} positions")
            sums[place] = sums[place] + total if place in sums else total

        def take(place: Place, y: Tensor, tokens: Tensor | None) -> Tensor:
            if y.ndim != 3 or (tokens is not None and tokens.shape != y.shape[:2]):
                raise no_positions(place[0], f"{tuple(y.shape)} entries, features last")
            there = y.new_ones(y.shape[:2]) if tokens is None else tokens.to(y)
            there = there[..., None]
            return torch.cat([y.masked_fill(there == 0, 0), there], dim=-1)

        walk(model, components, self.calibration, batch_size=batch_size, visit=add, take=take)
        means = torch.full((max(map(len, sums.values())), components.width), torch.nan)
        for place, rows in places(components).items():
            own = (sums[place][:, :-1] / sums[place][:, -1:]).float().cpu()
            means[: len(own), components.channels_of(rows)] = own[:, components.positions_of(rows)]
        return means
