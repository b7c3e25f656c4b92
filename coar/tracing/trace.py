"""Causal tracing: how much of a fact's recall returns when one part's clean state is restored."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from coar.charts import html_table, share_grid
from coar.errors import ExamplesError, SettingsError
from coar.examples import Examples
from coar.forward.devices import choose_device
from coar.progress import progress_bar
from coar.tracing.corruption import CORRUPTIONS, corrupted_subjects, moments, train_constant
from coar.tracing.facts import LAST, Facts
from coar.tracing.restoring import KINDS, Cell, Restoring

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

RESAMPLES = 2000
INTERVAL = (2.5, 97.5)
LEAST = 4  # facts that the model must recall


@dataclass(frozen=True)
class Trace:
    """Where facts are recalled: the average indirect effect of each part of the model.

    With p the probability of the answer, clean, corrupted, and patched where the part's clean state is restored,

        AIE = 1 - E[(p_clean - p_patched)+] / E[p_clean - p_corrupted]

    over facts that no constant was trained on (Li and Janson 2024). It is 1 where the part brings the fact back
    entirely, and 0 where it brings back nothing.

    Attributes:
        table: A row per cell: `kind`, `layer` (the middle one), `window` (number of layers), `place`, `aie` with its
            bootstrap interval over facts (`low`, `high`: 95 %).
        per_fact: A row per cell and scored fact: `fact` (its number), `clean`, `corrupted`, `loss` =
            (p_clean - p_patched)+.
        corruption: What replaced the subjects.
        learning: Numbers of the facts that statistics and constants come from.
        left_out: Numbers of the facts whose answer is not the model's most probable token.
        constant: (width,) trained embedding in the corrupted run; None for other corruptions.
    """

    table: "pd.DataFrame"
    per_fact: "pd.DataFrame"
    corruption: str
    learning: tuple[int, ...]
    left_out: tuple[int, ...]
    constant: np.ndarray | None = None

    def concentration(self, layers: int = 3) -> "pd.DataFrame":
        """Return the share of the total positive effect in the best layers, a row per kind, window and place."""
        import pandas as pd

        rows = []
        for (kind, window, place), own in self.table.groupby(["kind", "window", "place"], sort=False):
            effects = own["aie"].clip(lower=0).sort_values(ascending=False)
            best = own.loc[effects.index[:layers], "layer"].tolist()
            share = effects.iloc[:layers].sum() / effects.sum() if effects.sum() > 0 else np.nan
            rows.append({"kind": kind, "window": window, "place": place, "share": share, "best": best})
        return pd.DataFrame(rows)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw a heat map of the effect: a row per kind, window and place, a column per layer; return the axes.

        Args:
            ax: Matplotlib axes; by default those of a new figure.
        """
        rows = ["kind", "window", "place"]
        wide = self.table.pivot_table(index=rows, columns="layer", values="aie", sort=False)
        names = [
            f"{kind}{f' x {window}' if window > 1 else ''}, {str(place).replace('_', ' ')}"
            for kind, window, place in wide.index
        ]
        layers = [str(layer) for layer in wide.columns]
        most = max(0.05, float(self.table["aie"].max()))
        label = "average indirect effect"
        return share_grid(ax, names, layers, wide.to_numpy(), most=most, xlabel="layer", label=label)

    def _repr_html_(self) -> str:
        best = self.table.loc[self.table.groupby(["kind", "window", "place"], sort=False)["aie"].idxmax()]
        scored = self.per_fact["fact"].nunique()
        return (
            f"<p>Causal trace, {scored} facts scored, corruption {self.corruption}; best layers:</p>{html_table(best)}"
        )


