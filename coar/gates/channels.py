"""The component of each channel of a layer, and the constant that replaces it."""

from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from coar.components.table import Components
from coar.errors import AblationError


@dataclass(frozen=True)
class Channels:
    """The positions along one axis of a module's output or input, or of a parameter.

    Attributes:
        mask_index: (channels,) positions in the extended mask, which ends with a 1 for channels without a component; a
            whole module has one entry, and so has an expert.
        taken: Truth values of the same shape: whether a component takes the channel.
        constant_index: (channels,) positions in the extended constants, which end with a 0 for channels without a
            component.
        replacement: (channels,) constants, 0 for channels without a component; or (positions, channels) of them.
    """

    mask_index: Tensor
    taken: Tensor
    constant_index: Tensor
    replacement: Tensor

    @classmethod
    def of(cls, length: int, components: Components, indices: list[int], values: Tensor) -> Self:
        """Map each of `length` positions to its component's row.

        Args:
            length: Number of positions along the axis.
            components: The table that a mask refers to.
            indices: Rows of the components that lie along this axis.
            values: (components.width,) constants, or (positions, components.width); their device is used.

        Raises:
            AblationError: When two components overlap.
        """
        owners = np.repeat(indices, components.sizes_of(indices))  # (channels that a component takes,)
        taken = components.positions_of(indices)
        _, first = np.unique(taken, return_index=True)
        if len(first) < len(taken):
            again = owners[np.setdiff1d(np.arange(len(taken)), first)[0]]
            raise AblationError(
                f"{components[int(again)].name!r} overlaps another component of the table; leave one out"
            )
        mask_index = torch.full((length,), len(components))
        mask_index[torch.from_numpy(taken)] = torch.from_numpy(owners)
        constant_index = torch.full((length,), components.width)
        constant_index[torch.from_numpy(taken)] = torch.from_numpy(components.channels_of(indices))
        return cls._at(mask_index, mask_index < len(components), constant_index, values)

    @classmethod
    def of_module(cls, components: Components, index: int, values: Tensor) -> Self:
        """Map a whole module, which has one mask for all its channels, to its row."""
        constant_index = torch.from_numpy(components.channels_of([index]))
        return cls._at(torch.tensor([index]), torch.tensor([True]), constant_index, values)

    @classmethod
    def of_experts(cls, experts: int, components: Components, indices: list[int], values: Tensor) -> Self:
        """Map each expert of a mixture, which has one mask for all the features that it returns, to its row."""
        size = components[indices[0]].size
        every = cls.of(experts * size, components, indices, values)
        return replace(every, mask_index=every.mask_index[::size], taken=every.taken[::size])

    def on(self, device: torch.device) -> Self:
        """Return the same channels on a device."""
        return type(self)(*(getattr(self, part.name).to(device) for part in fields(self)))

    @classmethod
    def _at(cls, mask_index: Tensor, taken: Tensor, constant_index: Tensor, values: Tensor) -> Self:
        constant_index = constant_index.to(values.device)
        extended = torch.cat([values, values.new_zeros((*values.shape[:-1], 1))], dim=-1)
        return cls(mask_index.to(values.device), taken.to(values.device), constant_index, extended[..., constant_index])


def along(axis: int, tensor: Tensor) -> tuple[int, ...]:
    """Return the shape in which a vector of a tensor's length along one axis lies along that axis."""
    return tuple(length if i == axis % tensor.ndim else 1 for i, length in enumerate(tensor.shape))
