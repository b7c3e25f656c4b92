"""Copies of models on a device, in evaluation mode, in the memory format that works on the examples."""

import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as trees
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from coar.components.layers import is_dense
from coar.equivalence import Kind, compare, difference, fall_back, rounding
from coar.errors import CoarError, ExamplesError, SettingsError, WeightsError
from coar.examples import Examples, call_model, device_of, devices_of
from coar.forward.devices import choose_device, free_bytes, full_float32
from coar.gates.layouts import know_layouts
from coar.inputs import Inputs, described
from coar.model_copy import independent_copy
from coar.weights import check_in_memory

TRIED = 2  # examples that a copy runs on
ACTIVATIONS, GELU_BY_TANH = "transformers.activations", ("NewGELUActivation", "FastGELUActivation")
CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)  # which have a memory format


def device_copy(model: nn.Module, device: str | torch.device, examples: Examples | None = None) -> nn.Module:
    """Return a copy of a model on the device, in evaluation mode; the user's model does not change.

    In the copy, one kernel of torch replaces activations that are written as several elementwise steps, and torch's
    encoder does not convert padded texts to nested tensors, which have no shape for gates. Convolutions are in
    channels-last if the model then runs and returns the same. Gates on the copy know where modules hold examples.

    Args:
        model: The model.
        device: Where the copy is, or a name for `choose_device`. With `auto`, a model that accelerate has split over
            devices stays split: each weight of the copy is where it is in the model, and accelerate's hooks move the
            activations. With any other device such a model is gathered there.
        examples: Examples, of which the first few pass through the copy; without them the memory format is not changed.

    Raises:
        WeightsError: When a part of the model cannot be copied, is not in memory, or is no Python module.
        SettingsError: When there is no such device, or a copy takes more memory than is free.
        ExamplesError: When the model fails on the examples.
    """
    copy = plain_copy(model, device)
    copy.eval().requires_grad_(False)
    if rounding(copy) <= torch.finfo(torch.float32).eps:  # models of lower precision round between the steps
        _fuse_activations(copy)
    for encoder in [module for module in copy.modules() if isinstance(module, nn.TransformerEncoder)]:
        _keep_padding(encoder)
    if examples is not None:
        inputs = examples.block(0, TRIED)[0]
        _use_channels_last(copy, inputs, _first_pass(copy, inputs))
        know_layouts(copy, examples)
    return copy


def plain_copy(model: nn.Module, device: str | torch.device) -> nn.Module:
    """Return a copy of a model on the device without any other change.

    Args:
        model: The model.
        device: As for `device_copy`.

    Raises:
        WeightsError: When a part of the model cannot be copied, is not in memory, or is no Python module.
        SettingsError: When there is no such device, or a copy takes more memory than is free.
    """
    _check_python(model)
    check_in_memory(model)
    stays = device == "auto" and is_split(model)
    place = choose_device(device) if isinstance(device, str) else device
    _check_memory(model, None if stays else place, may_stay=isinstance(device, str) and is_split(model))
    copy = independent_copy(model)
    if stays:
        _return_results(copy)
        return copy
    if any(held.device != place for held in (*copy.parameters(), *copy.buffers())):  # quantised models refuse `to`
        # the class's own `to`: one that was set on the instance, as accelerate does, is bound to the user's model
        copy = type(copy).to(copy, place)
    _gather(copy)
    return copy


def is_split(model: nn.Module) -> bool:
    """Return whether accelerate has split a model over devices, between which its hooks move activations."""
    return len(devices_of(model)) > 1 and any(True for _ in _aligned(model))


def _check_python(model: nn.Module) -> None:
    """Raise `WeightsError` when a part of a model is TorchScript, which takes neither hooks nor other weights."""
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            name = f"the module {path!r}" if path else "the model"
            raise WeightsError(
                f"{name} is a {type(module).__name__} of TorchScript, and gates need Python modules; give the module "
                f"that it was scripted or traced from, with the same weights"
            )


