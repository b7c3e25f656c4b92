"""Models whose weights are no ordinary tensors: quantised, sparse, of other classes, or with extra state."""

import numpy as np
import pytest
import torch
from torch import nn

import coar
from coar.errors import AblationError, ComponentError, EditError, WeightsError
from coar.weights import state_fingerprint, weights_fingerprint
from tests import oracles
from tests.test_everyday_models import assert_exact, hooked, masks_and_outputs

deprecated = pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated",
    "ignore:torch.quantize_per_tensor",
    "ignore:quantized..linear_dynamic. an autograd kernel was not registered",
)


def plain():
    torch.manual_seed(3)
    return oracles.rough(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))).eval().requires_grad_(False)


def inputs():
    """Examples with equal extremes, so that a scale of activations by the batch's extremes is that of any batch."""
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).clamp(-2.9, 2.9)
    x[:, 0], x[:, 1] = 3, -3
    return x


def dynamic(layers):
    return torch.ao.quantization.quantize_dynamic(plain(), layers, dtype=torch.qint8)


def eight_bits():
    import bitsandbytes as bnb

    model = plain()
    layer = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(model[0].weight.data, requires_grad=False, has_fp16_weights=False)
    layer.bias, model[0] = model[0].bias, layer
    model.to("cpu")(inputs())
    return model.eval()


def four_bits():
    import bitsandbytes as bnb

    model = plain()
    layer = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=False)
    layer.load_state_dict(model[0].state_dict())
    model[0] = layer.to("cpu")
    return model.eval()


def torchao():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = plain()
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda _module, name: name == "0")
    return model


packed = (pytest.mark.quantised, pytest.mark.filterwarnings("ignore"))  # of both libraries, at their import
MODELS = [
    pytest.param(lambda: dynamic({"0"}), id="dynamic", marks=deprecated),
    pytest.param(eight_bits, id="bitsandbytes, 8 bits", marks=packed),
    pytest.param(four_bits, id="bitsandbytes, 4 bits", marks=packed),
    pytest.param(torchao, id="torchao", marks=packed),
]
FINDERS = {
    "outputs of the quantised layer": lambda model: coar.neurons(model, include="0"),
    "inputs of the quantised layer": lambda model: coar.input_features(model, include="0")[2:],
    "the layer after it": lambda model: coar.input_features(model, include="2"),
    "a module": lambda model: coar.modules(model, "1", axis=-1, size=64) + coar.neurons(model, include="2")[:2],
}


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("find", FINDERS.values(), ids=FINDERS)
def test_components_of_quantised_models_are_ablated_exactly(tmp_path, make, find):
    model = make()
    components = coar.Components(find(model))
    before = {name: str(value) for name, value in model.state_dict().items()}
    masks, found, targets = masks_and_outputs(model, inputs(), components, tmp_path / "r.zarr")
    assert {name: str(value) for name, value in model.state_dict().items()} == before
    logits = [hooked(model, inputs(), components, mask) for mask in masks]  # bitsandbytes changes its state in a pass
    expected = [oracles.read_outputs(rows, targets, "logsumexp") for rows in logits]
    assert np.std(expected, axis=0).max() > 0.01
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", MODELS)
def test_quantised_weights_are_hashed_and_not_edited(tmp_path, make):
    model = make()
    assert weights_fingerprint(model) == weights_fingerprint(make())
    x, components = inputs(), coar.neurons(model)
    study = coar.Study(
        model=model,
        examples=coar.Examples(inputs=x, targets=torch.arange(8) % 4),
        components=components,
        ablation=coar.ZeroActivation(),
    )
    run = coar.collect(study, tmp_path / "r.zarr", masks=40, device="cpu", progress=False)
    origin = coar.fit(run, progress=False).origin

    def edit(row):
        parts = components[row : row + 1], (0.0,), (1.0,), None, "ZeroActivation", dict(origin.batch_norms)
        return coar.Edit(*parts, weights_fingerprint(model))

    with pytest.raises(EditError, match=r"'0' is held by a .*, quantised, and edits change weights of ordinary"):
        edit(3).apply(model)
    edited = edit(64 + 1).apply(model)
    with torch.no_grad():
        expected = model(x)
        expected[:, 1] = 0
        torch.testing.assert_close(edited(x), expected)


@deprecated
def test_a_model_without_any_parameter_runs(tmp_path):
    plain_model = oracles.rough(nn.Sequential(nn.Linear(64, 4), nn.Tanh()))
    model = torch.ao.quantization.quantize_dynamic(plain_model, {nn.Linear}, dtype=torch.qint8)
    assert next(model.parameters(), None) is None
    components = coar.neurons(model) + coar.modules(model, "1", axis=-1, size=4)
    assert_exact(model, inputs(), components, tmp_path / "r.zarr", ablation=coar.ZeroActivation())
    with pytest.raises(ComponentError, match="parameter"):
        coar.parameter_slices(model, "*")


