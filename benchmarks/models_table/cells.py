"""Cells of the table: what masks, gradients, edits and a reload give for one model and one kind of component."""

import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import coar
from benchmarks.models_table import oracle
from benchmarks.models_table.oracle import Oracle, Row
from benchmarks.models_table.results import COLUMNS
from benchmarks.models_table.subjects import ROWS, Subject
from coar.store.gradients import MaskGradients

SITES = 5  # of one kind in one model, at most
MASKS, GRADIENTS, BUDGET = 4, 2, 8
TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3  # relative to the largest number, and to the length of the gradient
MOVED = 6  # draws of roundings of the inputs, where gradients differ
LEAST_EFFECT = 5e-4  # of masks on outputs, relative to the largest output
ABSENT = ("has no convolution", "has no linear layer", "has no attention block", "has no mixture of experts")


class Reading(coar.Output):
    """The number that the oracle reads off the model's result."""

    def __call__(self, result: Any, targets: Tensor) -> Tensor:
        """Return (examples,) numbers."""
        return oracle.reading(result, len(targets))


@dataclass(frozen=True)
class Cell:
    """What one column of the table shows for one kind of component of one model.

    Attributes:
        column: `masks`, `gradients`, `edit` or `reload`.
        verdict: `right`, `refused`, `wrong`, `traceback`, or `undefined` where documentation rules it out.
        detail: The message of a refusal or of an error, or the largest difference.
    """

    column: str
    verdict: str
    detail: str


@dataclass
class Kind:
    """One kind of component: how to find some, and how they are ablated.

    Attributes:
        find: Finds components of this kind.
        ablation: Makes the ablation from the calibration examples.
        undefined: Columns that have no meaning for this kind, and why.
    """

    find: Callable[[nn.Module, "Uses"], coar.Components]
    ablation: Callable[[coar.Examples], coar.Ablation]
    undefined: dict[str, str]


@dataclass(frozen=True)
class Uses:
    """What one plain pass uses.

    Attributes:
        parameters: Names of parameters with a gradient.
        modules: Paths of modules that are called once and return a tensor with the batch first.
    """

    parameters: set[str]
    modules: list[str]

    @classmethod
    def of(cls, model: nn.Module, inputs: Any) -> "Uses":
        """Run the model forward and backward."""
        calls: dict[str, list[bool]] = {}

        def seen(name: str) -> Callable[..., None]:
            def note(_module: nn.Module, _args: Any, y: Any) -> None:
                first = y[0] if isinstance(y, tuple) and y else y
                batch = isinstance(first, Tensor) and first.is_floating_point() and first.ndim >= 3
                calls.setdefault(name, []).append(batch and len(first) == ROWS)

            return note

        handles = [module.register_forward_hook(seen(name)) for name, module in model.named_modules() if name]
        named = dict(model.named_parameters(remove_duplicate=False))
        real = {name: parameter for name, parameter in named.items() if parameter.is_floating_point()}
        for parameter in real.values():
            parameter.requires_grad_(True)
        value = oracle.run(model, inputs).sum()
        found = torch.autograd.grad(value, list(real.values()), allow_unused=True)
        model.requires_grad_(False)
        for handle in handles:
            handle.remove()
        used = {name for name, gradient in zip(real, found, strict=True) if gradient is not None}
        return cls(used, [name for name, batches in calls.items() if batches == [True]])


class MissingError(Exception):
    """A model uses no component of a kind."""


def spread(names: list[str], count: int) -> list[str]:
    """Return some of the names, evenly spaced, in their order."""
    step = max(1.0, len(names) / count)
    return [names[int((i + 0.5) * step)] for i in range(min(count, len(names)))]


def some(components: coar.Components, uses: Uses) -> coar.Components:
    """Return the components of a few sites that the model uses."""
    used = list(dict.fromkeys(row.site for row in components))
    used = [site for site in used if any(name == site or name.startswith(f"{site}.") for name in uses.parameters)]
    if not used:
        raise MissingError
    chosen = set(spread(used, SITES))
    return coar.Components(row for row in components if row.site in chosen)


