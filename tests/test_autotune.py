"""The execution plan changes no output, memory limits hold, and a compiler that fails costs nothing but a warning."""

import logging
import math
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import coar
from coar.collection.preparation import BatchSettings, unit_runner
from coar.errors import AblationError, SettingsError
from coar.forward.autotune import fastest_runner
from coar.forward.copies import device_copy
from coar.forward.execution_plan import ExecutionPlan
from coar.forward.memory_limit import batch_sizes, bytes_of, gradient_bytes, mask_bytes, within_memory
from coar.forward.model_runner import ModelRunner
from coar.forward.runner import FastRunner
from coar.gates.batch_norms import following_batch_norms
from coar.store.gradients import GRADIENTS, MaskGradients
from tests import tiny
from tests.faults import helpers

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
COMPILER = shutil.which(os.environ.get("CXX", "g++"))


class Swapped(nn.Module):
    """Lays the second half of an example out at another example's place, so that rows cannot have their masks."""

    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(3, 11), nn.Linear(22, 3)

    def forward(self, x):
        first, second = torch.tanh(self.hidden(torch.cat([x[:, :3], x[:, 3:].flip(0)]))).chunk(2)
        return self.head(torch.cat([first, second.flip(0)], 1))


def text_study(kind="bert", rows=6):
    model = tiny.model(kind)
    heads = coar.attention_heads(model)
    x = tiny.inputs(kind, rows)
    examples = coar.Examples(inputs=x, targets=torch.arange(len(x)) % tiny.WIDTH)
    return coar.Study(model=model, examples=examples, components=heads + coar.input_features(model, exclude="*att*"))


def worker(study, **plan):
    """A runner as a run would have it, batch norms folded."""
    model = device_copy(study.model, CPU)
    runner = ModelRunner(model, study.output)
    block = runner.load(study.examples, 0, 4)
    norms = following_batch_norms(
        model,
        study.components,
        run=lambda variant: torch.from_numpy(ModelRunner(variant, study.output).base_output(block)),
    )
    constants = study.ablation.replacements(model, study.components, batch_size=64)
    return FastRunner(model, study.components, constants, study.output, ExecutionPlan(**plan), batch_norms=norms)


def together(runner, count):
    """The runner with so many masks per forward pass."""
    return runner.with_plan(replace(runner.plan, masks_per_forward=count))


def masks_of(study, count=21):
    return study.sampler.masks("train", range(count), len(study.components))


STUDIES = {
    "digits, zero": lambda: helpers.digits_study(6),
    "digits, mean": lambda: replace(
        helpers.digits_study(6), ablation=coar.Mean(calibration=helpers.digits_study(40).examples)
    ),
    "transformer": text_study,
    "gpt2": lambda: text_study("gpt2"),
    "one example": lambda: replace(helpers.study(), examples=helpers.examples().subset([3])),
}


