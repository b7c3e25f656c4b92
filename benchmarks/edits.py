"""Verified choice against other rules, on all tasks whose pipelines are there: one table and one figure per task.

    COAR_DATA=/path/to/folder python benchmarks/edits.py
    python benchmarks/edits.py --pipelines digits --tasks forget --seeds 0

Attributions come from probes, with a mask seed each, or with a training seed each where the pipeline trains its model.
Components are chosen on choosing examples and judged on others. The rules that only rank are given the numbers of
components that suit them best on the very examples they are judged on, the fewest with the verified choice's effect and
the best with no more than its harm, so that the comparison errs in their favour.

Every piece of work is kept in reports/edits/done, so that a run that was stopped goes on; results go to reports/edits.
"""

import argparse
import importlib
import inspect
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import coar
from coar.editing import effect_curve, welch_t
from coar.editing.judging import margins
from coar.editing.ranking import ranking
from coar.editing.tasks import FIX, FIX_STEPS, FIX_TRADEOFF, FORGET, REPAIR

FOLDER = Path("reports/edits")
PROBES = 96
COUNTS = [*range(21), *range(22, 41, 2), *range(45, 101, 5)]
TASKS = {
    "digits": ("forget", "fix"),
    "cifar10": ("forget", "fix"),
    "subpopulations": ("group",),
    "waterbirds": ("group",),
    "celeba": ("group",),
    "backdoor": ("backdoor",),
    "typographic": ("typographic",),
    "clip": ("typographic",),
}
RULES = ("verified", "welch", "gradient_x_gate", "leave_one_out", "random")
COLOURS = dict(zip(RULES, ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#777777"), strict=True))


@dataclass(frozen=True)
class Case:
    """A study with a seed, its run, and the examples to choose and to judge on."""

    name: str
    seed: int
    study: coar.Study
    run: coar.Run
    choosing: coar.Examples | None
    judge: coar.Examples
    goal: coar.EditGoal | None

    def attributions(self, rule: str) -> coar.Attributions:
        """Return what a rule ranks by, made when it is missing."""
        if rule in ("leave_one_out", "gradient_x_gate"):
            return getattr(coar, rule)(self.study, self.run, progress=False)
        return coar.fit(self.run, progress=False)


def case(name: str, module: ModuleType, seed: int) -> Case:
    """Define the study, and collect its probes when they are missing."""
    known = inspect.signature(module.study).parameters
    study = module.study(**{"training_seed" if "training_seed" in known else "seed": seed})
    run = coar.collect(study, f"runs/edits/{name}-{seed}.zarr", masks=0, probes=PROBES, progress=False)
    more = module.choosing() if hasattr(module, "choosing") else None
    return Case(name, seed, study, run, more, module.judge(), getattr(module, "GOAL", None))


def goals(case: Case, task: str) -> Iterator[tuple[str, coar.EditGoal]]:
    """Yield what a task edits for: ten classes, every error, or the pipeline's own goal."""
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


def choose(case: Case, task: str, goal: coar.EditGoal, rule: str) -> tuple[np.ndarray, list[int], int]:
    """Return a rule's order of components, the numbers of them to judge, and the passes that the choice took."""
    attributions = case.attributions(rule)
    if rule == "verified":
        bounds = {"forget": FORGET, "fix": FIX}
        special = {"tradeoff": FIX_TRADEOFF, "steps": FIX_STEPS} if task == "fix" else {}
        try:
            found = coar.select(
                attributions,
                case.study.model,
                case.study.examples,
                goal,
                choosing=case.choosing,
                bound=bounds.get(task, REPAIR),
                precision="bf16",
                seed=case.seed,
                progress=False,
                **special,
            )
        except coar.errors.GoalError:  # no set within the bound
            return np.zeros(0, dtype=np.int64), [0, 0], 0
        order = np.array([attributions.components.index(one.name) for one in found.edit.components])
        return order, [0, len(order)], found.passes
    d = len(attributions.components)
    counts = [count for count in COUNTS if count <= d]
    if rule == "random":
        return np.random.default_rng(case.seed).permutation(d), counts, 0
    return ranking(welch_t(attributions, goal), goal), counts, 0


def judged(case: Case, task: str, goal: coar.EditGoal, rule: str) -> dict[str, Any]:
    """Choose and judge: accuracy on targets and references against the number of components."""
    start, cpu = time.perf_counter(), time.process_time()
    order, counts, passes = choose(case, task, goal, rule)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    attributions, model = case.attributions(rule), case.study.model
    metadata = {key: np.asarray(column) for key, column in case.judge.metadata.items()}
    seen = effect_curve(model, attributions, order, case.judge, counts=counts) > 0
    if task == "fix":
        (target,) = goal.targets
        own = effect_curve(model, attributions, order, case.study.examples.subset([target]), counts=counts) > 0
        targets, references = own.mean(1), np.arange(len(case.judge))
    else:
        rows, references = goal.resolve(metadata)
        targets = seen[:, rows].mean(1)
    of = goal.groups_of(metadata, references)
    lost = np.stack([seen[:, references[of == group]].mean(1) for group in np.unique(of)])  # (groups, counts)
    points = 100 * (lost - lost[:, :1])
    others = 100 * (seen.mean(1) - seen[0].mean()) if task == "fix" else points.mean(0)
    return {
        "components": counts,
        "targets": (100 * targets).tolist(),
        "others_points": others.tolist(),
        "worst_points": points.min(0).tolist(),
        "passes": passes,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
    }


def kept(file: Path, work: Callable[..., dict[str, Any]], *parts: object) -> dict[str, Any]:
    """Return what a file holds, or do the work and keep it there."""
    if not file.is_file():
        found = work(*parts)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(found))
        partial.replace(file)
    return dict(json.loads(file.read_text()))


def compared(points: dict[str, dict[str, Any]], *, increase: bool) -> Iterator[dict[str, object]]:
    """Yield a row per rule: the verified choice, and each other rule at its effect and at its harm."""
    mine = points["verified"]
    effect, harm = mine["targets"][-1], mine["others_points"][-1]
    sign = 1 if increase else -1
    for rule, found in points.items():
        targets, others = np.array(found["targets"]), np.array(found["others_points"])
        row: dict[str, object] = {"rule": rule, "before": targets[0]}
        if rule == "verified":
            same = best = len(targets) - 1
        else:
            reached = np.flatnonzero(sign * targets >= sign * effect)
            same = int(reached[0]) if len(reached) else None
            harmless = np.flatnonzero(others >= min(harm, 0.0))
            best = int(harmless[np.argmax(sign * targets[harmless])])
        if same is not None:
            row |= {"components": found["components"][same], "targets": targets[same], "others_points": others[same]}
            row["worst_points"] = found["worst_points"][same]
        row["targets_at_same_harm"] = targets[best]
        row |= {name: found[name] for name in ("passes", "seconds", "cpu_seconds")}
        yield row


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Average over targets, then mean and spread over seeds; `reached` is the share with the verified effect."""
    columns = [
        "components",
        "targets",
        "others_points",
        "worst_points",
        "targets_at_same_harm",
        "passes",
        "cpu_seconds",
    ]
    keys = ["task", "pipeline", "rule"]
    per_seed = rows.assign(reached=rows["targets"].notna()).groupby([*keys, "seed"], sort=False)[[*columns, "reached"]]
    by_seed = per_seed.mean().groupby(keys, sort=False)
    spread = by_seed[["targets", "others_points"]].std().add_suffix("_sd")
    return by_seed.mean().join(spread).reset_index()


def figure(rows: pd.DataFrame, task: str) -> Figure:
    """Draw effect against harm, a point per target and rule."""
    names = list(dict.fromkeys(rows["pipeline"]))
    drawing = Figure(figsize=(5 * len(names), 3.8), layout="constrained")
    for axes, name in zip(drawing.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for rule in RULES:
            some = rows[(rows["pipeline"] == name) & (rows["rule"] == rule)]
            axes.scatter(some["others_points"], some["targets"], s=14, color=COLOURS[rule], label=rule)
        axes.set(title=f"{task}: {name}", xlabel="others' change (points)", ylabel="accuracy on targets (%)")
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return drawing


def main() -> None:
    """Run everything that is missing, print the summary, write tables and figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipelines", choices=TASKS, nargs="+", default=list(TASKS))
    parser.add_argument("--tasks", nargs="+", default=sorted({task for tasks in TASKS.values() for task in tasks}))
    parser.add_argument("--rules", choices=RULES, nargs="+", default=list(RULES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    for name in arguments.pipelines:
        if not Path(f"pipelines/{name}.py").is_file():
            continue
        module = importlib.import_module(f"pipelines.{name}")
        for seed in arguments.seeds:
            try:
                here = case(name, module, seed)
            except coar.CoarError as error:
                print(f"{name} is left out: {error}")
                break
            for task in (task for task in TASKS[name] if task in arguments.tasks):
                for target, goal in goals(here, task):
                    points = {}
                    for rule in dict.fromkeys(["verified", *arguments.rules]):
                        file = FOLDER / "done" / f"{name}-{task}-{target}-{seed}-{rule}.json"
                        points[rule] = kept(file, judged, here, task, goal, rule)
                    about = {"task": task, "pipeline": name, "seed": seed, "target": target}
                    new = [about | row for row in compared(points, increase=goal.direction == "increase")]
                    rows += new
                    print(pd.DataFrame(new[:2]).round(2).to_string(index=False, header=False), flush=True)
    table = pd.DataFrame(rows)
    for task, some in table.groupby("task", sort=False):
        some.to_csv(FOLDER / f"{task}.csv", index=False)
        figure(some, str(task)).savefig(FOLDER / f"{task}.png", dpi=130)
    short = summary(table)
    short.to_csv(FOLDER / "summary.csv", index=False)
    print(short.to_string(index=False, float_format=lambda value: f"{value:.2f}"))
    print(f"wrote tables and figures into {FOLDER}")


if __name__ == "__main__":
    main()
