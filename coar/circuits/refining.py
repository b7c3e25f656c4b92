"""The refinement of a circuit by swaps of edges, each round verified by real passes."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from coar.circuits.constants import Draws, train_constants
from coar.circuits.evaluator import CircuitEvaluator

SWAPS = 8  # edges that the first rounds swap; half as many after a round without success
TRIED = 2  # edges tried alone for each that may be added, and for each that may be removed
STEPS = 10  # of training constants after a swap
JUDGED = 64  # most examples of a gradient or a real pass


def refine(
    evaluator: CircuitEvaluator,
    keep: Tensor,
    constants: Tensor,
    *,
    rounds: int,
    seed: int = 0,
    on_round: Callable[[], object] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Return a circuit of at most as many edges, and constants, with a KL divergence that is no larger.

    A round takes the gradient by all gates under the circuit. It shortlists the connected additions with the largest
    gradients and the removals with the smallest, since constants that were trained for a circuit make the sign of a
    gradient unreliable. Real passes of the same 64 learning examples try each alone. The best are swapped, constants
    are trained for the result on all, and it is kept if the mean divergence of the 64 falls.

    Args:
        evaluator: Runs the learning examples.
        keep: (components,) mask of a connected circuit.
        constants: (components.width,) constants.
        rounds: Number of rounds.
        seed: Seed of the order of the examples.
        on_round: Called after each round.
    """
    rows, swaps = Draws(len(evaluator), seed)(JUDGED), SWAPS
    best = _loss(evaluator, keep, constants, rows)
    for number in range(rounds):
        tried = _swapped(evaluator, keep, constants, rows, swaps)
        values = constants
        if evaluator.by_constants and bool(tried.any()):
            values = train_constants(evaluator, tried, start=constants, steps=STEPS, seed=seed + number)
        loss = _loss(evaluator, tried, values, rows)
        if bool(tried.any()) and loss < best:
            keep, constants, best = tried, values, loss
        else:
            swaps = max(swaps // 2, 1)
        on_round()
    return keep, constants


def _swapped(evaluator: CircuitEvaluator, keep: Tensor, constants: Tensor, rows: np.ndarray, swaps: int) -> Tensor:
    """Return the circuit without its most dispensable edges and with as many useful ones."""
    given = constants if evaluator.by_constants else None
    sizes = evaluator.gradients(keep, constants=given, rows=rows).by_keep.abs()
    open_to = evaluator.graph.attachable(keep) & (keep == 0)
    most = min(swaps, int(open_to.sum()), int(keep.sum()) - 1)
    additions = sizes.masked_fill(~open_to, -1).topk(min(TRIED * most, int(open_to.sum()))).indices
    removals = sizes.masked_fill(keep == 0, torch.inf).topk(min(TRIED * most, int(keep.sum())), largest=False).indices
    tried = keep.clone()
    tried[_best(evaluator, keep, constants, rows, removals)[:most]] = 0
    tried[_best(evaluator, keep, constants, rows, additions)[:most]] = 1
    return evaluator.graph.connected(tried).float()


def _best(evaluator: CircuitEvaluator, keep: Tensor, constants: Tensor, rows: np.ndarray, changes: Tensor) -> Tensor:
    """Return edges in the order of the divergence after each alone is added or removed, the smallest first."""
    losses = []
    for change in changes:
        changed = keep.clone()
        changed[change] = 1 - changed[change]
        losses.append(_loss(evaluator, changed, constants, rows))
    return changes[torch.tensor(losses).argsort().to(changes.device)]


def _loss(evaluator: CircuitEvaluator, keep: Tensor, constants: Tensor, rows: np.ndarray) -> float:
    given = constants if evaluator.by_constants else None
    return float(evaluator.measure(keep, constants=given, rows=rows).kl.mean())
