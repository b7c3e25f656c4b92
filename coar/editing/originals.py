"""The numbers that an edit takes out of the weights, which restore them bit for bit."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from coar.errors import EditError
from coar.weights import state_fingerprint

State = Mapping[str, Tensor]
AT, WAS = "@at", "@was"  # after a tensor's name: changed positions, and their original numbers
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per number


@dataclass(frozen=True, eq=False)
class Originals:
    """Every number that an edit changed, with its original value.

    Attributes:
        tensors: By `<name>@at` the (changed,) positions in a flattened tensor of the state dict, and by `<name>@was`
            their original numbers.
        added: Tensors that the edit added, such as a bias.
        edited: SHA-256 of the edited weights.
    """

    tensors: dict[str, Tensor]
    added: tuple[str, ...]
    edited: str

    @classmethod
    def between(cls, before: State, after: State) -> "Originals":
        """Compare two state dicts bit by bit; the second must have all names of the first."""
        tensors = {}
        for name, old in before.items():
            old_bits, new_bits = _bits(old), _bits(after[name])
            at = torch.nonzero(old_bits != new_bits)[:, 0]
            if len(at):
                tensors[name + AT], tensors[name + WAS] = at, old.detach().cpu().reshape(-1)[at].clone()
        return cls(tensors, tuple(name for name in after if name not in before), state_fingerprint(after))

    def restore(self, state: State, *, original: str) -> dict[str, Tensor]:
        """Return a copy of an edited state dict with the original numbers.

        Args:
            state: The edited weights.
            original: SHA-256 that the result must have.

        Raises:
            EditError: When these are not the weights that the edit produced.
        """
        found = state_fingerprint(state)
        if found != self.edited:
            what = "the weights before the edit" if found == original else f"others, {found[:12]}..."
            raise EditError(
                f"this edit made weights {self.edited[:12]}..., and these are {what}; give the checkpoint that the "
                f"edit was applied to, unchanged since"
            )
        restored = {name: value.detach().clone() for name, value in state.items() if name not in self.added}
        for key, at in self.tensors.items():
            if key.endswith(AT):
                name = key.removesuffix(AT)
                flat = restored[name].contiguous().view(-1)
                flat[at.to(flat.device)] = self.tensors[name + WAS].to(flat)
                restored[name] = flat.view(restored[name].shape)
        if state_fingerprint(restored) != original:
            raise EditError("the original numbers do not belong to this edit; get both files of the edit again")
        return restored

    def fingerprint(self) -> str:
        """Return the SHA-256 of the numbers and their positions."""
        return state_fingerprint(self.tensors)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Originals) and (self.fingerprint(), self.added, self.edited) == (
            other.fingerprint(),
            other.added,
            other.edited,
        )

    __hash__ = None  # type: ignore[assignment]


def _bits(value: Tensor) -> Tensor:
    """Return a flat view of the numbers as integers, so that -0.0 and 0.0 differ and NaN equals itself."""
    return value.detach().cpu().contiguous().view(-1).view(BITS[value.element_size()])
