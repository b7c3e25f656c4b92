"""Lenses of every kind on a small GPT-2: their divergence from the model on held-out text, and their faithfulness.

    python -m benchmarks.lenses

The model is the GPT-2 of the pipeline `gpt2` with six layers instead of three, trained on the same text for half as
many epochs. All trained kinds see the same tokens in the same order.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn
from transformers import GPT2LMHeadModel

import coar
from pipelines import gpt2, training

LAYERS = 6
RECIPE = replace(gpt2.RECIPE, epochs=6)
KINDS = ("logit", "mean", "tuned", "optimal")
DIRECTIONS = ("random", "singular")
TEXTS_PER_STEP = 8
TRAINED, JUDGED = 512, 64  # passages


def six_layers() -> nn.Module:
    """Return a GPT-2 with random weights, of the sizes of the pipeline but for the number of layers."""
    config = gpt2.small_gpt2().config
    config.n_layer = LAYERS
    return GPT2LMHeadModel(config)


def model() -> nn.Module:
    """Return the trained model, kept under data/gpt2."""
    return training.fitted(
        six_layers,
        gpt2.examples("train"),
        RECIPE,
        loss=gpt2.next_token_loss,
        folder=gpt2.FOLDER,
        seed=0,
        about="two minutes on one core",
        report=gpt2.next_tokens_found,
    )


def faithfulness(lens: coar.Lens, texts: coar.Examples, count: int) -> pd.DataFrame:
    """Return a row per layer and kind of directions: the correlation of log divergences, and the mean similarity."""
    rows = []
    for layer in lens.layers:
        for directions in DIRECTIONS:
            moves = lens.steering(texts, layer, directions=directions, count=count)
            logs = np.log(moves[["kl_lens", "kl_model"]].clip(lower=1e-9))
            found = {"correlation": logs.corr().iloc[0, 1], "similarity": moves["similarity"].mean()}
            rows.append({"kind": lens.kind, "layer": layer, "directions": directions, **found})
    return pd.DataFrame(rows)


def main() -> None:
    """Train the lenses, print tables, and write them to a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--count", type=int, default=4, help="directions of each kind")
    parser.add_argument("--out", type=Path, default=Path("reports/lenses"))
    args = parser.parse_args()
    net = model()
    texts = gpt2.examples("train").subset(range(TRAINED))
    held_out = gpt2.examples("judge").subset(range(JUDGED))
    args.out.mkdir(parents=True, exist_ok=True)
    divergences, faithful = [], []
    for kind in KINDS:
        start = time.process_time()
        lens = coar.lens(net, texts, kind, steps=args.steps, texts_per_step=TEXTS_PER_STEP)
        print(f"{kind}: {time.process_time() - start:.0f} s of a processor", flush=True)
        divergences.append(lens.summary(held_out))
        print(divergences[-1].round(4).to_string(index=False), flush=True)
        faithful.append(faithfulness(lens, held_out, args.count))
        print(faithful[-1].round(3).to_string(index=False), flush=True)
    table = pd.concat(divergences)
    table.to_csv(args.out / "divergence.csv", index=False)
    pd.concat(faithful).to_csv(args.out / "faithfulness.csv", index=False)
    print(table.pivot_table(index="layer", columns="kind", values="kl", sort=False).round(4).to_string())


if __name__ == "__main__":
    main()
