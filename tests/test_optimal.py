"""Constants that are trained, held to what every ablation owes, and to their promise."""

import itertools

import numpy as np
import pytest
import scipy
import torch
from torch import nn

import coar
from coar.errors import AblationError, ExamplesError, OutputError, SettingsError
from coar.forward.runner import FastRunner
from coar.outputs.base import Output
from tests.contract import Contract, parts, pictures


def expected_loss(model, x, labels, fraction):
    """The expected cross entropy, over all masks, as a function of the constants of the hidden features, in NumPy."""
    first, last = ((layer.weight.double().numpy(), layer.bias.double().numpy()) for layer in (model[0], model[2]))
    hidden = np.tanh(x.double().numpy() @ first[0].T + first[1])
    keeps = np.array(list(itertools.product([False, True], repeat=hidden.shape[1])))
    chances = np.where(keeps, 1 - fraction, fraction).prod(1)

    def loss(constants):
        logits = np.where(keeps[:, None], hidden, constants) @ last[0].T + last[1]  # (masks, examples, classes)
        correct = logits[:, np.arange(len(labels)), labels.numpy()]
        return chances @ (scipy.special.logsumexp(logits, axis=2) - correct).mean(1)

    return loss, hidden.mean(0)


class TestOptimal(Contract):
    """Constants that are trained, and held to their promise."""

    label = "optimal"

    def ablation(self, calibration=None):
        return coar.Optimal(calibration=calibration or pictures(16, 7), steps=10, ablated_fraction=0.3)

    def constant(self, model, row):
        if not hasattr(self, "trained"):
            self.trained = self.ablation().replacements(model, parts(model), batch_size=5)
        return self.trained[parts(model).channels_of([parts(model).index(row.name)])].tolist()

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

    def test_constants_are_those_of_an_independent_optimiser(self):
        """BFGS on the exact expected loss of a small model, which is convex in these constants."""
        torch.manual_seed(4)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).requires_grad_(False)
        model[0].bias += 0.5
        model[2].weight *= 3
        x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
        labels = torch.multinomial(model(x).softmax(1), 1, generator=torch.Generator().manual_seed(1))[:, 0]
        loss, mean = expected_loss(model, x, labels, 0.4)
        best = scipy.optimize.minimize(loss, mean, method="BFGS")
        assert np.abs(best.jac).max() < 1e-4
        ablation = coar.Optimal(
            calibration=coar.Examples(inputs=x.repeat(16, 1), targets=labels.repeat(16)),
            ablated_fraction=0.4,
            examples_per_step=128,
            patience=200,
        )
        found = ablation.replacements(model, coar.input_features(model, include="2"), batch_size=64).double().numpy()
        assert loss(found) - best.fun < 0.03 * (loss(mean) - best.fun)
        assert np.abs(found - best.x).max() < 0.3 * np.abs(mean - best.x).max()

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
            worker = FastRunner(copy, study.components, constants, coar.CrossEntropy())
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
            truth: bool

            def __call__(self, result, targets):
                wrong = result.argmax(1) != targets
                return wrong if self.truth else wrong.float()

        class Whole(Output):
            def __call__(self, result, targets):
                return result.mean()

        class Infinite(Output):
            def __call__(self, result, targets):
                return result.mean(1) / 0

        with pytest.raises(AblationError, match=r"held-out loss is not finite .* use Mean"):
            coar.Optimal(calibration=pictures(16, 7), loss=Infinite()).replacements(
                study.model, study.components, batch_size=4
            )
        for truth in (False, True):
            ablation = coar.Optimal(calibration=pictures(16, 7), loss=Right(truth=truth))
            with pytest.raises(AblationError, match=r"no gradient .* give Optimal\(loss=...\)"):
                ablation.replacements(study.model, study.components, batch_size=4)
        with pytest.raises(OutputError, match=r"Whole returned a tensor of shape \(\) for \d+ examples"):
            coar.Optimal(calibration=pictures(16, 7), loss=Whole()).replacements(
                study.model, study.components, batch_size=4
            )
        with pytest.raises(ExamplesError, match="1 calibration examples cannot be cut into 0 held out"):
            coar.Optimal(calibration=pictures(1, 0)).replacements(study.model, study.components, batch_size=4)
        with pytest.raises(SettingsError, match="held_out"):
            coar.Optimal(calibration=pictures(16, 0), held_out=1.0)
