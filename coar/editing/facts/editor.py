"""Edits of facts: answers that a language model shall lose or find, with other facts and ordinary text as the bound."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from coar.charts import html_table
from coar.components.layers import unwrapped
from coar.editing.edit import Edit
from coar.editing.evaluate import columns
from coar.editing.facts.harm import HarmModel, least_harm
from coar.editing.facts.measuring import Measured
from coar.editing.goal import EditGoal
from coar.errors import BoundError, EditError, GoalError, SettingsError
from coar.examples import Examples
from coar.forward.copies import device_copy
from coar.forward.malloc import memory_kept
from coar.forward.model_runner import ModelRunner
from coar.outputs.tokens import TokenLogProbability, TokenMargin
from coar.progress import progress_bar
from coar.settings import Settings
from coar.study import Study

if TYPE_CHECKING:
    import pandas as pd

LOG_ODDS = TokenMargin(reduction="last", against="logsumexp")
TEXTS_PER_PASS = 8  # whose logits are in memory at once
STEP = 1.0  # of log-odds between two gradients of the targets
BEYOND = 0.1  # the required log-odds that a step aims at
STEPS = 40  # to the required log-odds, at most
ROUNDS = 8  # of measuring the references, at most
FACTS_CORRECTED, TEXTS_CORRECTED = 32, 16  # whose gradients are computed anew in a round
CERTAIN = 0.05  # least slope of a probability by its log-odds that references count with
HARDER = 2.0  # factor of the weight of texts after a round in which they exceed the bound
SMALLEST = 1e-3  # strength; smaller ones are set to zero
ENOUGH_FACTS, ENOUGH_TEXTS = 2, 4  # references
LIMIT = 1.645  # standard errors up to the one-sided 95 % limit
REQUIRED = {"decrease": 0.02, "increase": 0.5}  # probability of the answers


class FactBound(Settings):
    """The most that references may lose, up to the one-sided 95 % limit of the mean over them.

    Attributes:
        facts: Fall of the mean probability of the other facts' answers.
        perplexity: Relative rise of the perplexity of the texts.
    """

    facts: float = Field(default=0.01, gt=0, lt=1)
    perplexity: float = Field(default=0.005, gt=0)


@dataclass(frozen=True)
class FactEdit:
    """An edit of facts, with what it changes.

    Attributes:
        edit: The edit.
        table: A row per group: `targets`, `references`, `texts`, and the judging examples that were given; `examples`,
            `measure` (`probability` of the answers, or `perplexity`), `before`, `after`, `change` (relative for the
            perplexity) with its 95 % interval over examples (`low`, `high`). Measured on the edited model.
        rounds: A row per round of the choice: `components`, `probability` of the target that is nearest to what is
            required, `facts` and `perplexity` lost, up to the 95 % limits; texts are measured where facts are within
            the bound, and in the last round.
        passes: Forward passes of one example; a forward and backward pass counts as three.
    """

    edit: Edit
    table: "pd.DataFrame"
    rounds: "pd.DataFrame"
    passes: int

    def _repr_html_(self) -> str:
        return html_table(self.table)


@dataclass(frozen=True)
class _Losses:
    """What references lose at some strengths.

    Attributes:
        facts: (references,) probabilities lost.
        texts: (bounding texts,) nats per token lost; None where they were not measured.
        bound: The bound.
    """

    facts: Tensor
    texts: Tensor | None
    bound: FactBound

    @property
    def within(self) -> bool:
        """Whether both limits are within the bound; NaN is not."""
        facts, perplexity = self.limits()
        return facts <= self.bound.facts and perplexity <= self.bound.perplexity

    def limits(self) -> tuple[float, float]:
        """Return the 95 % limits of the mean probability lost, and of the relative rise of the perplexity."""
        return _limit(self.facts), np.nan if self.texts is None else float(np.expm1(_limit(self.texts)))


class FactEditor:
    """Edits single facts of a language model: it finds strengths of ablation with the least harm to everything else.

    Log-odds of the targets' answers move to what is required in steps. Each step solves for the strengths of all
    components at once: the least sum of squares of their changes and of the harm, both linear in the strengths, where
    harm is the change of the other facts' probabilities and of the texts' log-probabilities, in units of the bound.
    Gradients of the targets are computed at every step. References are measured after the last step. While the harm is
    beyond the bound, the facts that changed most get new gradients, and so do texts, which then count more, if they
    exceed it; and the steps go on.

    Every second text gives gradients. The bound is judged on the others, which no step has seen, since strengths that
    spare the texts with gradients harm other texts more. Gradients are computed once, and serve all facts.

    Args:
        study: The facts as its examples, from `coar.token_examples` with answers, and the components. Its ablation
            must have a constant per channel, such as `coar.ZeroActivation()` or `coar.Mean(...)`. Its output is not
            used.
        texts: Ordinary text, from `coar.token_examples` without answers; one part for gradients, one for the bound.
        device: Where to compute.
        progress: Whether to show a progress bar.

    Raises:
        EditError: When the ablation has no constants.
        GoalError: When there are fewer than four texts.
        OutputError: When the model is no causal language model.
    """

    def __init__(self, study: Study, texts: Examples, *, device: str = "auto", progress: bool = True) -> None:
        _check_enough(len(texts), ENOUGH_TEXTS, "texts")
        self._study, self._device, self._progress = study, device, progress
        model = device_copy(study.model, device, study.examples)
        constants = study.ablation.replacements(model, study.components, batch_size=TEXTS_PER_PASS)
        if constants.ndim > 1 or bool(constants.isnan().any()):
            raise EditError(
                f"the ablation {type(study.ablation).__name__} has no constant for each channel, and an edit writes "
                f"constants into the weights; choose coar.ZeroActivation() or coar.Mean(calibration=...)"
            )
        parts = model, study.components, constants
        facts = in_memory(study.examples)
        self._facts = Measured(*parts, facts, LOG_ODDS, ModelRunner(model, LOG_ODDS).batch_size)
        self._bounding = in_memory(texts.subset(range(1, len(texts), 2)))
        steering, bounding = in_memory(texts.subset(range(0, len(texts), 2))), self._bounding
        self._steering, self._prose = (
            Measured(*parts, own, TokenLogProbability(), TEXTS_PER_PASS) for own in (steering, bounding)
        )
        self._nothing = torch.zeros(len(study.components))
        self._base = self._all_gradients()
        self._likelihood = self._prose.outputs(self._nothing)

    @property
    def passes(self) -> int:
        """Forward passes of one example so far."""
        return self._facts.passes + self._steering.passes + self._prose.passes

    def probabilities(self) -> np.ndarray:
        """Return the (facts,) probabilities of the answers in the model as it is."""
        found: np.ndarray = self._base[0][0].sigmoid().numpy()
        return found

    @memory_kept()
    def edit(
        self,
        goal: EditGoal,
        *,
        probability: float | None = None,
        bound: FactBound | None = None,
        judge: Examples | None = None,
        judge_texts: Examples | None = None,
    ) -> FactEdit:
        """Edit the targets of a goal: `decrease` makes the model lose their answers, `increase` makes it find them.

        Args:
            goal: Targets and references, as positions or conditions over the study's examples. Its groups, pairs and
                clusters are not used.
            probability: The most that an answer may keep, by default 0.02, or the least that it must reach, 0.5.
            bound: The bound on harm.
            judge: Other facts, on which the harm is judged.
            judge_texts: Other texts.

        Raises:
            GoalError: When the goal does not fit the examples, or is reached already.
            BoundError: When no strengths reach it within the bound.
            SettingsError: When the probability is not between 0 and 1.
        """
        bound, passes = bound or FactBound(), self.passes
        targets, references = (torch.from_numpy(rows) for rows in goal.resolve(columns(self._study.examples)))
        _check_enough(len(references), ENOUGH_FACTS, "references")
        required = self._required(goal, targets, probability)
        rows = []
        for strengths, reached, losses in self._rounds(goal, targets, references, required, bound):
            facts, perplexity = losses.limits()
            count = int((strengths > 0).sum())
            rows.append({"components": count, "probability": reached, "facts": facts, "perplexity": perplexity})
            if losses.within:
                break
        else:
            raise self._beyond(bound, rows)
        made = self._made(goal, strengths)
        import pandas as pd

        table = self._judged(made, targets, references, judge, judge_texts)
        return FactEdit(made, table, pd.DataFrame(rows), self.passes - passes)

    def _all_gradients(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return outputs and gradients of all facts, and of the texts that have gradients, with nothing ablated."""
        found = []
        total = len(self._facts) + len(self._steering)
        with progress_bar(total=total, shown=self._progress, desc="references") as bar:
            for measured in (self._facts, self._steering):
                parts = []
                for rows in torch.split(torch.arange(len(measured)), TEXTS_PER_PASS):
                    parts.append(measured.gradients(self._nothing, rows))
                    bar.update(len(rows))
                outputs, gradients = (torch.cat(part) for part in zip(*parts, strict=True))
                found.append((outputs, gradients))
        return found[0], found[1]

    def _required(self, goal: EditGoal, targets: Tensor, probability: float | None) -> float:
        """Return the log-odds that the targets must reach."""
        value = REQUIRED[goal.direction] if probability is None else probability
        if not 0 < value < 1:
            raise SettingsError(f"the probability {value} was given; give one between 0 and 1")
        required = float(np.log(value / (1 - value)))
        now = self._base[0][0][targets]
        if bool(((now - required) * _sign(goal) >= 0).all()):
            raise GoalError(
                f"all {len(targets)} targets are at probabilities of {_listed(now.sigmoid())} already, where {value} "
                f"is required; there is nothing to edit, choose other targets"
            )
        return required

    def _rounds(
        self, goal: EditGoal, targets: Tensor, references: Tensor, required: float, bound: FactBound
    ) -> Iterator[tuple[Tensor, float, _Losses]]:
        """Yield strengths that reach what is required, the probability of the target nearest to it, and the harm."""
        (odds, by_fact), (likelihood, by_text) = self._base
        before = odds[references].sigmoid()
        facts = HarmModel(by_fact[references], (before * (1 - before)).clamp_min(CERTAIN) / bound.facts)
        texts = HarmModel(by_text, torch.full((len(by_text),), 1 / bound.perplexity))
        strengths = self._nothing
        for number in progress_bar(range(ROUNDS), shown=self._progress, desc="edit", unit="round"):
            for step in range(STEPS):
                now, slopes = self._facts.gradients(strengths, targets)
                left = (now - required) * _sign(goal)
                if step and bool((left >= 0).all()):  # the first step heeds what was measured last
                    break
                rises = (BEYOND - left).clamp_max(STEP)
                harms = facts.at(strengths), texts.at(strengths)
                strengths = least_harm(strengths, (_sign(goal) * slopes, rises), harms)
                strengths[strengths < SMALLEST] = 0
            else:
                return
            moved = self._facts.outputs(strengths)[references] - odds[references]
            lost = before - (odds[references] + moved).sigmoid()
            losses = _Losses(lost, None, bound)
            if _limit(lost) <= bound.facts or number + 1 == ROUNDS:  # else the round has failed already
                losses = replace(losses, texts=self._likelihood - self._prose.outputs(strengths))
            yield strengths, float(((now * _sign(goal)).min() * _sign(goal)).sigmoid()), losses
            worst = losses.facts.abs().add(CERTAIN * moved.abs()).topk(min(FACTS_CORRECTED, len(references))).indices
            facts.correct(strengths, moved, worst, self._facts.gradients(strengths, references[worst])[1])
            if losses.limits()[1] > bound.perplexity:
                changes = self._steering.outputs(strengths) - likelihood
                worst = changes.abs().topk(min(TEXTS_CORRECTED, len(changes))).indices
                texts.correct(strengths, changes, worst, self._steering.gradients(strengths, worst)[1])
                texts.weigh(HARDER)

    def _made(self, goal: EditGoal, strengths: Tensor) -> Edit:
        """Return the edit of these strengths, with the numbers that it takes out of the weights."""
        order = torch.argsort(-strengths, stable=True)[: int((strengths > 0).sum())].tolist()
        names = [self._study.components.names[i] for i in order]
        made = Edit.of(self._study, names, goal=goal if goal.general else None, device=self._device)
        how = tuple(float(strengths[i]) for i in order)
        return replace(made, strengths=how, scores=how).keep(self._study.model)

    def _judged(
        self, made: Edit, targets: Tensor, references: Tensor, judge: Examples | None, judge_texts: Examples | None
    ) -> "pd.DataFrame":
        """Return what the edited model makes of all examples, beside the model as it is."""
        import pandas as pd

        device, own = self._device, self._study.examples
        model = unwrapped(self._study.model)
        plain, edited = (device_copy(each, device, own) for each in (model, made.apply(model)))
        rows = []
        for name, chosen in (("targets", targets), ("references", references)):
            after = _outputs(edited, LOG_ODDS, own.subset(chosen.numpy()))
            rows.append(_compared(name, "probability", self._base[0][0][chosen].double().sigmoid(), after.sigmoid()))
        if judge is not None:
            before, after = (_outputs(each, LOG_ODDS, judge).sigmoid() for each in (plain, edited))
            rows.append(_compared("judged facts", "probability", before, after))
        after = _outputs(edited, TokenLogProbability(), self._bounding)
        rows.append(_compared("texts", "perplexity", -self._likelihood.double(), -after))
        if judge_texts is not None:
            before, after = (-_outputs(each, TokenLogProbability(), judge_texts) for each in (plain, edited))
            rows.append(_compared("judged texts", "perplexity", before, after))
        return pd.DataFrame(rows)

    def _beyond(self, bound: FactBound, rows: list[dict[str, float]]) -> BoundError:
        measured = [row for row in rows if not np.isnan(row["perplexity"])]
        if not measured:
            return BoundError(
                f"after {STEPS} steps the targets are not at the required probability; study more components, or "
                f"require less with probability="
            )
        least = min(measured, key=lambda row: max(row["facts"] / bound.facts, row["perplexity"] / bound.perplexity))
        return BoundError(
            f"no strengths reach the goal within the bound, {bound.facts:.1%} of the other facts' probability and "
            f"{bound.perplexity:.2%} of the perplexity. The best found loses {least['facts']:.2%} and "
            f"{least['perplexity']:.2%}, up to 95 % limits: widen the bound, or study more components"
        )


