"""Speed and memory on a GPU: collection, mask gradients, fits and edges, next to other ways and the device's own speed.

    make gpu                                       # tests of a GPU, then this, within eight minutes
    python benchmarks/gpu.py --device cpu --small  # whether it works, in a minute

Needed are torch, torchvision and this package's imports; models of transformers and captum are left out where they are
missing, and the table says so. Every measurement gets `--seconds`, after one call that is not counted. Models that have
not begun after `--minutes` are left out.

Collection is measured in masks x examples per second:

- `ours` in bfloat16 and in float32, and for some models `compiled` in bfloat16: `FastRunner.outputs` with the plan that
  a run measures; compiled models run as CUDA graphs, where that is faster;
- the `published loop`: the model is copied for every mask, rows of weights are zeroed, and the examples are read again
  and run under `torch.autocast`, as in the code of Shah et al. (2024); data loading is left out;
- the `hook loop`: one model under `torch.autocast`, forward hooks multiply activations by the mask;
- `captum`: LayerFeatureAblation, one component per pass, in float32.

The peak is the fastest bfloat16 matrix product measured before and after; the share of it is the rate of `ours` in
bfloat16 times the arithmetic of a plain forward pass. Memory is the peak of what torch has allocated, over what was
allocated before.
"""

import argparse
import copy
import importlib.util
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import BasicBlock

import coar
from benchmarks.fit import generate
from coar.forward.autotune import fastest_runner
from coar.forward.copies import device_copy
from coar.forward.devices import batch_size_on, choose_device
from coar.forward.execution_plan import ExecutionPlan
from coar.forward.model_runner import ModelRunner
from coar.forward.precision import compare_precisions
from coar.forward.runner import FastRunner
from coar.gates.batch_norms import following_batch_norms
from pipelines.cifar10 import CifarResNet

RESULTS = Path("benchmarks/results")
MASKS = 64  # of a unit
LONG = 10_000  # assumed length of a run in masks, a small share of which may be spent on choosing the plan
TOKENS = 128
PACKAGES = ("torch", "torchvision", "transformers", "captum", "numpy", "zarr")

Run = Callable[[np.ndarray], Any]  # takes (masks, components) masks


@dataclass(frozen=True)
class Subject:
    """A model to measure.

    Attributes:
        net: Makes the model.
        components: Finds its components.
        examples: Number of examples, on a GPU and in a small measurement.
        shape: Shape of an example; empty for a sequence of tokens.
        classes: Number of classes, or of words.
        compiled: Whether compiling is tried on a GPU, which takes up to minutes.
    """

    net: Callable[[], nn.Module]
    components: Callable[[nn.Module], coar.Components]
    examples: tuple[int, int]
    shape: tuple[int, ...] = ()
    classes: int = 1_000
    compiled: bool = False


@dataclass
class Found:
    """What has been measured: numbers by subject and name, and what could not be, with the reason."""

    numbers: dict[str, dict[str, float]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def wide_resnet18(width: int = 128) -> nn.Module:
    """Return a ResNet-18 with a number of filters in its first stage, twice the usual one."""

    def stage(before: int, after: int, stride: int) -> nn.Sequential:
        shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        return nn.Sequential(
            BasicBlock(before, after, stride, shortcut if before != after else None), BasicBlock(after, after)
        )

    stem = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    stages = [stage(width, width, 1), *(stage(width * 2**i, width * 2 ** (i + 1), 2) for i in range(3))]
    return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, 1_000))


def vit(*, small: bool = False) -> nn.Module:
    """Return a ViT-B/16, or a ViT that a CPU runs in milliseconds, with a head that is not zero."""
    model = torchvision.models.VisionTransformer
    net = model(32, 8, 2, 2, 32, 64, num_classes=10) if small else torchvision.models.vit_b_16()
    nn.init.normal_(net.heads.head.weight, std=0.02)
    return net