def of_modules(model: nn.Module, uses: Uses) -> coar.Components:
    """Return whole modules with weights, other than layers."""
    names = [name for name in uses.modules if any(True for _ in model.get_submodule(name).children())]
    names = [name for name in names if any(key.startswith(f"{name}.") for key in uses.parameters)]
    if not names:
        raise MissingError
    return coar.modules(model, spread(names, SITES))


def of_parameters(model: nn.Module, uses: Uses) -> coar.Components:
    """Return slices of some parameters along their first axis."""
    parameters = dict(model.named_parameters())
    names = [name for name, value in parameters.items() if value.ndim >= 2 and name in uses.parameters]
    return coar.parameter_slices(model, spread(names, 4))


def found_by(finder: Callable[[nn.Module], coar.Components]) -> Callable[[nn.Module, Uses], coar.Components]:
    """Return a finder of components of a few sites."""
    return lambda model, uses: some(finder(model), uses)


def mean(calibration: coar.Examples) -> coar.Ablation:
    """Return the ablation by means."""
    return coar.Mean(calibration=calibration)


def hidden_neurons(model: nn.Module) -> coar.Components:
    """Find the neurons of all linear layers but the last, whose outputs are the model's, unless it is the only one."""
    found = coar.neurons(model)
    hidden = [row for row in found if row.site != found[len(found) - 1].site]
    return coar.Components(hidden) if hidden else found


KINDS = {
    "conv filters": Kind(found_by(coar.conv_filters), mean, {}),
    "neurons": Kind(found_by(hidden_neurons), mean, {}),
    "input features": Kind(found_by(coar.input_features), mean, {}),
    "attention heads": Kind(found_by(coar.attention_heads), mean, {}),
    "experts": Kind(found_by(coar.experts), lambda _: coar.ZeroWeight(), {}),
    "modules": Kind(
        of_modules,
        lambda _: coar.ZeroActivation(),
        dict.fromkeys(("edit", "reload"), "a module of several layers has no weights of its own to edit"),
    ),
    "parameter slices": Kind(
        of_parameters, lambda _: coar.ZeroWeight(), {"gradients": "a parameter has no output to gate"}
    ),
}


