"""Processor seconds of one thread that the creation of a run takes, with all filters and two masks.

    OMP_NUM_THREADS=1 python -m benchmarks.creation                          # ResNet-50 and EfficientNet-B0
    OMP_NUM_THREADS=1 python -m benchmarks.creation resnet18 --profile 40    # with the functions that take longest

The nets are torchvision's with random weights and 4 classes, on 8 pictures of 64 x 64. The first run of a process also
imports modules; it is a small one, made before and not counted.
"""

import argparse
import cProfile
import pstats
import tempfile
import time
from pathlib import Path

import torch
import torchvision

import coar

MASKS, PICTURES, SIDE = 2, 8, 64


def main() -> None:
    """Print the seconds of each net, and of a forward pass of its pictures beside them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nets", nargs="*", default=["resnet50", "efficientnet_b0"])
    parser.add_argument("--profile", type=int, default=0, help="functions to list")
    given = parser.parse_args()
    torch.set_num_threads(1)
    seconds(torchvision.models.squeezenet1_1(num_classes=4), cProfile.Profile(time.process_time))
    for name in given.nets:
        net = torchvision.models.get_model(name, weights=None, num_classes=4).eval()
        profile = cProfile.Profile(time.process_time)
        if given.profile:
            profile.enable()
        taken, forward, filters = seconds(net, profile)
        print(f"{name}: {filters} filters; a forward pass {forward:.2f} s, creation of a run {taken:.2f} s", flush=True)
        if given.profile:
            pstats.Stats(profile).sort_stats("cumtime").print_stats(given.profile)


def seconds(net: torch.nn.Module, profile: cProfile.Profile) -> tuple[float, float, int]:
    """Return the processor seconds of a run's creation and of a forward pass, and the number of filters."""
    pictures = torch.randn(PICTURES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    examples = coar.Examples(inputs=pictures, targets=torch.arange(PICTURES) % 4)
    components = coar.conv_filters(net)
    with torch.no_grad():
        net(pictures)
        begun = time.process_time()
        net(pictures)
        forward = time.process_time() - begun
    with tempfile.TemporaryDirectory() as folder:
        study = coar.Study(model=net, examples=examples, components=components)
        execution = coar.Execution(batch_size=PICTURES)
        begun = time.process_time()
        coar.collect(study, Path(folder) / "run.zarr", masks=MASKS, device="cpu", execution=execution, progress=False)
        taken = time.process_time() - begun
    profile.disable()
    return taken, forward, len(components)


if __name__ == "__main__":
    main()
