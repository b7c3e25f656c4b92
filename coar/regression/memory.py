"""The memory of a fit: its limit, and the way of computing that stays within it."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from coar.errors import RegressionError
from coar.forward.devices import free_bytes
from coar.forward.memory_limit import bytes_of, readable
from coar.regression.fit_plan import FitPlan, Way
from coar.regression.informed.learning import FEATURES
from coar.regression.informed.site_gains import table_bytes
from coar.regression.iterative.traces import LOOSE_NUMBERS, probe_bytes
from coar.regression.sums import BATCH, examples_per_reading, takes_moments
from coar.store.fits import chunk_rows
from coar.store.gradients import MASK_GROUPS, next_rounds
from coar.store.run import Run

FREE_SHARE = 0.5  # of the free memory that a fit may take without a stated limit
UNKNOWN_FREE = 4 * 2**30  # bytes taken for free where the system does not say
BASIS = 32  # vectors that the Lanczos process keeps per example, at most
LEAST_BASIS = 8
MOST_TOGETHER = 512  # examples that are solved together, at most; more do not make products faster
TILE_BYTES = 32 * 2**20  # of unpacked masks
FEW, FEW_TILE_BYTES = 32, 8 * 2**20  # the same for fewer examples than that, whose products read more than they compute
LEAST_TILE, MOST_TILE = 16, 4096  # rows of unpacked masks
HELD_SHARE = 0.25  # of the limit that packed masks may take; more are read from the run for every product
VECTORS = 14  # float32 numbers per component and example, in addition to the basis
SPARSE_VECTORS = 36  # the same of the lasso
APART_VECTORS = 10  # the same where the lasso solves example by example
MOST_WORKING, WORKING_BYTES = 2_048, 40  # components of a working set, and bytes for each pair of them
CORRECTION_VECTORS = 20  # the same of an informed fit's correction by masks
DECOMPOSED_VECTORS, OF_RANK = 11, 13  # the same of a fit from one decomposition, and for each of its eigenvalues
DECOMPOSED_SPARSE_VECTORS = 52  # the same of the lasso from one Gram matrix
KEPT_BYTES = 5  # per mask and component of a batch, of memory that the allocator keeps when the batch is freed
STARTED = 32 * 2**20  # bytes that the first fit of a process takes: threads, and libraries that start
CHOICE_BASIS = 96  # vectors that the Lanczos process keeps per example where the penalty of that correction is chosen
FEWEST_CHOOSING = 8  # examples that are together there, if they fit; more where that takes no more than learning
PASSES = {"ridge": 30, "ols": 30, "lasso": 600, "informed": 60}  # products with the Gram matrix, roughly
FIXED = 64 * 2**20  # bytes that every fit takes: reading, writing, and small tables
TABLES = 600  # bytes per component of what an informed fit learns
LEARNING_BYTES = 260  # per component and example that an informed fit learns from
LEAST_LEARNING, MOST_LEARNING = 16, 16 * 2**20  # examples to learn from, and examples times components


def limit_of(memory_limit: int | str | None, device: torch.device) -> int:
    """Return the most bytes that a fit may take: those that are given, or half of the free ones.

    Raises:
        SettingsError: When the limit is not a size above 0.
    """
    if memory_limit is not None:
        return bytes_of(memory_limit)
    free = free_bytes(device)
    return int(FREE_SHARE * (UNKNOWN_FREE if free is None else free))


def plan_fit(
    method: str,
    *,
    masks: int,
    components: int,
    examples: int,
    chunk: int,
    limit: int,
    device: torch.device,
    gradients: int = 0,
    sites: int = 1,
) -> FitPlan:
    """Choose how to fit within a limit.

    The decomposition is chosen where it fits, on a CPU. Otherwise it is the faster of the two iterative ways that fit.

    Args:
        method: `ridge`, `ols`, `lasso` or `informed`.
        masks: Number of training masks.
        components: Number of components.
        examples: Number of examples.
        chunk: Examples in a chunk of the fit.
        limit: Most bytes.
        device: Where to compute the products.
        gradients: Number of mask gradients.
        sites: Number of sites, which have gains of their own in an informed fit.

    Raises:
        RegressionError: When no way fits the limit.
    """
    size = _Size(masks, components, examples, chunk)
    if method == "informed":
        return _Informed(size, gradients, sites).plan(limit, device)
    needed = _decomposed_bytes(method, masks, components, examples, chunk)
    if needed <= limit and device.type == "cpu":
        return FitPlan(method, "decomposed", device, limit, needed, chunk)
    lasso = method == "lasso"
    probes = probe_bytes(masks, components, 0) if lasso else probe_bytes(masks, components)
    apart = lasso and device.type == "cpu"  # many small problems in turn would leave another device idle
    working = min(MOST_WORKING, 2 * masks, components) if apart else 0
    for basis in (0,) if lasso else (BASIS, BASIS // 2, LEAST_BASIS):
        for way in _ways(method, masks, components, examples):
            own = working if way == "packed" else 0
            taken, vectors = FIXED, basis + (SPARSE_VECTORS if lasso else VECTORS)
            if own:
                taken, vectors = FIXED + _working_bytes(own, components), APART_VECTORS
            found = size.iteration(way, limit, taken, vectors=vectors, beside=probes)
            if found is not None:
                plan = FitPlan(
                    method, way, device, limit, found.needed, found.together, tile=size.tile, held=found.held
                )
                return replace(plan, basis=basis, working=own)
    fewest = APART_VECTORS if apart else SPARSE_VECTORS if lasso else LEAST_BASIS + VECTORS
    least = FIXED + size.least(vectors=fewest, beside=probes) + (_working_bytes(working, components) if apart else 0)
    least = min(least, needed) if device.type == "cpu" else least
    raise RegressionError(
        f"{method} on {components:,} components takes at least {readable(least)} for one block of {chunk} examples, "
        f"and the limit is {readable(limit)}; give memory_limit={_more(least)!r} or more"
    )


class _Iteration(NamedTuple):
    """Blocks of examples that are solved by products with the masks.

    Attributes:
        held: Whether packed masks stay in memory.
        together: Examples in a block.
        room: Bytes that are left for blocks, or for what is beside them.
        needed: Bytes at the peak.
    """

    held: bool
    together: int
    room: int
    needed: int


class _Size(NamedTuple):
    """The numbers of masks, components, examples, and examples in a chunk of the fit."""

    masks: int
    components: int
    examples: int
    chunk: int

    @property
    def tile(self) -> int:
        """Rows of masks that are unpacked together."""
        tile_bytes = FEW_TILE_BYTES if self.examples < FEW else TILE_BYTES
        return min(max(tile_bytes // (4 * self.components), LEAST_TILE), MOST_TILE)

    def block_bytes(self, examples: int, vectors: int) -> int:
        """Return the bytes of a block of examples with so many float32 numbers per component and example."""
        return examples * (4 * self.components * vectors + 4 * MOST_TILE)

    def iteration(self, way: Way, limit: int, taken: int, *, vectors: int, beside: int) -> _Iteration | None:
        """Return the largest blocks that fit; None where one chunk does not.

        Args:
            way: `gram` or `packed`.
            limit: Most bytes.
            taken: Bytes of the limit that are taken already.
            vectors: float32 numbers per component and example.
            beside: Bytes that are taken while no block is.
        """
        fixed = taken + 8 * self.tile * self.components + (4 * self.components**2 if way == "gram" else 0)
        packed = self.masks * self.components // 8
        for held in (True, False) if way == "packed" and packed <= HELD_SHARE * limit else (False,):
            room = limit - fixed - packed * held
            many = room // self.block_bytes(1, vectors)
            many = min(many, max(MOST_TOGETHER, self.chunk), -(-self.examples // self.chunk) * self.chunk)
            together = many // self.chunk * self.chunk
            if together > 0 and beside <= room:
                needed = limit - room + max(self.block_bytes(min(together, self.examples), vectors), beside)
                return _Iteration(held, together, room, needed)
        return None

    def least(self, *, vectors: int, beside: int) -> int:
        """Return the least bytes, in addition to those taken already, for which `iteration` finds blocks."""
        return 8 * self.tile * self.components + max(self.block_bytes(self.chunk, vectors), beside)


@dataclass(frozen=True)
class _Informed:
    """The sizes of an informed fit.

    Attributes:
        size: Numbers of masks, components and examples.
        gradients: Number of mask gradients.
        sites: Number of sites, which have gains of their own.
    """

    size: _Size
    gradients: int
    sites: int

    @property
    def kept(self) -> int:
        """Bytes of what is learned, and of what every fit takes."""
        return FIXED + (MASK_GROUPS * len(next_rounds(0, self.gradients)) + TABLES) * self.size.components

    def learning(self, examples: int) -> int:
        """Return the bytes of learning from so many examples."""
        rounds = len(next_rounds(0, self.gradients))
        each = LEARNING_BYTES * examples + 2 * min(examples, MASK_GROUPS) * self.gradients
        return self.kept + table_bytes(self.sites, FEATURES, rounds) + each * self.size.components

    @property
    def wanted(self) -> int:
        """Examples to learn from, without a limit."""
        return min(max(MOST_LEARNING // self.size.components, 64), self.size.examples)

    @property
    def fewest(self) -> int:
        """Examples to learn from, at least."""
        return min(LEAST_LEARNING, self.wanted)

    def most(self, limit: int) -> int:
        """Return the most examples whose learning fits a limit; the fewest where none does."""
        fitting = (many for many in range(self.wanted, self.fewest, -1) if self.learning(many) <= limit)
        return next(fitting, self.fewest)

    def decomposed(self, limit: int, device: torch.device) -> tuple[FitPlan | None, int]:
        """Return the plan that decomposes masks, if there are any; None where it exceeds the limit; and its bytes."""
        many = self.most(limit)
        while (needed := self._decomposing(many)) > limit and many > self.fewest:
            many -= 1
        if needed > limit:
            return None, needed
        return FitPlan("informed", "decomposed", device, limit, needed, self.size.chunk, learning=many), needed

    def _decomposing(self, many: int) -> int:
        """Return the bytes at the peak of a fit that learns from so many examples and decomposes masks.

        The correction follows learning, and keeps the weights of the examples that were learned from.
        """
        size = self.size
        if size.masks < 2:
            return self.learning(many)
        correcting = _correction_bytes(size.masks, size.components, max(many, size.chunk))
        return max(self.learning(many), self.kept + 4 * many * size.components + correcting)

    def iterative(self, limit: int, device: torch.device) -> tuple[FitPlan | None, int]:
        """Return the plan of an iterative correction; None where none fits; and its bytes, or the least bytes."""
        size, components = self.size, self.size.components
        each = size.block_bytes(1, CHOICE_BASIS + VECTORS)
        beside = max(each, probe_bytes(size.masks, components, LOOSE_NUMBERS))
        for many in range(self.most(limit), self.fewest - 1, -1):
            for way in _ways("informed", size.masks, components, size.examples):
                taken = self.kept + 4 * many * components
                found = size.iteration(way, limit, taken, vectors=CORRECTION_VECTORS, beside=beside)
                if found is None or self.learning(many) > limit:
                    continue
                needed, fixed = max(self.learning(many), found.needed), limit - found.room
                choosing = min(max((needed - fixed) // each, FEWEST_CHOOSING), found.room // each, many)
                needed = max(needed, fixed + choosing * each)
                plan = FitPlan("informed", way, device, limit, needed, found.together, tile=size.tile, held=found.held)
                return replace(plan, basis=CHOICE_BASIS, learning=many, choosing=choosing), needed
        correcting = self.kept + 4 * self.fewest * components
        correcting += size.least(vectors=CORRECTION_VECTORS, beside=beside)
        return None, max(self.learning(self.fewest), correcting)

    def plan(self, limit: int, device: torch.device) -> FitPlan:
        """Return the plan; raises as `plan_fit` does."""
        masks, refused = self.size.masks, []
        if masks < 2 or device.type == "cpu":
            plan, needed = self.decomposed(limit, device)
            refused.append(needed)
            if plan is not None:
                return plan
        if masks >= 2:
            plan, needed = self.iterative(limit, device)
            refused.append(needed)
            if plan is not None:
                return plan
        least = min(refused)
        raise RegressionError(
            f"informed on {self.size.components:,} components and {masks:,} masks takes at least {readable(least)}, "
            f"and the limit is {readable(limit)}; give memory_limit={_more(least)!r} or more"
        )


def plan_of(
    run: Run, method: str, masks: int, *, gradients: int = 0, memory_limit: int | str | None, device: torch.device
) -> FitPlan:
    """Return the plan of a run's fit; raises as `limit_of` and `plan_fit` do."""
    return plan_fit(
        method,
        masks=masks,
        components=run.n_components,
        examples=run.n_examples,
        chunk=chunk_rows(run),
        limit=limit_of(memory_limit, device),
        device=device,
        gradients=gradients,
        sites=len(run.components.sites()) if method == "informed" else 1,
    )


