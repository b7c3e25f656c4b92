"""Two devices in Python that have no silent transfers: their tensors compute on the CPU, and refuse tensors elsewhere.

torch calls them `second:0` and `second:1`. They hold real numbers, so results can be compared with those of the CPU.
What fails on them is what fails on GPUs: an operation on tensors of several devices, and `.numpy()` of a tensor that
has not been moved. torch runs backward passes on the first one alone, since it counts one device of such a backend.
This module registers the devices for the whole process, so the cases run in a process of their own:
`python -m tests.second_device CASE CASE ...` prints a line of JSON for each case of `device_cases.py`: its name, "" if
the second device gives the CPU's numbers or else the reason, and the seconds of CPU time on both.
"""

import json
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

INDEXING = {  # these take indices of the CPU, also on a GPU
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
    torch.ops.aten.index_put.default,
}
MOVED = (torch.tensor, torch.as_tensor, torch.arange, torch.randperm, torch.linspace)
NAME = "second"
TRANSFERS = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}


class Backend:
    """What torch asks of the module of a device."""

    is_initialized = is_available = staticmethod(lambda: True)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 2)
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = staticmethod(lambda seed: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])


_setup_privateuseone_for_python_backend(NAME, Backend())


class There(torch.Tensor):
    """A tensor on a second device, of this index; `raw` has its numbers, on the CPU."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw, index=0, requires_grad=False):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            layout=raw.layout,
            device=torch.device(NAME, index),
            requires_grad=requires_grad,
        )

    def __init__(self, raw, index=0, requires_grad=False):
        self.raw = raw

    def __repr__(self):
        return f"There({self.raw!r})"

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        """Do what torch does with lists, for which it calls no dispatcher."""
        if function is torch.Tensor.tolist:
            return args[0].cpu().tolist()
        if function is torch.Tensor.new_tensor:
            return torch.tensor(args[1], **{"dtype": args[0].dtype, **(kwargs or {})}).to(args[0].device)
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            lists = any(isinstance(part, list) for part in index)
            index = tuple(torch.tensor(part).to(args[0].device) if isinstance(part, list) else part for part in index)
            args = (args[0], index if lists else args[1], *args[2:])
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            split = function.decompose(*args, **(kwargs or {}))  # in inference mode torch leaves that to the tensor
        return compute(function, args, kwargs or {}) if split is NotImplemented else split


def compute(function, args: Any, kwargs: Any) -> Any:
    """Run an operation on the numbers, after a check that all tensors are on this device."""
    target = kwargs.get("device")
    places = [tensor.device.index for tensor in leaves(args, kwargs) if isinstance(tensor, There)]
    index = (torch.device(target).index or 0) if target is not None else places[0]
    if function not in TRANSFERS:
        check(function, args, kwargs)
    made_at = partial(There, index=index)
    raw_args, raw_kwargs = tree_map_only(There, lambda tensor: tensor.raw, (args, kwargs))
    if target is not None:
        raw_kwargs = {**raw_kwargs, "device": torch.device("cpu")}
    raw_kwargs.pop("pin_memory", None)
    made = function(*raw_args, **raw_kwargs)
    if function is torch.ops.aten._to_copy.default and target is not None and torch.device(target).type != NAME:
        return made
    if function is torch.ops.aten.copy_.default and not isinstance(args[0], There):
        return args[0]
    if function is torch.ops.aten._local_scalar_dense.default:
        return made
    changed = [
        at for at, given in enumerate(function._schema.arguments) if given.alias_info and given.alias_info.is_write
    ]
    if changed:  # an operation in place returns what it changed
        names = [given.name for given in function._schema.arguments]
        same = [args[at] if at < len(args) else kwargs[names[at]] for at in changed]
        return None if made is None else same[0] if len(same) == 1 else tuple(same)
    viewed = [at for at, given in enumerate(function._schema.arguments) if given.alias_info is not None]
    if viewed and isinstance(args[viewed[0]], There):  # a view is an inference tensor if its base is one
        with torch.inference_mode(args[viewed[0]].is_inference()):
            return tree_map_only(torch.Tensor, made_at, made)
    return tree_map_only(torch.Tensor, made_at, made)


def check(function, args, kwargs):
    """Raise torch's error for tensors on two devices; numbers that torch has made tensors of are no tensors."""
    found = leaves(args, kwargs)
    if function in INDEXING and isinstance(args[0], There):
        found = [tensor for tensor in found if tensor.dtype not in (torch.int64, torch.bool)]
    places = {str(tensor.device) for tensor in found if isinstance(tensor, There) or tensor.ndim > 0}
    if len(places) > 1:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {function} got {sorted(places)}")


def leaves(args, kwargs):
    """All tensors among the arguments of an operation."""
    found = []
    tree_map_only(torch.Tensor, found.append, (args, kwargs))
    return found


def made_on_device(function, *args, **kwargs):
    """Run an operation without tensors that makes one on this device."""
    return compute(function, args, kwargs)


class MadeThere(TorchFunctionMode):
    """Makes on the CPU, and then moves, what torch makes without the dispatcher, or in a tensor that it resizes."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in MOVED and torch.device(kwargs.get("device") or "cpu").type == NAME:
            device = kwargs.pop("device")
            return function(*args, **kwargs).to(device)
        return function(*args, **kwargs)


MadeThere().__enter__()  # for the whole process
LIBRARY = torch.library.Library("_", "IMPL")
LIBRARY.fallback(
    torch.library.fallthrough_kernel, dispatch_key="AutocastPrivateUse1"
)  # lower precision changes nothing
LIBRARY.fallback(made_on_device, dispatch_key="PrivateUse1")


def own(file):
    """Whether a file is a library's or the package's, and not this device's or torch's."""
    return Path(file).name != "second_device.py" and "/torch/" not in file


def said_of(name):
    """The line about a case."""
    started = time.process_time()
    try:
        reason = difference(name, NAME)
    except Exception as error:  # the reason is what a test shows
        frames = [f for f in traceback.extract_tb((error.__cause__ or error).__traceback__) if own(f.filename)]
        places = [f"{Path(frame.filename).name}:{frame.lineno} {frame.line}" for frame in frames[-4:]]
        reason = f"{type(error).__name__}: {error} (at {' | '.join(places)})"
    return json.dumps({"case": name, "reason": reason, "seconds": round(time.process_time() - started, 1)})


if __name__ == "__main__":
    from tests.device_cases import CASES, difference

    for name in sys.argv[1:] or CASES:
        sys.stdout.write(said_of(name) + "\n")
        sys.stdout.flush()