def gpt2(**sizes: int) -> nn.Module:
    """Return a model of GPT-2's architecture with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(use_cache=False, attn_implementation="eager", bos_token_id=0, eos_token_id=0, **sizes)
    )


def filters(net: nn.Module) -> coar.Components:
    """Find the filters of all convolutions but those of shortcuts."""
    shortcuts = [name for name, _ in net.named_modules() if "downsample" in name]
    return coar.conv_filters(net, exclude="*downsample*" if shortcuts else None)


def subjects(small: bool) -> dict[str, Subject]:
    """Return the models by name, small ones for a test."""
    pictures: dict[str, Any] = {"components": filters, "shape": (3, 224, 224)}
    cifar: dict[str, Any] = {"components": filters, "shape": (3, 32, 32), "classes": 10}
    tokens: dict[str, Any] = {"components": lambda net: coar.input_features(net, include="*.mlp.c_proj")}
    neurons = lambda net: coar.neurons(net, include="*.mlp.*")  # noqa: E731
    if small:
        words = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 101, "n_positions": TOKENS}
        return {
            "CIFAR ResNet-20": Subject(CifarResNet, examples=(8, 8), **cifar),
            "ViT, small": Subject(lambda: vit(small=True), neurons, (4, 4), (3, 32, 32), 10),
            "GPT-2, small": Subject(lambda: gpt2(**words), examples=(4, 4), classes=101, **tokens),
        }
    return {
        "ResNet-18, width 128": Subject(wide_resnet18, examples=(512, 8), compiled=True, **pictures),
        "ViT-B/16": Subject(vit, neurons, (256, 4), (3, 224, 224), compiled=True),
        "ResNet-50": Subject(torchvision.models.resnet50, examples=(512, 8), **pictures),
        "GPT-2": Subject(gpt2, examples=(128, 2), classes=50_257, **tokens),
        "CIFAR ResNet-20": Subject(CifarResNet, examples=(4_096, 64), **cifar),
    }


def study_of(subject: Subject, device: torch.device) -> coar.Study:
    """Return the study of random examples of a subject."""
    torch.manual_seed(0)
    net = subject.net().eval()
    count = subject.examples[device.type == "cpu"]
    components = subject.components(net)
    if subject.shape:
        examples = coar.Examples(
            inputs=torch.randn(count, *subject.shape), targets=torch.randint(subject.classes, (count,))
        )
        return coar.Study(model=net, examples=examples, components=components)
    ids = torch.randint(subject.classes, (count, TOKENS))
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    examples, output = coar.token_examples(tokens), coar.TokenMargin(reduction="last")
    return coar.Study(model=net, examples=examples, components=components, output=output)


def wait(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Return the seconds of a call, from as many calls as fit into a time, after one that does not count."""
    run()
    wait(device)
    calls, start = 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - start < seconds:
        run()
        wait(device)
        calls += 1
    return (time.perf_counter() - start) / calls


@contextmanager
def peak_memory(device: torch.device, numbers: dict[str, float], name: str) -> Iterator[None]:
    """Enter the peak of allocated memory in GiB, over what was allocated before; nothing elsewhere than on CUDA."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield
    numbers[f"{name}, GiB"] = (torch.cuda.max_memory_allocated(device) - before) / 2**30


def product_speed(device: torch.device, kind: torch.dtype, seconds: float) -> float:
    """Return the floating-point operations per second of the fastest of some square matrix products."""
    best = 0.0
    for size in (4_096, 8_192, 16_384) if device.type == "cuda" else (256, 512):
        a = torch.randn(size, size, device=device).to(kind)
        best = max(best, 2 * size**3 / seconds_of(lambda a=a: a @ a, device, seconds / 6))
    return best


def margins(logits: Tensor, targets: Tensor) -> Tensor:
    """Return (examples,) logits of the targets less the log-sum-exp of the others."""
    logits = logits.float()
    others = logits.scatter(1, targets[:, None], -torch.inf)
    return logits.gather(1, targets[:, None])[:, 0] - others.logsumexp(1)


def batches(study: coar.Study, device: torch.device) -> list[tuple[Any, Tensor]]:
    """Return the study's inputs and classes on a device, in batches of its usual size; of texts, the last words."""
    inputs, targets = study.examples.block(0, len(study.examples))
    parts = [slice(at, at + batch_size_on(device)) for at in range(0, len(targets), batch_size_on(device))]
    if isinstance(inputs, dict):
        last = targets[:, -2]  # the target of the last position that has one
        return [
            ({name: value[part].to(device) for name, value in inputs.items()}, last[part].to(device)) for part in parts
        ]
    return [(inputs[part].to(device), targets[part].to(device)) for part in parts]


def logits_of(model: nn.Module, inputs: Any) -> Tensor:
    """Return (examples, classes) logits; of texts, those of the last position that has a target."""
    if isinstance(inputs, dict):
        return model(**inputs).logits[:, -2]
    found: Tensor = model(inputs)
    return found


