"""Results of the models' table: a file for each model, and the page and the CSV file that they make."""

import csv
import json
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path("runs/models")
PAGE, CSV = Path("docs/models.md"), Path("benchmarks/results/models.csv")
BEGIN, END = "<!-- begin: made by python -m benchmarks.models_table -->", "<!-- end -->"
COLUMNS = ("masks", "gradients", "edit", "reload")
KINDS = ("conv filters", "neurons", "input features", "attention heads", "experts", "modules", "parameter slices")
LIBRARIES = ("transformers", "timm", "diffusers", "peft", "torchvision")
FAULTS = ("wrong", "traceback")
LETTERS = {"right": "R", "undefined": "·", "wrong": "W", "traceback": "T"}


class Key(NamedTuple):
    """A model of a library."""

    library: str
    name: str


def path_of(key: Key) -> Path:
    """Return the file of a model's result."""
    return FOLDER / f"{key.library}-{key.name}.json"


@dataclass(frozen=True)
class Line:
    """One kind of component of one model.

    Attributes:
        key: The model.
        kind: The kind of component.
        verdicts: By column, `right`, `refused`, `undefined`, `wrong` or `traceback`.
        details: By column, the reason or the largest difference.
    """

    key: Key
    kind: str
    verdicts: Mapping[str, str]
    details: Mapping[str, str]


def lines_of(results: Mapping[Key, Mapping[str, Any]]) -> list[Line]:
    """Return the lines of all models that were checked to the end, in the order of libraries, models and kinds."""
    return [
        Line(
            key,
            kind,
            {cell["column"]: cell["verdict"] for cell in found["cells"]},
            {cell["column"]: cell["detail"] for cell in found["cells"]},
        )
        for key, result in results.items()
        for kind, found in result.get("kinds", {}).items()
    ]


def reason(detail: str) -> str:
    """Return a refusal without the names and numbers of one model, so that equal reasons become one."""
    words = re.sub(r"(?<!\w)'[^']*'", "'...'", without_folders(detail.partition("\n")[0]))
    words = re.sub(r"\{[^}]*\}|\([^)]*\)|\[[^]]*\]", "(...)", words)
    words = re.sub(r"\b[\w.]+, [\w.]+(, [\w.]+)*;", "...;", words)
    return re.sub(r"\d[\d.e+-]*", "n", words)


def without_folders(detail: str) -> str:
    """Return a message without the folders of one machine."""
    return re.sub(r"(?<= )/[^\s,;]+", "...", detail)


def share(lines: Iterable[Line]) -> str:
    """Return the percentages of right and of refused cells among those with a meaning, and the numbers of others."""
    counts = Counter(verdict for line in lines for verdict in line.verdicts.values())
    total = sum(counts.values()) - counts["undefined"]
    if not total:
        return ""
    parts = [f"{counts['right']} of {total} right ({100 * counts['right'] / total:.1f} %)"]
    parts += [f"{counts[verdict]} {verdict}" for verdict in ("refused", *FAULTS) if counts[verdict]]
    return ", ".join(parts)


def rendered(results: Mapping[Key, Mapping[str, Any]], totals: Mapping[str, int]) -> str:
    """Return the part of the page that is made from results; `totals` has the number of models of each library."""
    lines = lines_of(results)
    reasons: dict[str, int] = {}
    for line in lines:
        for column in COLUMNS:
            if line.verdicts[column] == "refused":
                reasons.setdefault(reason(line.details[column]), len(reasons) + 1)
    models = {library: [key for key in results if key.library == library] for library in LIBRARIES}
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", *LIBRARIES))
    parts = [wrapped(f"Versions: {versions}. In all: {share(lines)}."), "", *_summary(lines, models, totals), ""]
    parts += ["Reasons of refusals:", "", *(wrapped(f"{number}. {words}") for words, number in reasons.items()), ""]
    without = {key: found["stopped"] for key, found in results.items() if "stopped" in found}
    stopped = [wrapped(f"- {key.library} {key.name}: {why}") for key, why in without.items()]
    parts += ["Models without results:", "", *stopped, ""] if stopped else []
    for library, keys in models.items():
        if keys:
            parts += [f"### {library}", "", *_table([line for line in lines if line.key in keys], reasons), ""]
    return "\n".join(parts)


def wrapped(text: str) -> str:
    """Return a paragraph, or an item of a list, in lines of at most 120 columns."""
    indent = "   " if re.match(r"\d+\. |- ", text) else ""
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _summary(lines: Sequence[Line], models: Mapping[str, Sequence[Key]], totals: Mapping[str, int]) -> list[str]:
    rows = ["| library | models checked | cells |", "|---|---:|---|"]
    for library, keys in models.items():
        own = share(line for line in lines if line.key.library == library)
        rows += [f"| {library} | {len(keys)} of {totals[library]} | {own} |"] if keys else []
    rows += ["", "| component | masks | gradients | edit | reload |", "|---|---|---|---|---|"]
    for kind in KINDS:
        own = [line for line in lines if line.kind == kind]
        cells = (_counts(line.verdicts[column] for line in own) for column in COLUMNS)
        rows += [f"| {kind} | {' | '.join(cells)} |"] if own else []
    return rows


def _counts(verdicts: Iterable[str]) -> str:
    counts = Counter(verdicts)
    order = ("right", "refused", *FAULTS)
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in order if counts[verdict]) or "·"


def _table(lines: Sequence[Line], reasons: Mapping[str, int]) -> list[str]:
    kinds = [kind for kind in KINDS if any(line.kind == kind for line in lines)]
    rows = [f"| model | {' | '.join(kinds)} |", "|---" * (1 + len(kinds)) + "|"]
    for key in dict.fromkeys(line.key for line in lines):
        own = {line.kind: line for line in lines if line.key == key}
        cells = (_letters(own[kind], reasons) if kind in own else "" for kind in kinds)
        rows.append(f"| {key.name} | {' | '.join(cells)} |")
    return rows


def _letters(line: Line, reasons: Mapping[str, int]) -> str:
    return " ".join(
        LETTERS.get(line.verdicts[column]) or str(reasons[reason(line.details[column])]) for column in COLUMNS
    )


def read_results(order: Iterable[Key]) -> dict[Key, Any]:
    """Return the results that there are, by model."""
    return {key: json.loads(path_of(key).read_text()) for key in order if path_of(key).exists()}


def write_table(order: Iterable[Key]) -> None:
    """Write the page's table and the CSV file from the results of all models."""
    every = list(order)
    results, totals = read_results(every), Counter(key.library for key in every)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{rendered(results, totals)}\n{END}{after}")
    with CSV.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["library", "model", "component", *COLUMNS, "details of refusals and faults"])
        for line in lines_of(results):
            own = [line.details[c] for c in COLUMNS if line.verdicts[c] in ("refused", *FAULTS)]
            told = dict.fromkeys(map(without_folders, own))
            writer.writerow([*line.key, line.kind, *(line.verdicts[c] for c in COLUMNS), "; ".join(told)[:400]])
    print(share(lines_of(results)))
