"""Models that people bring are right, against oracles without the engine, or refused in words."""

import functools
import re
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrizations

import coar
from coar.description import describe
from coar.errors import AblationError, EditError, WeightsError
from coar.forward.copies import device_copy
from coar.forward.runner import FastRunner
from coar.model_copy import independent_copy

EXAMPLES, FEATURES, HIDDEN, CLASSES = 10, 6, 8, 4
TARGETS = torch.arange(EXAMPLES) % CLASSES


class Net(nn.Module):
    """Two hidden layers in a block, and a last layer."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.block = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU())
            self.last = nn.Linear(HIDDEN, CLASSES)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(2)

    def forward(self, x):
        return self.last(self.block(x))


def inputs(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def study(model, x=None, components=None, ablation=None):
    x = inputs(EXAMPLES, FEATURES) if x is None else x
    return coar.Study(
        model=model,
        examples=coar.Examples(inputs=x, targets=torch.arange(len(x)) % CLASSES),
        components=components or coar.neurons(model, exclude="last"),
        ablation=ablation or coar.ZeroActivation(),
        sampler=coar.BernoulliSampler(ablated_fraction=0.4),
    )


def collect(what, folder, **counts):
    return coar.collect(what, folder / "run.zarr", device="cpu", progress=False, **(counts or {"masks": 6}))


def margin(logits, targets):
    """The correct logit less the log-sum-exp of the others, row by row."""
    others = logits.clone()
    others[torch.arange(len(logits)), targets] = -torch.inf
    return (logits[torch.arange(len(logits)), targets] - others.logsumexp(1)).numpy()


def expected(run_plainly, masks, targets):
    """(masks, examples) margins of logits that a function computes from one (components,) mask."""
    with torch.no_grad():
        return np.stack([margin(run_plainly(torch.from_numpy(mask).float()), targets) for mask in masks])


def formula(net, shift=0.0, scale=1.0):
    """Return what a net computes from rows and a mask, if its second layer computes scale * f(h + shift)."""
    one, two, last = net.block[0], net.block[2], net.last

    def run(x, keep):
        h = torch.relu((x @ one.weight.T + one.bias) * keep[:HIDDEN])
        h = torch.relu(scale * ((h + shift) @ two.weight.T + two.bias) * keep[HIDDEN : 2 * HIDDEN])
        logits = h @ last.weight.T + last.bias
        return logits * keep[2 * HIDDEN :] if len(keep) > 2 * HIDDEN else logits

    return run


def compiled(net):
    net.forward = torch.compile(net.forward, backend="eager")
    return formula(net)


def closure(net):
    old = net.block[2].forward
    net.block[2].forward = lambda x: 1.5 * old(x + 1)
    return formula(net, shift=1.0, scale=1.5)


def default_argument(net):
    def forward(x, block=net.block, last=net.last):
        return last(block(x))

    net.forward = forward
    return formula(net)


def global_name(net):
    global OLD_FORWARD  # noqa: PLW0603 - as in a script
    OLD_FORWARD = net.block[2].forward
    net.block[2].forward = lambda x: OLD_FORWARD(x + 1)
    return formula(net, shift=1.0)


def wrapped_twice(net):
    def wrapped(function):
        @functools.wraps(function)
        def inner(*args):
            return function(*args)

        return inner

    net.forward = wrapped(wrapped(net.forward))
    return formula(net)


class Runner:
    """An object that holds a net and functions of it."""

    def __init__(self, net):
        self.steps = {
            "block": lambda x: net.block(x + 0.0),
            "last": functools.partial(type(net.last).forward, net.last),
        }

    def __call__(self, x):
        return self.steps["last"](self.steps["block"](x))


def object_with_closures(net):
    runner = Runner(net)
    net.forward = lambda x: runner(x + 0.0)
    return formula(net)


PATCHES = (compiled, closure, default_argument, global_name, wrapped_twice, object_with_closures)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.__name__)
def test_a_patched_forward_pass_runs_the_copy(patch, tmp_path):
    """A mask, a mask gradient and an edit do what the formula of the patched net says."""
    model = Net().eval()
    run_plainly = patch(model)
    what = study(model)
    x, targets = what.examples.inputs, what.examples.targets
    run = collect(what, tmp_path, masks=6, gradients=8)
    masks = run.masks(0, 6)
    assert np.allclose(run.array("outputs")[:], expected(lambda keep: run_plainly(x, keep), masks, targets), atol=1e-4)
    edit = coar.edit(coar.fit(run, method="ridge", progress=False), goal(), budget=3)
    keep = torch.ones(2 * HIDDEN)
    keep[[what.components.index(component.name) for component in edit.components]] = 0
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        if patch in (closure, global_name):  # whose layers do not return what their weights say
            with pytest.raises(EditError, match="does not return zeros"):
                edit.apply(model)
        else:
            assert torch.allclose(edit.apply(model)(x), run_plainly(x, keep), atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def goal():
    return coar.EditGoal(targets=[0], references=list(range(1, EXAMPLES)), direction="decrease")


class Obstinate(nn.Parameter):
    """A parameter that deepcopy returns as it is."""

    def __deepcopy__(self, memo):
        return self


def test_a_copy_that_shares_a_tensor_is_refused():
    model = Net()
    model.block[0].weight = Obstinate(torch.zeros(HIDDEN, FEATURES))
    with pytest.raises(WeightsError, match=r"shares the tensor 'block\.0\.weight'"):
        independent_copy(model)


# Layers that do not respond to their weight as a convolution or linear layer does.


class StandardisedConv(nn.Conv2d):
    """A convolution with rows of the weight at mean 0 and variance 1, as in BiT and NFNet."""

    def forward(self, x):
        mean, variance = self.weight.mean((1, 2, 3), keepdim=True), self.weight.var((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, (self.weight - mean) * torch.rsqrt(variance + 1e-6), self.bias, self.stride)


class CosineLinear(nn.Linear):
    """A linear layer with rows of the weight at length 1."""

    def forward(self, x):
        return nn.functional.linear(x, nn.functional.normalize(self.weight, dim=1), self.bias)


class CachedLinear(nn.Linear):
    """A linear layer that keeps a transposed copy of its weight from the first pass on."""

    kept = None

    def forward(self, x):
        if self.kept is None:
            self.kept = self.weight.detach().T.contiguous()
        return x @ self.kept + self.bias


def closed_over(layer):
    """The layer, its forward pass patched with a function that holds the weight and not the layer."""
    weight, bias = layer.weight, layer.bias
    layer.forward = lambda x: nn.functional.linear(x, weight, bias)
    return layer


RESPONSES = {  # how each layer is made, and whether edits in part and at full strength are possible
    "weight-standardised": (lambda: StandardisedConv(3, HIDDEN, 3), False, True),
    "timm's for BiT": (lambda: timm.layers.StdConv2d(3, HIDDEN, 3, bias=True), False, True),
    "timm's for NFNet": (lambda: timm.layers.ScaledStdConv2d(3, HIDDEN, 3), False, True),
    "timm's with padding": (lambda: timm.layers.Conv2dSame(3, HIDDEN, 3), True, True),
    "rows of length 1": (lambda: CosineLinear(FEATURES, HIDDEN), False, True),
    "cached": (lambda: CachedLinear(FEATURES, HIDDEN), False, False),
    "held in a closure": (lambda: closed_over(nn.Linear(FEATURES, HIDDEN)), False, False),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(FEATURES, HIDDEN)), False, False),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Conv2d(3, HIDDEN, 3)).eval(), False, False),
}


def layered(layer):
    """A net that begins with a layer, and examples for it."""
    conv = isinstance(layer, nn.Conv2d)
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()] if conv else []
    model = nn.Sequential(layer, nn.ReLU(), *pool, nn.Linear(HIDDEN, CLASSES)).eval()
    return model, inputs(EXAMPLES, 3, 6, 6) if conv else inputs(EXAMPLES, FEATURES)


@pytest.mark.parametrize("kind", RESPONSES)
def test_half_a_gate_is_half_the_activation_of_any_layer(kind, tmp_path):
    """Gates, masks and edits act on what the layer returns, by whatever weight it computes that."""
    make, in_part, in_full = RESPONSES[kind]
    model, x = layered(make())
    what = study(model, x, components=coar.conv_filters(model) if x.ndim == 4 else coar.neurons(model, include="0"))
    with torch.no_grad():
        activations = model[0](x).clone()
    run = collect(what, tmp_path)

    def run_plainly(keep):
        return model[1:](activations * keep.view(-1, *[1] * (x.ndim - 2)))

    halves = np.tile(np.float32([0.5, 1, 0, 1]), HIDDEN // 4)[None]
    runner = FastRunner(device_copy(model, torch.device("cpu")), what.components, torch.zeros(HIDDEN), what.output)
    found = runner.outputs(runner.load(what.examples, 0, EXAMPLES), halves)
    assert np.allclose(found, expected(run_plainly, halves, what.examples.targets), atol=1e-4)
    wanted = expected(run_plainly, run.masks(0, 6), what.examples.targets)
    assert np.allclose(run.array("outputs")[:], wanted, atol=1e-4)
    edit = coar.edit(coar.fit(run, method="ridge", progress=False), goal(), budget=1)
    keep = torch.ones(HIDDEN)
    for strength, possible in ((0.5, in_part), (1.0, in_full)):
        keep[edit.components[0].position] = 1 - strength
        if possible:
            with torch.no_grad():
                assert torch.allclose(
                    replace(edit, strengths=(strength,)).apply(model)(x), run_plainly(keep), atol=1e-4
                )
        else:
            with pytest.raises(EditError, match=r"computes? its weight|computed from|does not return zeros"):
                replace(edit, strengths=(strength,)).apply(model)


# Models that are not a function of one example.


class Noisy(Net):
    """A net with a step between its block and its last layer."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def forward(self, x):
        return self.last(self.step(self.block(x)))


