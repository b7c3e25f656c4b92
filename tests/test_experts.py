"""Experts of mixtures: which there are, that ablating one leaves it out, and mixtures that are not understood."""

from copy import deepcopy

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import coar
from coar.components.table import Component
from coar.errors import AblationError, ComponentError, EditError
from coar.gates.folding import fold
from coar.gates.gates import Gates
from coar.outputs.base import Output
from tests import architectures, oracles, tiny

MIXTURES = {
    "Mixtral": "body.model.layers.{}.mlp.experts",
    "GPT-OSS": "body.model.layers.{}.mlp.experts",
    "Qwen MoE": "body.model.layers.{}.mlp.experts",
}


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_of_a_stack_are_all_that_each_of_them_returns(name):
    model = architectures.ARCHITECTURES[name].make()
    paths = [MIXTURES[name].format(layer) for layer in (0, 1)]
    assert list(coar.experts(model)) == [
        Component(f"{path}.expert[{i}]", "expert", path, "expert", -1, 12 * i, 12) for path in paths for i in range(4)
    ]
    assert coar.experts(model, include="*.1.*").names == coar.experts(model, exclude="*.0.*").names


@pytest.mark.parametrize("name", MIXTURES)
def test_a_run_over_experts_is_the_oracles_and_an_edit_leaves_them_out(name, tmp_path):
    class First(Output):
        """The first logit, whatever the target."""

        def __call__(self, result, targets):
            return result[: len(targets), 0]

    architecture = architectures.ARCHITECTURES[name]
    model, x = architecture.make(), architecture.inputs(1)
    components = coar.experts(model)
    study = coar.Study(
        model=model,
        examples=coar.Examples(inputs=x, targets=torch.zeros(len(x))),
        components=components,
        output=First(),
        sampler=coar.BernoulliSampler(ablated_fraction=0.4),
    )
    run = coar.collect(study, tmp_path / "r.zarr", masks=5, device="cpu", progress=False)
    masks = run.plan.masks(run.sampler, run.n_components, 0, 5)
    for mask, row in zip(masks, run.array("outputs")[:], strict=True):
        left_out = [components[i] for i in np.flatnonzero(~mask)]
        biases = {row.name: architectures.last_bias(model, row) for row in left_out}
        expected = oracles.forward(architectures.without_experts(model, left_out, biases), x)
        np.testing.assert_allclose(row, expected[:, 0], atol=1e-4)
        edited = deepcopy(model)
        fold(edited, left_out, [tuple(biases[row.name]) for row in left_out], batch_norms={})
        torch.testing.assert_close(oracles.forward(edited, x), expected, rtol=0, atol=1e-4)


def test_constants_of_experts_become_permanent_where_the_mixture_has_biases():
    for name in MIXTURES:
        architecture = architectures.ARCHITECTURES[name]
        model, x = architecture.make(), architecture.inputs(1)
        expert = coar.experts(model)[6]
        constants = tuple(0.1 * i - 0.5 for i in range(12))
        edited = deepcopy(model)
        if name == "GPT-OSS":
            fold(edited, [expert], [constants], batch_norms={})
            expected = oracles.forward(architectures.without_experts(model, [expert], {expert.name: constants}), x)
            torch.testing.assert_close(oracles.forward(edited, x), expected, rtol=0, atol=1e-5)
        else:
            with pytest.raises(EditError, match=r"expert\[2\]' is an expert of a mixture without biases"):
                fold(edited, [expert], [constants], batch_norms={})


def test_gates_on_experts_carry_gradients_and_leave_nothing_behind():
    architecture = architectures.ARCHITECTURES["GPT-OSS"]
    model, x = architecture.make().double(), architecture.inputs(1)
    model.body.config._experts_implementation = "eager"  # the faster one knows no float64
    components, before = coar.experts(model), oracles.snapshot(model)
    constants = torch.randn(components.width, generator=torch.Generator().manual_seed(0)).double()
    keep = torch.rand(len(x), len(components), generator=torch.Generator().manual_seed(1)).double()
    with Gates(model, components, constants, use_hooks=True) as gates:
        live = keep.clone().requires_grad_()
        gates.set(live)
        (gradient,) = torch.autograd.grad(model(x).sum(), live)
        for column in range(len(components)):
            ends = []
            for step in (3e-3, -3e-3):  # its norms are computed in float32
                moved = keep.clone()
                moved[:, column] += step
                gates.set(moved)
                with torch.no_grad():
                    ends.append(model(x).sum(1))
            torch.testing.assert_close(gradient[:, column], (ends[0] - ends[1]) / 6e-3, rtol=1e-2, atol=2e-3)
    assert (gradient.abs() > 1e-3).any(0).all()
    oracles.assert_same(before, oracles.snapshot(model))


