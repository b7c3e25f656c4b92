"""Retraining of the last layer on balanced groups, the usual alternative to an edit, and the comparison of both.

Deep feature reweighting (Kirichenko, Izmailov and Wilson 2022, "Last layer re-training is sufficient for robustness to
spurious correlations"): all layers but the last stay as they are. The last becomes a logistic regression with an L1
penalty on the standardised features, averaged over random subsets in which every group has as many examples.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from coar.charts import html_table
from coar.components.layers import unwrapped
from coar.editing.goal import EditGoal
from coar.editing.intervals import change_interval, mean_interval, share_interval
from coar.errors import EditError, ExamplesError, GoalError
from coar.examples import Examples, call_model, device_of
from coar.forward.copies import device_copy
from coar.forward.devices import batch_size_on
from coar.model_copy import independent_copy
from coar.outputs.base import find_logits

if TYPE_CHECKING:
    import pandas as pd

PENALTIES = (1.0, 0.7, 0.3, 0.1, 0.07, 0.03, 0.01)  # inverse penalties, the larger the weaker, as published
SUBSETS = 20  # balanced subsets that are averaged
LEAST = 4  # examples of a group, half to fit and half to choose the penalty


@dataclass(frozen=True)
class LastLayerComparison:
    """An edit beside retraining of the last layer, judged on the same examples by the same margin.

    Attributes:
        table: A row for all examples, targets, references, every group, the average over groups and the worst group.
            `before`, `edit` and `last_layer` are accuracies, the latter two with 95 % intervals (`..._low`,
            `..._high`). `points` is the accuracy of the edit less that of the retrained layer, in points, with its
            interval on the same examples (`points_low`, `points_high`). The worst group may be another one for each of
            the three, so it has no intervals.
        model: The model with the retrained layer.
        layer: Path of the layer.
        penalty: The chosen inverse penalty of scikit-learn's `LogisticRegression`.
        examples: Number of examples in each balanced subset.
    """

    table: "pd.DataFrame"
    model: nn.Module = field(repr=False)
    layer: str
    penalty: float
    examples: int

    def _repr_html_(self) -> str:
        return html_table(self.table)


@dataclass(frozen=True)
class RetrainedLayer:
    """A model with a retrained last layer; the attributes are those of `LastLayerComparison`."""

    model: nn.Module
    layer: str
    penalty: float
    examples: int


def retrain_last_layer(
    model: nn.Module, examples: Examples, group: str, *, seed: int = 0, device: str = "auto"
) -> RetrainedLayer:
    """Return a copy of a classifier whose last layer is trained anew on groups of equal size.

    Groups are those of class and metadata column together. The penalty with the best accuracy of the worst group is
    chosen on one half of the examples, after a fit to the other half.

    Args:
        model: The classifier; its last module must be a linear layer that returns the logits.
        examples: Labelled examples to train on, preferably ones that the model was not trained on.
        group: Metadata column of the groups.
        seed: Seed of the subsets.
        device: Where to compute features.

    Raises:
        EditError: When the logits are not those of a linear layer with one row of features per example.
        ExamplesError: When targets are not classes, a class is missing, or a group has fewer than four examples.
        GoalError: When there is no such column.
    """
    model = unwrapped(model)
    if group not in examples.metadata:
        raise GoalError(f"there is no metadata column {group!r}; there are {', '.join(sorted(examples.metadata))}")
    if examples.targets.ndim != 1 or examples.targets.is_floating_point():
        raise ExamplesError(
            f"targets have shape {tuple(examples.targets.shape)} and type {examples.targets.dtype}; a last layer is "
            f"retrained on one class per example"
        )
    layer, features = _features(model, examples, device)
    retrained = independent_copy(model)
    head: nn.Linear = retrained.get_submodule(layer)  # type: ignore[assignment]
    labels = examples.targets.cpu().numpy()
    missing = np.setdiff1d(np.arange(head.out_features), labels)
    if len(missing):
        raise ExamplesError(f"no example has class {missing[0]} of {head.out_features}; add some of every class")
    groups = np.unique(np.stack([labels.astype("U"), np.asarray(examples.metadata[group]).astype("U")]), axis=1)
    numbers = _numbers(labels, np.asarray(examples.metadata[group]))
    sizes = np.bincount(numbers)
    if sizes.min() < LEAST:
        label, name = groups[:, int(sizes.argmin())].tolist()
        raise ExamplesError(
            f"class {label} with {group} == {name!r} has {sizes.min()} examples and at least {LEAST} are needed; add "
            f"some, or leave the group out"
        )
    penalty, weight, bias = _fit(features, labels, numbers, np.random.default_rng(seed))
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
        if head.bias is None:
            head.bias = nn.Parameter(torch.zeros_like(head.weight[:, 0]))
        head.bias.copy_(torch.from_numpy(bias))
    return RetrainedLayer(retrained, layer, penalty, int(sizes.min()) * len(sizes))


def compared(
    goal: EditGoal, metadata: dict[str, np.ndarray], group: str, right: dict[str, np.ndarray]
) -> "pd.DataFrame":
    """Return the table of `LastLayerComparison`.

    Args:
        goal: Targets and references among the examples, and their clusters.
        metadata: (examples,) columns.
        group: The column of the groups.
        right: (examples,) booleans whether each example is right, under `before`, `edit` and `last_layer`.
    """
    import pandas as pd

    targets, references = goal.resolve(metadata)
    clusters, own = goal.clusters_of(metadata), metadata[group]
    parts = {"all": np.arange(len(own)), "targets": targets, "references": references}
    names = [f"{group}: {value}" for value in np.unique(own)]
    parts |= {name: np.flatnonzero(own == value) for name, value in zip(names, np.unique(own), strict=True)}
    rows = []
    for name, chosen in parts.items():
        row: dict[str, object] = {
            "group": name,
            "examples": len(chosen),
            "before": float(right["before"][chosen].mean()),
        }
        for method in ("edit", "last_layer"):
            low, high = share_interval(right[method][chosen], clusters[chosen])
            row |= {method: float(right[method][chosen].mean()), f"{method}_low": low, f"{method}_high": high}
        low, high = change_interval(right["last_layer"][chosen], right["edit"][chosen], clusters[chosen])
        difference = float(right["edit"][chosen].mean() - right["last_layer"][chosen].mean())
        rows.append({**row, "points": 100 * difference, "points_low": 100 * low, "points_high": 100 * high})
    table = pd.DataFrame(rows)
    groups = table[table["group"].isin(names)].drop(columns="group")
    average = groups.mean()
    for mean in ("edit", "last_layer", "points"):
        ends = [f"{mean}_low", f"{mean}_high"]
        average[ends] = mean_interval(groups[mean].to_numpy(), groups[ends].to_numpy())
    worst = groups[["before", "edit", "last_layer"]].min()
    worst["points"] = 100 * (worst["edit"] - worst["last_layer"])
    more = pd.DataFrame([average, worst]).assign(group=["average of groups", "worst group"], examples=len(own))
    return pd.concat([table, more], ignore_index=True)[list(table.columns)]


def _numbers(labels: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Return the number of each example's group of class and column, in the order of `numpy.unique`."""
    both = np.stack([labels.astype("U"), column.astype("U")])
    return np.unique(both, axis=1, return_inverse=True)[1].reshape(-1)


