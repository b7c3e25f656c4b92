"""How far gradients by edges (EAP) are from exact patching, by the port that an edge leads to.

    OMP_NUM_THREADS=1 python benchmarks/circuit_patching.py --task induction --ablation counterfactual

Both give the fall of the output when one edge alone is ablated: exactly, with a pass per edge, and to first order.
Queries and keys are read through a softmax, where AtP* (Kramár et al. 2024) corrects the first order.
"""

import argparse
import importlib
import logging

import numpy as np
import pandas as pd

import coar


def main() -> None:
    """Print a table in Markdown, one row per port."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="induction", help="a pipeline with few edges")
    parser.add_argument("--ablation", default="counterfactual")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    evaluator = coar.CircuitEvaluator(importlib.import_module(f"pipelines.{given.task}").study(ablation=given.ablation))
    methods = {"eap": {}, "eap_ig": {"steps": 10, "path": "activations"}, "exact": {"loss": "output"}}
    scores = {
        name: coar.circuit_scores(evaluator.study, name, evaluator=evaluator, progress=False, **settings)
        for name, settings in methods.items()
    }
    table = pd.DataFrame({name: one.values for name, one in scores.items()})
    names = pd.Series(evaluator.study.components.names)
    ports = names.str.rpartition(".")[2].where(names.str.contains(r"\.[qkv]$"), "other")
    print("| port | edges | largest effect | error of eap | of eap_ig | rank correlation of eap | of eap_ig |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for port, rows in table.groupby(ports):
        exact = rows["exact"]
        norm = float(np.sqrt((exact**2).mean()))
        errors = [float(np.sqrt(((rows[name] - exact) ** 2).mean())) / norm for name in ("eap", "eap_ig")]
        ranks = [float(rows[name].abs().rank().corr(exact.abs().rank())) for name in ("eap", "eap_ig")]
        cells = (*(f"{error:.0%}" for error in errors), *(f"{rank:.2f}" for rank in ranks))
        print(f"| {port} | {len(rows)} | {exact.abs().max():.2f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