def trace(
    model: nn.Module,
    facts: Examples,
    *,
    corruption: str = "optimal",
    kinds: Sequence[str] = KINDS,
    windows: Sequence[int] = (1,),
    places: Sequence[str] = (LAST, "last"),
    learning_share: float = 0.6,
    steps: int = 60,
    per_cell: bool = False,
    draws: int = 5,
    pairs: str = "pair",
    seed: int = 0,
    device: str = "auto",
    progress: bool = True,
) -> Trace:
    """Trace where a decoder-only transformer recalls facts (Meng et al. 2022, Li and Janson 2024).

    The embeddings of each subject's tokens are replaced, so the model no longer knows the answer. Then the clean output
    of one part is restored at a place. Facts whose answer is not the model's most probable token are left out. The
    rest is cut in two: statistics and constants come from the learning part, effects from the other.

    Args:
        model: The model; it is copied and never changed.
        facts: Prompts from `coar.token_examples`, with answers and the positions `subject_first` and `subject_last`.
        corruption: `optimal`: a constant, trained so that the corrupted model loses the least. `noise`: Gaussian, of
            three standard deviations of the subjects' embeddings. `mean`, `resample`, `counterfactual`.
        kinds: Restored parts: outputs of `attention`, of `mlp`, or the residual stream after a `layer`.
        windows: Numbers of layers that are restored together, odd.
        places: Restored positions: `subject`, all of its tokens together; `all`, every token from the subject on, which
            is every token that the corruption can change; `last`, where the answer is predicted; `subject_first`,
            `subject_middle`, `subject_last`, and other named positions of the facts.
        learning_share: Share of the facts in the learning part.
        steps: Steps of training a constant.
        per_cell: Whether to train a constant for each cell, as Li and Janson do, instead of one for the corrupted run;
            this takes `steps` forward and backward passes for each cell.
        draws: Draws of `noise` and `resample`; effects are means over them.
        pairs: Metadata column with the name of each fact's pair, for `counterfactual`.
        seed: Seed of the cut, of draws and of training.
        device: Where to compute.
        progress: Whether to show a progress bar.

    Raises:
        ComponentError: When the model is not such a transformer, or a layer has no MLP.
        ExamplesError: When answers or positions are missing, or the model recalls too few facts.
        SettingsError: When a setting is out of range or unknown.
    """
    _check(corruption, kinds, windows, learning_share, steps, draws)
    target = choose_device(device)
    prompts = Facts.of(facts, target)
    unknown = sorted(set(places) - set(prompts.places))
    if unknown or not places:
        raise SettingsError(f"{(unknown or ['nothing'])[0]!r} is no place; choose among {', '.join(prompts.places)}")
    given = Restoring(model, prompts, target, kinds, places)
    recalled = np.flatnonzero(given.right.cpu().numpy())
    if len(recalled) < LEAST:
        raise ExamplesError(
            f"the model recalls {len(recalled)} of {len(facts)} facts, and at least {LEAST} are needed; give facts "
            f"whose answers it finds, each of one token and with the same space before it as in a text"
        )
    order = np.random.default_rng(seed).permutation(recalled)
    cut = min(max(round(len(order) * learning_share), 1), len(order) - 2)
    learning, scored = (torch.from_numpy(np.sort(part)).to(target) for part in (order[:cut], order[cut:]))
    cells = _cells(given.layers, kinds, windows, places)
    if corruption == "optimal":
        effects = _optimal(given, learning, scored, cells, steps, per_cell, seed, progress)
    else:
        subjects = corrupted_subjects(corruption, given, facts, learning, draws, seed, pairs)
        effects = _effects(given, subjects, scored, cells, progress)
    left_out = np.flatnonzero(~given.right.cpu().numpy())
    return _result(corruption, cells, scored, effects, learning, left_out, seed)


def _check(
    corruption: str, kinds: Sequence[str], windows: Sequence[int], learning_share: float, steps: int, draws: int
) -> None:
    if corruption not in CORRUPTIONS:
        raise SettingsError(f"{corruption!r} is no corruption; choose one of {', '.join(CORRUPTIONS)}")
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise SettingsError(f"{(unknown or ['nothing'])[0]!r} cannot be restored; choose among {', '.join(KINDS)}")
    if not windows or any(window < 1 or window % 2 == 0 for window in windows):
        raise SettingsError(f"windows of {tuple(windows)} layers were given; give odd numbers, such as 1, 5 and 9")
    if not 0 < learning_share < 1 or steps < 1 or draws < 1:
        raise SettingsError(
            f"learning_share is {learning_share}, steps {steps} and draws {draws}; a share between 0 and 1 was "
            f"expected, and at least one step and one draw"
        )


