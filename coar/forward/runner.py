"""Runs units of work on one device: many masks on a block of examples that stays there."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from coar.components.table import Components
from coar.errors import AblationError
from coar.examples import Examples, rows_of
from coar.forward.batches import ExampleBlock
from coar.forward.devices import BATCH_SIZE, full_float32
from coar.forward.length_bucketing import Trimming
from coar.forward.logit_positions import Narrowing
from coar.forward.prefix_cache import PrefixCache
from coar.gates.gates import Gates
from coar.inputs import Inputs
from coar.outputs.base import Output

log = logging.getLogger(__name__)

Precision = Literal["float32", "bf16"]
Donors = Callable[[int], np.ndarray | None]  # see Ablation.donors
CHOICES = ("float32", "bf16", "auto")


class ModelRunner:
    """Holds one copy of the model on one device and reads outputs off it.

    Args:
        model: A copy made by `device_copy`.
        output: The scalar read per example.
        precision: `float32`, or `bf16` for automatic mixed precision.
        batch_size: Most examples per forward pass; by default 128 on a CPU, 512 on CUDA, 256 on MPS.
    """

    _donors: Donors | None = None

    def __init__(
        self, model: nn.Module, output: Output, *, precision: Precision = "float32", batch_size: int | None = None
    ) -> None:
        self._model = model
        self._output = output
        self.precision = precision
        self.device = next(model.parameters()).device
        self.batch_size = batch_size or BATCH_SIZE[self.device.type]

    def load(self, examples: Examples, start: int, stop: int) -> ExampleBlock:
        """Read examples `start` up to `stop`, and their donors if there are any, and move them to the device."""
        inputs, targets = examples.block(start, stop)
        parts = [slice(at, at + self.batch_size) for at in range(0, len(targets), self.batch_size)]
        batches = [(self._place(rows_of(inputs, part)), self._sent(targets[part])) for part in parts]
        chosen = self._donors(len(examples)) if self._donors else None
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
        return self._model(**inputs) if isinstance(inputs, dict) else self._model(inputs)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Set precision for what runs inside."""
        with full_float32(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            yield

    def _place(self, inputs: Inputs) -> Inputs:
        if isinstance(inputs, dict):
            return {name: self._sent(value) for name, value in inputs.items()}
        if inputs.ndim == 4:
            return self._sent(inputs.to(memory_format=torch.channels_last))
        return self._sent(inputs)

    def _sent(self, value: Tensor) -> Tensor:
        """Copy to the device; to CUDA from pinned memory, so that computing goes on meanwhile."""
        if self.device.type == "cuda" and value.device.type == "cpu":
            return value.pin_memory().to(self.device, non_blocking=True)
        return value.to(self.device)


class FastRunner(ModelRunner):
    """Turns masks into outputs.

    Args:
        model: A copy made by `device_copy`.
        components: The components a mask speaks of.
        replacements: (components.width,) constants of the ablation, one per channel.
        output: The scalar read per example.
        batch_norms: Path of the batch norm that alone follows a site; it is folded into the gated weights.
        through_outputs: Gate outputs by hooks, the plain way, instead of weights.
        donors: From how many examples there are to the position of each one's donor, see `Ablation.sources`; what is
            ablated then becomes what the donor has there, in hooks too.
        precision: `float32`, or `bf16` for automatic mixed precision.
        batch_size: Most examples per forward pass; by default 128 on a CPU, 512 on CUDA, 256 on MPS.

    Attributes:
        masks_per_forward: How many masks at most share a forward pass, each with the block's examples to itself, gated
            by hooks, where the batch size leaves room for two; 1 gates the weights, or what `use_hooks` says.
    """

    def __init__(
        self,
        model: nn.Module,
        components: Components,
        replacements: Tensor,
        output: Output,
        *,
        batch_norms: Mapping[str, str] | None = None,
        use_hooks: bool = False,
        sources: Donors | None = None,
        precision: Precision = "float32",
        batch_size: int | None = None,
    ) -> None:
        super().__init__(model, output, precision=precision, batch_size=batch_size)
        self._donors = sources
        self._components = components
        self._replacements = replacements
        self._batch_norms = batch_norms or {}
        self._through_outputs = use_hooks
        self._gates: dict[bool, Gates] = {}  # by weights and by hooks, made when first needed
        self._compiled: tuple[nn.Module | Callable[..., Any], list[torch.Size]] | None = None  # and for which inputs
        self._shared = PrefixCache(model, components, self._run, output.read)
        self._narrowing = Narrowing(model, components, output)
        self._trimming = Trimming(model, components, output, front=replacements.ndim == 1)  # else one for each position
        self.masks_per_forward = 1

    def load(self, examples: Examples, start: int, stop: int) -> ExampleBlock:
        """Do what `ModelRunner.load` does, and leave out padding that no text needs, and logits that nobody reads."""
        block = super().load(examples, start, stop)
        if self._through_outputs:  # the plain way, which the others are checked against
            return block
        if not block.sources:
            block = self._trimming.shortened(block, self.batch_size, self._run)
        return replace(block, batches=[self._narrowing.narrowed(batch, self._run) for batch in block.batches])

    def outputs(self, block: ExampleBlock, masks: np.ndarray) -> np.ndarray:
        """Return (masks, examples) float32 outputs of the block under (masks, components) masks.

        Masks are boolean, or gates between 0, ablated, and 1, kept.
        """
        keeps = torch.from_numpy(masks).to(self.device)
        out = torch.empty(len(masks), block.size, device=self.device)
        group = min(self.masks_per_forward, self.batch_size // block.size)
        grouped = group > 1 and len(block.batches) == 1
        shares = not (self._through_outputs or block.sources or self._compiled)  # hooks are the plain way
        gated = self._gates_for(block, hooks=grouped or self._through_outputs)
        with gated as gates, torch.inference_mode(), self._computing():
            for piece, part in block.pieces():
                self._record(gates, piece)
                if grouped:
                    self._fill_grouped(out[:, part], piece, keeps, gates, group)
                elif not (shares and self._shared.fill(out[:, part], piece.batches, masks, gates)):
                    self._fill_each(out[:, part], piece, keeps, gates)
        return block.in_order(out).cpu().numpy()

    def _record(self, gates: Gates, piece: ExampleBlock) -> None:
        """Hold the activations of a piece's donors, where it has any."""
        if piece.sources:
            (sources,) = piece.sources
            with torch.no_grad():
                gates.record(lambda: self._run(sources))

    def _fill_each(self, out: Tensor, block: ExampleBlock, keeps: Tensor, gates: Gates) -> None:
        """Run the block's batches under one mask after another."""
        for row, keep in enumerate(keeps):
            gates.set(keep)
            self._fill(out[row], block, self._run_compiled)
            if row == 0:
                gates.confirm()

    def _fill_grouped(self, out: Tensor, block: ExampleBlock, keeps: Tensor, gates: Gates, group: int) -> None:
        """Run the block's one batch for `group` masks at once: a mask's examples lie side by side."""
        ((inputs, targets),) = block.batches
        many, labels = _repeated(inputs, group), torch.cat([targets] * group)
        for start in range(0, len(keeps), group):
            few = keeps[start : start + group]  # (group, components), fewer at the end
            part = slice(len(few) * block.size)
            gates.set(few)
            values = self._output.read(self._run(rows_of(many, part)), labels[part])
            out[start : start + len(few)] = values.view(len(few), block.size)
            if start == 0:
                gates.confirm()

    def compile(self, block: ExampleBlock) -> None:
        """From now on run batches as large as the block's first through a compiled model, if one mask gates weights.

        Masks are written into the tensors that the compiled model reads, so it is compiled once for all of them.

        Raises:
            AblationError: When donors replace what is ablated, which is done in hooks.
        """
        if block.sources:
            raise AblationError("resampling gates by hooks, and a compiled model is for gates in the weights")
        for buffer in self._gates_for(block, hooks=False).buffers():
            torch._dynamo.mark_static_address(buffer)  # or CUDA graphs would copy the weights on every forward
        mode = "reduce-overhead" if self.device.type == "cuda" else None  # that is, CUDA graphs
        self._compiled = torch.compile(self._model, dynamic=False, mode=mode), _shapes(block.batches[0][0])

    def stop_compiling(self) -> None:
        """Let all batches run through the model as it is."""
        self._compiled = None

    def _run_compiled(self, inputs: Inputs) -> Any:
        if self._compiled is None or _shapes(inputs) != self._compiled[1]:
            return self._run(inputs)
        if self.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        model = self._compiled[0]
        return model(**inputs) if isinstance(inputs, dict) else model(inputs)

    def _gates_for(self, block: ExampleBlock, *, hooks: bool) -> Gates:
        """Return the gates in hooks, or in weights but for donors; weights are held in bf16 where nothing changes.

        Automatic mixed precision then has no weight to convert on every forward. A layer that is run without it could
        not read such a weight, or would read another one.
        """
        hooks = hooks or bool(block.sources)
        if hooks not in self._gates:
            how: dict[str, Any] = {"resample": True} if block.sources else {"use_hooks": hooks}
            parts = (self._model, self._components, self._replacements)
            make = partial(Gates, *parts, batch_norms=self._batch_norms, **how)
            gates = make()
            if self.precision == "bf16" and not block.sources:
                lower = (make(weight_dtype=torch.bfloat16, cast_ungated=every) for every in (True, False))
                gates = next((low for low in lower if self._same(gates, low, block)), gates)
            self._gates[hooks] = gates
        return self._gates[hooks]

    def _same(self, plain: Gates, low: Gates, block: ExampleBlock) -> bool:
        """Say whether gates with bfloat16 weights give the outputs of those with float32 weights, on two examples."""
        inputs, targets = rows_of(block.batches[0][0], slice(2)), block.batches[0][1][:2]
        found: list[Tensor] = []
        try:
            for gated in (plain, low):
                with gated, torch.inference_mode(), self._computing():
                    gated.set(torch.ones(len(self._components), device=self.device))
                    found.append(self._output.read(self._run(inputs), targets))
        except RuntimeError as error:
            if len(found) == 0:
                raise
            log.info("weights stay in float32: %s", error)
            return False
        return torch.equal(*found)

    def full_model_gradients(self, block: ExampleBlock) -> np.ndarray:
        """Return (examples, components) float32 gradients of the output by each gate of the unablated model."""
        everything = np.ones((1, 1, len(self._components)), dtype=bool)
        return self.mask_gradients(block, everything, np.zeros(block.size, dtype=np.int64))[0]

    def mask_gradients(
        self, block: ExampleBlock, masks: np.ndarray, mask_groups: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Run each example forward and backward under masks of its own.

        Args:
            block: The examples.
            masks: (gradients, groups, components) boolean masks, or gates between 0, ablated, and 1, kept.
            mask_groups: (examples,) which slot's masks each example takes.

        Returns:
            (examples, components) float32 mean gradients of the output by each gate over the mask gradients that keep
            the component, the same over those that ablate it (NaN where there is none), and (mask gradients, examples)
            outputs.

        Raises:
            AblationError: When a component has no gate that a gradient could pass, or the output has no gradient.
        """
        mask_gradients, n = len(masks), block.size
        keeps = torch.from_numpy(masks).to(self.device)
        which = block.in_batches(torch.from_numpy(mask_groups).to(self.device))
        sums = torch.zeros(2, n, len(self._components), device=self.device)  # all mask gradients, and those that keep
        out = torch.empty(mask_gradients, n, device=self.device)
        with self._gates_for(block, hooks=True) as gates, self._computing():
            for piece, span in block.pieces():
                self._record(gates, piece)
                for number, of_slots in enumerate(keeps):
                    at = span.start
                    for inputs, targets in piece.batches:
                        part = slice(at, at + len(targets))
                        keep = of_slots[which[part]].float().requires_grad_()
                        gates.set(keep)
                        values = self._output.read(self._run(inputs), targets)
                        gates.confirm()
                        gradient = _gradient(values, keep)
                        sums[0, part] += gradient
                        sums[1, part] += gradient * keep.detach()
                        out[number, part] = values.detach()
                        at = part.stop
        kept = keeps.sum(0)[which].float()  # (examples, components), how many mask gradients keep
        means = torch.stack([sums[1] / kept, (sums[0] - sums[1]) / (mask_gradients - kept)])
        means = block.in_order(means, axis=1)
        return means[0].cpu().numpy(), means[1].cpu().numpy(), block.in_order(out).cpu().numpy()

    def weighted_gradients(
        self, block: ExampleBlock, mask: np.ndarray, constants: np.ndarray, slopes: Callable[[np.ndarray], np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Run the block forward and backward under one mask, with constants in the place of the ablation's.

        Args:
            block: The examples.
            mask: (components,) boolean mask, or gates between 0, ablated, and 1, kept.
            constants: (components.width,) constants, one per channel.
            slopes: Tells from (examples,) outputs by how much each shall count.

        Returns:
            (examples,) float32 outputs, and the gradients of their weighted sum: (components.width,) by the constants
            and (components,) by the gates.
        """
        values = torch.from_numpy(constants).to(self.device, torch.float32).requires_grad_()
        keep = torch.from_numpy(mask).to(self.device, torch.float32).requires_grad_()
        gates = Gates(self._model, self._components, self._replacements, use_hooks=True)  # plain hooks
        with gates, self._computing():
            gates.replace(values)
            gates.set(keep)
            parts = [self._output.read(self._run(inputs), targets) for inputs, targets in block.batches]
            outputs = block.in_order(torch.cat(parts))
            gates.confirm()
            found = outputs.detach().float().cpu().numpy()
            weights = torch.from_numpy(slopes(found)).to(outputs)
            by_constants, by_gates = torch.autograd.grad(outputs, [values, keep], weights)
        return found, by_constants.cpu().numpy(), by_gates.cpu().numpy()


def _gradient(values: Tensor, keep: Tensor) -> Tensor:
    """Return the (examples, components) gradient of each example's output by its own gates."""
    if not values.requires_grad:
        raise AblationError(
            "the output has no gradient by the gates: something between them detaches it, such as no_grad, argmax or a "
            "conversion to numpy; use an output that can be differentiated, or collect masks instead of mask gradients"
        )
    return torch.autograd.grad(values.sum(), keep)[0].float()


def _repeated(inputs: Inputs, times: int) -> Inputs:
    if isinstance(inputs, dict):
        return {name: torch.cat([value] * times) for name, value in inputs.items()}
    return torch.cat([inputs] * times)


def _shapes(inputs: Inputs) -> list[torch.Size]:
    return [value.shape for value in inputs.values()] if isinstance(inputs, dict) else [inputs.shape]
