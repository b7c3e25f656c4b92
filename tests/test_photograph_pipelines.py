"""Pipelines on photographs, over small folders in the formats of Waterbirds and CelebA, and a small CLIP in its own."""

import csv
import string
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.models import resnet18
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer, CLIPVisionModelWithProjection

import coar
from coar.errors import ExamplesError, PipelineError, SettingsError, WeightsError
from coar.pipeline import load_pipeline
from pipelines import celeba, clip, photographs, waterbirds

FOLDER = Path(__file__).parent.parent / "pipelines"
SIZES = {"waterbirds": (300, 260), "celeba": (178, 218)}  # width and height
PER_GROUP = {0: 4, 1: 3, 2: 2}  # pictures of every group in training, validation and test
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def picture(file, size, seed):
    """Write a JPEG of a coarse random pattern."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pattern = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    Image.fromarray(pattern).resize(size).save(file, quality=95)


def rows_of_all_groups():
    """(split, class, cue) of every picture, in a shuffled order."""
    rows = [(s, y, c) for s, count in PER_GROUP.items() for y in (0, 1) for c in (0, 1) for _ in range(count)]
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]


def write_waterbirds(root):
    with (root / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["img_id", "img_filename", "y", "split", "place", "place_filename"])
        for i, (split, bird, place) in enumerate(rows_of_all_groups()):
            name = f"{i:03d}.Some_Bird/Some_Bird_{i}.jpg"
            writer.writerow([i + 1, name, bird, split, place, f"/b/bamboo_forest/{i:08d}.jpg"])
            picture(root / name, SIZES["waterbirds"], i)


def write_celeba(root):
    rows = rows_of_all_groups()
    names = [f"{i + 1:06d}.jpg" for i in range(len(rows))]
    lines = [str(len(rows)), "5_o_Clock_Shadow Blond_Hair Eyeglasses Male Young "]
    lines += [f"{n}  1 {2 * b - 1:2d} -1 {2 * m - 1:2d}  1" for n, (_, b, m) in zip(names, rows, strict=True)]
    (root / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
    parts = [f"{name} {split}" for name, (split, _, _) in zip(names, rows, strict=True)]
    (root / "list_eval_partition.txt").write_text("\n".join(parts) + "\n")
    for i, name in enumerate(names):
        picture(root / "img_align_celeba" / name, SIZES["celeba"], i)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Both data sets, and the weights of a ResNet-18 with two classes and of one with a thousand."""
    root = tmp_path_factory.mktemp("photographs")
    for name, write in (("waterbirds", write_waterbirds), ("celeba", write_celeba)):
        (root / name).mkdir()
        write(root / name)
    torch.manual_seed(0)
    coar.save_weights(resnet18(num_classes=2), root / "two.safetensors")
    (root / "hub/checkpoints").mkdir(parents=True)
    torch.save(resnet18(num_classes=1000).state_dict(), root / "hub/checkpoints/resnet18-f37072fd.pth")
    return root


@pytest.fixture(params=["waterbirds", "celeba"])
def data(request, originals, tmp_path, monkeypatch):
    """A data set's pipeline, its folder as a copy that a test may damage, in a folder where it may train."""
    root = tmp_path / request.param
    root.mkdir()
    for file in (originals / request.param).rglob("*.*"):
        if file.is_file():
            copy = root / file.relative_to(originals / request.param)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    variable = f"COAR_{request.param.upper()}"
    monkeypatch.setenv(variable, str(root))
    monkeypatch.setenv(f"{variable}_MODEL", "resnet18")
    monkeypatch.setenv(f"{variable}_WEIGHTS", str(originals / "two.safetensors"))
    monkeypatch.setenv("TORCH_HOME", str(originals))
    monkeypatch.chdir(tmp_path)
    return {"waterbirds": waterbirds, "celeba": celeba}[request.param], root, variable


def groups(pipeline, bird, cue):
    if pipeline is waterbirds:
        return f"{['landbird', 'waterbird'][bird]} on {['land', 'water'][cue]}"
    return f"{['not blond', 'blond'][bird]} {['woman', 'man'][cue]}"


def prepared(file, pipeline):
    """A picture as the authors' code prepares it, in numpy after Pillow's resizing."""
    image = Image.open(file)
    if pipeline is waterbirds:
        image = image.resize((256, 256), Image.BILINEAR).crop((16, 16, 240, 240))
    else:
        image = image.crop((0, 20, 178, 198)).resize((224, 224), Image.BILINEAR)
    normal = (np.asarray(image) / 255 - IMAGENET["mean"]) / IMAGENET["std"]
    return torch.from_numpy(normal).permute(2, 0, 1).float()


