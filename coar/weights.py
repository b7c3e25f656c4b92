"""Weights on disk: read without running code from the file, written as safetensors, identified by a hash."""

import hashlib
import os
import re
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from coar.errors import StorageError, WeightsError
from coar.examples import update_digest

PLAIN = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device)
ADDRESS = re.compile(" at 0x[0-9a-f]+")  # in what objects print; it differs from process to process
COMPRESSED = ("crow_indices", "col_indices", "values")
COMPRESSED_COLUMNS = ("ccol_indices", "row_indices", "values")


def load_weights(model: nn.Module, path: str | Path, *, prefix: str = "") -> nn.Module:
    """Load a state dict into the model and return the model.

    Args:
        model: The model whose parameters and buffers are replaced.
        path: A `.safetensors` file, or a PyTorch checkpoint that holds only tensors (`.pt`, `.pth`, `.th`).
        prefix: Start of every name in the file, such as `module.`, which is removed before loading.

    Raises:
        WeightsError: When the file is missing, damaged, holds pickled objects, or does not fit the model.
    """
    state = {name.removeprefix(prefix): value for name, value in read_state(path).items()}
    _check_fit(model, state, Path(path))
    whole = model.state_dict()  # with the versions of modules, which files of tensors do not have
    whole.update(state)
    model.load_state_dict(whole)
    return model


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint by name.

    Args:
        path: A `.safetensors` file, or a PyTorch checkpoint that holds only tensors (`.pt`, `.pth`, `.th`).

    Raises:
        WeightsError: When the file is missing, damaged, or holds pickled objects.
    """
    file = Path(os.path.expanduser(path))
    if not file.is_file():
        raise WeightsError(f"there are no weights at {file}; check the path, or train or download them first")
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except SafetensorError as error:
            raise WeightsError(f"{file} is not a complete safetensors file ({error}); get it again") from None
    state = read_pickle(file, remedy="save model.state_dict() as safetensors instead")
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise WeightsError(f"{file} holds no state dict of tensors; save model.state_dict() as safetensors instead")
    return state


def read_pickle(file: Path, *, remedy: str, mapped: bool = False) -> Any:
    """Read a file that `torch.save` has written, if it holds only tensors, numbers, texts, lists and dicts.

    Args:
        file: The file.
        remedy: What to do about a file that is refused, in words.
        mapped: Map the file into memory instead of reading all of it; files of torch before 1.6 are read.

    Raises:
        WeightsError: When the file is damaged or holds other objects.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped and zipfile.is_zipfile(file))
    except OSError:
        raise
    except Exception as error:  # damaged files raise many types of errors
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(
            f"{file} is damaged or holds more than tensors, such as a whole pickled model ({first}); it is not read, "
            f"because unpickling can run code: {remedy}"
        ) from None


def check_in_memory(model: nn.Module) -> None:
    """Raise `WeightsError` when weights of a model are offloaded, or were never loaded."""
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise WeightsError(
            f"{len(missing)} weights are not in memory but offloaded, or were never loaded, such as {missing[0]!r}; "
            f"all of them are needed: load the whole model, onto one device or over several that hold it"
        )


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write the model's state dict as safetensors, completely or not at all.

    Raises:
        StorageError: When the file cannot be written.
    """
    save_state(model.state_dict(), path)


def save_state(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Write tensors by name as safetensors, completely or not at all.

    Raises:
        StorageError: When the file cannot be written.
    """
    file = Path(os.path.expanduser(path))
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    tensors = {name: value.detach().cpu().contiguous() for name, value in _unshared(state).items()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial)
        os.replace(partial, file)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            partial.unlink()
        raise StorageError(f"cannot write weights to {file}: {error}; free space or choose another path") from error


def weights_fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of a model's state dict, see `state_fingerprint`."""
    return state_fingerprint(model.state_dict())


