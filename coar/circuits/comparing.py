"""Methods side by side: circuits of several sizes by each, trained in the same way and judged on held-out examples."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coar.circuits.choosing import circuit
from coar.circuits.circuit import Circuit
from coar.circuits.evaluator import CircuitEvaluator
from coar.circuits.faithfulness import faithfulness
from coar.circuits.scores import check_sizes, circuit_scores, method_of
from coar.examples import Examples
from coar.store.run import Run

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class MethodComparison:
    """Circuits of several methods and sizes.

    Attributes:
        table: One row per method and size: `method`, `edges` requested, `kept`, `kl`, `output`, `faithfulness`,
            `agreement` and `complement_kl` on held-out examples; `passes` and `seconds` of the scores, and
            `training_seconds` of the constants.
        circuits: The circuits, by method and requested size.
    """

    table: "pd.DataFrame"
    circuits: dict[tuple[str, int], Circuit]


def compare_methods(
    evaluator: CircuitEvaluator,
    held_out: Examples,
    methods: Mapping[str, Mapping[str, Any]],
    sizes: Sequence[int],
    *,
    constant_steps: int = 40,
    refinement: int = 0,
    run: Run | None = None,
    progress: bool = True,
) -> MethodComparison:
    """Find circuits by several methods on an evaluator's examples and judge them on others.

    The constants of a smaller circuit start from those of the next larger one of the same method.

    Args:
        evaluator: Runs the learning examples.
        held_out: The examples to judge on.
        methods: Settings of each method by its label.
        sizes: Numbers of edges.
        constant_steps: Steps that train the constants of each circuit, see `coar.circuit`.
        refinement: Rounds of refinement of each circuit.
        run: A run of the study, whose fits are methods too.
        progress: Show progress bars.

    Raises:
        SettingsError: When there are fewer edges, or a method or setting is unknown.
    """
    import pandas as pd

    check_sizes(sizes, evaluator.study.components)
    for method, settings in methods.items():
        method_of(method, settings, run)
    rows, found = [], {}
    for method, settings in methods.items():
        scores = circuit_scores(evaluator.study, method, run=run, evaluator=evaluator, progress=progress, **settings)
        larger: Circuit | None = None
        for size in sorted(sizes, reverse=True):
            began = time.monotonic()
            larger = circuit(
                scores,
                edges=size,
                constant_steps=constant_steps,
                refinement=refinement,
                start=larger,
                progress=progress,
            )
            took = time.monotonic() - began
            judged = faithfulness(larger, evaluator, held_out)
            found[method, size] = larger
            row: dict[str, Any] = {"method": method, "edges": size, "kept": len(larger)}
            row |= {name: getattr(judged, name) for name in ("kl", "output", "faithfulness", "agreement")}
            row |= {"complement_kl": judged.complement_kl, "passes": scores.passes, "seconds": scores.seconds}
            rows.append(row | {"training_seconds": took})
    return MethodComparison(pd.DataFrame(rows), found)
