"""Runs units of work on one device: many masks on a block of examples that stays there."""

import platform
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from coar.ablation import Gates
from coar.components import Components
from coar.errors import AblationError, PrecisionError, SettingsError
from coar.examples import Examples, Inputs
from coar.outputs import Output

Precision = Literal["float32", "bf16"]
CHOICES = ("float32", "bf16", "auto")
GATE_TOLERANCE = 1e-3
BATCH_SIZE = {"cpu": 128, "cuda": 512, "mps": 256}  # examples per forward, unless the user says otherwise


def choose_device(name: str) -> torch.device:
    """Return a device for `auto`, `cpu`, `cuda`, `cuda:1` or `mps`; raise `SettingsError` when it is not there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if there[kind]))
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in there:
        raise SettingsError(f"unknown device {name!r}; choose auto, cpu, cuda, cuda:N or mps")
    if not there[device.type] or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        found = ", ".join(kind for kind, present in there.items() if present)
        raise SettingsError(f"device {name!r} is not available on this machine, which has {found}; choose one of those")
    return device


def device_copy(model: nn.Module, device: torch.device) -> nn.Module:
    """Copy a model once, onto the device and into evaluation mode, so that the user's own stays as it is."""
    copy = deepcopy(model).to(device).eval().requires_grad_(False)
    for module in copy.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.to(memory_format=torch.channels_last)
    return copy


@dataclass(frozen=True)
class Block:
    """A block of examples on the device, cut into batches."""

    batches: list[tuple[Inputs, Tensor]]
    size: int


class ModelRunner:
    """Holds one copy of the model on one device and reads outputs off it.

    Args:
        model: A copy made by `device_copy`.
        output: The scalar read per example.
        precision: `float32`, or `bf16` for automatic mixed precision.
        batch_size: Most examples per forward pass; by default 128 on a CPU, 512 on CUDA, 256 on MPS.
    """

    def __init__(
        self, model: nn.Module, output: Output, *, precision: Precision = "float32", batch_size: int | None = None
    ) -> None:
        self._model = model
        self._output = output
        self._precision = precision
        self.device = next(model.parameters()).device
        self.batch_size = batch_size or BATCH_SIZE[self.device.type]

    def load(self, examples: Examples, start: int, stop: int) -> Block:
        """Read examples `start` up to `stop` and move them to the device."""
        inputs, targets = examples.block(start, stop)
        batches = []
        for at in range(0, len(targets), self.batch_size):
            part = slice(at, at + self.batch_size)
            x = {k: v[part] for k, v in inputs.items()} if isinstance(inputs, dict) else inputs[part]
            batches.append((self._place(x), targets[part].to(self.device)))
        return Block(batches, len(targets))

    def base_output(self, block: Block) -> np.ndarray:
        """Return (examples,) float32 outputs of the unablated model."""
        out = torch.empty(block.size, device=self.device)
        with torch.inference_mode(), self._cast():
            self._fill(out, block)
        return out.cpu().numpy()

    def _fill(self, row: Tensor, block: Block) -> None:
        at = 0
        for inputs, targets in block.batches:
            row[at : at + len(targets)] = self._output(self._run(inputs), targets)
            at += len(targets)

    def _run(self, inputs: Inputs) -> Any:
        return self._model(**inputs) if isinstance(inputs, dict) else self._model(inputs)

    def _cast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._precision == "bf16")

    def _place(self, inputs: Inputs) -> Inputs:
        if isinstance(inputs, dict):
            return {name: value.to(self.device) for name, value in inputs.items()}
        if inputs.ndim == 4:
            return inputs.to(self.device, memory_format=torch.channels_last)
        return inputs.to(self.device)


