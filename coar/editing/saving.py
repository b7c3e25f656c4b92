"""Edited models on disk, in forms that torch, timm and transformers load, each compared with a model loaded from it."""

import importlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as trees

from coar.equivalence import Kind, compare, fall_back, rounding
from coar.errors import EditError, StorageError
from coar.examples import Examples, call_model, device_of, devices_of
from coar.forward.copies import plain_copy
from coar.gates.folding import added_parameters
from coar.model_copy import independent_copy
from coar.weights import load_weights, save_weights, state_fingerprint

CHECKED = 2  # examples on which the loaded model is compared with the edited one
CODE = "modeling_edited"  # the module that gives a model of transformers its new biases
TEMPLATE = '''"""{kind} with biases on layers that had none, from an edit of its weights."""

import torch
from torch import nn
from {module} import {kind}


class Edited{kind}({kind}):
    """The model, with a bias on every layer that `config.added_biases` lists."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        for site, size in config.added_biases.items():
            layer = self.get_submodule(site)
            layer.bias = nn.Parameter(torch.zeros(size, dtype=layer.weight.dtype, device=layer.weight.device))
'''


@dataclass(frozen=True)
class SavedModel:
    """An edited model on disk. A model was loaded from there and gave the same outputs.

    Attributes:
        path: The file or folder.
        new_parameters: Names of the biases that the edit added to layers without one.
        loading: Python code that loads the edited model without this package. The code for a file needs `model`, the
            model before the edit.
    """

    path: Path
    new_parameters: tuple[str, ...]
    loading: str


@dataclass(frozen=True)
class _Loader:
    """How a saved folder is loaded.

    Attributes:
        kind: The class.
        options: Arguments of its `from_pretrained`.
    """

    kind: Any
    options: dict[str, Any] = field(default_factory=dict)

    def load(self, folder: Path) -> nn.Module:
        """Load a model from a folder."""
        found: nn.Module = self.kind.from_pretrained(str(folder), **self.options)
        return found

    def code(self, folder: Path) -> str:
        """Return Python code that does the same."""
        name, module = self.kind.__name__, self.kind.__module__
        package = module.partition(".")[0]
        public = package if getattr(importlib.import_module(package), name, None) is self.kind else module
        arguments = ", ".join([repr(str(folder)), *(f"{name}={value!r}" for name, value in self.options.items())])
        return f"from {public} import {name}\n\nmodel = {name}.from_pretrained({arguments})"


class _UnsuitableError(Exception):
    """A way of saving that does not suit the model."""


def save_state_dict(original: nn.Module, edited: nn.Module, path: Path, examples: Examples) -> SavedModel:
    """Write an edited model's state dict as safetensors, and compare the model with one loaded from the file.

    Args:
        original: The model before the edit.
        edited: The edited model.
        path: Where to write.
        examples: The loaded model and the edited one are compared on the first of these.

    Raises:
        EditError: When the path does not end in `.safetensors`, or the loaded model is not the edited one.
        StorageError: When the file cannot be written.
    """
    if path.suffix != ".safetensors":
        raise EditError(f"{path} was given; edited weights are written as safetensors: give a path that ends in this")
    added, loaded = added_parameters(original, edited), independent_copy(original)
    save_weights(edited, path)
    sites = [_site(name) for name in added]
    for site in sites:
        bias: Any = edited.get_submodule(site).bias
        loaded.get_submodule(site).bias = nn.Parameter(torch.empty_like(bias))
    load_weights(loaded, path)
    difference = _other_weights(edited, loaded) or _other_outputs(edited, loaded, examples)
    if difference:
        raise EditError(f"the model loaded from {path} is not the edited one: {difference}; do not use the file")
    lines = ["import safetensors.torch", "import torch", "", f"state = safetensors.torch.load_file({str(path)!r})"]
    if added:
        lines += [
            f"for site in {sites}:  # layers that had no bias before the edit",
            '    model.get_submodule(site).bias = torch.nn.Parameter(state[f"{site}.bias"])',
        ]
    if any("_version" in vars(type(module)) for module in edited.modules() if not _of_torch(module)):
        lines += ["whole = model.state_dict()  # with the versions of modules", "whole.update(state)", "state = whole"]
    return SavedModel(path, added, "\n".join([*lines, "model.load_state_dict(state)"]))


