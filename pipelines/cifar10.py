"""CIFAR-10 and the pretrained ResNet-20 of He et al. (2015), 688 filters.

    COAR_DATA=/path/to/folder coar collect pipelines/cifar10.py
    coar fit runs/cifar10-mean.zarr
    coar edit runs/cifar10-mean.zarr --pipeline pipelines/cifar10.py --task forget --label 3

Images and weights come from the folder that COAR_DATA names (`cifar10_subset.npz` with `test_images`, `test_labels`,
`train_images` and `train_labels`, and `cifar10_resnet20.safetensors`). Without that variable they are fetched to
data/cifar10: the images by torchvision, the weights from Yerlan Idelbayev's pytorch_resnet_cifar10 (BSD-2-Clause).

    export COAR_CIFAR10_PUBLISHED_WEIGHTS=/path/to/state_dict.pt
    coar import cifar.pt --setup cifar10 --pipeline pipelines/cifar10.py

The attributions that Shah et al. (2024) publish are of another net, of nine convolutions of 256 filters, on all test
images. Its file holds a pickled module, which is not read here: load it where you trust it, with the authors' code, and
save its state dict.
"""

import os
import zipfile
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import download_url

import coar
from pipelines import studies

Colours = tuple[float, float, float]

MASKS = 4_000
TEST_MASKS = 512
TEST_FRACTIONS = (0.05, 0.20)

FOLDER = Path("data/cifar10")
WEIGHTS = "https://github.com/akamaster/pytorch_resnet_cifar10/raw/master/pretrained_models"
FILES = {20: "resnet20-12fca82f.th", 44: "resnet44-014dd654.th"}  # by number of layers
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PUBLISHED = "COAR_CIFAR10_PUBLISHED_WEIGHTS"
PUBLISHED_MEAN, PUBLISHED_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
STUDIED, CALIBRATION = 256, 500
CHOOSING = slice(CALIBRATION, 3_000)  # of the training pictures


class Block(nn.Module):
    """Two 3 x 3 convolutions and an identity shortcut that halves the picture and pads channels with zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.padding = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Map (rows, inputs, height, width) to (rows, outputs, height / stride, width / stride)."""
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.padding:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return functional.relu(x + y)