class Step(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, h):
        return self.function(h)


class Remembering(nn.Module):
    """Returns what it returned in the first pass, where the number of examples is the same."""

    def __init__(self):
        super().__init__()
        self.kept = {}

    def forward(self, h):
        return self.kept.setdefault(len(h), h * 2)


def sampled(h):
    return torch.distributions.Normal(h, 0.1).sample()


NOT_ALONE = {  # the step, the check that fails, and what the message names
    "dropout kept on": (lambda h: nn.functional.dropout(h, 0.2), "random", "module 'step', a Step, .* second pass"),
    "sampling": (sampled, "random", "module 'step', a Step, .* second pass"),
    "random masking": (lambda h: h * (torch.rand_like(h) > 0.1), "random", "module 'step', a Step, .* second pass"),
    "statistics over the batch": (lambda h: h - h.mean(0), "batch", "module 'step', a Step, .* in its batch"),
    "batch norm without statistics": (
        nn.BatchNorm1d(HIDDEN, track_running_stats=False),
        "batch",
        "module 'step', a BatchNorm1d, .* in its batch",
    ),
    "attention over the batch": (lambda h: torch.softmax(h @ h.T, 1) @ h, "batch", "'step', a Step, .* in its batch"),
    "kept from an earlier pass": (Remembering(), "batch", "an earlier pass"),
}


