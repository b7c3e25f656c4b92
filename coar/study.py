"""The definition of a study: model, examples, components, output, ablation and sampler."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

import coar._version
from coar.ablation.base import Ablation
from coar.ablation.zero import ZeroWeight
from coar.components.layers import unwrapped
from coar.components.membership import check_components
from coar.components.table import Components
from coar.errors import SettingsError
from coar.examples import Examples
from coar.model_code import model_code
from coar.outputs.base import Output
from coar.outputs.classification import CorrectClassMargin
from coar.sampling import BernoulliSampler, Sampler
from coar.weights import check_in_memory, weights_fingerprint

CHECKS = (  # see docs/checks.md
    *("examples", "original", "random", "batch", "logits", "gates", "calls", "rows", "gradients", "repeats"),
)


@dataclass(frozen=True, kw_only=True)
class Study:
    """A definition that determines every number of a run: model, examples, components, output, ablation and sampler.

    Attributes:
        model: Any module; it is copied before use and never changed. Wrappers of `torch.compile` and `DataParallel`
            are removed.
        examples: The examples to attribute.
        components: The components that masks ablate.
        output: The output function: one number per example.
        ablation: The replacement of an ablated component.
        sampler: The distribution of the masks.
        accept: Names of the checks that may fail: some of `examples`, `original`, `random`, `batch`, `logits`, `gates`,
            `calls`, `rows`, `gradients` and `repeats`. The run keeps what was accepted. No part of the fingerprint.

    Raises:
        SettingsError: When one of these has another type, or there is no check of that name.
        ComponentError: When a component is not part of the model.
        WeightsError: When some of the model's weights are not in memory.
    """

    model: nn.Module
    examples: Examples
    components: Components
    output: Output = field(default_factory=CorrectClassMargin)
    ablation: Ablation = field(default_factory=ZeroWeight)
    sampler: Sampler = field(default_factory=BernoulliSampler)
    accept: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        kinds = {"model": nn.Module, "examples": Examples, "components": Components, "output": Output}
        kinds |= {"ablation": Ablation, "sampler": Sampler}
        for name, kind in kinds.items():
            given = getattr(self, name)
            if not isinstance(given, kind):
                raise SettingsError(
                    f"{name} is of type {type(given).__name__}, and {kind.__name__} was expected; give an object, not "
                    f"its name or its class"
                )
        unknown = [name for name in self.accept if name not in CHECKS]
        if unknown or isinstance(self.accept, str):
            raise SettingsError(f"accept is {self.accept!r}; give a tuple of names of checks, of {', '.join(CHECKS)}")
        object.__setattr__(self, "model", unwrapped(self.model))
        check_components(self.model, self.components)
        check_in_memory(self.model)

    def fingerprint(self) -> dict[str, Any]:
        """Return the fingerprint of this study: settings as values, data and weights as SHA-256 hashes."""
        return {
            "components": self.components.fingerprint(),
            "weights": weights_fingerprint(self.model),
            "code": model_code(self.model),
            "examples": self.examples.fingerprint(),
            "ablation": self.ablation.settings(),
            "output": self.output.settings(),
            "sampler": self.sampler.settings(),
            "versions": {"coar": coar._version.__version__, "numpy": np.__version__, "torch": torch.__version__},
        }
