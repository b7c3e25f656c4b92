"""The choice of a circuit: the connected edges with the largest scores, and constants trained for them."""

import torch
from torch import Tensor

from coar.circuits.circuit import Circuit, table_name
from coar.circuits.constants import train_constants
from coar.circuits.refining import refine
from coar.circuits.scores import CircuitScores, check_sizes, top
from coar.errors import CircuitError
from coar.progress import progress_bar
from coar.weights import weights_fingerprint


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
        constant_steps: Steps that train constants, of 16 examples each; 0 keeps the constants of the method or the
            ablation. Ablations by activations of other examples have none.
        refinement: Rounds of the refinement.
        start: A circuit whose constants are the initial ones, such as a larger circuit of the same scores; by default
            those of the method, or of the ablation.
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
    constants = starting_constants(scores, start)
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


def starting_constants(scores: CircuitScores, start: Circuit | None = None) -> Tensor:
    """Return the (components.width,) constants of a circuit, of the method that trained some, or of the ablation.

    Raises:
        CircuitError: When the circuit is of another model.
    """
    if start is not None and start.constants is not None:
        start.components(scores.evaluator.study.model)
        return torch.from_numpy(start.constants).to(scores.evaluator.device)
    if scores.constants is None:
        return scores.evaluator.constants
    return torch.from_numpy(scores.constants).to(scores.evaluator.device)