@pytest.mark.parametrize("kind", NOT_ALONE)
def test_a_model_that_is_no_function_of_one_example_is_refused_unless_accepted(kind, tmp_path):
    step, check, message = NOT_ALONE[kind]
    what = study(Noisy(step if isinstance(step, nn.Module) else Step(step)).eval())
    with pytest.raises(AblationError, match=f"{message}.*accept=\\('{check}',\\)"):
        collect(what, tmp_path)
    assert list(tmp_path.iterdir()) == []
    run = collect(replace(what, accept=(check,)), tmp_path)
    assert re.search(message, describe(run)[f"accepted: {check}"])
    assert run.facts.preflight == coar.Run.open(run.path).facts.preflight


class Augmented(torch.utils.data.Dataset):
    """Rows that are read with noise, or with one feature left out at random."""

    def __init__(self, change):
        self.rows, self.change = inputs(EXAMPLES, FEATURES), change

    def __len__(self):
        return EXAMPLES

    def __getitem__(self, index):
        return self.change(self.rows[index])


AUGMENTED = {
    "noise": lambda x: x + 0.01 * torch.randn(FEATURES),
    "one left out": lambda x: x * (torch.arange(FEATURES) != torch.randint(FEATURES, ())),
    "flipped": lambda x: x.flip(0) if torch.rand(()) < 0.5 else x,
}


@pytest.mark.parametrize("kind", AUGMENTED)
def test_examples_that_change_when_read_again_are_refused(kind, tmp_path):
    with pytest.raises(AblationError, match=r"inputs of example \d+ differ when they are read twice"):
        collect(study(Net().eval(), Augmented(AUGMENTED[kind])), tmp_path)


SHARED = Net(seed=3)


