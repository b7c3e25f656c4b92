"""Copies of models that share nothing with the original, so that changing a copy leaves the user's model alone."""

import copy
import gc
from collections.abc import Iterator
from copy import deepcopy
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from coar.errors import WeightsError
from coar.rebinding import rebind

M = TypeVar("M", bound=nn.Module)
CLOSED = (Tensor, ModuleType, FunctionType, BuiltinFunctionType, type, str, bytes, int, float, complex)


def independent_copy(model: M) -> M:
    """Return a deep copy of a model, whose patched forward passes run the copy.

    Tensors that a forward pass left in the model, such as kept activations and pruned weights, are copied without their
    graph. Objects that Python cannot copy, such as locks and open files, are shared if they hold no tensor and no
    module.

    Raises:
        WeightsError: When a part of the model cannot be copied, a module or tensor of the copy is one of the original,
            since it refuses to be copied, or a function in it that uses the original cannot be rebuilt.
    """
    made: dict[int, Any] = {}  # the copies of objects by the objects' identity, as deepcopy takes and returns them
    for held in _held_by(model):
        if isinstance(held, Tensor) and not held.is_leaf:
            made[id(held)] = held.detach().clone()
        elif isinstance(held, torch.Generator):
            made[id(held)] = held.clone_state()
    try:
        copied = deepcopy(model, dict(made))
    except Exception:  # whatever a part of a model may raise
        made |= {id(held): held for held in _held_by(model) if _is_shared(held)}
        made |= {id(held): _of_subclass(held) for held in _held_by(model) if _is_uncopied(held)}
        try:
            copied = deepcopy(model, dict(made))
        except Exception as error:
            raise _not_copied(model, made, error) from error
    originals = {id(module) for module in model.modules()}
    shared = [name for name, module in copied.named_modules() if id(module) in originals]
    if shared:
        raise WeightsError(
            f"a copy of this {type(model).__name__} shares the module {shared[0]!r} with it, so ablations and edits "
            f"would change your model; let copy.deepcopy copy all of its modules"
        )
    rebind(copied, model)
    return copied


def _held_by(root: object) -> Iterator[Any]:
    """Yield an object and all that it holds, in attributes and containers at any depth."""
    seen, waiting = {id(root)}, [root]
    while waiting:
        held = waiting.pop()
        yield held
        if not isinstance(held, CLOSED):
            new = [part for part in gc.get_referents(held) if id(part) not in seen]
            seen.update(id(part) for part in new)
            waiting += new


def _is_shared(held: object) -> bool:
    """Return whether an object cannot be copied and holds neither tensors nor modules."""
    if isinstance(held, Tensor | nn.Module):
        return False
    try:
        copy.copy(held)
    except Exception:  # whatever an object may raise
        return not any(isinstance(part, Tensor | nn.Module) for part in _held_by(held))
    return False


def _is_uncopied(held: object) -> bool:
    """Return whether a tensor with memory of its own is of a subclass that copy.deepcopy cannot copy."""
    if not isinstance(held, Tensor) or type(held) in (Tensor, nn.Parameter) or not held.is_leaf:
        return False
    try:
        deepcopy(held)
    except Exception:  # whatever a subclass may raise
        return not is_traceable_wrapper_subclass(held)
    return False


def _of_subclass(held: Tensor) -> Tensor:
    """Return a copy of such a tensor: its numbers, its class, and its attributes."""
    with torch._C.DisableTorchFunctionSubclass():
        copied = held.detach().clone().as_subclass(type(held)).requires_grad_(held.requires_grad)
    copied.__dict__.update(deepcopy(vars(held)))
    return copied


def _not_copied(model: nn.Module, made: dict[int, Any], error: Exception) -> WeightsError:
    """Return an error that names the first attribute that cannot be copied."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name == "_modules":
                continue
            try:
                deepcopy(value, dict(made))
            except Exception as reason:
                return WeightsError(
                    f"the attribute {name!r} of {path or type(model).__name__!r}, a {type(value).__name__}, cannot be "
                    f"copied ({_in_words(reason)}), and ablations and edits are applied to a copy of the model; "
                    f"delete it from the model, or let its class define __deepcopy__"
                )
    return WeightsError(
        f"this {type(model).__name__} cannot be copied ({_in_words(error)}), and ablations and edits are applied to a "
        f"copy of the model; let copy.deepcopy(model) work, such as by __deepcopy__ of the class that fails"
    )


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