def _ways(method: str, masks: int, components: int, examples: int) -> list[Way]:
    """Return the iterative ways, the one with fewer operations first."""
    if method == "ols":
        return ["packed"]  # without a penalty, small eigenvalues magnify the rounding of the matrix
    passes = PASSES[method]
    gram = 2 * masks * components**2 + passes * 2 * components**2 * examples
    return ["gram", "packed"] if gram < passes * 4 * masks * components * examples else ["packed", "gram"]


def _decomposed_bytes(method: str, masks: int, components: int, examples: int, chunk: int) -> int:
    """Return the peak of memory of a fit from one decomposition, or for the lasso from one Gram matrix.

    The peak is in one of three phases: reading, decomposing, or solving for a block of examples. Each counts the arrays
    that are alive at once, 8 bytes for a number.
    """
    d, many = components, min(examples_per_reading(components, chunk), examples)
    block = 4 * chunk * (DECOMPOSED_VECTORS * d + OF_RANK * min(masks, d))
    block = 4 * chunk * DECOMPOSED_SPARSE_VECTORS * d if method == "lasso" else block
    if not takes_moments(method, masks, components):
        decomposing = max(32 * masks**2 + 4 * masks * d, 24 * masks**2 + 28 * masks * d)
        solving = 8 * masks**2 + 16 * masks * d + block
        return STARTED + max(decomposing, solving)
    kept = 8 * d * many + KEPT_BYTES * min(masks, BATCH) * d
    decomposing, solving = (20, 20) if method == "lasso" else (40, 16)
    phases = _reading_bytes(masks, d, many), decomposing * d**2 + kept, solving * d**2 + kept + block
    return STARTED + max(phases)