class OfAClass(nn.Module):
    """A net whose second layer is held by its class too, and called there."""

    def __init__(self):
        super().__init__()
        inner = Net()
        self.block, self.last = inner.block, inner.last
        type(self).second = staticmethod(self.block[2].forward)

    def forward(self, x):
        return self.last(torch.relu(self.second(torch.relu(self.block[0](x)))))


class OfAGlobal(nn.Module):
    """A net whose forward pass names the net that it holds."""

    def __init__(self):
        super().__init__()
        self.net = SHARED

    def forward(self, x):
        return SHARED(x)


@pytest.mark.parametrize(("kind", "name"), [(OfAClass, "block.2.weight"), (OfAGlobal, "net.block.0.weight")])
def test_a_copy_that_computes_with_the_original_is_refused(kind, name, tmp_path):
    model = kind().eval()
    what = study(model, components=coar.neurons(model, exclude="*last"))
    with pytest.raises(AblationError, match=f"computes with '{name}' of your model"):
        collect(what, tmp_path)


# Gates that gradients do not describe, and outputs that are not read.


class Frozen(Net):
    """A net whose block, or a part of it, is computed without autograd."""

    def __init__(self, way):
        super().__init__()
        self.way = way

    def forward(self, x):
        return self.last(self.way(self.block, x))


def under_no_grad(block, x):
    with torch.no_grad():
        return block(x)


def half_detached(block, x):
    h = block(x)
    return torch.where(torch.arange(HIDDEN) % 2 == 0, h, h.detach())


def first_layer_detached(block, x):
    return block[1:](block[0](x).detach())


def recomputed(block, x):
    """The block's result, computed again from a copy of its input without autograd and put into the old tensor."""
    h = block(x)
    return h.detach().clone() * 1.0 + 0 * h


DETACHED = {  # how the block is computed, and what the message names
    "under no_grad": (under_no_grad, "'block.0', a Linear, have no gradient"),
    "first layer detached": (first_layer_detached, "'block.0', a Linear, have no gradient"),
    "recomputed": (recomputed, "'block.0', a Linear, have no gradient"),
    "half detached": (half_detached, "'block.[02]', a Linear, is not the output's"),
}


@pytest.mark.parametrize("kind", DETACHED)
def test_gates_without_their_gradient_are_refused_wherever_gradients_are_used(kind, tmp_path):
    """Masks go on, and are right; mask gradients, the baseline and trained constants name the module."""
    way, message = DETACHED[kind]
    model = Frozen(way).eval()
    what = study(model, components=coar.neurons(model))
    with pytest.raises(AblationError, match=message):
        collect(what, tmp_path, gradients=8)
    assert list(tmp_path.iterdir()) == []
    trained = coar.Optimal(calibration=coar.Examples(inputs=inputs(20, FEATURES), targets=torch.arange(20) % CLASSES))
    with pytest.raises(AblationError, match=message):
        collect(replace(what, ablation=trained), tmp_path)
    run = collect(what, tmp_path)
    wanted = expected(lambda keep: formula(what.model)(what.examples.inputs, keep), run.masks(0, 6), TARGETS)
    assert np.allclose(run.array("outputs")[:], wanted, atol=1e-4)
    with pytest.raises(AblationError, match=message):
        coar.mask_gradient(what, run, device="cpu", progress=False)
    attributions = coar.fit(run, method="ridge", progress=False)
    with torch.no_grad():
        wrong = (model(what.examples.inputs).argmax(1) != TARGETS).tolist()
    others = [row for row in range(EXAMPLES) if row != wrong.index(True)]
    raised = coar.EditGoal(targets=[wrong.index(True)], references=others, direction="increase")
    options = {"device": "cpu", "progress": False, "strength": "per_component"}
    with pytest.raises(AblationError, match=f"{message}.*'welch'" if kind != "under no_grad" else message):
        coar.select(attributions, model, what.examples, raised, **options)
    accepting = replace(what, accept=("gradients",))
    collect(accepting, tmp_path, masks=6, gradients=8)
    assert "accepted: gradients" in describe(coar.Run.open(run.path))
    coar.mask_gradient(accepting, coar.Run.open(run.path), device="cpu", progress=False)


class Off(nn.Module):
    """A net with a layer that is off for every example, behind ReLU, and one that the output saturates."""

    def __init__(self):
        super().__init__()
        self.net, self.off = Net(), nn.Linear(FEATURES, HIDDEN)
        with torch.no_grad():
            self.off.bias.fill_(-100)

    def forward(self, x):
        return self.net(x) + torch.relu(self.off(x))[:, :CLASSES]


