"""Training of lenses: one problem per layer, all from the same passes, resumable after a stop."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coar.errors import MismatchError, SettingsError
from coar.examples import Examples
from coar.forward.devices import choose_device
from coar.lenses.divergence import divergences, passes
from coar.lenses.kinds import LensKind, MakeOptimizer, Moments, Parameters, lens_kind
from coar.lenses.layer_stack import LayerStack
from coar.lenses.lens import DESCRIPTION, TENSORS, Lens, named, read_description, write_description
from coar.progress import progress_bar
from coar.weights import read_state, save_state, weights_fingerprint

log = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.safetensors"
SAVED_EVERY = 60.0  # seconds


def lens(
    model: nn.Module,
    texts: Examples,
    kind: str = "optimal",
    *,
    layers: Sequence[int] | None = None,
    steps: int = 200,
    texts_per_step: int = 8,
    learning_rate: float | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    device: str = "auto",
    progress: bool = True,
) -> Lens:
    """Make a lens of each layer of a decoder-only transformer, see `Lens` for the kinds.

    All layers are trained from the same plain passes. The learning rate falls linearly to zero. Constants start from
    means over the texts, and their steps are in units of each feature's standard deviation; Adam trains them. A tuned
    lens starts from the identity and is trained as in the library tuned-lens: stochastic gradient descent with
    Nesterov momentum 0.9, weight decay 1e-3 and gradients clipped to norm 1.

    Args:
        model: The model; it is copied and never changed.
        texts: Texts to train on, as `coar.token_examples` makes them.
        kind: `optimal`, `mean`, `tuned` or `logit`.
        layers: Numbers of the layers; by default all.
        steps: Number of steps; `mean` and `logit` have none.
        texts_per_step: Texts of a step.
        learning_rate: Learning rate of the first step; by default 0.05 for `optimal` and 1 for `tuned`.
        seed: Seed of the order of the texts.
        folder: Where the lens is written, and every minute and at a stop a checkpoint, from which the same call
            continues. If it holds the finished lens of the same call, that lens is returned.
        device: Where to compute.
        progress: Whether to show a progress bar.

    Raises:
        ComponentError: When the model is not such a transformer; the message says why.
        MismatchError: When the folder holds another lens.
        SettingsError: When a setting is out of range or unknown.
    """
    chosen = lens_kind(kind)
    stack = LayerStack(model, choose_device(device))
    numbers = _layers(stack, layers)
    if steps < 1 or texts_per_step < 1:
        raise SettingsError(f"{steps} steps of {texts_per_step} texts were given; both must be at least 1")
    rate = chosen.learning_rate if learning_rate is None else learning_rate
    facts: dict[str, Any] = {"kind": kind, "layers": list(numbers), "weights": weights_fingerprint(model)}
    facts |= {"texts": texts.fingerprint()}
    if chosen.optimizer is not None:
        facts |= {"steps": steps, "texts_per_step": texts_per_step, "learning_rate": rate, "seed": seed}
    place = None if folder is None else Path(folder)
    if place is not None and _claim(place, facts):
        return Lens.load(place, model, device=device)
    moments = _moments(stack, texts)
    parameters = {layer: chosen.start(stack, moments, layer) for layer in numbers}
    if chosen.optimizer is not None:
        training = _Training(chosen, chosen.optimizer, stack, parameters, rate, steps)
        training.run(texts, min(texts_per_step, len(texts)), seed, place, progress)
    parameters = {layer: {name: value.detach() for name, value in own.items()} for layer, own in parameters.items()}
    rest = {name: value for name, value in facts.items() if name not in ("kind", "layers")}
    made = Lens(kind, numbers, rest, stack, parameters)
    if place is not None:
        save_state(named(parameters), place / TENSORS)
        (place / CHECKPOINT).unlink(missing_ok=True)
    return made


def _layers(stack: LayerStack, layers: Sequence[int] | None) -> tuple[int, ...]:
    numbers = tuple(range(len(stack)) if layers is None else sorted(set(layers)))
    strange = [layer for layer in numbers if not 0 <= layer < len(stack)]
    if strange or not numbers:
        raise SettingsError(f"layers {strange or '()'} were given; choose among 0 to {len(stack) - 1}")
    return numbers


def _claim(place: Path, facts: dict[str, Any]) -> bool:
    """Return whether a folder holds the finished lens; write the facts into a folder without any."""
    if not (place / DESCRIPTION).exists():
        write_description(place, facts)
        return False
    stored = read_description(place)
    other = sorted(name for name in stored.keys() | facts.keys() if stored.get(name) != facts.get(name))
    if other:
        changes = "; ".join(f"{name} {stored.get(name)!r} there, {facts.get(name)!r} here" for name in other)
        raise MismatchError(f"{place} holds a lens made otherwise ({changes}); choose another folder")
    return (place / TENSORS).exists()


def _moments(stack: LayerStack, texts: Examples) -> Moments:
    """Return the moments of what each layer's attention writes, over all tokens but the first of each text."""
    count, total, squares = 0, torch.zeros(1), torch.zeros(1)
    for _, passed in passes(stack, texts):
        values = passed.attention.double()
        count += values.shape[1]
        total, squares = total.to(values.device) + values.sum(1), squares.to(values.device) + (values**2).sum(1)
    if not count:
        raise SettingsError("every text has one token; a lens needs texts of at least 2, since the first is not read")
    mean = total / count
    return Moments(mean.float(), (squares / count - mean**2).clamp_min(0).sqrt().float())


