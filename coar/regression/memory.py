"""The memory of a fit: its limit, and the way of computing that stays within it."""

import torch

from coar.errors import RegressionError
from coar.forward.devices import free_bytes
from coar.forward.memory_limit import bytes_of, readable
from coar.regression.fit_plan import FitPlan, Way
from coar.regression.informed.learning import FEATURES
from coar.regression.informed.site_gains import table_bytes
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
DECOMPOSED_VECTORS, OF_RANK = 11, 13  # the same of a fit from one decomposition, and for each of its eigenvalues
DECOMPOSED_SPARSE_VECTORS = 52
KEPT_BYTES = 5  # per mask and component of a batch, of memory that the allocator keeps when the batch is freed
STARTED = 32 * 2**20  # bytes that the first fit of a process takes: threads, and libraries that start
PASSES = {"ridge": 30, "ols": 30, "lasso": 600}  # products with the Gram matrix, roughly
READING = 2**28  # bytes of what is read together for one decomposition
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
    if method == "informed":
        learning, needed = _learning(masks, components, examples, gradients, sites, limit)
        return FitPlan(method, "decomposed", device, limit, needed, chunk, learning=learning)
    needed = _decomposed_bytes(method, masks, components, examples, chunk)
    if needed <= limit and device.type == "cpu":
        return FitPlan(method, "decomposed", device, limit, needed, chunk)
    vectors, bases = (SPARSE_VECTORS, (0,)) if method == "lasso" else (VECTORS, (BASIS, BASIS // 2, LEAST_BASIS))
    tile_bytes = FEW_TILE_BYTES if examples < FEW else TILE_BYTES
    tile = min(max(tile_bytes // (4 * components), LEAST_TILE), MOST_TILE)
    packed = masks * components // 8
    held = packed <= HELD_SHARE * limit
    common = FIXED + 8 * tile * components
    for basis in bases:
        each = 4 * components * (basis + vectors) + 4 * MOST_TILE
        for way in _ways(method, masks, components, examples):
            fixed = common + (4 * components**2 if way == "gram" else packed * held)
            if fixed + chunk * each <= limit:
                many = min((limit - fixed) // each, max(MOST_TOGETHER, chunk), -(-examples // chunk) * chunk)
                together = many // chunk * chunk
                needed = int(fixed + min(together, examples) * each)
                own = held and way == "packed"
                return FitPlan(method, way, device, limit, needed, together, tile=tile, basis=basis, held=own)
    least = common + chunk * (4 * components * (bases[-1] + vectors) + 4 * MOST_TILE)
    least = min(least, needed) if device.type == "cpu" else least
    raise RegressionError(
        f"{method} on {components:,} components takes at least {readable(least)} for one block of {chunk} examples, "
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
    rows, batches = min(masks, BATCH), 2 if masks > BATCH else 1
    matrices, moments, kept = 20 if method == "lasso" else 40, 8 * d * many, KEPT_BYTES * rows * d
    reading = rows * (batches * 4 * (d + many) + (12 if batches == 2 else 8) * d) + 12 * d**2 + moments
    decomposing = matrices * d**2 + moments + kept
    solving = (20 if method == "lasso" else 16) * d**2 + moments + kept + block
    return STARTED + max(reading, decomposing, solving)


def _learning(masks: int, components: int, examples: int, gradients: int, sites: int, limit: int) -> tuple[int, int]:
    """Return how many examples an informed fit learns from, and its bytes at the peak."""
    rounds = len(next_rounds(0, gradients))
    fixed = FIXED + table_bytes(sites, FEATURES, rounds) + (MASK_GROUPS * rounds + TABLES) * components
    if masks >= 2:
        fixed += READING + 48 * min(masks, components) ** 2 + (32 * masks * components if masks <= components else 0)
    wanted = min(max(MOST_LEARNING // components, 64), examples)
    many = wanted
    while many > LEAST_LEARNING and fixed + _learned_bytes(many, gradients) * components > limit:
        many -= 1
    needed = fixed + _learned_bytes(many, gradients) * components
    if needed > limit:
        raise RegressionError(
            f"informed on {components:,} components and {masks:,} masks takes at least {readable(needed)}, and the "
            f"limit is {readable(limit)}; give memory_limit={_more(needed)!r} or more"
            + (", or fewer masks" if masks else "")
        )
    return many, needed


def _learned_bytes(examples: int, gradients: int) -> int:
    """Return the bytes per component that learning from so many examples takes."""
    return LEARNING_BYTES * examples + 2 * min(examples, MASK_GROUPS) * gradients


def _more(size: int) -> str:
    """Return a size that is a little larger, as a memory limit may be given."""
    return readable(1.1 * size).replace(" ", "")
