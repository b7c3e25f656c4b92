"""What every ablation owes: one contract, held to by each, against plain copies and hooks written by hand."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import coar
from coar.ablation.registry import ABLATIONS
from coar.errors import AblationError, EditError, ExamplesError, SettingsError
from coar.gates.gates import Gates
from tests import oracles, test_optimal, test_position_means
from tests.contract import EXAMPLES, Contract, net, parts, pictures


class TestZeroWeight(Contract):
    """Weights are zero, biases stay."""

    label = "zero"

    def constant(self, model, row):
        bias = model.get_submodule(row.site).bias if row.side == "output" else None
        return [0.0] * row.size if bias is None else [float(bias.detach()[row.position])]

    def other(self):
        return coar.ZeroActivation()


class TestZeroActivation(Contract):
    """Zeros, biases included."""

    label = "zero_activation"

    def constant(self, model, row):
        return [0.0] * row.size

    def other(self):
        return coar.ZeroWeight()


class TestMean(Contract):
    """Means over examples and positions."""

    label = "mean"

    def values(self, model, row):
        """What passes each channel of a component, position by position."""
        passed = oracles.held(model, pictures(16, 7).inputs, [(row.site, row.side)])[row.site, row.side]
        return [
            [v for t in passed for v in t.double().movedim(row.axis, 0)[n].flatten().tolist()]
            for n in range(row.position, row.position + row.size)
        ]

    def constant(self, model, row):
        return [sum(values) / len(values) for values in self.values(model, row)]


class TestPeak(TestMean):
    """Where the histogram of activations is highest."""

    label = "peak"

    def constant(self, model, row):
        return [oracles.peak(values, bins=128) for values in self.values(model, row)]

    def test_the_resolution_is_a_setting(self, study):
        fine = coar.Peak(calibration=pictures(16, 7), bins=8)
        found = fine.replacements(study.model, study.components, batch_size=3)
        expected = [oracles.peak(v, bins=8) for row in study.components for v in self.values(study.model, row)]
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
        source = int(study.ablation.sources(study.examples)[n])
        places = {(row.site, row.side) for row in study.components}
        passed = oracles.held(model, study.examples.inputs[source : source + 1], places)
        return [
            (row.site, row.side, row.axis, row.position, row.position + row.size, passed[row.site, row.side])
            for row, kept in zip(study.components, mask, strict=True)
            if not kept
        ]

    def other(self):
        return coar.Resample(seed=1)

    def test_sources_are_others_and_depend_on_seed_and_position_alone(self):
        many = coar.Examples(inputs=torch.zeros(1000), targets=torch.zeros(1000))
        sources = coar.Resample(seed=5).sources(many)
        assert (sources != np.arange(1000)).all()
        assert len(np.unique(sources)) > 550  # about 1 - 1/e of all
        counts = np.bincount((sources - np.arange(1000)) % 1000 // 100, minlength=10)
        assert counts.min() > 60  # shifts of all sizes
        np.testing.assert_array_equal(coar.Resample(seed=5).sources(many), sources)
        assert (coar.Resample(seed=6).sources(many) != sources).mean() > 0.9
        np.testing.assert_array_equal(coar.Resample().sources(many.subset([0, 1])), [1, 0])
        with pytest.raises(ExamplesError, match="one example"):
            coar.Resample().sources(many.subset([0]))

    def test_a_permanent_edit_gives_what_gates_give(self, study, tmp_path):
        run = self.collect(study, tmp_path / "r.zarr")
        assert np.isnan(run.replacements).all()
        goal = coar.EditGoal(targets="label == 1", references="label != 1", direction="decrease")
        with pytest.raises(EditError, match=r"'.*' is replaced by another example's activations"):
            coar.edit(coar.fit(run, progress=False), goal, budget=2)
        with pytest.raises(AblationError, match=r"have no single constant.*resample=True"):
            Gates(study.model, study.components, torch.from_numpy(run.replacements))
        with pytest.raises(AblationError, match=r"for edits collect with an ablation by constants, such as Mean"):
            coar.select(coar.fit(run, progress=False), study.model, study.examples, goal, device="cpu", progress=False)

    def test_slices_of_parameters_have_nothing_to_resample(self, study):
        slices = coar.parameter_slices(study.model, "bare.weight")
        with pytest.raises(AblationError, match=r"'bare.weight\[0\]' is a slice"):
            coar.Resample().replacements(study.model, slices, batch_size=4)
        with pytest.raises(AblationError, match="to resample"):
            Gates(study.model, slices, torch.zeros(len(slices)), resample=True)

    def test_a_pass_without_sources_or_with_others_of_another_shape_is_an_error(self, study):
        model, x, d = study.model, study.examples.inputs, len(study.components)
        with (
            Gates(model, study.components, torch.zeros(study.components.width), resample=True) as gates,
            torch.no_grad(),
        ):
            gates.set(torch.ones(d))
            with pytest.raises(AblationError, match="no resample sources were recorded"):
                model(x)
            gates.record(lambda: model(x[:3, :, :6]))
            gates.set(torch.ones(d))
            with pytest.raises(AblationError, match=r"\(10, 3, 7, 7\) for the examples and \(3, 3, 6, 7\)"):
                model(x)

    def test_mask_gradients_and_baselines_take_sources_too(self, study, tmp_path):
        run = self.collect(study, tmp_path / "r.zarr", gradients=8)
        found = coar.leave_one_out(study, run, device="cpu", batch_size=3, progress=False).weights()
        d = len(study.components)
        ones = ~np.eye(d, dtype=bool)
        expected = self.expected(study, np.ones((1, d), dtype=bool)) - self.expected(study, ones)
        np.testing.assert_allclose(found, expected.T, atol=1e-4)


def paired(count, seed):
    """Pictures of which n and n + count / 2 are a pair, so that pairs are in different blocks."""
    plain = pictures(count, seed)
    return coar.Examples(inputs=plain.inputs, targets=plain.targets, metadata={"pair": np.arange(count) % (count // 2)})


class TestCounterfactual(TestResample):
    """What the example's partner has there."""

    label, examples = "counterfactual", staticmethod(paired)

    def other(self):
        return coar.Counterfactual(pairs="twin")

    def test_sources_are_others_and_depend_on_seed_and_position_alone(self):
        examples = paired(6, 0).subset([4, 0, 1, 3])  # pairs 1, 0, 1, 0
        np.testing.assert_array_equal(coar.Counterfactual().sources(examples), [2, 3, 0, 1])
        with pytest.raises(ExamplesError, match=r"no metadata column 'twin'.*there are pair, id, label"):
            coar.Counterfactual(pairs="twin").sources(examples)
        with pytest.raises(ExamplesError, match=r"pair == .*1.* is the pair of 1 examples"):
            coar.Counterfactual().sources(examples.subset([0, 1, 3]))


def test_labels_are_those_of_the_contract():
    here = (TestZeroWeight, TestZeroActivation, TestMean, TestPeak, TestResample, TestCounterfactual)
    assert set(ABLATIONS) == {
        cls.label for cls in (*here, test_optimal.TestOptimal, test_position_means.TestPositionMean)
    }
    with pytest.raises(SettingsError, match="'median'; choose one of zero, zero_activation, mean, position_mean, peak"):
        coar.choose_ablation("median", calibration=pictures(4, 0))


@pytest.mark.parametrize("label", ["mean", "peak", "optimal"])
def test_constants_of_slices_unknown_features_and_modules_never_called_are_errors(label):
    model = net()
    ablation = coar.choose_ablation(label, calibration=pictures(8, 0))
    with pytest.raises(AblationError, match=r"'bare.weight\[0\]' is a slice"):
        ablation.replacements(model, coar.parameter_slices(model, "bare.weight"), batch_size=4)
    with pytest.raises(AblationError, match=r"'relu' is a whole module, and the axis of its features is unknown"):
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
