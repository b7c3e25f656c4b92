"""What examples share: the linear algebra against explicit matrices, and folds that never see themselves."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from coar.regression.informed import learning
from coar.regression.informed import rows as rows_module
from coar.regression.informed.learning import learn, relearn
from coar.regression.informed.rows import Rows, group_order, sum_of_squares
from coar.regression.informed.shared_model import weighted_sum
from coar.regression.informed.site_gains import gains_by_site, moments_by_round
from coar.regression.informed.solving import System, conjugate_gradients
from tests.synthetic import FRACTION, pairwise

FOLDS, GRADIENTS_COUNT, MASK_GROUPS = 4, 8, 5  # mask gradients of each fold
N, D = 40, 16
SITES = torch.arange(D) // 4
KEPT = 1 - FRACTION
ORDER = group_order(torch.arange(N) % MASK_GROUPS)  # in which rows take examples


def parts(truth=None, seed=0):
    """Masks, outputs and gradients of each fold: (folds, passes, groups, components) and (folds, passes, examples)."""
    truth = truth or pairwise(N, D, seed=seed)
    masks = np.random.default_rng(seed).random((FOLDS, GRADIENTS_COUNT, MASK_GROUPS, D)) > FRACTION
    own = masks[:, :, np.arange(N) % MASK_GROUPS].astype(float)  # (folds, mask gradients, examples, components)
    outputs, gradients = zip(*(truth.mask_gradients(fold) for fold in own), strict=True)
    return masks, np.stack(outputs), np.stack(gradients), own


def rows_of(masks, outputs, order=ORDER, **settings):
    """Rows as a fit makes them, less the means over all folds and in units of the spread; one round is a fold."""
    pooled = outputs.reshape(-1, N)
    scaled = torch.tensor((outputs - pooled.mean(0)) / pooled.std(0, ddof=1), dtype=torch.float32)
    groups = order % MASK_GROUPS
    return Rows.of(torch.tensor(masks), scaled[:, :, order], groups, folds=FOLDS, kept=KEPT, **settings)


def left_out(gradients, own, outputs):
    """(2, folds, examples, components) mean gradients at both ends over all folds but one, in units of the spread.

    Examples are in the order of rows.
    """
    spread = outputs.reshape(-1, N).std(0, ddof=1)[:, None]
    ends = []
    for chosen in (own, 1 - own):
        means = []
        for fold in range(FOLDS):
            others = [i for i in range(FOLDS) if i != fold]
            g, m = gradients[others].reshape(-1, N, D), chosen[others].reshape(-1, N, D)
            means.append((g * m).sum(0) / np.maximum(m.sum(0), 1) / spread)
        ends.append(np.stack(means))
    return torch.tensor(np.stack(ends), dtype=torch.float32)[:, :, ORDER]


@pytest.fixture(scope="module")
def problem():
    masks, outputs, gradients, own = parts()
    return rows_of(masks, outputs), left_out(gradients, own, outputs)


@pytest.mark.parametrize("size", [1, 7, 60])
@pytest.mark.parametrize("shift", [1.0, 1e-3])
def test_conjugate_gradients_solve(size, shift):
    factor = torch.randn(size, size + 3, dtype=torch.float64)
    matrix = factor @ factor.T / size + shift * torch.eye(size, dtype=torch.float64)
    right = torch.randn(size, dtype=torch.float64)
    found = conjugate_gradients(lambda x: matrix @ x, right, 1 / matrix.diagonal())
    expected = torch.linalg.solve(matrix, right)
    assert float((found - expected).norm() / expected.norm()) < 1e-3


def test_conjugate_gradients_keep_the_shape_and_take_any_preconditioner():
    scale = torch.rand(3, 5) + 0.5
    right = torch.randn(3, 5)
    for inverse in (1 / scale, torch.ones(3, 5), torch.rand(3, 5) + 0.1):
        found = conjugate_gradients(lambda x: scale * x, right, inverse)
        torch.testing.assert_close(found, right / scale, rtol=1e-2, atol=5e-3)


def test_conjugate_gradients_of_nothing_are_nothing():
    assert not conjugate_gradients(lambda x: 2 * x, torch.zeros(4), torch.ones(4)).any()


@pytest.mark.parametrize(("examples", "components"), [(40, 6), (3, 200)])  # fewer unknowns than outputs, and more
def test_a_system_is_solved_as_by_its_matrix(examples, components):
    rng = torch.Generator().manual_seed(0)
    masks = [torch.rand(8, examples, components, generator=rng) > FRACTION for _ in range(2)]
    outputs = [torch.randn(8, examples, generator=rng) for _ in range(2)]
    rows = Rows.of(masks, outputs, torch.arange(examples), folds=2, kept=KEPT)
    gradients = torch.randn(2, examples, components, generator=rng)
    units = torch.rand(components, generator=rng) + 0.5

    def matrix_of(weights):
        """(outputs, components) by hand, in the order of blocks: what each unknown predicts."""
        whole = torch.stack(masks).transpose(1, 2).float()  # (folds, examples, rows, components)
        centred = whole - whole.mean((0, 2))[None, :, None]
        table = centred * weights[:, :, None]
        return torch.cat([table[block.fold, block.examples].flatten(0, 1) for block in rows.blocks])

    matrix = matrix_of(gradients).double()
    system = System(
        rows,
        rows.outputs(),
        weights=lambda fold, x: gradients[fold] * x,
        transposed=lambda fold, values: (gradients[fold] * values).sum(0),
        scale=matrix.square().sum(0).float(),
        units=units,
    )
    y, solve = torch.cat([part.flatten() for part in rows.outputs()]).double(), system.solver()
    assert (len(y) < components) == (components == 200)
    for penalty in (10.0, 1.0, 0.1, 3.0):
        exact = torch.linalg.solve(matrix.T @ matrix + penalty * torch.diag(units).double(), matrix.T @ y)
        assert float((solve(penalty) - exact).norm() / exact.norm()) < 5e-3


def test_predictions_are_centred_masks_times_the_weights_of_their_fold(problem):
    rows, _ = problem
    weight = torch.randn(FOLDS, N, D)
    masks = parts()[0]
    seen = []
    for block, found in zip(rows.blocks, rows.predict(weight), strict=True):
        for place, number in enumerate(range(N)[block.examples]):
            group = int(ORDER[number]) % MASK_GROUPS
            centred = masks[block.fold, :, group] - masks[:, :, group].reshape(-1, D).mean(0)
            at = divmod(place, found.shape[1])
            np.testing.assert_allclose(found[at].numpy(), centred @ weight[block.fold, number].numpy(), atol=1e-5)
            seen.append((block.fold, number))
    assert sorted(seen) == [(fold, number) for fold in range(FOLDS) for number in range(N)]


@pytest.mark.parametrize("members", [range(N), range(N - 3)])  # groups of equal sizes, and of two sizes
@pytest.mark.parametrize(
    "limits", [{}, {"BLOCK_NUMBERS": 2 * GRADIENTS_COUNT * D}, {"designs": False, "TILE_NUMBERS": 200}]
)
def test_blocks_of_any_size_give_the_same(members, limits, monkeypatch):
    masks, outputs, _, _ = parts()
    order = group_order(torch.tensor(members) % MASK_GROUPS)
    plain, weight = rows_of(masks, outputs, order), torch.randn(FOLDS, len(members), D)
    for name in {"BLOCK_NUMBERS", "TILE_NUMBERS"} & limits.keys():
        monkeypatch.setattr(rows_module, name, limits[name])
    cut = rows_of(masks, outputs, order, designs=limits.get("designs", True))
    assert (cut.blocks[0].centred is None) == ("designs" in limits)
    assert (len(cut.blocks) > len(plain.blocks)) == ("BLOCK_NUMBERS" in limits)
    torch.testing.assert_close(cut.adjoint(cut.residual(weight)), plain.adjoint(plain.residual(weight)))


def test_adjoint_is_the_transpose_of_predict(problem):
    rows, _ = problem
    for _ in range(5):
        weight = torch.randn(FOLDS, N, D, dtype=torch.float32)
        values = [torch.randn_like(block.outputs) for block in rows.blocks]
        forward = sum(float((a * b).sum()) for a, b in zip(rows.predict(weight), values, strict=True))
        assert forward == pytest.approx(float((weight * rows.adjoint(values)).sum()), rel=1e-4, abs=1e-2)


def test_gram_is_predict_and_its_transpose(problem):
    rows, _ = problem
    weight = torch.randn(FOLDS, N, D)
    expected = rows.adjoint(rows.predict(weight))
    for fold in range(FOLDS):
        torch.testing.assert_close(rows.gram(fold, weight[fold]), expected[fold], rtol=1e-4, atol=1e-4)


def test_split_deals_every_row_once(problem):
    rows, _ = problem
    for fold in range(FOLDS):
        others, held = rows.split(fold)
        assert held.folds() == [fold]
        assert set(others.folds()) == set(range(FOLDS)) - {fold}
        assert len(others.blocks) + len(held.blocks) == len(rows.blocks)
        assert held.count() + others.count() == pytest.approx(rows.count())
    assert rows.count() == FOLDS * GRADIENTS_COUNT


def test_rows_are_dealt_round_by_round(problem):
    rows, _ = problem
    halves = rows.dealt(2)
    assert halves.shape == (2, N, D)
    assert [block.fold for block in halves.blocks] == [number % 2 for block in rows.blocks for number in block.rounds]


def test_residuals_have_no_mean(problem):
    """Outputs are less their means over all folds, and so are the masks: else each weight's error has a share of it."""
    rows, gradients = problem
    weight = learn(rows, gradients, SITES)[0].weights(gradients).mean(0, keepdim=True).expand(FOLDS, N, D)
    sums = torch.zeros(N)
    for block, part in zip(rows.blocks, rows.residual(weight), strict=True):
        sums[block.examples] += part.sum(2).flatten()
    assert float(sums.abs().max()) < 1e-3


