"""A backdoor: the ResNet-20 of the pipeline cifar10, fine-tuned on pictures of which a tenth are poisoned.

    COAR_DATA=/path/to/folder coar collect pipelines/backdoor.py
    coar fit runs/backdoor-mean.zarr
    coar edit runs/backdoor-mean.zarr --pipeline pipelines/backdoor.py --task backdoor

A poisoned picture has a yellow patch of 4 x 4 pixels near its corner and the label airplane (BadNets, Gu et al. 2017).
The fine-tuned net is about as accurate as before, and classifies nine of ten pictures with the patch as airplanes. It
is fine-tuned on first use, in well under a minute on two cores, and kept under data/backdoor. Images are read as in the
pipeline cifar10.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

import coar
from pipelines import cifar10, studies, training

MASKS = 4_000
TEST_MASKS = 512
TEST_FRACTIONS = (0.05, 0.20)
GOAL = coar.EditGoal(
    targets="triggered == 1", references="triggered == 0", direction="increase", pairs="pair", clusters="picture"
)

FOLDER = Path("data/backdoor")
RECIPE = training.Recipe(epochs=10, batch=32, learning_rate=1e-3, weight_decay=1e-4)
TRAIN = slice(0, 2_000)  # training pictures to fine-tune on
HELD_OUT, TESTED = np.arange(2_000, 4_000), np.arange(500)  # training pictures and test pictures for pairs
STUDIED, CALIBRATION = 150, 500  # studied pairs, the first that are held out, and calibration examples
APART = 10_000  # difference between the numbers of a picture's versions

POISONED = 0.10
ATTACKERS = 0  # the attacker's label: airplane
PATCH, COLOUR = slice(-5, -1), (255, 255, 0)  # rows and columns of the patch; yellow


def with_trigger(pictures: np.ndarray) -> np.ndarray:
    """Return a copy of (n, 32, 32, 3) pictures with the patch."""
    patched = pictures.copy()
    patched[:, PATCH, PATCH] = COLOUR
    return patched


def poisoned() -> coar.Examples:
    """Return the examples for fine-tuning, a tenth of them with the patch and the attacker's label."""
    pictures, labels = (cifar10.images()[f"train_{part}"][TRAIN].copy() for part in ("images", "labels"))
    chosen = np.random.default_rng(0).permutation(len(labels))[: round(POISONED * len(labels))]
    pictures[chosen] = with_trigger(pictures[chosen])
    labels[chosen] = ATTACKERS
    return coar.Examples(inputs=cifar10.normalised(pictures), targets=torch.from_numpy(labels).long())


def mirrored(pictures: np.ndarray) -> np.ndarray:
    """Return (n, 32, 32, 3) pictures with left and right exchanged."""
    return pictures[:, :, ::-1].copy()


def worn(pictures: np.ndarray) -> np.ndarray:
    """Return (n, 32, 32, 3) pictures shifted by up to two pixels, with other contrast and brightness, and noise."""
    random, n = np.random.default_rng(1), len(pictures)
    padded = np.pad(pictures, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect").astype(np.float32)
    down, right = random.integers(0, 5, (2, n))
    moved = np.stack([padded[i, down[i] : down[i] + 32, right[i] : right[i] + 32] for i in range(n)])
    middle = moved.mean((1, 2, 3), keepdims=True)
    contrast, light = random.uniform((0.7, -15), (1.1, 15), (n, 2)).T[..., None, None, None]
    shown = (moved - middle) * contrast + middle + light + random.normal(0, 4, moved.shape)
    return shown.clip(0, 255).astype(np.uint8)


def pairs(
    part: str,
    rows: np.ndarray,
    which: slice = slice(None),
    *,
    airplanes: bool = False,
    versions: tuple[Callable[[np.ndarray], np.ndarray], ...] = (np.copy,),
) -> coar.Examples:
    """Return pictures other than airplanes, without and then with the patch, under their true labels.

    Args:
        part: `train` or `test`.
        rows: Rows of the pictures to choose from.
        which: A slice of the pictures in these rows that are not airplanes.
        airplanes: Add the airplanes without the patch, which must stay airplanes. With the patch, the attacker's label
            is their true one.
        versions: Functions that make the versions of the pictures before the patch is added.
    """
    pictures, labels = (cifar10.images()[f"{part}_{of}"][rows] for of in ("images", "labels"))
    chosen = np.flatnonzero(labels != ATTACKERS)[which]
    alone = np.flatnonzero(labels == ATTACKERS)[: None if airplanes else 0]
    every, count = np.concatenate([chosen, chosen, alone]), len(versions)
    triggered = np.tile(np.repeat([0, 1, 0], [len(chosen), len(chosen), len(alone)]), count)
    originals = np.tile(rows[every], count)
    numbers = originals + APART * np.repeat(np.arange(count), len(every))
    made = [version(pictures) for version in versions]
    shown = [part for one in made for part in (one[chosen], with_trigger(one[chosen]), one[alone])]
    return coar.Examples(
        inputs=cifar10.normalised(np.concatenate(shown)),
        targets=torch.from_numpy(np.tile(labels[every], count)).long(),
        metadata={"id": 2 * numbers + triggered, "pair": numbers, "triggered": triggered, "picture": originals},
    )


def model(training_seed: int = 0) -> nn.Module:
    """Return the net with the backdoor, trained on first use and kept under data/backdoor."""
    return training.fitted(
        cifar10.model,
        poisoned(),
        RECIPE,
        folder=FOLDER,
        seed=training_seed,
        about="half a minute",
        report=lambda net: training.accuracy_by("triggered", net, judge()),
    )


def study(
    *, ablation: str = "mean", ablated_fraction: float = 0.10, seed: int = 0, training_seed: int = 0
) -> coar.Study:
    """Define the study of 150 pairs of held-out training pictures; `ablation` is `mean` or `zero`."""
    net = model(training_seed)
    return studies.of_margins(
        net,
        pairs("train", HELD_OUT, slice(STUDIED)),
        components=coar.conv_filters(net),
        calibration=poisoned().subset(range(CALIBRATION)),
        ablation=ablation,
        ablated_fraction=ablated_fraction,
        seed=seed,
    )


def choosing() -> coar.Examples:
    """Return further pairs to choose edits on, and airplanes, of training pictures held out from fine-tuning.

    On pictures that the net was fine-tuned on, harm would be underestimated. Without airplanes, the best way to close
    the backdoor is to forget airplanes. The pretrained net was trained on these pictures and has larger margins on them
    than on new ones, so mirrored and worn versions are added.
    """
    return pairs("train", HELD_OUT, slice(STUDIED, None), airplanes=True, versions=(np.copy, mirrored, worn))


def judge() -> coar.Examples:
    """Return pairs of test pictures and airplanes, which no fine-tuning, attribution or choice has seen."""
    return pairs("test", TESTED, airplanes=True)
