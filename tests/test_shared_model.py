"""What examples share: the linear algebra against explicit matrices, and folds that never see themselves."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from coar.regression.informed import learning
from coar.regression.informed import rows as rows_module
from coar.regression.informed.learning import learn, relearn
from coar.regression.informed.quality import judge
from coar.regression.informed.rows import Rows, group_order, sum_of_squares
from coar.regression.informed.shared_model import weighted_sum
from coar.regression.informed.site_gains import gains_by_site, moments_by_round
from coar.regression.informed.solving import System, predictions, solver_of
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


@pytest.mark.parametrize(("examples", "components"), [(40, 6), (3, 200)])  # fewer unknowns than outputs, and more
def test_systems_are_solved_side_by_side_as_by_their_matrices(examples, components):
    """Three systems of the same rows, each with its own map from unknowns to weights; one does not see fold 1."""
    rng = torch.Generator().manual_seed(0)
    masks = [torch.rand(8, examples, components, generator=rng) > FRACTION for _ in range(2)]
    outputs = [torch.randn(8, examples, generator=rng) for _ in range(2)]
    rows = Rows.of(masks, outputs, torch.arange(examples), folds=2, kept=KEPT)
    whole = torch.stack(masks).transpose(1, 2).double()  # (folds, examples, rows, components)
    centred = whole - whole.mean((0, 2))[None, :, None]
    systems, matrices = [], []
    for folds in ([0, 1], [0], [0, 1]):
        gradients = torch.randn(2, examples, components, generator=rng)
        matrix = (centred * gradients[:, :, None]).flatten(1, 2)  # (folds, outputs, components)
        matrices.append(matrix)
        systems.append(
            System(
                rows,
                folds,
                rows.outputs(),
                weights=lambda fold, some, x, own=gradients: own[fold][:, some] * x,
                transposed=lambda fold, some, values, own=gradients: (own[fold][:, some] * values).sum(0),
                scale=matrix[folds].square().sum((0, 1)).float(),
                units=torch.rand(components, generator=rng) + 0.5,
            )
        )
    y, solve = torch.stack(outputs).mT.flatten(1).double(), solver_of(systems)  # (folds, outputs)
    assert (y.numel() < components) == (components == 200)
    for penalty, which in ((10.0, [0, 1]), (1.0, [0, 1, 2]), (0.1, [1]), (3.0, [2, 0])):
        found = solve(penalty, which)
        for i, own, explained in zip(which, found, predictions([systems[i] for i in which], found), strict=True):
            folds, matrix = systems[i].folds, matrices[i][systems[i].folds].flatten(0, 1)
            ridge = penalty * torch.diag(systems[i].units).double()
            exact = torch.linalg.solve(matrix.T @ matrix + ridge, matrix.T @ y[folds].flatten())
            assert float((own - exact).norm() / exact.norm()) < 5e-3
            for block, part in zip(rows.blocks, explained, strict=True):
                size = block.outputs[0].numel()
                expected = (matrices[i][block.fold] @ own.double()).view(examples, size)[block.examples]
                torch.testing.assert_close(part.flatten(1).double(), expected, rtol=1e-4, atol=1e-4)


def test_predictions_are_centred_masks_times_the_weights_of_their_fold(problem):
    rows, _ = problem
    weight = torch.randn(FOLDS, N, D)
    masks = parts()[0]
    seen = []
    for block, found in zip(rows.blocks, rows.predict(weight.__getitem__), strict=True):
        for place, number in enumerate(range(N)[block.examples]):
            group = int(ORDER[number]) % MASK_GROUPS
            centred = masks[block.fold, :, group] - masks[:, :, group].reshape(-1, D).mean(0)
            at = divmod(place, found.shape[1])
            np.testing.assert_allclose(found[at].numpy(), centred @ weight[block.fold, number].numpy(), atol=1e-5)
            seen.append((block.fold, number))
    assert sorted(seen) == [(fold, number) for fold in range(FOLDS) for number in range(N)]


def adjoint(rows, values):
    """(folds, examples, components) sums, tile by tile."""
    found = torch.zeros(rows.shape)
    for tile in rows.tiles(rows.folds()):
        for fold in rows.folds():
            found[fold, :, tile.some] = tile.adjoint(fold, values)
    return found


@pytest.mark.parametrize("members", [range(N), range(N - 3)])  # groups of equal sizes, and of two sizes
@pytest.mark.parametrize("least", [1, 5])
def test_tiles_of_any_size_give_the_same(members, least, monkeypatch):
    masks, outputs, gradients, own = parts()
    order = group_order(torch.tensor(members) % MASK_GROUPS)
    plain, weight = rows_of(masks, outputs, order), torch.randn(FOLDS, len(members), D)
    monkeypatch.setattr(rows_module, "TILE_NUMBERS", 1)
    monkeypatch.setattr(rows_module, "LEAST_TILE", least)
    cut = rows_of(masks, outputs, order)
    assert [tile.some.stop - tile.some.start for tile in plain.tiles([0])] == [D]
    assert [tile.some.stop - tile.some.start for tile in cut.tiles([0])] == [least] * (D // least) + [1] * (D % least)
    torch.testing.assert_close(
        adjoint(cut, cut.residual(weight.__getitem__)), adjoint(plain, plain.residual(weight.__getitem__))
    )
    gradients = left_out(gradients, own, outputs)[:, :, : len(members)]
    for sites in (SITES, torch.arange(D) % 4):  # components of a site in a row, and apart
        (one, trials), (other, cut_trials) = (learn(rows, gradients, sites) for rows in (plain, cut))
        torch.testing.assert_close(one.weights(gradients), other.weights(gradients), rtol=1e-3, atol=1e-3)
        qualities = [
            judge(made, relearn(one, rows.dealt(2), gradients[:, :2]))
            for made, rows in ((trials, plain), (cut_trials, cut))
        ]
        assert qualities[0].error == pytest.approx(qualities[1].error, rel=0.01)


def test_adjoint_is_the_transpose_of_predict(problem):
    rows, _ = problem
    for _ in range(5):
        weight = torch.randn(FOLDS, N, D, dtype=torch.float32)
        values = [torch.randn_like(block.outputs) for block in rows.blocks]
        forward = sum(float((a * b).sum()) for a, b in zip(rows.predict(weight.__getitem__), values, strict=True))
        assert forward == pytest.approx(float((weight * adjoint(rows, values)).sum()), rel=1e-4, abs=1e-2)


def test_a_tile_has_the_folds_that_were_asked_for(problem):
    rows, _ = problem
    for tile in rows.tiles([1, 2]):
        assert list(tile.designs) == [i for i, block in enumerate(rows.blocks) if block.fold in (1, 2)]
    assert not list(replace(rows, blocks=()).tiles([0]))


def test_rows_without_a_fold_are_all_others(problem):
    rows, _ = problem
    for fold in range(FOLDS):
        others = rows.without(fold)
        assert set(others.folds()) == set(range(FOLDS)) - {fold}
        assert others.count() == (FOLDS - 1) * GRADIENTS_COUNT
    assert rows.without(None).count() == rows.count() == FOLDS * GRADIENTS_COUNT


def test_rows_are_dealt_round_by_round(problem):
    rows, _ = problem
    halves = rows.dealt(2)
    assert halves.shape == (2, N, D)
    assert [block.fold for block in halves.blocks] == [number % 2 for block in rows.blocks for number in block.rounds]


def test_residuals_have_no_mean(problem):
    """Outputs are less their means over all folds, and so are the masks: else each weight's error has a share of it."""
    rows, gradients = problem
    weight = learn(rows, gradients, SITES)[0].weights(gradients).mean(0)
    sums = torch.zeros(N)
    for block, part in zip(rows.blocks, rows.residual(lambda _: weight), strict=True):
        sums[block.examples] += part.sum(2).flatten()
    assert float(sums.abs().max()) < 1e-3


