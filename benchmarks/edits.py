"""Verified choice against other rules, on all tasks with an available pipeline: one table and one figure per task.

    COAR_DATA=/path/to/folder python benchmarks/edits.py                 # or: make edits
    python benchmarks/edits.py --pipelines digits --tasks forget --seeds 0

Attributions are fitted on mask gradients, with a mask seed each, or with a training seed each if the pipeline trains
its model. Components are chosen on choosing examples and judged on others. On CIFAR-10 the studied examples other than
the errors to fix, and all choosing examples, are training pictures, so that all test pictures are for judging, except
the one that is fixed. For the rules that only rank, the number of components is chosen on the judging examples
themselves, the smallest with the verified choice's effect and the best with no more than its harm, so the comparison
is biased in their favour.

Results of every step are kept in reports/edits/done, so an interrupted benchmark resumes; tables and figures are
written to reports/edits.
"""

import argparse
import importlib
import inspect
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import edits_report
import numpy as np
import torch

import coar
from coar.editing.evaluate import SelectionContext
from coar.editing.judge import effect_curve, margins
from coar.editing.select import ranking, select_in, welch_t
from coar.editing.tasks import PRESETS

FOLDER = Path("reports/edits")
GRADIENTS_COUNT = 96
COUNTS = [0, 1, 2, 3, 4, 6, 8, 10, 12, 15, 20, 25, 30, 40, 60, 100, 150, 250]
TASKS = {
    "backdoor": ("backdoor",),
    "subpopulations": ("group",),
    "typographic": ("typographic",),
    "cifar10": ("fix", "forget"),
    "digits": ("forget", "fix"),
    "waterbirds": ("group",),
    "celeba": ("group",),
    "clip": ("typographic",),
}
RULES = edits_report.RULES


@dataclass(frozen=True)
class Case:
    """A study with a seed, its run, and the examples to choose and to judge on."""

    seed: int
    study: coar.Study
    run: coar.Run
    choosing: coar.Examples | None
    judge: coar.Examples
    goal: coar.EditGoal | None

    @cached_property
    def fitted(self) -> coar.Attributions:
        """Attributions from the run's mask gradients."""
        return coar.fit(self.run, progress=False)

    @cached_property
    def context(self) -> SelectionContext:
        """The part of a selection that several goals share."""
        return SelectionContext.of(
            self.fitted, self.study.model, self.study.examples, choosing=self.choosing, precision="bf16"
        )

    def attributions(self, rule: str) -> coar.Attributions:
        """Return the attributions that a rule ranks by, made if they are missing."""
        if rule in ("leave_one_out", "mask_gradient"):
            return getattr(coar, rule)(self.study, self.run, progress=False)
        return self.fitted


def case(name: str, module: ModuleType, task: str, seed: int) -> Case:
    """Define the study, and collect its mask gradients when they are missing."""
    known = inspect.signature(module.study).parameters
    study = module.study(**{"training_seed" if "training_seed" in known else "seed": seed})
    more, judge = module.choosing() if hasattr(module, "choosing") else None, module.judge()
    label = name
    if name == "cifar10":
        label, judge = "cifar10-training-pictures", module.examples("test", slice(None))
        examples = module.examples("train", slice(3_000, 3_000 + module.STUDIED))
        if task == "fix":
            label, examples = "cifar10-all-errors", with_errors(study, judge, examples)
        study = replace(study, examples=examples)
    run = coar.collect(study, f"runs/edits/{label}-{seed}.zarr", masks=0, gradients=GRADIENTS_COUNT, progress=False)
    return Case(seed, study, run, more, judge, getattr(module, "GOAL", None))


def with_errors(study: coar.Study, test: coar.Examples, others: coar.Examples) -> coar.Examples:
    """Return all misclassified test examples, followed by the correctly classified examples among others."""
    errors = test.subset(margins(study.model, test) <= 0)
    others = others.subset(margins(study.model, others) > 0)
    both = [part.block(0, len(part)) for part in (errors, others)]
    ids = np.concatenate([np.asarray(part.metadata["id"]) for part in (errors, others)])
    inputs, targets = (torch.cat(values) for values in zip(*both, strict=True))
    return coar.Examples(inputs=inputs, targets=targets, metadata={"id": ids})


def goals(case: Case, task: str) -> Iterator[tuple[str, coar.EditGoal]]:
    """Yield the goals of a task: ten classes, every error, or the pipeline's own goal."""
    labels = np.asarray(case.study.examples.metadata.get("label"))
    if task == "forget":
        for label in np.unique(labels).tolist():
            conditions = {"targets": f"label == {label}", "references": f"label != {label}"}
            yield str(label), coar.EditGoal(**conditions, direction="decrease")
    elif task == "fix":
        right = margins(case.study.model, case.study.examples) > 0
        for i in np.flatnonzero(~right).tolist():
            references = tuple(np.flatnonzero(right).tolist())
            yield (
                f"id {case.study.examples.metadata['id'][i]}",
                coar.EditGoal(targets=(i,), references=references, direction="increase"),
            )
    elif case.goal is not None:
        yield "all", case.goal


@dataclass(frozen=True)
class Chosen:
    """A rule's choice: an order of components, the numbers of them to judge, constants, and the passes it took."""

    order: np.ndarray
    counts: list[int]
    constants: np.ndarray | None = None
    passes: int = 0
    strengths: tuple[float, ...] | None = None