class _Training:
    """The trained parameters of all layers, and their optimizer."""

    def __init__(
        self,
        kind: LensKind,
        optimizer: MakeOptimizer,
        stack: LayerStack,
        parameters: dict[int, Parameters],
        rate: float,
        steps: int,
    ) -> None:
        self._kind, self._stack, self._parameters, self._steps = kind, stack, parameters, steps
        self._trained = {name: value for name, value in named(parameters).items() if value.requires_grad}
        self._optimizer = optimizer(list(self._trained.values()), rate)
        self._rates = [group["lr"] for group in self._optimizer.param_groups]

    def run(self, texts: Examples, size: int, seed: int, place: Path | None, progress: bool) -> None:
        """Take all steps that are left."""
        first = self._restore(place) if place is not None and (place / CHECKPOINT).exists() else 0
        step, saved = first, time.monotonic()
        try:
            with progress_bar(total=self._steps, initial=first, desc="lens", unit="step", shown=progress) as bar:
                while step < self._steps:
                    chosen = texts.subset(_drawn(len(texts), size, step, seed))
                    bar.set_postfix(kl=f"{self._step(chosen, 1 - step / self._steps):.3f}")
                    bar.update()
                    step += 1
                    if place is not None and time.monotonic() - saved > SAVED_EVERY:
                        self._save(place, step)
                        saved = time.monotonic()
        except BaseException:
            if place is not None and step > first:
                self._save(place, step)
            raise

    def _step(self, texts: Examples, rate: float) -> float:
        """Take one step at a share of the learning rate, and return the mean divergence before it."""
        inputs, _ = texts.block(0, len(texts))
        passed = self._stack.latents(inputs)
        total, tokens = 0.0, len(passed.text)
        self._optimizer.zero_grad()
        for layer, own in self._parameters.items():
            for part in divergences(self._kind, self._stack, own, passed, layer):
                loss = part.sum() / tokens
                torch.autograd.backward(loss)
                total += float(loss.detach())
        if not np.isfinite(total):
            raise SettingsError("the divergence is not finite; choose a smaller learning_rate, or a model in float32")
        torch.nn.utils.clip_grad_norm_(list(self._trained.values()), self._kind.largest_gradient)
        for group, first in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = first * rate
        self._optimizer.step()
        return total / len(self._parameters)

    def _save(self, place: Path, step: int) -> None:
        """Write the parameters, the optimizer's state and the number of steps taken, completely or not at all."""
        state = {"step": torch.tensor(step)} | {f"parameter.{name}": value for name, value in self._trained.items()}
        for number, own in self._optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{number}.{name}": value for name, value in own.items() if isinstance(value, Tensor)}
        save_state(state, place / CHECKPOINT)

    def _restore(self, place: Path) -> int:
        """Read a checkpoint, and return the number of steps taken."""
        state = read_state(place / CHECKPOINT)
        optimizer: dict[int, dict[str, Tensor]] = {}
        with torch.no_grad():
            for name, value in state.items():
                kind, _, rest = name.partition(".")
                if kind == "parameter":
                    self._trained[rest].copy_(value)
                elif kind == "optimizer":
                    number, _, own = rest.partition(".")
                    optimizer.setdefault(int(number), {})[own] = value
        whole = self._optimizer.state_dict()
        self._optimizer.load_state_dict({**whole, "state": optimizer})
        step = int(state["step"])
        log.info("training goes on after %d steps", step)
        return step


def _drawn(texts: int, size: int, step: int, seed: int) -> np.ndarray:
    """Return the texts of a step: each epoch has all texts in a random order of its own."""
    places = [divmod(place, texts) for place in range(step * size, (step + 1) * size)]
    orders = {epoch: np.random.default_rng((seed, epoch)).permutation(texts) for epoch, _ in places}
    return np.array([orders[epoch][place] for epoch, place in places])