class Check:
    """The cells of one kind of component of one model.

    Args:
        subject: The model's maker.
        model: The model.
        kind: The kind of component.
        components: The components.
        folder: A folder for the run and for saved models.
    """

    def __init__(
        self, subject: Subject, model: nn.Module, kind: Kind, components: coar.Components, folder: Path
    ) -> None:
        self.subject, self.model, self.kind, self.folder = subject, model, kind, folder
        self.inputs = subject.inputs(1)
        calibration = coar.Examples(inputs=subject.inputs(2), targets=torch.zeros(ROWS, dtype=torch.long))
        self.study = coar.Study(
            model=model,
            examples=coar.Examples(inputs=self.inputs, targets=torch.zeros(ROWS, dtype=torch.long)),
            components=components,
            output=Reading(),
            ablation=kind.ablation(calibration),
            sampler=coar.BernoulliSampler(ablated_fraction=0.1 if len(components) > 20 else 0.3),
        )
        rows = [Row(row.site, row.side, row.axis, row.position, row.size) for row in components]
        self.oracle = self.oracle_of(model, rows, lambda values: values)
        with torch.no_grad():
            self.base = oracle.run(model, self.inputs)

    def cells(self) -> Iterator[Cell]:
        """Yield the cell of each column; after a refusal of masks the others are refused too."""
        self.run: coar.Run | None = None
        self.edited: nn.Module | None = None
        for column in COLUMNS:
            if column in self.kind.undefined:
                yield Cell(column, "undefined", self.kind.undefined[column])
                continue
            needed = {"masks": True, "gradients": self.run, "edit": self.run, "reload": self.edited}[column]
            if needed is None:
                yield Cell(column, self.before.verdict, self.before.detail)
                continue
            cell = attempt(column, getattr(self, column))
            if column in ("masks", "edit"):
                self.before = cell
            yield cell

    def masks(self) -> str:
        """Compare outputs under masks."""
        self.run = None
        try:
            run = self.collect(masks=MASKS, gradients=0 if "gradients" in self.kind.undefined else GRADIENTS)
        except coar.CoarError:  # perhaps of gradients alone, which are then refused again
            run = self.collect(masks=MASKS)
        masks = run.masks(0, MASKS)
        found = torch.from_numpy(run.outputs(slice(0, MASKS), slice(None)))
        with torch.no_grad():
            expected = torch.stack([self.oracle.outputs(self.inputs, torch.from_numpy(mask).float()) for mask in masks])
        self.run = run
        effect = float((expected - self.base).abs().max() / self.base.abs().max())
        if effect <= LEAST_EFFECT:
            raise DifferentError(f"masks change outputs by {effect:.1e} only")
        try:
            return self.compared(found, expected)
        except DifferentError as error:
            double, inputs = self.double(), oracle.double(self.inputs)
            with torch.no_grad():
                exact = torch.stack([double.outputs(inputs, torch.from_numpy(mask).double()) for mask in masks])
            noise = float((expected - exact).abs().max() / self.scale(expected))
            if float((found - expected).abs().max() / self.scale(expected)) <= 3 * noise:
                return f"{noise:.1e}"
            raise DifferentError(f"{error}, and float32 from float64 by {noise:.1e}") from None

    def gradients(self) -> str:
        """Compare mean gradients by every gate, each example under masks of its own."""
        run = self.collect(masks=MASKS, gradients=GRADIENTS)
        stored = MaskGradients(run)
        masks = torch.from_numpy(stored.masks(0)).float()[:, :ROWS]  # (gradients, examples, components)
        kept, ablated = (np.asarray(run.array(name)[0]) for name in ("gradient_kept", "gradient_ablated"))
        expected, counts = gradients_of(self.oracle, self.inputs, masks), masks.sum(0)
        sums = [(expected * masks).sum(0), (expected * (1 - masks)).sum(0)]
        parts = [(sums[0], counts, kept), (sums[1], GRADIENTS - counts, ablated)]
        found = torch.cat([torch.from_numpy(part)[count > 0] for _, count, part in parts])
        right = torch.cat([(total / count)[count > 0] for total, count, _ in parts])
        error, size = float((found - right).norm()), float(right.norm())
        if size == 0:
            raise DifferentError("all gradients are 0")
        if not error <= GRADIENT_TOLERANCE * size:
            exact = gradients_of(self.double(), oracle.double(self.inputs), masks)
            moved = [gradients_of(self.oracle, oracle.rounded(self.inputs, seed), masks) for seed in range(MOVED)]
            noise = max(float((other - expected).norm() / exact.norm()) for other in (exact, *moved))
            if not error <= 3 * noise * size:
                raise DifferentError(f"gradients differ by {error / size:.1e}, and float32 from float64 by {noise:.1e}")
        return f"{error / size:.1e}"

    def edit(self) -> str:
        """Compare outputs of an edited model."""
        run = self.run
        assert run is not None
        attributions = coar.fit(run, method="ridge", progress=False)
        goal = coar.EditGoal(targets=(0, 1), references=(2, 3), direction="decrease")
        self.chosen = coar.edit(attributions, goal, budget=min(BUDGET, len(run.components)))
        edited = self.chosen.apply(self.model)
        keep = torch.ones(len(run.components))
        keep[[run.components.index(row.name) for row in self.chosen.components]] = 0
        with torch.no_grad():
            expected = self.oracle.outputs(self.inputs, keep)
            self.after = oracle.run(edited, self.inputs)
        self.edited = edited
        return self.compared(self.after, expected)

    def reload(self) -> str:
        """Compare outputs of the edited model with those of the model that the library loads."""
        code = self.subject.saved(self.chosen, self.model, self.study.examples, self.folder / "model")
        namespace = {"model": self.subject.make()}
        exec(code, namespace)
        with torch.no_grad():
            found = oracle.run(namespace["model"].eval(), self.inputs)
        return self.compared(found, self.after)

    def oracle_of(self, model: nn.Module, rows: list[Row], cast: Callable[[Any], Any]) -> Oracle:
        """Return an oracle with constants of its own."""
        constants = None
        if isinstance(self.study.ablation, coar.Mean):
            constants = oracle.means(model, rows, cast(self.subject.inputs(2)))
        return Oracle(model, rows, constants)

    def double(self) -> Oracle:
        """Return the oracle in float64, constants included."""
        return self.oracle_of(deepcopy(self.model).double(), list(self.oracle.rows), oracle.double)

    def compared(self, found: Tensor, expected: Tensor) -> str:
        """Return the largest difference in words; raise `DifferentError` when it is too large."""
        error = float((found - expected).abs().max() / self.scale(expected))
        if not error <= TOLERANCE:
            raise DifferentError(f"outputs differ by {error:.1e}")
        return f"{error:.1e}"

    def scale(self, expected: Tensor) -> Tensor:
        """Return the largest output, of the plain model too."""
        return torch.maximum(expected.abs().max(), self.base.abs().max())

    def collect(self, **sizes: int) -> coar.Run:
        """Collect into the folder."""
        return coar.collect(
            self.study,
            self.folder / "run.zarr",
            **sizes,
            device="cpu",
            execution=coar.Execution(batch_size=ROWS),
            progress=False,
        )