class CifarResNet(nn.Module):
    """The ResNet of 6 n + 2 layers for 32 x 32 pictures (He et al. 2015, section 4.2)."""

    def __init__(self, blocks: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*[Block(16, 16, 1) for _ in range(blocks)])
        self.layer2 = nn.Sequential(Block(16, 32, 2), *[Block(32, 32, 1) for _ in range(blocks - 1)])
        self.layer3 = nn.Sequential(Block(32, 64, 2), *[Block(64, 64, 1) for _ in range(blocks - 1)])
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map (rows, 3, 32, 32) pictures to (rows, classes) logits."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class OneStage(nn.Module):
    """The net of the published attributions (Shah et al. 2024): a convolution and four blocks, all of one width.

    No block halves the picture, so shortcuts are identities. Means over 8 x 8 pixels are the features of the last
    layer. Blocks have a second name, `block0` to `block3`, as in the state dict of the published net.
    """

    def __init__(self, width: int = 256, blocks: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer = nn.Sequential(*[Block(width, width, 1) for _ in range(blocks)])
        for number, block in enumerate(self.layer):
            setattr(self, f"block{number}", block)
        self.linear = nn.Linear(16 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map (rows, 3, 32, 32) pictures to (rows, classes) logits."""
        x = self.layer(functional.relu(self.bn1(self.conv1(x))))
        return self.linear(functional.avg_pool2d(x, 8).flatten(1))


@cache
def images() -> dict[str, np.ndarray]:
    """Return `test_images`, `train_images` (n, 32, 32, 3) uint8 and their labels."""
    if "COAR_DATA" in os.environ:
        return read_subset(Path(os.environ["COAR_DATA"]) / "cifar10_subset.npz")
    sets = {name: CIFAR10(str(FOLDER), train=name == "train", download=True) for name in ("train", "test")}
    arrays = {f"{name}_images": data.data for name, data in sets.items()}
    return arrays | {f"{name}_labels": np.asarray(data.targets) for name, data in sets.items()}


def read_subset(file: Path) -> dict[str, np.ndarray]:
    """Read images and labels from a file; raise `PipelineError` when they are missing."""
    needed = {f"{name}_{part}" for name in ("train", "test") for part in ("images", "labels")}
    try:
        with np.load(file, allow_pickle=False) as data:
            found = dict(data)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise coar.errors.PipelineError(
            f"cannot read {file} in the folder COAR_DATA ({error}); correct COAR_DATA, or unset it to fetch the images"
        ) from None
    if needed - found.keys():
        raise coar.errors.PipelineError(f"{file} lacks {', '.join(sorted(needed - found.keys()))}; fetch it again")
    return found


def examples(name: str, rows: slice, mean: Colours = MEAN, std: Colours = STD) -> coar.Examples:
    """Return rows of the `train` or `test` set, normalised as the weights expect."""
    labels = images()[f"{name}_labels"][rows]
    numbers = np.arange(len(images()[f"{name}_labels"]))[rows]
    inputs = normalised(images()[f"{name}_images"][rows], mean, std)
    return coar.Examples(inputs=inputs, targets=torch.from_numpy(labels).long(), metadata={"id": numbers})


def normalised(pictures: np.ndarray, mean: Colours = MEAN, std: Colours = STD) -> Tensor:
    """Turn (n, 32, 32, 3) bytes into (n, 3, 32, 32) inputs as the weights expect them."""
    scaled = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255
    return (scaled - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def model(layers: int = 20) -> nn.Module:
    """Return the pretrained ResNet of 20 or 44 layers."""
    if layers not in FILES:
        raise coar.errors.SettingsError(f"there are no weights for {layers} layers; choose 20 or 44")
    if "COAR_DATA" in os.environ:
        file, prefix = Path(os.environ["COAR_DATA"]) / f"cifar10_resnet{layers}.safetensors", ""
    else:
        file, prefix = FOLDER / FILES[layers], "module."
        if not file.exists():
            download_url(f"{WEIGHTS}/{file.name}", str(FOLDER), file.name)
    return coar.load_weights(CifarResNet(blocks=(layers - 2) // 6), file, prefix=prefix).eval()


def study(*, ablation: str = "mean", ablated_fraction: float = 0.10, seed: int = 0, layers: int = 20) -> coar.Study:
    """Define the study of the first 256 test pictures; `ablation` is `mean` or `zero`, `layers` 20 or 44."""
    net = model(layers)
    return studies.of_margins(
        net,
        examples("test", slice(0, STUDIED)),
        components=coar.conv_filters(net),
        calibration=examples("train", slice(CALIBRATION)),
        ablation=ablation,
        ablated_fraction=ablated_fraction,
        seed=seed,
    )


def published() -> coar.Study:
    """Define the study of the published attributions, of all test pictures in the order of CIFAR-10's file.

    Raises:
        PipelineError: When COAR_CIFAR10_PUBLISHED_WEIGHTS names no state dict of the published net.
    """
    file = os.environ.get(PUBLISHED)
    if not file:
        raise coar.errors.PipelineError(
            f"the published attributions of CIFAR-10 are of a net whose weights are not fetched; set {PUBLISHED} to "
            f"its state dict, as .pt or safetensors"
        )
    net = coar.load_weights(OneStage(), file).eval()
    return coar.Study(
        model=net,
        examples=examples("test", slice(None), PUBLISHED_MEAN, PUBLISHED_STD),
        components=coar.conv_filters(net),
        output=coar.CorrectClassMargin(against="largest"),
        ablation=coar.ZeroWeight(),
        sampler=coar.BernoulliSampler(ablated_fraction=0.10),
    )


def choosing() -> coar.Examples:
    """Return training pictures to choose edits on, in addition to the studied ones."""
    return examples("train", CHOOSING)


def judge() -> coar.Examples:
    """Return the other test pictures, which no attribution and no choice has seen."""
    return examples("test", slice(STUDIED, None))
