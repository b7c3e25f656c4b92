"""Outputs of many masks on a block of examples: a reference runner without shortcuts, and a fast runner with a plan."""

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from coar.components.table import Components
from coar.equivalence import Fallback, fall_back
from coar.errors import AblationError, SettingsError
from coar.examples import device_of, devices_of, rows_of
from coar.forward.batches import ExampleBlock
from coar.forward.execution_plan import ExecutionPlan
from coar.forward.length_bucketing import LengthBucketing
from coar.forward.logit_positions import LogitPositions
from coar.forward.model_runner import GatedRunner, Sources
from coar.forward.prefix_cache import PrefixCache
from coar.gates.gates import Gates
from coar.inputs import Inputs
from coar.outputs.base import Output


class ReferenceRunner(GatedRunner):
    """Runs one mask at a time through plain hooks, in float32 and on unchanged inputs: the reference for fast runners.

    It takes no shortcut: no channels-last inputs, length bucketing, logit positions, prefix cache, folded batch norm,
    shared forward pass, lower precision or compiled model. Its model is a `device_copy` as a fast runner's is, so what
    that changes, the memory format and the kernels of activations, is not compared. See `GatedRunner` for the
    arguments.
    """

    def outputs(self, block: ExampleBlock, masks: np.ndarray) -> np.ndarray:
        """Return (masks, examples) float32 outputs of the block under (masks, components) masks.

        Masks are boolean, or gates between 0, ablated, and 1, kept.
        """
        keeps = torch.from_numpy(masks).to(self.device)
        out = torch.empty(len(masks), block.size, device=self.device)
        with self._hook_gates(block) as gates, torch.inference_mode(), self._computing():
            for piece, part in block.pieces():
                self._record(gates, piece)
                self._fill_each(out[:, part], piece, keeps, gates, self._run)
        return out.cpu().numpy()

    def _hook_gates(self, block: ExampleBlock) -> Gates:
        if block.sources:
            parts = self.model, self.components, self._replacements
            return self._once("sources", lambda: Gates(*parts, resample=True))
        return self._once("hooks", self._plain_gates)

    def _laid_out(self, inputs: Tensor) -> Tensor:
        return inputs


