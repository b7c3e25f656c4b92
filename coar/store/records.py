"""Typed records of what a run and its fits store about themselves: the run's precision, a fit's method and quality."""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, StrictFloat, StrictInt, StrictStr, ValidationError

from coar.errors import RunError

PUBLISHED = "published"  # the method of a fit from an imported file, and the manifest's entry about the file


class Record(BaseModel):
    """Base of stored records: frozen, with strict types; keys that other versions have stored are kept."""

    model_config = ConfigDict(frozen=True, extra="allow")

    @classmethod
    def read(cls, stored: Any) -> Self:
        """Return the record of a stored JSON object.

        Raises:
            ValueError: When a key is missing or has another type; the message names each such key in one line.
        """
        try:
            return cls.model_validate(stored)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(problems)

    def stored(self) -> dict[str, Any]:
        """Return the JSON object to store, with the keys that were given or read, and no others."""
        return self.model_dump(exclude_unset=True)


class PrecisionRecord(Record):
    """The precision of a run; the measurements are None when only float32 was allowed.

    Attributes:
        name: `float32` or `bf16`.
        error: Difference of bfloat16 from float32, in spreads of the outputs.
        speedup: Time of float32 over time of bfloat16.
        tolerance: Largest allowed error.
        masks: Number of masks in the comparison.
        device: Kind of device and processor.
    """

    name: Literal["float32", "bf16"]
    error: StrictFloat | None = None
    speedup: StrictFloat | None = None
    tolerance: StrictFloat | None = None
    masks: StrictInt | None = None
    device: StrictStr | None = None


class PreflightRecord(Record):
    """The outcomes of the checks before a run.

    Attributes:
        passed: Names of the checks that passed.
        accepted: By name of a check that failed and that the study accepted, what was seen.
    """

    passed: tuple[StrictStr, ...] = ()
    accepted: dict[StrictStr, StrictStr] = {}

    def has(self, check: str) -> bool:
        """Return whether a check was made."""
        return check in self.passed or check in self.accepted


class RunRecord(Record):
    """What the creation of a run measured.

    Attributes:
        batch_norms: By site, the path of the batch norm that follows it.
        gate_error: Largest difference of the fast runner from the reference runner, relative to the largest output;
            None when it was not measured.
        precision: The precision, and its measurements.
        preflight: The outcomes of the checks before the run; None for runs of earlier versions.
    """

    batch_norms: dict[StrictStr, StrictStr]
    gate_error: StrictFloat | None = None
    precision: PrecisionRecord
    preflight: PreflightRecord | None = None


class PublishedRecord(Record):
    """What an imported file says about its attributions.

    Attributes:
        setup: Name of the published setup.
        file: Name of the file.
        fit: Name of the fit that has the file's numbers.
        dtype: Type of the file's weights, such as `float16`.
        not_finite: Number of the file's numbers that are NaN or infinite.
        left_out: Examples with such numbers that the run does not have, by their number in the file.
        zeroed: Names of components with such weights, which are 0 in the run.
    """

    setup: StrictStr
    file: StrictStr
    fit: StrictStr
    dtype: StrictStr
    not_finite: StrictInt = 0
    left_out: tuple[StrictInt, ...] = ()
    zeroed: tuple[StrictStr, ...] = ()


class PriorQualityRecord(Record):
    """The quality of an informed fit's weights before the correction by masks.

    Attributes:
        explained: Share of the outputs' variance that the weights explain.
        error: Estimated share that their errors cost.
        deviation: Standard error of `error`.
        reachable: Estimated correlation of the best linear model.
    """

    explained: StrictFloat
    error: StrictFloat
    deviation: StrictFloat
    reachable: StrictFloat


class FitRequest(Record):
    """The data and the method of a fit; a stored fit with the same ones is not made again.

    Attributes:
        state: `ready`; a fit without a record is not finished.
        method: A regression method, or a baseline.
        masks: Number of training masks; 0 for a baseline.
        ablated_fraction: Ablated fraction of the training masks.
        gradients: Number of mask gradients.
    """

    state: Literal["ready"] = "ready"
    method: StrictStr
    masks: StrictInt
    ablated_fraction: StrictFloat | None = None
    gradients: StrictInt = 0


class FitLearned(Record):
    """What an informed fit learned for all examples; empty for other methods.

    Attributes:
        stages: The refinements that were kept, with their penalties.
        mask_penalty: The penalty of the correction by masks; None without masks.
        prior_quality: The quality of the weights before that correction.
    """

    stages: dict[StrictStr, StrictFloat] | None = None
    mask_penalty: StrictFloat | None = None
    prior_quality: PriorQualityRecord | None = None


class FitRecord(FitLearned, FitRequest):  # the first base's fields come last, in the order in which they are stored
    """Facts about a finished fit: those of `FitRequest` and `FitLearned`, and its score on validation masks.

    Attributes:
        validation: Mean correlation of predictions with outputs on the validation masks; None without such masks.
        validation_masks: Number of these masks.
    """

    validation: StrictFloat | None = None
    validation_masks: StrictInt = 0

    @classmethod
    def of(cls, request: FitRequest, learned: FitLearned | None = None) -> Self:
        """Return the record of a fit that is not validated yet."""
        return cls.read(request.stored() | (learned.stored() if learned else {}))

    @property
    def of_baseline(self) -> bool:
        """Whether the fit is a baseline, which no training masks, mask gradients or published file have made."""
        return not (self.masks or self.gradients or self.method == PUBLISHED)

    def answers(self, request: FitRequest) -> bool:
        """Return whether the fit was made by the same method from the same data."""
        return all(getattr(self, name) == getattr(request, name) for name in FitRequest.model_fields)

    def require_validation(self) -> float:
        """Return the correlation on validation masks; raise `RunError` when the fit has none."""
        if self.validation is None:
            raise RunError(f"a fit by {self.method} has no score on validation masks; collect some, and fit again")
        return self.validation

    def stored(self) -> dict[str, Any]:
        """Return the JSON object to store, its state first."""
        return {"state": self.state, **super().stored()}