@pytest.mark.parametrize("group", [2, 7, 64])
@pytest.mark.parametrize("make", STUDIES.values(), ids=STUDIES.keys())
def test_many_masks_per_forward_give_the_outputs_of_one(make, group, digits):
    study = make()
    here, masks = worker(study), masks_of(study)
    block = here.load(study.examples, 0, len(study.examples))
    expected = here.outputs(block, masks)
    here, rows = together(here, group), []
    here.model.register_forward_pre_hook(lambda _module, args: rows.append(len(args[0])))
    np.testing.assert_allclose(here.outputs(block, masks), expected, rtol=0, atol=1e-4 * expected.std(0).min() + 1e-6)
    most = min(group, 128 // block.size, len(masks))
    assert len(rows) == math.ceil(len(masks) / min(group, 128 // block.size))
    assert max(rows) == most * block.size <= here.batch_size


def test_folded_norms_stay_folded_with_many_masks_per_forward(digits):
    study = helpers.digits_study(6)
    here = worker(study)
    assert here._batch_norms
    block = here.load(study.examples, 0, 6)
    here, called = together(here, 4), []
    for path in here._batch_norms.values():
        here.model.get_submodule(path).register_forward_hook(lambda _m, args, y: called.append(y is args[0]))
    here.outputs(block, masks_of(study, 4))
    assert called
    assert all(called)


def test_a_worker_goes_on_after_an_exception():
    study = helpers.study()
    here, masks = worker(study), masks_of(study)
    block = here.load(study.examples, 0, 5)
    before = here.outputs(block, masks)
    for group in (1, 4):
        grouped = together(here, group)
        with pytest.raises(RuntimeError):
            grouped.outputs(here.load(helpers.examples(inputs=torch.ones(20, 7)), 0, 5), masks)
        np.testing.assert_allclose(grouped.outputs(block, masks), before, atol=1e-6)
    assert not any(module._forward_hooks for module in here.model.modules())


def test_gates_say_each_time_that_a_module_was_not_called():
    study = helpers.study()
    here = together(worker(study), 4)
    block = here.load(study.examples, 0, 5)
    here.outputs(block, masks_of(study, 4))
    here.model.forward = lambda x: here.model.head(torch.ones(len(x), 11))
    with pytest.raises(AblationError, match="'hidden' was not called"):
        here.outputs(block, masks_of(study, 4))


def gradients_of(study, examples, count=3):
    """Masks of their own for each of some examples in a few mask gradients, and the mask group of each."""
    masks = study.sampler.masks("gradient", range(count * examples), len(study.components))
    return masks.reshape(count, examples, -1), np.arange(examples)


@contextmanager
def weight_types(model, seen):
    """Note the type of each layer's weight as the layer is called, by name."""
    with ExitStack() as stack:
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                note = lambda layer, _args, name=name: seen.update({name: layer.weight.dtype})  # noqa: E731
                stack.callback(layer.register_forward_pre_hook(note).remove)
        yield


def test_bfloat16_weights_give_what_automatic_casts_give(digits):
    for study in (helpers.digits_study(6), text_study()):
        low = worker(study, precision="bf16")
        block = low.load(study.examples, 0, 6)
        outputs = low.outputs(block, masks_of(study))
        with_gradients = low.mask_gradients(block, *gradients_of(study, 6))
        other = worker(study, precision="bf16", low_weights=False)
        np.testing.assert_array_equal(other.outputs(block, masks_of(study)), outputs)
        for mine, plain in zip(with_gradients, other.mask_gradients(block, *gradients_of(study, 6)), strict=True):
            np.testing.assert_array_equal(mine, plain)
        for runner, kind in ((low, torch.bfloat16), (other, torch.float32)):
            with_masks, with_groups = ({} for _ in range(2))
            with weight_types(runner.model, with_masks):
                runner.outputs(block, masks_of(study, 1))
            with weight_types(runner.model, with_groups):
                runner.mask_gradients(block, *gradients_of(study, 6))
            assert set(with_masks.values()) == set(with_groups.values()) == {kind}
            assert {parameter.dtype for parameter in runner.model.parameters()} == {torch.float32}


class Exact(nn.Module):
    """Runs its hidden layer without automatic casts."""

    def __init__(self):
        super().__init__()
        self.inner = helpers.net()

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.inner(x)


def test_layers_outside_automatic_casts_keep_float32_weights():
    model = Exact()
    study = helpers.study(model=model, components=coar.neurons(model, include="*hidden"))
    low, exact = worker(study, precision="bf16"), worker(study)
    block = low.load(study.examples, 0, 20)
    np.testing.assert_array_equal(low.outputs(block, masks_of(study)), exact.outputs(block, masks_of(study)))
    assert [one.path for one in low.fallbacks] == [
        f"holding {weights} in bfloat16 for gates in weights" for weights in ("all weights", "gated weights")
    ]
    assert exact.fallbacks == []


class ExactHead(nn.Module):
    """Runs its head without automatic casts, and its hidden layer with them."""

    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x):
        y = self.hidden(x).relu()
        with torch.autocast("cpu", enabled=False):
            return self.head(y.float())


def test_one_such_layer_leaves_bfloat16_to_the_gated_ones():
    model = ExactHead()
    study = helpers.study(model=model, components=coar.neurons(model, include="hidden"))
    low, other = worker(study, precision="bf16"), worker(study, precision="bf16", low_weights=False)
    block = low.load(study.examples, 0, 20)
    np.testing.assert_array_equal(low.outputs(block, masks_of(study)), other.outputs(block, masks_of(study)))
    with weight_types(low.model, seen := {}):
        low.outputs(block, masks_of(study))
    assert seen == {"hidden": torch.bfloat16, "head": torch.float32}


def test_float32_is_not_rounded_in_convolutions_and_the_setting_comes_back():
    study, seen = helpers.study(), []
    here = worker(study)
    here.model.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.conv.fp32_precision))
    block, before = here.load(study.examples, 0, 5), torch.backends.cudnn.conv.fp32_precision
    here.base_output(block)
    here.outputs(block, masks_of(study, 1))
    here.full_model_gradients(block)
    assert set(seen) == {"ieee"}
    assert torch.backends.cudnn.conv.fp32_precision == before


