"""Models whose Python code does something unusual in a pass are right, against formulas, or refused in words."""

import logging
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import vmap
from torch.utils.checkpoint import checkpoint

import coar
from coar.description import describe
from coar.errors import AblationError, ExamplesError, WeightsError
from tests.test_everyday import (
    CLASSES,
    EXAMPLES,
    FEATURES,
    HIDDEN,
    TARGETS,
    Flattened,
    Net,
    Noisy,
    Step,
    collect,
    expected,
    formula,
    inputs,
    study,
    texts,
)


class Passing(Net):
    """A net whose pass is a function of the net and the inputs."""

    def __init__(self, forward):
        super().__init__()
        self.step = forward

    def forward(self, x):
        return self.step(self, x)


def in_checkpoints(net, x):
    return net.last(checkpoint(net.block, x, use_reentrant=False))


def over_vmap(net, x):
    return net.last(vmap(net.block)(x))


def written(net, x):
    return net.last(net.block(x.mul_(0.5)))


def compiled_part():
    net = Net()
    net.block = torch.compile(net.block, backend="eager")
    return net


def compiled_in_place():
    net = Net()
    net.compile(backend="eager")
    net.block[0].compile(backend="eager")
    return net


def closed_over_itself():
    net = Net()
    net.steps = [lambda x: net.block(x + 0.0), net.last]
    net.forward = lambda x: net.steps[1](net.steps[0](x))
    return net


