"""Every number a run stores is the number that a slow, plain forward pass gives."""

import numpy as np
import pytest
import torch
import zarr
from torch import nn
from torchvision.models import resnet18

import coar
from tests import nets, oracles

MASKS, TEST_MASKS = 5, 2
KINDS = {
    "logsumexp": coar.CorrectClassMargin(),
    "largest": coar.CorrectClassMargin(against="largest"),
    "logit": coar.ClassLogit(),
    "loss": coar.CrossEntropy(),
}


def sample(shape, classes, *, seed):
    generator = torch.Generator().manual_seed(seed)
    return coar.Examples(
        inputs=torch.randn(*shape, generator=generator),
        targets=torch.randint(classes, (shape[0],), generator=generator),
    )


def digits_case(request):
    digits = request.getfixturevalue("digits")
    return digits.model(), digits.split()["studied"].subset(range(30)), digits.split()["train"].subset(range(50))


def cifar10_case(request):
    cifar10 = request.getfixturevalue("cifar10")
    return cifar10.model(), cifar10.examples("test", slice(24)), cifar10.examples("train", slice(40))


def resnet18_case(_request):
    model = oracles.rough(resnet18(num_classes=7))
    return model, sample((12, 3, 64, 64), 7, seed=1), sample((16, 3, 64, 64), 7, seed=2)


def planar_case(_request):
    return oracles.rough(nets.PlanarNet()), sample((24, 4, 8, 8), 5, seed=1), sample((30, 4, 8, 8), 5, seed=2)


def line_and_volume_case(_request):
    model = oracles.rough(nets.LineAndVolumeNet())
    return model, sample((24, 3, 16), 5, seed=1), sample((30, 3, 16), 5, seed=2)


def mlp_case(request):
    digits = request.getfixturevalue("digits")
    studied, train = digits.split()["studied"].subset(range(30)), digits.split()["train"]
    x, y = train.block(0, len(train))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), studied, train.subset(range(100))


CASES = {
    "digits": (digits_case, coar.conv_filters),
    "cifar10": (cifar10_case, coar.conv_filters),
    "resnet18": (resnet18_case, coar.conv_filters),
    "planar": (planar_case, coar.conv_filters),
    "line and volume": (line_and_volume_case, coar.conv_filters),
    "mlp": (mlp_case, coar.neurons),
}