def tuned(study, speeds, **settings):
    """The plan that is chosen, and all that were timed, where a mask takes the seconds that `speeds` says."""
    timed = []

    def seconds(runner, block, masks):
        timed.append((runner.plan.batch_size, runner.plan.masks_per_forward))
        return speeds(*timed[-1])

    masks = masks_of(study, 64)
    found = fastest_runner(worker(study), study.examples, masks, work=1e6, timer=seconds, **settings)
    assert found.batch_size == found.plan.batch_size
    return found.plan, timed


def test_only_valid_plans_are_tried_and_the_fastest_is_kept():
    study, usual = helpers.study(), ExecutionPlan(batch_size=128)
    found, timed = tuned(study, lambda size, group: 1.0 / group - 0.1 * (group == 4))
    assert found == replace(usual, masks_per_forward=4)
    assert set(timed) == {(128, 1), (128, 2), (128, 4), (16, 1)}  # 6 x 20 rows is the most, 16 the least batch
    assert tuned(study, lambda size, group: 1.0 * (1 - (group > 1) / 50))[0] == usual
    assert tuned(study, lambda size, group: 1.0 / group, tune=False)[0] == usual


@pytest.mark.parametrize("kind", ["slices", "order"])
def test_components_that_rows_cannot_have_for_themselves_keep_one_mask_per_forward(kind):
    model = Swapped() if kind == "order" else helpers.net()
    neurons = coar.neurons(model, include="hidden")
    components = neurons if kind == "order" else coar.parameter_slices(model, "hidden.weight")
    study = helpers.study(model=model, components=components)
    found, timed = tuned(study, lambda size, group: 1.0 / group**2)
    assert found.masks_per_forward == 1
    assert {group for _, group in timed} == {1}


@pytest.mark.parametrize(("seconds", "work"), [(0.01, 1), (10.0, 2)], ids=["little work", "slow masks"])
def test_short_work_is_not_measured_and_long_work_within_its_time(seconds, work):
    """Ten seconds per mask: one further plan would take longer than the time for measuring."""
    study, timed = helpers.study(), []
    here, masks = worker(study), masks_of(study)

    def timer(runner, block, masks):
        timed.append(runner.plan.masks_per_forward)
        return seconds

    found = fastest_runner(here, study.examples, masks, work=work, timer=timer)
    assert found.plan == here.plan
    assert set(timed) == {1}
    assert len(timed) <= 2


def test_collect_uses_a_plan_and_checks_it(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="coar")
    model = helpers.net()
    study = helpers.study(model=model)
    expected = helpers.collect(study, tmp_path / "one.zarr", masks=40, batch_size=128)
    assert "execution plan" not in caplog.text
    seen = []
    model.register_forward_pre_hook(lambda _module, args: seen.append(len(args[0])))
    monkeypatch.setattr("coar.collection.preparation.fastest_runner", lambda runner, *_, **__: together(runner, 8))
    run = helpers.collect(study, tmp_path / "many.zarr", masks=40, batch_size=None)
    assert max(seen) == 8 * 8  # a block has 8 examples
    np.testing.assert_allclose(helpers.whole(run, "outputs"), helpers.whole(expected, "outputs"), atol=1e-6)
    assert run.facts == expected.facts
    model = Swapped()
    wrong = helpers.study(model=model, components=coar.neurons(model, include="hidden"))
    with pytest.raises(AblationError, match="by weights and by outputs"):
        helpers.collect(wrong, tmp_path / "wrong.zarr", masks=40, batch_size=None)


def conv_study(*more):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *more, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    pictures = coar.Examples(inputs=torch.randn(40, 3, 16, 16), targets=torch.arange(40) % 4)
    return coar.Study(model=net, examples=pictures, components=coar.conv_filters(net))


def test_bytes_per_example_are_those_of_the_largest_module():
    study = conv_study()
    assert mask_bytes(study, study.model.eval()) == 2 * 8 * 16 * 16 * 4  # what the ReLU is given and returns
    saved = gradient_bytes(study, device_copy(study.model, CPU))
    activations = 8 * 16 * 16 * 4
    assert 2 * activations <= saved <= 4 * activations  # the gated filters and the ReLU


