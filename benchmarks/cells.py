"""Every architecture, kind of component and ablation: the largest difference from an oracle, or why there is none.

    python benchmarks/cells.py > cells.md             # a minute on one core
    python benchmarks/cells.py --architecture GPT-2

Small models with random weights; every row of a batch under a mask of its own, by weights and by hooks. The oracle, in
tests/oracles.py, shares no code with the package.
"""

import argparse

from tests.coverage import ABLATIONS, ARCHITECTURES, CELLS, cell, reason


def main() -> None:
    """Print one table in Markdown, and the reasons for the cells that are not meaningful."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", choices=list(ARCHITECTURES), nargs="+", default=list(ARCHITECTURES))
    arguments = parser.parse_args()
    print(f"| architecture | component | {' | '.join(f'`{label}`' for label in ABLATIONS)} |")
    print(f"|---|---|{'---|' * len(ABLATIONS)}")
    refused: dict[str, list[str]] = {}
    for name, kind in dict.fromkeys((name, kind) for name, kind, _ in CELLS if name in arguments.architecture):
        shown = []
        for label in ABLATIONS:
            found = cell(name, kind, label)
            if isinstance(found, str):
                refused.setdefault(f"`{label}`: {reason(name, kind, label)}", []).append(f"{name}'s {kind}s")
            shown.append("-" if isinstance(found, str) else f"{found[0]:.0e}")
        print(f"| {name} | {kind} | {' | '.join(shown)} |", flush=True)
    print("\nNot meaningful, and refused with an error that says so:\n")
    for why, cells in refused.items():
        print(f"- {why} ({', '.join(cells)})")


if __name__ == "__main__":
    main()
