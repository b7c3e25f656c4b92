"""Pictures read per second from memory, from a .beton file by ffcv, and from single files as by torchvision.

    python benchmarks/loading.py                             # half a minute on one core
    python benchmarks/loading.py --pictures 5000 --workers 8

The pictures are random patterns in 224 x 224 pixels, as JPEG files in a folder per class and as bytes in a .beton file,
in a temporary folder; all are read from the disk's cache. Every way gives the same batches, each of which is copied
once, and the table shows their largest difference. Times are wall-clock, the median of several readings of all
pictures, on an otherwise idle machine. Without ffcv its row says so. (Run as a file this would hide the package
`coverage`, which numba imports, behind the file of that name in this folder.)
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

import coar
from pipelines import beton, imagenet

BATCH, CLASSES, SIZE, REPEATS = 64, 4, 224, 3
PRESET = imagenet.preset("resnet50")
PREPARE = transforms.Compose([transforms.ToTensor(), transforms.Normalize(PRESET.mean, PRESET.std)])

Reading = Callable[[], Iterator[Tensor]]


def write_folder(root: Path, count: int) -> None:
    """Write JPEG files into a folder per class."""
    random = np.random.default_rng(0)
    for number in range(count):
        pattern = random.integers(0, 256, (28, 28, 3), dtype=np.uint8)
        file = root / f"n{number % CLASSES:08d}" / f"{number:06d}.JPEG"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pattern).resize((SIZE, SIZE)).save(file, quality=90)


def write_beton(file: Path, pictures: ImageFolder) -> None:
    """Write the bytes of pictures with ffcv."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
    DatasetWriter(str(file), fields, num_workers=1).from_indexed_dataset(pictures)


def in_blocks(inputs: object, labels: Tensor) -> Reading:
    """Return a function that reads examples block by block, as in collecting."""
    examples = coar.Examples(inputs=inputs, targets=labels)
    starts = range(0, len(labels), BATCH)
    return lambda: (examples.block(start, start + BATCH)[0] for start in starts)


def ways(root: Path, count: int, workers: int) -> dict[str, Reading | str]:
    """Return for each way a function that reads all pictures, or the reason why there is none."""
    write_folder(root / "val", count)
    pictures = ImageFolder(str(root / "val"))
    files, labels = [Path(file) for file, _ in pictures.samples], torch.tensor(pictures.targets)
    single = coar.ImageFiles(files, PREPARE)
    loader = DataLoader(ImageFolder(str(root / "val"), PREPARE), batch_size=BATCH, num_workers=workers)
    found: dict[str, Reading | str] = {
        "memory": in_blocks(torch.stack([single[i] for i in range(count)]), labels),
        "files, as the pipelines read them": in_blocks(single, labels),
        f"files, ImageFolder and DataLoader, {workers} workers": lambda: (batch for batch, _ in loader),
    }
    try:
        beton.installed()
    except coar.CoarError:
        return found | {".beton, ffcv": "not installed"}
    write_beton(root / "val.beton", pictures)
    stored = beton.BetonPictures(root / "val.beton", range(count), size=SIZE, ratio=1.0)
    return found | {".beton, ffcv": in_blocks(imagenet.Normalised(stored, PRESET), labels)}


def measure(read: Reading, reference: list[Tensor]) -> tuple[float, float]:
    """Return the median seconds of reading all pictures, and the largest difference from the reference."""
    apart = max(float((a - b).abs().max()) for a, b in zip(read(), reference, strict=True))
    took = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for batch in read():
            batch.clone()  # without a copy, reading from memory would only make views
        took.append(time.perf_counter() - start)
    return statistics.median(took), apart


def main() -> None:
    """Print one table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--workers", type=int, default=2, help="processes of the DataLoader; 0 for none")
    arguments = parser.parse_args()
    print("| pictures from | pictures / s | largest difference |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as root:
        readings = ways(Path(root), arguments.pictures, arguments.workers)
        reference = list(readings["memory"]())
        for name, read in readings.items():
            if isinstance(read, str):
                print(f"| {name} | {read} | |")
                continue
            seconds, apart = measure(read, reference)
            print(f"| {name} | {arguments.pictures / seconds:,.0f} | {apart:.0e} |", flush=True)


if __name__ == "__main__":
    main()