@pytest.mark.parametrize("limit", ["100kB", 50_000, "64 KiB"])
def test_memory_limits_are_honoured(tmp_path, monkeypatch, limit):
    study, sizes, backward = conv_study(), [], []

    def measure(_module, args, y):
        (backward if y.requires_grad else sizes).append(sum(t.numel() * t.element_size() for t in (*args, y)))

    fewest = batch_sizes(study, device_copy(study.model, CPU), memory_limit=limit, gradients=True)

    def measured(*args, **settings):
        found = batch_sizes(*args, **settings)
        sizes.clear()
        backward.clear()
        return found

    monkeypatch.setattr("coar.collection.preparation.batch_sizes", measured)
    handles = [module.register_forward_hook(measure) for module in study.model]
    coar.collect(
        study,
        tmp_path / "r.zarr",
        masks=8,
        gradients=8,
        execution=coar.Execution(memory_limit=limit),
        device="cpu",
        progress=False,
    )
    for handle in handles:
        handle.remove()
    largest = 2 * 8 * 16 * 16 * 4
    assert fewest[0] == bytes_of(limit) // largest
    assert largest <= max(sizes) <= bytes_of(limit)
    assert len(backward) > 0
    assert max(backward) <= fewest[1] * largest <= bytes_of(limit)


def test_memory_limits_that_cannot_be_kept_are_errors(tmp_path):
    study = conv_study()
    with pytest.raises(
        SettingsError, match="forward pass of one example takes 16 KiB, and the memory limit is 1000 bytes"
    ):
        coar.collect(
            study,
            tmp_path / "r.zarr",
            masks=8,
            execution=coar.Execution(memory_limit=1000),
            device="cpu",
            progress=False,
        )
    deep = conv_study(nn.Tanh(), nn.Tanh())
    assert batch_sizes(deep, device_copy(deep.model, CPU), memory_limit="17KiB", gradients=False) == (1, 128)
    with pytest.raises(SettingsError, match="a mask gradient of one example takes"):
        batch_sizes(deep, device_copy(deep.model, CPU), memory_limit="17KiB", gradients=True)
    with pytest.raises(SettingsError, match="both bound a batch"):
        coar.Execution(memory_limit="1GB", batch_size=4)
    assert list(tmp_path.iterdir()) == []


class Limited(nn.Module):
    """Runs out of memory with more rows than so many."""

    def __init__(self, most):
        super().__init__()
        self.inner, self.most, self.rows = helpers.net(), most, []

    def forward(self, x):
        self.rows.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError(f"{len(x)} rows")
        return self.inner(x)


def limited(most):
    """A study of a model that runs out of memory."""
    model = Limited(most)
    return helpers.study(model=model, components=coar.neurons(model, include="*hidden"))


@pytest.mark.parametrize("most", [3, 1])
def test_units_are_done_in_smaller_batches_where_memory_runs_out(tmp_path, caplog, most):
    study = limited(most=1000)
    run = helpers.collect(study, tmp_path / "r.zarr", masks=20, gradients=8)
    expected = {name: helpers.whole(run, name) for name in ("outputs", "base_output", *GRADIENTS)}
    study.model.most = most
    runner = unit_runner(study, run, study.model.eval(), BatchSettings(128, 128, tune=False, compiled=False))
    for unit in (*run.units(), *MaskGradients(run).units()):
        runner.do(unit)
    for name, values in expected.items():
        np.testing.assert_allclose(helpers.whole(run, name), values, rtol=1e-5, atol=1e-6)
    assert (runner.masks.batch_size, runner.gradients.batch_size) == ({3: 2, 1: 1}[most],) * 2
    assert "a batch of 8 rows is not used: cpu is out of memory" in caplog.text


def test_masks_that_share_a_pass_are_fewer_where_memory_runs_out():
    study = limited(most=12)
    here, masks = together(worker(study), 4), masks_of(study)
    used, found = within_memory(here, 6, lambda runner: runner.outputs(runner.load(study.examples, 0, 6), masks))
    assert used.batch_size == 12  # two masks for six examples, after four
    assert here.model.rows[-1] <= 12 < max(here.model.rows)
    here.model.most = 1000
    np.testing.assert_allclose(found, here.outputs(here.load(study.examples, 0, 6), masks), atol=1e-6)


def test_one_example_that_does_not_fit_is_an_error():
    study = limited(most=1000)
    here = worker(study)
    here.model.most = 0
    with pytest.raises(SettingsError, match="one example does not fit into the memory of cpu: 1 rows; use smaller"):
        within_memory(here, 6, lambda runner: runner.base_output(runner.load(study.examples, 0, 6)))


