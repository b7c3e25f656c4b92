"""The contract that every ablation is held to, and the net it is tried on."""

import functools

import numpy as np
import pytest
import torch
from torch import nn

import coar
from coar.components.table import Components
from coar.forward.execution_plan import ExecutionPlan
from coar.forward.runner import FastRunner
from coar.gates.folding import fold
from coar.gates.gates import Gates
from tests import oracles

CLASSES, EXAMPLES = 4, 10


class Net(nn.Module):
    """A convolution with a bias called twice and one without, before in-place layers, a batch norm and neurons."""

    def __init__(self):
        super().__init__()
        self.twice = nn.Conv2d(3, 3, 3, padding=1)
        self.bare = nn.Conv2d(3, 5, 3, bias=False)
        self.norm = nn.BatchNorm2d(5)
        self.hidden = nn.Linear(5, 6)
        self.last = nn.Linear(6, CLASSES)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.relu(self.twice(x).add_(0.3))
        x = self.relu(self.twice(x) + 0.2)
        x = self.relu(self.norm(self.bare(x)))
        return self.last(self.relu(self.hidden(x.mean((2, 3))))) * 3


def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = oracles.rough(Net())
    with torch.no_grad():
        for layer in (model.twice, model.bare, model.hidden, model.last):
            layer.weight.mul_(1.7)
    return model


def pictures(count, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 7, 7, generator=generator)
    return coar.Examples(inputs=x, targets=torch.arange(count) % CLASSES)


def parts(model):
    """Filters, neurons, and what the last layer reads, three features at a time."""
    features = coar.input_features(model, include="last")
    wide = [features[i]._replace(name=f"last.input[{i}:{i + 3}]", size=3) for i in range(0, len(features), 3)]
    return coar.conv_filters(model) + coar.neurons(model, include="hidden") + Components(wide)