def zeroed(layer: nn.Module, side: str, rows: Tensor) -> None:
    """Zero rows of a layer's weight, or what reads some of its inputs."""
    weight = layer.weight.data  # type: ignore[union-attr]
    if side == "input" and not isinstance(layer, nn.Linear):  # transformers' Conv1D, (inputs, outputs)
        weight[rows] = 0
    elif side == "input":
        weight[:, rows] = 0
    else:
        weight[rows] = 0


def published_loop(study: coar.Study, device: torch.device) -> Run:
    """Return a function that copies, zeroes and runs for every mask."""
    model, loaded = copy.deepcopy(study.model).to(device), batches(study, device)
    sites = study.components.sites()

    def run(masks: np.ndarray) -> list[Tensor]:
        rows = []
        for mask in masks:
            net = copy.deepcopy(model)
            for (site, side, _), indices in sites.items():
                off = study.components.positions_of(indices)[~mask[indices]]
                zeroed(net.get_submodule(site), side, torch.from_numpy(off).to(device))
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
                rows.append(torch.cat([margins(logits_of(net, x), y).cpu() for x, y in loaded]))
        return rows

    return run


def hook_loop(study: coar.Study, device: torch.device) -> Run:
    """Return a function that multiplies activations by the mask in hooks of one model."""
    model, loaded = copy.deepcopy(study.model).to(device), batches(study, device)
    keeps: dict[str, Tensor] = {}
    sites = {site: (side, axis, indices) for (site, side, axis), indices in study.components.sites().items()}

    def before(site: str) -> Callable[..., Any]:
        return lambda _module, args: (args[0] * keeps[site], *args[1:])

    def after(site: str) -> Callable[..., Any]:
        return lambda _module, _args, y: y * keeps[site]

    for site, (side, _, _) in sites.items():
        layer = model.get_submodule(site)
        if side == "input":
            layer.register_forward_pre_hook(before(site))
        else:
            layer.register_forward_hook(after(site))

    def run(masks: np.ndarray) -> list[Tensor]:
        rows = []
        for mask in torch.from_numpy(masks).float().to(device):
            for site, (_, axis, indices) in sites.items():
                keeps[site] = mask[indices] if axis == -1 else mask[indices][:, None, None]
            with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
                rows.append(torch.cat([margins(logits_of(model, x), y).cpu() for x, y in loaded]))
        return rows

    return run


def runners(study: coar.Study, device: torch.device, *, compiled: bool) -> dict[str, FastRunner]:
    """Return our runners by name, each with the plan that a long run measures."""
    model = device_copy(study.model, device, study.examples)
    constants = study.ablation.replacements(model, study.components, batch_size=batch_size_on(device))
    few = ModelRunner(model, study.output).load(study.examples, 0, 2)

    def outputs(variant: nn.Module) -> Tensor:
        return torch.from_numpy(ModelRunner(variant, study.output).base_output(few))

    norms = following_batch_norms(model, study.components, run=outputs)
    masks = study.sampler.masks("train", range(MASKS), len(study.components))
    made = {}
    kinds = [("ours, bfloat16", "bf16"), ("ours, float32", "float32")]
    kinds += [("ours, compiled", "bf16")] if compiled and device.type == "cuda" else []
    for name, precision in kinds:
        plan = ExecutionPlan(precision=precision)  # type: ignore[arg-type]
        runner = FastRunner(model, study.components, constants, study.output, plan, batch_norms=norms)
        compiling = name == "ours, compiled"
        made[name] = fastest_runner(runner, study.examples, masks, work=LONG, compiled=compiling)
    return made


def flops_per_example(study: coar.Study, device: torch.device) -> float:
    """Return the floating-point operations of a forward pass of an example; fused attention is off for the count."""
    model, inputs = copy.deepcopy(study.model).to(device), study.examples.block(0, 1)[0]
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if isinstance(inputs, dict):
            model(**{name: value.to(device) for name, value in inputs.items()})
        else:
            model(inputs.to(device))
    torch.backends.mha.set_fastpath_enabled(fused)
    return float(counter.get_total_flops())