def test_a_layer_that_is_off_has_no_gradient_and_is_not_refused(tmp_path):
    model = Off().eval()
    run = collect(study(model, components=coar.neurons(model, exclude="*last")), tmp_path, gradients=8)
    assert {"rows", "gradients", "gates"} <= set(run.facts.preflight.passed)


def jagged(h):
    """Add a wave of many kinks, whose slope is 2 or -2, so that only the smallest steps measure a slope."""
    period = 3e-3
    return h + 2 * (torch.remainder(h, period) - period / 2).abs()


def test_an_output_with_many_kinks_has_the_gradient_that_it_has(tmp_path):
    run = collect(study(Noisy(Step(jagged)).eval()), tmp_path, masks=4, gradients=8)
    assert "gradients" in run.facts.preflight.passed


def stairs(h):
    """Climb in steps of 0.06, three times as steeply as the gradient of a straight-through estimator says."""
    return h + (3 * (h * 50).round() / 50 - h).detach()


def test_a_gradient_that_passes_straight_through_stairs_is_refused(tmp_path):
    with pytest.raises(AblationError, match=r"the gradient by the gates .* is not the output's .* or by rounding"):
        collect(study(Noisy(Step(stairs)).eval()), tmp_path, gradients=8)


class Rolled(Net):
    """A net that computes each example in the place of another one."""

    def forward(self, x):
        return self.last(self.block(x.roll(1, 0)).roll(-1, 0))


def test_a_mask_per_example_that_would_reach_another_example_is_refused(tmp_path):
    model = Rolled().eval()
    what = study(model)
    with pytest.raises(AblationError, match=r"would mix examples; .*'rows'"):
        collect(what, tmp_path, masks=6, gradients=8)
    run = collect(what, tmp_path)
    wanted = expected(lambda keep: formula(model)(what.examples.inputs, keep), run.masks(0, 6), what.examples.targets)
    assert np.allclose(run.array("outputs")[:], wanted, atol=1e-4)


class LastState(nn.Module):
    """Reads the last state of a recurrent layer, the second of what it returns."""

    def __init__(self, read):
        super().__init__()
        self.body, self.last, self.read = nn.GRU(FEATURES, HIDDEN, batch_first=True), nn.Linear(HIDDEN, CLASSES), read

    def forward(self, x):
        return self.last(self.read(*self.body(x)))


def test_a_module_whose_first_output_is_not_read_is_refused(tmp_path):
    x = inputs(EXAMPLES, 5, FEATURES)
    model = LastState(lambda _states, last: last[0]).eval()
    with pytest.raises(
        AblationError, match="module 'body', a GRU, returns several tensors, and the model reads others"
    ):
        collect(study(model, x, components=coar.modules(model, ["body"])), tmp_path)
    model = LastState(lambda states, _last: states[:, -1]).eval()
    collect(study(model, x, components=coar.modules(model, ["body"])), tmp_path)


class Elsewhere(Net):
    """A net whose second layer is called for nothing, and whose weight is read by a function."""

    def forward(self, x):
        h = self.block[1](self.block[0](x))
        self.block[2](h)
        return self.last(torch.relu(nn.functional.linear(h, self.block[2].weight, self.block[2].bias)))


def test_a_layer_whose_output_is_not_read_though_its_weight_is_is_refused(tmp_path):
    with pytest.raises(AblationError, match=r"at the output of 'block\.2', a Linear: .* in another way"):
        collect(study(Elsewhere().eval()), tmp_path)


# Modules that do not hold examples along the first axis, side by side.

WIDTH, HEADS = 8, 2


class Encoder(nn.Module):
    """torch's encoder, with positions or texts first."""

    def __init__(self, texts_first):
        super().__init__()
        self.texts_first = texts_first
        self.inp, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, CLASSES)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 12, batch_first=texts_first)
        self.enc = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x):
        h = self.inp(x)
        return self.head((self.enc(h) if self.texts_first else self.enc(h.transpose(0, 1)).transpose(0, 1)).mean(1))


class Recurrent(nn.Module):
    """A recurrent layer with positions or texts first, and a linear layer on its states."""

    def __init__(self, texts_first):
        super().__init__()
        self.texts_first = texts_first
        self.body = nn.GRU(3, WIDTH, batch_first=texts_first)
        self.states, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        h = self.states(self.body(x if self.texts_first else x.transpose(0, 1))[0]).tanh()
        return self.head((h if self.texts_first else h.transpose(0, 1)).mean(1))


