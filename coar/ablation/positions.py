"""Means of each position in a sequence: their computation, and gates that put them in the place of what is ablated."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from coar.ablation.by_hook import Hooked, ModuleSide, check_features
from coar.ablation.channels import Channels
from coar.ablation.replacements import Calibrated
from coar.ablation.statistics import Place, places, walk
from coar.components import Components
from coar.errors import AblationError


class PositionMean(Calibrated):
    """Replace each channel of a component, at each position of a sequence, by its mean there over calibration examples.

    So an ablated component still tells where a token stands, but not what any text says there (Wang et al. 2023,
    "Interpretability in the wild"). Positions are counted along the inputs, padding included; a text does not count
    where it has padding. Such means are for sequences that are alike position by position, and no longer than those of
    the calibration examples. They cannot become permanent in the weights.
    """

    label: ClassVar[str] = "position_mean"

    def replacements(self, model: nn.Module, components: Components, *, batch_size: int) -> Tensor:
        """Return (positions, components.width) means, NaN where no calibration example has a token.

        Raises:
            AblationError: When there are no activations to take means from, or they have no positions.
        """
        for row in components:
            if row.side == "expert":
                raise AblationError(
                    f"{row.name!r} is an expert, and the tokens sent to it come without their positions; use "
                    f"Mean(calibration=...)"
                )
        sums: dict[Place, Tensor] = {}  # (positions, channels + 1): sums over texts, and the number of these

        def add(place: Place, values: Tensor) -> None:
            total = values.double().sum(0)
            if place in sums and sums[place].shape != total.shape:
                raise _without_positions(place[0], f"{len(sums[place])} and then {len(total)} positions")
            sums[place] = sums[place] + total if place in sums else total

        def take(place: Place, y: Tensor, tokens: Tensor | None) -> Tensor:
            if y.ndim != 3 or (tokens is not None and tokens.shape != y.shape[:2]):
                raise _without_positions(place[0], f"{tuple(y.shape)} entries, features last")
            there = y.new_ones(y.shape[:2]) if tokens is None else tokens.to(y)
            there = there[..., None]
            return torch.cat([y.masked_fill(there == 0, 0), there], dim=-1)

        walk(model, components, self.calibration, batch_size=batch_size, visit=add, take=take)
        means = torch.full((max(map(len, sums.values())), components.width), torch.nan)
        for place, rows in places(components).items():
            own = (sums[place][:, :-1] / sums[place][:, -1:]).float().cpu()
            means[: len(own), components.channels_of(rows)] = own[:, components.positions_of(rows)]
        return means


class PositionGate(Hooked):
    """Turns what passes, y, into keep * y + (1 - keep) * constants, one for each channel at each position."""

    def __init__(self, module: nn.Module, site: str, side: ModuleSide, axis: int, channels: Channels) -> None:
        super().__init__(module, site, side, axis, channels)
        self._constants = channels.replacement  # (positions, channels)
        self._known = (~channels.replacement.isnan().any(-1)).tolist()  # asked at every call, so not on the device

    def _change(self, y: Tensor, keep: Tensor) -> Tensor:
        if y.ndim != 3:
            raise _without_positions(self.site, f"{tuple(y.shape)} entries")
        if self._side == "module":
            check_features(y, self.site, self._axis, self._constants.shape[-1])
        here = 3 - self._axis % 3  # the axis of positions
        length = y.shape[here]
        if sum(self._known[:length]) < length:
            raise AblationError(
                f"{self.site!r} works on sequences of {length} positions, and the calibration examples have tokens at "
                f"{sum(self._known[:length])} of these; give calibration examples that are as long, or cut positions "
                f"that are padding everywhere"
            )
        wanted = self._constants[:length] if here == 1 else self._constants[:length].T
        return torch.lerp(wanted.to(y.dtype)[None], y, self._laid(y, keep), out=self._room(y))


def _without_positions(site: str, seen: str) -> AblationError:
    return AblationError(
        f"{site!r} works on tensors of {seen}; a mean for each position needs (texts, positions, features), with as "
        f"many positions in all batches: exclude it, pad all texts alike, or use Mean(calibration=...)"
    )