def measure_collection(
    study: coar.Study, device: torch.device, seconds: float, numbers: dict[str, float], *, compiled: bool
) -> None:
    """Enter rates, the difference from the published loop, the cost of a mask gradient, and memory."""
    n, d = len(study.examples), len(study.components)
    masks = study.sampler.masks("train", range(MASKS), d)
    numbers |= {"components": d, "examples": n, "GFLOP an example": flops_per_example(study, device) / 1e9}
    ways: dict[str, tuple[Run, int]] = {
        "published loop": (published_loop(study, device), 4),
        "hook loop": (hook_loop(study, device), 4),
    }
    made = runners(study, device, compiled=compiled)
    blocks = {name: runner.load(study.examples, 0, n) for name, runner in made.items()}
    for name, runner in made.items():
        ways[name] = (lambda given, r=runner, b=blocks[name]: r.outputs(b, given)), MASKS
    for name, (run, count) in ways.items():
        with peak_memory(device, numbers, name):
            took = seconds_of(lambda run=run, count=count: run(masks[:count]), device, seconds)
        numbers[f"{name}, a second"] = n * count / took
    plain = made["ours, float32"]
    expected = torch.stack(ways["published loop"][0](masks[:2])).numpy()
    found = plain.outputs(blocks["ours, float32"], masks[:2])
    numbers["difference from the loop"] = float(np.abs(found - expected).max() / np.abs(expected).max())
    check = compare_precisions(plain, made["ours, bfloat16"], blocks["ours, float32"], masks[:16], 1.0)
    numbers["bfloat16 error, spreads"] = check.error
    measure_gradients(study, made["ours, float32"], numbers, device, seconds)


