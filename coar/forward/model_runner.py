"""The base of runners, one model on one device: outputs of the whole model, and gradients by gates in hooks."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from coar.components.table import Components
from coar.errors import AblationError
from coar.examples import Examples, device_of, rows_of
from coar.forward.batches import ExampleBlock
from coar.forward.copies import has_channels_last, in_channels_last
from coar.forward.devices import batch_size_on, full_float32
from coar.forward.execution_plan import Precision
from coar.gates.gates import Gates
from coar.inputs import Inputs
from coar.outputs.base import Output, RelativeOutput

Sources = Callable[[Examples], np.ndarray | None]  # see Ablation.sources
GateKind = Literal["weights", "hooks", "sources", "constants"]


class ModelRunner:
    """Holds one copy of the model on one device and reads outputs off it.

    Args:
        model: A copy made by `device_copy`.
        output: The scalar read per example.
        batch_size: Most examples per forward pass; by default 128 on a CPU, 512 on CUDA, 256 elsewhere.

    Attributes:
        model: The model.
        precision: `float32`, or `bf16` for automatic mixed precision.
        device: The model's device.
        batch_size: Most examples per forward pass.
    """

    precision: Precision = "float32"
    _sources: Sources | None = None

    def __init__(self, model: nn.Module, output: Output, *, batch_size: int | None = None) -> None:
        self.model = model
        self.device = device_of(model)
        self.batch_size = batch_size or batch_size_on(self.device)
        self._output = output
        self._channels_last = has_channels_last(model)

    def load(self, examples: Examples, start: int, stop: int) -> ExampleBlock:
        """Read examples `start` up to `stop`, and their resample sources if any, and move them to the device.

        Where the output compares with the unablated model, that is run once, and what the output keeps of its result
        takes the place of the targets.
        """
        block = self._arranged(self._read(examples, start, stop))
        if not isinstance(self._output, RelativeOutput):
            return block
        with torch.no_grad(), self._computing():
            references = [self._output.reference(self._run(inputs), targets) for inputs, targets in block.batches]
        inputs_of = (inputs for inputs, _ in block.batches)
        return replace(block, batches=list(zip(inputs_of, references, strict=True)))

    def _arranged(self, block: ExampleBlock) -> ExampleBlock:
        """Return a block whose batches are faster to run."""
        return block

    def _read(self, examples: Examples, start: int, stop: int) -> ExampleBlock:
        inputs, targets = examples.block(start, stop)
        parts = [slice(at, at + self.batch_size) for at in range(0, len(targets), self.batch_size)]
        batches = [(self._place(rows_of(inputs, part)), self._sent(targets[part])) for part in parts]
        chosen = self._sources(examples) if self._sources else None
        if chosen is None:
            return ExampleBlock(batches, len(targets), [])
        sources = examples.subset(chosen[start:stop]).block(0, len(targets))[0]
        return ExampleBlock(batches, len(targets), [self._place(rows_of(sources, part)) for part in parts])

    def base_output(self, block: ExampleBlock) -> np.ndarray:
        """Return (examples,) float32 outputs of the unablated model."""
        out = torch.empty(block.size, device=self.device)
        with torch.inference_mode(), self._computing():
            self._fill(out, block, self._run)
        return block.in_order(out).cpu().numpy()

    def _fill(self, row: Tensor, block: ExampleBlock, run: Callable[[Inputs], Any]) -> None:
        at = 0
        for inputs, targets in block.batches:
            row[at : at + len(targets)] = self._output.read(run(inputs), targets)
            at += len(targets)

    def _run(self, inputs: Inputs) -> Any:
        return self.model(**inputs) if isinstance(inputs, dict) else self.model(inputs)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Set the precision inside the context."""
        with full_float32(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            yield

    def _place(self, inputs: Inputs) -> Inputs:
        if isinstance(inputs, dict):
            return {name: self._sent(value) for name, value in inputs.items()}
        return self._sent(self._laid_out(inputs))

    def _laid_out(self, inputs: Tensor) -> Tensor:
        """Return inputs in the memory format of the convolutions."""
        return in_channels_last(inputs) if self._channels_last else inputs

    def _sent(self, value: Tensor) -> Tensor:
        """Copy to the device; to CUDA from pinned memory, so that the copy and computation overlap."""
        if self.device.type == "cuda" and value.device.type == "cpu":
            return value.pin_memory().to(self.device, non_blocking=True)
        return value.to(self.device)


class GatedRunner(ModelRunner, ABC):
    """Turns masks into outputs and gradients; gates are built once and entered for every call.

    Args:
        model: A copy made by `device_copy`.
        components: The components of a mask.
        replacements: (components.width,) constants of the ablation, one per channel; or (positions, components.width).
        output: The scalar read per example.
        sources: Maps examples to the position of each one's resample source, see `Ablation.sources`;
            hooks then give an ablated component its value for the source.
        batch_size: Most examples per forward pass; by default 128 on a CPU, 512 on CUDA, 256 elsewhere.

    Attributes:
        components: The components.
    """

    def __init__(
        self,
        model: nn.Module,
        components: Components,
        replacements: Tensor,
        output: Output,
        *,
        sources: Sources | None = None,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(model, output, batch_size=batch_size)
        self.components = components
        self._sources = sources
        self._replacements = replacements
        self._gates: dict[GateKind, Gates] = {}
        self._differentiable = False  # whether a check found a gradient for every operation

    @abstractmethod
    def outputs(self, block: ExampleBlock, masks: np.ndarray) -> np.ndarray:
        """Return (masks, examples) float32 outputs of the block under (masks, components) masks.

        Masks are boolean, or gates between 0, ablated, and 1, kept.
        """

    @abstractmethod
    def _hook_gates(self, block: ExampleBlock) -> Gates:
        """Return gates in hooks, which support gradients and a mask per row."""

    def full_model_gradients(self, block: ExampleBlock) -> np.ndarray:
        """Return (examples, components) float32 gradients of the output by each gate of the unablated model."""
        everything = np.ones((1, 1, len(self.components)), dtype=bool)
        return self.mask_gradients(block, everything, np.zeros(block.size, dtype=np.int64))[0]

    def mask_gradients(
        self, block: ExampleBlock, masks: np.ndarray, mask_groups: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Run each example forward and backward under its own masks.

        Args:
            block: The examples.
            masks: (gradients, groups, components) boolean masks, or gates between 0, ablated, and 1, kept.
            mask_groups: (examples,) the mask group of each example.

        Returns:
            (examples, components) float32 mean gradients of the output by each gate over the mask gradients that keep
            the component, the same over those that ablate it (NaN if none does), and (mask gradients, examples)
            outputs.

        Raises:
            AblationError: When a component has no gate with a gradient, or the output has no gradient.
        """
        mask_gradients, n = len(masks), block.size
        keeps = torch.from_numpy(masks).to(self.device)
        which = block.in_batches(torch.from_numpy(mask_groups).to(self.device))
        sums = torch.zeros(2, n, len(self.components), device=self.device)  # all mask gradients, and those that keep
        out = torch.empty(mask_gradients, n, device=self.device)
        with self._hook_gates(block) as gates, self._computing():
            for piece, span in block.pieces():
                self._record(gates, piece)
                for number, of_groups in enumerate(keeps):
                    at = span.start
                    for inputs, targets in piece.batches:
                        part = slice(at, at + len(targets))
                        keep = of_groups[which[part]].float().requires_grad_()
                        gates.set(keep)
                        values = self._output.read(self._run(inputs), targets)
                        gates.confirm()
                        self._check_differentiable(values)
                        gradient = torch.autograd.grad(values.sum(), keep)[0].float()
                        sums[0, part] += gradient
                        sums[1, part] += gradient * keep.detach()
                        out[number, part] = values.detach()
                        at = part.stop
        kept = keeps.sum(0)[which].float()  # (examples, components), how many mask gradients keep
        means = torch.stack([sums[1] / kept, (sums[0] - sums[1]) / (mask_gradients - kept)])
        means = block.in_order(means, axis=1)
        return means[0].cpu().numpy(), means[1].cpu().numpy(), block.in_order(out).cpu().numpy()

    def _check_differentiable(self, outputs: Tensor) -> None:
        """Raise `AblationError` unless outputs have a gradient, and all operations that it passes have one."""
        if not outputs.requires_grad:
            raise AblationError(
                "the output has no gradient by the gates: something between them detaches it, such as no_grad, argmax "
                "or a conversion to numpy; use an output that can be differentiated, or collect masks instead of mask "
                "gradients"
            )
        if not self._differentiable and _without_derivative(outputs):
            raise AblationError(
                "an operation between gates and output has no derivative in torch, such as a layer of "
                "quantize_dynamic; gradients before it would be zero: collect masks instead of mask gradients, or "
                "choose components behind it"
            )
        self._differentiable = True

    def weighted_gradients(
        self, block: ExampleBlock, mask: np.ndarray, constants: np.ndarray, slopes: Callable[[np.ndarray], np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Run the block forward and backward under one mask, with constants instead of the ablation's.

        Args:
            block: The examples.
            mask: (components,) boolean mask, or gates between 0, ablated, and 1, kept.
            constants: (components.width,) constants, one per channel.
            slopes: Maps (examples,) outputs to the weight of each.

        Returns:
            (examples,) float32 outputs, and the gradients of their weighted sum: (components.width,) by the constants
            and (components,) by the gates.
        """
        values = torch.from_numpy(constants).to(self.device, torch.float32).requires_grad_()
        keep = torch.from_numpy(mask).to(self.device, torch.float32).requires_grad_()
        with self._once("constants", self._plain_gates) as gates, self._computing():
            gates.replace(values)
            gates.set(keep)
            parts = [self._output.read(self._run(inputs), targets) for inputs, targets in block.batches]
            outputs = block.in_order(torch.cat(parts))
            gates.confirm()
            self._check_differentiable(outputs)
            found = outputs.detach().float().cpu().numpy()
            weights = torch.from_numpy(slopes(found)).to(outputs)
            by_constants, by_gates = torch.autograd.grad(outputs, [values, keep], weights)
        return found, by_constants.cpu().numpy(), by_gates.cpu().numpy()

    def _once(self, kind: GateKind, build: Callable[[], Gates]) -> Gates:
        """Return the gates of a kind, built on first use."""
        if kind not in self._gates:
            self._gates[kind] = build()
        return self._gates[kind]

    def _plain_gates(self) -> Gates:
        """Build gates in hooks without any shortcut."""
        return Gates(self.model, self.components, self._replacements, use_hooks=True)

    def _record(self, gates: Gates, piece: ExampleBlock) -> None:
        """Keep the activations of a piece's resample sources, if it has any."""
        if piece.sources:
            (sources,) = piece.sources
            with torch.no_grad():
                gates.record(lambda: self._run(sources))

    def _fill_each(
        self, out: Tensor, block: ExampleBlock, keeps: Tensor, gates: Gates, run: Callable[[Inputs], Any]
    ) -> None:
        """Run the block's batches under one mask after another."""
        for row, keep in enumerate(keeps):
            gates.set(keep)
            self._fill(out[row], block, run)
            if row == 0:
                gates.confirm()


def _without_derivative(outputs: Tensor) -> bool:
    """Return whether an operation in the graph of outputs is one of those whose gradients torch sets to zero."""
    waiting, seen = [outputs.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            if "NotImplemented" in node.name():
                return True
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
    return False
