"""Checks of plain passes: they repeat, an example's output is its own, and the copy runs its own weights."""

import logging
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as trees
from torch.utils._python_dispatch import TorchDispatchMode

from coar.components.layers import is_dense
from coar.equivalence import ROUNDINGS, SMALLEST, difference, rounding
from coar.errors import CoarError
from coar.examples import Examples
from coar.forward.model_runner import ModelRunner
from coar.inputs import Inputs
from coar.outputs.base import Output
from coar.preflight.absolute import absolute
from coar.preflight.draws import ForcedDraws
from coar.preflight.findings import Findings
from coar.preflight.tracing import calls_in, in_words, rounding_of, where_they_part

log = logging.getLogger(__name__)
CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict)
TRACED = 4  # examples of the passes that find a module
PAIRS = 10  # of passes, until two of them differ
ALLOWED = 1e-3  # difference of two passes, relative to the spread over examples
NOISE = 2e-5  # the same, relative to the largest output
COARSE = 1e-2  # from which on roundings explain no difference


def check_passes(
    findings: Findings,
    model: nn.Module,
    original: nn.Module,
    output: Output,
    examples: Examples,
    *,
    batch_size: int | None = None,
) -> None:
    """Check that the model is a function of one example.

    One pass over all examples is compared with a pass in smaller batches and in reverse order. Further passes find out
    what is wrong only if these two differ.

    Args:
        findings: Takes the outcomes.
        model: A copy made by `device_copy`.
        original: The user's model.
        output: The scalar read per example.
        examples: A few examples.
        batch_size: Most examples per pass.

    Raises:
        AblationError: When a check fails that the study does not accept.
    """
    output = absolute(output)
    size = min(len(examples), batch_size or len(examples))
    try:
        _compare(findings, model, original, output, examples, size)
    except CoarError:
        raise
    except Exception as error:  # whatever a model may raise
        findings.conclude("batch", _failure(model, error))


