"""Ridge on outputs under masks, for unknowns from which the weights follow, at several penalties in turn.

With A for the map from unknowns to outputs y, and S for the units of the penalties, the solution at a penalty is

    (A'A + penalty S)^-1 A' y = S^-1 A' (A S^-1 A' + penalty)^-1 y.

Where outputs are fewer than unknowns, the second system is solved, by one Lanczos process for all penalties. A product
with A S^-1 A' is a sum over components, so each tile of masks is made once for it, and serves the processes of all
systems, which go side by side. Otherwise conjugate gradients solve the first system, at each penalty.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from coar.regression.informed.rows import Rows, Tile
from coar.regression.krylov import LanczosBasis, conjugate_gradients

TOLERANCE, STEPS = 1e-3, 100  # relative size of the residual, and iterations


@dataclass(frozen=True)
class System:
    """Outputs that weights explain, and unknowns that weights are linear in, those of a component in its own alone.

    Attributes:
        rows: All rows.
        folds: The folds whose outputs are explained.
        left: The outputs of all rows, block by block.
        weights: (examples, components) weights of a fold and some components, from the unknowns of these.
        transposed: The transpose of `weights`: from (examples, components) values of a fold and some components.
        scale: The diagonal of A'A, in the shape of the unknowns, whose last axis is components.
        units: S, in the same shape.
    """

    rows: Rows
    folds: Collection[int]
    left: Sequence[Tensor]
    weights: Callable[[int, slice, Tensor], Tensor]
    transposed: Callable[[int, slice, Tensor], Tensor]
    scale: Tensor
    units: Tensor

    def outputs(self) -> Tensor:
        """Return all outputs as one vector, zeros for folds that are not explained."""
        parts = zip(self.rows.blocks, self.left, strict=True)
        return torch.cat([(part if block.fold in self.folds else part * 0).flatten() for block, part in parts])

    def predict(self, tile: Tile, unknowns: Tensor, folds: Collection[int], out: Sequence[Tensor]) -> None:
        """Add what the unknowns of a tile predict in some folds."""
        for fold in folds:
            tile.predict(fold, self.weights(fold, tile.some, unknowns), out)

    def adjoint(self, tile: Tile, values: Sequence[Tensor]) -> Tensor:
        """Return A' values, for the unknowns of a tile."""
        of_folds = (self.transposed(fold, tile.some, tile.adjoint(fold, values)) for fold in self.folds)
        return reduce(torch.add, of_folds)


Solver = Callable[[float, Sequence[int]], list[Tensor]]  # from a penalty, the unknowns of some of the systems


def solver_of(systems: Sequence[System]) -> Solver:
    """Return the solver of systems of the same rows; it is fastest for penalties in descending order."""
    fewer = sum(part.numel() for part in systems[0].left) < systems[0].scale.numel()
    return _by_outputs(systems) if fewer else _by_unknowns(systems)


def predictions(systems: Sequence[System], unknowns: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return what the unknowns of each system predict in all rows, block by block."""
    rows = systems[0].rows
    found = [[torch.zeros_like(part) for part in rows.outputs()] for _ in systems]
    for tile in rows.tiles(rows.folds()):
        for system, own, out in zip(systems, unknowns, found, strict=True):
            system.predict(tile, own[..., tile.some], rows.folds(), out)
    return found


def _by_unknowns(systems: Sequence[System]) -> Solver:
    def solve(penalty: float, which: Sequence[int]) -> list[Tensor]:
        return [_solved(systems[i], penalty) for i in which]

    return solve


def _solved(system: System, penalty: float) -> Tensor:
    ridge, rows = penalty * system.units, system.rows

    def normal(unknowns: Tensor) -> Tensor:
        predicted = [torch.zeros_like(part) for part in system.left]
        for tile in rows.tiles(system.folds):
            system.predict(tile, unknowns[..., tile.some], system.folds, predicted)
        return _adjoints([system], [predicted])[0] + ridge * unknowns

    right = _adjoints([system], [system.left])[0]
    found, _ = conjugate_gradients(
        lambda column: normal(column.view_as(right)).reshape(-1, 1),
        right.reshape(-1, 1),
        tolerance=TOLERANCE,
        steps=STEPS,
        inverse=(1 / (system.scale + ridge)).reshape(-1, 1),
    )
    return found.view_as(right)


def _by_outputs(systems: Sequence[System]) -> Solver:
    rows, everyone = systems[0].rows, range(len(systems))
    starts = [system.outputs()[:, None] for system in systems]
    processes = [LanczosBasis(start, min(STEPS, len(start))) for start in starts]

    def times(behind: Sequence[int]) -> list[Tensor]:
        given = [rows.parts(processes[i].last[:, 0]) for i in behind]
        found = [torch.zeros_like(processes[i].last) for i in behind]
        out = [rows.parts(image[:, 0]) for image in found]
        for tile in rows.tiles(rows.folds()):
            for i, values, image in zip(behind, given, out, strict=True):
                system = systems[i]
                unknowns = system.adjoint(tile, values) / system.units[..., tile.some]
                system.predict(tile, unknowns, system.folds, image)
        return found

    def solve(penalty: float, which: Sequence[int]) -> list[Tensor]:
        at = torch.tensor([penalty], dtype=torch.float64, device=starts[0].device)
        while behind := [i for i in everyone if not _solves(processes[i], at)]:
            for i, image in zip(behind, times(behind), strict=True):
                processes[i].extend(image)
        chosen = [systems[i] for i in which]
        values = [processes[i].combine(processes[i].ritz().solution(at)[0])[:, 0] for i in which]
        found = _adjoints(chosen, [rows.parts(own) for own in values])
        return [own / system.units for own, system in zip(found, chosen, strict=True)]

    return solve


def _solves(process: LanczosBasis, at: Tensor) -> bool:
    return process.full or (process.steps > 0 and float(process.ritz().left(at)) <= TOLERANCE)


def _adjoints(systems: Sequence[System], values: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return A' values of each system."""
    found = [torch.empty_like(system.scale) for system in systems]
    for tile in systems[0].rows.tiles({fold for system in systems for fold in system.folds}):
        for system, own, out in zip(systems, values, found, strict=True):
            out[..., tile.some] = system.adjoint(tile, own)
    return found
