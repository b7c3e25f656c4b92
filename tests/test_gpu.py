"""On a CUDA device: the CPU's numbers, a memory limit that holds, and smaller batches once memory runs out."""

import numpy as np
import pytest
import torch

import coar
from coar.forward.copies import device_copy
from coar.forward.memory_limit import within_memory
from coar.forward.runner import FastRunner
from tests import contract
from tests.device_cases import CASES, difference
from tests.test_edge_runs import ABLATIONS, collected, study_of

pytestmark = pytest.mark.gpu
EXAMPLES = 64


@pytest.mark.parametrize("name", CASES)
def test_numbers_are_those_of_the_cpu(name):
    assert difference(name, "cuda") == ""


@pytest.mark.parametrize("label", ABLATIONS)
def test_edges_stay_within_a_memory_limit(label, tmp_path):
    study = study_of(ABLATIONS[label], ragged=label in ("zero", "mean"))
    asked = {"masks": 8, "gradients": 8}
    here = collected(study, tmp_path / "cpu.zarr", **asked)
    there = collected(study, tmp_path / "gpu.zarr", device="cuda", memory_limit="64MiB", **asked)
    for name in ("outputs", "base_output", "gradient_kept"):
        expected = here.array(name)[:]
        np.testing.assert_allclose(there.array(name)[:], expected, atol=1e-3 * np.abs(expected).max())


def test_compiled_models_and_their_cuda_graphs_give_the_same(tmp_path):
    net = contract.net()
    study = coar.Study(model=net, examples=contract.pictures(EXAMPLES, 1), components=coar.conv_filters(net))
    options = {"masks": 64, "progress": False}
    plain = coar.collect(study, tmp_path / "cpu.zarr", device="cpu", **options)
    execution = coar.Execution(compile=True)
    compiled = coar.collect(study, tmp_path / "gpu.zarr", device="cuda", execution=execution, **options)
    expected = plain.array("outputs")[:]
    np.testing.assert_allclose(compiled.array("outputs")[:], expected, atol=1e-3 * np.abs(expected).max())


def test_a_batch_that_does_not_fit_is_halved():
    """Another tensor takes all but a little memory, so the first batch cannot fit."""
    net = contract.net()
    examples = coar.Examples(inputs=torch.randn(512, 3, 256, 256), targets=torch.zeros(512, dtype=torch.long))
    components = coar.conv_filters(net)
    runner = FastRunner(
        device_copy(net, torch.device("cuda")), components, torch.zeros(components.width), coar.CorrectClassMargin()
    )
    masks = np.ones((1, len(components)), dtype=bool)
    free = torch.cuda.mem_get_info()[0]
    taken = torch.empty(free - 2**29, dtype=torch.uint8, device="cuda")
    found, outputs = within_memory(runner, 512, lambda one: one.outputs(one.load(examples, 0, 512), masks))
    del taken
    torch.cuda.empty_cache()
    assert found.batch_size < runner.batch_size
    here = FastRunner(net, components, torch.zeros(components.width), coar.CorrectClassMargin())
    expected = here.outputs(here.load(examples, 0, 8), masks)
    np.testing.assert_allclose(outputs[:, :8], expected, atol=1e-3 * np.abs(expected).max())
