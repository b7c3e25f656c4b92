"""Corruptions of subjects: what replaces the embeddings of their tokens."""

import numpy as np
import torch
from torch import Tensor

from coar.ablation.resample import Counterfactual
from coar.errors import ExamplesError, SettingsError
from coar.examples import Examples
from coar.progress import progress_bar
from coar.tracing.restoring import Cell, Restoring

CORRUPTIONS = ("optimal", "noise", "mean", "resample", "counterfactual")
NOISE = 3.0  # standard deviations of the subjects' embeddings (Meng et al. 2022)
RATE = 0.1  # learning rate of Adam, in standard deviations of each feature
BATCH = 16  # facts per step


def corrupted_subjects(
    kind: str, restoring: Restoring, examples: Examples, learning: Tensor, draws: int, seed: int, pairs: str
) -> Tensor:
    """Return (draws, facts, positions, width) embeddings for the tokens of subjects, of any kind but `optimal`.

    Args:
        kind: `noise`: Gaussian, of three standard deviations of the learning subjects' embeddings, added to them.
            `mean`: their mean. `resample`: the embeddings of another fact's subject, token by token, again from its
            first token where it is shorter. `counterfactual`: those of the fact's partner at the same positions.
        restoring: The decoder on the facts.
        examples: The facts as they were given.
        learning: (learning facts,) numbers of the facts that statistics are computed from.
        draws: Number of draws of `noise` and `resample`.
        seed: Seed of the draws.
        pairs: Metadata column with the name of each fact's pair, for `counterfactual`.
    """
    embeddings, generator = restoring.embeddings, np.random.default_rng(seed)
    if kind == "mean":
        return moments(restoring, learning)[0].expand(1, *embeddings.shape)
    if kind == "noise":
        spread = float(restoring.embeddings[learning][restoring.facts.subject[learning]].std())
        noise = generator.standard_normal((draws, *embeddings.shape), dtype=np.float32)
        return embeddings + NOISE * spread * torch.from_numpy(noise).to(embeddings)
    if kind == "resample":
        return torch.stack([_resampled(restoring, generator) for _ in range(draws)])
    if kind == "counterfactual":
        return _of_partners(restoring, examples, pairs)[None]
    raise SettingsError(f"{kind!r} is no corruption; choose one of {', '.join(CORRUPTIONS)}")


def moments(restoring: Restoring, learning: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (width,) means and standard deviations of the learning subjects' embeddings."""
    values = restoring.embeddings[learning][restoring.facts.subject[learning]].float()
    return values.mean(0), values.std(0, correction=0)


def train_constant(
    restoring: Restoring,
    learning: Tensor,
    *,
    cell: Cell | None,
    start: Tensor,
    deviation: Tensor,
    steps: int,
    seed: int,
    progress: bool = False,
) -> Tensor:
    """Return the (width,) constant that costs the least when it replaces the embeddings of all subjects' tokens.

    c = argmin_c E[(p_clean - p_c)+], where p_c is the answer's probability with c in the subject's place and a cell's
    clean state restored, if one is given (Li and Janson 2024). Adam moves c in units of each feature's standard
    deviation; the learning rate falls linearly to zero.
    """
    moved = torch.zeros_like(start, requires_grad=True)
    adam, generator = torch.optim.Adam([moved], lr=RATE), np.random.default_rng(seed)
    size = min(BATCH, len(learning))
    for step in progress_bar(range(steps), desc="constant", unit="step", shown=progress):
        rows = learning[torch.from_numpy(generator.choice(len(learning), size, replace=False))]
        subjects = (start + deviation * moved).expand(size, restoring.embeddings.shape[1], -1)
        loss = (restoring.clean[rows] - restoring.corrupted(subjects, rows, cell)).clamp_min(0).mean()
        moved.grad = torch.autograd.grad(loss, moved)[0]
        adam.param_groups[0]["lr"] = RATE * (1 - step / steps)
        adam.step()
    return (start + deviation * moved).detach()


def _resampled(restoring: Restoring, generator: np.random.Generator) -> Tensor:
    """Return the embeddings with those of another fact's subject at each subject's tokens."""
    facts, out = len(restoring.facts), restoring.embeddings.clone()
    sources = (np.arange(facts) + generator.integers(1, facts, facts)) % facts
    for fact, source in enumerate(sources):
        own, other = (torch.where(restoring.facts.subject[row])[0] for row in (fact, int(source)))
        out[fact, own] = restoring.embeddings[int(source), other[torch.arange(len(own)) % len(other)]]
    return out


def _of_partners(restoring: Restoring, examples: Examples, pairs: str) -> Tensor:
    """Return each fact's partner's embeddings, at the same positions."""
    partners = torch.from_numpy(Counterfactual(pairs=pairs).sources(examples)).to(restoring.embeddings.device)
    other = (restoring.facts.subject != restoring.facts.subject[partners]).any(1).nonzero()
    if len(other):
        row = int(other[0])
        raise ExamplesError(
            f"the subjects of facts {row} and {int(partners[row])} are at other positions; partners need subjects of "
            f"as many tokens at the same place"
        )
    return restoring.embeddings[partners]