def _check_memory(model: nn.Module, device: torch.device | None, *, may_stay: bool) -> None:
    """Raise `SettingsError` when a copy is larger than what is free, before the system ends the process.

    Args:
        model: The model.
        device: Where the copy is; None where each weight stays where it is.
        may_stay: Whether the copy could stay where the model is.
    """
    needed = Counter[torch.device]()
    for held in {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values():
        needed[held.device] += _bytes_of(held)
    if device is not None:
        needed[device] = sum(needed.values())
    for place, size in needed.items():
        free = free_bytes(place)
        if free is not None and size > free:
            stay = "leave the split model where it is with device='auto', " if may_stay and place == device else ""
            raise SettingsError(
                f"a copy of {type(model).__name__} takes {size / 2**30:.3g} GiB on {place}, where {free / 2**30:.3g} "
                f"GiB are free; {stay}load the model in bfloat16, end other programs, or use a larger machine"
            )


def _bytes_of(tensor: Tensor) -> int:
    """Return the bytes of a tensor, or of those that it wraps, as quantised ones do."""
    if is_traceable_wrapper_subclass(tensor):
        return sum(_bytes_of(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def _aligned(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """Yield the modules that accelerate has given a hook that moves data to their device, and the hooks."""
    hooks = sys.modules.get("accelerate.hooks")  # models that accelerate has split have imported it
    if hooks is None:
        return
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        if isinstance(hook, hooks.AlignDevicesHook) and not hook.offload:
            yield module, hook


def _gather(copy: nn.Module) -> None:
    """Remove the hooks by which accelerate moves data between devices, since the copy is on one."""
    for module, _ in list(_aligned(copy)):
        sys.modules["accelerate.hooks"].remove_hook_from_module(module)


def _return_results(copy: nn.Module) -> None:
    """Let a split model return its results on the device of its inputs, as accelerate does unless told otherwise."""
    for module, hook in _aligned(copy):
        if module is copy:
            hook.io_same_device = True


def has_channels_last(model: nn.Module) -> bool:
    """Return whether a model's convolutions are in channels-last, in which its inputs should then be too."""
    weights = [module.weight for module in model.modules() if isinstance(module, CONVOLUTIONS)]
    return any(
        is_dense(weight) and weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
        for weight in weights
    )


def in_channels_last(inputs: Tensor) -> Tensor:
    """Return pictures in channels-last, and other inputs as they are."""
    return inputs.to(memory_format=torch.channels_last) if inputs.ndim == 4 else inputs


def _first_pass(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Return the tensors in a model's result on its first examples, or raise `ExamplesError` when it fails.

    A model that writes into its inputs gets a copy of them from then on.
    """
    try:
        given = trees.tree_map(lambda tensor: tensor.to(device_of(model), copy=True), inputs)
        result = _result(model, given)
    except CoarError:
        raise
    except Exception as error:  # whatever a model may raise
        first = str(error).strip().splitlines()
        raise ExamplesError(
            f"{type(model).__name__} fails on the first examples, {described(inputs)}: {type(error).__name__}: "
            f"{first[0] if first else 'no message'}; {_remedy(model, inputs, error)}"
        ) from error
    if result and is_split(model) and result[0].device != device_of(model):
        raise SettingsError(
            f"{type(model).__name__} is split over {', '.join(map(str, devices_of(model)))}, takes inputs on "
            f"{device_of(model)} and returns a result on {result[0].device}; split it with accelerate's dispatch_model "
            f"or from_pretrained(device_map=...), or give device='cpu' or 'cuda', where it is gathered"
        )
    pairs = zip(trees.tree_leaves(given), trees.tree_leaves(inputs), strict=True)
    if any(difference(own.cpu(), now.cpu()) for now, own in pairs):
        fall_back("a pass on the inputs themselves", "the model writes into them")
        model.register_forward_pre_hook(_copied_inputs, with_kwargs=True, prepend=True)
    return result


def _copied_inputs(_module: nn.Module, args: Any, kwargs: Any) -> Any:
    return trees.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs))


def _remedy(model: nn.Module, inputs: Inputs, error: Exception) -> str:
    """Return what most likely makes the model run."""
    given = inputs if isinstance(inputs, dict) else {"inputs": inputs}
    wanted = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    other = {
        name: value.dtype
        for name, value in given.items()
        if wanted is not None and value.dtype != wanted and (value.is_floating_point() or value.dtype == torch.uint8)
    }
    if other:
        name, kind = next(iter(other.items()))
        scaled = " / 255, and then normalised as in training" if kind == torch.uint8 else ""
        return (
            f"{name} are {kind} and the model's weights are {wanted}: convert them, as by {name}.to({wanted}){scaled}, "
            f"or let the model convert its inputs"
        )
    if isinstance(error, TypeError) and isinstance(inputs, dict):
        return (
            f"the keys of the inputs, {sorted(given)}, are passed as the names of forward's arguments: rename or drop "
            f"those that it does not take"
        )
    return (
        "call model.eval()(inputs) on the same inputs to see it fail without this package, with an axis of examples "
        "first; if it does not, the model depends on training mode, on its device or on being the original object"
    )


def _result(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Return the tensors in a model's result."""
    with torch.inference_mode(), full_float32():
        return _tensors(call_model(model, inputs))


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, dict):
        return [tensor for value in result.values() for tensor in _tensors(value)]
    if isinstance(result, list | tuple):
        return [tensor for value in result for tensor in _tensors(value)]
    return _tensors(vars(result)) if hasattr(result, "__dict__") else []


def _use_channels_last(model: nn.Module, inputs: Inputs, expected: list[Tensor]) -> None:
    """Convert convolutions to channels-last if the model's result stays the same, and else to contiguous weights."""
    convolutions = [one for one in model.modules() if isinstance(one, CONVOLUTIONS) and is_dense(one.weight)]
    if not convolutions:
        return
    if convolutions[0].weight.device.type == "cpu" and any(isinstance(one, nn.GroupNorm) for one in model.modules()):
        fall_back("channels-last", "group norms lose digits in it on a CPU, where a mean exceeds the deviation")
        return
    for module in convolutions:
        module.to(memory_format=torch.channels_last)
    try:
        found = _result(model, inputs if isinstance(inputs, dict) else in_channels_last(inputs))
    except Exception as error:  # whatever a model may raise, such as a view that needs contiguous activations
        reason = f"the model fails: {error}"
    else:
        reason = _differences(expected, found, rounding(model))
    if reason:
        fall_back("channels-last", reason)
        for module in convolutions:
            module.to(memory_format=torch.contiguous_format)


def _differences(expected: list[Tensor], found: list[Tensor], precision: float) -> str:
    """Return in words how two lists of tensors differ, or "" if they agree."""
    if not expected or len(expected) != len(found):
        return "the model's result holds no tensors to compare"
    compared = (compare(*pair, Kind.REORDERED, precision=precision) for pair in zip(expected, found, strict=True))
    return next((f"results {one}" for one in compared if not one.agrees), "")


def _fuse_activations(model: nn.Module) -> None:
    """Replace transformers' GELU by tanh, written in elementwise steps, unless it has hooks."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            kind = type(child)
            hooked = child._forward_hooks or child._forward_pre_hooks or hasattr(child, "_hf_hook")
            if kind.__module__ == ACTIVATIONS and kind.__name__ in GELU_BY_TANH and not hooked:
                setattr(parent, name, nn.GELU(approximate="tanh"))


class _Padding:
    """Zeros at the padding of texts, where torch's encoder would have converted them to nested tensors.

    A nested tensor has no padding, so the encoder's last layer then has zeros there.

    Args:
        right_only: Whether the encoder converts only texts with all of their padding on the right.
    """

    def __init__(self, right_only: bool) -> None:
        self._right_only = right_only
        self._blank: Tensor | None = None  # (texts, positions) of the encoder's current call

    def note(self, _encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the padding from the arguments of the encoder's call."""
        given = dict(zip(("src", "mask", "src_key_padding_mask"), args, strict=False)) | kwargs
        mask = given.get("src_key_padding_mask")
        self._blank = None
        if mask is not None and given.get("mask") is None and given["src"].ndim == 3:
            blank = mask if mask.dtype == torch.bool else mask != 0
            inside = (blank[:, :-1] & ~blank[:, 1:]).any()
            self._blank = None if self._right_only and bool(inside) else blank

    def blanked(self, y: Tensor) -> Tensor:
        """Return what the last layer returned, with zeros at the padding."""
        return y if self._blank is None else y.masked_fill(self._blank[..., None], 0.0)

    def before_norm(self, _norm: nn.Module, args: tuple[Tensor]) -> Tensor:
        """Change the input of the encoder's last norm."""
        return self.blanked(args[0])

    def after(self, _encoder: nn.Module, _args: Any, y: Tensor) -> Tensor:
        """Change what an encoder without a last norm returns."""
        return self.blanked(y)


def _keep_padding(encoder: nn.TransformerEncoder) -> None:
    """Let torch's encoder compute on padded texts what it computes on nested tensors."""
    if not getattr(encoder, "use_nested_tensor", False):
        return
    encoder.use_nested_tensor = False
    padding = _Padding(getattr(encoder, "mask_check", True))
    encoder.register_forward_pre_hook(padding.note, with_kwargs=True)
    if encoder.norm is None:
        encoder.register_forward_hook(padding.after)
    else:
        encoder.norm.register_forward_pre_hook(padding.before_norm)
