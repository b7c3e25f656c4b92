"""Pipelines on ImageNet, over small folders and .beton files in its format."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import resnet18, resnet50, vit_b_16

import coar
from coar.errors import ExamplesError, PipelineError, SettingsError, WeightsError
from coar.pipeline import load_pipeline
from pipelines import beton, imagenet, imagenet_resnet50, imagenet_vit_b16

FOLDER = Path(__file__).parent.parent / "pipelines"
WNIDS = ["n01440764", "n02123045", "n03000247"]
PER_CLASS = 8
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = [(300, 260), (240, 400), (256, 256), (500, 281)]  # width and height


def picture(number):
    """A coarse random pattern, in one of several sizes."""
    pattern = np.random.default_rng(number).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    return Image.fromarray(pattern).resize(SIZES[number % len(SIZES)])


def write_pictures(val, wnids, per_class):
    for number in range(len(wnids) * per_class):
        file = val / wnids[number // per_class] / f"ILSVRC2012_val_{number + 1:08d}.JPEG"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(file, "JPEG", quality=95)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Weights of a ResNet-18 with three classes."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "three.safetensors"
    coar.save_weights(resnet18(num_classes=len(WNIDS)), file)
    return file


@pytest.fixture
def small(checkpoint, tmp_path, monkeypatch):
    """Three classes of eight pictures, and a ResNet-18 for them."""
    write_pictures(tmp_path / "val", WNIDS, PER_CLASS)
    monkeypatch.setenv("COAR_IMAGENET", str(tmp_path))
    monkeypatch.setenv("COAR_IMAGENET_CLASSES", "3")
    monkeypatch.setenv("COAR_IMAGENET_RESNET50_MODEL", "resnet18")
    monkeypatch.setenv("COAR_IMAGENET_RESNET50_WEIGHTS", str(checkpoint))
    return tmp_path


def every_part():
    return {part: imagenet_resnet50.examples(part) for part in imagenet.EIGHTHS}


def prepared(image):
    """A picture as torchvision documents it: shorter side to 256, 224 from the middle, less the mean, by deviations."""
    width, height = image.size
    shorter = min(width, height)
    image = image.resize((int(256 * width / shorter), int(256 * height / shorter)), Image.BILINEAR)
    left, top = round((image.width - 224) / 2), round((image.height - 224) / 2)
    pixels = np.asarray(image.crop((left, top, left + 224, top + 224)), dtype=np.float64) / 255
    return torch.from_numpy((pixels - MEAN) / STD).permute(2, 0, 1).float()


def test_every_picture_is_in_one_part_with_the_class_of_its_folder(small):
    files = sorted(small.glob("val/*/*.JPEG"))
    found = {}
    for examples in every_part().values():
        inputs, targets = examples.block(0, len(examples))
        columns = (examples.metadata[name].tolist() for name in ("id", "label", "wnid"))
        for pixels, target, number, label, wnid in zip(inputs, targets.tolist(), *columns, strict=True):
            assert number not in found
            assert (label, wnid) == (target, WNIDS[target])
            assert files[number].parent.name == wnid
            torch.testing.assert_close(pixels, prepared(Image.open(files[number])), rtol=0, atol=1e-5)
            found[number] = label
    assert sorted(found) == list(range(len(files)))
    assert Counter(len(examples) for examples in every_part().values()) == {3: 2, 6: 1, 12: 1}


def test_a_folder_that_is_the_pictures_own_will_do(small, monkeypatch):
    expected = imagenet_resnet50.judge().fingerprint()
    monkeypatch.setenv("COAR_IMAGENET", str(small / "val"))
    assert imagenet_resnet50.judge().fingerprint() == expected


def test_a_run(small, checkpoint, tmp_path):
    pipeline = load_pipeline(FOLDER / "imagenet_resnet50.py")
    study = pipeline.study(ablation="zero", ablated_fraction=0.2, seed=3)
    assert study.sampler == coar.BernoulliSampler(ablated_fraction=0.2, seed=3)
    assert len(study.components) == 4_800 - 896  # all filters of a ResNet-18, less those of its three shortcuts
    assert (
        pipeline.study().ablation.calibration.fingerprint() == imagenet_resnet50.examples("calibration").fingerprint()
    )
    assert len(pipeline.judge()) == 12
    assert len(pipeline.choosing()) == 6
    options = {"masks": 1, "test_masks": 0, "device": "cpu", "progress": False}
    run = coar.collect(study, tmp_path / "run.zarr", **options)
    plain = coar.load_weights(resnet18(num_classes=3), checkpoint).eval()
    inputs, targets = study.examples.block(0, len(study.examples))
    with torch.no_grad():
        logits = plain(inputs)
    for stored, row, label in zip(run.array("base_output")[:], logits.tolist(), targets.tolist(), strict=True):
        others = [value for number, value in enumerate(row) if number != label]
        assert float(stored) == pytest.approx(row[label] - np.logaddexp(*others), abs=1e-4)


@pytest.mark.parametrize("given", [None, "nowhere", "nowhere.beton"])
def test_folder_that_is_not_there(small, monkeypatch, given):
    monkeypatch.delenv("COAR_IMAGENET")
    if given:
        monkeypatch.setenv("COAR_IMAGENET", given)
    with pytest.raises(PipelineError, match=r"COAR_IMAGENET is .*; set it to the folder with ImageNet's validation"):
        imagenet_resnet50.judge()


def test_folders_that_are_not_the_classes(small, monkeypatch):
    (small / "val/train").mkdir()
    with pytest.raises(PipelineError, match="val has a folder 'train', which is not a class, where 3 folders such as"):
        imagenet_resnet50.judge()
    (small / "val/train").rename(small / "val/n99999999")
    with pytest.raises(PipelineError, match=r"val has 4 folders of classes, where 3 .* COAR_IMAGENET_CLASSES"):
        imagenet_resnet50.judge()
    monkeypatch.delenv("COAR_IMAGENET_CLASSES")
    with pytest.raises(PipelineError, match="val has 4 folders of classes, where 1000 "):
        imagenet_resnet50.judge()


def test_pictures_without_folders_of_classes(small, monkeypatch):
    flat = small / "flat/val"
    write_pictures(flat.parent, ["val"], 8)  # as the archive unpacks
    monkeypatch.setenv("COAR_IMAGENET", str(flat.parent))
    with pytest.raises(PipelineError, match=r"val has 0 folders of classes.* torchvision.datasets.ImageNet sorts them"):
        imagenet_resnet50.judge()


def test_too_few_pictures(small):
    for file in list(small.glob("val/*/*.JPEG"))[7:]:
        file.unlink()
    with pytest.raises(PipelineError, match="has 7 pictures and at least 8 are needed"):
        imagenet_resnet50.judge()


@pytest.mark.parametrize("damage", ["cut", "empty"])
def test_damaged_picture_is_named(small, damage):
    examples = imagenet_resnet50.judge()
    file = examples.inputs.files[2]
    file.write_bytes(file.read_bytes()[:-300] if damage == "cut" else b"")
    with pytest.raises(ExamplesError, match=f"cannot read the picture {file} "):
        examples.block(0, len(examples))


def test_checkpoint_with_another_number_of_classes(small, tmp_path, monkeypatch):
    coar.save_weights(resnet18(num_classes=5), tmp_path / "five.safetensors")
    monkeypatch.setenv("COAR_IMAGENET_RESNET50_WEIGHTS", str(tmp_path / "five.safetensors"))
    with pytest.raises(WeightsError, match=r"fc\.weight has shape \(5, 512\), not \(3, 512\)"):
        imagenet_resnet50.study()
    monkeypatch.delenv("COAR_IMAGENET_RESNET50_WEIGHTS")
    with pytest.raises(PipelineError, match="for 1000 classes and COAR_IMAGENET_CLASSES is 3; set COAR_IMAGENET_RES"):
        imagenet_resnet50.study()


@pytest.mark.parametrize("given", ["1", "ten", "-3", ""])
def test_number_of_classes_that_is_none(small, monkeypatch, given):
    monkeypatch.setenv("COAR_IMAGENET_CLASSES", given)
    with pytest.raises(SettingsError, match=f"COAR_IMAGENET_CLASSES is '{given}'; give a whole number"):
        imagenet_resnet50.judge()


@pytest.mark.parametrize("pipeline", [imagenet_resnet50, imagenet_vit_b16])
def test_weights_that_cannot_be_fetched_and_unknown_models(small, pipeline, monkeypatch, tmp_path):
    variable = f"COAR_{pipeline.NAME.upper()}"
    for name in (f"{variable}_WEIGHTS", f"{variable}_MODEL", "COAR_IMAGENET_CLASSES"):
        monkeypatch.delenv(name, raising=False)
    for number in range(1_000 - len(WNIDS)):
        (small / f"val/n1{number:07d}").mkdir()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # a port that nobody listens on
    with pytest.raises(PipelineError, match=f"cannot be fetched .*empty/hub/checkpoints, or set {variable}_WEIGHTS to"):
        pipeline.study()
    monkeypatch.setenv(f"{variable}_MODEL", "vgg16")
    with pytest.raises(SettingsError, match=f"{variable}_MODEL is 'vgg16'; choose one of .*(resnet50|vit_b_16)"):
        pipeline.study()


def test_only_zero_for_rows_and_heads(small):
    with pytest.raises(SettingsError, match="'mean' has no meaning for rows of a parameter"):
        imagenet_vit_b16.study(ablation="mean")


def test_components_are_those_published(monkeypatch):
    with torch.device("meta"):  # shapes alone
        vit, resnet = vit_b_16(), resnet50()
    assert len(coar.conv_filters(resnet, exclude="*.downsample.*")) == 22_720
    assert len(imagenet_vit_b16.components(vit)) == 82_944
    monkeypatch.setenv("COAR_IMAGENET_VIT_B16_COMPONENTS", "heads")
    counts = Counter(imagenet_vit_b16.components(vit).kinds)
    assert counts == {"attention head": 12 * 12, "input feature": 12 * 3_072}
    monkeypatch.setenv("COAR_IMAGENET_VIT_B16_COMPONENTS", "filters")
    with pytest.raises(SettingsError, match="COMPONENTS is 'filters'; choose one of rows, heads"):
        imagenet_vit_b16.components(vit)


@pytest.mark.slow
@pytest.mark.parametrize(("pipeline", "make"), [(imagenet_resnet50, resnet50), (imagenet_vit_b16, vit_b_16)])
def test_a_thousand_classes_and_the_model_in_its_own_size(pipeline, make, tmp_path, monkeypatch):
    """A folder as large as ImageNet's in classes, torchvision's model with random weights, and one mask."""
    write_pictures(tmp_path / "val", [f"n{number:08d}" for number in range(1_000)], 1)
    torch.manual_seed(0)
    model = make().eval()
    torch.nn.init.normal_(model.get_submodule("fc" if make is resnet50 else "heads.head").weight, std=0.05)
    coar.save_weights(model, tmp_path / "weights.safetensors")
    monkeypatch.setenv("COAR_IMAGENET", str(tmp_path))
    monkeypatch.setenv(f"COAR_{pipeline.NAME.upper()}_WEIGHTS", str(tmp_path / "weights.safetensors"))
    monkeypatch.setitem(imagenet.MOST, "studied", 4)
    study = load_pipeline(FOLDER / f"{pipeline.NAME}.py").study(ablation="zero")
    assert len(study.components) == (22_720 if make is resnet50 else 82_944)
    assert study.examples.targets.tolist() == study.examples.metadata["id"].tolist()
    run = coar.collect(study, tmp_path / "run.zarr", masks=1, test_masks=0, device="cpu", progress=False)
    for number, label, stored in zip(
        study.examples.metadata["id"], study.examples.targets, run.array("base_output")[:], strict=True
    ):
        assert int(label) == int(number)
        file = tmp_path / f"val/n{number:08d}/ILSVRC2012_val_{number + 1:08d}.JPEG"
        with torch.no_grad():
            logits = model(prepared(Image.open(file))[None])[0].double()
        others = torch.cat([logits[:number], logits[number + 1 :]])
        assert float(stored) == pytest.approx(float(logits[number] - others.logsumexp(0)), abs=1e-3)
    assert np.isfinite(run.array("outputs")[:]).all()


def test_without_ffcv_a_message_says_what_to_install(small, monkeypatch):
    (small / "val.beton").write_bytes(b"anything")
    monkeypatch.setenv("COAR_IMAGENET", str(small / "val.beton"))
    monkeypatch.setitem(sys.modules, "ffcv", None)
    monkeypatch.setitem(sys.modules, "ffcv.loader", None)
    message = r"ffcv, which reads \.beton files, cannot be imported .* pip install '\.\[ffcv\]', which needs"
    with pytest.raises(PipelineError, match=message):
        imagenet_resnet50.judge()


WRITER = """
import sys
from ffcv.fields import IntField, RGBImageField
from ffcv.writer import DatasetWriter
from torchvision.datasets import ImageFolder
folder, file, mode, label = sys.argv[1:]
pictures = ImageFolder(folder)
if mode == "fitting":
    pictures = ImageFolder(folder, transform=lambda image: image.resize((224, 224)))
