"""One worker of a job array, or one of several that create a run at once.

`python -m tests.faults.shares K N PATH [MASKS]` does the K-th of N shares of a run, by default of 100 training masks.
"""

import sys

from tests.faults.helpers import collect, study

ASKED = {"masks": 100, "test_masks": 20, "gradients": 8}


def main() -> None:
    number, count, path, *masks = sys.argv[1:]
    asked = ASKED | {"masks": int(masks[0])} if masks else ASKED
    collect(study(), path, **asked, worker=(int(number), int(count)))


if __name__ == "__main__":
    main()