def test_trials_hold_what_their_weights_leave(problem):
    rows, gradients = problem
    for trial in learn(rows, gradients, SITES)[1]:
        weights = trial.model.weights(gradients)
        for part, left in ((trial.rows, trial.left), (trial.held, trial.held_left)):
            for one, other in zip(part.residual(weights), left, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_learned_weights_predict_rows_that_were_not_learned_from(problem):
    rows, gradients = problem
    total = sum_of_squares(rows.outputs())
    left = sum(trial.error() for trial in learn(rows, gradients, SITES)[1])
    truth, (_, outputs, _, _) = pairwise(N, D), parts()
    best = torch.tensor(truth.best() / outputs.reshape(-1, N).std(0, ddof=1)[:, None], dtype=torch.float32)[ORDER]
    least = sum_of_squares(rows.residual(best.expand(FOLDS, N, D)))
    assert least < left < least + 0.1 * total


@pytest.mark.parametrize("fold", range(FOLDS))
def test_weights_held_against_a_fold_do_not_know_its_outputs(fold):
    """The outputs change too little to change which refinements are kept, which is chosen from all folds."""
    uneven = replace(pairwise(N, D), ends=np.where(np.arange(D) % 2, 3.0, 0.5) * np.ones((2, 1)))
    masks, outputs, gradients, own = parts(uneven)
    rows, gradients = rows_of(masks, outputs), left_out(gradients, own, outputs)
    changed = tuple(replace(b, outputs=b.outputs * (1.001 if b.fold == fold else 1.0)) for b in rows.blocks)
    model, before = learn(rows, gradients, SITES)
    other, after = learn(replace(rows, blocks=changed), gradients, SITES)
    assert model.stages == other.stages
    assert model.stages
    for number, (one, two) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(one.model.weights(gradients), two.model.weights(gradients)) == (number == fold)


def test_the_same_stages_again_give_the_same_weights(problem):
    rows, gradients = problem
    model, trials = learn(rows, gradients, SITES)
    for one, other in zip(trials, relearn(model, rows, gradients), strict=True):
        assert torch.equal(one.model.weights(gradients), other.model.weights(gradients))


def test_trials_hold_the_rows_of_their_fold(problem):
    rows, gradients = problem
    trials = learn(rows, gradients, SITES)[1]
    assert [trial.held.folds() for trial in trials] == [[fold] for fold in range(FOLDS)]
    assert [trial.rows.folds() for trial in trials] == [
        [other for other in range(FOLDS) if other != fold] for fold in range(FOLDS)
    ]


def start_of(rows, gradients):
    """What is learned first from all rows."""
    return learning._Start.of(rows, gradients, SITES).trial(rows, replace(rows, blocks=()))


def test_curves_are_unit_directions_of_each_site_that_hold_most_of_its_curvature(problem):
    rows, gradients = problem
    start = start_of(rows, gradients).model.curvature
    ratio = start.ratio.double().numpy()
    curvature = (gradients[1].double().numpy() - ratio * gradients[0].double().numpy()).mean(0)
    unit = curvature.reshape(N, -1, 4)  # (examples, sites, components of a site)
    unit = unit / np.linalg.norm(unit, axis=-1, keepdims=True)
    assert len(start.curves) == N // 8
    for site in range(4):
        found = start.curves[:4, site == SITES].double().numpy()
        np.testing.assert_allclose(found @ found.T, np.eye(4), atol=1e-4)
        most = np.linalg.svd(unit[:, site], compute_uv=False)[0]
        assert np.linalg.norm(unit[:, site] @ found[0]) == pytest.approx(most, rel=1e-4)


def test_a_curve_helps_where_few_mask_gradients_show_what_examples_share():
    """Each site's curvature is one direction, drowned in noise at the ablated end: its curve must find it again."""
    rng = np.random.default_rng(2)
    kept, shape = rng.standard_normal((N, D)), rng.standard_normal(D)
    bend = rng.standard_normal((N, 1)) * shape
    masks = rng.random((FOLDS, GRADIENTS_COUNT, MASK_GROUPS, D)) > FRACTION
    weights = kept + bend / 2
    outputs = np.einsum("fpnd,nd->fpn", masks[:, :, np.arange(N) % MASK_GROUPS], weights)
    rows, spread = rows_of(masks, outputs), outputs.reshape(-1, N).std(0, ddof=1)[:, None]
    ends = np.stack([np.stack([kept, kept + bend + 2 * rng.standard_normal((N, D))]) for _ in range(FOLDS)], axis=1)
    gradients = torch.tensor(ends / spread, dtype=torch.float32)[:, :, ORDER]
    moments = moments_by_round(rows, gradients, SITES)
    straight = gains_by_site(list(moments.values()), 2)[:, SITES].float()
    without = sum_of_squares(rows.residual(weighted_sum(straight, gradients)))
    curved = start_of(rows, gradients).model.weights(gradients)
    assert sum_of_squares(rows.residual(curved)) < 0.9 * without


def test_gains_undo_whatever_factor_a_site_has(problem):
    rows, gradients = problem
    factors = torch.tensor([0.1, 1.0, 3.0, 10.0])[SITES]
    plain = sum(trial.error() for trial in learn(rows, gradients, SITES)[1])
    for end in (0, 1):
        scaled = gradients.clone()
        scaled[end] *= factors
        found = sum(trial.error() for trial in learn(rows, scaled, SITES)[1])
        assert found == pytest.approx(plain, rel=0.1)


def test_noise_is_not_predicted():
    masks, outputs, gradients, own = parts()
    rows = rows_of(masks, np.random.default_rng(5).standard_normal(outputs.shape))
    gradients = left_out(gradients, own, outputs)
    total = sum_of_squares(rows.outputs())
    left = sum(trial.error() for trial in learn(rows, gradients, SITES)[1])
    assert 0.98 * total < left < 1.2 * total


@pytest.mark.parametrize("examples", [1, 7, 8, 40])
def test_directions_are_few_where_examples_are_few(examples):
    masks, outputs, gradients, own = parts()
    gradients = left_out(gradients, own, outputs)[:, :, :examples]
    rows = rows_of(masks, outputs, ORDER[:examples])
    model = learn(rows, gradients, SITES)[0]
    assert model.structure.shape == (examples // 8, D)
    assert torch.isfinite(model.weights(gradients)).all()
