"""Scikit-learn's digits, 1,797 real scans of 8 x 8 pixels, and a small residual net; the default pipeline.

    coar collect pipelines/digits.py
    coar fit runs/digits-mean.zarr
    coar edit runs/digits-mean.zarr --pipeline pipelines/digits.py --task forget --label 3

The net is trained on first use, in well under a minute on two cores, and kept under data/digits. Nothing is downloaded.
"""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

import coar

GRADIENTS = 64  # about as accurate as ridge from 3,000 masks, see digits.json
TEST_MASKS = 100
COMPARISON = Path(__file__).with_suffix(".json")  # written by benchmarks/default_job.py

FOLDER = Path("data/digits")
TRAIN, STUDIED = 1_000, 400  # of 1,797; the other 397 are for judging
EPOCHS, BATCH, LEARNING_RATE = 12, 50, 0.02


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, which is a 1 x 1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map (rows, inputs, height, width) to (rows, outputs, height / stride, width / stride)."""
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitsNet(nn.Module):
    """336 convolution filters in a stem and three residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = Block(16, 16, 1)
        self.layer2 = Block(16, 32, 2)
        self.layer3 = Block(32, 64, 2)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map (rows, 1, 8, 8) images to (rows, 10) logits."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


@cache
def split() -> dict[str, coar.Examples]:
    """Split the scans into `train`, `studied` (for attributions) and `judge` (for edits), each with all ten classes."""
    data = load_digits()
    images = ((data.images / 16 - 0.3) / 0.38).astype(np.float32)
    train, rest = train_test_split(np.arange(len(images)), train_size=TRAIN, stratify=data.target, random_state=0)
    studied, judge = train_test_split(rest, train_size=STUDIED, stratify=data.target[rest], random_state=0)
    return {
        name: coar.Examples(
            inputs=torch.from_numpy(images[rows, None]),
            targets=torch.from_numpy(data.target[rows]),
            metadata={"id": rows},
        )
        for name, rows in (("train", train), ("studied", studied), ("judge", judge))
    }


def train(seed: int = 0) -> nn.Module:
    """Train the net; the same seed gives the same weights on the same machine."""
    examples = split()["train"]
    x, y = examples.block(0, len(examples))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitsNet()
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4)
        steps = EPOCHS * len(y) // BATCH
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=10 * LEARNING_RATE, total_steps=steps)
        model.train()
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(y)).split(BATCH):
                optimizer.zero_grad()
                functional.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
                schedule.step()
    return model.eval()


def model(seed: int = 0) -> nn.Module:
    """Return the net, trained on first use and kept under data/digits."""
    file = FOLDER / f"net-{seed}.safetensors"
    if not file.exists():
        coar.save_weights(train(seed), file)
    return coar.load_weights(DigitsNet(), file).eval()


def study(*, ablation: str = "mean", ablated_fraction: float = 0.10, seed: int = 0) -> coar.Study:
    """Define the study; `ablation` is `mean` or `zero`."""
    net = model()
    return coar.Study(
        model=net,
        examples=split()["studied"],
        components=coar.conv_filters(net),
        output=coar.CorrectClassMargin(),
        ablation=coar.choose_ablation(ablation, calibration=split()["train"]),
        sampler=coar.BernoulliSampler(ablated_fraction=ablated_fraction, seed=seed),
    )


def choosing() -> coar.Examples:
    """Return training scans to choose edits on, in addition to the studied ones."""
    return split()["train"]


def judge() -> coar.Examples:
    """Return examples that no attribution and no choice has seen."""
    return split()["judge"]
