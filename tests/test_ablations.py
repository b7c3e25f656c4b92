"""What every ablation owes: one contract, held to by each, against plain copies and hooks written by hand."""

import functools
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import coar
from coar.ablation import ABLATIONS, Gates, fold
from coar.errors import AblationError, EditError, ExamplesError, SettingsError
from coar.outputs import Output
from coar.worker import Worker
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
    return coar.conv_filters(model) + coar.neurons(model, include="hidden") + coar.input_features(model, include="last")


class Contract:
    """What every ablation owes; a subclass names one, and says what it must put in a component's place."""

    def ablation(self, calibration=None):
        return coar.choose_ablation(self.label, calibration=calibration or pictures(16, 7))

    def constant(self, model, row):
        """The number that must replace a component, by means of the oracle."""
        raise NotImplementedError

    @functools.cache  # noqa: B019
    def truth(self, model, components):
        return {row: self.constant(model, row) for row in components}

    def patches(self, model, study, mask, n):
        """What an oracle overwrites for example n under a mask."""
        truth = self.truth(model, study.components)
        return [
            (row.site, row.side, row.axis, row.position, row.position + 1, truth[row])
            for row, kept in zip(study.components, mask, strict=True)
            if not kept
        ]

    @pytest.fixture
    def study(self):
        model = net()
        return coar.Study(
            model=model,
            examples=pictures(EXAMPLES, 1),
            components=parts(model),
            ablation=self.ablation(),
            sampler=coar.BernoulliSampler(ablated_fraction=0.3, seed=2),
        )

    def collect(self, study, path, masks=6, **settings):
        blocks = {"mask_block": 4, "example_block": 6, "batch_size": 4, **settings}
        return coar.collect(study, path, masks=masks, device="cpu", progress=False, **blocks)

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
        return Worker(model, study.components, constants, study.output, donors=study.ablation.donors, batch_size=4)

    def test_keeping_everything_is_the_plain_model(self, study):
        worker = self.worker(study)
        block = worker.load(study.examples, 0, EXAMPLES)
        everything = np.ones((2, len(study.components)), dtype=bool)
        np.testing.assert_array_equal(worker.outputs(block, everything)[1], worker.base_output(block))

    def test_several_masks_share_a_forward_pass(self, study):
        worker = self.worker(study)
        masks = study.sampler.masks("train", range(5), len(study.components))
        alone = worker.outputs(worker.load(study.examples, 0, EXAMPLES), masks)
        worker.batch_size, worker.masks_per_forward = 3 * EXAMPLES, 3
        together = worker.outputs(worker.load(study.examples, 0, EXAMPLES), masks)
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
        masks = study.sampler.masks("probe", range(EXAMPLES), d)[None]
        kept, ablated, outputs = worker.probe(worker.load(study.examples, 0, EXAMPLES), masks, np.arange(EXAMPLES))
        plain = self.expected(study, masks[0]).diagonal()
        np.testing.assert_allclose(outputs[0], plain, atol=1e-4)
        gradient = np.where(masks[0], kept, ablated)
        double = study.model.double()
        x = study.examples.inputs.double()
        donors = study.ablation.donors(EXAMPLES)
        constants = study.ablation.replacements(net(), study.components, batch_size=5).double()
        gates = Gates(double, study.components, constants, through_outputs=True, donors=donors is not None)
        with gates, torch.no_grad():
            if donors is not None:
                gates.record(lambda: double(x[donors]))
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
        same, other = self.ablation(pictures(16, 7)), self.other()
        assert same.settings() == self.ablation().settings()
        assert same.settings() != other.settings()

    def other(self):
        return self.ablation(pictures(16, 8))

    def test_a_permanent_edit_gives_what_gates_give(self, study, tmp_path):
        run = self.collect(study, tmp_path / "r.zarr")
        rows = [0, 4, 7, 9, 15]
        constants, norms = run.replacements[rows].tolist(), run.facts["batch_norms"]
        edited = net()
        fold(edited, [study.components[i] for i in rows], constants, batch_norms=norms)
        mask = np.ones((1, len(study.components)), dtype=bool)
        mask[0, rows] = False
        x, y = study.examples.block(0, EXAMPLES)
        found = oracles.read_outputs(oracles.forward(edited, x), y, "logsumexp")
        np.testing.assert_allclose(found, self.expected(study, mask)[0], atol=1e-4)


