"""Waterbirds (Sagawa et al. 2020): birds on backgrounds that mostly agree with the kind of bird.

    export COAR_WATERBIRDS=/path/to/waterbird_complete95_forest2water2
    export COAR_WATERBIRDS_WEIGHTS=/path/to/checkpoint.safetensors     # optional
    coar collect pipelines/waterbirds.py --gradients 96
    coar fit runs/waterbirds-mean.zarr
    coar edit runs/waterbirds-mean.zarr --pipeline pipelines/waterbirds.py --task group

The folder is the unpacked archive of the WILDS benchmark or of group_DRO, with `metadata.csv` and the pictures.
The checkpoint is the state dict of a torchvision ResNet-50 with two classes, landbird and waterbird. Without one, the
head alone is trained on features of the ImageNet weights, in a few minutes on two cores, and the net is kept
under data/waterbirds. `COAR_WATERBIRDS_MODEL` names another ResNet of torchvision's, such as resnet18.
"""

import csv
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
    targets='group == "waterbird on land"',
    references='group != "waterbird on land"',
    direction="increase",
    groups="group",
)

WANTED = "Waterbirds: metadata.csv and the pictures, as waterbird_complete95_forest2water2.tar.gz unpacks"
COLUMNS = {"img_filename": (), "y": (0, 1), "split": (0, 1, 2), "place": (0, 1)}  # with their allowed numbers
BIRDS, PLACES = ("landbird", "waterbird"), ("land", "water")

PREPARE = transforms.Compose(  # as in group_DRO, the authors' code
    [
        transforms.Resize((256, 256)),
        transforms.CenterCrop(224),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
)


def collection() -> photographs.Collection:
    """Return the pictures in the folder that COAR_WATERBIRDS names; raise `PipelineError` if they are damaged."""
    return read(photographs.folder("COAR_WATERBIRDS", WANTED))


@cache
def read(root: Path) -> photographs.Collection:
    """Return the pictures in a folder."""
    file = root / "metadata.csv"
    rows = list(csv.DictReader(photographs.read_lines(file)))
    found = list(rows[0]) if rows else []
    lacking = [column for column in COLUMNS if column not in found]
    if lacking:
        raise coar.errors.PipelineError(
            f"{file} has no column {', '.join(lacking)}, it has {', '.join(found) or 'none'}; set COAR_WATERBIRDS to "
            f"the folder with {WANTED}"
        )
    labels, splits, places = (
        photographs.numbers([row[column] for row in rows], allowed, f"{file}, column {column},")
        for column, allowed in COLUMNS.items()
        if allowed
    )
    return photographs.Collection(
        files=[root / row["img_filename"] for row in rows],
        labels=labels,
        groups=np.array([f"{BIRDS[bird]} on {PLACES[place]}" for bird, place in zip(labels, places, strict=True)]),
        splits=splits,
        prepare=PREPARE,
    )


def model(training_seed: int = 0) -> nn.Module:
    """Return the ResNet of the checkpoint, or one with a head trained on first use."""
    return photographs.classifier("waterbirds", collection(), seed=training_seed)


def study(
    *, ablation: str = "mean", ablated_fraction: float = 0.05, seed: int = 0, training_seed: int = 0
) -> coar.Study:
    """Define the study of up to 75 validation pictures of each group; `ablation` is `mean` or `zero`."""
    options = {"ablation": ablation, "ablated_fraction": ablated_fraction, "seed": seed}
    return photographs.study(model(training_seed), collection(), **options)


def published() -> coar.Study:
    """Define the study of the published attributions, of the split that COAR_WATERBIRDS_PUBLISHED names."""
    return photographs.published("waterbirds", model(), collection())


def choosing() -> coar.Examples:
    """Return up to 100 further validation pictures of each group, to choose edits on."""
    return collection().examples("validation", of_each=photographs.CHOOSING)


def judge() -> coar.Examples:
    """Return up to 250 test pictures of each group, which no training, attribution or choice has seen."""
    return collection().examples("test", of_each=photographs.JUDGED)
