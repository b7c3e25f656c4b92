"""Single facts forgotten by strengths of ablation, and by rank-one edits of one MLP, on the same facts and texts.

    python -m benchmarks.fact_edits --facts 20

Every n-th fact that the model recalls is forgotten by itself: its answer's probability must fall under 0.02. Judged
are all other recalled facts, and passages of text that no choice has seen, on the edited weights. The peer is the
rank-one edit of Meng et al. (2022, "Locating and editing factual associations in GPT"), written from its formula: with
k the MLP's activations at the subject's last token, and C their second moment over text, the down projection W becomes
W + d (C^-1 k)^T / (k^T C^-1 k), where d, the change of the MLP's output at that token, is trained until the answer's
probability is where it must be, with a penalty for the change of the next token after the subject. `--layer` is the
MLP that it edits.
"""

import argparse
import copy
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import coar
from pipelines import facts

REQUIRED = 0.02
RATE, STEPS, DECAY, KEPT = 0.3, 60, 1e-3, 0.1  # of training d: Adam's rate, steps, |d|^2 / |output|^2, and divergence


def odds(logits: Tensor, answer: int) -> Tensor:
    """Return the log-odds of an answer."""
    chosen = logits.log_softmax(-1)[answer]
    return chosen - torch.log1p(-chosen.exp().clamp(max=1 - 1e-6))


