"""Runs over edges in a bucket and on a Ray cluster are those of one process on a disk."""

import importlib.util
import os

import numpy as np
import pytest

import coar
from coar.cluster import RayCluster
from coar.store.integrity import verify
from tests import buckets
from tests.faults import helpers
from tests.test_edge_runs import ABLATIONS, collected, study_of

ASKED = {"masks": 8, "gradients": 8}


def counterfactual() -> coar.Study:
    """Return a study of all edges of a small model, with a partner for each text."""
    return study_of(ABLATIONS["counterfactual"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> coar.Run:
    """The run on a disk, read only."""
    return collected(counterfactual(), tmp_path_factory.mktemp("run") / "whole.zarr", **ASKED)


@pytest.mark.slow
def test_a_run_in_a_bucket_goes_on_where_it_stopped(run, tmp_path, monkeypatch) -> None:
    """Masks of a first call, mask gradients of a second, all masks of a third: the files of one call on a disk."""
    with buckets.s3_server(tmp_path / "moto.log") as port:
        buckets.make_bucket(port, "bucket")
        buckets.use(monkeypatch, port)
        address = "s3://bucket/edges.zarr"
        collected(counterfactual(), address, masks=4, gradients=0)
        collected(counterfactual(), address, masks=4, gradients=8)
        made = collected(counterfactual(), address, **ASKED)
        np.testing.assert_array_equal(made.array("outputs")[:], run.array("outputs")[:])
        np.testing.assert_array_equal(made.array("gradient_kept")[:], run.array("gradient_kept")[:])
        assert verify(made) == []
        fitted = coar.mask_gradient(counterfactual(), made, device="cpu", progress=False)
        assert np.abs(coar.load(address, "mask_gradient").weights() - fitted.weights()).max() == 0
        assert fitted.weights().any()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra ray")
def test_a_run_on_a_cluster_and_its_resumption(run, tmp_path) -> None:
    """Two workers make the files of one process, also of what is missing from a run."""
    import ray

    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    settings = {"address": "local", "include_dashboard": False, "log_to_driver": False, "_node_ip_address": "127.0.0.1"}
    ray.init(num_cpus=2, configure_logging=False, **settings)
    try:
        cluster = RayCluster(study=counterfactual, workers=2)
        made = collected(counterfactual(), tmp_path / "r.zarr", cluster=cluster, **ASKED)
        assert helpers.differing(helpers.files(made.path), helpers.files(run.path)) == []
        (made.path / "outputs/c/1/0").unlink()
        (made.path / "gradient_outputs/c/0/0/1").unlink()
        collected(counterfactual(), made.path, cluster=cluster, **ASKED)
        assert helpers.differing(helpers.files(made.path), helpers.files(run.path)) == []
    finally:
        ray.shutdown()