class FastRunner(GatedRunner):
    """Runs masks by the shortcuts that its execution plan allows and the model admits.

    Args:
        model: A copy made by `device_copy`.
        components: The components of a mask.
        replacements: (components.width,) constants of the ablation, one per channel; or (positions, components.width).
        output: The scalar read per example.
        plan: How to run; by default one mask per forward pass in float32, with all shortcuts.
        batch_norms: Path of the batch norm that alone follows a site; it is folded into the gated weights.
        sources: Maps examples to the position of each one's resample source, see `Ablation.sources`;
            hooks then give an ablated component its value for the source.

    Attributes:
        plan: The plan, with the device's batch size if none was given.
    """

    def __init__(
        self,
        model: nn.Module,
        components: Components,
        replacements: Tensor,
        output: Output,
        plan: ExecutionPlan | None = None,
        *,
        batch_norms: Mapping[str, str] | None = None,
        sources: Sources | None = None,
    ) -> None:
        self.plan = plan = (plan or ExecutionPlan()).on(device_of(model))
        super().__init__(model, components, replacements, output, sources=sources, batch_size=plan.batch_size)
        self.precision = plan.precision
        self._batch_norms = batch_norms or {}
        self._full_weights: list[Fallback] = []  # gates with some weights not in bfloat16
        self._compiled: tuple[nn.Module | Callable[..., Any], list[torch.Size]] | None = None  # and its inputs' shapes
        self._prefix_cache = PrefixCache(model, components, self._run, output.read)
        self._logit_positions = LogitPositions(model, components, output)
        self._length_bucketing = LengthBucketing(model, components, output, front=replacements.ndim == 1)

    @property
    def fallbacks(self) -> list[Fallback]:
        """The shortcuts of the plan that were tried and are not used, with reasons."""
        paths = [self._length_bucketing.path, self._logit_positions.path, self._prefix_cache.path]
        return [*self._full_weights, *(path.fallback for path in paths if path.fallback)]

    def with_plan(self, plan: ExecutionPlan) -> Self:
        """Return a runner with another plan for the same weights, which shares gates and checks with this one.

        Raises:
            SettingsError: When `precision` or `low_weights` differ, since gates hold weights by these.
        """
        if (plan.precision, plan.low_weights) != (self.plan.precision, self.plan.low_weights):
            raise SettingsError(
                f"gates were built for {self.plan}, and {plan} holds weights in another precision; make another runner"
            )
        other = copy(self)
        other.plan = plan.on(self.device)
        other.batch_size = other.plan.batch_size or self.batch_size
        other._compiled = None
        return other

    def _arranged(self, block: ExampleBlock) -> ExampleBlock:
        """Return a block without padding that no text needs and logits that nothing reads."""
        if self.plan.length_bucketing and not block.sources:
            block = self._length_bucketing.bucketed(block, self.batch_size, self._run)
        if not self.plan.logit_positions:
            return block
        return replace(block, batches=[self._logit_positions.selected(batch, self._run) for batch in block.batches])

    def outputs(self, block: ExampleBlock, masks: np.ndarray) -> np.ndarray:
        """Return (masks, examples) float32 outputs of the block under (masks, components) masks.

        Masks are boolean, or gates between 0, ablated, and 1, kept.

        Raises:
            AblationError: When the plan compiles the model, but resample sources or edges need hooks, or the model is
                on several devices.
        """
        keeps = torch.from_numpy(masks).to(self.device)
        out = torch.empty(len(masks), block.size, device=self.device)
        group = min(self.plan.masks_per_forward, self.batch_size // block.size)
        grouped = group > 1 and len(block.batches) == 1
        cached = self.plan.prefix_cache and not (self.plan.compiled or block.sources or self.components.of_edges)
        if self.plan.compiled and self._compiled is None:
            self._compile(block)
        gated = self._hook_gates(block) if grouped or block.sources else self._weight_gates(block)
        with gated as gates, torch.inference_mode(), self._computing():
            for piece, part in block.pieces():
                self._record(gates, piece)
                if grouped:
                    self._fill_grouped(out[:, part], piece, keeps, gates, group)
                elif not (cached and self._prefix_cache.fill(out[:, part], piece.batches, masks, gates)):
                    self._fill_each(out[:, part], piece, keeps, gates, self._run_compiled)
        return block.in_order(out).cpu().numpy()

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

    def _compile(self, block: ExampleBlock) -> None:
        """Compile the model for batches as large as the block's first.

        Masks are written into tensors that the compiled model reads, so it is compiled once for all masks.
        """
        if block.sources or self.components.of_edges:
            raise AblationError(
                "resampling and edges need gates in hooks, and a compiled model needs gates in the weights"
            )
        if len(devices_of(self.model)) > 1:
            raise AblationError("the model is split over several devices, and a compiled model is on one")
        for buffer in self._weight_gates(block).buffers():
            torch._dynamo.mark_static_address(buffer)  # otherwise CUDA graphs copy the weights on every forward pass
        mode = "reduce-overhead" if self.device.type == "cuda" else None  # that is, CUDA graphs
        self._compiled = torch.compile(self.model, dynamic=False, mode=mode), _shapes(block.batches[0][0])

    def _run_compiled(self, inputs: Inputs) -> Any:
        if self._compiled is None or _shapes(inputs) != self._compiled[1]:
            return self._run(inputs)
        if self.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        model = self._compiled[0]
        return model(**inputs) if isinstance(inputs, dict) else model(inputs)

    def _weight_gates(self, block: ExampleBlock) -> Gates:
        """Return gates in the weights, and in hooks for components whose weights cannot hold one."""
        return self._once("weights", lambda: self._lowest(block, use_hooks=False))

    def _hook_gates(self, block: ExampleBlock) -> Gates:
        if block.sources:
            return self._once("sources", partial(self._built, resample=True))
        return self._once("hooks", lambda: self._lowest(block, use_hooks=True))

    def _built(self, **how: Any) -> Gates:
        return Gates(self.model, self.components, self._replacements, batch_norms=self._batch_norms, **how)

    def _lowest(self, block: ExampleBlock, *, use_hooks: bool) -> Gates:
        """Build gates with as many weights in bfloat16 as the plan allows without any change of an output.

        Automatic mixed precision then converts no weight on every forward pass. A layer outside of it may not be able
        to read such a weight, or may compute another output.
        """
        gates = self._built(use_hooks=use_hooks)
        if self.precision != "bf16" or not self.plan.low_weights:
            return gates
        for weights, every in (("all weights", True), ("gated weights", False)):
            low = self._built(use_hooks=use_hooks, weight_dtype=torch.bfloat16, cast_ungated=every)
            reason = self._why_not(gates, low, block)
            if not reason:
                return low
            place = "hooks" if use_hooks else "weights"
            self._full_weights.append(fall_back(f"holding {weights} in bfloat16 for gates in {place}", reason))
        return gates

    def _why_not(self, plain: Gates, low: Gates, block: ExampleBlock) -> str:
        """Return in words how bfloat16 weights change outputs of two examples by any bit; empty if they do not."""
        inputs, targets = rows_of(block.batches[0][0], slice(2)), block.batches[0][1][:2]
        found: list[Tensor] = []
        try:
            for gated in (plain, low):
                with gated, torch.inference_mode(), self._computing():
                    gated.set(torch.ones(len(self.components), device=self.device))
                    found.append(self._output.read(self._run(inputs), targets))
        except RuntimeError as error:
            if len(found) == 0:
                raise
            return str(error)
        return "" if torch.equal(*found) else "outputs differ"


def _repeated(inputs: Inputs, times: int) -> Inputs:
    if isinstance(inputs, dict):
        return {name: torch.cat([value] * times) for name, value in inputs.items()}
    return torch.cat([inputs] * times)


def _shapes(inputs: Inputs) -> list[torch.Size]:
    return [value.shape for value in inputs.values()] if isinstance(inputs, dict) else [inputs.shape]