def test_sizes_are_read_as_they_are_written():
    assert [bytes_of(text) for text in (7, "7", "1kB", "2 KiB", "1.5MB", "4GiB")] == [
        7, 7, 1000, 2048, 1_500_000, 4 * 2**30,
    ]  # fmt: skip
    for wrong in (0, -1, "", "4 gibs", "many", "0GB", True, 1.5j, "nan"):
        with pytest.raises(SettingsError, match="give bytes above 0"):
            bytes_of(wrong)


def compiled_in_a_process(tmp_path, compiler):
    code = """
        import logging, sys, warnings
        import numpy as np
        from functools import partial
        from coar.collection import preparation
        from tests.faults import helpers
        logging.basicConfig(format="%(levelname)s %(message)s")
        here = sys.argv[1]
        plain = helpers.collect(helpers.study(), f"{here}/plain.zarr", masks=40, batch_size=128)
        kept, fastest = [], preparation.fastest_runner
        timer = lambda runner, *_: 0.5 if runner.plan.compiled else 1.0
        preparation.fastest_runner = lambda *args, **how: kept.append(fastest(*args, **how, timer=timer)) or kept[-1]
        run = helpers.collect(helpers.study(), f"{here}/c.zarr", masks=40, batch_size=128, compile=True)
        found, expected = (helpers.whole(each, "outputs") for each in (run, plain))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
        assert len(np.unique(expected, axis=0)) > 10
        print("compiled" if kept[-1].plan.compiled else "eager")
    """
    body = "\n".join(line[8:] for line in code.splitlines())
    settings = {
        "CXX": compiler,
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", body, str(tmp_path)],
        cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, check=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler, g++ or what CXX names")
def test_a_compiled_model_reads_every_mask(tmp_path):
    done = compiled_in_a_process(tmp_path, COMPILER)
    assert done.stdout == "compiled\n"
    assert "WARNING the compiled model" not in done.stderr


@pytest.mark.slow
def test_a_broken_compiler_costs_a_warning(tmp_path):
    done = compiled_in_a_process(tmp_path, "/bin/false")
    assert done.stdout == "eager\n"
    assert "WARNING the compiled model is not used: InductorError: InvalidCxxCompiler" in done.stderr


@pytest.mark.parametrize("fault", ["raises", "differs"])
def test_a_compiled_model_that_is_no_good_is_left_out(monkeypatch, caplog, fault):
    study = helpers.study()
    here, masks = worker(study), masks_of(study)
    block = here.load(study.examples, 0, 20)
    expected = here.outputs(block, masks)

    def other(model, **_):
        def run(x):
            if fault == "raises":
                raise RuntimeError("no such instruction\nand many lines more")
            return model(x) * 1.1

        return run

    monkeypatch.setattr(torch, "compile", other)
    found = fastest_runner(here, study.examples, masks, work=1, compiled=True)
    assert not found.plan.compiled
    said = {"raises": "RuntimeError: no such instruction", "differs": "AblationError: outputs differ"}[fault]
    assert f"the compiled model is not used: {said}" in caplog.text
    assert "many lines more" not in caplog.text
    np.testing.assert_array_equal(found.outputs(block, masks), expected)


def test_a_plan_is_frozen_and_another_one_makes_another_runner():
    study = helpers.study()
    here = worker(study)
    with pytest.raises(FrozenInstanceError):
        here.plan.masks_per_forward = 2
    other = here.with_plan(ExecutionPlan(batch_size=7, masks_per_forward=2))
    assert (here.plan, here.batch_size) == (ExecutionPlan(batch_size=128), 128)
    assert (other.plan.masks_per_forward, other.batch_size) == (2, 7)
    with pytest.raises(SettingsError, match="holds weights in another precision; make another runner"):
        here.with_plan(ExecutionPlan(precision="bf16"))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"batch_size": 0}, "batch size 0 is below 1"),
        ({"masks_per_forward": 0}, "masks per forward pass 0 is below 1"),
        ({"precision": "auto"}, "precision 'auto' cannot be run; use float32 or bf16"),
        ({"compiled": True, "masks_per_forward": 2}, "a compiled model reads one mask"),
    ],
)
def test_plans_that_cannot_be_run_are_errors(wrong, said):
    with pytest.raises(SettingsError, match=said):
        ExecutionPlan(**wrong)
