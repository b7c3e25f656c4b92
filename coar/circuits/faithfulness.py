"""The judgement of circuits on held-out examples: divergence, output, agreement, completeness, and MIB's two areas."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from coar.circuits.circuit import Circuit
from coar.circuits.evaluator import CircuitEvaluator, Measured
from coar.circuits.scores import CircuitScores, check_sizes, top
from coar.errors import CircuitError
from coar.examples import Examples
from coar.progress import progress_bar

if TYPE_CHECKING:
    import pandas as pd

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # sizes of MIB, of all edges


@dataclass(frozen=True)
class Faithfulness:
    """How much a circuit computes like the model, on average over examples.

    Attributes:
        edges: Number of edges.
        kl: KL divergence of the circuit's from the model's next token, in nats.
        output: The study's output under the circuit.
        full_output: The output of the whole model.
        empty_output: The output with all edges ablated.
        faithfulness: (output - empty_output) / (full_output - empty_output); NaN where the two are equal.
        agreement: Share of positions at which circuit and model have the same most likely token.
        accuracy: Share of examples whose output is above 0; None where the output's sign does not show correctness.
        complement_kl: KL divergence of the model without the circuit's edges: a complete circuit has a large one.
        complement_output: The output of the model without the circuit's edges.
    """

    edges: int
    kl: float
    output: float
    full_output: float
    empty_output: float
    faithfulness: float
    agreement: float
    accuracy: float | None
    complement_kl: float
    complement_output: float


@dataclass(frozen=True, eq=False)
class FaithfulnessCurve:
    """How faithful the top of a ranking is, by the number of edges, as in the benchmark MIB.

    Mueller et al. (2025, "MIB: a mechanistic interpretability benchmark") take ten shares of all edges, 0.1 to 100 %.
    With f the faithfulness, CPR is the area under f and CMD the area under |1 - f|, over shares, by trapezoids.

    Attributes:
        method: Label of the method.
        table: One row per size: `share`, `edges`, `kl`, `output` and `faithfulness`.
        cpr: Circuit performance ratio; it is not bounded.
        cmd: Circuit-model distance; 0 is best.
    """

    method: str
    table: "pd.DataFrame"
    cpr: float
    cmd: float


def faithfulness(circuit: Circuit, evaluator: CircuitEvaluator, examples: Examples | None = None) -> Faithfulness:
    """Judge a circuit on examples.

    Args:
        circuit: The circuit.
        evaluator: Runs the model that the circuit is of, such as `scores.evaluator`.
        examples: Held-out examples; by default those of the evaluator, on which a circuit looks better than it is.

    Raises:
        CircuitError: When the circuit is of another model or table, or of another kind of ablation.
    """
    judged = evaluator if examples is None else evaluator.on(examples)
    table = circuit.components(judged.study.model)
    if table != judged.study.components:
        raise CircuitError(
            f"the circuit is of {table!r}, and the study has {judged.study.components!r}; judge it with a study of its "
            f"own table"
        )
    if (circuit.constants is not None) != judged.by_constants:
        raise CircuitError(
            f"the circuit was found under {circuit.ablation}, and the study ablates by "
            f"{type(judged.study.ablation).__name__}; judge it with a study of its own ablation"
        )
    constants = None if circuit.constants is None else torch.from_numpy(circuit.constants).to(judged.device)
    keep = torch.from_numpy(circuit.mask(table)).float().to(judged.device)
    full, empty = (
        judged.measure(mask, constants=constants) for mask in (torch.ones_like(keep), torch.zeros_like(keep))
    )
    own, complement = (judged.measure(mask, constants=constants) for mask in (keep, 1 - keep))
    margin = judged.study.output.hard_and_smooth() is not None
    ends = float(full.output.mean()), float(empty.output.mean())
    return Faithfulness(
        edges=len(circuit),
        kl=float(own.kl.mean()),
        output=float(own.output.mean()),
        full_output=ends[0],
        empty_output=ends[1],
        faithfulness=_share(own, *ends),
        agreement=float(own.agreement.mean()),
        accuracy=float((own.output > 0).mean()) if margin else None,
        complement_kl=float(complement.kl.mean()),
        complement_output=float(complement.output.mean()),
    )


def faithfulness_curve(
    scores: CircuitScores,
    examples: Examples | None = None,
    *,
    shares: Sequence[float] = SHARES,
    progress: bool = True,
) -> FaithfulnessCurve:
    """Judge the top of a ranking at several sizes, without any training for one of them.

    Constants are those that the method trained along at the nearest size, or the ablation's; those of the model without
    edges are always the ablation's.

    Args:
        scores: The scores.
        examples: Held-out examples; by default the learning examples.
        shares: Sizes as shares of all edges, ascending to 1.
        progress: Show a progress bar.

    Raises:
        SettingsError: When a share is not above 0 and at most 1.
    """
    import pandas as pd

    judged = scores.evaluator if examples is None else scores.evaluator.on(examples)
    sizes = [max(round(share * len(scores.values)), 1 if share > 0 else 0) for share in shares]
    check_sizes(sizes, scores.components)
    everything = judged.everything()
    full, empty = (float(judged.measure(mask).output.mean()) for mask in (everything, 0 * everything))
    rows = []
    for share, size in progress_bar(list(zip(shares, sizes, strict=True)), desc="sizes", unit="size", shown=progress):
        own = scores.constants_at(size)
        constants = None if own is None else torch.from_numpy(own).to(judged.device)
        measured = judged.measure(top(scores, size), constants=constants)
        value = _share(measured, full, empty)
        kl, output = float(measured.kl.mean()), float(measured.output.mean())
        rows.append({"share": share, "edges": size, "kl": kl, "output": output, "faithfulness": value})
    table = pd.DataFrame(rows)
    found, at = table["faithfulness"].to_numpy(), table["share"].to_numpy()
    return FaithfulnessCurve(
        method=scores.method,
        table=table,
        cpr=float(np.trapezoid(found, at)),
        cmd=float(np.trapezoid(np.abs(1 - found), at)),
    )


def _share(measured: Measured, full: float, empty: float) -> float:
    """Return how far the mean output is on the way from the empty to the full model."""
    if full == empty:
        return float("nan")
    return (float(measured.output.mean()) - empty) / (full - empty)