fields = {"image": RGBImageField(write_mode="raw"), label: IntField()}
DatasetWriter(file, fields, num_workers=1).from_indexed_dataset(pictures)
"""


def write_beton(root, mode, label="label"):
    """Write the pictures of a folder with ffcv's own writer, in a process of its own, since it starts others."""
    file = root / f"{mode}.beton"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WRITER, str(root / "val"), str(file), mode, label],
        check=True,
        capture_output=True,
        timeout=120,
    )
    return file


@pytest.mark.ffcv
def test_beton_of_pictures_in_the_models_size(small, monkeypatch):
    """What ffcv returns is each picture to the bit, in any order asked for."""
    pytest.importorskip("ffcv", reason="needs the extra ffcv")
    files = sorted(small.glob("val/*/*.JPEG"))
    folder = imagenet_resnet50.examples("judge")
    monkeypatch.setenv("COAR_IMAGENET", str(write_beton(small, "fitting")))
    examples = imagenet_resnet50.examples("judge")
    assert examples.metadata["id"].tolist() == folder.metadata["id"].tolist()
    assert examples.targets.tolist() == folder.targets.tolist()
    for chosen in (examples, examples.subset([7, 0, 3])):
        inputs, _ = chosen.block(0, len(chosen))
        for pixels, number in zip(inputs, chosen.metadata["id"], strict=True):
            exact = np.asarray(Image.open(files[number]).convert("RGB").resize((224, 224)), dtype=np.float64) / 255
            expected = torch.from_numpy((exact - MEAN) / STD).permute(2, 0, 1).float()
            torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)
    assert examples.fingerprint() == imagenet_resnet50.examples("judge").fingerprint()