def stored_masks(path, components):
    """Masks as any reader of the format would unpack them."""
    packed = np.asarray(zarr.open_group(path, mode="r")["masks"][:])
    assert packed.shape[1] == -(-components // 8)
    return np.unpackbits(packed, axis=1, count=components, bitorder="little").astype(bool)


def collect(model, examples, components, ablation, path, *, kind="logsumexp", fraction=0.2):
    study = coar.Study(
        model=model,
        examples=examples,
        components=components,
        output=KINDS[kind],
        ablation=ablation,
        sampler=coar.BernoulliSampler(ablated_fraction=fraction, seed=3),
    )
    coar.collect(
        study,
        path,
        masks=MASKS,
        test_masks=TEST_MASKS,
        device="cpu",
        execution=coar.Execution(mask_block=4),
        progress=False,
    )
    group = zarr.open_group(path, mode="r")
    return np.asarray(group["outputs"][:]), np.asarray(group["base_output"][:]), stored_masks(path, len(components))


def ablated(components, mask):
    return [(row.site, row.position) for row, keep in zip(components, mask, strict=True) if not keep]


def expected_outputs(model, examples, calibration, components, masks, *, mean, kind="logsumexp"):
    x, y = examples.block(0, len(examples))
    if not mean:
        return [oracles.zeroed_outputs(model, x, y, ablated(components, mask), kind) for mask in masks]
    calibrating = calibration.block(0, len(calibration))[0]
    means = {site: oracles.channel_means(model, calibrating, site) for site in {row.site for row in components}}
    return [
        oracles.replaced_outputs(
            model, x, y, {(site, row): means[site][row] for site, row in ablated(components, mask)}, kind
        )
        for mask in masks
    ]


@pytest.mark.parametrize("mean", [False, True], ids=["zero weight", "mean"])
@pytest.mark.parametrize("case", CASES)
def test_stored_outputs_are_those_of_plain_forwards(case, mean, request, tmp_path):
    make, find = CASES[case]
    model, examples, calibration = make(request)
    components = find(model)
    ablation = coar.Mean(calibration=calibration) if mean else coar.ZeroWeight()
    outputs, base, masks = collect(model, examples, components, ablation, tmp_path / "run.zarr")
    assert outputs.shape == (MASKS + TEST_MASKS, len(examples))
    assert not masks.all(axis=1).any()
    x, y = examples.block(0, len(examples))
    expected = expected_outputs(model, examples, calibration, components, masks, mean=mean)
    np.testing.assert_allclose(outputs, expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(base, oracles.zeroed_outputs(model, x, y, []), rtol=0, atol=1e-4)
    assert np.abs(outputs - base).mean() > 0.05  # else the comparison would say nothing


@pytest.mark.parametrize("kind", KINDS)
def test_every_output_function_is_stored_right(kind, tmp_path):
    model, examples, calibration = planar_case(None)
    components = coar.conv_filters(model) + coar.neurons(model)
    outputs, base, masks = collect(
        model, examples, components, coar.Mean(calibration=calibration), tmp_path / "run.zarr", kind=kind
    )
    x, y = examples.block(0, len(examples))
    expected = expected_outputs(model, examples, calibration, components, masks, mean=True, kind=kind)
    np.testing.assert_allclose(outputs, expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(base, oracles.zeroed_outputs(model, x, y, [], kind), rtol=0, atol=1e-4)


def test_parameter_slices_give_what_their_filters_give(digits, tmp_path):
    model, examples = digits.model(), digits.split()["studied"].subset(range(30))
    filters = coar.conv_filters(model)
    slices = coar.parameter_slices(model, [f"{site}.weight" for site, _, _ in filters.sites()])
    assert [f"{row.site}.weight" for row in filters] == [row.site for row in slices]
    by_filter = collect(model, examples, filters, coar.ZeroWeight(), tmp_path / "filters.zarr")
    by_slice = collect(model, examples, slices, coar.ZeroWeight(), tmp_path / "slices.zarr")
    for one, other in zip(by_filter, by_slice, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def test_wide_slices_along_another_axis_zero_what_they_name(tmp_path):
    model, examples, _ = planar_case(None)
    components = coar.parameter_slices(model, "last.weight", axis=1, size=2)
    outputs, _, masks = collect(model, examples, components, coar.ZeroWeight(), tmp_path / "run.zarr", fraction=0.5)
    x, y = examples.block(0, len(examples))
    for mask, row in zip(masks, outputs, strict=True):
        net = oracles.zeroed(model, [])
        with torch.no_grad():
            for pair in np.flatnonzero(~mask):
                net.last.weight[:, 2 * pair : 2 * pair + 2] = 0
        expected = oracles.read_outputs(oracles.forward(net, x), y, "logsumexp")
        np.testing.assert_allclose(row, expected, rtol=0, atol=1e-4)


def test_the_study_model_may_be_in_training_mode_and_stays_so(digits, tmp_path):
    model, examples = digits.model(), digits.split()["studied"].subset(range(20))
    expected, *_ = collect(model, examples, coar.conv_filters(model), coar.ZeroWeight(), tmp_path / "one.zarr")
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    outputs, *_ = collect(model, examples, coar.conv_filters(model), coar.ZeroWeight(), tmp_path / "two.zarr")
    np.testing.assert_array_equal(outputs, expected)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class PlaneAndVolume(nn.Module):
    """A 2-d and a 3-d convolution in one model."""

    def __init__(self):
        super().__init__()
        self.plane = nn.Conv2d(2, 4, 3)
        self.volume = nn.Conv3d(4, 6, (1, 3, 3))
        self.last = nn.Linear(6, 5)

    def forward(self, x):
        x = torch.relu(self.plane(x))[:, :, None]
        return self.last(torch.tanh(self.volume(x)).amax((2, 3, 4)) * 3)


@pytest.mark.parametrize("mean", [False, True], ids=["zero weight", "mean"])
def test_models_with_both_2d_and_3d_convolutions(mean, tmp_path):
    model = oracles.rough(PlaneAndVolume())
    examples, calibration = sample((16, 2, 8, 8), 5, seed=1), sample((16, 2, 8, 8), 5, seed=2)
    components = coar.conv_filters(model)
    ablation = coar.Mean(calibration=calibration) if mean else coar.ZeroWeight()
    outputs, _, masks = collect(model, examples, components, ablation, tmp_path / "run.zarr")
    expected = expected_outputs(model, examples, calibration, components, masks, mean=mean)
    np.testing.assert_allclose(outputs, expected, rtol=0, atol=1e-4)


class Encoder(nn.Module):
    """A transformer layer, whose attention reads the weights of its output layer without calling it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.last = nn.Linear(8, 5)
        oracles.rough(self)

    def forward(self, x):
        return self.last(self.layer(x).mean(1)) * 3


def test_neurons_of_layers_that_are_read_without_a_call(tmp_path):
    model, examples = Encoder(), sample((16, 6, 8), 5, seed=1)
    components = coar.neurons(model)
    assert any(row.site == "layer.self_attn.out_proj" for row in components)
    outputs, _, masks = collect(model, examples, components, coar.ZeroWeight(), tmp_path / "run.zarr")
    expected = expected_outputs(model, examples, None, components, masks, mean=False)
    np.testing.assert_allclose(outputs, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mean", [False, True], ids=["zero weight", "mean"])
@pytest.mark.parametrize("wiring", nets.WIRINGS)
def test_batch_norms_wired_in_other_ways(wiring, mean, tmp_path):
    model = nets.Wired(nets.WIRINGS[wiring][0])
    examples, calibration = sample((16, 3, 5, 5), 4, seed=1), sample((16, 3, 5, 5), 4, seed=2)
    components = coar.conv_filters(model)
    ablation = coar.Mean(calibration=calibration) if mean else coar.ZeroWeight()
    outputs, _, masks = collect(model, examples, components, ablation, tmp_path / "run.zarr", fraction=0.4)
    expected = expected_outputs(model, examples, calibration, components, masks, mean=mean)
    np.testing.assert_allclose(outputs, expected, rtol=0, atol=1e-4)


def test_inputs_by_name_and_as_a_data_set_give_what_a_tensor_gives(tmp_path):
    model, examples, calibration = planar_case(None)
    x, y = examples.block(0, len(examples))
    ways = {
        "tensor": examples,
        "dict": coar.Examples(inputs={"x": x}, targets=y),
        "dataset": coar.Examples(inputs=torch.utils.data.TensorDataset(x, y), targets=y),
    }
    ablation = coar.Mean(calibration=calibration)
    runs = {
        name: collect(model, way, coar.conv_filters(model), ablation, tmp_path / f"{name}.zarr")[0]
        for name, way in ways.items()
    }
    np.testing.assert_allclose(runs["dict"], runs["tensor"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(runs["dataset"], runs["tensor"], rtol=0, atol=1e-5)