def test_trials_hold_what_their_weights_leave(problem):
    rows, gradients = problem
    for trial in learn(rows, gradients, SITES)[1]:
        residual = rows.residual(trial.model.weights(gradients).__getitem__)
        for one, other in zip(residual, trial.left, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_learned_weights_predict_rows_that_were_not_learned_from(problem):
    rows, gradients = problem
    total = sum_of_squares(rows.outputs())
    left = sum(trial.error() for trial in learn(rows, gradients, SITES)[1])
    truth, (_, outputs, _, _) = pairwise(N, D), parts()
    best = torch.tensor(truth.best() / outputs.reshape(-1, N).std(0, ddof=1)[:, None], dtype=torch.float32)[ORDER]
    least = sum_of_squares(rows.residual(lambda _: best))
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


def test_trials_hold_out_their_fold(problem):
    rows, gradients = problem
    for fold, trial in enumerate(learn(rows, gradients, SITES)[1]):
        assert trial.seen().folds() == [other for other in range(FOLDS) if other != fold]
        assert [block.fold for block, _ in trial.held_out()] == [fold] * (len(rows.blocks) // FOLDS)
        left = [part for block, part in zip(rows.blocks, trial.left, strict=True) if block.fold == fold]
        assert trial.error() == pytest.approx(sum_of_squares(left))


def start_of(rows, gradients):
    """What is learned first from all rows."""
    return learning._Start.of(rows, gradients, SITES).trial(rows, None)


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
    without = sum_of_squares(rows.residual(weighted_sum(straight, gradients).__getitem__))
    curved = start_of(rows, gradients).model.weights(gradients)
    assert sum_of_squares(rows.residual(curved.__getitem__)) < 0.9 * without


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
