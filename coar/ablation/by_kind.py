"""Ablation that differs between kinds of components."""

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import field_validator
from torch import Tensor, nn

from coar.ablation.base import Ablation
from coar.ablation.resample import FromExamples
from coar.components.table import Components
from coar.errors import AblationError
from coar.examples import Examples


class ByKind(Ablation):
    """Replace components by constants that an ablation of their kind chooses.

    r_j is that of the ablation for the kind of component that has channel j. Each ablation sees the components of its
    kind alone, so trained constants are trained with those alone ablated.

    Attributes:
        ablations: An ablation by constants for each kind of component in the study, such as `{"attention head":
            Mean(calibration=...), "mlp neuron": ZeroActivation()}`; `components.kinds` has the kinds.
    """

    ablations: Mapping[str, Ablation]

    @field_validator("ablations")
    @classmethod
    def _by_constants(cls, ablations: Mapping[str, Ablation]) -> dict[str, Ablation]:
        for kind, ablation in ablations.items():
            if isinstance(ablation, FromExamples):
                raise ValueError(
                    f"{type(ablation).__name__} for {kind!r} replaces components by other examples' activations, for "
                    f"all kinds or none; give ablations by constants here"
                )
        return dict(ablations)

    def replacements(self, model: nn.Module, components: Components, *, batch_size: int) -> Tensor:
        """Return the constants of each kind's ablation, one per channel, and per position if one has positions.

        Raises:
            AblationError: When a kind has no ablation, or an ablation does not apply to a component.
        """
        rows: dict[str, list[int]] = {}
        for i, row in enumerate(components):
            rows.setdefault(row.kind, []).append(i)
        missing = rows.keys() - self.ablations.keys()
        if missing:
            raise AblationError(
                f"there is no ablation for the kind {min(missing)!r}; give ByKind one for each of {sorted(rows)}"
            )
        parts = {
            kind: self.ablations[kind].replacements(
                model, Components(components[i] for i in own), batch_size=batch_size
            )
            for kind, own in rows.items()
        }
        lengths = {part.shape[0] for part in parts.values() if part.ndim == 2}
        if len(lengths) > 1:
            raise AblationError(
                f"constants by position have {sorted(lengths)} positions; give their ablations calibration examples of "
                f"one length"
            )
        values = torch.empty(*lengths, components.width)
        for kind, own in rows.items():
            values[..., torch.from_numpy(components.channels_of(own))] = parts[kind]
        return values

    @property
    def needs_gradients(self) -> bool:
        """Whether any kind's constants are trained by gradients."""
        return any(ablation.needs_gradients for ablation in self.ablations.values())

    def calibrations(self) -> list[Examples]:
        """Return the examples that constants of any kind are computed from."""
        return [examples for ablation in self.ablations.values() for examples in ablation.calibrations()]

    def settings(self) -> dict[str, Any]:
        """Return the name and the settings of each kind's ablation."""
        return {"name": type(self).__name__} | {
            kind: self.ablations[kind].settings() for kind in sorted(self.ablations)
        }
