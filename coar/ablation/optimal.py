"""Trained constants: those with the smallest expected loss when they replace random components."""

import logging
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from coar.ablation.base import Calibrated
from coar.ablation.calibration import activation_moments
from coar.ablation.zero import ZeroWeight
from coar.components.table import Components
from coar.errors import AblationError, ExamplesError
from coar.examples import call_model, device_of
from coar.gates.gates import Gates
from coar.outputs.base import Output, RelativeOutput
from coar.outputs.classification import CrossEntropy
from coar.sampling import BernoulliSampler, Split

log = logging.getLogger(__name__)


class Optimal(Calibrated):
    """Replace a component by constants, one per channel, trained to make the expected loss under random masks small.

    r = argmin_r E_{x,C'}[L(M_{C'}(x; r), y)], where M_{C'}(x; r) is the model with the components in C' replaced by
    their constants r. Li and Janson (2024, "Optimal ablation for interpretability") define optimal ablation of one
    component, or one circuit, this way; here all components share one problem, and C' is drawn anew for every example,
    with each component in it with probability `ablated_fraction`.

    Adam starts from the means and takes steps in units of each channel's standard deviation. A part of the calibration
    examples is held out. Training stops when their loss has not improved for `patience` steps, and the constants with
    the smallest held-out loss are returned. Means, zeros and biases are among the candidates, so the result is no worse
    than these on the held-out examples.

    Attributes:
        loss: L, an output that is smaller where the model is better, with gradients, such as `KLDivergence`.
        ablated_fraction: Expected share of ablated components in a mask, ideally that of the study.
        steps: Largest number of steps.
        examples_per_step: Number of examples per step, in one forward and backward pass.
        learning_rate: Learning rate of Adam, in standard deviations of a channel.
        held_out: Share of the calibration examples that is held out.
        patience: Steps without improvement after which training stops; held-out loss is measured every tenth step.
        seed: Seed of the masks, of the choice of held-out examples and of the order, 0 to 2**63 - 1.
    """

    label: ClassVar[str] = "optimal"

    loss: Output = CrossEntropy()
    ablated_fraction: float = Field(default=0.10, gt=0, lt=1)
    steps: int = Field(default=200, ge=1)
    examples_per_step: int = Field(default=64, ge=1)
    learning_rate: float = Field(default=0.05, gt=0)
    held_out: float = Field(default=0.25, gt=0, lt=1)
    patience: int = Field(default=50, ge=10)
    seed: int = Field(default=0, ge=0, lt=2**63)

    def replacements(self, model: nn.Module, components: Components, *, batch_size: int) -> Tensor:  # noqa: ARG002
        """Return each channel's constant, from passes of `examples_per_step` examples for any batch size.

        The batch size may change the last bits of a gradient, and training would amplify the change.

        Raises:
            AblationError: When a component has no activations, or the loss has no gradient.
            ExamplesError: When there are too few calibration examples to hold some of them out.
        """
        size = self.examples_per_step
        means, deviations = activation_moments(model, components, self.calibration, batch_size=size)
        starts = [means, torch.zeros_like(means)]
        if not components.of_edges and all(row.side != "module" for row in components):  # which have no bias
            starts.append(ZeroWeight().replacements(model, components, batch_size=size))
        training = _Training(self, model, components)
        with training.gates:
            losses = [training.held_out_loss(constants) for constants in starts]
            smallest = min(filter(math.isfinite, losses), default=math.nan)
            if math.isnan(smallest):
                raise AblationError(
                    f"the held-out loss is not finite with means, zeros and biases as constants ({losses}); use "
                    f"float32, leave such examples out, or use Mean"
                )
            constants, best, step = starts[losses.index(smallest)], 0, 0
            for step, trained in training.steps(means, deviations):
                loss = training.held_out_loss(trained)
                if loss < smallest:
                    smallest, constants, best = loss, trained, step
                if step - best >= self.patience:
                    break
        log.info("held-out loss %.4g after %d steps; with means, zeros and biases %s", smallest, step, losses)
        return constants

    @property
    def needs_gradients(self) -> bool:
        """Whether the constants are trained by gradients: they are."""
        return True

    def settings(self) -> dict[str, Any]:
        """Return the name, the calibration examples' fingerprint and the other settings."""
        return super().settings() | {"loss": self.loss.settings()}