def _features(model: nn.Module, examples: Examples, device: str) -> tuple[str, np.ndarray]:
    """Return the path of the layer that returns the logits, and its (examples, features) inputs."""
    copy = device_copy(model, device, examples)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in copy.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, given, result, name=name: seen.update({name: (given[0], result)}))
    step = batch_size_on(device_of(copy))
    parts, layer = [], None
    for start in range(0, len(examples), step):
        with torch.no_grad():
            logits = find_logits(call_model(copy, examples.block(start, start + step)[0]))
        last = [name for name, (_, result) in seen.items() if result.shape == logits.shape and result.equal(logits)]
        if not last or seen[last[-1]][0].ndim != 2:
            raise EditError(
                f"the logits of {type(model).__name__} are not those of a linear layer with one row of features per "
                f"example, so there is no last layer to retrain"
            )
        layer = last[-1]
        parts.append(seen[layer][0].float().cpu().numpy())
    return str(layer), np.concatenate(parts)


def _fit(
    features: np.ndarray, labels: np.ndarray, groups: np.ndarray, rng: np.random.Generator
) -> tuple[float, np.ndarray, np.ndarray]:
    """Return the chosen penalty, and (classes, features) weights and (classes,) biases."""
    centre, scale = features.mean(0), features.std(0)
    scale[scale == 0] = 1
    standardised = (features - centre) / scale
    first = np.zeros(len(labels), dtype=bool)
    for group in np.unique(groups):
        rows = rng.permutation(np.flatnonzero(groups == group))
        first[rows[: (len(rows) + 1) // 2]] = True
    subset = np.flatnonzero(first)[_balanced(groups[first], rng)]

    def worst(penalty: float) -> float:
        weight, bias = _logistic(standardised[subset], labels[subset], penalty)
        right = (standardised[~first] @ weight.T + bias).argmax(1) == labels[~first]
        return min(float(right[groups[~first] == group].mean()) for group in np.unique(groups))

    penalty = max(PENALTIES, key=worst)
    fits = []
    for _ in range(SUBSETS):
        rows = _balanced(groups, rng)
        fits.append(_logistic(standardised[rows], labels[rows], penalty))
    weight, bias = (np.mean(parts, axis=0) for parts in zip(*fits, strict=True))
    weight = weight / scale
    return penalty, weight.astype(np.float32), (bias - weight @ centre).astype(np.float32)


def _balanced(groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return rows with as many of each group as the smallest has, drawn at random."""
    size = np.bincount(groups).min()
    chosen = [rng.permutation(np.flatnonzero(groups == group))[:size] for group in np.unique(groups)]
    return np.concatenate(chosen)


def _logistic(features: np.ndarray, labels: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the (classes, features) weights and (classes,) biases of a logistic regression with an L1 penalty."""
    from sklearn.linear_model import LogisticRegression

    two = labels.max() == 1
    settings = {"solver": "liblinear"} if two else {"solver": "saga", "tol": 1e-3, "max_iter": 5_000}
    found = LogisticRegression(l1_ratio=1, C=penalty, random_state=0, **settings).fit(features, labels)
    if not two:
        return found.coef_, found.intercept_
    return np.concatenate([0 * found.coef_, found.coef_]), np.concatenate([0 * found.intercept_, found.intercept_])
