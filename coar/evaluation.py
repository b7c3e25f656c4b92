"""Scores of how well attributions predict outputs under held-out masks."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from coar.attributions import Attributions
from coar.charts import distributions, html_table
from coar.errors import IncompleteRunError, RunError
from coar.sampling import Split
from coar.store.fits import fit_names
from coar.store.run import Run

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

BLOCK = 512  # examples scored at a time
RESAMPLES = 2000
INTERVAL = (2.5, 97.5)
SCORES = ("pearson", "spearman", "explained_variance", "slope")


@dataclass(frozen=True)
class Evaluation:
    """Held-out scores of the fits and baselines of one run.

    Attributes:
        table: One row per fit and ablated fraction: mean Pearson correlation over examples with its bootstrap interval
            (`low`, `high`: 95 % over examples), median, 10th percentile; mean Spearman correlation; mean explained
            variance, 1 - squared error / variance; mean calibration slope of outputs on predictions, 1 when effects
            have the right size; `undefined`: number of examples left out because an output never varies.
        per_example: The same scores per example.
        ablated_fraction: The ablated fraction of the training masks.
        seed: Seed of the bootstrap.
    """

    table: "pd.DataFrame"
    per_example: "pd.DataFrame"
    ablated_fraction: float
    seed: int = 0

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the distribution of held-out correlations over examples, a line per fit; return the axes.

        The ablated fraction is the one nearest to that of the training masks.

        Args:
            ax: Matplotlib axes; by default those of a new figure.
        """
        fractions = self.table["ablated_fraction"].unique()
        main = min(fractions, key=lambda fraction: abs(fraction - self.ablated_fraction))
        scores = self.per_example[self.per_example["ablated_fraction"] == main].dropna(subset="pearson")
        values = {name: scores.loc[scores["fit"] == name, "pearson"] for name in dict.fromkeys(self.table["fit"])}
        return distributions(ax, values, xlabel=f"held-out correlation at fraction {main:g}")

    def _repr_html_(self) -> str:
        return html_table(self.table)

    def paired(self, fit: str, other: str) -> "pd.DataFrame":
        """Compare two fits example by example: the mean difference of their scores, fit minus other.

        Each example is its own control, so the interval is that of the difference, and narrower than those of the two
        means. It says how the difference varies over examples, not over masks or runs.

        Args:
            fit: Name of a fit in the evaluation.
            other: Name of another.

        Returns:
            One row per ablated fraction and score: mean difference with its bootstrap interval (`low`, `high`: 95 %
            over examples), `better`: share of the examples where the fit's score is larger, and `examples`: number of
            examples where both scores are defined.

        Raises:
            RunError: When the evaluation has no fit of that name.
        """
        import pandas as pd

        known = self.table["fit"].tolist()
        for name in (fit, other):
            if name not in known:
                raise RunError(f"the evaluation has no fit {name!r} (fits: {', '.join(dict.fromkeys(known))})")
        columns = ["ablated_fraction", "example"]
        first, second = (
            self.per_example[self.per_example["fit"] == name].set_index(columns)[list(SCORES)] for name in (fit, other)
        )
        rows = []
        for fraction, differences in (first - second).groupby(level="ablated_fraction"):
            for measure in SCORES:
                values = differences[measure].dropna().to_numpy()
                low, high = _interval(values, self.seed)
                found = {"mean": values.mean() if len(values) else np.nan, "low": low, "high": high}
                found |= {"better": (values > 0).mean() if len(values) else np.nan, "examples": len(values)}
                rows.append({"ablated_fraction": fraction, "score": measure, **found})
        return pd.DataFrame(rows)


