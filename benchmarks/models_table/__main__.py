"""Check every model of torchvision, timm, transformers, diffusers and peft against oracles without the engine.

    python -m benchmarks.models_table                                # what is missing, then the table in docs/models.md
    python -m benchmarks.models_table --only resnet18 bert --again   # these models once more
    python -m benchmarks.models_table --libraries timm

Each model has random weights and a few sites of every kind of component. Masks, gradients and an edit are compared with
plain hooks and with products of weights, and the edited model is saved and loaded by its library. Results are kept in
runs/models/, one file for each model, so a stopped command goes on where it stopped. A model that takes
longer than its limit, or kills the process, is recorded as such.
"""

import argparse
import importlib
import json
import logging
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

from benchmarks.models_table.results import FOLDER, LIBRARIES, Key, path_of, write_table

SECONDS = 600  # of one model, at most


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=None, help="names of models")
    parser.add_argument("--libraries", nargs="*", default=LIBRARIES, choices=LIBRARIES)
    parser.add_argument("--again", action="store_true", help="check models that have results too")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="most seconds of one model")
    parser.add_argument("--worker", nargs="*", default=None, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker is not None:
        work(given.worker)
        return
    keys = [key for key in keys_of(given.libraries) if given.only is None or key.name in given.only]
    FOLDER.mkdir(parents=True, exist_ok=True)
    if given.again:
        for key in keys:
            path_of(key).unlink(missing_ok=True)
    watch([key for key in keys if not path_of(key).exists()], given.seconds)
    write_table(keys_of(LIBRARIES))


def keys_of(libraries: Sequence[str]) -> list[Key]:
    """Return all models of some libraries."""
    return [Key(library, subject.name) for library in libraries for subject in _subjects(library)]


def _subjects(library: str) -> Any:
    return importlib.import_module(f"benchmarks.models_table.{library}_models").subjects()


def watch(keys: list[Key], seconds: int) -> None:
    """Check models in processes of their own, one process for as many as it survives."""
    while keys:
        names = [f"{key.library}/{key.name}" for key in keys]
        worker = subprocess.Popen([sys.executable, "-m", "benchmarks.models_table", "--worker", *names])
        begun = time.monotonic()
        while worker.poll() is None:
            time.sleep(1)
            left = [key for key in keys if not path_of(key).exists()]
            if len(left) < len(keys):
                keys, begun = left, time.monotonic()
            elif time.monotonic() - begun > seconds:
                worker.kill()
        worker.wait()
        keys = [key for key in keys if not path_of(key).exists()]
        if keys and worker.returncode:
            why = f"took more than {seconds} s" if worker.returncode == -9 else f"ended with {worker.returncode}"
            path_of(keys[0]).write_text(json.dumps({"stopped": f"the process {why}"}) + "\n")
            print(keys[0].name, why, flush=True)
            keys = keys[1:]


def work(names: Sequence[str]) -> None:
    """Check models one after another, in this process."""
    warnings.simplefilter("ignore")
    logging.getLogger("coar").setLevel(logging.ERROR)
    import torch
    import transformers

    from benchmarks.models_table.cells import check

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    subjects = {}
    for library in dict.fromkeys(name.partition("/")[0] for name in names):
        subjects |= {f"{library}/{subject.name}": subject for subject in _subjects(library)}
    for name in names:
        key = Key(*name.split("/", 1))
        try:
            found = check(subjects[name])
        except Exception as error:
            found = {"stopped": f"{type(error).__name__}: {error}"}
        partial = path_of(key).with_suffix(".partial")
        partial.write_text(json.dumps(found, indent=1) + "\n")
        partial.rename(path_of(key))
        verdicts = [cell["verdict"] for kind in found.get("kinds", {}).values() for cell in kind["cells"]]
        counts = {verdict: verdicts.count(verdict) for verdict in dict.fromkeys(verdicts)}
        print(name, found.get("seconds", ""), counts or found, flush=True)


if __name__ == "__main__":
    main()
