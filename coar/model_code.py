"""Hashes of the code of a model's classes and of their settings."""

import ast
import hashlib
import inspect
import json
import sys
import sysconfig
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from coar.weights import state_fingerprint

SKIPPED = {"training", "call_super_init", "dump_patches", "T_destination"}  # attributes that no forward pass reads
SKIPPED |= {"gradient_checkpointing", "name_or_path"}  # the same computed twice, and where the weights came from
STORED = {"architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path"}  # of a file; set by saving
PLACING = {"to", "cpu", "cuda", "hf_device_map", "mlu", "musa", "npu", "sdaa", "xpu"}  # what accelerate sets, to place
DIGITS = 16  # of a hash; enough to distinguish versions of code


def model_code(model: nn.Module) -> dict[str, dict[str, str]]:
    """Return hashes of a model's code and settings.

    Two models with equal weights may compute different outputs if a class's source differs, if a module has another
    class or other settings (an activation, a number of heads, a stride), or if a method was replaced on an instance.

    Returns:
        `classes`: by qualified name, a hash of the source of each class of a module, and of the functions of its own
            file that its methods call, without comments and docstrings; of the bytecode if there is no source. Where
            no installed package has the class, functions, classes and plain values of all such files that the methods
            use count.
        `modules`: by path, a hash of each module's class, plain attributes, configuration and replaced methods.
        `libraries`: versions of the packages that the classes come from.
    """
    classes = {_name(kind): kind for module in model.modules() for kind in _own_classes(type(module))}
    known = frozenset(id(module) for module in model.modules())
    packages = sorted({kind.__module__.partition(".")[0] for kind in classes.values()})
    return {
        "classes": {name: _digest(*_sources(kind)) for name, kind in sorted(classes.items())},
        "modules": {
            path: _digest(_name(type(module)), _settings(module, known)) for path, module in model.named_modules()
        },
        "libraries": {name: version for name in packages if (version := _version(name))},
    }


def differences(before: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return the differences between two results of `model_code`, one description each."""
    words = {"classes": "the code of {}", "modules": "the class or the settings of module {!r}", "libraries": "{}"}
    found = []
    for part, word in words.items():
        old, new = before.get(part, {}), now.get(part, {})
        for name in [*old, *(name for name in new if name not in old)]:
            if old.get(name) != new.get(name):
                versions = f" ({old.get(name, 'not there')} before, {new.get(name, 'not there')} now)"
                found.append(word.format(name) + (versions if part == "libraries" else ""))
    return found


def _own_classes(kind: type) -> Iterator[type]:
    """Yield a module's class and its bases up to torch's own `nn.Module`."""
    for base in kind.__mro__:
        if issubclass(base, nn.Module) and base is not nn.Module:
            yield base


def _sources(kind: type) -> Iterator[str]:
    """Yield a class's own methods, what they use by global names, and its plain attributes, as text."""
    if kind.__module__.partition(".")[0] == "torch":  # its version is in the fingerprint
        return
    used: dict[str, str] = {}
    for name, member in vars(kind).items():
        for function in _functions(member):
            _add_used(used, function.__code__, function.__globals__, kind.__module__)
            yield f"{name}: {_source(function)}"
        private = "__" if _is_own(kind.__module__) else "_"  # libraries keep state under private names of a class
        if not name.startswith(private) and not isinstance(member, FunctionType):
            yield f"{name}: {_plain(member)}"
    for name in sorted(used):
        yield used[name]


def _functions(member: Any) -> list[FunctionType]:
    """Return the functions in a member of a class: a method, a class or static method, or a property."""
    inner = [member.fget, member.fset] if isinstance(member, property) else [getattr(member, "__func__", member)]
    return [_unwrapped(one) for one in inner if isinstance(one, FunctionType)]


def _unwrapped(function: FunctionType) -> FunctionType:
    """Return the function that decorators wrap; of a compiled module's forward pass, which wraps a module, its own."""
    return inspect.unwrap(function, stop=lambda one: not isinstance(one.__wrapped__, FunctionType))  # type: ignore[no-any-return,attr-defined]


def _add_used(used: dict[str, str], code: CodeType, scope: Mapping[str, Any], module: str) -> None:
    """Add what code uses by global names, directly or through others, as text by name.

    Functions of the same file count. Of files that belong to no installed package, whose version would be in the
    fingerprint, functions and classes of other such files and plain values count too.
    """
    own = _is_own(module)
    for name in code.co_names:
        value = scope.get(name)
        if own and isinstance(value, ModuleType) and _is_own(value.__name__):
            _add_used(used, code, vars(value), value.__name__)
        elif isinstance(value, FunctionType | type):
            key = f"{value.__module__}.{value.__qualname__}"
            if key in used or not (value.__module__ == module or (own and _is_own(value.__module__))):
                continue
            used[key] = ""
            for function in _methods(value) if own else _functions(value):
                used[key] += _source(function)
                _add_used(used, function.__code__, function.__globals__, value.__module__)
        elif own and (text := _plain(value)) is not None and name in scope:
            used[f"{module}.{name}"] = f"{name} = {text}"


def _methods(value: Any) -> list[FunctionType]:
    """Return a function, or the methods of a class that is no module, whose own code counts by its instances."""
    if not isinstance(value, type):
        return _functions(value)
    return (
        [] if issubclass(value, nn.Module) else [one for member in vars(value).values() for one in _functions(member)]
    )


@cache
def _is_own(module: str) -> bool:
    """Return whether a Python module is one of the user: no part of Python, of this package or of an installed one."""
    package = module.partition(".")[0]
    if package == "coar" or package in sys.stdlib_module_names - {"__main__"}:
        return False
    file = getattr(sys.modules.get(package), "__file__", None)
    installed = (sysconfig.get_path(name) for name in ("purelib", "platlib"))
    return file is None or not any(Path(file).is_relative_to(folder) for folder in installed)


def _source(function: FunctionType) -> str:
    """Return a function's source without docstrings, comments and layout; its bytecode if there is no source."""
    return _source_of(_unwrapped(function).__code__)


@cache
def _source_of(code: CodeType) -> str:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError):  # entered at a prompt, generated, or a lambda inside other code
        return _bytecode(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node, clean=False) is not None:
            node.body[0] = ast.Pass()
    return ast.unparse(tree)


