"""Copies of models that share no module with the original, so that changing a copy leaves the user's model alone."""

from copy import deepcopy
from typing import TypeVar

from torch import nn

from coar.errors import WeightsError

M = TypeVar("M", bound=nn.Module)


def independent_copy(model: M) -> M:
    """Return a deep copy of a model.

    Raises:
        WeightsError: When a module of the copy is one of the original, since some module refuses to be copied.
    """
    copy = deepcopy(model)
    originals = {id(module) for module in model.modules()}
    shared = [name for name, module in copy.named_modules() if id(module) in originals]
    if shared:
        raise WeightsError(
            f"a copy of this {type(model).__name__} shares the module {shared[0]!r} with it, so ablations and edits "
            f"would change your model; let copy.deepcopy copy all of its modules"
        )
    return copy
