"""Costs of the default job of `make edit` and of the classic one: digits, 64 mask gradients against 3,000 masks.

    OMP_NUM_THREADS=1 python benchmarks/default_job.py     # some minutes; writes pipelines/digits.json

It measures processor seconds of one process with one thread, which depend little on other work on the machine: to
collect, without test masks, and to fit. Both fits are scored on the pipeline's test masks at the ablated fraction of
training. `coar all` prints the comparison in the file.
"""

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import coar
from pipelines import digits

CLASSIC = 3_000
WARM_UP = 8  # masks and mask gradients of a first run, which is not timed, to import everything


def seconds(work: Callable[[], object]) -> float:
    """Return the processor seconds of a call."""
    before = time.process_time()
    work()
    return time.process_time() - before


def measured(study: coar.Study, path: Path, method: str, sizes: dict[str, int]) -> dict[str, object]:
    """Collect a run of these sizes and fit it; return the cost of both, and the held-out correlation."""
    took = seconds(lambda: coar.collect(study, path, **sizes, progress=False))
    run = coar.Run.open(path)
    took += seconds(lambda: coar.fit(run, method=method, progress=False))
    run = coar.collect(study, path, test_masks=digits.TEST_MASKS, progress=False)
    correlation = coar.evaluate(run).table["pearson"][0]
    return {
        "method": method,
        "masks": sizes.get("masks", 0),
        "gradients": sizes.get("gradients", 0),
        "seconds": round(took, 1),
        "correlation": round(float(correlation), 4),
    }


def machine() -> str:
    """Return the names of the processor and of its widest vector instructions."""
    about = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").is_file() else ""
    lines = dict(line.split(":", 1) for line in about.splitlines() if ":" in line)
    named = {key.strip(): value.strip() for key, value in lines.items()}
    flags = named.get("flags", "").split()
    vectors = next((name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags), "")
    return ", ".join(part for part in (named.get("model name", platform.machine()), vectors) if part)


def main() -> None:
    """Measure both fits and write the comparison."""
    study = digits.study()
    with tempfile.TemporaryDirectory() as folder:
        warm = coar.collect(study, f"{folder}/warm.zarr", masks=WARM_UP, gradients=32, progress=False)
        coar.fit(warm, progress=False)
        found = {
            "ablation": study.ablation.label,
            "date": datetime.now(UTC).date().isoformat(),
            "machine": machine(),
            "informed": measured(study, Path(folder) / "new.zarr", "informed", {"gradients": digits.GRADIENTS}),
            "classic": measured(study, Path(folder) / "old.zarr", "ridge", {"masks": CLASSIC}),
        }
    text = json.dumps(found, indent=2)
    digits.COMPARISON.write_text(f"{text}\n", encoding="utf-8")
    print(text)
    print(f"{os.environ.get('OMP_NUM_THREADS', 'all')} threads; written to {digits.COMPARISON}")


if __name__ == "__main__":
    main()