def _bytecode(code: CodeType) -> str:
    constants = [_bytecode(one) if isinstance(one, CodeType) else _plain(one) or repr(one) for one in code.co_consts]
    return f"{code.co_code.hex()}{code.co_names}{constants}"


def _settings(module: nn.Module, known: frozenset[int]) -> str:
    """Return a module's plain attributes, its configuration, and the methods replaced on the instance, as text."""
    skipped = SKIPPED | PLACING | ({"forward"} if hasattr(module, "_hf_hook") else set())  # accelerate moves data there
    own = {name: value for name, value in vars(module).items() if not name.startswith("_") and name not in skipped}
    found = {name: text for name, value in own.items() if (text := _plain(value, known)) is not None}
    describe = getattr(own.get("config"), "to_dict", None)  # configurations of transformers have it
    if describe:
        described = {key: value for key, value in describe().items() if key not in STORED}
        found["config"] = json.dumps(described, sort_keys=True, default=str)
    return json.dumps(found, sort_keys=True)


def _plain(value: Any, known: frozenset[int] = frozenset()) -> str | None:
    """Return a setting as text; None for tensors, modules and other values without a stable text.

    Args:
        value: The setting.
        known: Identities of modules and functions that are described elsewhere.
    """
    function = getattr(value, "__func__", value) if isinstance(value, MethodType) else value
    if isinstance(function, FunctionType):
        return _source(function) + ("" if id(function) in known else _captured(function, known | {id(function)}))
    if isinstance(value, type):
        return _name(value)
    if value is None or isinstance(value, bool | int | float | complex | str | torch.dtype):
        return repr(value)
    return _joined(value, known)


def _captured(function: FunctionType, known: frozenset[int]) -> str:
    """Return the values of a function's closure and defaults as text, which its source does not show; "" for none."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    values = [(name, cell.cell_contents) for name, cell in cells if cell != CellType()]  # others are empty so far
    defaults = [("", value) for value in function.__defaults__ or ()]
    named = list((function.__kwdefaults__ or {}).items())
    texts = [f"{name}={_content(value, known)}" for name, value in (*values, *defaults, *named)]
    return f" with {texts}" if texts else ""


def _content(value: Any, known: frozenset[int]) -> str:
    """Return a captured value as text: a hash of the numbers of a tensor or another model, or an object's type."""
    if isinstance(value, Tensor):
        return state_fingerprint({"": value})
    if isinstance(value, nn.Module):
        return _name(type(value)) + ("" if id(value) in known else state_fingerprint(value.state_dict()))
    return _plain(value, known) or _name(type(value))


def _joined(value: Any, known: frozenset[int]) -> str | None:
    """Return a collection, or a partial function, whose parts are all settings as text; None for others."""
    parts: list[Any]
    if isinstance(value, partial):
        parts = [value.func, value.args, value.keywords]
    elif isinstance(value, dict):
        parts = [part for key in sorted(value, key=repr) for part in (repr(key), value[key])]
    elif isinstance(value, list | tuple):
        parts = list(value)
    elif isinstance(value, set | frozenset):
        parts = sorted(value, key=repr)
    else:
        return None
    texts = [_plain(part, known) for part in parts]
    return None if None in texts else f"{type(value).__name__}{texts}"


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _digest(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:{part}".encode())
    return digest.hexdigest()[:DIGITS]