@deprecated
def test_gradients_that_a_quantised_layer_cuts_off_are_an_error(tmp_path):
    model = dynamic({"0"})
    before = coar.Components(list(coar.input_features(model, include="0"))[2:])
    with pytest.raises(AblationError, match="has no derivative in torch, such as a layer of quantize_dynamic"):
        masks_and_outputs(model, inputs(), before, tmp_path / "r.zarr", gradients=8)
    behind = coar.neurons(model, include="2")
    masks_and_outputs(model, inputs(), behind, tmp_path / "behind.zarr", gradients=8)


@deprecated
def test_a_scale_by_the_batch_is_an_error(tmp_path):
    """The second layer's inputs are scaled by the largest of the batch, so examples depend on each other."""
    model = dynamic({"2"})
    with pytest.raises(AblationError, match="when other examples are in its batch"):
        masks_and_outputs(model, inputs(), coar.neurons(model, include="0"), tmp_path / "r.zarr")


@deprecated
def test_packed_weights_are_told_apart():
    model, other = dynamic({"0"}), plain()
    with torch.no_grad():
        other[0].weight[0, 0] += 0.5
    changed = torch.ao.quantization.quantize_dynamic(other, {"0"}, dtype=torch.qint8)
    assert weights_fingerprint(model) != weights_fingerprint(changed)


class TwoParts(torch.Tensor):
    """A tensor class that keeps its numbers in two other tensors, as quantised weights of libraries do."""

    @staticmethod
    def __new__(cls, whole, scale):
        return torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=torch.float32)

    def __init__(self, whole, scale):
        self.whole, self.scale = whole, scale

    def __tensor_flatten__(self):
        return ["whole", "scale"], {"bits": 8}

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(f"{function} is not for this tensor")


def compressed(values):
    dense = torch.zeros(2, 3)
    dense[0, 2], dense[1, 0] = values
    return dense.to_sparse_csr()


def by_channel(scales):
    """Quantised numbers whose integers are all 2, whatever the scales are."""
    scale = torch.tensor(scales)
    return torch.quantize_per_channel(2 * scale[:, None].expand(2, 2), scale, torch.zeros(2), 0, torch.qint8)


STATES = {  # a maker and two arguments
    "sparse": (lambda v: torch.sparse_coo_tensor([[0, 1], [2, 0]], v, (2, 3)), [1.0, 2.0], [1.0, 3.0]),
    "compressed": (compressed, [1.0, 2.0], [2.0, 2.0]),
    "quantised": (
        lambda scale: torch.quantize_per_tensor(torch.full((3,), 2 * scale), scale, 0, torch.qint8),
        0.5,
        1.0,
    ),
    "by channel": (by_channel, [0.5, 0.5], [0.5, 0.25]),
    "of 8 bits": (lambda v: torch.full((3,), v).to(torch.float8_e4m3fn), 1.0, 2.0),
    "of a class": (lambda v: TwoParts(torch.ones(2), torch.tensor([v])), 1.0, 2.0),
    "whole numbers": (torch.tensor, 3, 4),
    "nested": (lambda v: {"a": [1, torch.tensor([v])]}, 1.0, 2.0),
    "text": (str, "nf4", "fp4"),
    "numpy": (np.arange, 3, 4),
}


@pytest.mark.filterwarnings("ignore")  # of torch, on its support of these kinds
@pytest.mark.parametrize(("make", "one", "other"), STATES.values(), ids=STATES)
def test_state_of_every_kind_is_hashed_by_its_content(make, one, other):
    hashes = [state_fingerprint({"part": make(value)}) for value in (one, one, other)]
    assert hashes[0] == hashes[1]
    assert hashes[0] != hashes[2]


class Extra(nn.Module):
    """A layer with extra state."""

    def __init__(self, state):
        super().__init__()
        self.layer, self.state = plain(), state

    def get_extra_state(self):
        return self.state

    def forward(self, x):
        return self.layer(x)


def test_extra_state_is_hashed_or_refused():
    assert weights_fingerprint(Extra({"steps": 3})) != weights_fingerprint(Extra({"steps": 4}))
    assert weights_fingerprint(Extra({"steps": 3})) == weights_fingerprint(Extra({"steps": 3}))
    with pytest.raises(WeightsError, match=r"_extra_state/'handle'\", a object whose content cannot be hashed"):
        weights_fingerprint(Extra({"handle": object()}))


def test_slices_of_quantised_parameters_are_refused(tmp_path):
    model = plain()
    model.register_parameter("codes", nn.Parameter(torch.ones(4, dtype=torch.int8), requires_grad=False))
    with pytest.raises(AblationError, match=r"'codes' is a Parameter of torch\.int8, and slices of a quantised"):
        masks_and_outputs(
            model, inputs(), coar.parameter_slices(model, "codes"), tmp_path / "r.zarr", coar.ZeroWeight()
        )
