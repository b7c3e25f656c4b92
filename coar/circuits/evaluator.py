"""Gated passes of a study's model on its examples: divergence from the unablated model, outputs, and gradients."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from coar.ablation.calibration import activation_moments
from coar.circuits.graph import EdgeGraph
from coar.errors import AblationError, ExamplesError, OutputError
from coar.examples import Examples, call_model, device_of
from coar.forward.copies import device_copy
from coar.forward.devices import full_float32
from coar.forward.execution_plan import Precision
from coar.forward.logit_positions import LogitPositions
from coar.gates.gates import Gates
from coar.inputs import Inputs
from coar.outputs.base import RelativeOutput, find_logits
from coar.study import Study

Loss = Literal["kl", "output"]
Rows = Sequence[int] | np.ndarray  # positions of examples
GRADIENT_COST = 3  # a forward and a backward pass, in forward passes
NO_CONSTANTS = (
    "activations of other examples replace what this ablation ablates, so it takes no constants; use "
    "Mean(calibration=...) or Optimal(...)"
)
STORED = 2**28  # bytes of the unablated model's log-probabilities that are kept instead of computed in every pass


@dataclass(frozen=True)
class Measured:
    """What gated passes give, example by example.

    Attributes:
        kl: (examples,) KL divergence of the gated from the unablated model's next token, in nats, averaged over the
            positions that the output reads: sum over tokens v of p(v) log(p(v) / q(v)), p of the unablated model.
        output: (examples,) outputs of the study.
        agreement: (examples,) share of these positions at which both models have the same most likely token.
    """

    kl: np.ndarray
    output: np.ndarray
    agreement: np.ndarray


@dataclass(frozen=True)
class Gradients:
    """Losses of some examples, and the gradients of their sum.

    Attributes:
        losses: (examples,) losses.
        by_keep: (components,) gradient by the mask, or (examples, components) where each example has its own.
        by_constants: (components.width,) gradient by the constants; zeros for ablations without constants.
    """

    losses: Tensor
    by_keep: Tensor
    by_constants: Tensor


class CircuitEvaluator:
    """Runs a study's model on its examples under masks of edges, and counts passes.

    Args:
        study: The study; its components are edges or nodes of a decoder, and its output reads next tokens.
        device: Where to compute.
        precision: `float32`, or `bf16` for automatic mixed precision.
        batch_size: Most examples per pass.

    Attributes:
        study: The study.
        graph: The graph of its edges.
        device: Where passes run.
        by_constants: Whether constants replace what is ablated; otherwise activations of other examples do.
        constants: (components.width,) constants of the ablation on the device; zeros where it has none.
        passes: Forward passes of one example so far; a forward and a backward pass count as 3.

    Raises:
        ComponentError: When the components are no edges.
        OutputError: When the output does not say at which positions it reads the next token, or compares with the
            unablated model itself.
    """

    def __init__(
        self, study: Study, *, device: str = "auto", precision: Precision = "float32", batch_size: int = 16
    ) -> None:
        if isinstance(study.output, RelativeOutput):
            raise OutputError(
                f"the output of the study is {type(study.output).__name__}, and the divergence from the unablated "
                f"model is measured in any case; give an output of the model alone, such as LogitDifference"
            )
        self.study, self.passes = study, 0
        self.graph = EdgeGraph(study.model, study.components)
        self._model = device_copy(study.model, device, study.examples)
        self.device = device_of(self._model)
        self._precision, self._batch_size = precision, batch_size
        self._positions = LogitPositions(self._model, study.components, study.output)
        self._sources = study.ablation.sources(study.examples)
        self.by_constants = self._sources is None
        with full_float32():
            constants = study.ablation.replacements(self._model, study.components, batch_size=batch_size)
        if constants.ndim == 2:
            raise AblationError("edges have no constants by position; use Mean(calibration=...) or Optimal(...)")
        self.constants = (constants if self.by_constants else torch.zeros(study.components.width)).to(self.device)
        self._gates = Gates(
            self._model, study.components, self.constants, use_hooks=True, resample=not self.by_constants
        )
        self._stored: dict[int, Tensor] = {}

    def on(self, examples: Examples) -> "CircuitEvaluator":
        """Return an evaluator of the same model and constants on other examples, with its own count of passes.

        Raises:
            ExamplesError: When the ablation finds no source for an example.
        """
        other = copy(self)
        other.study = replace(self.study, examples=examples)
        other._sources, other._stored, other.passes = self.study.ablation.sources(examples), {}, 0
        return other

    def __len__(self) -> int:
        return len(self.study.examples)

    @property
    def components(self) -> int:
        """Number of components."""
        return len(self.study.components)

    @cached_property
    def spread(self) -> Tensor:
        """(components.width,) standard deviations of what writers write for the examples, on the device."""
        self.passes += len(self)
        examples, table = self.study.examples, self.study.components
        return activation_moments(self._model, table, examples, batch_size=self._batch_size)[1].to(self.device)

    def everything(self) -> Tensor:
        """Return the (components,) mask that keeps all."""
        return torch.ones(self.components, device=self.device)

    def measure(self, keep: Tensor, *, constants: Tensor | None = None, rows: Rows | None = None) -> Measured:
        """Run examples under masks.

        Args:
            keep: (components,) mask, or (examples, components) with one for each; gates between 0 and 1 are allowed.
            constants: (components.width,) constants instead of the ablation's.
            rows: Positions of the examples, in which one may be several times; by default all.
        """
        found: list[list[np.ndarray]] = []
        with torch.no_grad(), self._computing(constants):
            for part, inputs, targets, plain in self._batches(rows):
                self._gates.set(keep if keep.ndim == 1 else keep[part])
                result = call_model(self._model, inputs)
                values = self.study.output.read(result, targets).float()
                divergence, agreement = _compare(result, plain, self._read(targets))
                found.append([x.cpu().numpy() for x in (divergence, values, agreement)])
                self.passes += len(targets)
            self._gates.confirm()
        return Measured(*(np.concatenate(values) for values in zip(*found, strict=True)))

    def gradients(
        self,
        keep: Tensor,
        *,
        loss: Loss = "kl",
        constants: Tensor | None = None,
        rows: Rows | None = None,
    ) -> Gradients:
        """Run examples forward and backward under masks.

        Args:
            keep: (components,) mask, or (examples, components) with one for each; gates between 0 and 1 are allowed.
            loss: `kl`, the divergence from the unablated model, or `output`, minus the study's output.
            constants: (components.width,) constants instead of the ablation's.
            rows: Positions of the examples, in which one may be several times; by default all.

        Raises:
            OutputError: When a loss is not finite.
        """
        losses, slopes = self._descend(keep, loss, constants, rows, masks=True)
        by_keep = [of_batch[0] for of_batch in slopes]
        if self.by_constants:
            by_constants = torch.stack([of_batch[1] for of_batch in slopes]).sum(0)
        else:
            by_constants = torch.zeros_like(self.constants)
        return Gradients(losses, torch.stack(by_keep).sum(0) if keep.ndim == 1 else torch.cat(by_keep), by_constants)

    def constant_gradients(
        self, keep: Tensor, *, loss: Loss = "kl", constants: Tensor | None = None, rows: Rows | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (examples,) losses and the (components.width,) gradient of their sum by the constants alone.

        Without gradients by the mask, only the writers and readers with a term in this mask are computed.

        Args:
            keep: As for `gradients`.
            loss: As for `gradients`.
            constants: As for `gradients`.
            rows: As for `gradients`.

        Raises:
            AblationError: When the ablation has no constants.
            OutputError: When a loss is not finite.
        """
        if not self.by_constants:
            raise AblationError(NO_CONSTANTS)
        losses, slopes = self._descend(keep, loss, constants, rows, masks=False)
        return losses, torch.stack([by_constants for (by_constants,) in slopes]).sum(0)

    def _descend(
        self, keep: Tensor, loss: Loss, constants: Tensor | None, rows: Rows | None, *, masks: bool
    ) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """Return (examples,) losses and, by batch, gradients by its mask, if wanted, and by constants, if any."""
        leaves: list[Tensor] = []
        if self.by_constants:
            leaves = [(self.constants if constants is None else constants).detach().clone().requires_grad_()]
        losses, slopes = [], []
        with self._computing(leaves[0] if leaves else constants):
            for part, inputs, targets, plain in self._batches(rows):
                own = (keep if keep.ndim == 1 else keep[part]).detach().float().clone().requires_grad_(masks)
                if leaves:
                    self._gates.replace(leaves[0])  # again, since each backward pass frees what this computes
                self._gates.set(own)
                result = call_model(self._model, inputs)
                if loss == "kl":
                    here = _compare(result, plain, self._read(targets))[0]
                else:
                    here = -self.study.output.read(result, targets).float()
                wanted = [own, *leaves] if masks else leaves
                if here.requires_grad:
                    found = torch.autograd.grad(here.sum(), wanted, allow_unused=True, materialize_grads=True)
                else:  # nothing is ablated, and no gradient by the mask is wanted
                    found = tuple(map(torch.zeros_like, wanted))
                slopes.append(found)
                losses.append(here.detach())
                self.passes += GRADIENT_COST * len(targets)
            self._gates.confirm()
        total = torch.cat(losses)
        if not bool(total.isfinite().all()):
            raise OutputError(
                f"the loss {loss!r} of an example is not finite under gates; use float32, or leave the example out"
            )
        return total, slopes

    @contextmanager
    def _computing(self, constants: Tensor | None) -> Iterator[None]:
        """Enter the gates and the precision; set constants where there are any."""
        low = torch.autocast(self.device.type, torch.bfloat16, enabled=self._precision == "bf16")
        with self._gates, full_float32(), low:
            if self.by_constants:
                self._gates.replace(self.constants if constants is None else constants.to(self.device))
            elif constants is not None:
                raise AblationError(NO_CONSTANTS)
            yield

    def _batches(self, rows: Rows | None) -> Iterator[tuple[slice, Inputs, Tensor, Tensor]]:
        """Yield the place, inputs, targets and plain log-probabilities of examples, with their sources recorded."""
        chosen = np.arange(len(self)) if rows is None else np.asarray(rows)
        for at in range(0, len(chosen), self._batch_size):
            part = chosen[at : at + self._batch_size]
            inputs, targets = self._load(part)
            if self._sources is not None:
                self._record(self._sources[part])
            yield slice(at, at + len(part)), inputs, targets, self._plain(part, inputs, targets)

    def _load(self, rows: np.ndarray) -> tuple[Inputs, Tensor]:
        inputs, targets = self.study.examples.subset(rows).block(0, len(rows))
        moved: Inputs
        if isinstance(inputs, dict):
            moved = {name: value.to(self.device) for name, value in inputs.items()}
        else:
            moved = inputs.to(self.device)
        return self._positions.selected((moved, targets.to(self.device)), lambda given: call_model(self._model, given))

    def _record(self, rows: np.ndarray) -> None:
        """Record the activations of resample sources for the next pass."""
        inputs = self.study.examples.subset(rows).block(0, len(rows))[0]
        self._gates.record(lambda: call_model(self._model, inputs))
        self.passes += len(rows)

    def _plain(self, rows: np.ndarray, inputs: Inputs, targets: Tensor) -> Tensor:
        """Return (positions, vocabulary) log-probabilities of the unablated model at the positions that are read."""
        missing = [int(row) for row in rows if int(row) not in self._stored]
        if not missing:
            return torch.cat([self._stored[int(row)] for row in rows]).to(self.device)
        with torch.no_grad():
            self._gates.set(self.everything())
            read = self._read(targets)
            logits = find_logits(call_model(self._model, inputs))[read].float().log_softmax(-1)
        self.passes += len(rows)
        if logits.nbytes * len(self) <= STORED * len(rows):
            parts = torch.split(logits.cpu(), read.sum(1).tolist())
            self._stored.update({int(row): part for row, part in zip(rows, parts, strict=True)})
        return logits

    def _read(self, targets: Tensor) -> Tensor:
        read = self.study.output.positions_read(targets)
        if read is None:
            raise OutputError(
                f"{type(self.study.output).__name__} does not say at which positions it reads next tokens, where a "
                f"circuit is compared with the model; use an output of next tokens, such as TokenLogProbability"
            )
        if not bool(read.any(1).all()):
            raise ExamplesError("an example has no position at which the output reads the next token; leave it out")
        return read


def _compare(result: object, plain: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
    """Return (examples,) KL divergences in nats and shares of equal most likely tokens, averaged over positions read.

    Args:
        result: The gated model's result.
        plain: (positions, vocabulary) log-probabilities of the unablated model, those of all examples in one sequence.
        read: (examples, length) booleans, the positions read.
    """
    gated = find_logits(result)[read].float().log_softmax(-1)
    rows, counts = read.nonzero(as_tuple=True)[0], read.sum(1)
    divergence = (plain.exp() * (plain - gated)).sum(-1)
    same = (gated.argmax(-1) == plain.argmax(-1)).float()
    sums = [value.new_zeros(len(counts)).index_add(0, rows, value) / counts for value in (divergence, same)]
    return sums[0], sums[1]
