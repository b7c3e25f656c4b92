"""Scores of edges over a study's examples, by any method of one registry or from a run's fit."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from coar.attributions import Attributions
from coar.circuits.evaluator import CircuitEvaluator
from coar.circuits.gradients import MaskGradient, PathGradient, RandomMaskGradient, RandomScore
from coar.circuits.learned import HardConcrete, UniformGradientSampling
from coar.circuits.method import ScoringMethod
from coar.circuits.patching import ExactPatching, GreedyRemoval
from coar.circuits.pruning import GradualPruning
from coar.components.table import Components
from coar.errors import SettingsError
from coar.forward.execution_plan import Precision
from coar.progress import progress_bar
from coar.store.run import Run
from coar.study import Study

if TYPE_CHECKING:
    import pandas as pd

METHODS: dict[str, type[ScoringMethod]] = {
    method.label: method
    for method in (
        GradualPruning,
        MaskGradient,
        PathGradient,
        RandomMaskGradient,
        ExactPatching,
        GreedyRemoval,
        UniformGradientSampling,
        HardConcrete,
        RandomScore,
    )
}


@dataclass(frozen=True, eq=False)
class CircuitScores:
    """Scores of all components of a study by one method.

    Attributes:
        method: Label of the method, or the name of a fit.
        values: (components,) float64 scores; a component matters the more, the larger its score's size is.
        constants: (components.width,) float32 constants that the method trained along, by the number of edges of the
            circuit that they were trained in; none where it trained none.
        evaluator: Runs the learning examples.
        passes: Forward passes of one example that the method took; a gradient counts as 3.
        seconds: Wall-clock seconds that it took.
    """

    method: str
    values: np.ndarray
    constants: Mapping[int, np.ndarray]
    evaluator: CircuitEvaluator
    passes: int
    seconds: float

    @property
    def components(self) -> Components:
        """The components that were scored."""
        return self.evaluator.study.components

    def constants_at(self, edges: int) -> np.ndarray | None:
        """Return the (components.width,) constants trained along at the nearest number of edges; None without any."""
        if not self.constants:
            return None
        return self.constants[min(self.constants, key=lambda size: abs(math.log(max(size, 1) / edges)))]

    def ranking(self) -> np.ndarray:
        """Return (components,) row numbers, the largest size of the score first; equal ones in table order."""
        found: np.ndarray = np.argsort(-np.abs(self.values), kind="stable")
        return found

    def to_pandas(self) -> "pd.DataFrame":
        """Return a frame of names and scores, the largest size first, its index the component's index."""
        import pandas as pd

        frame = pd.DataFrame({"name": self.components.names, "score": self.values}).rename_axis("component")
        return frame.iloc[self.ranking()]


def circuit_scores(
    study: Study,
    method: str = "gradual",
    *,
    run: Run | None = None,
    device: str = "auto",
    precision: Precision = "float32",
    batch_size: int = 16,
    progress: bool = True,
    evaluator: CircuitEvaluator | None = None,
    **settings: Any,
) -> CircuitScores:
    """Score the edges of a decoder by how much the model needs them on a study's examples.

    Args:
        study: The study; its components are `coar.edges` or `coar.nodes`, and its output reads next tokens.
        method: `gradual`, `eap`, `eap_ig`, `random_masks`, `exact`, `acdc`, `ugs`, `hcgs` or `random`; with a run,
            also the name of one of its fits, whose attributions are averaged over examples.
        run: A run of this study.
        device: Where to compute.
        precision: `float32`, or `bf16` for automatic mixed precision.
        batch_size: Most examples per pass.
        progress: Show a progress bar.
        evaluator: An evaluator of this study to use again, instead of `device`, `precision` and `batch_size`.
        settings: Settings of the method, such as `steps=10`.

    Raises:
        ComponentError: When the components are no edges, or are of another model.
        OutputError: When the output does not read next tokens, or a loss is not finite.
        SettingsError: When the method is unknown, or its settings are wrong.
        MismatchError: When the run was made for another study.
    """
    if evaluator is None:
        evaluator = CircuitEvaluator(study, device=device, precision=precision, batch_size=batch_size)
    chosen = method_of(method, settings, run)
    if isinstance(chosen, Run):
        return _of_fit(evaluator, method, chosen)
    started, before = time.monotonic(), evaluator.passes
    with progress_bar(total=chosen.steps_of(evaluator), desc=method, unit="step", shown=progress) as bar:
        scored = chosen.score(evaluator, bar.update)
    constants = {size: values.float().numpy() for size, values in scored.constants.items()}
    passes, seconds = evaluator.passes - before, time.monotonic() - started
    return CircuitScores(method, scored.values.numpy(), constants, evaluator, passes, seconds)


def method_of(label: str, settings: Mapping[str, Any], run: Run | None) -> ScoringMethod | Run:
    """Return a method with its settings, or the run whose fit has this name.

    Raises:
        SettingsError: When the method is unknown, or its settings are wrong.
    """
    if label in METHODS:
        return METHODS[label](**settings)
    if run is None or settings:
        raise SettingsError(
            f"unknown method {label!r}; choose {', '.join(METHODS)}, or give run= to use the fit {label!r} of a run"
        )
    return run


def _of_fit(evaluator: CircuitEvaluator, name: str, run: Run) -> CircuitScores:
    """Return the mean attributions of a run's fit."""
    run.check(evaluator.study.fingerprint())
    weights = Attributions.open(run, name).weights().astype(np.float64).mean(0)
    return CircuitScores(name, weights, {}, evaluator, 0, 0.0)


def top(scores: CircuitScores, count: int) -> torch.Tensor:
    """Return the (components,) mask of the components with the largest scores, on the evaluator's device."""
    keep = torch.zeros(len(scores.values), device=scores.evaluator.device)
    keep[torch.from_numpy(scores.ranking()[:count].copy()).to(keep.device)] = 1
    return keep


def check_sizes(sizes: Sequence[int], components: Components) -> None:
    """Raise `SettingsError` unless all sizes are numbers of components of a table."""
    wrong = [size for size in sizes if not 1 <= size <= len(components)]
    if wrong:
        raise SettingsError(
            f"a circuit of {wrong[0]} edges was requested; this table has {len(components)}: give a number from 1 to "
            f"{len(components)}"
        )
