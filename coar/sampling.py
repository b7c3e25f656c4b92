"""Random masks: each is a pure function of (seed, split, index), so that any worker can draw any mask."""

import math
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from coar.errors import SettingsError
from coar.settings import Settings

Split = Literal["train", "validation", "test", "gradient"]
STRATIFIED_TOGETHER = 2**14  # components whose strata are made together
SPLITS: tuple[Split, ...] = ("train", "validation", "test", "gradient")


class Sampler(Settings):
    """Base of the samplers, which draw masks: True keeps a component, False ablates it.

    Attributes:
        ablated_fraction: Expected share of ablated components in a mask, between 0 and 1 (the paper's alpha).
        seed: Seed of all masks, from 0 to 2**63 - 1.
    """

    ablated_fraction: float = 0.10
    seed: int = Field(default=0, ge=0, lt=2**63)

    @field_validator("ablated_fraction")
    @classmethod
    def _inside(cls, value: float) -> float:
        return check_fraction(value)

    @abstractmethod
    def _mask(self, numbers: np.ndarray, fraction: float) -> np.ndarray:
        """Turn (masks, components) uniform 32-bit numbers into boolean masks of the same shape."""

    def masks(
        self, split: Split, indices: Iterable[int], components: int, *, ablated_fraction: float | None = None
    ) -> np.ndarray:
        """Return (indices, components) boolean masks.

        Masks of the same split and index at different fractions use the same random numbers. So the set that is ablated
        at a smaller fraction is a subset of the set at a larger one, for Bernoulli and fixed-size masks.

        Args:
            split: `train`, `validation`, `test` or `gradient`; different splits use different random numbers.
            indices: Which masks of the split.
            components: Number of components.
            ablated_fraction: The ablated fraction; by default the sampler's own.

        Raises:
            SettingsError: When the fraction is not between 0 and 1.
        """
        fraction = self.ablated_fraction if ablated_fraction is None else check_fraction(ablated_fraction)
        return self._mask(self._numbers(split, indices, components), fraction)

    def stratified(self, split: Split, indices: Iterable[int], components: int) -> np.ndarray:
        """Return (indices, components) boolean masks that ablate every component equally often.

        The unit interval is cut into as many equal strata as there are masks. A component gets one uniform number in
        each stratum, in random order, as in Latin hypercube sampling (McKay, Beckman and Conover 1979). So a component
        is ablated in `ablated_fraction` of the masks, rounded up or down, and the main effects of components do not
        add variance to means over the masks. A single mask has the same distribution as one of `masks`.

        Args:
            split: The split that the random numbers belong to.
            indices: The masks of the group; groups are independent of each other.
            components: Number of components.
        """
        raw = self._numbers(split, indices, 2 * components)
        numbers = np.empty((len(raw), components), dtype=np.uint32)
        for start in range(0, components, STRATIFIED_TOGETHER):
            some = slice(start, min(start + STRATIFIED_TOGETHER, components))
            strata = _ranks(raw[:, some]).astype(np.uint64)
            inside = raw[:, components + some.start : components + some.stop].astype(np.uint64)
            numbers[:, some] = ((strata << np.uint64(32)) + inside) // np.uint64(len(raw))
        return self._mask(numbers, self.ablated_fraction)

    def _numbers(self, split: Split, indices: Iterable[int], count: int) -> np.ndarray:
        """Draw (indices, count) from Philox4x64 with key (seed, split), an index in the counter's second word."""
        generator = np.random.Philox(key=np.array([self.seed, SPLITS.index(split)], dtype=np.uint64))
        start = generator.state
        rows: list[np.ndarray] = []
        for index in indices:
            start["state"]["counter"][:] = (0, index, 0, 0)
            generator.state = start  # nothing drawn yet, whatever was drawn for other indices
            words = generator.random_raw(-(-count // 2)).astype("<u8")
            rows.append(words.view("<u4")[:count])  # two numbers a word, low half first, on every machine
        return np.stack(rows) if rows else np.zeros((0, count), dtype="<u4")

    def settings(self) -> dict[str, Any]:
        """Return the name and settings that identify this sampler in a run's fingerprint."""
        return {"name": type(self).__name__, **self.model_dump(mode="json")}


class BernoulliSampler(Sampler):
    """Ablates each component independently with probability `ablated_fraction` (to within 2**-33)."""

    def _mask(self, numbers: np.ndarray, fraction: float) -> np.ndarray:
        return numbers >= np.uint32(min(round(fraction * 2**32), 2**32 - 1))


class FixedSizeSampler(Sampler):
    """Ablates a uniformly random set of `round(ablated_fraction * components)` components.

    At least one component is ablated, and at least one is kept where there are several.
    """

    def _mask(self, numbers: np.ndarray, fraction: float) -> np.ndarray:
        components = numbers.shape[1]
        count = min(max(round(fraction * components), 1), max(components - 1, 1))
        masks = np.ones(numbers.shape, dtype=bool)
        np.put_along_axis(masks, np.argsort(numbers, axis=1, kind="stable")[:, :count], False, axis=1)
        return masks


def _ranks(numbers: np.ndarray) -> np.ndarray:
    """Return the rank of each number in its column, the first of equal ones lower; for few rows, faster than a sort."""
    ranks = np.zeros(numbers.shape, dtype=np.uint32)
    for later in range(len(numbers)):
        for earlier in range(later):
            above = numbers[earlier] <= numbers[later]
            ranks[later] += above
            ranks[earlier] += ~above
    return ranks


SAMPLERS: dict[str, type[Sampler]] = {cls.__name__: cls for cls in (BernoulliSampler, FixedSizeSampler)}


def sampler_from_settings(settings: dict[str, Any]) -> Sampler:
    """Rebuild a sampler from `Sampler.settings()`; raise `SettingsError` for an unknown name."""
    values = dict(settings)
    name = values.pop("name", None)
    if name not in SAMPLERS:
        raise SettingsError(f"unknown sampler {name!r}; this version knows {', '.join(SAMPLERS)}")
    return SAMPLERS[name](**values)


def check_fraction(value: float) -> float:
    """Return the fraction, or raise `SettingsError` when it is not strictly between 0 and 1."""
    if not (math.isfinite(value) and 0 < value < 1):
        raise SettingsError(f"ablated fraction {value} is outside (0, 1); 0.05 to 0.10 is usual")
    return value