class TestZeroWeight(Contract):
    """Weights are zero, biases stay."""

    label = "zero"

    def constant(self, model, row):
        bias = model.get_submodule(row.site).bias if row.side == "output" else None
        return 0.0 if bias is None else float(bias.detach()[row.position])

    def other(self):
        return coar.ZeroActivation()


class TestZeroActivation(Contract):
    """Zeros, biases included."""

    label = "zero_activation"

    def constant(self, model, row):
        return 0.0

    def other(self):
        return coar.ZeroWeight()


class TestMean(Contract):
    """Means over examples and positions."""

    label = "mean"

    def values(self, model, row):
        passed = oracles.held(model, pictures(16, 7).inputs, [(row.site, row.side)])[row.site, row.side]
        return [v for t in passed for v in t.double().movedim(row.axis, 0)[row.position].flatten().tolist()]

    def constant(self, model, row):
        values = self.values(model, row)
        return sum(values) / len(values)


class TestPeak(TestMean):
    """Where the histogram of activations is highest."""

    label = "peak"

    def constant(self, model, row):
        return oracles.peak(self.values(model, row), bins=128)

    def test_the_resolution_is_a_setting(self, study):
        fine = coar.Peak(calibration=pictures(16, 7), bins=8)
        found = fine.replacements(study.model, study.components, batch_size=3)
        expected = [oracles.peak(self.values(study.model, row), bins=8) for row in study.components]
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert fine.settings() != self.ablation().settings()
        with pytest.raises(SettingsError, match="bins"):
            coar.Peak(calibration=pictures(16, 7), bins=1)

    def test_a_component_that_never_changes_has_its_one_value(self):
        model = nn.Sequential(nn.Linear(2, 2))
        nn.init.zeros_(model[0].weight)
        examples = coar.Examples(inputs=torch.randn(5, 2), targets=torch.zeros(5))
        found = coar.Peak(calibration=examples).replacements(model, coar.neurons(model), batch_size=2)
        torch.testing.assert_close(found, model[0].bias.detach())


