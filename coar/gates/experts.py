"""Gates on the experts of a mixture that keeps them in one parameter, through the weights that its router gives them.

The weight of an expert multiplies all that it returns. So the mixture is called with keep * weight instead of weight,
and (1 - keep) * weight * constants are added. Rows may have masks of their own, and gradients reach the masks.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from coar.components.layers import expert_stack_of
from coar.equivalence import Kind, compare
from coar.errors import AblationError
from coar.gates.building import GatedSite, GateKind, GateRequest
from coar.gates.channels import Channels
from coar.gates.hook import Hooked, HookPoint

CHECKED = 32  # tokens of the check that a mixture weights what its experts return


class Routing(NamedTuple):
    """The arguments of a call of a mixture.

    Attributes:
        states: (tokens, width) inputs of the experts.
        experts: (tokens, chosen) numbers of the experts that each token is sent to.
        weights: (tokens, chosen) their weights.
    """

    states: Tensor
    experts: Tensor
    weights: Tensor

    @classmethod
    def of(cls, mixture: nn.Module, site: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> "Routing":
        """Read the arguments of a call; raise `AblationError` unless they are these three."""
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
        """Return the (tokens, chosen, features) outputs of the experts for the tokens that are sent to them."""
        tokens, chosen = self.experts.shape
        ones = torch.ones_like(self.weights).reshape(-1, 1)
        y = mixture(self.states.repeat_interleave(chosen, 0), self.experts.reshape(-1, 1), ones)
        return y.view(tokens, chosen, -1)


class ExpertGate(Hooked):
    """Turns what an expert adds for a token, weight * y, into weight * (keep * y + (1 - keep) * constants).

    Args:
        mixture: The mixture, which keeps the last projections of its experts in one parameter.
        site: Its path.
        experts: The number of its experts.
        channels: The component of each expert.
    """

    def __init__(self, mixture: nn.Module, site: str, experts: int, channels: Channels) -> None:
        super().__init__(HookPoint(mixture, site, "module", -1, channels))
        self._experts = experts
        self._constants = channels.replacement.view(experts, -1) if channels.replacement.any() else None
        self._weighted = False  # whether a check showed that the mixture weights what its experts return

    def install(self) -> None:
        """Replace the mixture's forward."""
        self._keep, self._seen = None, False
        mixture = self.point.module
        self._own = {key: value for key, value in vars(mixture).items() if key == "forward"}
        self._plain = mixture.forward
        mixture.forward = self._routed

    def restore(self) -> None:
        """Put the mixture's forward back."""
        vars(self.point.module).pop("forward", None)
        vars(self.point.module).update(self._own)

    def replace(self, constants: Sequence[Tensor]) -> None:
        """Take other (experts x features,) constants for the forwards that follow; gradients reach them."""
        (flat,) = constants
        self._constants = flat.view(self._experts, -1)

    def _routed(self, *args: Any, **kwargs: Any) -> Tensor:
        states, experts, weights = routes = Routing.of(self.point.module, self.point.site, args, kwargs)
        if not self._weighted:
            check_weighted(self._plain, self.point.site, routes)
            self._weighted = True
        kept = self._pass(experts).to(weights.dtype)
        if self._keep is None:
            return self._plain(states, experts, weights)  # type: ignore[no-any-return]
        y: Tensor = self._plain(states, experts, weights * kept)
        if self._constants is None:
            return y
        lost = weights.new_zeros(len(weights), self._experts + 1)
        lost = lost.scatter_add(1, experts.clamp(max=self._experts), weights * (1 - kept))[:, :-1]
        return y + lost.to(y) @ self._constants.to(y)

    def _change(self, y: Tensor, keep: Tensor) -> Tensor:
        """Return the (tokens, chosen) masks of the chosen experts y; experts without a component are kept."""
        numbers = y.clamp(max=self._experts)
        extended = torch.cat([keep, keep.new_ones((*keep.shape[:-1], 1))], dim=-1)
        return extended[numbers] if keep.ndim == 1 else extended.gather(1, numbers)


def check_weighted(mixture: Callable[..., Tensor], site: str, routes: Routing) -> None:
    """Raise `AblationError` unless a mixture returns the weighted sum of its experts' outputs."""
    few = Routing(*(part[:CHECKED] for part in routes))
    with torch.no_grad():
        expected = mixture(*few)
        returned = few.returned(mixture)
        found = (returned * few.weights[..., None].to(returned.device)).sum(1)
    if found.shape != expected.shape:
        raise _not_weighted(site, f"shapes {tuple(found.shape)} and {tuple(expected.shape)}")
    compared = compare(expected, found, Kind.REFORMULATED, precision=torch.finfo(expected.dtype).eps)
    if not compared.agrees:
        raise _not_weighted(site, f"they {compared}")


def _not_weighted(site: str, seen: str) -> AblationError:
    return AblationError(
        f"the mixture {site!r} does not return the weighted sum of its experts' outputs: {seen}; "
        f"exclude it, or use parameter_slices on its last projections"
    )


def _build(request: GateRequest, sites: Sequence[GatedSite]) -> list[ExpertGate]:
    """Return one gate for each mixture; raise `AblationError` where experts cannot be replaced as requested."""
    gates = []
    for gated in sites:
        rows = list(gated.sides["expert"])
        name = request.components[rows[0]].name
        if request.resample:
            raise AblationError(
                f"{name!r} is an expert, and the tokens of a resample source are sent to other experts; use an "
                f"ablation by constants"
            )
        if request.by_position:
            raise AblationError(
                f"{name!r} is an expert, and tokens are sent to it without their positions; use one constant for each "
                f"channel, such as Mean(calibration=...)"
            )
        mixture = request.model.get_submodule(gated.site)
        stack = expert_stack_of(mixture)
        experts = len(stack.weight) if stack else 0  # `check_components` refuses mixtures without a stack
        channels = Channels.of_experts(experts, request.components, rows, request.replacements)
        gates.append(ExpertGate(mixture, gated.site, experts, channels))
    return gates


EXPERT_GATES = GateKind(lambda _request, gated: "expert" in gated.sides, _build)
