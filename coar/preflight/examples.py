"""Checks of the examples: reading one twice gives the same, and they are not calibration examples."""

import logging

import torch

from coar.examples import Examples
from coar.study import Study

log = logging.getLogger(__name__)
READ = 32  # examples that are read twice


def changed_examples(examples: Examples) -> str:
    """Return in words which example is another one when it is read again, or ""."""
    reads = [examples.block(0, READ)[0] for _ in range(2)]
    one, other = (read if isinstance(read, dict) else {"": read} for read in reads)
    for name, value in one.items():
        again = other[name]
        if value.shape != again.shape or not torch.equal(value.nan_to_num(), again.nan_to_num()):
            differing = (value != again).flatten(1).any(1) if value.shape == again.shape else torch.ones(1)
            return (
                f"the inputs{f' {name!r}' if name else ''} of example {int(differing.int().argmax())} differ when they "
                f"are read twice, as with random augmentation, so attributions would belong to no fixed example; give "
                f"the data set the transform of evaluation, or tensors"
            )
    return ""


def warn_of_overlap(study: Study) -> None:
    """Warn when examples of the study are calibration examples of its ablation too."""
    seen = {digest for examples in study.ablation.calibrations() for digest in examples.input_hashes()}
    count = sum(digest in seen for digest in study.examples.input_hashes()) if seen else 0
    if count:
        log.warning(
            "%d of %d examples of the study are calibration examples too, so the replacements of ablated components "
            "depend on the studied examples; give %s(calibration=...) other examples",
            count,
            len(study.examples),
            type(study.ablation).__name__,
        )
