"""Largest difference from an oracle for every architecture, kind of component and ablation.

    python benchmarks/cells.py > cells.md             # a minute on one core
    python benchmarks/cells.py --architecture GPT-2

The models are small and have random weights. Every row of a batch has a mask of its own, applied in weights and in
hooks. The oracle, in tests/oracles.py, shares no code with the package. Combinations without a meaning are listed with
the reason.
"""

import argparse

from tests.architectures import ABLATIONS, ARCHITECTURES, CELLS, cell, reason


def main() -> None:
    """Print one table in Markdown, and the reasons why other cells are not meaningful."""
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