class DifferentError(Exception):
    """Numbers differ from the oracle's."""


def gradients_of(truth: Oracle, inputs: Any, masks: Tensor) -> Tensor:
    """Return gradients by every gate under (gradients, examples, components) masks, one example at a time."""
    found = torch.zeros_like(masks)
    for i, of_examples in enumerate(masks):
        for n, mask in enumerate(of_examples):
            keep = mask.clone().requires_grad_()
            (found[i, n],) = torch.autograd.grad(truth.outputs(oracle.twice(inputs, n), keep).mean(), keep)
    return found


def attempt(column: str, work: Callable[[], str]) -> Cell:
    """Return the cell of a column."""
    try:
        return Cell(column, "right", work())
    except DifferentError as error:
        return Cell(column, "wrong", str(error))
    except coar.CoarError as error:
        return Cell(column, "refused", f"{type(error).__name__}: {error}")
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in where if "/coar/" in frame.filename] or where
        at = f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {Path(where[-1].filename).name}:{where[-1].lineno}"
        return Cell(column, "traceback", f"{type(error).__name__}: {error} ({at})")


def check(subject: Subject) -> dict[str, Any]:
    """Return the cells of all kinds of components of one model, and the seconds that each kind took."""
    start = time.process_time()
    model = subject.model()
    uses = Uses.of(model, subject.inputs(3))
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters()), "kinds": {}}
    for name, kind in KINDS.items():
        begun = time.process_time()
        try:
            components = kind.find(model, uses)
        except MissingError:
            continue
        except coar.CoarError as error:
            if not any(words in str(error) for words in ABSENT):
                cells = [Cell(column, "refused", f"{type(error).__name__}: {error}") for column in COLUMNS]
                found["kinds"][name] = {"cells": [asdict(cell) for cell in cells]}
            continue
        if len(components) < 2:
            continue
        with tempfile.TemporaryDirectory() as folder:
            cells = list(Check(subject, model, kind, components, Path(folder)).cells())
        seconds = time.process_time() - begun
        found["kinds"][name] = {
            "components": len(components),
            "seconds": round(seconds, 1),
            "cells": [asdict(cell) for cell in cells],
        }
    found["seconds"] = round(time.process_time() - start, 1)
    return found