class Worker(ModelRunner):
    """Turns masks into outputs.

    Args:
        model: A copy made by `device_copy`.
        components: The components a mask speaks of.
        replacements: (components,) constants of the ablation.
        output: The scalar read per example.
        batch_norms: Path of the batch norm that alone follows a site; it is folded into the gated weights.
        through_outputs: Gate outputs by hooks, the plain way, instead of weights.
        precision: `float32`, or `bf16` for automatic mixed precision.
        batch_size: Most examples per forward pass; by default 128 on a CPU, 512 on CUDA, 256 on MPS.
    """

    def __init__(
        self,
        model: nn.Module,
        components: Components,
        replacements: Tensor,
        output: Output,
        *,
        batch_norms: Mapping[str, str] | None = None,
        through_outputs: bool = False,
        precision: Precision = "float32",
        batch_size: int | None = None,
    ) -> None:
        super().__init__(model, output, precision=precision, batch_size=batch_size)
        self._components = components
        self._replacements = replacements
        self._fast = {"batch_norms": batch_norms or {}, "through_outputs": through_outputs}

    def outputs(self, block: Block, masks: np.ndarray) -> np.ndarray:
        """Return (masks, examples) float32 outputs of the block under (masks, components) boolean masks."""
        keeps = torch.from_numpy(masks).to(self.device)
        out = torch.empty(len(masks), block.size, device=self.device)
        gated = Gates(self._model, self._components, self._replacements, **self._fast)  # type: ignore[arg-type]
        with gated as gates, torch.inference_mode(), self._cast():
            for row, keep in enumerate(keeps):
                gates.set(keep)
                self._fill(out[row], block)
                if row == 0:
                    gates.confirm()
        return out.cpu().numpy()

    def gradients(self, block: Block) -> np.ndarray:
        """Return (examples, components) float32 gradients of the output by each gate of the unablated model."""
        everything = np.ones((1, 1, len(self._components)), dtype=bool)
        return self.probe(block, everything, np.zeros(block.size, dtype=np.int64))[0]

    def probe(self, block: Block, masks: np.ndarray, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Run each example forward and backward under masks of its own.

        Args:
            block: The examples.
            masks: (probes, slots, components) boolean masks.
            slots: (examples,) which slot's masks each example takes.

        Returns:
            (examples, components) float32 mean gradients of the output by each gate over the probes that keep the
            component, the same over those that ablate it (NaN where there is none), and (probes, examples) outputs.

        Raises:
            AblationError: When a component has no gate that a gradient could pass, or the output has no gradient.
        """
        probes, n = len(masks), block.size
        keeps = torch.from_numpy(masks).to(self.device)
        which = torch.from_numpy(slots).to(self.device)
        sums = torch.zeros(2, n, len(self._components), device=self.device)  # all probes, and those that keep
        out = torch.empty(probes, n, device=self.device)
        fast = self._fast | {"through_outputs": True}
        gated = Gates(self._model, self._components, self._replacements, **fast)  # type: ignore[arg-type]
        with gated as gates, self._cast():
            for number, of_slots in enumerate(keeps):
                at = 0
                for inputs, targets in block.batches:
                    part = slice(at, at + len(targets))
                    keep = of_slots[which[part]].float().requires_grad_()
                    gates.set(keep)
                    values = self._output(self._run(inputs), targets)
                    gates.confirm()
                    gradient = _gradient(values, keep)
                    sums[0, part] += gradient
                    sums[1, part] += gradient * keep.detach()
                    out[number, part] = values.detach()
                    at = part.stop
        kept = keeps.sum(0)[which].float()  # (examples, components), how many probes keep
        means = torch.stack([sums[1] / kept, (sums[0] - sums[1]) / (probes - kept)])
        return means[0].cpu().numpy(), means[1].cpu().numpy(), out.cpu().numpy()


def _gradient(values: Tensor, keep: Tensor) -> Tensor:
    """Return the (examples, components) gradient of each example's output by its own gates."""
    if not values.requires_grad:
        raise AblationError(
            "the output has no gradient by the gates: something between them detaches it, such as no_grad, argmax or a "
            "conversion to numpy; use an output that can be differentiated, or collect masks instead of probes"
        )
    return torch.autograd.grad(values.sum(), keep)[0].float()


@dataclass(frozen=True)
class PrecisionCheck:
    """How bfloat16 compares with float32 on the same masks and examples.

    Attributes:
        error: Root mean square difference over masks, relative to the float32 outputs' standard deviation over masks,
            averaged over examples.
        speedup: Time of float32 over time of bfloat16.
        tolerance: Largest error that was allowed.
        masks: How many masks were compared.
        device: The kind of device and processor.
    """

    error: float
    speedup: float
    tolerance: float
    masks: int
    device: str


def compare_gates(expected: np.ndarray, found: np.ndarray) -> float:
    """Return the largest difference between gated outputs and gated weights, relative to the largest output.

    Raises:
        AblationError: When they disagree, so that no run is made of numbers that depend on how a mask is applied.
    """
    error = float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-6))
    if error > GATE_TOLERANCE:
        raise AblationError(
            f"ablating by weights and by outputs gives outputs that differ by {error:.1e} of the largest, and "
            f"{GATE_TOLERANCE} is allowed: some layer does not compute what its type promises; exclude it"
        )
    return error


def compare_rows(worker: Worker, block: Block, masks: np.ndarray) -> float:
    """Return the largest difference that a mask per example makes to one mask for all, relative to the largest output.

    Args:
        worker: The worker.
        block: A few examples.
        masks: (examples, components) boolean masks, one per example.

    Raises:
        AblationError: When they disagree, since an example was then given another one's mask, or when there is no
            gradient to be had.
    """
    found = worker.probe(block, masks[None], np.arange(block.size))[2][0]
    expected = worker.outputs(block, masks).diagonal()
    error = float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-6))
    if error > GATE_TOLERANCE:
        raise AblationError(
            f"a mask for every example gives outputs that differ by {error:.1e} of the largest from those of one mask "
            f"for all, and {GATE_TOLERANCE} is allowed: some layer does not lay the entries of an example out side by "
            f"side; exclude it, or collect masks instead of probes"
        )
    return error


def compare_precisions(plain: Worker, low: Worker, block: Block, masks: np.ndarray, tolerance: float) -> PrecisionCheck:
    """Measure bfloat16 against float32 on the first masks of the first unit."""
    for worker in (plain, low):
        worker.outputs(block, masks[:1])  # the first pass also pays for kernels to be chosen
    start = time.perf_counter()
    exact = plain.outputs(block, masks)
    middle = time.perf_counter()
    rough = low.outputs(block, masks)
    end = time.perf_counter()
    spread = exact.std(axis=0)
    difference = np.sqrt(((rough - exact) ** 2).mean(axis=0))
    error = float((difference / np.maximum(spread, 1e-6)).mean())
    return PrecisionCheck(
        error, (middle - start) / (end - middle), tolerance, len(masks), f"{plain.device.type} {platform.machine()}"
    )


def choose_precision(asked: str, check: PrecisionCheck) -> Precision:
    """Return the precision to use; raise `PrecisionError` when `bf16` was asked for and is too far off.

    `auto` takes bfloat16 when it is within the tolerance and faster, and float32 otherwise.
    """
    if asked == "bf16" and not check.error <= check.tolerance:
        raise PrecisionError(
            f"bfloat16 moves the outputs by {check.error:.3f} of their spread over {check.masks} masks, and the "
            f"tolerance is {check.tolerance}; use float32 or auto, or raise the precision tolerance"
        )
    return "bf16" if asked == "bf16" or (check.error <= check.tolerance and check.speedup > 1) else "float32"
