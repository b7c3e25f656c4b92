"""Published attribution files, written by torch alone, in runs; their order is checked against models."""

import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import resnet50, vit_b_16
from torchvision.models.resnet import Bottleneck
from torchvision.models.vision_transformer import VisionTransformer
from typer.testing import CliRunner

import coar
from coar.cli.common import app
from coar.errors import (
    EditError,
    IncompleteRunError,
    MismatchError,
    PipelineError,
    RunError,
    SettingsError,
    WeightsError,
)
from coar.published import SETUPS, resnet_rows, vit_rows
from pipelines import cifar10
from tests import oracles
from tests.nets import OneStage

MARGIN = coar.CorrectClassMargin(against="largest")
EXAMPLES, HELD_OUT = 6, 24


def small_vit():
    torch.manual_seed(1)
    net = VisionTransformer(16, 8, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=12, num_classes=4)
    nn.init.normal_(net.heads.head.weight)
    return oracles.rough(net.eval())


class SmallResNet(nn.Module):
    """Torchvision's blocks with shortcuts, in two stages."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.fc = nn.Conv2d(3, 2, 3, bias=False), nn.BatchNorm2d(2), nn.Linear(12, 4)
        for name, before, width in (("layer1", 2, 2), ("layer2", 8, 3)):
            shortcut = nn.Sequential(nn.Conv2d(before, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width))
            setattr(self, name, nn.Sequential(Bottleneck(before, width, downsample=shortcut)))

    def forward(self, x):
        return self.fc(self.layer2(self.layer1(self.bn1(self.conv1(x)).relu())).mean((2, 3)))


def small_resnet():
    torch.manual_seed(1)
    return oracles.rough(SmallResNet().eval())


FAMILIES = {
    "vit": (
        small_vit,
        lambda net: coar.parameter_slices(net, "*.in_proj_weight") + coar.neurons(net, exclude="heads.head"),
        {"rows": vit_rows(2, 8, 12), "biased": True},
        lambda name, module: not name.startswith("heads") and isinstance(module, nn.Linear | nn.MultiheadAttention),
    ),
    "resnet": (
        small_resnet,
        lambda net: coar.conv_filters(net, exclude="*.downsample.*"),
        {
            "rows": resnet_rows({"layer1": 1, "layer2": 1}, {"layer1": 2, "layer2": 3}, (1, 1, 4)),
            "biased": False,
        },
        lambda name, module: "conv" in name,
    ),
}


def published_rows(net, chosen):
    """The weights with rows of the file, in the order of `named_modules()`, and how many rows each has."""
    weights = [
        (module.in_proj_weight if isinstance(module, nn.MultiheadAttention) else module.weight)
        for name, module in net.named_modules()
        if chosen(name, module)
    ]
    return weights, sum(len(weight) for weight in weights)


def margins_without(net, chosen, mask, x, y):
    """Margins of the model whose rows at False are zero."""
    weights, _ = published_rows(net, chosen)
    kept = torch.split(torch.from_numpy(mask), [len(weight) for weight in weights])
    before = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight, keep in zip(weights, kept, strict=True):
            weight[~keep] = 0
        found = oracles.read_outputs(net(x), y, "largest")
        for weight, old in zip(weights, before, strict=True):
            weight.copy_(old)
    return found


def family(kind):
    make, components, rows, chosen = FAMILIES[kind]
    net = make()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(EXAMPLES, 3, 16, 16, generator=generator)
    y = torch.arange(EXAMPLES) % 4
    study = coar.Study(
        model=net,
        examples=coar.Examples(inputs=x, targets=y),
        components=components(net),
        output=MARGIN,
        ablation=coar.ZeroWeight(),
        sampler=coar.BernoulliSampler(ablated_fraction=0.02, seed=5),
    )
    setup = coar.PublishedSetup(name=f"small {kind}", examples=EXAMPLES, ablated_fraction=0.02, **rows)
    return study, setup, chosen


def leave_one_out(study, chosen):
    """What each row of the file raises the margins by, with torch alone: (rows, examples), and the plain margins."""
    x, y = study.examples.block(0, EXAMPLES)
    _, count = published_rows(study.model, chosen)
    plain = margins_without(study.model, chosen, np.ones(count, bool), x, y)
    rows = np.ones((count, count), bool) & ~np.eye(count, dtype=bool)
    return np.stack([plain - margins_without(study.model, chosen, mask, x, y) for mask in rows]), plain


@pytest.fixture(scope="module", params=FAMILIES)
def written(request, tmp_path_factory):
    study, setup, chosen = family(request.param)
    drops, plain = leave_one_out(study, chosen)
    file = tmp_path_factory.mktemp("published") / "attributions.pt"
    content = {
        "weight": torch.from_numpy(drops).float(),
        "bias": torch.from_numpy(plain - drops.sum(0)).float(),
        "lam": torch.full((EXAMPLES,), 0.01),
    }
    torch.save(content, file)
    return study, setup, file, content


def test_an_imported_file_predicts_outputs_under_held_out_masks(written, tmp_path):
    """Another order of components would predict nothing: the order is that of the model, whatever our tables say."""
    study, setup, file, content = written
    run = coar.import_published(file, tmp_path / "r.zarr", setup=setup, study=study, progress=False)
    with pytest.raises(IncompleteRunError, match="has no masks; run 'coar collect' on it, with --test-masks"):
        coar.evaluate(run)
    run = coar.collect(study, run.path, test_masks=HELD_OUT, device="cpu", progress=False)
    scores = coar.evaluate(run).table
    assert scores["fit"].tolist() == ["published"]
    assert scores["pearson"][0] > 0.8
    turned = torch.roll(content["weight"], 1, 0)[setup.places(study.components)].T.numpy()
    coar.add_fit(run, "shifted", turned, content["bias"].numpy())
    assert coar.evaluate(run, fits=["shifted"]).table["pearson"][0] < 0.5
    found = coar.load(run.path)
    assert (found.fit.method, run.published.dtype) == ("published", "float32")
    np.testing.assert_array_equal(found.penalty, content["lam"])


def test_a_file_comes_back_equal(written, tmp_path):
    study, setup, file, content = written
    half = tmp_path / "half.pt"
    torch.save({"weight": content["weight"].half(), "bias": content["bias"]}, half)
    for source, known in ((file, content), (half, torch.load(half))):
        for given in (None, study):
            path = tmp_path / f"{source.stem}-{given is None}.zarr"
            run = coar.import_published(source, path, setup=setup, study=given, progress=False)
            coar.export_published(run, tmp_path / "back.pt", setup=setup)
            back = torch.load(tmp_path / "back.pt")
            assert back.keys() == known.keys()
            assert all(torch.equal(back[key], known[key]) and back[key].dtype == known[key].dtype for key in known)
            assert coar.verify(run) == []


@pytest.mark.parametrize(
    ("name", "make", "find"),
    [
        ("imagenet_resnet50", resnet50, lambda net: coar.conv_filters(net, exclude="*.downsample.*")),
        ("imagenet_vit_b16", vit_b_16, FAMILIES["vit"][1]),
        ("cifar10", OneStage, lambda net: coar.conv_filters(net, include="*conv*")),
    ],
)
def test_setups_without_a_model_have_the_components_of_the_published_models(name, make, find):
    with torch.device("meta"):
        assert SETUPS[name].components() == find(make())


def one_stage(state, kept, pixels):
    """The logits of the authors' net by functions of torch, with the rows of the file that are not kept zeroed."""
    mean, std = torch.tensor([125.307, 122.961, 113.8575]), torch.tensor([51.5865, 50.847, 51.255])
    x = ((torch.from_numpy(pixels) - mean) / std).permute(0, 3, 1, 2)
    masks = iter(torch.from_numpy(kept).view(9, 256, 1, 1, 1))

    def convolved(x, path, number):
        y = torch.conv2d(x, state[f"{path}conv{number}.weight"] * next(masks), padding=1)
        norm = [state[f"{path}bn{number}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        return nn.functional.batch_norm(y, *norm, eps=1e-5)

    x = convolved(x, "", 1).relu()
    for path in (f"layer.{block}." for block in range(4)):
        x = (x + convolved(convolved(x, path, 1).relu(), path, 2)).relu()
    means = x.view(len(x), 256, 4, 8, 4, 8).mean((3, 5))  # of 8 x 8 pixels
    return means.flatten(1) @ state["linear.weight"].T + state["linear.bias"]


def one_stage_state():
    """Random numbers under the names of the authors' state dict, in which each block has two."""
    generator, state = torch.Generator().manual_seed(0), {}

    def random(*shape):
        return torch.randn(shape, generator=generator)

    for path, number, before in (("", 1, 3), *((f"layer.{i}.", n, 256) for i in range(4) for n in (1, 2))):
        norm, centred = f"{path}bn{number}.", {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
        state[f"{path}conv{number}.weight"] = random(256, before, 3, 3) * (2 / 9 / before) ** 0.5
        state |= {f"{norm}{name}": centre + 0.1 * random(256).abs() for name, centre in centred.items()}
        state[f"{norm}num_batches_tracked"] = torch.tensor(7)
    state |= {name.replace("layer.", "block"): value for name, value in state.items()}
    return state | {"linear.weight": random(10, 4_096) / 64, "linear.bias": random(10)}


def test_the_pipeline_of_cifar10_has_the_published_net_and_the_order_of_its_file(tmp_path, monkeypatch):
    """With two pictures of noise, and attributions of seven filters, in different layers, by torch alone."""
    random, state, rows = np.random.default_rng(0), one_stage_state(), [3, 255, 300, 900, 1_400, 1_800, 2_303]
    pixels, labels = random.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8), np.array([4, 7])
    pictures = {"test_images": pixels, "test_labels": labels, "train_images": pixels, "train_labels": labels}
    np.savez(tmp_path / "cifar10_subset.npz", **pictures)
    torch.save(state, tmp_path / "weights.pt")

    def margins(kept):
        return oracles.read_outputs(one_stage(state, kept, pixels), labels, "largest")

    def without(*chosen):
        kept = np.ones(2_304, bool)
        kept[list(chosen)] = False
        return kept

    plain, weight = margins(without()), np.zeros((2_304, 2))
    for row in rows:
        weight[row] = plain - margins(without(row))
    content = {"weight": torch.from_numpy(weight).float(), "bias": torch.from_numpy(plain - weight.sum(0)).float()}
    saved(tmp_path / "a.pt", content)
    monkeypatch.setenv("COAR_DATA", str(tmp_path))
    cifar10.images.cache_clear()
    with pytest.raises(PipelineError, match="set COAR_CIFAR10_PUBLISHED_WEIGHTS to its state dict"):
        cifar10.published()
    monkeypatch.setenv("COAR_CIFAR10_PUBLISHED_WEIGHTS", str(tmp_path / "weights.pt"))
    study, setup = cifar10.published(), replace(SETUPS["cifar10"], examples=2)
    cifar10.images.cache_clear()
    run = coar.import_published(tmp_path / "a.pt", tmp_path / "r.zarr", setup=setup, study=study, progress=False)
    run = coar.collect(study, run.path, test_masks=2, device="cpu", progress=False)
    places, masks = setup.places(study.components), run.plan.masks(run.sampler, run.n_components, 0, 2)
    in_file = np.empty_like(masks)
    in_file[:, places] = masks
    expected = np.stack([margins(kept) for kept in in_file])
    np.testing.assert_allclose(run.array("outputs")[:], expected, atol=1e-3 * np.abs(expected).max())
    held_out = np.stack([without(*rows[:2]), without(*rows[2:4]), without(*rows[4:])])
    predicted, true = coar.load(run.path).predict(held_out[:, places]), np.stack([margins(kept) for kept in held_out])
    assert np.corrcoef((predicted - plain).ravel(), (true - plain).ravel())[0, 1] > 0.9
    other = coar.load(run.path).predict(np.roll(held_out, 1, 1)[:, places])
    np.testing.assert_allclose(other, np.broadcast_to(plain, other.shape), atol=1e-4)  # the neighbours have weight 0


def tiny_setup(**changes):
    rows = {"encoder.self_attention.in_proj_weight": 6, "encoder.mlp.0": 4}
    return replace(
        coar.PublishedSetup(name="tiny", rows=rows, biased=True, examples=5, ablated_fraction=0.1), **changes
    )


def tiny(**changes):
    content = {"weight": torch.randn(10, 5), "bias": torch.randn(5), "lam": torch.rand(5)}
    return content | changes


class Touches:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def saved(path, content):
    torch.save(content, path)
    return path


def bad_files(folder):
    whole = saved(folder / "whole.pt", tiny())
    (folder / "cut.pt").write_bytes(whole.read_bytes()[:-200])
    (folder / "old.pt").write_bytes(pickle.dumps(tiny()))
    return {
        "cut.pt": "damaged or holds more than tensors",
        "old.pt": "damaged or holds more than tensors",
        saved(folder / "code.pt", tiny(more=Touches(str(folder / "made")))).name: "because unpickling can run code",
        saved(folder / "none.pt", {"weights": torch.ones(2)}).name: r"none.pt has weights, where a dict with weight",
        saved(folder / "list.pt", [1]).name: "has a list, where a dict with weight",
        saved(folder / "turned.pt", tiny(weight=torch.ones(5, 10))).name: "the weights look transposed",
        saved(folder / "bias.pt", tiny(bias=torch.ones(4))).name: r"bias of shape \(4,\)",
        saved(folder / "whole numbers.pt", tiny(lam=torch.ones(5, dtype=torch.int64))).name: "floating-point numbers",
        saved(folder / "resnet.pt", tiny(weight=torch.ones(22720, 5))).name: "imagenet_resnet50, celeba, waterbirds",
        "missing.pt": "there are no attributions at",
    }


def test_files_of_another_kind_are_refused_and_nothing_is_made(tmp_path):
    for name, message in bad_files(tmp_path).items():
        with pytest.raises(WeightsError, match=message):
            coar.import_published(tmp_path / name, tmp_path / "r.zarr", setup=tiny_setup(), progress=False)
    assert not (tmp_path / "made").exists()
    assert not (tmp_path / "r.zarr").exists()


def test_numbers_that_are_not_finite_are_counted_and_named(tmp_path):
    weight = torch.randn(10, 5)
    weight[7, 1], weight[8, 1], weight[7, 3] = torch.nan, torch.inf, torch.nan
    file, options = saved(tmp_path / "nan.pt", tiny(weight=weight)), {"setup": tiny_setup(), "progress": False}
    named = r"3 numbers that are NaN or infinite, of 2 examples, 1, 3, and of 2 components, encoder.mlp.0\[1\]"
    with pytest.raises(WeightsError, match=named):
        coar.import_published(file, tmp_path / "r.zarr", **options)
    left = coar.import_published(file, tmp_path / "left.zarr", **options, not_finite="leave_out")
    assert (left.metadata["id"].tolist(), left.published.left_out) == ([0, 2, 4], (1, 3))
    np.testing.assert_array_equal(coar.load(left.path).weights(), weight[:, [0, 2, 4]].T)
    zero = coar.import_published(file, tmp_path / "zero.zarr", **options, not_finite="zero")
    assert zero.published.zeroed == ("encoder.mlp.0[1]", "encoder.mlp.0[2]")
    np.testing.assert_array_equal(coar.load(zero.path).weights(), weight.nan_to_num(0, 0, 0).T)
    everywhere = saved(tmp_path / "all.pt", tiny(weight=torch.full((10, 5), torch.nan)))
    with pytest.raises(WeightsError, match="no example is without them"):
        coar.import_published(everywhere, tmp_path / "all.zarr", **options, not_finite="leave_out")
    bias = saved(tmp_path / "bias.pt", tiny(bias=torch.full((5,), torch.nan)))
    with pytest.raises(WeightsError, match="some are in bias or lam, which cannot be 0"):
        coar.import_published(bias, tmp_path / "b.zarr", **options, not_finite="zero")


def test_a_run_without_a_model_is_read_and_no_model_passes_for_its_own(written, tmp_path):
    study, setup, file, _ = written
    labels = {"label": np.arange(EXAMPLES) % 4}
    run = coar.import_published(file, tmp_path / "r.zarr", setup=setup, metadata=labels, progress=False)
    found = coar.load(run.path)
    goal = coar.EditGoal(targets="label == 1", references="label != 1", direction="decrease")
    if setup.biased:
        with pytest.raises(EditError, match=r"the bias of .* is unknown, since the attributions were imported"):
            coar.edit(found, goal, budget=len(study.components), rule="welch")
    else:
        made = coar.edit(found, goal, budget=2, rule="welch")
        with pytest.raises(EditError, match=r"weights unknown\.\.\., and this"):
            made.apply(study.model)
    with pytest.raises(MismatchError, match="the run was imported without a model; import the file"):
        coar.collect(study, run.path, test_masks=4, progress=False)
    with pytest.raises(RunError, match="has a fit 'published'; choose another name"):
        coar.import_published(file, run.path, setup=setup, metadata=labels, progress=False)
    with pytest.raises(SettingsError, match=r"columns of shapes \{'label': \(2,\)\}"):
        coar.import_published(file, tmp_path / "x.zarr", setup=setup, metadata={"label": np.ones(2)}, progress=False)


def test_an_import_that_was_cut_is_made_again(written, tmp_path):
    study, setup, file, content = written
    run = coar.import_published(file, tmp_path / "r.zarr", setup=setup, study=study, progress=False)
    run.group["attributions/published"].attrs["coar"] = {"state": "fitting"}  # as before the last block
    with pytest.raises(RunError, match="no finished fit"):
        coar.load(run.path)
    again = coar.import_published(file, run.path, setup=setup, study=study, progress=False)
    np.testing.assert_array_equal(coar.load(again.path).weights(), content["weight"][setup.places(study.components)].T)


def test_studies_of_another_kind_are_refused(written, tmp_path):
    study, setup, file, _ = written
    for changed, message in (
        (replace(study, examples=study.examples.subset([0, 1])), "has 2 examples and the file 6"),
        (replace(study, output=coar.CorrectClassMargin()), "the study's output is"),
        (replace(study, ablation=coar.ZeroActivation()), "the study's ablation is"),
        (replace(study, components=study.components[:4]), "give the study of the published model"),
    ):
        with pytest.raises(MismatchError, match=message):
            coar.import_published(file, tmp_path / "r.zarr", setup=setup, study=changed, progress=False)
    assert not (tmp_path / "r.zarr").exists()


PIPELINE = """
from tests.test_published import family, EXAMPLES

def study():
    return family("resnet")[0]

def published():
    return family("resnet")[0]

def judge():
    return family("resnet")[0].examples
"""


def test_commands_import_collect_evaluate_report_edit_and_export(tmp_path, monkeypatch):
    study, setup, chosen = family("resnet")
    monkeypatch.chdir(tmp_path)
    drops, _ = leave_one_out(study, chosen)
    drops[4, 2] = np.nan
    saved(tmp_path / "a.pt", {"weight": torch.from_numpy(drops).float(), "bias": torch.zeros(EXAMPLES)})
    (tmp_path / "small.py").write_text(PIPELINE)

    def call(*words):
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == 0, f"{words}: {done.output}{done.exception!r}"
        return done.output

    options = {"setup": setup, "study": study, "not_finite": "leave_out", "progress": False}
    coar.import_published("a.pt", "r.zarr", **options)
    assert "8 masks x 5 examples, complete" in call("collect", "small.py", "--run", "r.zarr", "--test-masks", 8)
    assert "published" in call("evaluate", "r.zarr")
    assert "1 numbers; 1 examples left out" in call("info", "r.zarr")
    call("report", "r.zarr", "--pipeline", "small.py")
    call("export", "r.zarr", "back.pt", "--published")
    assert torch.load("back.pt")["weight"].shape == (len(study.components), EXAMPLES - 1)
    call("export", "r.zarr", "back.safetensors")
    assert len(coar.load("back.safetensors")) == EXAMPLES - 1
    targets = ("--targets", "id == 0", "--references", "id != 0", "--direction", "decrease")
    call("edit", "r.zarr", *targets, "--budget", 3, "--pipeline", "small.py")


def test_the_command_imports_a_named_setup(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples, count = 12, len(SETUPS["waterbirds"].names)
    content = {
        "weight": torch.randn(count, examples).half(),
        "bias": torch.zeros(examples),
        "lam": torch.ones(examples),
    }
    saved(tmp_path / "a.pt", content)
    np.savez("columns.npz", label=np.arange(examples) % 2)
    done = CliRunner().invoke(app, ["import", "a.pt", "--setup", "waterbirds", "--metadata", "columns.npz"])
    assert done.exit_code == 0, done.output
    assert "12 examples, 22720 components, float16 weights, 0 numbers not finite" in done.output
    run = "runs/published-waterbirds.zarr"
    done = CliRunner().invoke(app, ["report", run])
    assert done.exit_code == 0, done.output
    goal = coar.EditGoal(targets="label == 1", references="label != 1", direction="decrease")
    assert coar.edit(coar.load(run), goal, budget=5, rule="welch").components
    done = CliRunner().invoke(app, ["import", "a.pt", "--setup", "cifar10"])
    assert done.exit_code == 1
    assert "files with 22720 components are those of imagenet_resnet50, celeba, waterbirds" in done.output