def state_fingerprint(state: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a state dict, by name, type, shape and bytes.

    Quantised and sparse tensors, and those of other libraries' classes, count by the tensors that they consist of; so
    do packed weights and the extra state of modules.

    Raises:
        WeightsError: When a part of the state is of a kind that has no known content.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        _update(digest, name, state[name])
    return digest.hexdigest()


def _update(digest: "hashlib._Hash", name: str, value: Any) -> None:
    """Add one part of a state to a running hash."""
    parts = _parts_of_tensor(value) if isinstance(value, Tensor) else _parts_of_object(value)
    if parts is not None:
        digest.update(f"{name}:{type(value).__name__}:{len(parts)}:".encode())
        for part, content in parts.items():
            _update(digest, f"{name}/{part}", content)
    elif isinstance(value, Tensor):
        update_digest(digest, name, value)
    elif isinstance(value, PLAIN):
        digest.update(f"{name}:{value!r}:".encode())
    else:
        raise WeightsError(
            f"the model's state has {name!r}, a {type(value).__name__} whose content cannot be hashed, so another "
            f"model could pass for this one; let get_extra_state return tensors, numbers, texts, and lists or dicts of "
            f"these"
        )


def _parts_of_tensor(tensor: Tensor) -> dict[str, Any] | None:
    """Return the tensors and settings that a tensor consists of; None if it holds its numbers itself."""
    kind: dict[str, Any] = {"type": str(tensor.dtype), "shape": tuple(tensor.shape)}
    if hasattr(tensor, "__tensor_flatten__"):
        names, settings = tensor.__tensor_flatten__()
        return kind | {name: getattr(tensor, name) for name in names} | {"settings": ADDRESS.sub("", repr(settings))}
    if tensor.is_quantized:
        by_channel = tensor.qscheme() in (torch.per_channel_affine, torch.per_channel_affine_float_qparams)
        scale = (tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()) if by_channel else ()
        return kind | {"integers": tensor.int_repr(), "scale": scale or (tensor.q_scale(), tensor.q_zero_point())}
    if tensor.layout is torch.sparse_coo:
        whole = tensor.coalesce()
        return kind | {"indices": whole.indices(), "values": whole.values()}
    if tensor.layout is not torch.strided:
        rows = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
        return kind | {name: getattr(tensor, name)() for name in (COMPRESSED if rows else COMPRESSED_COLUMNS)}
    return None


def _parts_of_object(value: Any) -> dict[str, Any] | None:
    """Return the parts of a container or of a packed weight; None for anything else."""
    if isinstance(value, Mapping):
        return {repr(key): value[key] for key in sorted(value, key=repr)}
    if isinstance(value, list | tuple):
        return {str(i): part for i, part in enumerate(value)}
    if isinstance(value, np.ndarray):
        return {"numbers": value.tolist()}
    if isinstance(value, torch.ScriptObject):
        return {"state": value.__getstate__()}
    return None


def _unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict with a copy for every name that shares memory with an earlier one."""
    seen: set[int] = set()
    tensors = {}
    for name, value in state.items():
        memory = value.untyped_storage().data_ptr()
        tensors[name] = value.clone() if memory in seen else value
        seen.add(memory)
    return tensors


def _could_hold(model: nn.Module, bias: str) -> bool:
    """Return whether a bias of this name is for a module that could have one."""
    module = dict(model.named_modules()).get(bias.rpartition(".")[0])
    return getattr(module, "bias", 0) is None


def _check_fit(model: nn.Module, state: dict[str, Tensor], file: Path) -> None:
    """Raise `WeightsError` before anything is loaded, so that weights that do not fit leave the model unchanged."""
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    read = {name: tuple(value.shape) for name, value in state.items()}
    counters = "num_batches_tracked"  # of batch norms; older checkpoints lack them, and evaluation does not read them
    wrong = [f"{name} is missing" for name in own if name not in read and not name.endswith(counters)]
    wrong += [f"{name} is not part of the model" for name in read if name not in own]
    wrong += [
        f"{name} has shape {read[name]}, not {own[name]}" for name in own if name in read and own[name] != read[name]
    ]
    biases = [name for name in read if name not in own and name.endswith(".bias") and _could_hold(model, name)]
    if wrong and len(wrong) == len(biases):
        raise WeightsError(
            f"the weights in {file} have {len(biases)} biases that this {type(model).__name__} lacks: {biases[0]} is a "
            f"bias for a layer without one, as an edit adds it (Edit.new_parameters). Give the layer a bias first: "
            f"model.get_submodule(site).bias = torch.nn.Parameter(state[site + '.bias'])"
        )
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise WeightsError(
            f"the weights in {file} do not fit {type(model).__name__}: {'; '.join(wrong[:3])}{more}; load weights "
            f"of the same architecture, or set prefix if the names differ by one"
        )
