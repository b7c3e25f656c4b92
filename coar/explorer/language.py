"""Circuits, traces and lenses in reports folders, as a page reads them."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from coar.circuits.circuit import Circuit
from coar.errors import CircuitError
from coar.explorer.packing import table
from coar.store.run import Run

CIRCUITS, TRACES, LENSES = 24, 12, 6  # of each on a page, at most
READ = 64  # tokens of a text, at most
RANKS = 3  # next tokens at each layer and token of a text
TRACE_COLUMNS = ["kind", "layer", "window", "place", "aie", "low", "high"]
LENS_COLUMNS = ["kind", "layer", "kl", "low", "high"]
READING_COLUMNS = ["layer", "position", "token", "rank", "prediction", "probability"]


def language_of(folders: Iterable[Path], run: Run, notes: list[str]) -> dict[str, Any]:
    """Return the circuits, traces and lenses that the commands `circuit`, `trace` and `lens` wrote into some folders.

    Args:
        folders: Where to look; the folders directly below them are read, too.
        run: The run of the page, with whose weights those of circuits are compared.
        notes: Gets a sentence for each file that is not shown.
    """
    places = dict.fromkeys(place for folder in folders for place in (folder, *sorted(folder.glob("*/"))))
    circuits = [made for place in places for made in _circuits(place, run, notes)]
    traces = [made for place in places for made in _traces(place, notes)]
    lenses = [made for place in places for made in _lenses(place, notes)]
    found = {"circuits": (circuits, CIRCUITS), "traces": (traces, TRACES), "lenses": (lenses, LENSES)}
    for name, (all_of_them, most) in found.items():
        if len(all_of_them) > most:
            notes.append(f"The page has the first {most} of {len(all_of_them)} {name}.")
    return {name: all_of_them[:most] for name, (all_of_them, most) in found.items() if all_of_them}


def _circuits(place: Path, run: Run, notes: list[str]) -> list[dict[str, Any]]:
    """Return the circuits of a folder: all JSON files next to `circuits.csv`, or those named `circuit*.json`."""
    judged = _table(place / "circuits.csv", ["method", "edges", "kl"], notes)
    made = []
    for file in sorted(place.glob("*.json" if judged else "circuit*.json"), key=_by_numbers):
        try:
            circuit = Circuit.load(file)
        except CircuitError as error:
            notes.append(f"Not shown: {error}.")
            continue
        made.append(
            {
                "file": str(file),
                "name": file.stem,
                "edges": list(circuit.edges),
                "table": circuit.table,
                "size": circuit.size,
                "ablation": circuit.ablation,
                "method": circuit.method,
                "own": circuit.weights == run.fingerprint["weights"],
                "judged": judged,
            }
        )
    return made


def _traces(place: Path, notes: list[str]) -> list[dict[str, Any]]:
    files = [file for file in sorted(place.glob("trace-*.csv")) if not file.stem.endswith("-per-fact")]
    packed = [(file, _table(file, TRACE_COLUMNS, notes)) for file in files]
    return [
        {"file": str(file), "corruption": file.stem.removeprefix("trace-"), "table": found}
        for file, found in packed
        if found
    ]


def _lenses(place: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Return the divergences and readings of the lenses of a folder."""
    divergences = _table(place / "lens.csv", LENS_COLUMNS, notes)
    if divergences is None:
        return []

    def part(frame: "pd.DataFrame") -> "pd.DataFrame":
        return frame[(frame["position"] <= READ) & (frame["rank"] <= RANKS)]

    packed = {
        file.stem.removeprefix("lens-"): _table(file, READING_COLUMNS, notes, part)
        for file in sorted(place.glob("lens-*.csv"))
    }
    readings = {kind: found for kind, found in packed.items() if found}
    return [{"file": str(place / "lens.csv"), "table": divergences, "readings": readings}]


def _table(
    file: Path,
    columns: list[str],
    notes: list[str],
    part: "Callable[[pd.DataFrame], pd.DataFrame]" = lambda frame: frame,
) -> dict[str, Any] | None:
    """Return a part of a table in a file, packed; None without the file, and with a note where it is another table."""
    if not file.is_file():
        return None
    try:
        frame = pd.read_csv(file, keep_default_na=False, na_values={"kl": [""], "aie": [""]})
        missing = [name for name in columns if name not in frame]
        if missing:
            raise ValueError(f"it has no column {missing[0]!r}")
        return table(part(frame)[columns])
    except (OSError, ValueError, TypeError) as error:  # pandas raises kinds of these for a damaged table
        notes.append(f"Not shown: {file} ({error}); write it again with the command that wrote it.")
        return None


def _by_numbers(file: Path) -> tuple[str, int]:
    """Return what sorts `eap-60.json` before `eap-120.json`."""
    name, _, number = file.stem.rpartition("-")
    return (name, int(number)) if number.isdecimal() else (file.stem, 0)