def save_pretrained(original: nn.Module, edited: nn.Module, folder: Path, examples: Examples) -> SavedModel:
    """Write an edited model by its own `save_pretrained`, so that `from_pretrained` keeps the biases of the edit.

    Of a module that wraps a model of transformers, the wrapped model is written.

    Options of the configuration that give layers a bias, such as `mlp_bias` of Llama, keep new biases; the other biases
    that they create are zero. Without such options the folder gets a small module of Python code, which transformers
    loads with `trust_remote_code=True`. The folder is written only if a model loaded from it equals the edited one.

    Args:
        original: The model before the edit.
        edited: The edited model.
        folder: Where to write.
        examples: The loaded model and the edited one are compared on the first of these.

    Raises:
        EditError: When the model has no `save_pretrained`, when the edit changes a module around the one that has, when
            no way keeps the new biases, or when the loaded model is not the edited one.
        StorageError: When the folder cannot be written.
    """
    path = _pretrained_part(original, edited)
    part, reasons = edited.get_submodule(path), []
    kind, added = type(part).__name__, added_parameters(original.get_submodule(path), part)
    ways: dict[str, Callable[[Any, Sequence[str], Path], _Loader]] = {"as it is": _as_it_is}
    if added:
        ways = {"by options of its configuration": _by_options, "with code of its own": _by_code}
    partial = folder.with_name(f"{folder.name}.partial")
    for name, way in ways.items():
        try:
            reason = _checked(way, edited, path, added, partial, folder, examples)
        except OSError as error:
            raise StorageError(f"cannot write the model to {folder}: {error}; choose another folder") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(reason, _Loader):
            return SavedModel(folder, added, reason.code(folder))
        reasons.append(f"{name}, {reason}")
        fall_back(f"saving a {kind} {name}", reason)
    raise EditError(
        f"nothing was written to {folder}, since a {kind} loaded from there would not be the edited one: "
        f"{'; '.join(reasons)}. Call edit.save_state_dict, or make the edit without constants, which needs no new "
        f"biases: collect with coar.ZeroActivation()"
    )


def _pretrained_part(original: nn.Module, edited: nn.Module) -> str:
    """Return the path of the outermost module with a `save_pretrained`; raise `EditError` if others are edited too."""
    paths = (
        path
        for path, module in edited.named_modules()
        if hasattr(module, "save_pretrained") and hasattr(module, "from_pretrained")
    )
    found: str | None = next(paths, None)
    kind = type(edited).__name__
    if found is None:
        raise EditError(f"a {kind} has no save_pretrained and from_pretrained; call edit.save_state_dict")
    before, inside = original.state_dict(), f"{found}." if found else ""
    for name, value in edited.state_dict().items():
        same = name in before and state_fingerprint({"": value}) == state_fingerprint({"": before[name]})
        if not name.startswith(inside) and not same:
            raise EditError(
                f"the edit changes {name}, and save_pretrained writes the module {found!r} of this {kind} alone; call "
                f"edit.save_state_dict"
            )
    return found


def _checked(
    way: Callable[[Any, Sequence[str], Path], _Loader],
    edited: nn.Module,
    path: str,
    added: Sequence[str],
    partial: Path,
    folder: Path,
    examples: Examples,
) -> _Loader | str:
    """Write a model one way, load it, and move it to its folder; return why not where that does not give the model."""
    model = independent_copy(edited.get_submodule(path)).eval()
    try:
        loader = way(model, added, partial)
    except _UnsuitableError as unsuitable:
        return str(unsuitable)
    try:
        loaded = loader.load(partial)
    except Exception as error:  # whatever a library may raise
        return f"from_pretrained fails ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    kernel = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if kernel and hasattr(loaded, "set_attn_implementation"):  # no part of a saved model; kernels differ at padding
        cast("Any", loaded).set_attn_implementation(kernel)
    whole = loaded
    if path:
        place = device_of(edited) if len(devices_of(edited)) == 1 else device_of(loaded)
        whole = plain_copy(edited, place)
        whole.set_submodule(path, loaded.to(place))
    difference = _other_weights(model, loaded) or _other_outputs(edited, whole, examples)
    if difference:
        return difference
    folder.mkdir(parents=True, exist_ok=True)
    for file in partial.iterdir():
        os.replace(file, folder / file.name)
    return loader


def _as_it_is(model: Any, _added: Sequence[str], folder: Path) -> _Loader:
    model.save_pretrained(folder)
    return _Loader(type(model))


def _by_options(model: Any, added: Sequence[str], folder: Path) -> _Loader:
    """Set the options that give the layers a bias, add zeros for the other biases that they create, and write."""
    plain = _rebuilt(model, []).keys()
    chosen = [one for one in _bias_options(model.config) if set(added) & _rebuilt(model, [one]).keys()]
    state = _rebuilt(model, chosen)
    lacking = [name for name in added if name not in state]
    if lacking:
        raise _UnsuitableError(f"its configuration has no option that creates {lacking[0]}")
    for name in sorted(state.keys() - plain - set(added)):
        if not name.endswith(".bias"):
            raise _UnsuitableError(f"the options of its configuration also create {name}")
        layer = model.get_submodule(_site(name))
        layer.bias = nn.Parameter(layer.weight.new_zeros(state[name].shape))
    for path, option in chosen:
        setattr(_part(model.config, path), option, True)
    return _as_it_is(model, added, folder)