def in_memory(examples: Examples) -> Examples:
    """Return the examples with their inputs and targets as tensors."""
    inputs, targets = examples.block(0, len(examples))
    return Examples(inputs=inputs, targets=targets)


def _check_enough(count: int, least: int, what: str) -> None:
    """Raise `GoalError` unless losses of references have a standard error."""
    if count < least:
        raise GoalError(
            f"there are {count} {what}, and the bound needs the standard error of what {what} lose; give at least "
            f"{least}"
        )


def _limit(losses: Tensor) -> float:
    """Return the one-sided 95 % limit of a mean."""
    return float(losses.mean() + LIMIT * losses.std() / len(losses) ** 0.5)


def _sign(goal: EditGoal) -> int:
    return 1 if goal.direction == "increase" else -1


def _listed(values: Tensor) -> str:
    return ", ".join(f"{value:.3f}" for value in values[:5].tolist()) + (", ..." if len(values) > 5 else "")


def _outputs(model: torch.nn.Module, output: TokenMargin | TokenLogProbability, examples: Examples) -> Tensor:
    runner = ModelRunner(model, output, batch_size=TEXTS_PER_PASS)
    return torch.from_numpy(runner.base_output(runner.load(examples, 0, len(examples)))).double()


def _compared(name: str, measure: str, before: Tensor, after: Tensor) -> dict[str, object]:
    """Return a row of the table; the change has a normal interval over examples."""
    change, error = after - before, float((after - before).std() / len(after) ** 0.5) if len(after) > 1 else np.nan
    mean = float(change.mean())
    ends = np.array([float(before.mean()), float(after.mean())])
    values = np.array([mean, mean - 1.96 * error, mean + 1.96 * error])
    if measure == "perplexity":
        ends, values = np.exp(ends), np.expm1(values)
    keys = ("before", "after", "change", "low", "high")
    return {"group": name, "examples": len(after), "measure": measure} | dict(
        zip(keys, [*ends.tolist(), *values.tolist()], strict=True)
    )
