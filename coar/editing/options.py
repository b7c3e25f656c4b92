"""The settings of a choice of components: the rule, its limits, and how gain and harm are weighed."""

from typing import Any, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from coar.editing.objective import Bound, TradeOff
from coar.renamed import refuse_arguments, refuse_value
from coar.settings import Settings

RuleName = Literal["verified", "welch", "predicted"]
ConstantsName = Literal["goal", "run"]
StrengthName = Literal["full", "minimal", "per_component"]
CHOICES = {"rule": get_args(RuleName), "constants": get_args(ConstantsName), "strength": get_args(StrengthName)}


class SelectionOptions(Settings):
    """How components are chosen.

    Attributes:
        rule: `verified` to search among sets of components by evaluating them on examples, `welch` for the published
            ranking, `predicted` for the set with the best predicted effect.
        budget: The most components to ablate. By default the trade-off decides, up to 320 components, 1,000 with
            strengths per component, and 40 by the rules `welch` and `predicted`.
        constants: By the rule `verified`, `goal` to train constants for the goal, and keep them where they are better;
            `run` for the constants of the attributions' run.
        strength: `full` to ablate components; `minimal` for the smallest strength at which as many targets change as
            under full ablation; `per_component` to train a strength for each component, together with its constants,
            instead of a search, by the rule `verified`.
        tradeoff: How gain and harm are weighed.
        bound: The most accuracy that references may lose on the choosing examples.
        max_loss: By the rule `predicted`, the most that the mean output of any group of references may fall by
            prediction, in units of the output.
        seed: Seed of the draws of examples for training.
        steps: Number of training steps of gates or strengths, by default 120 for gates and 300 for strengths.
        n_boundary_references: Evaluate sets on only so many references, those with the smallest margins, before the
            choice is checked on all; by default all.
        progress: Show a progress bar with the trade-off so far.
    """

    rule: RuleName = "verified"
    budget: int | None = None
    constants: ConstantsName = "goal"
    strength: StrengthName = "full"
    tradeoff: TradeOff = TradeOff()
    bound: Bound = Bound()
    max_loss: float = Field(default=0.5, ge=0, allow_inf_nan=False)
    seed: int = Field(default=0, ge=0)
    steps: int | None = Field(default=None, ge=1)
    n_boundary_references: int | None = Field(default=None, ge=1)
    progress: bool = True

    def __init__(self, **settings: Any) -> None:
        refuse_arguments("select", settings)
        super().__init__(**settings)

    @field_validator("rule", "constants", "strength", mode="before")
    @classmethod
    def _known(cls, value: Any, info: Any) -> Any:
        known = CHOICES[info.field_name]
        refuse_value(info.field_name, value)
        if value not in known:
            raise ValueError(f"unknown {info.field_name} {value!r}; choose {', '.join(known[:-1])} or {known[-1]}")
        return value

    @model_validator(mode="after")
    def _trained_by_search_only(self) -> Self:
        if self.strength == "per_component" and self.rule != "verified":
            raise ValueError(
                f"strength 'per_component' is trained by the rule 'verified', and the rule {self.rule!r} was given; "
                f"choose that rule, or strength 'full' or 'minimal'"
            )
        return self

    def updated(self, **changes: Any) -> Self:
        """Return these options with others for those named."""
        return type(self)(**{**{name: getattr(self, name) for name in self.model_fields_set}, **changes})