MEASURED_EVERY = 10  # steps between measurements of held-out loss
HELD_OUT_MASKS = 4  # masks per held-out example


class _Training:
    """The loss of one model under random masks as a function of the constants, and Adam on it."""

    def __init__(self, ablation: Optimal, model: nn.Module, components: Components) -> None:
        self._ablation, self._model, self._count = ablation, model, len(components)
        self._device = device_of(model)
        self._sampler = BernoulliSampler(ablated_fraction=ablation.ablated_fraction, seed=ablation.seed)
        n = len(ablation.calibration)
        held = round(n * ablation.held_out)
        if not 0 < held < n:
            raise ExamplesError(
                f"{n} calibration examples cannot be cut into {held} held out and {n - held} to train on; give "
                f"more, or change held_out"
            )
        self._generator = torch.Generator().manual_seed(ablation.seed)
        order = torch.randperm(n, generator=self._generator)
        self._held, self._trained_on = order[:held], order[held:]
        self.gates = Gates(model, components, torch.zeros(components.width), use_hooks=True)

    def held_out_loss(self, constants: Tensor) -> float:
        """Return the mean loss of the held-out examples, each under the same masks at every call."""
        rows, total = self._held.repeat(HELD_OUT_MASKS), 0.0
        with torch.no_grad():
            for at in range(0, len(rows), self._ablation.examples_per_step):
                part = rows[at : at + self._ablation.examples_per_step]
                total += float(self._losses(constants.to(self._device), part, "validation", at).double().sum())
        return total / len(rows)

    def steps(self, means: Tensor, deviations: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Train from the means, and yield the number of steps and the constants after every `MEASURED_EVERY` steps."""
        means, deviations = means.to(self._device), deviations.to(self._device)
        moved = torch.zeros_like(means, requires_grad=True)  # in standard deviations
        adam = torch.optim.Adam([moved], lr=self._ablation.learning_rate)
        size, steps, order = self._ablation.examples_per_step, self._ablation.steps, self._trained_on
        for step in range(1, steps + 1):
            while len(order) < size:
                again = torch.randperm(len(self._trained_on), generator=self._generator)
                order = torch.cat([order, self._trained_on[again]])
            rows, order = order[:size], order[size:]
            losses = self._losses(means + deviations * moved, rows, "train", (step - 1) * size)
            moved.grad = _gradient(losses.mean(), moved)
            adam.step()
            if step % MEASURED_EVERY == 0 or step == steps:
                yield step, (means + deviations * moved).detach().cpu()

    def _losses(self, constants: Tensor, rows: Tensor, split: Split, first: int) -> Tensor:
        """Return (rows,) losses of calibration examples, example i under mask `first` + i of a split."""
        examples = self._ablation.calibration.subset(rows.numpy())
        inputs, targets = examples.block(0, len(examples))
        masks = self._sampler.masks(split, range(first, first + len(rows)), self._count)
        targets = targets.to(self._device)
        self.gates.replace(constants)
        if isinstance(self._ablation.loss, RelativeOutput):
            self.gates.set(torch.ones(self._count, device=self._device))  # the unablated model
            with torch.no_grad():
                targets = self._ablation.loss.reference(call_model(self._model, inputs), targets)
        self.gates.set(torch.from_numpy(masks).to(self._device))
        losses = self._ablation.loss.read(call_model(self._model, inputs), targets)
        self.gates.confirm()
        return losses.float()


def _gradient(loss: Tensor, moved: Tensor) -> Tensor:
    """Return the gradient of a loss by the constants; raise `AblationError` when there is none or it is not finite."""
    if not loss.requires_grad:
        raise AblationError(
            "the loss has no gradient by the constants: something between them detaches it, such as no_grad, argmax or "
            "a conversion to numpy; give Optimal(loss=...) an output that can be differentiated, or use Mean"
        )
    gradient: Tensor = torch.autograd.grad(loss, moved)[0]
    if not gradient.isfinite().all():
        raise AblationError(
            "the loss has a gradient by the constants that is not finite; use float32, a smaller ablated fraction, or "
            "Mean"
        )
    return gradient
