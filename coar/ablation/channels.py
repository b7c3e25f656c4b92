"""Which component each channel of a layer belongs to, and what replaces it."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from coar.components import Components
from coar.errors import AblationError


@dataclass(frozen=True)
class Channels:
    """The positions along one axis of a module's output or input, or of a parameter.

    Attributes:
        lookup: (channels,) entries of the extended mask, which ends with a 1 for channels without a component.
        taken: (channels,) truth values, whether a component takes the channel.
        replacement: (channels,) constants, 0 for channels without a component.
    """

    lookup: Tensor
    taken: Tensor
    replacement: Tensor

    @classmethod
    def of(cls, length: int, components: Components, indices: list[int], values: Tensor) -> Self:
        """Map each of `length` positions to its component's row.

        Args:
            length: How many positions there are along the axis.
            components: The table that a mask speaks of.
            indices: Rows of the components that lie along this axis.
            values: (components,) constants; their device is used.

        Raises:
            AblationError: When two components overlap.
        """
        sizes = np.array([components[i].size for i in indices])
        starts = np.array([components[i].position for i in indices])
        owners = np.repeat(indices, sizes)  # (channels that a component takes,)
        taken = np.arange(len(owners)) + np.repeat(starts - (sizes.cumsum() - sizes), sizes)
        _, first = np.unique(taken, return_index=True)
        if len(first) < len(taken):
            again = owners[np.setdiff1d(np.arange(len(taken)), first)[0]]
            raise AblationError(
                f"{components[int(again)].name!r} overlaps another component of the table; leave one out"
            )
        lookup = torch.full((length,), len(components))
        lookup[torch.from_numpy(taken)] = torch.from_numpy(owners)
        lookup = lookup.to(values.device)
        return cls(lookup, lookup < len(components), torch.cat([values, values.new_zeros(1)])[lookup])


def along(axis: int, tensor: Tensor) -> tuple[int, ...]:
    """Return the shape in which a vector of a tensor's length along one axis lies along that axis."""
    return tuple(length if i == axis % tensor.ndim else 1 for i, length in enumerate(tensor.shape))