def evaluate(run: Run, *, fits: list[str] | None = None, seed: int = 0) -> Evaluation:
    """Score fits against outputs under held-out test masks, at every ablated fraction with at least two test masks.

    Args:
        run: A complete run with test masks.
        fits: Names of the fits to score; by default all, baselines included.
        seed: Seed of the bootstrap.

    Raises:
        IncompleteRunError: When units are missing, or no ablated fraction has two test masks.
        RunError: When the run has no attributions.
    """
    import pandas as pd

    run.require_complete()
    names = fits if fits is not None else fit_names(run)
    if not names:
        raise RunError(f"{run.path} holds no attributions to evaluate; run 'coar fit' first")
    fractions = [f for f in run.plan.fractions("test") if run.plan.count("test", f) >= 2]
    if not fractions:
        raise IncompleteRunError(f"{run.path} has fewer than two test masks; collect with --test-masks 500")
    parts, rows = [], []
    for name in names:
        attributions = Attributions.open(run, name)
        for fraction in fractions:
            scores = score(attributions, run, fraction)
            scores.insert(0, "ablated_fraction", fraction)
            scores.insert(0, "fit", name)
            parts.append(scores)
            rows.append(
                {
                    "fit": name,
                    "masks": attributions.fit.masks,
                    "gradients": attributions.fit.gradients,
                    "ablated_fraction": fraction,
                    "test_masks": run.plan.count("test", fraction),
                    **_summary(scores, seed),
                }
            )
    return Evaluation(pd.DataFrame(rows), pd.concat(parts, ignore_index=True), run.sampler.ablated_fraction, seed)


def score(attributions: Attributions, run: Run, ablated_fraction: float, *, split: Split = "test") -> "pd.DataFrame":
    """Return one row of scores per example, over the run's masks of a split at one ablated fraction."""
    import pandas as pd
    from scipy.stats import rankdata

    rows = run.plan.rows(split, ablated_fraction)
    masks = run.masks_at(rows)
    parts = []
    for start in range(0, run.n_examples, BLOCK):
        examples = slice(start, min(start + BLOCK, run.n_examples))
        truth = run.outputs_at(rows, examples).astype(np.float64)
        weights = attributions.weights(examples).astype(np.float64)
        predicted = masks @ weights.T + attributions.intercept[examples]
        parts.append(
            pd.DataFrame(
                {
                    "example": np.arange(examples.start, examples.stop),
                    "pearson": correlation(predicted, truth),
                    "spearman": correlation(rankdata(predicted, axis=0), rankdata(truth, axis=0)),
                    "explained_variance": 1 - ((truth - predicted) ** 2).mean(0) / _positive(truth.var(0)),
                    "slope": _covariance(predicted, truth) / _positive(predicted.var(0)),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the Pearson correlation of matching columns of (rows, columns) arrays, NaN where one is constant."""
    scale: np.ndarray = np.sqrt(_positive(a.var(0)) * _positive(b.var(0)))
    ratio: np.ndarray = _covariance(a, b) / scale
    return ratio


def _covariance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    product: np.ndarray = ((a - a.mean(0)) * (b - b.mean(0))).mean(0)
    return product


def _positive(values: np.ndarray) -> np.ndarray:
    return np.where(values > 1e-20, values, np.nan)


def _summary(scores: "pd.DataFrame", seed: int) -> dict[str, float | int]:
    defined = scores.dropna(subset=["pearson"])
    pearson = defined["pearson"].to_numpy()
    low, high = _interval(pearson, seed)
    tenth = float(np.percentile(pearson, 10)) if len(pearson) else np.nan
    return {
        "pearson": float(defined["pearson"].mean()),
        "low": float(low),
        "high": float(high),
        "median": float(defined["pearson"].median()),
        "tenth_percentile": tenth,
        "spearman": float(defined["spearman"].mean()),
        "explained_variance": float(defined["explained_variance"].mean()),
        "slope": float(defined["slope"].mean()),
        "undefined": len(scores) - len(defined),
    }


def _interval(values: np.ndarray, seed: int) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean of (examples,) values, NaN without values."""
    if not len(values):
        return np.nan, np.nan
    draws = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(values[draws].mean(1), INTERVAL)
    return float(low), float(high)
