"""The cost of a gated forward pass relative to a plain one, and the saving when masks share a pass.

    COAR_DATA=/path/to/folder OMP_NUM_THREADS=1 python benchmarks/gating.py    # 20 minutes on a quiet core
    python benchmarks/gating.py --models digits resnet20 --repeats 21

Every number is a ratio of processor times: plain passes and passes gated under every ablation take turns, and the
median over the turns is printed. Each pass has one mask, which is set before the pass. It follows a pass of the same
kind, as in a unit, since memory that the process must request again costs as much as the gates do. Resample sources are
recorded once before, as for all masks of a unit. The second table is on few examples: the time per counterfactual with
one mask per pass, in the weights, relative to that with several per pass, in hooks.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import nn

import coar
from benchmarks.models import SUBJECTS
from coar.forward.copies import device_copy
from coar.forward.execution_plan import ExecutionPlan
from coar.forward.runner import FastRunner
from coar.gates.batch_norms import following_batch_norms
from coar.gates.gates import Gates
from pipelines import digits

WAYS = ("zero", "zero_activation", "mean", "resample", "mean in hooks")
EXAMPLES = {"digits": 256, "resnet20": 128, "resnet18": 8, "vit-b-16": 4, "gpt2": 4, "encoder": 64}
FEW, MASKS = 4, 16  # examples, and masks that share a pass


class Encoder(nn.Module):
    """Torch's own encoder of sequences, whose attention calls no projection."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(256, 8, 1024, batch_first=True, dropout=0.0)
        self.body = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.last = nn.Linear(256, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (rows, tokens, 256) to (rows, 10) logits."""
        logits: torch.Tensor = self.last(self.body(x).mean(1))
        return logits


def encoder(examples: int) -> coar.Study:
    """Study heads and neurons of torch's own encoder on sequences of 32 random tokens."""
    net = Encoder().eval()
    x = torch.randn(examples, 32, 256, generator=torch.Generator().manual_seed(0))
    parts = coar.attention_heads(net) + coar.input_features(net, include="*.linear2")
    return coar.Study(
        model=net, examples=coar.Examples(inputs=x, targets=torch.zeros(examples).long()), components=parts
    )


def study_of(name: str, examples: int) -> coar.Study:
    """Return the study of a model on a number of examples."""
    if name == "encoder":
        return encoder(examples)
    if name == "digits":
        whole = digits.study()
        few = whole.examples.subset(range(examples))
        return coar.Study(model=whole.model, examples=few, components=whole.components)
    return SUBJECTS[name].study(examples)


def seconds(run: Callable[[], object]) -> float:
    """Return the processor seconds of the second of two calls."""
    run()
    start = time.process_time()
    run()
    return time.process_time() - start


def ratios(timed: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Return the median ratio of every time but the first to the first, all measured in turns after a warm-up turn."""
    turns = [{name: time_of() for name, time_of in timed.items()} for _ in range(repeats + 1)][1:]
    first, *others = timed
    return {name: statistics.median(turn[name] / turn[first] for turn in turns) for name in others}


def costs(name: str, repeats: int) -> dict[str, float]:
    """Return the time of a pass gated in each way, relative to that of a plain pass."""
    study = study_of(name, EXAMPLES[name])
    model = device_copy(study.model, torch.device("cpu"), study.examples)
    table, count = study.components, len(study.examples)
    plain = FastRunner(model, table, torch.zeros(table.width), study.output, ExecutionPlan(batch_size=count))
    ((inputs, _),) = plain.load(study.examples, 0, count).batches
    keep = torch.from_numpy(study.sampler.masks("test", range(1), len(table))[0])

    def outputs(variant: nn.Module) -> torch.Tensor:
        result = variant(inputs)
        return result if isinstance(result, torch.Tensor) else result.logits

    with torch.inference_mode():
        norms = following_batch_norms(model, table, run=outputs)

    def gated(way: str) -> Callable[[], float]:
        label = way.split(maxsplit=1)[0]
        constants = coar.choose_ablation(label, calibration=study.examples).replacements(model, table, batch_size=count)
        hooks = {"use_hooks": "hooks" in way, "resample": label == "resample"}
        gates = Gates(model, table, constants, batch_norms=norms, **hooks)

        def pass_once() -> None:
            gates.set(keep)
            model(inputs)

        def timed() -> float:
            with gates, torch.inference_mode():
                if label == "resample":
                    gates.record(lambda: model(inputs))
                return seconds(pass_once)

        return timed

    def ungated() -> float:
        with torch.inference_mode():
            return seconds(lambda: model(inputs))

    return ratios({"plain": ungated, **{way: gated(way) for way in WAYS}}, repeats)


def saving(name: str, repeats: int) -> float:
    """Return the speed-up of a counterfactual on few examples when masks share a pass."""
    study = study_of(name, FEW)
    model, table = device_copy(study.model, torch.device("cpu"), study.examples), study.components
    masks = study.sampler.masks("test", range(MASKS), len(table))
    zero = coar.ZeroWeight().replacements(model, table, batch_size=FEW)
    timed: dict[str, Callable[[], float]] = {}
    for together in (MASKS, 1):
        plan = ExecutionPlan(batch_size=FEW * MASKS, masks_per_forward=together)
        worker = FastRunner(model, table, zero, study.output, plan)
        block = worker.load(study.examples, 0, FEW)
        timed[str(together)] = lambda worker=worker, block=block: seconds(lambda: worker.outputs(block, masks))
    return ratios(timed, repeats)["1"]


def main() -> None:
    """Print both tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", choices=list(EXAMPLES), nargs="+", default=list(EXAMPLES))
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    print(f"| model | examples | {' | '.join(f'`{way}`' for way in WAYS)} |\n|---|---:|{'---:|' * len(WAYS)}")
    for name in arguments.models:
        found = costs(name, arguments.repeats)
        print(f"| {name} | {EXAMPLES[name]} | {' | '.join(f'{found[way]:.2f}' for way in WAYS)} |", flush=True)
    print(f"\n| model | {MASKS} masks of {FEW} examples in one pass are faster by |\n|---|---:|")
    for name in arguments.models:
        print(f"| {name} | {saving(name, arguments.repeats):.2f} |", flush=True)


if __name__ == "__main__":
    main()
