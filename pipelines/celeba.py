"""CelebA (Liu et al. 2015): blond hair or not, in a data set where few men are blond (Sagawa et al. 2020).

    export COAR_CELEBA=/path/to/celeba
    export COAR_CELEBA_WEIGHTS=/path/to/checkpoint.safetensors         # optional
    coar collect pipelines/celeba.py --gradients 96
    coar fit runs/celeba-mean.zarr
    coar edit runs/celeba-mean.zarr --pipeline pipelines/celeba.py --task group

The folder holds `list_attr_celeba.txt`, `list_eval_partition.txt` and `img_align_celeba`, as the authors publish them.
The checkpoint is the state dict of a torchvision ResNet-50 with two classes, not blond and blond. Without one, the head
alone is trained on features of the ImageNet weights, in a few minutes on two cores, and the net is kept under
data/celeba. `COAR_CELEBA_MODEL` names another ResNet of torchvision's, such as resnet18.
"""

from functools import cache
from pathlib import Path

import numpy as np
from torch import nn
from torchvision import transforms

import coar
from pipelines import photographs

MASKS = 5_000
TEST_MASKS = 500
TEST_FRACTIONS = (0.10,)
GOAL = coar.EditGoal(
    targets='group == "blond man"', references='group != "blond man"', direction="increase", groups="group"
)

ATTRIBUTES, PARTITION, PICTURES = "list_attr_celeba.txt", "list_eval_partition.txt", "img_align_celeba"
WANTED = f"CelebA: {ATTRIBUTES}, {PARTITION} and {PICTURES}"
HAIR, SEXES = ("not blond", "blond"), ("woman", "man")

PREPARE = transforms.Compose(  # as in group_DRO, the code of Sagawa et al.
    [
        transforms.CenterCrop(178),
        transforms.Resize((224, 224)),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
)


def collection() -> photographs.Collection:
    """Return the pictures in the folder that COAR_CELEBA names; raise `PipelineError` if they are damaged."""
    return read(photographs.folder("COAR_CELEBA", WANTED))


@cache
def read(root: Path) -> photographs.Collection:
    """Return the pictures in a folder."""
    lines = [line.split() for line in photographs.read_lines(root / ATTRIBUTES)]
    names = lines[1] if len(lines) > 1 else []  # the first line is the number of pictures
    lacking = [name for name in ("Blond_Hair", "Male") if name not in names]
    if lacking:
        raise coar.errors.PipelineError(
            f"{root / ATTRIBUTES} has no attribute {', '.join(lacking)} in its second line; set COAR_CELEBA to the "
            f"folder with {WANTED}"
        )
    rows = {row[0]: dict(zip(names, row[1:], strict=False)) for row in lines[2:] if row}
    blond, man = (
        (photographs.numbers([row.get(name) for row in rows.values()], (-1, 1), f"{root / ATTRIBUTES}, {name},") + 1)
        // 2
        for name in ("Blond_Hair", "Male")
    )
    parts = dict(row for row in (line.split() for line in photographs.read_lines(root / PARTITION)) if len(row) == 2)
    return photographs.Collection(
        files=[root / PICTURES / name for name in rows],
        labels=blond,
        groups=np.array([f"{HAIR[b]} {SEXES[m]}" for b, m in zip(blond, man, strict=True)]),
        splits=photographs.numbers([parts.get(name) for name in rows], (0, 1, 2), f"{root / PARTITION}, the split,"),
        prepare=PREPARE,
    )


def model(training_seed: int = 0) -> nn.Module:
    """Return the ResNet of the checkpoint, or one with a head trained on first use."""
    return photographs.classifier("celeba", collection(), seed=training_seed)


def study(
    *, ablation: str = "mean", ablated_fraction: float = 0.05, seed: int = 0, training_seed: int = 0
) -> coar.Study:
    """Define the study of up to 75 validation pictures of each group; `ablation` is `mean` or `zero`."""
    options = {"ablation": ablation, "ablated_fraction": ablated_fraction, "seed": seed}
    return photographs.study(model(training_seed), collection(), **options)


def published() -> coar.Study:
    """Define the study of the published attributions, of the split that COAR_CELEBA_PUBLISHED names."""
    return photographs.published("celeba", model(), collection())


def choosing() -> coar.Examples:
    """Return up to 100 further validation pictures of each group, to choose edits on."""
    return collection().examples("validation", of_each=photographs.CHOOSING)


def judge() -> coar.Examples:
    """Return up to 250 test pictures of each group, which no training, attribution or choice has seen."""
    return collection().examples("test", of_each=photographs.JUDGED)