def second_moment(model: nn.Module, down: nn.Module, texts: coar.Examples) -> Tensor:
    """Return the (width, width) mean of k k^T over the tokens of texts but the first of each."""
    total, count = torch.zeros(down.in_features, down.in_features), 0

    def add(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal total, count
        keys = args[0][:, 1:].reshape(-1, down.in_features)
        total, count = total + keys.T @ keys, count + len(keys)

    handle = down.register_forward_pre_hook(add)
    for start in range(0, len(texts), 8):
        with torch.no_grad():
            model(**texts.block(start, min(start + 8, len(texts)))[0])
    handle.remove()
    return total / count


def rank_one(model: nn.Module, layer: int, moment: Tensor, fact: coar.Examples) -> nn.Module:
    """Return a copy of a Llama in which the MLP of a layer is edited so that it loses a fact."""
    edited = copy.deepcopy(model)
    down = edited.get_submodule(f"model.layers.{layer}.mlp.down_proj")
    inputs, targets = fact.block(0, 1)
    real = inputs["attention_mask"][0].bool()
    ids, answer = inputs["input_ids"][:, real], int(targets[0, -1])
    at = int(fact.positions["subject_last"][0]) - int((~real).sum())  # positions count the padding
    seen: dict[str, Tensor] = {}
    change = torch.zeros(down.out_features, requires_grad=True)

    def moved(_module: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> Tensor:
        seen["key"], seen["output"] = args[0][0, at].detach(), result[0, at].detach()
        return result.index_add(1, torch.tensor([at]), change[None, None])

    handle = down.register_forward_hook(moved)
    with torch.no_grad():
        after_subject = edited(ids).logits[0, at].log_softmax(0)
    adam, goal = torch.optim.Adam([change], lr=RATE), float(np.log(REQUIRED / (1 - REQUIRED))) - 0.3
    for _ in range(STEPS):
        logits = edited(ids).logits[0]
        now = odds(logits[-1], answer)
        if now < goal:
            break
        kept = nn.functional.kl_div(logits[at].log_softmax(0), after_subject, log_target=True, reduction="sum")
        loss = now.clamp(min=goal) + KEPT * kept + DECAY * change.square().sum() / seen["output"].square().sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    handle.remove()
    towards = torch.linalg.solve(moment + 1e-4 * moment.diagonal().mean() * torch.eye(len(moment)), seen["key"])
    with torch.no_grad():
        down.weight += torch.outer(change.detach(), towards) / (seen["key"] @ towards)
    return edited


def measured(model: nn.Module, known: coar.Examples, texts: coar.Examples) -> tuple[np.ndarray, float]:
    """Return the probabilities of all answers, and the mean loss of texts per token in nats, by plain forwards."""
    chances, losses = [], []
    for start in range(0, len(known), 32):
        inputs, targets = known.block(start, min(start + 32, len(known)))
        with torch.inference_mode():
            said = model(**inputs).logits[:, -1].softmax(1)
        chances.append(said[torch.arange(len(said)), targets[:, -1]])
    for start in range(0, len(texts), 8):
        inputs, _ = texts.block(start, min(start + 8, len(texts)))
        with torch.inference_mode():
            said = model(**inputs).logits[:, :-1]
        losses.append(nn.functional.cross_entropy(said.flatten(0, 1), inputs["input_ids"][:, 1:].flatten()))
    return torch.cat(chances).numpy(), float(torch.stack(losses).mean())


class Comparison:
    """Forgets facts one by one by both methods, and measures what else changes.

    Args:
        layer: The MLP that the peer edits.
    """

    def __init__(self, layer: int) -> None:
        self.model, self.known = facts.everything()
        training, self.held_out = facts.texts()
        study = coar.Study(
            model=self.model,
            examples=self.known,
            components=coar.mlp_neurons(self.model) + coar.attention_heads(self.model),
            output=coar.TokenMargin(reduction="last"),
            ablation=coar.ZeroActivation(),
        )
        start = time.process_time()
        self.editor = coar.FactEditor(study, training)
        print(f"references: {time.process_time() - start:.0f} s of a processor", flush=True)
        self.layer = layer
        down = self.model.get_submodule(f"model.layers.{layer}.mlp.down_proj")
        self.moment = second_moment(self.model, down, training)
        self.before, self.loss = measured(self.model, self.known, self.held_out)

    def edited(self, number: int, method: str) -> tuple[nn.Module, int]:
        """Return the model without a fact, and the number of changed components; the model as it is where refused."""
        if method == "rank one":
            return rank_one(self.model, self.layer, self.moment, self.known.subset([number])), 0
        others = [i for i in range(len(self.known)) if i != number]
        try:
            found = self.editor.edit(coar.EditGoal(targets=[number], references=others, direction="decrease"))
        except coar.errors.BoundError as error:
            print(number, error, flush=True)
            return self.model, 0
        return found.edit.apply(self.model), len(found.edit)

    def row(self, number: int, method: str) -> dict[str, object]:
        """Return the row of a fact and a method."""
        start = time.process_time()
        edited, components = self.edited(number, method)
        seconds = time.process_time() - start
        after, loss = measured(edited, self.known, self.held_out)
        change = 100 * (after - self.before)[np.arange(len(after)) != number]
        ends = {"before": self.before[number], "after": after[number]}
        harm = {"others": change.mean(), "worst": change.min(), "perplexity": 100 * np.expm1(loss - self.loss)}
        about = {"fact": number, "subject": self.known.metadata["subject"][number], "method": method}
        return {**about, **ends, **harm, "components": components, "seconds": seconds}


def main() -> None:
    """Run the benchmark; a file's rows are not computed again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", type=int, default=20)
    parser.add_argument("--layer", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("reports/fact-edits.csv"))
    args = parser.parse_args()
    compared = Comparison(args.layer)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for number in np.linspace(0, len(compared.known) - 1, args.facts).round().astype(int).tolist():
        if args.out.is_file() and number in pd.read_csv(args.out)["fact"].tolist():
            continue
        table = pd.DataFrame([compared.row(number, method) for method in ("strengths", "rank one")])
        print(table.to_string(index=False, float_format=lambda value: f"{value:.4g}"), flush=True)
        table.to_csv(args.out, mode="a", header=not args.out.is_file(), index=False)
    found = pd.read_csv(args.out).groupby("method")[["after", "others", "worst", "perplexity", "seconds"]]
    print(found.agg(["mean", "min", "max"]).T.to_string())


if __name__ == "__main__":
    main()
