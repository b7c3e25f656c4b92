"""Gains of sites against explicit least squares, and drawn together no further than rows ask for."""

import numpy as np
import pytest
import torch

from coar.regression.informed.rows import Rows
from coar.regression.informed.site_gains import gains_by_site as gains_from
from coar.regression.informed.site_gains import moments_by_round

D, SITES_COUNT, N, ROUNDS, GRADIENTS_COUNT = 24, 8, 6, 5, 6
SITES = torch.arange(D) // (D // SITES_COUNT)


def gains_by_site(rows, features, sites):
    """(features, components) gains."""
    moments = moments_by_round(rows, features, sites)
    return gains_from(list(moments.values()), len(features))[:, sites].float()


def problem(gains, noise, rounds=ROUNDS, seed=0):
    """Rows whose outputs are what (2, sites) gains on two random features predict, plus noise."""
    rng = np.random.default_rng(seed)
    features = torch.tensor(rng.standard_normal((2, 1, N, D)), dtype=torch.float32)
    masks = torch.tensor(rng.random((rounds * GRADIENTS_COUNT, D)) > 0.3)
    mean = masks.float().mean(0)
    weights = torch.einsum("kd,knd->nd", torch.tensor(gains, dtype=torch.float32)[:, SITES], features[:, 0])
    outputs = (masks.float() - mean) @ weights.T
    outputs = outputs + noise * torch.tensor(rng.standard_normal(outputs.shape), dtype=torch.float32)
    parts = [part[:, None] for part in masks.split(GRADIENTS_COUNT)]
    groups = torch.zeros(N, dtype=torch.long)
    return Rows.of(parts, outputs.split(GRADIENTS_COUNT), groups, folds=1, kept=0.7), features


def apart(rows, features):
    """Ordinary least squares, each site for itself, row by row and component by component."""
    design = torch.cat(
        [torch.cat(block.masks, 2)[0].double() - block.mean[0].double() for block in rows.blocks]
    ).numpy()
    outputs = torch.cat([block.outputs[0].T for block in rows.blocks])
    table, y = [], []
    for row in range(len(design)):
        for example in range(N):
            values = np.zeros((2, SITES_COUNT))
            for component in range(D):
                values[:, SITES[component]] += design[row, component] * features[:, 0, example, component].numpy()
            table.append(values.ravel())
            y.append(float(outputs[row, example]))
    return np.linalg.lstsq(np.array(table), np.array(y), rcond=None)[0].reshape(2, SITES_COUNT)


def of_sites(found):
    return found[:, :: D // SITES_COUNT].numpy()


def test_gains_are_the_same_for_all_components_of_a_site():
    found = gains_by_site(*problem(np.ones((2, SITES_COUNT)), 1.0), SITES)
    np.testing.assert_array_equal(found.numpy(), of_sites(found)[:, SITES])


def test_sites_that_differ_keep_their_gains_where_rows_are_many():
    gains = np.random.default_rng(1).uniform(-3, 3, (2, SITES_COUNT))
    rows, features = problem(gains, 0.1, rounds=60)
    found = of_sites(gains_by_site(rows, features, SITES))
    np.testing.assert_allclose(found, apart(rows, features), atol=0.01)
    np.testing.assert_allclose(found, gains, atol=0.05)


@pytest.mark.parametrize("seed", range(4))
def test_sites_that_are_alike_are_drawn_together_where_rows_are_few(seed):
    gains = np.array([[0.5], [0.3]]) * np.ones((2, SITES_COUNT))
    rows, features = problem(gains, 3.0, seed=seed)
    found = of_sites(gains_by_site(rows, features, SITES))
    assert np.square(found - gains).sum() < 0.5 * np.square(apart(rows, features) - gains).sum()


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_the_scale_of_a_feature_is_of_no_account(factor):
    rows, features = problem(np.array([[0.5], [0.3]]) * np.linspace(0.5, 2, SITES_COUNT), 1.0)
    scaled = features * torch.tensor([1.0, factor]).view(2, 1, 1, 1)
    found = gains_by_site(rows, scaled, SITES)
    found[1] *= factor
    np.testing.assert_allclose(found.numpy(), gains_by_site(rows, features, SITES).numpy(), rtol=1e-3, atol=1e-4)


def test_a_feature_that_is_zero_changes_nothing():
    rows, features = problem(np.ones((2, SITES_COUNT)), 1.0)
    more = torch.cat([features, torch.zeros_like(features[:1])])
    found = gains_by_site(rows, more, SITES)
    assert torch.isfinite(found).all()
    np.testing.assert_allclose(found[:2].numpy(), gains_by_site(rows, features, SITES).numpy(), rtol=1e-5)
