"""Random numbers forced to be the lowest or highest ones, which shows noise that a model rarely uses."""

from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode

NEAR = 1e-6  # distance of uniform numbers from the ends of their range
DEVIATIONS = 4.0  # of normal numbers from their mean


class ForcedDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Replaces what torch draws inside the context: uniform, normal and binary numbers.

    A binary number that is certain stays as it is, and so do draws of other kinds, of numpy and of Python.

    Args:
        level: Whether numbers are the `lowest` or `highest`.
    """

    def __init__(self, level: Literal["lowest", "highest"]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._high = level == "highest"

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        drawn = function(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in function.tags:
            self._force(function.overloadpacket.__name__.rstrip("_"), drawn, args, kwargs or {})
        return drawn

    def _force(self, name: str, drawn: Any, args: Any, named: dict[str, Any]) -> None:
        def given(at: int, key: str, default: Any) -> Any:
            return args[at] if len(args) > at else named.get(key, default)

        if name in ("rand", "rand_like", "uniform"):
            low, high = (given(1, "from", 0.0), given(2, "to", 1.0)) if name == "uniform" else (0.0, 1.0)
            drawn.fill_(high - (high - low) * NEAR if self._high else low + (high - low) * NEAR)
        elif name in ("randn", "randn_like", "normal"):
            mean, deviation = (given(1, "mean", 0.0), given(2, "std", 1.0)) if name == "normal" else (0.0, 1.0)
            if isinstance(mean, float | int) and isinstance(deviation, float | int):
                drawn.fill_(mean + DEVIATIONS * deviation * (1 if self._high else -1))
        elif name == "bernoulli":
            chance = torch.as_tensor(given(1, "p", args[0]), device=drawn.device)
            drawn.copy_((chance > 0 if self._high else chance >= 1).expand_as(drawn))
        elif name == "native_dropout" and 0 < args[1] < 1 and args[2] is not False:
            drawn[0].copy_(args[0] / (1 - args[1]) if self._high else torch.zeros_like(args[0]))