def test_experts_take_no_sources_and_no_constants_by_position():
    model = architectures.ARCHITECTURES["Mixtral"].make()
    components = coar.experts(model)
    with pytest.raises(AblationError, match="an expert, and the tokens of a resample source"):
        Gates(model, components, torch.zeros(components.width), resample=True)
    with pytest.raises(AblationError, match="an expert, and tokens are sent to it without their positions"):
        Gates(model, components, torch.zeros(4, components.width))


class Sorted(nn.Module):
    """Experts in one parameter, whose tokens come sorted, and weighed before."""

    def __init__(self):
        super().__init__()
        self.down_proj = nn.Parameter(torch.randn(3, 4, 6))

    def forward(self, states):
        return torch.bmm(states.view(3, -1, 4), self.down_proj)


def test_experts_without_routing_are_slices_that_can_be_zeroed():
    model, states = nn.ModuleDict({"experts": Sorted()}), torch.randn(9, 4)
    components = coar.experts(model)
    assert components[2] == Component("experts.expert[2]", "expert", "experts.down_proj", "parameter", 0, 2, 1)
    plain = model["experts"](states)
    with Gates(model, components, torch.zeros(3)) as gates, torch.no_grad():
        gates.set(torch.tensor([True, False, True]))
        found = model["experts"](states)
    torch.testing.assert_close(found, plain * torch.tensor([1.0, 0.0, 1.0])[:, None, None])
    examples = coar.Examples(inputs=states, targets=torch.zeros(9))
    with pytest.raises(AblationError, match=r"'experts.expert\[0\]' is a slice of a parameter and has no activations"):
        coar.Mean(calibration=examples).replacements(model, components, batch_size=4)


class Weighing(nn.Module):
    """Experts in one parameter, which a user weighs in some way of their own."""

    def __init__(self, weigh):
        super().__init__()
        self.down_proj, self.weigh = nn.Parameter(torch.randn(3, 6, 6)), weigh

    def forward(self, states, index, weights):
        each = torch.einsum("nh,nkoh->nko", states, self.down_proj[index])
        return (each * self.weigh(weights)[..., None]).sum(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.randn(5, 6), torch.zeros(5, 2).long(), torch.rand(5, 2)), "the weighted sum .* they differ by"),
        ((torch.randn(5, 6), torch.rand(5, 2), torch.zeros(5, 2).long()), r"called with 3 arguments, .* \(5, 2\)"),
        ((torch.randn(5, 6), torch.zeros(5).long(), torch.rand(5)), r"shapes \[\(5, 6\), \(5,\), \(5,\)\]"),
    ],
)
def test_mixtures_that_do_not_weigh_their_experts_are_errors(arguments, message):
    model = nn.ModuleDict({"experts": Weighing(torch.square)})
    components = coar.experts(model)
    before = oracles.snapshot(model)
    with Gates(model, components, torch.zeros(18)), pytest.raises(AblationError, match=message):
        model["experts"](*arguments)
    oracles.assert_same(before, oracles.snapshot(model))
    plain = nn.ModuleDict({"experts": Weighing(lambda weights: weights)})
    states, index, weights = torch.randn(5, 6), torch.randint(3, (5, 2)), torch.rand(5, 2)
    with Gates(plain, components, torch.zeros(18)) as gates, torch.no_grad():
        gates.set(torch.tensor([True, False, True]))
        found = plain["experts"](states, weights=weights, index=index)
    torch.testing.assert_close(found, plain["experts"](states, index, weights * (index != 1)))


def test_experts_that_calibration_never_reaches_are_errors():
    architecture = architectures.ARCHITECTURES["Mixtral"]
    examples = coar.Examples(inputs=architecture.inputs(9)[:1, :1], targets=torch.zeros(1))
    model = architecture.make()
    with pytest.raises(AblationError, match=r"was sent none of the calibration examples' tokens, .* give more"):
        coar.Mean(calibration=examples).replacements(model, coar.experts(model), batch_size=2)


class Expert(nn.Module):
    """A feed-forward net of a user's own."""

    def __init__(self, last="down_proj"):
        super().__init__()
        self.first = nn.Linear(6, 8)
        setattr(self, last, nn.Linear(8, 6, bias=False))
        self.last = last

    def forward(self, x):
        return getattr(self, self.last)(torch.relu(self.first(x)))