class Flattened(nn.Module):
    """Layers on all positions of all texts in one axis, text by text or position by position."""

    def __init__(self, texts_first):
        super().__init__()
        self.texts_first = texts_first
        self.inp, self.mid, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        h = (x if self.texts_first else x.transpose(0, 1)).flatten(0, 1)
        h = torch.tanh(self.mid(torch.tanh(self.inp(h)))).unflatten(
            0, (len(x), -1) if self.texts_first else (-1, len(x))
        )
        return self.head((h if self.texts_first else h.transpose(0, 1)).mean(1))


class Columns(nn.Module):
    """A linear layer in the middle whose examples lie on the third of four axes."""

    def __init__(self, texts_first):
        super().__init__()
        self.texts_first = texts_first
        self.inp, self.mid, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        h = torch.tanh(self.inp(x)).unsqueeze(2)
        h = torch.tanh(self.mid(h if self.texts_first else h.permute(1, 2, 0, 3)))
        return self.head((h if self.texts_first else h.permute(2, 0, 1, 3)).mean((1, 2)))


TWINS = {  # what has another layout, and the components there
    "encoder": (
        Encoder,
        lambda model: coar.input_features(model, include="enc*") + coar.neurons(model, include="enc*linear1"),
    ),
    "heads of the encoder": (Encoder, coar.attention_heads),
    "recurrent": (Recurrent, lambda model: coar.neurons(model, include="states") + coar.modules(model, ["body"])),
    "flattened": (Flattened, lambda model: coar.neurons(model, include=["inp", "mid"])),
    "third axis": (Columns, lambda model: coar.neurons(model, include="mid")),
}


def texts(positions, seed):
    x = inputs(6, positions, 3, seed=seed)
    return coar.Examples(inputs=x, targets=torch.arange(6) % CLASSES)


def twins(kind):
    """The same net twice: texts first, and the layout that is tested."""
    torch.manual_seed(2)
    first, other = (TWINS[kind][0](texts_first).eval() for texts_first in (True, False))
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.mul_(1.5)
    other.load_state_dict(first.state_dict())
    return first, other


def test_means_of_a_model_of_ones_own_follow_its_layout():
    """Constants are computed on the model itself here, and not on a copy made for a run."""
    one, other = twins("encoder")
    ablation, components = coar.PositionMean(calibration=texts(5, 4)), coar.input_features(one, include="*.linear2")
    means = [ablation.replacements(net, components, batch_size=4) for net in (one, other)]
    assert means[0].shape == (5, components.width)
    assert torch.allclose(*means, atol=1e-6)


@pytest.mark.parametrize("positions", [5, 6], ids=["5 positions", "as many positions as texts"])
@pytest.mark.parametrize("kind", TWINS)
def test_examples_may_lie_along_any_axis(kind, positions, tmp_path):
    """Mask gradients, gradients at the full model, constants and resampling are those of the net with texts first."""
    calibration = texts(positions, 5)
    ablations = [coar.Resample() if positions == len(calibration) else coar.ZeroActivation()]
    if kind in ("encoder", "heads of the encoder"):
        ablations.append(coar.PositionMean(calibration=calibration))
    elif kind != "recurrent":
        ablations.append(coar.Mean(calibration=calibration))
    for number, ablation in enumerate(ablations):
        found = []
        for net in twins(kind):
            what = coar.Study(
                model=net,
                examples=texts(positions, 3),
                components=TWINS[kind][1](net),
                ablation=ablation,
                sampler=coar.BernoulliSampler(ablated_fraction=0.4),
            )
            folder = tmp_path / f"{number} {net.texts_first}"
            gradients = 0 if isinstance(ablation, coar.PositionMean) else 8
            run = collect(what, folder, masks=6, gradients=gradients)
            parts = [run.array("outputs")[:], run.replacements]
            if gradients:
                parts += [run.array(name)[:] for name in ("gradient_kept", "gradient_ablated", "gradient_outputs")]
            if not isinstance(ablation, coar.Resample) and gradients:
                parts.append(coar.mask_gradient(what, run, device="cpu", progress=False).weights())
            found.append(parts)
        for one, other in zip(*found, strict=True):
            assert np.allclose(one, other, atol=1e-5, equal_nan=True)
