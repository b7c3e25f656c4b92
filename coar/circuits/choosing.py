"""The choice of a circuit: the connected edges with the largest scores, and constants trained for them."""

import numpy as np
import torch
from torch import Tensor

from coar.circuits.circuit import Circuit, table_name
from coar.circuits.constants import Draws, train_constants
from coar.circuits.refining import refine
from coar.circuits.scores import CircuitScores, check_sizes, top
from coar.errors import CircuitError
from coar.progress import progress_bar
from coar.weights import weights_fingerprint

COMPARED = 16  # examples on which initial constants are compared


def circuit(
    scores: CircuitScores,
    *,
    edges: int,
    constant_steps: int = 100,
    refinement: int = 0,
    start: Circuit | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Circuit:
    """Choose a circuit of at most so many edges from scores.

    Edges with the largest scores are taken until `edges` of them lie on a path from the embedding to the output; others
    are left out. Then the constants of all writers are trained for this circuit, on the learning examples, and a
    refinement may swap edges, as far as real passes of these examples show a smaller divergence.

    Args:
        scores: The scores.
        edges: The most edges.
        constant_steps: Steps that train constants, of 8 examples each; 0 keeps the initial ones. Ablations by
            activations of other examples have none.
        refinement: Rounds of the refinement.
        start: A circuit whose constants may be the initial ones, such as a larger circuit of the same scores. Those of
            the ablation and those that the method trained along are tried too, on 16 examples, and the best are taken.
        seed: Seed of the order of the examples.
        progress: Show a progress bar.

    Raises:
        SettingsError: When there are fewer edges.
        CircuitError: When no edge lies on a path, the study's components are not a whole table, or `start` is of
            another model.
    """
    check_sizes([edges], scores.components)
    evaluator = scores.evaluator
    table = table_name(evaluator.study.model, scores.components)
    keep = largest_connected(scores, edges)
    constants = starting_constants(scores, keep, start, seed)
    train = constant_steps if evaluator.by_constants else 0
    with progress_bar(total=train + refinement, desc=f"{edges} edges", unit="step", shown=progress) as bar:
        if train:
            constants = train_constants(
                evaluator, keep, start=constants, steps=train, seed=seed, on_step=lambda: bar.update(1)
            )
        if refinement:
            keep, constants = refine(
                evaluator, keep, constants, rounds=refinement, seed=seed, on_round=lambda: bar.update(1)
            )
    chosen = keep.cpu().bool().numpy()
    return Circuit(
        edges=tuple(name for name, kept in zip(scores.components.names, chosen, strict=True) if kept),
        table=table,
        size=len(chosen),
        weights=weights_fingerprint(evaluator.study.model),
        ablation=type(evaluator.study.ablation).__name__,
        method=scores.method,
        constants=constants.float().cpu().numpy() if evaluator.by_constants else None,
    )


def largest_connected(scores: CircuitScores, edges: int) -> Tensor:
    """Return the (components,) mask of the most edges, in the order of their scores, of which `edges` are connected.

    Raises:
        CircuitError: When no edge is on a path from the embedding to the output.
    """
    graph, low, high = scores.evaluator.graph, 0, len(scores.values)
    while low < high:  # the connected part of a larger set is larger
        middle = (low + high + 1) // 2
        if int(graph.connected(top(scores, middle)).sum()) <= edges:
            low = middle
        else:
            high = middle - 1
    keep = graph.connected(top(scores, low)).float()
    if not bool(keep.any()):
        raise CircuitError(
            f"the {low} edges with the largest scores by {scores.method!r} include no path of at most {edges} edges "
            f"from the embedding to the output; ask for more edges, or use another method"
        )
    return keep


def starting_constants(scores: CircuitScores, keep: Tensor, start: Circuit | None = None, seed: int = 0) -> Tensor:
    """Return the (components.width,) constants to begin with, those with the smallest divergence on some examples.

    They are the ablation's, those that the method trained along at this size, or those of another circuit.

    Raises:
        CircuitError: When the other circuit is of another model.
    """
    evaluator, found = scores.evaluator, [scores.evaluator.constants]
    own = scores.constants_at(int(keep.sum()))
    if own is not None:
        found.append(torch.from_numpy(own).to(evaluator.device))
    if start is not None and start.constants is not None:
        start.components(evaluator.study.model)
        found.append(torch.from_numpy(start.constants).to(evaluator.device))
    if len(found) == 1:
        return found[0]
    rows = Draws(len(evaluator), seed)(COMPARED)
    losses = [evaluator.measure(keep, constants=constants, rows=rows).kl.mean() for constants in found]
    return found[int(np.argmin(np.nan_to_num(losses, nan=np.inf)))]
