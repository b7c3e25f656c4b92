"""ImageNet's validation pictures and a ResNet-50 (He et al. 2015), 22,720 filters.

    export COAR_IMAGENET=/path/to/imagenet                                  # with val/n01440764/*.JPEG, or a .beton
    export COAR_IMAGENET_RESNET50_WEIGHTS=/path/to/checkpoint.safetensors  # optional
    coar collect pipelines/imagenet_resnet50.py --gradients 96
    coar fit runs/imagenet_resnet50-mean.zarr
    coar edit runs/imagenet_resnet50-mean.zarr --pipeline pipelines/imagenet_resnet50.py --task fix

Classes are in the order of the folders' names. Without a checkpoint, which is the state dict of a torchvision
ResNet-50, torchvision fetches its own weights (IMAGENET1K_V1). The components are those of Shah et al. (2024): the
filters of all convolutions but those of the shortcuts. `COAR_IMAGENET_RESNET50_MODEL` names another ResNet of
torchvision's, such as resnet18, and `COAR_IMAGENET_CLASSES` another number of classes than 1,000. A .beton file, with
the fields `image` and `label`, is read by ffcv: pip install '.[ffcv]'.
"""

import coar
from pipelines import imagenet, photographs

MASKS = 5_000
TEST_MASKS = 500
TEST_FRACTIONS = (0.05,)

NAME = "imagenet_resnet50"


def kind() -> str:
    """Return the name of the ResNet."""
    return photographs.architecture(f"COAR_{NAME.upper()}", photographs.RESNETS, usual="resnet50")


def examples(part: imagenet.Part) -> coar.Examples:
    """Return pictures: up to 256 `studied`, 300 for `calibration`, 1,000 for `choosing`, 2,000 to `judge`."""
    return imagenet.validation(imagenet.preset(kind())).examples(part)


def study(*, ablation: str = "mean", ablated_fraction: float = 0.10, seed: int = 0) -> coar.Study:
    """Define the study of up to 256 pictures; `ablation` is `mean` or `zero`."""
    studied, net = examples("studied"), imagenet.model(NAME, kind())
    return coar.Study(
        model=net,
        examples=studied,
        components=coar.conv_filters(net, exclude="*.downsample.*"),
        output=coar.CorrectClassMargin(),
        ablation=coar.choose_ablation(ablation, calibration=examples("calibration")),
        sampler=coar.BernoulliSampler(ablated_fraction=ablated_fraction, seed=seed),
    )


def published() -> coar.Study:
    """Define the study of the published attributions, of all pictures in the order of their files."""
    net = imagenet.model(NAME, kind())
    return imagenet.published(net, kind(), coar.conv_filters(net, exclude="*.downsample.*"), step=1)


def choosing() -> coar.Examples:
    """Return further pictures to choose edits on."""
    return examples("choosing")


def judge() -> coar.Examples:
    """Return pictures that no attribution and no choice has seen."""
    return examples("judge")
