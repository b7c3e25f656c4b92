"""Peak memory: bounded by the batch, whatever the number of masks and of components."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import coar
from coar.errors import SettingsError

SCRIPT = """
import json, re, sys
from pathlib import Path
import torch
from torch import nn
import coar

torch.set_num_threads(1)
layers = [nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 16, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(7744, 200)]
model = nn.Sequential(*layers, nn.ReLU(), nn.Linear(200, 10))
examples = coar.Examples(inputs=torch.randn(64, 3, 48, 48), targets=torch.arange(64) % 10)
few = coar.conv_filters(model, include="0")
many = coar.conv_filters(model) + coar.neurons(model, include="5") + coar.input_features(model, include="7")

mean = coar.Mean(calibration=examples)

def peak(components, masks, ablation, batch_size=8):
    study = coar.Study(model=model, examples=examples, components=components, ablation=ablation)
    name = f"{sys.argv[1]}/{len(components)}-{masks}-{ablation.label}-{batch_size}.zarr"
    execution = coar.Execution(mask_block=16, batch_size=batch_size)
    coar.collect(study, name, masks=masks, device="cpu", execution=execution, progress=False)
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

print(json.dumps([peak(few, 16, mean), peak(few, 320, mean), peak(many, 320, mean), peak(few, 16, mean, 64)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_peak_memory_depends_on_neither_masks_nor_components_but_on_the_batch(tmp_path):
    """Twenty times the masks, then eighteen times the components, then eight times the batch: the peak so far."""
    run = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, check=True)
    least, masks, components, batch = json.loads(run.stdout)  # MiB
    assert masks - least < 16  # the gated weights are 6, and would be 2,000 for all masks
    assert components - masks < 16
    assert batch - components > 20  # a batch of 64 instead of 8: the first activations alone are 33 instead of 4


EDGES = """
import json, re, sys
from pathlib import Path
import torch
from transformers import GPT2Config, GPT2LMHeadModel
import coar

torch.set_num_threads(1)
model = GPT2LMHeadModel(GPT2Config(n_embd=128, n_layer=4, n_head=8, n_positions=128, vocab_size=100)).eval()
ids = torch.randint(1, 99, (48, 128))
examples = coar.token_examples({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

def peak(name, limit, count):
    study = coar.Study(
        model=model,
        examples=examples.subset(range(count)),
        components=coar.edges(model),
        output=coar.TokenLogProbability(),
        ablation=coar.ZeroActivation(),
        sampler=coar.BernoulliSampler(ablated_fraction=0.1),
    )
    execution = coar.Execution(memory_limit=limit)
    path = f"{sys.argv[1]}/{name}.zarr"
    coar.collect(study, path, masks=1, gradients=2, device="cpu", execution=execution, progress=False)
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

print(json.dumps([peak("one", "50MiB", 1), peak("limited", "50MiB", 48), peak("free", None, 48)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_a_memory_limit_holds_for_gates_on_edges(tmp_path):
    """Of 48 texts as many share a pass as the limit allows; readers' inputs and their norms add a few chunks."""
    run = subprocess.run([sys.executable, "-c", EDGES, str(tmp_path)], capture_output=True, text=True, check=True)
    one, limited, free = json.loads(run.stdout)  # MiB
    assert limited - one < 400  # each pass that is not freed at once adds to it: 960 with a cycle of references
    assert free - limited > 400


@pytest.mark.skipif(sys.platform != "linux", reason="free memory is read from /proc")
def test_a_model_larger_than_memory_is_refused_before_it_is_copied(tmp_path):
    """Its weights are an empty file of 1 TiB, mapped into memory, of which nothing is read."""
    rows, columns = 2**20, 2**18
    with (tmp_path / "weights").open("wb") as file:
        file.truncate(4 * rows * columns)
    model = nn.Linear(columns, rows, bias=False, device="meta")
    mapped = torch.from_file(str(tmp_path / "weights"), shared=True, size=rows * columns)
    model.weight = nn.Parameter(mapped.view(rows, columns))
    examples = coar.Examples(inputs=torch.ones(2, columns), targets=torch.zeros(2, dtype=torch.int64))
    study = coar.Study(model=model, examples=examples, components=coar.neurons(model), ablation=coar.ZeroActivation())
    with pytest.raises(SettingsError, match=r"a copy of Linear takes 1.02e\+03 GiB on cpu, where [\d.]+ GiB are free"):
        coar.collect(study, tmp_path / "r.zarr", masks=2, device="cpu", progress=False)
    assert not (tmp_path / "r.zarr").exists()