@pytest.mark.ffcv
def test_beton_of_pictures_in_many_sizes(small, monkeypatch):
    """The middle is cropped and scaled; ffcv scales otherwise than Pillow, so pixels are near and not the same."""
    pytest.importorskip("ffcv", reason="needs the extra ffcv")
    folder = imagenet_resnet50.examples("studied")
    monkeypatch.setenv("COAR_IMAGENET", str(write_beton(small, "many")))
    examples = imagenet_resnet50.examples("studied")
    found, expected = (part.block(0, len(part))[0] for part in (examples, folder))
    assert found.shape == expected.shape
    assert float((found - expected).abs().mean()) < 0.1 * float(expected.std())
    single = torch.stack([examples.inputs[i] for i in range(len(examples))])
    assert torch.equal(single, found)


@pytest.mark.ffcv
def test_beton_that_does_not_fit(small, monkeypatch):
    pytest.importorskip("ffcv", reason="needs the extra ffcv")
    file = write_beton(small, "fitting")
    monkeypatch.setenv("COAR_IMAGENET", str(file))
    monkeypatch.setenv("COAR_IMAGENET_CLASSES", "2")
    with pytest.raises(PipelineError, match="has labels from 0 to 2, where 0 to 1 are expected"):
        imagenet_resnet50.judge()
    monkeypatch.setenv("COAR_IMAGENET_CLASSES", "3")
    content = file.read_bytes()
    for length in (len(content) // 2, len(content) - 10, 200, 10, 0):
        file.write_bytes(content[:length])
        with pytest.raises(PipelineError, match=r"cannot read .*fitting\.beton .*; write it again"):
            imagenet_resnet50.judge()
    monkeypatch.setenv("COAR_IMAGENET", str(write_beton(small, "other", label="class")))
    with pytest.raises(PipelineError, match=r"has the fields .*'class'.*; write it with .*'label'"):
        imagenet_resnet50.judge()
    assert beton.installed() is sys.modules["ffcv"]
