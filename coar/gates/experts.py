"""Gates on the experts of a mixture that keeps them in one parameter, by way of the weights that a router gives them.

An expert's weight multiplies all that it returns, so the mixture is called with keep * weight in its place, and
(1 - keep) * weight * constants are added. Rows may then have masks of their own, and gradients reach the masks.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from coar.equivalence import difference
from coar.errors import AblationError
from coar.gates.channels import Channels
from coar.gates.hook import Hooked

CHECKED = 32  # tokens on which a mixture is seen to weigh what its experts return
AGREEMENT, COARSE = 1e-3, 5e-2  # of the largest entry that such a sum may be off: in float32, and in coarser numbers


class Routing(NamedTuple):
    """What a mixture is called with.

    Attributes:
        states: (tokens, width) what experts read.
        experts: (tokens, chosen) the experts that each token is sent to.
        weights: (tokens, chosen) what each of them counts.
    """

    states: Tensor
    experts: Tensor
    weights: Tensor

    @classmethod
    def of(cls, mixture: nn.Module, site: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> "Routing":
        """Take the arguments of a call; raise `AblationError` when they are others than these three."""
        named = list(inspect.signature(type(mixture).forward).parameters)[1 + len(args) :]
        given = (*args, *(kwargs[name] for name in named if name in kwargs))
        shapes = [tuple(value.shape) for value in given if isinstance(value, Tensor)]
        if len(shapes) == len(given) == 3 and len(shapes[1]) == 2 and shapes[1] == shapes[2]:
            routes = cls(*given)
            if shapes[0][:-1] == shapes[1][:1] and not routes.experts.is_floating_point():
                return routes
        raise AblationError(
            f"the mixture {site!r} was called with {len(given)} arguments, tensors of shapes {shapes}; (tokens, width) "
            f"states and, (tokens, chosen) both, the numbers and the weights of experts were expected: exclude it, or "
            f"use parameter_slices on its last projections"
        )

    def returned(self, mixture: Callable[..., Tensor]) -> Tensor:
        """Return (tokens, chosen, features) what the experts return for the tokens that are sent to them."""
        tokens, chosen = self.experts.shape
        ones = torch.ones_like(self.weights).reshape(-1, 1)
        y = mixture(self.states.repeat_interleave(chosen, 0), self.experts.reshape(-1, 1), ones)
        return y.view(tokens, chosen, -1)


class ExpertGate(Hooked):
    """Turns what an expert adds for a token, weight * y, into weight * (keep * y + (1 - keep) * constants).

    Args:
        mixture: The mixture, which keeps the last projections of its experts in one parameter.
        site: Its path.
        experts: How many experts it has.
        channels: Which component each expert is.
    """

    _weighs = False  # whether the mixture was seen to weigh what its experts return

    def __init__(self, mixture: nn.Module, site: str, experts: int, channels: Channels) -> None:
        super().__init__(mixture, site, "module", -1, channels)
        self._experts = experts
        self._constants = channels.replacement.view(experts, -1) if channels.replacement.any() else None

    def install(self) -> None:
        """Put another forward in the place of the mixture's."""
        self._keep, self._seen = None, False
        self._own = {key: value for key, value in vars(self._module).items() if key == "forward"}
        self._plain = self._module.forward
        self._module.forward = self._routed

    def restore(self) -> None:
        """Put the mixture's forward back."""
        vars(self._module).pop("forward", None)
        vars(self._module).update(self._own)

    def replace(self, constants: Tensor) -> None:
        """Take other (experts x features,) constants for the forwards that follow; gradients reach them."""
        self._constants = constants.view(self._experts, -1)

    def _routed(self, *args: Any, **kwargs: Any) -> Tensor:
        states, experts, weights = routes = Routing.of(self._module, self.site, args, kwargs)
        if not self._weighs:
            check_weighed(self._plain, self.site, routes)
            self._weighs = True
        kept = self._pass(experts).to(weights.dtype)
        if self._keep is None:
            return self._plain(states, experts, weights)  # type: ignore[no-any-return]
        y: Tensor = self._plain(states, experts, weights * kept)
        if self._constants is None:
            return y
        lost = weights.new_zeros(len(weights), self._experts + 1)
        lost = lost.scatter_add(1, experts.clamp(max=self._experts), weights * (1 - kept))[:, :-1]
        return y + lost.to(y.dtype) @ self._constants.to(y.dtype)

    def _change(self, y: Tensor, keep: Tensor) -> Tensor:
        """Return the (tokens, chosen) masks of chosen experts y; those that no parameter is of are kept."""
        numbers = y.clamp(max=self._experts)
        extended = torch.cat([keep, keep.new_ones((*keep.shape[:-1], 1))], dim=-1)
        return extended[numbers] if keep.ndim == 1 else extended.gather(1, numbers)


def check_weighed(mixture: Callable[..., Tensor], site: str, routes: Routing) -> None:
    """Raise `AblationError` unless a mixture returns the weighed sum of what its experts return each by itself."""
    few = Routing(*(part[:CHECKED] for part in routes))
    with torch.no_grad():
        expected = mixture(*few)
        found = (few.returned(mixture) * few.weights[..., None]).sum(1)
    if found.shape != expected.shape:
        raise _not_weighed(site, f"shapes {tuple(found.shape)} and {tuple(expected.shape)}")
    error = difference(expected, found)
    if not error <= (AGREEMENT if expected.dtype in (torch.float32, torch.float64) else COARSE):
        raise _not_weighed(site, f"a difference of {error:.1e} of the largest entry")


def _not_weighed(site: str, seen: str) -> AblationError:
    return AblationError(
        f"the mixture {site!r} does not return the sum of what its experts return, each times its weight: {seen}; "
        f"exclude it, or use parameter_slices on its last projections"
    )
