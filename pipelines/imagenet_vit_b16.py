"""ImageNet's validation pictures and a ViT-B/16 (Dosovitskiy et al. 2020), 82,944 rows of its weights.

    export COAR_IMAGENET=/path/to/imagenet                                  # with val/n01440764/*.JPEG, or a .beton
    export COAR_IMAGENET_VIT_B16_WEIGHTS=/path/to/checkpoint.safetensors   # optional
    coar collect pipelines/imagenet_vit_b16.py
    coar fit runs/imagenet_vit_b16-zero.zarr

The components are those of Shah et al. (2024): the rows of all linear layers but the last, and of the weight that makes
queries, keys and values. These rows can only be zeroed and have no mask gradients. With
COAR_IMAGENET_VIT_B16_COMPONENTS=heads the components are the attention heads and the feed-forward blocks' neurons,
which have mask gradients. `COAR_IMAGENET_VIT_B16_MODEL` names another ViT, such as vit_b_32. Everything else is as in
imagenet_resnet50.
"""

import os

from torch import nn
from torchvision.models import get_model_weights, list_models

import coar
from pipelines import imagenet, photographs

MASKS = 5_000
TEST_MASKS = 500
TEST_FRACTIONS = (0.05,)

NAME = "imagenet_vit_b16"
VITS = [name for name in list_models(include="vit_*") if "IMAGENET1K_V1" in get_model_weights(name).__members__]


def kind() -> str:
    """Return the name of the ViT."""
    return photographs.architecture(f"COAR_{NAME.upper()}", VITS, usual="vit_b_16")


def components(net: nn.Module) -> coar.Components:
    """Return rows of weights as published, or heads and neurons."""
    chosen = os.environ.get("COAR_IMAGENET_VIT_B16_COMPONENTS", "rows")
    if chosen == "rows":
        return coar.parameter_slices(net, "*.in_proj_weight") + coar.neurons(net, exclude="heads.head")
    if chosen == "heads":
        return coar.attention_heads(net) + coar.input_features(net, include="*.mlp.3")
    raise coar.errors.SettingsError(f"COAR_IMAGENET_VIT_B16_COMPONENTS is {chosen!r}; choose one of rows, heads")


def examples(part: imagenet.Part) -> coar.Examples:
    """Return pictures: up to 256 `studied`, 1,000 for `choosing`, 2,000 to `judge`."""
    return imagenet.validation(imagenet.preset(kind())).examples(part)


def study(*, ablation: str = "zero", ablated_fraction: float = 0.10, seed: int = 0) -> coar.Study:
    """Define the study of up to 256 pictures; `ablation` is `zero`."""
    if ablation != "zero":
        raise coar.errors.SettingsError(
            f"ablation {ablation!r} has no meaning for rows of a parameter and attention heads; choose zero"
        )
    studied, net = examples("studied"), imagenet.model(NAME, kind())
    return coar.Study(
        model=net,
        examples=studied,
        components=components(net),
        output=coar.CorrectClassMargin(),
        ablation=coar.ZeroWeight(),
        sampler=coar.BernoulliSampler(ablated_fraction=ablated_fraction, seed=seed),
    )


def published() -> coar.Study:
    """Define the study of the published attributions, of every tenth picture in the order of their files."""
    net = imagenet.model(NAME, kind())
    return imagenet.published(net, kind(), components(net), step=10)


def choosing() -> coar.Examples:
    """Return further pictures to choose edits on."""
    return examples("choosing")


def judge() -> coar.Examples:
    """Return pictures that no attribution and no choice has seen."""
    return examples("judge")
