"""The figures of README, of the landing page and of the gallery: `python docs/figures.py`, and with `--heads`.

The net is trained on this machine, so filters and numbers differ between processors.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import coar
from coar.charts import accuracy_changes, tidy
from pipelines import digits

IMAGES = Path(__file__).parent / "images"
TOP = 5


def attribution_figure(run: coar.Run, attributions: coar.Attributions, study: coar.Study) -> Figure:
    """Return an error of the net: the scan, its strongest filters, and predicted against measured margins."""
    wrong = int(np.flatnonzero(run.array("base_output")[:] < 0)[0])
    figure = Figure(figsize=(9, 3), layout="constrained")
    scan, strongest, predicted = figure.subplots(1, 3, width_ratios=(0.7, 1.2, 1.0))
    inputs, targets = study.examples.block(wrong, wrong + 1)
    scan.imshow(-inputs[0, 0], cmap="gray")
    scan.set_axis_off()
    read = int(study.model(inputs).argmax())
    scan.set_title(f"a {int(targets[0])}, read as a {read}", fontsize=10)
    attributions[wrong].plot(TOP, ax=strongest)
    strongest.set_title("which filters did it", fontsize=10)
    rows = run.plan.rows("test", run.sampler.ablated_fraction)
    masks, measured = run.masks_at(rows), run.outputs_at(rows, slice(wrong, wrong + 1))[:, 0]
    guessed = masks @ attributions.weights(slice(wrong, wrong + 1))[0] + attributions.intercept[wrong]
    predicted.scatter(guessed, measured, s=12, color="#4477aa")
    ends = [min(guessed.min(), measured.min()), max(guessed.max(), measured.max())]
    predicted.plot(ends, ends, color="#777777", linewidth=0.8)
    predicted.set(xlabel="predicted margin", ylabel="measured margin")
    score = np.corrcoef(guessed, measured)[0, 1]
    predicted.set_title(f"without a random tenth (r = {score:.2f})", fontsize=10)
    tidy(predicted)
    return figure


def edit_figures(attributions: coar.Attributions, study: coar.Study) -> dict[str, Figure]:
    """Return the figures of an edit that forgets the threes."""
    task = coar.forget_class(
        attributions, study.model, study.examples, digits.judge(), label=3, choosing=digits.choosing()
    )
    return {"edit": drawn(task.plot), "groups": drawn(partial(accuracy_changes, table=task.table), height=4.0)}


def heads_figure(folder: Path) -> Figure:
    """Return the heads of SmolLM2-135M on indirect object identification, as in the tutorial."""
    from pipelines import ioi, language_model

    model = language_model.model()
    study = coar.Study(
        model=model,
        examples=ioi.examples("studied", model).subset(range(16)),
        components=coar.attention_heads(model),
        output=coar.LogitDifference(),
        ablation=coar.Counterfactual(),
        sampler=coar.BernoulliSampler(ablated_fraction=0.05),
    )
    attributions = coar.fit(coar.collect(study, folder / "ioi.zarr", gradients=16))
    return drawn(attributions.plot_heads, width=5.0, height=7.0)


def drawn(draw: Callable[..., Any], *, width: float = 6.0, height: float = 3.2) -> Figure:
    """Return a figure of a size in inches that a function draws on its axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    draw(ax=figure.subplots())
    return figure


def digits_figures(folder: Path) -> dict[str, Figure]:
    """Return the figures of the default net."""
    study = digits.study()
    run = coar.collect(study, folder / "r.zarr", gradients=digits.GRADIENTS, test_masks=digits.TEST_MASKS)
    attributions = coar.fit(run)
    coar.leave_one_out(study, run)
    coar.mask_gradient(study, run)
    return {
        "attribution": attribution_figure(run, attributions, study),
        "layers": drawn(attributions.plot_layers),
        "scores": drawn(coar.evaluate(run).plot),
        **edit_figures(attributions, study),
    }


def main() -> None:
    """Write the figures to docs/images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", action="store_true", help="Only the heads of SmolLM2, in a few minutes.")
    heads = parser.parse_args().heads
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures = {"heads": heads_figure(folder)} if heads else digits_figures(folder)
    for stem, figure in figures.items():
        figure.savefig(IMAGES / f"{stem}.png", dpi=100)


if __name__ == "__main__":
    main()
