"""The study of most pipelines: the correct class's margin, with an ablation by its label."""

from torch import nn

import coar


def of_margins(
    model: nn.Module,
    examples: coar.Examples,
    *,
    components: coar.Components,
    calibration: coar.Examples,
    ablation: str,
    ablated_fraction: float,
    seed: int,
) -> coar.Study:
    """Define a study of the correct class's margin; the ablation's constants are computed on `calibration`."""
    return coar.Study(
        model=model,
        examples=examples,
        components=components,
        output=coar.CorrectClassMargin(),
        ablation=coar.choose_ablation(ablation, calibration=calibration),
        sampler=coar.BernoulliSampler(ablated_fraction=ablated_fraction, seed=seed),
    )