@pytest.mark.parametrize(("split", "number"), [("train", 0), ("validation", 1), ("test", 2)])
def test_every_picture_has_its_label_group_and_split(data, split, number):
    pipeline, _, _ = data
    examples = pipeline.collection().examples(split)
    expected = [(i, y, groups(pipeline, y, c)) for i, (s, y, c) in enumerate(rows_of_all_groups()) if s == number]
    found = zip(*(examples.metadata[name].tolist() for name in ("id", "label", "group")), strict=True)
    assert list(found) == expected
    names = (f"{i:03d}.Some_Bird" if pipeline is waterbirds else f"{i + 1:06d}.jpg" for i, _, _ in expected)
    assert all(name in str(file) for file, name in zip(examples.inputs.files, names, strict=True))
    inputs, _ = examples.block(0, 2)
    for found_input, file in zip(inputs, examples.inputs.files, strict=False):
        torch.testing.assert_close(found_input, prepared(file, pipeline), rtol=0, atol=1e-5)


def test_first_of_every_group(data):
    pipeline, _, _ = data
    examples = pipeline.collection().examples("train", of_each=slice(1, 3))
    assert set(Counter(examples.metadata["group"].tolist()).values()) == {2}
    every = pipeline.collection().examples("train").metadata
    for group in set(every["group"]):
        first = every["id"][every["group"] == group][1:3]
        assert examples.metadata["id"][examples.metadata["group"] == group].tolist() == first.tolist()
    assert pipeline.collection().examples("train", count=5).metadata["id"].tolist() == every["id"][:5].tolist()


def loaded(pipeline):
    return load_pipeline(FOLDER / f"{pipeline.__name__.split('.')[-1]}.py")


def test_study_is_of_the_checkpoint_and_judged_on_other_pictures(data, originals):
    pipeline, _, _ = data
    file = loaded(pipeline)
    study, judge = file.study(ablation="zero"), file.judge()
    assert Counter(study.components.kinds) == {"conv filter": 4_800}  # of all convolutions of a ResNet-18
    inputs, targets = study.examples.block(0, len(study.examples))
    plain = coar.load_weights(resnet18(num_classes=2), originals / "two.safetensors").eval()
    with torch.no_grad():
        torch.testing.assert_close(study.model(inputs), plain(inputs))
    assert set(judge.metadata["id"].tolist()).isdisjoint(study.examples.metadata["id"].tolist())
    targets, references = file.module.GOAL.resolve(judge.metadata)
    assert (len(targets), len(references)) == (2, 6)


@pytest.mark.slow
def test_a_run_of_the_study(data, originals, tmp_path):
    """Stored outputs are those of the plain model, on pictures read from disk block by block."""
    study = loaded(data[0]).study()
    options = {"masks": 1, "test_masks": 0, "device": "cpu", "progress": False}
    run = coar.collect(study, tmp_path / "run.zarr", execution=coar.Execution(example_block=5), **options)
    plain = coar.load_weights(resnet18(num_classes=2), originals / "two.safetensors").eval()
    inputs, targets = study.examples.block(0, len(study.examples))
    with torch.no_grad():
        logits = plain(inputs)
    margins = [row[label] - row[1 - label] for row, label in zip(logits.tolist(), targets.tolist(), strict=True)]
    np.testing.assert_allclose(run.array("base_output")[:], margins, rtol=0, atol=1e-4)


def test_head_is_trained_on_imagenet_features(data, originals, monkeypatch):
    """Without a checkpoint only the last layer differs from the ImageNet weights, and it has learnt its pictures."""
    pipeline, _, variable = data
    monkeypatch.delenv(f"{variable}_WEIGHTS")
    model = pipeline.model()
    imagenet = torch.load(originals / "hub/checkpoints/resnet18-f37072fd.pth", weights_only=True)
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in imagenet.items() if not name.startswith("fc."))
    examples = pipeline.collection().examples("train")
    inputs, targets = examples.block(0, len(examples))
    with torch.no_grad():
        assert (model(inputs).argmax(1) == targets).all()
    monkeypatch.setattr(photographs, "fit_head", None)  # the second time it comes from its file
    again = pipeline.model().state_dict()
    assert all(torch.equal(value, again[name]) for name, value in state.items())


def test_imagenet_weights_that_cannot_be_fetched(data, monkeypatch, tmp_path):
    pipeline, _, variable = data
    monkeypatch.delenv(f"{variable}_WEIGHTS")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # a port that nobody listens on
    with pytest.raises(PipelineError, match=f"resnet18 cannot be fetched .*empty/hub/checkpoints.*{variable}_WEIGHTS"):
        pipeline.model()


