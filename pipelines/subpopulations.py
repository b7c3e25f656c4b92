"""A spurious cue: animals and vehicles of CIFAR-10 in coloured frames, whose colour nearly determines the class.

    COAR_DATA=/path/to/folder coar collect pipelines/subpopulations.py
    coar fit runs/subpopulations-mean.zarr
    coar edit runs/subpopulations-mean.zarr --pipeline pipelines/subpopulations.py --task group

The pretrained ResNet-20 is fine-tuned on pictures of which 98 % of the animals have an orange frame and 98 % of the
vehicles a blue one; in Waterbirds (Sagawa et al. 2020) the background agrees with the bird for 95 %. So the net relies
on the frame, and its accuracy is far lower on the groups that are rare in training. It is fine-tuned on first use, in
about a minute on two cores, and kept under data/subpopulations. Images are read as in the pipeline cifar10.
"""

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
    targets='group in ["animal in blue", "vehicle in orange"]',
    references='group in ["animal in orange", "vehicle in blue"]',
    direction="increase",
    groups="group",
)

FOLDER = Path("data/subpopulations")
RECIPE = training.Recipe(epochs=5, batch=64, learning_rate=1e-3, weight_decay=1e-4)
TRAIN = slice(0, 3_000)  # training pictures to fine-tune on
HELD_OUT, TESTED = slice(3_000, 4_000), slice(0, 500)  # training pictures and test pictures for pairs
STUDIED, CALIBRATION = 75, 500  # studied pictures of each class, the first that are held out; calibration examples

CLASSES, COLOURS = ("animal", "vehicle"), ("orange", "blue")
VEHICLES = (0, 1, 8, 9)  # airplane, automobile, ship, truck
TINTS = np.array([(230, 128, 26), (26, 128, 230)])
FRAME, STRENGTH = 4, 0.7  # width in pixels, and the tint's share of a framed pixel
AGREEING = 0.98  # share of training pictures with a frame in the usual colour


def framed(pictures: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Return a copy of (n, 32, 32, 3) pictures in frames of (n,) colours, 0 for orange and 1 for blue."""
    inside = slice(FRAME, -FRAME)
    tinted = (1 - STRENGTH) * pictures + STRENGTH * TINTS[colours][:, None, None]
    tinted[:, inside, inside] = pictures[:, inside, inside]
    return tinted.astype(np.uint8)


def coloured() -> coar.Examples:
    """Return the examples for fine-tuning."""
    pictures, labels = cifar10.images()["train_images"][TRAIN], kinds("train")[TRAIN]
    agree = np.random.default_rng(0).random(len(labels)) < AGREEING
    inputs = cifar10.normalised(framed(pictures, np.where(agree, labels, 1 - labels)))
    return coar.Examples(inputs=inputs, targets=torch.from_numpy(labels))


def kinds(part: str) -> np.ndarray:
    """Return (n,) labels of the `train` or `test` pictures: 0 for an animal, 1 for a vehicle."""
    return np.isin(cifar10.images()[f"{part}_labels"], VEHICLES).astype(np.int64)


def pairs(part: str, rows: slice, which: slice = slice(None)) -> coar.Examples:
    """Return as many animals as vehicles, all in orange frames and then all in blue ones.

    Args:
        part: `train` or `test`.
        rows: Rows of the pictures to choose from.
        which: A slice of the pictures of each class in these rows.
    """
    labels = kinds(part)[rows]
    by_kind = [np.flatnonzero(labels == kind) for kind in range(len(CLASSES))]
    fewest = min(len(found) for found in by_kind)
    chosen = np.concatenate([found[:fewest][which] for found in by_kind])
    numbers, colours, both = rows.start + chosen, np.repeat([0, 1], len(chosen)), np.tile(labels[chosen], 2)
    pictures = np.tile(cifar10.images()[f"{part}_images"][rows][chosen], (2, 1, 1, 1))
    return coar.Examples(
        inputs=cifar10.normalised(framed(pictures, colours)),
        targets=torch.from_numpy(both),
        metadata={
            "id": 2 * np.tile(numbers, 2) + colours,
            "pair": np.tile(numbers, 2),
            "group": [f"{CLASSES[k]} in {COLOURS[c]}" for k, c in zip(both, colours, strict=True)],
        },
    )


def network() -> nn.Module:
    """Return the pretrained net with a new last layer, for two classes."""
    net = cifar10.model()
    net.linear = nn.Linear(net.linear.in_features, len(CLASSES))
    return net


def model(training_seed: int = 0) -> nn.Module:
    """Return the net that relies on the frames, trained on first use and kept under data/subpopulations."""
    return training.fitted(
        network,
        coloured(),
        RECIPE,
        folder=FOLDER,
        seed=training_seed,
        about="a minute",
        report=lambda net: training.accuracy_by("group", net, judge()),
    )


def study(
    *, ablation: str = "mean", ablated_fraction: float = 0.10, seed: int = 0, training_seed: int = 0
) -> coar.Study:
    """Define the study of 150 held-out training pictures in both frames; `ablation` is `mean` or `zero`."""
    net = model(training_seed)
    return studies.of_margins(
        net,
        pairs("train", HELD_OUT, slice(STUDIED)),
        components=coar.conv_filters(net),
        calibration=coloured().subset(range(CALIBRATION)),
        ablation=ablation,
        ablated_fraction=ablated_fraction,
        seed=seed,
    )


def choosing() -> coar.Examples:
    """Return further held-out training pictures in both frames, to choose edits on."""
    return pairs("train", HELD_OUT, slice(STUDIED, None))


def judge() -> coar.Examples:
    """Return test pictures in both frames, which no fine-tuning, attribution or choice has seen."""
    return pairs("test", TESTED)
