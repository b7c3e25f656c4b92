"""Lenses of every kind: their divergence from the model on held-out text, and their faithfulness.

    python -m benchmarks.lenses
    python -m benchmarks.lenses --smollm2 --layers 10 15 20 25 --steps 150 --passages 2 --judged 16 --count 3
    pip install --no-deps tuned-lens && python -m benchmarks.lenses --peer

The model is the GPT-2 of the pipeline `gpt2` with six layers instead of three, trained on the same text for half as
many epochs; or SmolLM2-135M, on the texts of the pipeline `facts`. All trained kinds see the same tokens in the same
order. The peer is the `TunedLens` of the library tuned-lens 0.2.0, trained on as many passages by the recipe of its
training script: stochastic gradient descent at a rate of 0.1 that falls linearly to zero, Nesterov momentum 0.9, weight
decay 1e-3, gradients clipped to norm 1.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

import coar
from pipelines import facts, gpt2, language_model, training

LAYERS = 6
RECIPE = replace(gpt2.RECIPE, epochs=6)
KINDS = ("logit", "mean", "tuned", "optimal")
DIRECTIONS = ("random", "singular")
TRAINED = 512  # passages


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


def peer(net: nn.Module, texts: coar.Examples, held_out: coar.Examples, steps: int, size: int) -> pd.DataFrame:
    """Return the divergence per layer of the library's tuned lens, trained on so many passages per step."""
    from tuned_lens.nn.lenses import TunedLens

    lens, generator = TunedLens.from_model(net), np.random.default_rng(0)
    trained = [parameter for parameter in lens.parameters() if parameter.requires_grad]
    sgd = torch.optim.SGD(trained, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)
    for step in range(steps):
        drawn = texts.subset(generator.choice(len(texts), size, replace=False))
        sgd.param_groups[0]["lr"] = 0.1 * (1 - step / steps)
        sgd.zero_grad()
        peer_losses(net, lens, drawn).sum().backward()  # each layer's loss has gradients by its own translator alone
        nn.utils.clip_grad_norm_(trained, 1.0)
        sgd.step()
    with torch.no_grad():
        return pd.DataFrame({"layer": range(LAYERS), "kl": peer_losses(net, lens, held_out).numpy()})


def peer_losses(net: nn.Module, lens: nn.Module, texts: coar.Examples) -> Tensor:
    """Return the (layers,) mean divergences at every token but the first."""
    with torch.no_grad():
        passed = net(**texts.block(0, len(texts))[0], output_hidden_states=True)
    target, losses = passed.logits[:, 1:].log_softmax(-1), []
    for layer in range(LAYERS):
        said = lens(passed.hidden_states[layer][:, 1:], layer).log_softmax(-1)
        losses.append((target.exp() * (target - said)).sum(-1).mean())
    return torch.stack(losses)


def main() -> None:
    """Train the lenses, print tables, and write them to a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", action="store_true", help="lenses of SmolLM2 instead")
    parser.add_argument("--layers", type=int, nargs="+", help="by default all")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--passages", type=int, default=8, help="passages of a step")
    parser.add_argument("--judged", type=int, default=64, help="held-out passages")
    parser.add_argument("--count", type=int, default=4, help="directions of each kind")
    parser.add_argument("--peer", action="store_true", help="train the lens of tuned-lens instead")
    parser.add_argument("--out", type=Path, default=Path("reports/lenses"))
    args = parser.parse_args()
    if args.smollm2:
        net, (texts, held_out) = language_model.model(), facts.texts()
    else:
        net, texts, held_out = model(), gpt2.examples("train").subset(range(TRAINED)), gpt2.examples("judge")
    held_out = held_out.subset(range(args.judged))
    if args.peer:
        print(peer(net, texts, held_out, args.steps, args.passages).round(4).to_string(index=False))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    divergences, faithful = [], []
    for kind in KINDS:
        start = time.process_time()
        lens = coar.lens(
            net, texts, kind, layers=args.layers, steps=args.steps, texts_per_step=args.passages, progress=False
        )
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