def test_checkpoint_of_something_else_and_unknown_model(data, originals, monkeypatch):
    pipeline, _, variable = data
    monkeypatch.setenv(f"{variable}_WEIGHTS", str(originals / "hub/checkpoints/resnet18-f37072fd.pth"))
    with pytest.raises(WeightsError, match=r"fc\.weight has shape \(1000, 512\), not \(2, 512\)"):
        pipeline.model()
    monkeypatch.setenv(f"{variable}_MODEL", "vgg16")
    with pytest.raises(SettingsError, match=f"{variable}_MODEL is 'vgg16'; choose one of resnet101, .*resnet50"):
        pipeline.model()


@pytest.mark.parametrize("given", [None, "nowhere"])
def test_folder_that_is_not_there(data, monkeypatch, given):
    pipeline, _, variable = data
    monkeypatch.delenv(variable)
    if given:
        monkeypatch.setenv(variable, given)
    words = "is 'nowhere', which is not a folder" if given else "is not set"
    with pytest.raises(PipelineError, match=f"{variable} {words}; set it to the folder with "):
        pipeline.judge()


def test_missing_picture_is_named(data):
    pipeline, _, _ = data
    file = pipeline.collection().examples("test").inputs.files[3]
    file.unlink()
    with pytest.raises(ExamplesError, match=f"1 of 8 pictures are missing, first {file}; unpack"):
        pipeline.judge()


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_damaged_picture_is_named(data, damage):
    pipeline, _, _ = data
    examples = pipeline.judge()
    file = examples.inputs.files[2]
    content = {"cut": file.read_bytes()[:-300], "empty": b"", "text": b"no picture at all"}
    file.write_bytes(content[damage])
    with pytest.raises(ExamplesError, match=f"cannot read the picture {file} .*; unpack"):
        examples.block(0, 8)


LISTS = {
    "waterbirds": ["metadata.csv"],
    "celeba": ["list_attr_celeba.txt", "list_eval_partition.txt"],
}


@pytest.mark.parametrize("damage", ["gone", "empty", "bytes"])
def test_damaged_list_is_named(data, damage):
    pipeline, root, _ = data
    for name in LISTS[root.name]:
        whole = (root / name).read_bytes()
        content = {"gone": None, "empty": b"", "bytes": b"\xff\xfe\x00"}[damage]
        (root / name).unlink() if content is None else (root / name).write_bytes(content)
        with pytest.raises(PipelineError, match=name):
            pipeline.judge()
        (root / name).write_bytes(whole)
    pipeline.judge()


ALTERED = {  # what is written for what, and what the message says
    "waterbirds": [
        (",place,", ",where,", "has no column place, it has img_id, img_filename, y, split, where, place_filename"),
        (",y,", ",Y,", "has no column y"),
        (".jpg,1,", ".jpg,bird,", "column y, is 'bird' in row"),
        (",1,0,1,/", ",1,3,1,/", "column split, is '3' in row .* where one of 0, 1, 2 is expected"),
    ],
    "celeba": [
        ("Male", "Mail", "has no attribute Male in its second line"),
        ("Blond_Hair", "Blonde", "has no attribute Blond_Hair"),
        ("-1 -1", "-1 zero", "Blond_Hair|Male, is 'zero' in row"),
        (" -1  1\n", "\n", "Male, is .* in row"),
    ],
}


@pytest.mark.parametrize("number", range(4))
def test_altered_list_says_where(data, number):
    pipeline, root, _ = data
    old, new, words = ALTERED[root.name][number]
    file = root / LISTS[root.name][0]
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    with pytest.raises(PipelineError, match=words):
        pipeline.judge()


def test_picture_of_no_split(data):
    pipeline, root, _ = data
    if pipeline is celeba:
        file = root / "list_eval_partition.txt"
        file.write_text("\n".join(file.read_text().splitlines()[:-1]))
        with pytest.raises(PipelineError, match=r"the split, is None in row 35, .* one of 0, 1, 2 is expected"):
            pipeline.judge()


