"""Functions in a copied model that refer to the original, rebuilt so that they refer to the copy.

Python does not copy functions. A user may patch a forward pass, `block.forward = patched`, and `patched` may hold the
original block in a closure, a default argument or a global name. A copy that ran it would run the original's weights,
and no gate would reach them.
"""

import copy
from collections.abc import Iterator
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from coar.errors import WeightsError

TABLES = ("_modules", "_parameters", "_buffers")  # of a module; a copy has copies of their values


def rebind(copied: nn.Module, original: nn.Module) -> None:
    """Make every function in a copied model use the copy where it uses the original, in place.

    Functions that `torch.compile` made are replaced by the plain ones. Classes are shared by both models, and are not
    looked into.

    Raises:
        WeightsError: When a tensor of the copy is one of the original, or a function that uses the original cannot be
            rebuilt.
    """
    _check_tensors(copied, original)
    rebinding = _Rebinding(copied, original)
    for path, module in copied.named_modules():
        for name, value in list(vars(module).items()):
            if name in TABLES:
                continue
            try:
                changed = rebinding.rebound(value)
            except Exception as error:  # whatever an object may raise when it is rebuilt
                raise WeightsError(
                    f"{name!r} of the module {path!r} uses your model and cannot be copied ({error!r}), so ablations "
                    f"would not reach what it computes; define the forward pass in a class"
                ) from error
            if changed is not value:
                vars(module)[name] = changed


def _check_tensors(copied: nn.Module, original: nn.Module) -> None:
    """Raise `WeightsError` when a parameter or buffer of the copy is one of the original."""
    originals = {id(tensor): name for name, tensor in _tensors(original)}
    for _, tensor in _tensors(copied):
        if id(tensor) in originals:
            raise WeightsError(
                f"a copy of this {type(original).__name__} shares the tensor {originals[id(tensor)]!r} with it, so "
                f"ablations and edits would change your model; let copy.deepcopy copy all of its tensors"
            )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


class _Rebinding:
    """Rebuilds what refers to an original model, so that it refers to its copy.

    Args:
        copied: The copy.
        original: The original.
    """

    def __init__(self, copied: nn.Module, original: nn.Module) -> None:
        self._copies: dict[int, Any] = {}  # of the parts of the original, by their identity
        self._own = {id(module): module for module in copied.modules()}
        self._rebuilt: dict[int, Any] = {}
        self._visited: set[int] = set()  # containers of the copy that were gone through
        self._alive: list[Any] = []  # whatever is keyed by identity
        copies = dict(copied.named_modules(remove_duplicate=False))
        for path, module in original.named_modules(remove_duplicate=False):
            twin = copies[path]
            self._copies[id(module)] = twin
            for mine, its in zip(_attributes(module), _attributes(twin), strict=True):
                self._copies |= {
                    id(value): its[name] for name, value in mine.items() if isinstance(value, Tensor) and name in its
                }

    def rebound(self, value: Any) -> Any:
        """Return a value that refers to the copy; the value itself where it does not refer to the original."""
        if id(value) in self._copies:
            return self._copies[id(value)]
        if isinstance(value, FunctionType | MethodType) and hasattr(value, "_torchdynamo_orig_callable"):
            return self.rebound(value._torchdynamo_orig_callable)
        if isinstance(value, dict | list):
            if id(value) in self._visited:
                return value
            self._visited.add(id(value))
            self._alive.append(value)
            items = list(value.items() if isinstance(value, dict) else enumerate(value))
            for key, part in items:
                changed = self.rebound(part)
                if changed is not part:
                    value[key] = changed
            return value
        if not self._refers(value, set()):
            return value
        if id(value) not in self._rebuilt:
            self._alive.append(value)
            self._rebuilt[id(value)] = self._rebuild(value)
        return self._rebuilt[id(value)]

    def _rebuild(self, value: Any) -> Any:
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, MethodType):
            return MethodType(self.rebound(value.__func__), self.rebound(value.__self__))
        if isinstance(value, partial):
            named = {name: self.rebound(part) for name, part in value.keywords.items()}
            rebuilt = partial(self.rebound(value.func), *map(self.rebound, value.args), **named)
            rebuilt.__dict__.update({name: self.rebound(part) for name, part in vars(value).items()})
            return rebuilt
        if isinstance(value, tuple | set | frozenset):
            parts = [self.rebound(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        twin = copy.deepcopy(value, self._copies | self._own)
        self._rebuilt[id(value)] = twin  # it may hold itself
        for name, part in vars(twin).items():
            vars(twin)[name] = self.rebound(part)
        return twin

    def _function(self, function: FunctionType) -> FunctionType:
        """Return a function with the same code, whose closure, defaults and global names refer to the copy."""
        names = {name: value for name, value in _globals_of(function) if self._refers(value, set())}
        cells = tuple(CellType() for _ in function.__closure__ or ())
        found = FunctionType(
            function.__code__,
            {**function.__globals__, **names} if names else function.__globals__,
            closure=cells or None,
        )
        self._rebuilt[id(function)] = found  # its closure or its globals may hold it
        for cell, old in zip(cells, function.__closure__ or (), strict=True):
            if (filled := _contents(old)) is not _EMPTY:
                cell.cell_contents = self.rebound(filled)
        found.__globals__.update({name: self.rebound(value) for name, value in names.items()})
        found.__name__, found.__qualname__, found.__doc__ = function.__name__, function.__qualname__, function.__doc__
        found.__module__ = function.__module__
        found.__defaults__ = function.__defaults__ and tuple(map(self.rebound, function.__defaults__))
        if function.__kwdefaults__:
            found.__kwdefaults__ = {name: self.rebound(part) for name, part in function.__kwdefaults__.items()}
        found.__dict__.update({name: self.rebound(part) for name, part in vars(function).items()})
        return found

    def _refers(self, value: Any, seen: set[int]) -> bool:
        """Return whether a value leads to a part of the original."""
        if id(value) in self._copies:
            return True
        if id(value) in seen or id(value) in self._own:
            return False
        seen.add(id(value))
        return any(self._refers(part, seen) for part in _parts(value))


def _parts(value: Any) -> list[Any]:
    """Return what a value holds."""
    if isinstance(value, FunctionType):
        filled = [found for cell in value.__closure__ or () if (found := _contents(cell)) is not _EMPTY]
        defaults = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        return [*filled, *defaults, *vars(value).values(), *(part for _, part in _globals_of(value))]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values(), *vars(value).values()]
    if isinstance(value, dict | list | tuple | set | frozenset):
        return list(value.values() if isinstance(value, dict) else value)
    closed = isinstance(value, Tensor | type) or not hasattr(value, "__dict__") or type(value).__module__ == "builtins"
    return [] if closed else list(vars(value).values())


def _attributes(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """Return a module's parameters, buffers and plain attributes."""
    return module._parameters, module._buffers, vars(module)


_EMPTY = object()  # the contents of a cell that is not filled yet


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _EMPTY


def _globals_of(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield the global names that a function reads and that may lead to a model, with their values.

    Of functions, only those of the same Python module are given: a library's do not know the model.
    """
    for name in _names(function.__code__):
        value = function.__globals__.get(name)
        ours = isinstance(value, FunctionType) and value.__globals__ is function.__globals__
        if ours or isinstance(value, nn.Module | Tensor | MethodType | partial | dict | list | tuple):
            yield name, value


def _names(code: CodeType) -> set[str]:
    inner = (part for part in code.co_consts if isinstance(part, CodeType))
    return set(code.co_names).union(*map(_names, inner))
