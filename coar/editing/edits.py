"""The choice of components for a goal, and the edit that ablates them for good."""

import json
import os
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from torch import nn

from coar.ablation import fold
from coar.attributions import Attributions
from coar.components import Component, read_component
from coar.editing.goals import EditGoal
from coar.errors import EditError, GoalError, SettingsError, StorageError
from coar.weights import weights_fingerprint

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 1


@dataclass(frozen=True)
class Edit:
    """Components to ablate for good, and what replaces them.

    Attributes:
        components: The chosen components, most important first.
        replacements: One constant per component.
        scores: The score each was chosen by.
        goal: What the edit is for.
        ablation: Name of the ablation that the attributions were made with.
        batch_norms: Path of the batch norm that takes the constants of a site without bias.
        weights: SHA-256 of the weights that the edit was made for.
    """

    components: tuple[Component, ...]
    replacements: tuple[float, ...]
    scores: tuple[float, ...]
    goal: EditGoal
    ablation: str
    batch_norms: dict[str, str]
    weights: str

    def __len__(self) -> int:
        return len(self.components)

    def apply(self, model: nn.Module) -> nn.Module:
        """Return an edited copy, a plain module of the same class.

        Its state dict has the same keys wherever a layer has a bias or is followed by a batch norm.

        Raises:
            EditError: When the model's weights are not the ones that the edit was made for.
        """
        if weights_fingerprint(model) != self.weights:
            raise EditError(
                f"this edit was made for weights {self.weights[:12]}..., and this {type(model).__name__} has others; "
                f"load the weights that the attributions were collected with"
            )
        edited = deepcopy(model)
        fold(edited, self.components, self.replacements, batch_norms=self.batch_norms)
        return edited

    def save(self, path: str | Path) -> None:
        """Write the edit as JSON, whole or not at all.

        Raises:
            StorageError: When the disk refuses the write.
        """
        file = Path(path)
        partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
        content = {
            "format": FORMAT,
            "goal": self.goal.model_dump(mode="json"),
            "ablation": self.ablation,
            "weights": self.weights,
            "batch_norms": self.batch_norms,
            "components": [
                {**component._asdict(), "replacement": value, "score": score}
                for component, value, score in zip(self.components, self.replacements, self.scores, strict=True)
            ],
        }
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(content, indent=1) + "\n")
            os.replace(partial, file)
        except OSError as error:
            raise StorageError(f"cannot write the edit to {file}: {error}; choose another path") from error

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read an edit written by `save`; raise `EditError` for any other file."""
        file = Path(path)
        try:
            content: dict[str, Any] = json.loads(file.read_text())
            if content["format"] > FORMAT:
                raise EditError(f"{file} has format {content['format']}, this version reads {FORMAT}; update coar")
            rows: list[dict[str, Any]] = content["components"]
            if not isinstance(rows, list):
                raise TypeError("components is not a list")
            return cls(
                tuple(read_component([row[field] for field in Component._fields]) for row in rows),
                tuple(float(row["replacement"]) for row in rows),
                tuple(float(row["score"]) for row in rows),
                EditGoal(**content["goal"]),
                str(content["ablation"]),
                {str(site): str(name) for site, name in content["batch_norms"].items()},
                str(content["weights"]),
            )
        except EditError:
            raise
        except (OSError, UnicodeDecodeError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise EditError(f"{file} does not hold an edit ({error!r}); write it again with Edit.save") from None

    def to_pandas(self) -> "pd.DataFrame":
        """Return a frame with one row per component: name, score, replacement."""
        import pandas as pd

        names = [component.name for component in self.components]
        return pd.DataFrame({"name": names, "score": self.scores, "replacement": self.replacements})


def edit(attributions: Attributions, goal: EditGoal, *, budget: int) -> Edit:
    """Choose components by Welch's t between targets' and references' attributions, as published (COAR-Edit).

    Args:
        attributions: The attributions of the examples that the goal speaks of.
        goal: Targets, references and direction.
        budget: How many components to ablate.

    Raises:
        GoalError: When the goal selects no targets, no or too few references, or overlapping ones.
        SettingsError: When the budget is not between 1 and the number of components.
    """
    count = check_budget(budget, len(attributions.components))
    scores = welch_t(attributions, goal)
    return edit_of(attributions, goal, ranking(scores, goal)[:count], scores)


def check_budget(budget: int, components: int) -> int:
    """Return the budget, or raise `SettingsError` when it is not between 1 and the number of components."""
    if not 1 <= budget <= components:
        raise SettingsError(f"a budget of {budget} was given; choose 1 to {components}, the components there are")
    return budget


def edit_of(
    attributions: Attributions, goal: EditGoal, indices: Sequence[int] | np.ndarray, scores: np.ndarray
) -> Edit:
    """Return the edit that ablates these components, in this order."""
    facts = attributions.facts
    components = tuple(attributions.components[int(i)] for i in indices)
    sites = {component.site for component in components}
    return Edit(
        components,
        tuple(float(facts["replacements"][int(i)]) for i in indices),
        tuple(float(scores[int(i)]) for i in indices),
        goal,
        str(facts["fingerprint"]["ablation"]["name"]),
        {site: name for site, name in facts["batch_norms"].items() if site in sites},
        str(facts["fingerprint"]["weights"]),
    )


def welch_t(attributions: Attributions, goal: EditGoal) -> np.ndarray:
    """Return (components,) Welch's t statistics of the targets' attributions against the references'.

    A single target has no variance of its own; its share of the standard error is then taken as zero, so that the
    score is its distance from the references' mean in units of that mean's standard error.

    Raises:
        GoalError: When there are fewer than two references.
    """
    targets, references = goal.resolve(attributions.metadata)
    if len(references) < 2:
        raise GoalError("there is one reference, which tells nothing of the spread; give two or more")
    near, far = _moments(attributions, targets), _moments(attributions, references)
    error = np.sqrt(near[1] / len(targets) + far[1] / len(references))
    return (near[0] - far[0]) / np.maximum(error, np.finfo(np.float64).tiny)  # type: ignore[no-any-return]


def ranking(scores: np.ndarray, goal: EditGoal) -> np.ndarray:
    """Return component indices, the ones to ablate first in front: top t to decrease an output, bottom to increase."""
    return np.argsort(-scores if goal.direction == "decrease" else scores, kind="stable")


def _moments(attributions: Attributions, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (components,) mean and unbiased variance over examples, reading them a block at a time."""
    count, mean, squares = 0, np.zeros(len(attributions.components)), np.zeros(len(attributions.components))
    for start in range(0, len(rows), 1024):
        weights = attributions.weights(rows[start : start + 1024]).astype(np.float64)
        here = weights.mean(0)
        gap, total = here - mean, count + len(weights)
        squares += ((weights - here) ** 2).sum(0) + gap**2 * count * len(weights) / total
        mean, count = mean + gap * len(weights) / total, total
    return mean, squares / max(count - 1, 1)