class Mixture(nn.Module):
    """Experts in a list, each given the tokens that a router sends it."""

    def __init__(self, **settings):
        super().__init__()
        self.router, self.experts = nn.Linear(6, 3), nn.ModuleList(Expert(**settings) for _ in range(3))

    def forward(self, x, left_out=()):
        weights, chosen = self.router(x).softmax(-1).topk(2)
        total = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, place = (chosen == i).nonzero(as_tuple=True)
            if i not in left_out:
                total = total.index_add(0, rows, expert(x[rows]) * weights[rows, place, None])
        return total


def test_experts_in_a_list_are_what_their_last_layers_read():
    model, x = Mixture().requires_grad_(False), torch.randn(9, 6)
    components = coar.experts(model)
    assert components[1] == Component("experts.expert[1]", "expert", "experts.1.down_proj", "input", -1, 0, 8)
    with Gates(model, components, torch.zeros(24)) as gates:
        for left_out in ([], [0], [1, 2], [0, 1, 2]):
            gates.set(torch.tensor([i not in left_out for i in range(3)]))
            torch.testing.assert_close(model(x), model.forward(x, left_out))
    with Gates(model, components, torch.zeros(24), use_hooks=True) as gates:
        gates.set(torch.ones(9, 3))
        with pytest.raises(AblationError, match="first axis must hold all entries of a row"):
            model(x)  # an expert sees some tokens of all examples


@pytest.mark.parametrize("label", ["mean", "peak"])
def test_experts_in_a_list_become_constants_of_the_tokens_they_were_given(label):
    model, x = Mixture().requires_grad_(False), torch.randn(40, 6)
    components, examples = coar.experts(model), coar.Examples(inputs=x, targets=torch.zeros(40))
    found = coar.choose_ablation(label, calibration=examples).replacements(model, components, batch_size=16)
    chosen = model.router(x).softmax(-1).topk(2).indices
    constants = []
    for i, expert in enumerate(model.experts):
        states = torch.relu(expert.first(x[(chosen == i).any(1)])).double()  # of the tokens that the router sends it
        constants.append(states.mean(0) if label == "mean" else [oracles.peak(v.tolist(), 128) for v in states.T])
    constants = torch.stack([torch.as_tensor(values, dtype=torch.float32) for values in constants])
    torch.testing.assert_close(found, constants.flatten(), rtol=0, atol=1e-5)
    patches = [("experts.2.down_proj", "input", -1, 0, 8, constants[2])]
    expected = oracles.patched(model, x, patches)
    with Gates(model, components, found) as gates, torch.no_grad():
        gates.set(torch.tensor([True, True, False]))
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)
    edited = deepcopy(model)
    fold(edited, [components[2]], [tuple(found[16:].tolist())], batch_norms={})
    torch.testing.assert_close(oracles.forward(edited, x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "seen"),
    [
        (nn.ModuleDict({"experts": Expert(last="mystery")}), ["'experts.first'", "Linear with parameters", "(8, 6)"]),
        (Mixture(last="mystery"), ["'experts.0'", "an Expert with", "'mystery': 'Linear'"]),
        (nn.ModuleDict({"experts": nn.Linear(2, 3)}), ["'experts'", "'weight': (3, 2)"]),
    ],
)
def test_mixtures_that_are_not_understood_are_errors_that_say_what_was_seen(model, seen):
    with pytest.raises(ComponentError, match=r"cannot determine the experts of") as raised:
        coar.experts(model)
    assert [part for part in seen if part not in str(raised.value).replace("a Expert", "an Expert")] == []


def test_models_without_mixtures_and_patterns_without_effect_are_errors():
    with pytest.raises(ComponentError, match="Pooled has no mixture of experts"):
        coar.experts(tiny.model("llama"))
    with pytest.raises(ComponentError, match="'9' matches no mixture of experts"):
        coar.experts(Mixture(), include="9")


def test_every_family_of_transformers_with_fused_experts_is_found():
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    small |= {"vocab_size": 20, "num_key_value_heads": 1, "moe_intermediate_size": 8, "head_dim": 8}
    configs = [
        (transformers.MixtralConfig(**small, num_local_experts=4), 8),
        (transformers.Qwen3MoeConfig(**small, num_experts=4, decoder_sparse_step=1), 8),
        (transformers.OlmoeConfig(**{**small, "num_experts": 4}), 8),
        (transformers.GptOssConfig(**small, num_local_experts=4), 8),
    ]
    for config, count in configs:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        assert len(coar.experts(model)) == count, type(config).__name__
        assert len(coar.attention_heads(model)) == 4
