"""The study that most pipelines here define: of the correct class's margin, with ablations by their labels."""

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
    """Define a study of the correct class's margin; constants of the ablation are those of `calibration`."""
    return coar.Study(
        model=model,
        examples=examples,
        components=components,
        output=coar.CorrectClassMargin(),
        ablation=coar.choose_ablation(ablation, calibration=calibration),
        sampler=coar.BernoulliSampler(ablated_fraction=ablated_fraction, seed=seed),
    )