def measure_gradients(
    study: coar.Study, runner: FastRunner, numbers: dict[str, float], device: torch.device, seconds: float
) -> None:
    """Enter what a mask gradient costs in masks, both in float32."""
    n, d = len(study.examples), len(study.components)
    keeps = study.sampler.masks("gradient", range(2 * MASKS), d).reshape(2, MASKS, d)
    smaller = runner.with_plan(replace(runner.plan, batch_size=max(min(n, runner.batch_size) // 4, 1)))
    block = smaller.load(study.examples, 0, n)
    with peak_memory(device, numbers, "mask gradient"):
        took = seconds_of(lambda: smaller.mask_gradients(block, keeps, np.arange(n) % MASKS), device, seconds) / 2
    numbers["mask gradient, masks"] = took * numbers["ours, float32, a second"] / n


def measure_captum(study: coar.Study, device: torch.device, numbers: dict[str, float]) -> None:
    """Enter captum's rate, from a few components."""
    from benchmarks.peers import layer_feature_ablation
    from coar.components.table import Components

    chosen = np.unique(np.linspace(0, len(study.components) - 1, 8).astype(int))
    few = replace(study, components=Components(study.components[int(i)] for i in chosen))
    found = layer_feature_ablation(few, device=str(device), batch_size=batch_size_on(device))
    numbers["captum, a second"] = found.forwards * len(study.examples) / found.seconds


def measure_fit(device: torch.device, small: bool, numbers: dict[str, float]) -> None:
    """Enter the seconds of ridge on a generated run, and of the bare products X'X and X'Y of the same sizes."""
    masks, components, examples = (200, 96, 12) if small else (100_000, 22_720, 5_000)
    numbers |= {"masks": masks, "components": components, "examples": examples}
    with tempfile.TemporaryDirectory(prefix="coar-gpu-") as place:
        start = time.perf_counter()
        run = generate(Path(place) / "r.zarr", masks, components, examples)
        numbers["run made, s"] = time.perf_counter() - start
        with peak_memory(device, numbers, "fit"):
            start = time.perf_counter()
            coar.fit(run, method="ridge", device=str(device), progress=False)
            wait(device)
            numbers["fit, s"] = time.perf_counter() - start
    rows = min(masks, 4_096)
    x, y = torch.rand(rows, components, device=device), torch.rand(rows, examples, device=device)
    numbers["bare products, s"] = masks / rows * seconds_of(lambda: (x.T @ x, x.T @ y), device, 0.5)


def measure_edges(device: torch.device, small: bool, seconds: float, numbers: dict[str, float]) -> None:
    """Enter the rates of masks and of mask gradients over all edges of a model of GPT-2's size."""
    words = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 101, "n_positions": TOKENS} if small else {}
    net = gpt2(**words).eval()
    ids = torch.randint(100, (4 if small else 64, 16))
    examples = coar.token_examples({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    output = coar.TokenMargin(reduction="last")
    study = coar.Study(
        model=net,
        examples=examples,
        components=coar.edges(net),
        output=output,
        ablation=coar.ZeroActivation(),
        sampler=coar.BernoulliSampler(ablated_fraction=0.03),
    )
    n, d = len(examples), len(study.components)
    model = device_copy(net, device, examples)
    runner = FastRunner(model, study.components, torch.zeros(study.components.width), output)
    block = runner.load(examples, 0, n)
    masks = study.sampler.masks("train", range(4), d)
    numbers |= {"edges": d, "examples": n}
    plain = seconds_of(lambda: runner.base_output(block), device, seconds / 4)
    with peak_memory(device, numbers, "masks"):
        took = seconds_of(lambda: runner.outputs(block, masks), device, seconds) / len(masks)
    numbers |= {"masks x examples a second": n / took, "a mask, plain passes": took / plain}
    keeps, groups = masks[:1, None], np.zeros(n, dtype=np.int64)
    with peak_memory(device, numbers, "mask gradients"):
        took = seconds_of(lambda: runner.mask_gradients(block, keeps, groups), device, seconds)
    numbers["a mask gradient, plain passes"] = took / plain


def measured(device: torch.device, small: bool, seconds: float, minutes: float) -> Found:
    """Measure everything; what fails is entered with its reason, and the rest goes on."""
    found, deadline = Found(), time.monotonic() + 60 * minutes
    peaks = found.numbers["matrix products"] = {}
    for name, kind in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        peaks[f"{name}, TFLOP/s"] = product_speed(device, kind, seconds) / 1e12
    with entered(found, "fit by ridge") as numbers:
        measure_fit(device, small, numbers)
    with entered(found, "edges of GPT-2's size") as numbers:
        measure_edges(device, small, seconds, numbers)
    for name, subject in subjects(small).items():
        if time.monotonic() > deadline:
            found.missing[name] = "no time was left"
            continue
        with entered(found, name) as numbers:
            study = study_of(subject, device)
            measure_collection(study, device, seconds, numbers, compiled=subject.compiled)
            used = numbers["ours, bfloat16, a second"] * numbers["GFLOP an example"] / 1e3
            numbers["share of the bfloat16 peak"] = used / peaks["bfloat16, TFLOP/s"]
            numbers["times the published loop"] = (
                numbers["ours, bfloat16, a second"] / numbers["published loop, a second"]
            )
            if importlib.util.find_spec("captum") is None:
                found.missing[f"captum on {name}"] = "captum is not installed"
            elif subject.shape:
                measure_captum(study, device, numbers)
    return found


@contextmanager
def entered(found: Found, name: str) -> Iterator[dict[str, float]]:
    """Collect the numbers of one subject; an error ends the subject and is entered instead of the rest of it."""
    numbers = found.numbers[name] = {}
    start = time.perf_counter()
    try:
        yield numbers
    except (ImportError, RuntimeError, coar.CoarError) as error:
        found.missing[name] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    numbers["measurement, s"] = time.perf_counter() - start
    print(f"{name}: {time.perf_counter() - start:.0f} s{', failed' if name in found.missing else ''}", flush=True)


def machine(device: torch.device) -> dict[str, Any]:
    """Return the date, the machine and the versions."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    found: dict[str, Any] = {"date": f"{datetime.now(UTC):%Y-%m-%d %H:%M}", "device": device.type}
    if device.type == "cuda":
        found |= {
            "device": torch.cuda.get_device_name(device),
            "memory, GiB": torch.cuda.mem_get_info(device)[1] / 2**30,
        }
        found["CUDA"] = torch.version.cuda
    return found | {"processor": platform.processor() or platform.machine(), "versions": versions}


def table(about: dict[str, Any], found: Found) -> str:
    """Return the report in markdown: a table for each subject, and what is missing."""
    versions = ", ".join(f"{name} {value}" for name, value in about["versions"].items())
    facts = ", ".join(f"{name} {value}" for name, value in about.items() if name not in ("date", "versions"))
    lines = [f"# GPU, {about['date']}", "", f"{facts}; {versions}.", ""]
    for name, numbers in found.numbers.items():
        lines += [f"## {name}", "", "| | |", "|---|---|"]
        lines += [f"| {what} | {value:,.4g} |" for what, value in numbers.items()] + [""]
    if found.missing:
        lines += ["## Not measured", "", *(f"- {name}: {why}" for name, why in found.missing.items()), ""]
    return "\n".join(lines)


def main() -> None:
    """Measure, print the report, and write it with the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--small", action="store_true", help="small models and sizes, to test this script")
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds per measurement")
    parser.add_argument("--minutes", type=float, default=5.0, help="no model begins after these")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder to write to")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    seconds = 0.05 if arguments.small else arguments.seconds
    found = measured(device, arguments.small, seconds, arguments.minutes)
    about = machine(device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = arguments.out / f"{about['date'][:10]}-gpu"
    stem.with_suffix(".json").write_text(
        json.dumps({**about, "numbers": found.numbers, "missing": found.missing}, indent=1)
    )
    text = table(about, found)
    stem.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
