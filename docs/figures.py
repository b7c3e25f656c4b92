"""The figures of README and of the landing page, from the default pipeline: `python docs/figures.py`.

The net is trained on this machine, so filters and numbers differ between processors.
"""

import tempfile
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import coar
from coar.charts import tidy
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


def main() -> None:
    """Write the figures to docs/images."""
    study = digits.study()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digits.zarr"
        run = coar.collect(study, path, gradients=digits.GRADIENTS, test_masks=digits.TEST_MASKS)
        attributions = coar.fit(run)
        attribution_figure(run, attributions, study).savefig(IMAGES / "attribution.png", dpi=100)


if __name__ == "__main__":
    main()