def written_clip(folder):
    """Write a CLIP with random weights as save_pretrained does: model, tokenizer and image processor."""
    letters = string.ascii_lowercase
    vocabulary = [*letters, *[f"{letter}</w>" for letter in letters], "ca", "cat</w>", "do", "dog</w>"]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>")]
    ids = {token: i for i, token in enumerate(vocabulary)}
    CLIPTokenizer(vocab=ids, merges=merges, model_max_length=32).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"bos_token_id": ids["<|startoftext|>"], "eos_token_id": ids["<|endoftext|>"], "pad_token_id": 1}
    text = {**small, **special, "vocab_size": len(ids), "max_position_embeddings": 32}
    vision = {**small, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A small CLIP, and eight pairs of pictures in two classes."""
    written_clip(tmp_path / "clip")
    for i in range(8):
        name = f"{['cat', 'hot_dog'][i % 2]}/{i:02d}.png"
        picture(tmp_path / "pictures/clean" / name, (50, 40), i)
        picture(tmp_path / "pictures/attacked" / name, (50, 40), 100 + i)
    monkeypatch.setenv("COAR_CLIP", str(tmp_path / "clip"))
    monkeypatch.setenv("COAR_CLIP_PICTURES", str(tmp_path / "pictures"))
    return tmp_path


def test_clip_gives_the_logits_of_transformers_itself(photos):
    """Transformers' whole model, with tokenizer and processor, picture by picture, without padding."""
    whole = CLIPModel.from_pretrained(photos / "clip").eval()
    tokenizer, processor = (kind.from_pretrained(photos / "clip") for kind in (CLIPTokenizer, CLIPImageProcessor))
    study = clip.study()
    files = sorted((photos / "pictures/clean").glob("*/*"))[::2]
    files += [Path(str(file).replace("clean", "attacked")) for file in files]
    inputs, targets = study.examples.block(0, len(study.examples))
    with torch.no_grad():
        found = study.model(inputs)
        for row, file in enumerate(files):
            pixels = processor(Image.open(file), return_tensors="pt")["pixel_values"]
            for column, prompt in enumerate(["a photo of a cat", "a photo of a hot dog"]):
                tokens = tokenizer(prompt, return_tensors="pt")
                expected = whole(**tokens, pixel_values=pixels).logits_per_image
                torch.testing.assert_close(found[row, column], expected[0, 0], rtol=1e-4, atol=1e-4)
    assert targets.tolist() == [0, 0, 1, 1] * 2


def test_zero_shot_margin_of_the_plain_model_is_that_of_the_pipeline(photos):
    """The half that sees, as transformers has it, with the prompts in the output instead of the model."""
    study = clip.study()
    plain = CLIPVisionModelWithProjection.from_pretrained(photos / "clip", projection_dim=16).eval()
    output = coar.ZeroShotMargin(prompts=study.model.prompts, scale=float(study.model.scale))
    inputs, targets = study.examples.block(0, len(study.examples))
    with torch.no_grad():
        expected = study.output(study.model(inputs), targets)
        torch.testing.assert_close(output(plain(inputs), targets), expected, rtol=1e-4, atol=1e-4)


def test_clip_pairs(photos):
    file = loaded(clip)
    study, judge = file.study(ablation="zero"), file.judge()
    assert Counter(study.components.kinds) == {"attention head": 8, "input feature": 96}
    for examples, pairs in ((study.examples, [0, 2, 4, 6]), (judge, [1, 3, 5, 7])):
        assert examples.metadata["pair"].tolist() == pairs * 2
        assert examples.metadata["attacked"].tolist() == [0] * 4 + [1] * 4
        assert examples.metadata["group"].tolist() == ["cat", "cat", "hot_dog", "hot_dog"] * 2
    targets, references = file.module.GOAL.resolve(judge.metadata)
    assert (targets.tolist(), references.tolist()) == ([4, 5, 6, 7], [0, 1, 2, 3])


def test_clip_run(photos):
    run = coar.collect(clip.study(), photos / "run.zarr", masks=4, gradients=4, device="cpu", progress=False)
    assert run.fingerprint["ablation"]["name"] == "Mean"
    assert np.isfinite(run.array("base_output")[:]).all()


def test_clip_without_its_partner_picture(photos):
    (photos / "pictures/attacked/cat/02.png").unlink()
    with pytest.raises(
        PipelineError, match=r"has cat/02\.png in one of clean and attacked only; put there pictures as"
    ):
        clip.judge()


def test_clip_without_pictures(photos, monkeypatch):
    (photos / "empty").mkdir()
    monkeypatch.setenv("COAR_CLIP_PICTURES", str(photos / "empty"))
    with pytest.raises(PipelineError, match="empty has no pictures; put there pictures as clean/<class>/<name>"):
        clip.judge()


PARTS = ["config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"]


@pytest.mark.parametrize("damage", ["gone", "cut"])
@pytest.mark.parametrize("part", PARTS)
def test_clip_folder_with_a_part_gone_or_cut(photos, part, damage):
    file = photos / "clip" / part
    content = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    with pytest.raises(PipelineError, match=r"cannot load CLIP from '.*clip': .*; set COAR_CLIP to a folder with"):
        clip.study()


def test_clip_with_a_weight_missing(photos):
    file = photos / "clip/model.safetensors"
    weights = load_file(file)
    del weights["visual_projection.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(PipelineError, match=r"1 weights are missing, first visual_projection\.weight"):
        clip.study()


def test_clip_that_is_not_there(photos, monkeypatch):
    monkeypatch.setenv("COAR_CLIP", str(photos / "nowhere"))
    with pytest.raises(PipelineError, match=r"cannot load CLIP from '.*nowhere'"):
        clip.study()
