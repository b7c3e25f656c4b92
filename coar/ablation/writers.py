"""Means and standard deviations of the outputs of a decoder's writers, the constants of its edges."""

import torch
from torch import Tensor, nn

from coar.ablation.padding import Padding
from coar.components.table import Components
from coar.errors import AblationError
from coar.examples import Examples, call_model, device_of
from coar.gates.edges import edge_gate


def writer_moments(
    model: nn.Module, components: Components, calibration: Examples, *, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Return (components.width,) means and standard deviations over examples and their positions from the second on.

    The first token of a text is never ablated, and the outputs of writers there differ from those elsewhere.

    Args:
        model: The model in evaluation mode.
        components: Edges, or writers for all their edges.
        calibration: The examples.
        batch_size: Most examples per forward pass.

    Raises:
        AblationError: When there is no second position, or an output of a writer is not finite.
    """
    device = device_of(model)
    gate = edge_gate(model, components, torch.zeros(components.width, device=device))
    count, sums = 0, torch.zeros(0)
    gate.install()
    try:
        for start in range(0, len(calibration), batch_size):
            inputs = calibration.block(start, start + batch_size)[0]
            padding = Padding(model, inputs)
            with torch.inference_mode():
                gate.record(True)
                call_model(model, inputs)
                gate.record(False)
                written, later = gate.recorded()
            tokens = padding.at("", later.shape)
            counted = later if tokens is None else later & tokens.to(later.device)
            counted = counted[:, counted.shape[1] - written.shape[1] :]
            count += int(counted.sum())
            here = torch.stack([_sum(written, counted, power) for power in (1, 2)])
            sums = here if start == 0 else sums + here
        gate.confirm()
    finally:
        gate.restore()
    _check(count, sums)
    mean, square = (sums / count).flatten(1)[:, : components.width]
    return mean.float().cpu(), (square - mean.square()).clamp_min(0).sqrt().float().cpu()


def _sum(written: Tensor, counted: Tensor, power: int) -> Tensor:
    """Return the (writers, width) float64 sum of powers of the outputs at the positions that count."""
    total = torch.zeros(written.shape[2:], dtype=torch.float64, device=written.device)
    for row, there in zip(written, counted, strict=True):
        total += row[there].double().pow(power).sum(0)
    return total


def _check(count: int, sums: Tensor) -> None:
    if count == 0:
        raise AblationError(
            "no calibration text has a second token; means of writers leave out the first token, which is never "
            "ablated: give longer texts"
        )
    if not sums.isfinite().all():
        raise AblationError(
            "the outputs of the model's writers for some calibration example are not finite, so they have no mean; "
            "leave out such examples, or use float32"
        )