class TestResample(Contract):
    """What another example has there."""

    label = "resample"

    def patches(self, model, study, mask, n):
        donor = int(study.ablation.donors(EXAMPLES)[n])
        places = {(row.site, row.side) for row in study.components}
        passed = oracles.held(model, study.examples.inputs[donor : donor + 1], places)
        return [
            (row.site, row.side, row.axis, row.position, row.position + 1, passed[row.site, row.side])
            for row, kept in zip(study.components, mask, strict=True)
            if not kept
        ]

    def other(self):
        return coar.Resample(seed=1)

    def test_donors_are_others_and_depend_on_seed_and_position_alone(self):
        donors = coar.Resample(seed=5).donors(1000)
        assert (donors != np.arange(1000)).all()
        assert len(np.unique(donors)) > 550  # about 1 - 1/e of all
        counts = np.bincount((donors - np.arange(1000)) % 1000 // 100, minlength=10)
        assert counts.min() > 60  # shifts of all sizes
        np.testing.assert_array_equal(coar.Resample(seed=5).donors(1000), donors)
        assert (coar.Resample(seed=6).donors(1000) != donors).mean() > 0.9
        np.testing.assert_array_equal(coar.Resample().donors(2), [1, 0])
        with pytest.raises(ExamplesError, match="one example"):
            coar.Resample().donors(1)

    def test_a_permanent_edit_gives_what_gates_give(self, study, tmp_path):
        run = self.collect(study, tmp_path / "r.zarr")
        assert np.isnan(run.replacements).all()
        goal = coar.EditGoal(targets="label == 1", references="label != 1", direction="decrease")
        with pytest.raises(EditError, match=r"'.*' is replaced by what another example has"):
            coar.edit(coar.fit(run, progress=False), goal, budget=2).apply(study.model)
        with pytest.raises(AblationError, match="components without a constant"):
            Gates(study.model, study.components, torch.from_numpy(run.replacements))

    def test_slices_of_parameters_have_nothing_to_resample(self, study):
        slices = coar.parameter_slices(study.model, "bare.weight")
        with pytest.raises(AblationError, match=r"'bare.weight\[0\]' is a slice"):
            coar.Resample().replacements(study.model, slices, batch_size=4)
        with pytest.raises(AblationError, match="to resample"):
            Gates(study.model, slices, torch.zeros(len(slices)), donors=True)

    def test_a_pass_without_donors_or_with_others_of_another_shape_is_an_error(self, study):
        model, x, d = study.model, study.examples.inputs, len(study.components)
        with Gates(model, study.components, torch.zeros(d), donors=True) as gates, torch.no_grad():
            gates.set(torch.ones(d))
            with pytest.raises(AblationError, match="no donors were recorded"):
                model(x)
            gates.record(lambda: model(x[:3, :, :6]))
            gates.set(torch.ones(d))
            with pytest.raises(AblationError, match=r"\(10, 3, 7, 7\) for the examples and \(3, 3, 6, 7\)"):
                model(x)

    def test_probes_and_baselines_take_donors_too(self, study, tmp_path):
        run = self.collect(study, tmp_path / "r.zarr", probes=8)
        found = coar.leave_one_out(study, run, device="cpu", batch_size=3, progress=False).weights()
        d = len(study.components)
        ones = ~np.eye(d, dtype=bool)
        expected = self.expected(study, np.ones((1, d), dtype=bool)) - self.expected(study, ones)
        np.testing.assert_allclose(found, expected.T, atol=1e-4)


class TestOptimal(Contract):
    """Constants that are trained, and held to their promise."""

    label = "optimal"

    def ablation(self, calibration=None):
        return coar.Optimal(calibration=calibration or pictures(16, 7), steps=10, ablated_fraction=0.3)

    def constant(self, model, row):
        if not hasattr(self, "trained"):
            names = parts(model).names
            self.trained = dict(
                zip(names, self.ablation().replacements(model, parts(model), batch_size=5), strict=True)
            )
        return float(self.trained[row.name])

    def test_one_constant_is_the_best_there_is(self):
        """Where one neuron is all there is, squared loss is least at the mean of what the targets ask of it."""

        class Squared(Output):
            def __call__(self, result, targets):
                return (result[:, 0] - targets) ** 2

        model = nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 1))
        x, t = torch.randn(400, 3), torch.randn(400) * 0.1 + 2
        component = coar.neurons(model, include="0")
        ablation = coar.Optimal(
            calibration=coar.Examples(inputs=x, targets=t),
            loss=Squared(),
            ablated_fraction=0.5,
            steps=300,
            learning_rate=0.3,
            patience=100,
        )
        found = ablation.replacements(model.requires_grad_(False), component, batch_size=64)
        best = (2 - float(model[1].bias)) / float(model[1].weight)
        mean = float(model[0](x).mean())
        assert abs(float(found[0]) - best) < 0.05 * abs(mean - best)

    def test_it_is_no_worse_than_means_zeros_and_biases_on_what_is_held_out(self, digits):
        study = digits.study()
        calibration = digits.split()["train"].subset(range(200))
        losses = {}
        ablation = coar.Optimal(calibration=calibration, steps=40)
        copy = study.model.requires_grad_(False)
        found = ablation.replacements(copy, study.components, batch_size=64)
        order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
        held_out = calibration.subset(order[:50].numpy())
        others = {"optimal": found}
        others |= {
            kind: coar.choose_ablation(kind, calibration=calibration).replacements(
                copy, study.components, batch_size=64
            )
            for kind in ("mean", "zero", "zero_activation")
        }
        for kind, constants in others.items():
            worker = Worker(copy, study.components, constants, coar.CrossEntropy())
            block = worker.load(held_out, 0, 50)
            losses[kind] = worker.outputs(block, study.sampler.masks("test", range(40), len(study.components))).mean()
        assert losses["optimal"] < losses["mean"] < losses["zero"]
        assert losses["optimal"] < losses["zero_activation"]

    def test_same_settings_give_the_same_constants_and_others_differ(self, study):
        def constants(**changes):
            settings = {"calibration": pictures(16, 7), "steps": 20, **changes}
            return coar.Optimal(**settings).replacements(study.model, study.components, batch_size=16)

        torch.testing.assert_close(constants(), constants(), rtol=0, atol=0)
        assert not torch.equal(constants(), constants(seed=1))

    def test_a_loss_without_gradient_and_too_few_examples_are_errors(self, study):
        class Right(Output):
            def __call__(self, result, targets):
                return (result.argmax(1) != targets).float()

        ablation = coar.Optimal(calibration=pictures(16, 7), loss=Right())
        with pytest.raises(AblationError, match=r"no gradient .* give Optimal\(loss=...\)"):
            ablation.replacements(study.model, study.components, batch_size=4)
        with pytest.raises(ExamplesError, match="1 calibration examples cannot be cut into 0 held out"):
            coar.Optimal(calibration=pictures(1, 0)).replacements(study.model, study.components, batch_size=4)
        with pytest.raises(SettingsError, match="held_out"):
            coar.Optimal(calibration=pictures(16, 0), held_out=1.0)