def _cells(layers: int, kinds: Sequence[str], windows: Sequence[int], places: Sequence[str]) -> list["_Placed"]:
    """Return the cells of the grid; windows end at the first and the last layer."""
    return [
        _Placed(Cell(kind, max(layer - window // 2, 0), min(layer + window // 2, layers - 1), place), layer, window)
        for kind in kinds
        for window in windows
        for place in places
        for layer in range(layers)
    ]


@dataclass(frozen=True)
class _Placed:
    """A cell with its middle layer and the size of its window before it was cut off."""

    cell: Cell
    layer: int
    window: int


@dataclass(frozen=True)
class _Effects:
    """(scored facts,) clean and corrupted probabilities, (cells, scored facts) remaining losses, and the constant."""

    clean: Tensor
    corrupted: Tensor
    loss: Tensor
    constant: Tensor | None = None


def _effects(given: Restoring, subjects: Tensor, scored: Tensor, cells: list[_Placed], progress: bool) -> _Effects:
    """Return the effects of all cells, as means over (draws, facts, positions, width) corrupted subjects."""
    clean = given.clean[scored]
    corrupted, loss = torch.zeros_like(clean), torch.zeros(len(cells), len(scored), device=clean.device)
    with progress_bar(total=len(subjects) * len(cells), desc="trace", unit="cell", shown=progress) as bar:
        for drawn in subjects:
            states = given.states(drawn[scored], scored)
            corrupted += given.unpatched(states, scored) / len(subjects)
            for start in range(given.layers):
                numbers = [i for i, placed in enumerate(cells) if placed.cell.first == start]
                if numbers:
                    patched = given.restored(states, scored, [cells[i].cell for i in numbers])
                    loss[numbers] += (clean - patched).clamp_min(0) / len(subjects)
                    bar.update(len(numbers))
    return _Effects(clean, corrupted, loss)


def _optimal(
    given: Restoring,
    learning: Tensor,
    scored: Tensor,
    cells: list[_Placed],
    steps: int,
    per_cell: bool,
    seed: int,
    progress: bool,
) -> _Effects:
    """Return the effects of all cells with trained constants in the place of the subjects."""
    mean, deviation = moments(given, learning)
    train = partial(train_constant, given, learning, deviation=deviation, steps=steps, seed=seed)
    constant = train(cell=None, start=mean, progress=progress)
    shape = (1, len(given.facts), given.embeddings.shape[1], -1)
    if not per_cell:
        return replace(_effects(given, constant.expand(*shape), scored, cells, progress), constant=constant)
    clean, losses = given.clean[scored], []
    states = given.states(constant.expand(*shape)[0][scored], scored)
    for placed in progress_bar(cells, desc="trace", unit="cell", shown=progress):
        own = train(cell=placed.cell, start=constant)
        subjects = own.expand(*shape)[0][scored]
        patched = given.restored(given.states(subjects, scored), scored, [placed.cell])[0]
        losses.append((clean - patched).clamp_min(0))
    return _Effects(clean, given.unpatched(states, scored), torch.stack(losses), constant)


def _result(
    corruption: str,
    cells: list[_Placed],
    scored: Tensor,
    effects: _Effects,
    learning: Tensor,
    left_out: np.ndarray,
    seed: int,
) -> Trace:
    import pandas as pd

    clean, corrupted, loss = (
        value.double().cpu().numpy() for value in (effects.clean, effects.corrupted, effects.loss)
    )
    numbers = scored.cpu().numpy()
    drawn = np.random.default_rng(seed).integers(0, len(numbers), (RESAMPLES, len(numbers)))
    total = (clean - corrupted)[drawn].mean(1)
    rows, parts = [], []
    for placed, own in zip(cells, loss, strict=True):
        low, high = np.percentile(1 - own[drawn].mean(1) / total, INTERVAL)
        place = {"kind": placed.cell.kind, "layer": placed.layer, "window": placed.window, "place": placed.cell.place}
        rows.append({**place, "aie": 1 - own.mean() / (clean - corrupted).mean(), "low": low, "high": high})
        columns = {"fact": numbers, "clean": clean, "corrupted": corrupted, "loss": own}
        parts.append(pd.DataFrame({**place, **columns}))
    return Trace(
        pd.DataFrame(rows),
        pd.concat(parts, ignore_index=True),
        corruption,
        tuple(learning.tolist()),
        tuple(left_out.tolist()),
        None if effects.constant is None else effects.constant.cpu().numpy(),
    )
