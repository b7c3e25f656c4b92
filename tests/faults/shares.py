"""One worker of a job array, or one of several that create a run at once: `python -m tests.faults.shares K N PATH`."""

import sys

from tests.faults.helpers import collect, study

ASKED = {"masks": 100, "test_masks": 20, "probes": 8}


def main() -> None:
    number, count, path = sys.argv[1:]
    collect(study(), path, **ASKED, worker=(int(number), int(count)))


if __name__ == "__main__":
    main()
