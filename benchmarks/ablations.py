"""Loss, held-out correlation and effects of edits under each ablation.

    COAR_DATA=/path/to/folder python benchmarks/ablations.py > ablations.md    # about 20 minutes on one core
    python benchmarks/ablations.py --pipelines digits

The loss is that of training optimal constants, under random masks, on judging examples, which no constant has seen.
Trained constants are those for an ablated fraction of 0.10 throughout. Attributions are fitted on mask gradients and
masks at that fraction and predict test masks at all fractions. Edits make the model forget one class.

Results of every step are kept in reports/ablations, so an interrupted benchmark resumes.
"""

import argparse
import importlib
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import coar
from coar.ablation.registry import ABLATIONS
from coar.forward.copies import device_copy
from coar.forward.execution_plan import ExecutionPlan
from coar.forward.runner import FastRunner

FOLDER = Path("reports/ablations")
FRACTIONS = (0.05, 0.10, 0.20, 0.40)
EDITED, LABEL, BUDGET = ("zero", "mean", "optimal"), 3, 20


@dataclass(frozen=True)
class Size:
    """Sizes for one pipeline: studied and judging examples, masks of a loss, and masks and gradients of a run."""

    studied: int
    judged: int
    loss_masks: int
    masks: int
    gradients: int
    test_masks: int
    edits: bool = False
    again: tuple[float, ...] = ()  # further fractions at which optimal constants are trained and the loss is measured


SIZES = {
    "digits": Size(400, 397, 40, 200, 96, 50, edits=True),
    "cifar10": Size(96, 128, 10, 60, 48, 20, edits=True),
    "gpt2": Size(48, 64, 20, 100, 64, 30, again=(0.40,)),
    "sentence_embeddings": Size(12, 12, 6, 30, 24, 12),
}


def losses(module: ModuleType, study: coar.Study, size: Size) -> dict[str, float]:
    """Return the mean loss of judging examples under masks at each fraction, and of the unablated model (0)."""
    loss = module.study(ablation="optimal").ablation.loss
    model = device_copy(study.model, torch.device("cpu"), study.examples)
    judge = module.judge()
    judge = judge.subset(range(min(size.judged, len(judge))))
    if loss.settings()["name"] == "Drift":  # its targets are the embeddings of the unablated model
        with torch.inference_mode():
            embeddings = model(**judge.block(0, len(judge))[0]).clone()
        judge = coar.Examples(inputs=judge.inputs, targets=embeddings, metadata=judge.metadata)
    constants = study.ablation.replacements(model, study.components, batch_size=64)
    plan = ExecutionPlan(batch_size=64)
    worker = FastRunner(model, study.components, constants, loss, plan, sources=study.ablation.sources)
    block = worker.load(judge, 0, len(judge))
    found = {"0": float(worker.base_output(block).mean())}
    for at in FRACTIONS:
        masks = study.sampler.masks("test", range(size.loss_masks), len(study.components), ablated_fraction=at)
        found[str(at)] = float(worker.outputs(block, masks).mean())
    return found


def correlations(study: coar.Study, size: Size, path: Path) -> tuple[coar.Attributions, dict[str, float]]:
    """Return attributions of a run under the ablation, and their mean correlation at each fraction of test masks."""
    run = coar.collect(
        study,
        path,
        masks=size.masks,
        gradients=size.gradients,
        test_masks=size.test_masks,
        test_fractions=[at for at in FRACTIONS if at != study.sampler.ablated_fraction],
        device="cpu",
        progress=False,
    )
    fitted = coar.fit(run, progress=False)
    table = coar.evaluate(run).table
    return fitted, {str(float(row.ablated_fraction)): float(row.pearson) for row in table.itertuples()}


def forgotten(module: ModuleType, study: coar.Study, attributions: coar.Attributions) -> dict[str, float]:
    """Return the change of accuracy on judging examples, in points, from an edit that forgets a class."""
    result = coar.forget_class(
        attributions, study.model, study.examples, module.judge(), label=LABEL, budget=BUDGET, progress=False
    )
    rows = {str(row.group): row for row in result.table.itertuples()}
    return {
        "components": float(rows["targets"].components),
        "targets": float(rows["targets"].points),
        "references": float(rows["references"].points),
    }


