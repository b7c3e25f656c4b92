"""The edits in a reports folder: their components, tables, and margins before and after."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from coar.attributions import Attributions
from coar.editing.edit import Edit
from coar.editing.evaluate import columns
from coar.editing.judge import margins
from coar.errors import EditError
from coar.examples import Examples
from coar.explorer.looks import looks_of
from coar.explorer.packing import floats, plain, table
from coar.explorer.source import Source
from coar.outputs.base import Output

EDITS = 12  # of a folder, at most, on a page
JUDGED = 2_000  # judging examples, at most
PICTURES = 24  # of the judging examples that an edit moves to either side of 0, at most


def edits_of(
    folder: Path, names: list[str], attributions: Attributions | None, source: Source | None, *, only: str = "*"
) -> dict[str, Any]:
    """Return every edit in the folders below a reports folder, as the page reads it.

    Margins before and after need the model, so they are left out without a pipeline, and where the pipeline has no
    judging examples or no margin.

    Args:
        folder: The reports folder of a run.
        names: Names of the components on the page.
        attributions: The attributions on the page, whose constants edits are compared with; None without a fit.
        source: The pipeline; None without one.
        only: Name of the folder to read; by default all.

    Raises:
        EditError: When a file is not an edit.
    """
    tasks = []
    found = [file for name in ("edit*.json", "table.csv") for file in folder.glob(f"{only}/{name}")]
    for place in sorted({file.parent for file in found}):
        files = sorted(place.glob("edit*.json"), key=lambda file: [int(n) for n in re.findall(r"\d+", file.stem)])
        made: dict[str, Any] = {"name": place.name, "all": len(files)}
        for name in ("table", "curve"):
            if (place / f"{name}.csv").is_file():
                made[name] = table(pd.read_csv(place / f"{name}.csv"))
        tasks.append(made | {"files": files[:EDITS]})
    edits = [(made, Edit.load(file), file) for made in tasks for file in made.pop("files")]
    for made, edit, file in edits:
        made.setdefault("edits", []).append(_described(edit, file, names, attributions))
    for made in tasks:
        made.setdefault("edits", [])
    margin = None if source is None else source.study.output.hard_and_smooth()
    if not edits or source is None or source.judge is None or margin is None:
        return {"tasks": tasks, "judge": None}
    described = [one for made in tasks for one in made["edits"]]
    judge = source.judge()
    return {"tasks": tasks, "judge": _judged(source, judge, [edit for _, edit, _ in edits], described, margin[0])}


def _described(edit: Edit, file: Path, names: list[str], attributions: Attributions | None) -> dict[str, Any]:
    """Return the contents of an edit, and how it departs from what attributions predict."""
    number = {name: i for i, name in enumerate(names)}
    weights = file.with_suffix(".safetensors")
    own = False
    if attributions is not None and {one.name for one in edit.components} <= set(attributions.components.names):
        own = not np.array_equal(edit.constants(attributions), attributions.origin.constants, equal_nan=True)
    return {
        "file": str(file),
        "weights": str(weights) if weights.is_file() else None,
        "undo": edit.originals is not None,
        "components": [number[one.name] for one in edit.components if one.name in number],
        "names": [one.name for one in edit.components],
        "strengths": list(edit.strengths),
        "own_constants": own,
        "goal": None if edit.goal is None else edit.goal.model_dump(mode="json", exclude_none=True),
    }


def _judged(
    source: Source, everything: Examples, edits: list[Edit], described: list[dict[str, Any]], margin: Output
) -> dict[str, Any]:
    """Add margins after each edit to its description; return the judging examples, with margins before."""
    study = source.study
    few = np.linspace(0, len(everything) - 1, min(len(everything), JUDGED)).round().astype(np.int64)
    judge = everything.subset(few)
    before = margins(study.model, judge, output=margin)
    metadata = columns(judge)
    pictured: dict[int, None] = {}
    for edit, made in zip(edits, described, strict=True):
        try:
            edited = edit.apply(study.model)
        except EditError as error:  # of an earlier model, say; the page shows the reason in place of margins
            made["refused"] = str(error)
            continue
        after = margins(edited, judge, output=margin)
        general = edit.goal is not None and edit.goal.general
        targets = edit.goal.resolve(metadata)[0] if edit.goal is not None and general else np.zeros(0, dtype=np.int64)
        made |= {"after": floats(after), "targets": targets.tolist()}
        moved = np.setdiff1d(np.flatnonzero((before > 0) != (after > 0)), targets)
        for side in (moved[after[moved] <= 0], moved[after[moved] > 0]):
            pictured |= dict.fromkeys(side[:PICTURES].tolist())
        if edit.goal is not None and not isinstance(edit.goal.targets, str):
            own = study.examples.subset(edit.goal.targets)
            pair = (floats(margins(net, own, output=margin)) for net in (study.model, edited))
            made["own"] = {"rows": list(edit.goal.targets), **dict(zip(("before", "after"), pair, strict=True))}
    shown = sorted(pictured)
    return {
        "of": len(everything),
        "before": floats(before),
        "metadata": {name: [plain(value) for value in column] for name, column in metadata.items()},
        "shown": shown,
        **_looks(judge, shown, source),
    }


def _looks(judge: Examples, shown: list[int], source: Source) -> dict[str, Any]:
    return looks_of(judge, np.array(shown), source.show, source.tokenizer).packed() if shown else {}
