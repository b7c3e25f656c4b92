"""Ridge on outputs under masks, for unknowns from which the weights follow, at several penalties in turn.

With A for the map from unknowns to outputs y, and S for the units of the penalties, the solution at a penalty is

    (A'A + penalty S)^-1 A' y = S^-1 A' (A S^-1 A' + penalty)^-1 y.

Where outputs are fewer than unknowns, the second system is solved, by one Lanczos process for all penalties. Otherwise
conjugate gradients solve the first one, at each penalty.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coar.regression.informed.rows import Rows
from coar.regression.krylov import Lanczos

TOLERANCE, STEPS = 1e-3, 100  # relative size of the residual, and iterations


@dataclass(frozen=True)
class System:
    """Outputs that weights explain, and the unknowns that weights are linear in.

    Attributes:
        rows: Which outputs, and their masks.
        left: The outputs, block by block.
        weights: (examples, components) weights of a fold from unknowns.
        transposed: Unknowns from (examples, components) values of a fold: the transpose of `weights`.
        scale: The diagonal of A'A, in the shape of the unknowns.
        units: S, in the shape of the unknowns, or one number.
    """

    rows: Rows
    left: Sequence[Tensor]
    weights: Callable[[int, Tensor], Tensor]
    transposed: Callable[[int, Tensor], Tensor]
    scale: Tensor
    units: Tensor

    def solver(self) -> Callable[[float], Tensor]:
        """Return the map from a penalty to the unknowns; it is fastest for penalties in descending order."""
        fewer = sum(values.numel() for values in self.left) < self.scale.numel()
        return self._by_outputs() if fewer else self._by_unknowns()

    def _by_unknowns(self) -> Callable[[float], Tensor]:
        right = self._adjoint(self.left)

        def solve(penalty: float) -> Tensor:
            ridge = penalty * self.units

            def normal(unknowns: Tensor) -> Tensor:
                image = ridge * unknowns
                for fold in self.rows.folds():
                    image += self.transposed(fold, self.rows.gram(fold, self.weights(fold, unknowns)))
                return image

            return conjugate_gradients(normal, right, 1 / (self.scale + ridge))

        return solve

    def _by_outputs(self) -> Callable[[float], Tensor]:
        shapes = [values.shape for values in self.left]
        sizes = [values.numel() for values in self.left]

        def unknowns_of(values: Tensor) -> Tensor:
            parts = [part.view(shape) for part, shape in zip(torch.split(values, sizes), shapes, strict=True)]
            return self._adjoint(parts) / self.units

        def times(values: Tensor) -> Tensor:
            unknowns = unknowns_of(values[:, 0])
            return _column(self.rows.predictions(lambda fold: self.weights(fold, unknowns)))

        process = Lanczos(times, _column(self.left), min(STEPS, sum(sizes)))

        def solve(penalty: float) -> Tensor:
            at = torch.tensor([penalty], dtype=torch.float64)
            while not process.full:
                if process.steps and float(process.ritz().left(at)) <= TOLERANCE:
                    break
                process.step()
            return unknowns_of(process.combine(process.ritz().solution(at)[0])[:, 0])

        return solve

    def _adjoint(self, values: Sequence[Tensor]) -> Tensor:
        found = torch.zeros_like(self.scale)
        for fold in self.rows.folds():
            found += self.transposed(fold, self.rows.adjoint_of(fold, values))
        return found


def conjugate_gradients(normal: Callable[[Tensor], Tensor], right: Tensor, inverse: Tensor) -> Tensor:
    """Solve `normal(x) = right` for a positive definite `normal`, preconditioned by the diagonal `inverse`."""
    x = torch.zeros_like(right)
    residual = right.clone()
    step = inverse * residual
    size = first = float((residual * step).sum())
    for _ in range(STEPS):
        if size <= TOLERANCE**2 * first:
            break
        image = normal(step)
        length = size / float((step * image).sum())
        x += length * step
        residual -= length * image
        steep = inverse * residual
        size, before = float((residual * steep).sum()), size
        step = steep + size / before * step
    return x


def _column(values: Sequence[Tensor]) -> Tensor:
    """Return the entries of all blocks as one column."""
    return torch.cat([part.flatten() for part in values])[:, None]