def _working_bytes(working: int, components: int) -> int:
    """Return the bytes of solving one example of the lasso over a working set."""
    return WORKING_BYTES * working**2 + 4 * SPARSE_VECTORS * components


def _correction_bytes(masks: int, components: int, examples: int) -> int:
    """Return the peak of memory of the correction of an informed fit by one decomposition, phase by phase as above.

    Args:
        masks: Number of masks.
        components: Number of components.
        examples: Examples that are corrected together.
    """
    d, block = components, 4 * examples * (DECOMPOSED_VECTORS * components + OF_RANK * min(masks, components))
    kept = (1 + KEPT_BYTES) * min(masks, BATCH) * d
    if masks <= d:
        decomposing = max(32 * masks**2 + 16 * masks * d, 24 * masks**2 + 32 * masks * d)
        return kept + max(decomposing, 8 * masks**2 + 28 * masks * d + block)
    return max(_reading_bytes(masks, d, 0), 56 * d**2 + kept, 48 * d**2 + kept + 8 * d * examples + block)


def _reading_bytes(masks: int, components: int, examples: int) -> int:
    """Return the bytes of adding up the Gram matrix and the moments of examples, of masks that are read in batches.

    A batch is drawn, and compared with what is stored, while the one before it is added up.
    """
    both, later = min(masks, 2 * BATCH), min(max(masks - BATCH, 0), BATCH)
    first = min(masks, BATCH) * (4 * (components + examples) + 8 * components)
    batches = max(first, both * 4 * (components + examples) + later * 12 * components)
    return batches + 12 * components**2 + 8 * components * examples


def _more(size: int) -> str:
    """Return a size that is a little larger, as a memory limit may be given."""
    return readable(1.1 * size).replace(" ", "")