UNUSUAL = {  # how the net is made, what scales its inputs, and whether mask gradients are possible
    "recomputed in checkpoints": (lambda: Passing(in_checkpoints), 1.0, True),
    "mapped over examples": (lambda: Passing(over_vmap), 1.0, False),
    "writes into its inputs": (lambda: Passing(written), 0.5, True),
    "a part is compiled": (compiled_part, 1.0, True),
    "compiled in place": (compiled_in_place, 1.0, True),
    "closures in a list": (closed_over_itself, 1.0, True),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_a_pass_may_do_unusual_things(kind, tmp_path):
    make, scale, differentiable = UNUSUAL[kind]
    model, x = make().eval(), inputs(EXAMPLES, FEATURES)
    before = x.clone()
    what = study(model, x)
    run = collect(what, tmp_path, masks=6, gradients=8 if differentiable else 0)
    assert torch.equal(x, before)
    plain, targets = formula(Net()), what.examples.targets
    wanted = expected(lambda keep: plain(before * scale, keep), run.masks(0, 6), targets)
    assert np.allclose(run.array("outputs")[:], wanted, atol=1e-4)
    if differentiable:
        everything = torch.ones(2 * HIDDEN, requires_grad=True)
        logits = plain(before[:1] * scale, everything)
        others = torch.where(torch.arange(CLASSES) == targets[0], -torch.inf, logits[0])
        (gradient,) = torch.autograd.grad(logits[0, targets[0]] - others.logsumexp(0), everything)
        found = coar.mask_gradient(what, run, device="cpu", progress=False).weights()[0]
        assert np.allclose(found, gradient, atol=1e-4)


def test_what_hooks_of_the_owner_return_is_gated(tmp_path):
    model = Net().eval()
    model.block[0].register_forward_hook(lambda _layer, _args, y: 1.5 * y + 0.2)
    what = study(model, components=coar.neurons(model, include="block.0"))
    run, one, two = collect(what, tmp_path), model.block[0], model.block[2]

    def run_plainly(keep):
        h = torch.relu((1.5 * (what.examples.inputs @ one.weight.T + one.bias) + 0.2) * keep)
        return model.last(torch.relu(two(h)))

    wanted = expected(run_plainly, run.masks(0, 6), what.examples.targets)
    assert np.allclose(run.array("outputs")[:], wanted, atol=1e-4)


class Complex(nn.Module):
    """A net whose first layer returns complex numbers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(FEATURES, HIDDEN, dtype=torch.complex64), nn.Linear(2 * HIDDEN, CLASSES)

    def forward(self, x):
        return self.last(torch.view_as_real(self.first(x.to(torch.complex64))).flatten(1))


def test_gates_of_complex_numbers_have_their_gradient(tmp_path):
    model = Complex().eval()
    what = study(model, components=coar.neurons(model, include="first"))
    run = collect(what, tmp_path, masks=4, gradients=8)
    everything, first, y = torch.ones(HIDDEN, requires_grad=True), what.examples.inputs[:1], what.examples.targets[0]
    parts = torch.view_as_real(model.first(first.to(torch.complex64)).detach()) * everything[:, None]
    logits = model.last(parts.flatten(1))[0]
    others = torch.where(torch.arange(CLASSES) == y, -torch.inf, logits)
    (gradient,) = torch.autograd.grad(logits[y] - others.logsumexp(0), everything)
    found = coar.mask_gradient(what, run, device="cpu", progress=False).weights()[0]
    assert np.allclose(found, gradient, atol=1e-5)


# Programs that hold no Python modules.


PROGRAMS = {
    "traced": (lambda: torch.jit.trace(Net().eval(), inputs(4, FEATURES)), "the model is a TopLevelTracedModule"),
    "scripted inside": (
        lambda: nn.Sequential(torch.jit.script(nn.Linear(FEATURES, HIDDEN)), nn.Linear(HIDDEN, CLASSES)),
        "the module '0' is a RecursiveScriptModule of TorchScript",
    ),
}


@pytest.mark.filterwarnings("ignore")  # of torch, which deprecates TorchScript
@pytest.mark.parametrize("kind", PROGRAMS)
def test_programs_without_python_modules_are_refused(kind, tmp_path):
    make, message = PROGRAMS[kind]
    model = make()
    name = next(name for name, parameter in model.named_parameters() if parameter.ndim == 2)
    what = study(model, components=coar.parameter_slices(model, name), ablation=coar.ZeroWeight())
    with pytest.raises(WeightsError, match=f"{message}.* give the module that it was"):
        collect(what, tmp_path)


def test_an_exported_program_is_a_model_of_its_parameters(tmp_path):
    size, net = {0: torch.export.Dim("size", min=1, max=64)}, Net().eval()
    model = torch.export.export(net, (inputs(4, FEATURES),), dynamic_shapes=(size,)).module()
    what = study(model, components=coar.parameter_slices(model, "block.0.weight"), ablation=coar.ZeroWeight())
    run, one = collect(what, tmp_path), net.block[0]

    def run_plainly(keep):
        return net.last(net.block[1:](what.examples.inputs @ (one.weight * keep[:, None]).T + one.bias))

    wanted = expected(run_plainly, run.masks(0, 6), what.examples.targets)
    assert np.allclose(run.array("outputs")[:], wanted, atol=1e-4)


# Modules that no example reaches.


class Routed(Net):
    """A net that sends an example through one of two experts, by the sign of its first feature."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(2))

    def forward(self, x):
        h, right = self.block(x), x[:, 0] > 0
        for side, expert in zip((right, ~right), self.experts, strict=True):
            if side.any():
                h = h.masked_scatter(side[:, None].expand_as(h), expert(h[side]))
        return self.last(h)


def test_a_layer_that_no_example_reaches_is_refused_unless_accepted(tmp_path):
    model = Routed().eval()
    positive = inputs(40, FEATURES).abs()
    what = study(model, positive, components=coar.neurons(model, include="experts*"))
    with pytest.raises(AblationError, match=r"'experts\.1', a Linear, is not called when 40 examples pass .*'calls'"):
        collect(what, tmp_path)
    run = collect(replace(what, accept=("calls",)), tmp_path)
    assert "is not called" in describe(run)["accepted: calls"]
    weights = coar.leave_one_out(what, run, device="cpu", progress=False).weights()
    assert not weights[:, HIDDEN:].any()
    assert weights[:, :HIDDEN].any()


def test_a_layer_that_one_of_many_examples_reaches_is_taken(tmp_path):
    model, x = Routed().eval(), inputs(40, FEATURES).abs()
    x[36, 0] = -1
    run = collect(study(model, x, components=coar.neurons(model, include="experts*")), tmp_path)
    assert "calls" in run.facts.preflight.passed


class ReadsWeight(Net):
    """A net that reads the weight of its second layer, and never calls the layer."""

    def forward(self, x):
        h = torch.relu(self.block[0](x))
        return self.last(torch.relu(nn.functional.linear(h, self.block[2].weight, self.block[2].bias)))


def test_a_layer_whose_weight_is_read_is_ablated_in_its_weight(tmp_path):
    model = ReadsWeight().eval()
    what = study(model)
    run = collect(what, tmp_path)
    wanted = expected(lambda keep: formula(model)(what.examples.inputs, keep), run.masks(0, 6), what.examples.targets)
    assert np.allclose(run.array("outputs")[:], wanted, atol=1e-4)


# Passes that depend on other examples, on earlier passes or on chance, where two plain passes may agree.


def rarely_noisy(h):
    return h * 2 if torch.rand(()) < 0.05 else h


def test_noise_that_is_rarely_used_is_found(tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)  # of which a few passes agree
        with pytest.raises(AblationError, match=r"module 'step', a Step, .* second pass"):
            collect(study(Noisy(Step(rarely_noisy)).eval()), tmp_path)


def counted(h):
    """Scale by the number of examples of the batch in which a unit is exactly off, as only an ablated one is."""
    return h * (1 + (torch.tanh(h)[:, HIDDEN // 2] == 0).sum())


class Saturated(Noisy):
    """A net without ReLU at the end of its block."""

    def forward(self, x):
        return self.last(self.step(self.block[:3](x)))


def test_a_condition_on_the_batch_that_only_masks_reach_is_found(tmp_path):
    model = Saturated(Step(counted)).eval()
    what = study(model, components=coar.neurons(model, include="block.2"))
    with pytest.raises(AblationError, match=r"under masks Saturated gives outputs .* in batches of another size"):
        collect(what, tmp_path)
    collect(replace(what, accept=("batch",)), tmp_path)


class Appending(nn.Module):
    """Adds the mean of all that it has seen, as a cache of keys and values that is kept across calls."""

    def __init__(self):
        super().__init__()
        self.kept = None

    def forward(self, h):
        self.kept = h[:, None] if self.kept is None else torch.cat([self.kept, h[:, None]], 1)
        return h + self.kept.mean(1)


def test_a_state_that_is_kept_across_passes_is_refused(tmp_path):
    with pytest.raises(ExamplesError, match=r"Noisy fails on .* keep no state of earlier passes"):
        collect(study(Noisy(Appending()).eval()), tmp_path)


def test_a_buffer_that_a_pass_changes_is_named(tmp_path, caplog):
    model = Noisy(Step(lambda h: h)).eval()
    model.register_buffer("passes", torch.zeros(()))
    model.step.function = lambda h: h + 0 * model.passes.add_(1)
    with caplog.at_level(logging.WARNING):
        collect(study(model), tmp_path)
    assert "a pass changes the buffer 'passes'" in caplog.text


class NotOne(Flattened):
    """A net that fails on one example, since it removes an axis of length 1."""

    def forward(self, x):
        examples, _, _ = x.squeeze(0).shape
        assert examples == len(x)
        return super().forward(x)


def test_the_layout_of_a_model_that_fails_on_one_example_is_found(tmp_path):
    found = []
    for kind, texts_first in ((Flattened, True), (NotOne, False)):
        torch.manual_seed(2)
        model = kind(texts_first).eval()
        what = replace(study(model, components=coar.neurons(model, include=["inp", "mid"])), examples=texts(5, 3))
        folder = tmp_path / str(texts_first)
        run = collect(what, folder, masks=4, gradients=8)
        found.append([run.array(name)[:] for name in ("outputs", "gradient_kept", "gradient_outputs")])
    for one, other in zip(*found, strict=True):
        assert np.allclose(one, other, atol=1e-5, equal_nan=True)


class HalvedAlone(torch.autograd.Function):
    """Half the derivative for a batch of one, as some kernels of torch had for some layouts of memory."""

    @staticmethod
    def forward(context, h):
        context.alone = len(h) == 1
        return h.clone()

    @staticmethod
    def backward(context, slope):
        return slope / 2 if context.alone else slope


def test_a_derivative_that_is_wrong_for_a_batch_of_one_is_refused(tmp_path):
    what = study(Noisy(Step(HalvedAlone.apply)).eval())
    with pytest.raises(
        AblationError, match=r"gradients of an example in a batch of 1 differ by 5\.0e-01 from those .*'rows'"
    ):
        collect(what, tmp_path, gradients=8)
    collect(replace(what, accept=("rows",)), tmp_path, masks=4, gradients=8)


# What only a run sees: noise that few passes use, and conditions on a batch that few masks meet.


def very_rarely_noisy(h):
    return h * 2 if torch.rand(()) < 1e-3 else h


def test_noise_that_no_pass_shows_is_found_by_extreme_draws(tmp_path):
    with pytest.raises(AblationError, match=r"Noisy draws random numbers and uses some of them rarely.*'random'"):
        collect(study(Noisy(Step(very_rarely_noisy)).eval()), tmp_path)


def test_numbers_that_are_drawn_and_never_used_are_no_noise(tmp_path):
    def drawn(h):
        torch.rand_like(h), torch.randn(3), torch.empty(2).bernoulli_(0.5), nn.functional.dropout(h, 0.5)
        return h

    collect(study(Noisy(Step(drawn)).eval()), tmp_path)


class ByChance(nn.Module):
    """Doubles in some passes, by numbers of Python, or where the mean of the batch is above a bound."""

    def __init__(self, condition):
        super().__init__()
        self.condition, self.draws = condition, random.Random(4)

    def forward(self, h):
        return h * 2 if self.condition(self, h) else h


RARE = {
    "noise": (lambda step, _h: step.draws.random() < 0.02, "in a second pass of the same batch too"),
    "batch": (lambda _step, h: h.mean().item() > 0.33, "though they stay the same in the same batch"),
}


@pytest.mark.parametrize("kind", RARE)
def test_repeated_passes_find_what_few_passes_show(kind, tmp_path):
    condition, message = RARE[kind]
    model = Noisy(ByChance(condition)).eval()
    x = inputs(64, FEATURES)
    what = replace(study(model, x), sampler=coar.BernoulliSampler(ablated_fraction=0.1))
    with pytest.raises(AblationError, match=f"under mask .* Noisy gives outputs that .*{message}.*'repeats'"):
        collect(what, tmp_path, masks=8192)
    accepted = replace(what, accept=("repeats",))
    run = collect(accepted, tmp_path, masks=8192)
    assert "no pass is repeated" in describe(coar.Run.open(run.path))["accepted: repeats"]


def test_repeated_passes_are_shown(tmp_path):
    run = collect(study(Noisy(Step(torch.tanh)).eval()), tmp_path)
    assert "repeats" in describe(coar.Run.open(run.path))["checks"]


class HalvedInTwo(torch.autograd.Function):
    """Half the derivative for a batch of two, in a model that fails on one example."""

    @staticmethod
    def forward(context, h):
        if len(h) == 1:
            raise ValueError("one example is no batch")
        context.two = len(h) == 2
        return h.clone()

    @staticmethod
    def backward(context, slope):
        return slope / 2 if context.two else slope


def test_gradients_are_compared_where_a_model_fails_on_one_example(tmp_path, caplog):
    what = study(Noisy(Step(HalvedInTwo.apply)).eval())
    with pytest.raises(
        AblationError, match=r"in a batch of 2 differ by 5\.0e-01 from those that it has in a batch of 4"
    ):
        collect(what, tmp_path, gradients=8)
    assert "gradients in a batch of 1 are not compared" in caplog.text


# What a study's output reads, and a copy that is another model.


PROBABILITIES = {  # what ends the model, the output, and labels
    "softmax": (nn.Softmax(1), coar.CorrectClassMargin(), torch.arange(EXAMPLES) % CLASSES),
    "softmax for a loss": (nn.Softmax(1), coar.CrossEntropy(), torch.arange(EXAMPLES) % CLASSES),
    "sigmoid": (nn.Sequential(nn.Linear(CLASSES, 1), nn.Sigmoid()), coar.BinaryMargin(), torch.arange(EXAMPLES) % 2),
    "sigmoids": (nn.Sigmoid(), coar.MultiLabelMargin(), (torch.arange(EXAMPLES * CLASSES) % 2).view(-1, CLASSES)),
}


@pytest.mark.parametrize("kind", PROBABILITIES)
def test_probabilities_are_not_read_as_logits_unless_accepted(kind, tmp_path):
    end, output, targets = PROBABILITIES[kind]
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        net.last.weight.mul_(4)
    model = nn.Sequential(net, end).eval()
    examples = coar.Examples(inputs=inputs(EXAMPLES, FEATURES), targets=targets)
    if kind == "sigmoid":
        with torch.no_grad():
            end[0].reset_parameters()
            end[0].bias -= end[0](net(examples.inputs)).median()  # probabilities on either side of 1/2
    what = replace(study(model, components=coar.neurons(model, include="0.block*")), examples=examples, output=output)
    with pytest.raises(AblationError, match=r"Sequential returns .* look like the probabilities.*'logits'"):
        collect(what, tmp_path)
    collect(replace(what, accept=("logits",)), tmp_path)
    logits = replace(what, model=nn.Sequential(net, *([end[0]] if isinstance(end, nn.Sequential) else [])).eval())
    collect(logits, tmp_path / "logits")
    if kind.startswith("softmax"):  # whose logarithm is as good as logits

        class Log(nn.Module):
            def forward(self, p):
                return p.log()

        found = [
            collect(one, tmp_path / str(i))
            for i, one in enumerate((logits, replace(what, model=nn.Sequential(net, end, Log()))))
        ]
        assert np.allclose(*(run.array("outputs")[:] for run in found), atol=1e-4)
        collect(replace(what, output=coar.ClassLogit()), tmp_path / "probability")  # which may be meant


class Forgetful(Net):
    """A net whose copies lack what it was told after it was made."""

    scale = 1.0

    def __deepcopy__(self, memo):
        made = Forgetful()
        made.load_state_dict(self.state_dict())
        return made

    def forward(self, x):
        return super().forward(x) * self.scale


def test_a_copy_that_computes_something_else_is_refused(tmp_path):
    model = Forgetful().eval()
    collect(study(model), tmp_path / "same")
    model.scale = 2.0
    with pytest.raises(
        AblationError, match=r"a copy of this Forgetful returns something else .* differ by .*'original'"
    ):
        collect(study(model), tmp_path / "other")


def test_comparing_with_the_original_leaves_it_as_it_was(tmp_path):
    model = Noisy(Step(torch.tanh)).train()
    model.register_buffer("passes", torch.zeros(()))

    def step(h):
        model.passes.add_(1)
        model.kept = h
        return h

    model.block.register_forward_hook(lambda _m, _a, h: step(h))
    collect(study(model), tmp_path)
    assert model.training
    assert model.passes == 0
    assert not hasattr(model, "kept")


# Passes that compute in bfloat16 by themselves, and layers inside vmap.


class Autocast(Net):
    """A net whose forward pass turns autocast on, as accelerate wraps it."""

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).float()


def test_a_pass_that_turns_autocast_on_is_judged_by_its_own_rounding(tmp_path):
    model = Autocast().eval()
    calibration = coar.Examples(inputs=inputs(20, FEATURES, seed=4), targets=torch.arange(20) % CLASSES)
    what = study(model)
    run = collect(what, tmp_path, masks=6, gradients=8)
    plain = expected(lambda keep: formula(model)(what.examples.inputs, keep), run.masks(0, 6), TARGETS)
    assert 0 < np.abs(run.array("outputs")[:] - plain).max() < 0.03 * np.abs(plain).max()
    gates = torch.ones(len(what.components), requires_grad=True)
    margins = margin_of(formula(model)(what.examples.inputs, gates), TARGETS)
    slopes = torch.stack([torch.autograd.grad(one, gates, retain_graph=True)[0] for one in margins]).numpy()
    errors = np.abs(coar.mask_gradient(what, run, device="cpu", progress=False).weights() - slopes)
    assert np.median(errors) < 0.02 * np.abs(slopes).max()  # one activation of many may lie beyond a kink
    collect(replace(what, ablation=coar.Mean(calibration=calibration)), tmp_path / "means", masks=6, gradients=8)


def margin_of(logits, targets):
    rows = torch.arange(len(logits))
    others = logits.index_put((rows, targets), torch.tensor(-torch.inf))
    return logits[rows, targets] - others.logsumexp(1)


class Ensemble(Net):
    """Several last layers by vmap, whose function calls the net's layers too."""

    def __init__(self):
        super().__init__()
        self.heads = nn.Parameter(inputs(3, CLASSES, HIDDEN))

    def forward(self, x):
        return vmap(lambda head: nn.functional.linear(self.block(x), head))(self.heads).mean(0)


def test_layers_that_a_function_in_vmap_calls_have_gradients(tmp_path):
    model = Ensemble().eval()
    found = []
    for net in (model, Net().eval()):
        if net is not model:
            with torch.no_grad():
                net.last.weight.copy_(model.heads.mean(0))
                net.last.bias.zero_()
        run = collect(
            study(net, components=coar.neurons(net, include="block*")), tmp_path / str(len(found)), gradients=8
        )
        found.append([run.array(name)[:] for name in ("gradient_kept", "gradient_ablated", "gradient_outputs")])
    for one, other in zip(*found, strict=True):
        assert np.allclose(one, other, atol=1e-5, equal_nan=True)