def measured(name: str, label: str) -> dict[str, Any]:
    """Return all measurements of one ablation on one pipeline, from the disk if they are there."""
    done = FOLDER / f"{name}-{label}.json"
    if done.exists():
        kept: dict[str, Any] = json.loads(done.read_text())
        return kept
    module, size, start = importlib.import_module(f"pipelines.{name}"), SIZES[name], time.process_time()
    whole = module.study(ablation=label)
    few = whole.examples.subset(range(min(size.studied, len(whole.examples))))
    study = coar.Study(
        model=whole.model,
        examples=few,
        components=whole.components,
        output=whole.output,
        ablation=whole.ablation,
        sampler=whole.sampler,
    )
    found: dict[str, Any] = {"loss": losses(module, study, size)}
    attributions, found["pearson"] = correlations(study, size, FOLDER / f"{name}-{label}.zarr")
    if size.edits and label in EDITED:
        found["edit"] = forgotten(module, study, attributions)
    found["seconds"] = time.process_time() - start
    done.parent.mkdir(parents=True, exist_ok=True)
    done.write_text(json.dumps(found, indent=1) + "\n")
    return found


def trained_there(name: str, at: float) -> float:
    """Return the loss of optimal constants trained at a fraction, at that fraction, from the disk if it is there."""
    done = FOLDER / f"{name}-optimal-{at}.json"
    if not done.exists():
        module = importlib.import_module(f"pipelines.{name}")
        study = module.study(ablation="optimal")
        optimal = study.ablation.model_copy(update={"ablated_fraction": at})
        done.parent.mkdir(parents=True, exist_ok=True)
        done.write_text(json.dumps(losses(module, replace(study, ablation=optimal), SIZES[name])) + "\n")
    return float(json.loads(done.read_text())[str(at)])


def tables(name: str, found: dict[str, dict[str, Any]]) -> str:
    """Return the tables of one pipeline in Markdown."""
    at = [str(fraction) for fraction in FRACTIONS]
    plain = next(iter(found.values()))["loss"]["0"]
    heads = [f"loss {one}" for one in at] + [f"pearson {one}" for one in at] + ["processor s"]
    lines = [f"## {name}", "", f"Loss of the unablated model: {plain:.4f}.", ""]
    lines += [f"| ablation | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    for label, one in found.items():
        numbers = [f"{one['loss'][f]:.4f}" for f in at] + [f"{one['pearson'][f]:.3f}" for f in at]
        lines.append(f"| `{label}` | {' | '.join(numbers)} | {one['seconds']:.0f} |")
    others = [label for label in ("mean", "zero", "zero_activation") if label in found]
    if "optimal" in found and others:
        worse = [
            f"{f} ({found['optimal']['loss'][f]:.4f} against {found[label]['loss'][f]:.4f} of `{label}`)"
            for f in at
            for label in others
            if found["optimal"]["loss"][f] > found[label]["loss"][f]
        ]
        named = ", ".join(f"`{label}`" for label in others)
        lines += ["", f"Fractions at which `optimal` loses more than one of {named}: {', '.join(worse) or 'none'}."]
        for fraction in SIZES[name].again:
            lines += ["", f"Trained at {fraction}, `optimal` loses {trained_there(name, fraction):.4f} there."]
    edits = {label: one["edit"] for label, one in found.items() if "edit" in one}
    if edits:
        lines += ["", f"Forgetting class {LABEL}, {BUDGET} components at most, change of accuracy in points:", ""]
        lines += ["| ablation | components | class | other classes |", "|---|---:|---:|---:|"]
        for label, one in edits.items():
            lines.append(f"| `{label}` | {one['components']:.0f} | {one['targets']:+.1f} | {one['references']:+.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the tables of every available pipeline."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipelines", choices=list(SIZES), nargs="+", default=list(SIZES))
    parser.add_argument("--ablations", choices=list(ABLATIONS), nargs="+", default=list(ABLATIONS))
    arguments = parser.parse_args()
    for name in arguments.pipelines:
        try:
            found = {label: measured(name, label) for label in arguments.ablations}
        except (ModuleNotFoundError, coar.errors.PipelineError) as error:
            print(f"## {name}\n\nLeft out: {error}\n", flush=True)
            continue
        print(tables(name, found), flush=True)


if __name__ == "__main__":
    main()