def _bias_options(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the path of a configuration inside this one, and a name, for every option about biases that is off."""
    for name, value in vars(config).items() if hasattr(config, "to_dict") else ():
        if value is False and "bias" in name:
            yield path, name
        elif hasattr(value, "to_dict"):
            yield from _bias_options(value, (*path, name))


def _part(config: Any, path: Sequence[str]) -> Any:
    for name in path:
        config = getattr(config, name)
    return config


def _rebuilt(model: Any, options: Sequence[tuple[tuple[str, ...], str]]) -> dict[str, Tensor]:
    """Return the state dict, without memory, of a model of this class and configuration with these options on."""
    config = deepcopy(model.config)
    for path, option in options:
        setattr(_part(config, path), option, True)
    try:
        with torch.device("meta"):
            found: dict[str, Tensor] = type(model)(config).state_dict()
    except Exception as error:  # whatever a model may raise
        raise _UnsuitableError(f"it cannot be built from its configuration: {error}") from error
    return found


def _by_code(model: Any, added: Sequence[str], folder: Path) -> _Loader:
    """Write the model, and a module with a class that has the new biases, to which the configuration refers."""
    kind = type(model)
    if kind.__module__.partition(".")[0] != "transformers":
        raise _UnsuitableError(f"its class, of {kind.__module__}, is not part of transformers")
    strange = [name for name in added if not name.endswith(".bias")]
    if strange:
        raise _UnsuitableError(f"the edit adds {strange[0]}, which is no bias")
    transformers, autos = importlib.import_module("transformers"), _auto_classes(model) or ["AutoModel"]
    edited = f"Edited{kind.__name__}"
    model.config.added_biases = {_site(name): len(model.get_parameter(name)) for name in added}
    model.save_pretrained(folder)
    (folder / f"{CODE}.py").write_text(TEMPLATE.format(kind=kind.__name__, module=kind.__module__))
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"architectures": [edited], "auto_map": dict.fromkeys(autos, f"{CODE}.{edited}")}
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return _Loader(getattr(transformers, autos[0]), {"trust_remote_code": True})


def _auto_classes(model: Any) -> list[str]:
    """Return the names of the classes of transformers that choose this model's class for its configuration."""
    auto, found = importlib.import_module("transformers.models.auto.modeling_auto"), []
    for name in (name for name in dir(auto) if name.startswith("AutoModel")):
        mapping = getattr(getattr(auto, name), "_model_mapping", {})
        kinds = mapping.get(type(model.config), ())
        if type(model) in (kinds if isinstance(kinds, tuple) else (kinds,)):
            found.append(name)
    return found


def _of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.")


def _site(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _other_weights(written: nn.Module, loaded: nn.Module) -> str:
    """Return in words how the weights of a loaded model differ from those written; "" if no bit does."""
    mine, its = written.state_dict(), loaded.state_dict()
    if mine.keys() != its.keys():
        return f"it has other parameters, such as {sorted(mine.keys() ^ its.keys())[0]}"
    other = [name for name in mine if state_fingerprint({"": mine[name]}) != state_fingerprint({"": its[name]})]
    return f"{other[0]} has other numbers or another type" if other else ""


def _other_outputs(edited: nn.Module, loaded: nn.Module, examples: Examples) -> str:
    """Return in words how the outputs of a loaded model differ from the edited model's; "" if they do not."""
    inputs = examples.block(0, min(CHECKED, len(examples)))[0]
    if len(devices_of(edited)) == len(devices_of(loaded)) == 1:  # a split model may be larger than one device
        loaded = loaded.to(device_of(edited))
    results = []
    for model in (edited, loaded):
        training = model.training
        with torch.no_grad():
            leaves = trees.tree_leaves(call_model(model.eval(), inputs))
        model.train(training)
        results.append([leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()])
    if len(results[0]) != len(results[1]) or not results[0]:
        return f"it returns {len(results[1])} tensors of numbers, and the edited model {len(results[0])}"
    pairs = [(a.cpu(), b.cpu()) for a, b in zip(*results, strict=True)]  # a split model may leave some where they are
    compared = [compare(*pair, Kind.RECOMPUTED, precision=rounding(edited)) for pair in pairs]
    return next((f"outputs {one}" for one in compared if not one.agrees), "")