def _compare(
    findings: Findings, model: nn.Module, original: nn.Module, output: Output, examples: Examples, size: int
) -> None:
    few = examples.subset(range(min(TRACED, size)))
    findings.conclude("original", _reads_of_original(model, original, output, few))
    before, buffers = _generators(), {name: one.clone() for name, one in model.named_buffers() if is_dense(one)}
    passed = _output(model, output, examples, size)
    draws = _generators() != before
    _warn_of_changes(model, buffers)
    backwards = _output(model, output, examples.subset(np.arange(len(examples))[::-1].copy()), -(-size // 2))[::-1]
    precision = rounding(model)
    agree = _difference(precision, passed, backwards)
    if agree and (used := rounding_of(lambda: _whole(model, output, few))) > precision:  # as in autocast
        precision = used
        agree = _difference(precision, passed, backwards)
    amplified = _amplified(model, output, examples, size, passed) if agree else 0.0
    if agree < COARSE and agree <= ROUNDINGS * amplified:
        agree = 0.0
    again, tries = 0.0, PAIRS if draws else int(bool(agree) or size == 1)
    while tries and not again:  # a model may draw numbers and use them rarely, or not at all
        again, tries = _difference(precision, passed, _output(model, output, examples, size)), tries - 1
    rarely = _rarely(model, output, few) if draws and not again else ""
    findings.conclude("random", _randomness(model, output, few, again) if again else rarely)
    if not again and not rarely:
        findings.conclude("original", _unlike_original(model, original, output, few))
    if size > 1 and not again:
        chaotic = 0 < agree <= ROUNDINGS * amplified
        found = (
            _chaos(model, agree, amplified) if chaotic else _batch_effect(model, output, few, agree) if agree else ""
        )
        findings.conclude("batch", found)


def _failure(model: nn.Module, error: Exception) -> str:
    seen = f"{type(error).__name__}: {error}"
    return (
        f"{type(model).__name__} runs on the first examples, and fails after that in a batch of another size ({seen}), "
        f"as where it keeps the state of an earlier pass, so its outputs would depend on the passes before: let it "
        f"take any number of examples, and keep nothing"
    )


def _warn_of_changes(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Warn when a pass has changed a buffer of the model."""
    changed = [name for name, buffer in model.named_buffers() if name in before and difference(before[name], buffer)]
    if changed:
        log.warning(
            "a pass changes the buffer %r of the model, so the model counts as another one once it has run: load it "
            "again, or restore the buffer, before you continue a run or apply an edit",
            changed[0],
        )


def _generators() -> list[bytes]:
    """Return the states of the generators of random numbers that a model may draw from."""
    numpy: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - what a model may draw from
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    tensors = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if used else [])]
    states = [random.getstate(), numpy["state"]["key"].tolist(), numpy["state"]["pos"]]
    return [repr(states).encode(), *(state.numpy().tobytes() for state in tensors)]


def _output(model: nn.Module, output: Output, examples: Examples, batch_size: int) -> np.ndarray:
    runner = ModelRunner(model, output, batch_size=batch_size)
    return runner.base_output(runner.load(examples, 0, len(examples)))


def _difference(precision: float, one: np.ndarray, other: np.ndarray) -> float:
    """Return the largest difference relative to the largest output; 0 where roundings explain it."""
    finite = np.isfinite(one) & np.isfinite(other)
    if (np.isfinite(one) != np.isfinite(other)).any():
        return float("inf")
    if not finite.any():
        return 0.0
    error, largest = float(np.abs(one - other)[finite].max()), float(np.abs(one[finite]).max())
    allowed = max(NOISE, ROUNDINGS * precision) * largest + ALLOWED * float(one[finite].std())
    return error / max(largest, SMALLEST) if error > max(allowed, SMALLEST) else 0.0


def _amplified(model: nn.Module, output: Output, examples: Examples, batch_size: int, passed: np.ndarray) -> float:
    """Return what one rounding of the inputs changes, relative to the largest output; 0 if no input is a fraction.

    Deep networks may amplify roundings, and different batches round differently.
    """
    change = np.abs(_output(model, output, rounded(examples), batch_size) - passed)[np.isfinite(passed)]
    largest = float(np.abs(passed[np.isfinite(passed)]).max())
    return float(np.nan_to_num(change).max()) / max(largest, SMALLEST)


def rounded(examples: Examples) -> Examples:
    """Return examples whose inputs, where they are fractions, are changed by one rounding up or down."""
    inputs, targets = examples.block(0, len(examples))
    return Examples(inputs=with_one_rounding(inputs), targets=targets, positions=examples.positions)


def with_one_rounding(inputs: Inputs) -> Inputs:
    """Return inputs that, where they are fractions, are changed by one rounding up or down."""
    draw = torch.Generator().manual_seed(0)

    def changed(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        signs = torch.randint(2, tensor.shape, generator=draw).to(tensor) * 2 - 1
        return tensor * (1 + signs * torch.finfo(tensor.dtype).eps)

    return {k: changed(v) for k, v in inputs.items()} if isinstance(inputs, dict) else changed(inputs)


def _rarely(model: nn.Module, output: Output, few: Examples) -> str:
    """Return in words that extreme draws change outputs, though others have not, or ""."""
    passed = _whole(model, output, few)
    for level in ("lowest", "highest"):
        try:
            with ForcedDraws(level):
                forced = _whole(model, output, few)
        except Exception as failure:  # whatever a model may raise about such numbers
            log.info("the %s random numbers were not tried: %s", level, failure)
            continue
        if error := _difference(rounding(model), passed, forced):
            return (
                f"{type(model).__name__} draws random numbers and uses some of them rarely: outputs differ by "
                f"{error:.1e} of the largest in a pass that draws the {level} ones, so some outputs would be noise: "
                f"turn it off in evaluation mode"
            )
    return ""


def _randomness(model: nn.Module, output: Output, few: Examples, error: float) -> str:
    run = partial(_whole, model, output)
    path = None
    for _ in range(PAIRS):
        path = where_they_part(calls_in(model, lambda: run(few)), calls_in(model, lambda: run(few)), torch.equal)
        if path is not None:
            break
    return (
        f"{in_words(model, path)} returns something else in a second pass over the same examples, as dropout that "
        f"stays on in evaluation mode, sampling and random masking do; outputs differ by {error:.1e} of the largest, "
        f"so attributions would explain noise, and no output could be collected again: turn it off in evaluation mode"
    )


def _chaos(model: nn.Module, error: float, amplified: float) -> str:
    return (
        f"{type(model).__name__} amplifies roundings: one rounding of the inputs changes outputs by {amplified:.1e} of "
        f"the largest, and batches of another size, which round otherwise, by {error:.1e}, so all numbers would depend "
        f"on the batch size: run the model in float64, or check that its weights and statistics were loaded"
    )


def _batch_effect(model: nn.Module, output: Output, few: Examples, error: float) -> str:
    run = partial(_whole, model, output)
    whole = calls_in(model, lambda: run(few))
    half = calls_in(model, lambda: run(few.subset(range(max(1, len(few) // 2)))))
    path = where_they_part(half, whole, _leads)
    return (
        f"{in_words(model, path)} returns something else for an example when other examples are in its batch, as "
        f"statistics over the batch, results kept from an earlier pass, or an axis of examples other than the first "
        f"do; outputs differ by {error:.1e} of the largest, so all numbers would depend on the batch size: let the "
        f"model compute each example alone, with examples on the first axis of its inputs"
    )


def _whole(model: nn.Module, output: Output, examples: Examples) -> np.ndarray:
    return _output(model, output, examples, len(examples))


def _leads(part: Tensor, whole: Tensor) -> bool:
    """Return whether a tensor of few examples is the beginning of one of more examples, along the first axis."""
    if part.ndim != whole.ndim or part.shape[1:] != whole.shape[1:]:
        return part.ndim == 0 and bool(part == whole)
    if not part.is_floating_point():
        return torch.equal(part, whole[: len(part)])
    largest = float(whole.abs().nan_to_num().max()) if whole.numel() else 0.0
    allowed = max(1e-4, ROUNDINGS * torch.finfo(part.dtype).eps) * largest
    return bool(((part - whole[: len(part)]).abs().nan_to_num() <= allowed).all())


def _reads_of_original(model: nn.Module, original: nn.Module, output: Output, few: Examples) -> str:
    """Return in words which module of the copy computes with a tensor of the original, or ""."""
    names: dict[int, str] = {}
    for name, tensor in [*original.named_parameters(), *original.named_buffers()]:
        if (address := _address(tensor)) is not None:
            names.setdefault(address, name)
    for tensor in [*model.parameters(), *model.buffers()]:
        if (address := _address(tensor)) in names:
            return (
                f"a copy of this {type(original).__name__} holds the memory of {names[address]!r} of your model, so "
                f"ablations would change your model; let copy.deepcopy copy all of its tensors"
            )
    with _running(model) as running, _Reads(names) as reads:
        reads.running = running
        _whole(model, output, few)
    if reads.found is None:
        return ""
    path, name = reads.found
    return (
        f"{in_words(model, path)} computes with {name!r} of your model, and not with the copy that is ablated, as "
        f"where a class or a global name holds a module; ablations and edits would not reach it: read weights and "
        f"modules through self"
    )


def _unlike_original(model: nn.Module, original: nn.Module, output: Output, few: Examples) -> str:
    """Return in words how the outputs of the copy differ from those of the user's model in evaluation mode, or "".

    Where the model itself does not run, such as one that is split over devices, nothing is compared; nor is one with
    weights of a class of their own, such as quantised ones, which a pass may convert.
    """
    if not all(map(is_dense, (*original.parameters(), *original.buffers()))):
        log.info("the copy was not compared with the model itself, which has weights of a class of their own")
        return ""
    expected = _whole(model, output, few)
    try:
        with _as_it_is(original):
            found = _whole(original.eval(), output, few)
    except Exception as failure:  # whatever a model may raise
        log.info("the copy was not compared with the model itself, which fails on its device: %s", failure)
        return ""
    error = _difference(rounding(model), found, expected)
    if not error or error <= ROUNDINGS * _amplified(model, output, few, len(few), expected):
        return ""
    return (
        f"a copy of this {type(model).__name__} returns something else than the model itself in evaluation mode: "
        f"outputs differ by {error:.1e} of the largest, as where copy.deepcopy leaves something out or a pass depends "
        f"on a global state, so attributions would explain another model; let a copy of the model return what it does"
    )


@contextmanager
def _as_it_is(model: nn.Module) -> Iterator[None]:
    """Give a model's modules back their attributes, containers in these what they held, and buffers their numbers."""
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    containers = _containers([before for _, before in attributes])
    buffers = [(one, one.clone()) for one in model.buffers() if is_dense(one)]
    try:
        yield
    finally:
        for module, before in attributes:
            vars(module).clear()
            vars(module).update(before)
        for container, held in containers:
            container.clear()
            (container.extend if isinstance(container, (list, deque)) else container.update)(held)
        with torch.no_grad():
            for buffer, numbers in buffers:
                buffer.copy_(numbers)


def _containers(values: list[Any]) -> list[tuple[Any, Any]]:
    """Return all lists, dictionaries, sets and deques that values hold, also inside each other, and copies of them."""
    found: dict[int, tuple[Any, Any]] = {}
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if type(value) in CONTAINERS and id(value) not in found:
            found[id(value)] = value, copy(value)
            waiting += value.values() if isinstance(value, dict) else value
        elif isinstance(value, tuple):
            waiting += value
    return [kept for number, kept in found.items() if number not in {id(value) for value in values}]


def _address(tensor: Tensor) -> int | None:
    """Return where a tensor's numbers are; None where it has no memory of its own."""
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (NotImplementedError, RuntimeError):  # of subclasses that wrap other tensors
        return None


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the first operation that is given a tensor at one of some addresses.

    Args:
        names: Names of tensors by address.
    """

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = names
        self.running: list[str] = [""]
        self.found: tuple[str, str] | None = None

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.found is None:
            for leaf in trees.tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor) and (name := self._names.get(_address(leaf) or 0)):
                    self.found = self.running[-1], name
                    break
        return function(*args, **(kwargs or {}))


@contextmanager
def _running(model: nn.Module) -> Iterator[list[str]]:
    """Keep a list of the paths of the modules that are running, the innermost last."""
    paths = [""]

    def leave(_module: nn.Module, _args: Any, _returned: Any) -> None:
        paths.pop()

    with ExitStack() as stack:
        for path, module in model.named_modules():
            enter = module.register_forward_pre_hook(lambda _module, _args, path=path: paths.append(path))
            stack.callback(enter.remove)
            stack.callback(module.register_forward_hook(leave).remove)
        yield paths