def test_labels_are_those_of_the_contract():
    tested = {cls.label for cls in (TestZeroWeight, TestZeroActivation, TestMean, TestPeak, TestResample, TestOptimal)}
    assert set(ABLATIONS) == tested
    with pytest.raises(SettingsError, match="'median'; choose one of zero, zero_activation, mean, peak, optimal"):
        coar.choose_ablation("median", calibration=pictures(4, 0))


@pytest.mark.parametrize("label", ["mean", "peak", "optimal"])
def test_constants_of_slices_unknown_features_and_modules_never_called_are_errors(label):
    model = net()
    ablation = coar.choose_ablation(label, calibration=pictures(8, 0))
    with pytest.raises(AblationError, match=r"'bare.weight\[0\]' is a slice"):
        ablation.replacements(model, coar.parameter_slices(model, "bare.weight"), batch_size=4)
    with pytest.raises(AblationError, match=r"'relu' is a whole module, and nothing is known of where its features"):
        ablation.replacements(model, coar.modules(model, "relu"), batch_size=4)
    with pytest.raises(AblationError, match=r"'twice' returned .* \(\d, 3, 7, 7\), where 3 features .* on axis 2"):
        ablation.replacements(model, coar.modules(model, "twice", axis=2), batch_size=4)
    model.spare = nn.Linear(2, 2)
    with pytest.raises(AblationError, match="'spare' was never called"):
        ablation.replacements(model, coar.neurons(model, include="spare"), batch_size=4)


def test_studied_examples_among_the_calibration_examples_are_warned_of(tmp_path, caplog):
    model, examples = net(), pictures(EXAMPLES, 1)
    whole = coar.Study(
        model=model, examples=examples, components=parts(model), ablation=coar.Mean(calibration=examples)
    )
    apart = replace(whole, ablation=coar.Mean(calibration=pictures(EXAMPLES, 2)))
    some = replace(whole, ablation=coar.Mean(calibration=examples.subset([4, 2, 7])))
    for name, study, said in (("whole", whole, "10 of 10"), ("apart", apart, None), ("some", some, "3 of 10")):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="coar"):
            coar.collect(study, tmp_path / f"{name}.zarr", masks=2, device="cpu", progress=False)
        assert [said in record.getMessage() for record in caplog.records] == ([True] if said else [])
