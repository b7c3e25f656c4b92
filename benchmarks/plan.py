"""`coar plan` beside what runs and fits take, at the sizes of published models.

    python -m benchmarks.plan                              # all models; about ten minutes of one thread
    python -m benchmarks.plan --models ResNet-50

The models have random weights. Pictures have 64 x 64 pixels and texts 32 tokens, so that passes are short; the numbers
of components are those of published setups. Each model is planned, collected and fitted in a process of its own. Times
are CPU seconds, also those by which the plan times its passes. Memory is the peak of the fit above that after imports.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

import coar
from benchmarks.fit_growth import apart, measure
from benchmarks.gpu import filters, gpt2

PIXELS, TOKENS, WORDS = 64, 32, 50_257


@dataclass(frozen=True)
class Planned:
    """A model, and the run that is planned and collected.

    Attributes:
        net: Makes the model.
        components: Finds its components.
        sizes: Numbers of masks, mask gradients and test masks.
        examples: Number of examples.
        texts: Whether examples are texts.
    """

    net: Callable[[], nn.Module]
    components: Callable[[nn.Module], coar.Components]
    sizes: dict[str, int]
    examples: int
    texts: bool = False


def vit() -> nn.Module:
    """Return a ViT-B/16 for small pictures, with a head that is not zero."""
    net = torchvision.models.VisionTransformer(PIXELS, 16, 12, 12, 768, 3_072)
    nn.init.normal_(net.heads.head.weight, std=0.02)
    return net


def rows(net: nn.Module) -> coar.Components:
    """Return the rows of weights of the published setup."""
    return coar.parameter_slices(net, "*.in_proj_weight") + coar.neurons(net, exclude="heads.head")


def heads_and_neurons(net: nn.Module) -> coar.Components:
    """Return attention heads and neurons of the MLPs."""
    return coar.attention_heads(net) + coar.mlp_neurons(net)


MODELS = {
    "ResNet-50": Planned(
        torchvision.models.resnet50, filters, {"masks": 16, "gradients": 16, "test_masks": 8}, examples=12
    ),
    "ViT-B/16, rows": Planned(vit, rows, {"masks": 64, "gradients": 0, "test_masks": 8}, examples=4),
    "ViT-B/16, heads and neurons": Planned(
        vit, heads_and_neurons, {"masks": 16, "gradients": 16, "test_masks": 8}, examples=8
    ),
    "GPT-2": Planned(gpt2, heads_and_neurons, {"masks": 16, "gradients": 16, "test_masks": 8}, examples=4, texts=True),
}


def study_of(name: str) -> coar.Study:
    """Return the study of random examples of a model."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    planned = MODELS[name]
    net, n = planned.net().eval(), planned.examples
    components = planned.components(net)
    if planned.texts:
        ids = torch.randint(WORDS, (n, TOKENS))
        examples = coar.token_examples({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        return coar.Study(model=net, examples=examples, components=components, output=coar.TokenMargin())
    examples = coar.Examples(inputs=torch.randn(n, 3, PIXELS, PIXELS), targets=torch.randint(1_000, (n,)))
    return coar.Study(model=net, examples=examples, components=components)


def plan(name: str) -> dict[str, float]:
    """Return what is planned, and the CPU seconds of planning."""
    study, start = study_of(name), time.process_time()
    time.perf_counter = time.process_time  # other programs use the machine too
    found = coar.estimate(study, **MODELS[name].sizes, device="cpu")
    return {
        "components": len(study.components),
        "seconds": 3600 * found.hours,
        "mib": found.disk_bytes / 2**20,
        "gib": found.fit_bytes / 2**30,
        "own": time.process_time() - start,
    }


def collect(name: str, path: Path) -> float:
    """Collect the run; return the CPU seconds."""
    study, start = study_of(name), time.process_time()
    coar.collect(study, path, **MODELS[name].sizes, device="cpu", progress=False)
    return time.process_time() - start


def show(name: str, path: Path) -> None:
    """Plan, collect and fit, and print a row of the table."""
    planned: dict[str, Any] = apart(plan, name)
    seconds = apart(collect, name, path)
    fitted = apart(measure, path, "informed" if MODELS[name].sizes["gradients"] else "ridge", None, None)
    mib = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 2**20
    print(
        f"| {name} | {planned['components']:,} | {planned['seconds']:.1f} | {seconds:.1f} | {planned['mib']:.2f} "
        f"| {mib:.2f} | {planned['gib']:.2f} | {fitted['gib']:.2f} | {fitted['seconds']:.1f} | {planned['own']:.0f} |",
        flush=True,
    )


def main() -> None:
    """Measure the models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, coar {coar.__version__}, one thread")
    print("| model | components | s planned | s taken | MiB planned | MiB taken ", end="")
    print("| GiB of the fit planned | GiB taken | s of the fit | s of planning |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(options.models):
            show(name, Path(folder) / f"{number}.zarr")


if __name__ == "__main__":
    main()
