"""The base of methods that score edges: one call, with the scores and the constants they were made for."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from coar.circuits.evaluator import CircuitEvaluator
from coar.settings import Settings

Report = Callable[[int], object]  # receives how many more of a method's steps are done


@dataclass(frozen=True)
class Scored:
    """The result of a method.

    Attributes:
        values: (components,) float64 scores on the CPU; a component matters the more, the larger the score's size is.
        constants: (components.width,) constants on the CPU that were trained along, by the number of edges of the
            circuit that they were trained in; none where a method leaves the ablation's.
    """

    values: Tensor
    constants: Mapping[int, Tensor] = field(default_factory=dict)


class ScoringMethod(Settings):
    """Base of all methods that score components over all examples of an evaluator; fields are settings.

    Attributes:
        label: The name of this method in commands and tables.
    """

    label: ClassVar[str]

    @abstractmethod
    def steps_of(self, evaluator: CircuitEvaluator) -> int:
        """Return the number of steps that will be reported."""

    @abstractmethod
    def score(self, evaluator: CircuitEvaluator, report: Report) -> Scored:
        """Score the components.

        Args:
            evaluator: Runs the examples.
            report: Called after each step, with 1, or after several, with their number.
        """


def on_cpu(values: Tensor) -> Tensor:
    """Return values in float64 on the CPU."""
    return values.detach().to("cpu", torch.float64)
