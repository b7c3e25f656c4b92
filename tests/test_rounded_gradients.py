"""Mean mask gradients stored with the precision of bfloat16."""

import numpy as np
import torch

import coar
from coar.store.gradients import MaskGradients, rounded_to_bfloat16
from tests.faults.helpers import study

ENDS = ("gradient_kept", "gradient_ablated")
QUIET = {"device": "cpu", "progress": False}


def test_rounding_is_that_of_torch():
    rng = np.random.default_rng(0)
    values = (rng.standard_normal(20_000) * 10.0 ** rng.integers(-30, 30, 20_000)).astype(np.float32)
    ties = (np.arange(0, 2**18, 2**15, dtype=np.uint32) + np.uint32(0x3F800000)).view(np.float32)
    values = np.concatenate([values, ties, -ties, np.float32([0, -0.0, np.inf, -np.inf, np.nan])])
    expected = torch.from_numpy(values).bfloat16().float().numpy()
    np.testing.assert_array_equal(rounded_to_bfloat16(values), expected)


def test_a_run_stores_rounded_gradients_from_its_first_to_its_last(tmp_path):
    plain = coar.collect(study(), tmp_path / "plain.zarr", gradients=12, **QUIET)
    rounded = coar.Execution(round_gradients=True)
    coar.collect(study(), tmp_path / "r.zarr", gradients=8, execution=rounded, **QUIET)
    run = coar.collect(study(), tmp_path / "r.zarr", gradients=12, **QUIET)
    for end in ENDS:
        exact, stored = plain.array(end)[:], run.array(end)[:]
        assert not np.array_equal(exact, stored, equal_nan=True)
        np.testing.assert_array_equal(stored, torch.from_numpy(stored).bfloat16().float().numpy())
        np.testing.assert_allclose(stored, exact, rtol=2**-8, atol=1e-6)
    np.testing.assert_array_equal(run.array("gradient_outputs")[:], plain.array("gradient_outputs")[:])
    assert MaskGradients(coar.Run.open(run.path)).rounded
    again = coar.collect(study(), tmp_path / "plain.zarr", gradients=16, execution=rounded, **QUIET)
    kept = again.array("gradient_kept")[-1]
    assert not np.array_equal(kept, torch.from_numpy(kept).bfloat16().float().numpy(), equal_nan=True)