def chosen(case: Case, task: str, goal: coar.EditGoal, rule: str) -> Chosen:
    """Choose components by a rule."""
    d = len(case.study.components)
    if rule == "verified":
        spent = case.context.passes
        try:
            found = select_in(case.context, goal, PRESETS[task].updated(seed=case.seed, progress=False))
        except coar.errors.BoundError:
            found = None
        if found is None or (task == "fix" and found.after.targets < 1):
            return Chosen(np.zeros(0, dtype=np.int64), [0, 0], passes=case.context.passes - spent)
        order = np.array([case.study.components.index(one.name) for one in found.edit.components])
        passes = case.context.passes - spent
        return Chosen(order, [0, len(order)], found.edit.constants(case.fitted), passes, found.edit.strengths)
    counts = [count for count in COUNTS if count <= (d if task != "fix" else 20)]
    if rule == "random":
        return Chosen(np.random.default_rng(case.seed).permutation(d), counts)
    return Chosen(ranking(welch_t(case.attributions(rule), goal), goal), counts)


def judged(case: Case, task: str, goal: coar.EditGoal, rule: str) -> dict[str, Any]:
    """Choose and judge: accuracy on targets and references against the number of components."""
    start, cpu = time.perf_counter(), time.process_time()
    choice = chosen(case, task, goal, rule)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    attributions, model = case.attributions(rule), case.study.model
    metadata = {key: np.asarray(column) for key, column in case.judge.metadata.items()}

    def right(examples: coar.Examples) -> np.ndarray:
        how = {"counts": choice.counts, "constants": choice.constants, "strengths": choice.strengths}
        return effect_curve(model, attributions, choice.order, examples, **how) > 0

    seen = right(case.judge)
    if task == "fix":
        (target,) = goal.targets
        targets = right(case.study.examples.subset([target])).mean(1)
        references = np.flatnonzero(metadata["id"] != case.study.examples.metadata["id"][target])
    else:
        rows, references = goal.resolve(metadata)
        targets = seen[:, rows].mean(1)
    of = goal.groups_of(metadata, references)
    lost = np.stack([seen[:, references[of == group]].mean(1) for group in np.unique(of)])  # (groups, counts)
    points = 100 * (lost - lost[:, :1])
    overall = 100 * seen[:, references].mean(1)
    others = overall - overall[0] if task == "fix" else points.mean(0)
    found = {
        "components": choice.counts,
        "targets": (100 * targets).tolist(),
        "others_points": others.tolist(),
        "worst_points": points.min(0).tolist(),
        "passes": choice.passes,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
    }
    if goal.pairs is not None:
        found |= {"clean": overall.tolist(), "partners": (100 * seen[:, references[: len(rows)]].mean(1)).tolist()}
    if task == "group":
        every = goal.groups_of(metadata, np.arange(len(case.judge)))
        by_group = 100 * np.stack([seen[:, every == group].mean(1) for group in np.unique(every)])  # (groups, counts)
        found |= {"lowest": by_group.min(0).tolist(), "average": by_group.mean(0).tolist()}
    return found


def kept(file: Path, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the contents of a file, or do the work and keep its result in the file."""
    if not file.is_file():
        found = work()
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(found))
        partial.replace(file)
    return dict(json.loads(file.read_text()))


def work(name: str, here: Case, task: str, rules: list[str]) -> None:
    """Choose and judge by each rule, for all goals of a task whose results are missing."""
    for target, goal in goals(here, task):
        for rule in rules:
            file = FOLDER / "done" / f"{name}-{task}-{target}-{here.seed}-{rule}.json"
            about = {"task": task, "pipeline": name, "seed": here.seed, "target": target, "rule": rule}
            found = kept(
                file,
                lambda goal=goal, rule=rule, about=about: {
                    **about,
                    "increase": goal.direction == "increase",
                    **judged(here, task, goal, rule),
                },
            )
            if rule == "verified":
                effect, harm, worst = (found[key][-1] for key in ("targets", "others_points", "worst_points"))
                print(
                    f"{task} {name} {target}, seed {here.seed}: targets {found['targets'][0]:.1f} -> {effect:.1f} %, "
                    f"others {harm:+.2f}, worst {worst:+.2f}, {found['components'][-1]} components, "
                    f"{found['passes']:,} passes, {found['cpu_seconds']:.0f} s",
                    flush=True,
                )


def main() -> None:
    """Compute all missing results, and write tables and figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipelines", choices=TASKS, nargs="+", default=list(TASKS))
    parser.add_argument("--tasks", nargs="+", default=["forget", "fix", "group", "backdoor", "typographic"])
    parser.add_argument("--rules", choices=RULES, nargs="+", default=list(RULES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    names = [name for name in arguments.pipelines if Path(f"pipelines/{name}.py").is_file()]
    for seed in arguments.seeds:
        for name in names:
            module = importlib.import_module(f"pipelines.{name}")
            for task in (task for task in TASKS[name] if task in arguments.tasks):
                try:
                    here = case(name, module, task, seed)
                except coar.errors.PipelineError as error:
                    print(f"{name} is left out: {error}")
                    continue
                work(name, here, task, arguments.rules)
    edits_report.write(FOLDER)


if __name__ == "__main__":
    main()