class Contract:
    """What every ablation owes; a subclass names one, and says what it must put in a component's place."""

    net, examples, parts = staticmethod(net), staticmethod(pictures), staticmethod(parts)

    def ablation(self, calibration=None):
        return coar.choose_ablation(self.label, calibration=calibration or self.examples(16, 7))

    def constant(self, model, row):
        """The numbers that must replace a component's channels, by means of the oracle."""
        raise NotImplementedError

    @functools.cache  # noqa: B019
    def truth(self, model, components):
        return {row: self.constant(model, row) for row in components}

    def patches(self, model, study, mask, n):
        """What an oracle overwrites for example n under a mask."""
        truth = self.truth(model, study.components)
        return [
            (row.site, row.side, row.axis, row.position, row.position + row.size, torch.tensor(truth[row]))
            for row, kept in zip(study.components, mask, strict=True)
            if not kept
        ]

    @pytest.fixture
    def study(self):
        model = self.net()
        return coar.Study(
            model=model,
            examples=self.examples(EXAMPLES, 1),
            components=self.parts(model),
            ablation=self.ablation(),
            sampler=coar.BernoulliSampler(ablated_fraction=0.3, seed=2),
        )

    def collect(self, study, path, masks=6, gradients=0, **settings):
        execution = coar.Execution(**{"mask_block": 4, "example_block": 6, "batch_size": 4, **settings})
        sizes = {"masks": masks, "gradients": gradients}
        return coar.collect(study, path, **sizes, device="cpu", progress=False, execution=execution)

    def outputs(self, run):
        return run.array("outputs")[:]

    def expected(self, study, masks):
        x, y = study.examples.block(0, EXAMPLES)
        rows = [
            [
                oracles.patched(study.model, x[n : n + 1], self.patches(study.model, study, mask, n))[0]
                for n in range(EXAMPLES)
            ]
            for mask in masks
        ]
        return np.stack([oracles.read_outputs(torch.stack(row), y, "logsumexp") for row in rows])

    def test_outputs_of_a_run_are_those_of_the_oracle(self, study, tmp_path):
        run = self.collect(study, tmp_path / "r.zarr")
        masks = run.plan.masks(run.sampler, run.n_components, 0, 6)
        expected = self.expected(study, masks)
        np.testing.assert_allclose(self.outputs(run), expected, atol=1e-4)
        base = oracles.read_outputs(
            oracles.forward(study.model, study.examples.inputs), study.examples.targets, "logsumexp"
        )
        assert np.abs(expected - base).mean() > 0.05
        assert run.fingerprint["ablation"] == study.ablation.settings()

    def test_a_run_depends_neither_on_batches_nor_on_stops(self, study, tmp_path):
        whole = self.collect(study, tmp_path / "whole.zarr")
        self.collect(study, tmp_path / "cut.zarr", masks=3)
        cut = self.collect(study, tmp_path / "cut.zarr", masks=6)
        np.testing.assert_array_equal(self.outputs(cut), self.outputs(whole))
        other = self.collect(study, tmp_path / "other.zarr", example_block=4, batch_size=3)
        np.testing.assert_allclose(self.outputs(other), self.outputs(whole), atol=1e-5)

    def worker(self, study, constants=None):
        model = study.model.requires_grad_(False)
        if constants is None:
            constants = study.ablation.replacements(model, study.components, batch_size=5)
        plan = ExecutionPlan(batch_size=4)
        return FastRunner(model, study.components, constants, study.output, plan, sources=study.ablation.sources)

    def test_keeping_everything_is_the_plain_model(self, study):
        worker = self.worker(study)
        block = worker.load(study.examples, 0, EXAMPLES)
        everything = np.ones((2, len(study.components)), dtype=bool)
        np.testing.assert_array_equal(worker.outputs(block, everything)[1], worker.base_output(block))

    def test_several_masks_share_a_forward_pass(self, study):
        worker = self.worker(study)
        masks = study.sampler.masks("train", range(5), len(study.components))
        alone = worker.outputs(worker.load(study.examples, 0, EXAMPLES), masks)
        grouped = worker.with_plan(ExecutionPlan(batch_size=3 * EXAMPLES, masks_per_forward=3))
        together = grouped.outputs(grouped.load(study.examples, 0, EXAMPLES), masks)
        np.testing.assert_allclose(together, alone, atol=1e-5)

    def test_nothing_is_left_behind_also_after_an_exception(self, study):
        before = oracles.snapshot(study.model)
        worker = self.worker(study)
        block = worker.load(study.examples, 0, EXAMPLES)
        masks = study.sampler.masks("train", range(2), len(study.components))
        worker.outputs(block, masks)
        handle = study.model.last.register_forward_hook(lambda _module, _args, _y: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            worker.outputs(block, masks)
        handle.remove()
        oracles.assert_same(before, oracles.snapshot(study.model))

    def test_gradients_by_gates_are_finite_differences(self, study):
        """Each example under a mask of its own; outputs of the oracle, in float64, on both sides of a soft gate."""
        worker, d = self.worker(study), len(study.components)
        masks = study.sampler.masks("gradient", range(EXAMPLES), d)[None]
        kept, ablated, outputs = worker.mask_gradients(
            worker.load(study.examples, 0, EXAMPLES), masks, np.arange(EXAMPLES)
        )
        plain = self.expected(study, masks[0]).diagonal()
        np.testing.assert_allclose(outputs[0], plain, atol=1e-4)
        gradient = np.where(masks[0], kept, ablated)
        double = study.model.double()
        x = study.examples.inputs.double()
        sources = study.ablation.sources(study.examples)
        constants = study.ablation.replacements(self.net(), study.components, batch_size=5).double()
        gates = Gates(double, study.components, constants, use_hooks=True, resample=sources is not None)
        with gates, torch.no_grad():
            if sources is not None:
                gates.record(lambda: double(x[sources]))
            for column in range(0, d, 4):
                ends = []
                for step in (1e-5, -1e-5):
                    soft = torch.from_numpy(masks[0]).double()
                    soft[:, column] += step
                    gates.set(soft)
                    ends.append(study.output(double(x).double(), study.examples.targets).double())
                slopes = (ends[0] - ends[1]).numpy() / 2e-5
                close = np.isclose(gradient[:, column], slopes, rtol=2e-2, atol=2e-2)  # outputs are read in float32
                assert close.mean() > 0.7, column  # not all, since a ReLU may be at its kink
        assert np.abs(gradient).max() > 0.3

    def test_the_fingerprint_changes_with_what_numbers_depend_on(self):
        same, other = self.ablation(self.examples(16, 7)), self.other()
        assert same.settings() == self.ablation().settings()
        assert same.settings() != other.settings()

    def other(self):
        return self.ablation(self.examples(16, 8))

    def test_a_permanent_edit_gives_what_gates_give(self, study, tmp_path):
        run = self.collect(study, tmp_path / "r.zarr")
        rows = [0, 4, 7, 9, 15]
        constants = [tuple(run.replacements[study.components.channels_of([i])].tolist()) for i in rows]
        norms = run.facts.batch_norms
        edited = self.net()
        fold(edited, [study.components[i] for i in rows], constants, batch_norms=norms)
        mask = np.ones((1, len(study.components)), dtype=bool)
        mask[0, rows] = False
        x, y = study.examples.block(0, EXAMPLES)
        found = oracles.read_outputs(oracles.forward(edited, x), y, "logsumexp")
        np.testing.assert_allclose(found, self.expected(study, mask)[0], atol=1e-4)
