"""Pipeline files: the two that come with the package, and files of a user's own with something wrong."""

import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import coar
from coar.errors import CoarError, MismatchError, PipelineError, SettingsError, WeightsError
from coar.pipeline import load_pipeline

FOLDER = Path(__file__).parent.parent / "pipelines"

OWN = """
import torch
import coar

MASKS, TEST_MASKS, TEST_FRACTIONS = 12, 3, [0.3]
torch.manual_seed(0)
MODEL = torch.nn.Linear(4, 3)
EXAMPLES = coar.Examples(inputs=torch.eye(4), targets=torch.tensor([0, 1, 2, 0]))

def study(*, ablated_fraction=0.25):
    sampler = coar.FixedSizeSampler(ablated_fraction=ablated_fraction, seed=3)
    return coar.Study(model=MODEL, examples=EXAMPLES, components=coar.neurons(MODEL), sampler=sampler)
"""


@pytest.fixture
def written(tmp_path):
    """Write a pipeline file and load it."""

    def load(text, name="own.py"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return load_pipeline(tmp_path / name)

    return load


def accuracy(model, examples):
    with torch.no_grad():
        return (model(examples.inputs).argmax(1) == examples.targets).float().mean().item()


def same_weights(one, other):
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_digits_pipeline(digits):
    loaded = load_pipeline(FOLDER / "digits.py")
    assert (loaded.name, loaded.masks, loaded.gradients) == ("digits", 0, digits.GRADIENTS)
    assert loaded.test_masks == digits.TEST_MASKS
    assert loaded.test_fractions == ()
    study = loaded.study()
    assert study.ablation.label == "mean"
    assert len(study.components) == 336
    assert same_weights(study.model, digits.model())
    rows = [set(part.metadata["id"]) for part in (study.examples, study.ablation.calibration, loaded.judge())]
    assert [len(part) for part in rows] == [400, 1000, 397]
    assert len(set.union(*rows)) == 1797  # nothing that judges is studied, calibrated or trained on
    for part in (study.examples, loaded.judge()):
        assert set(part.metadata["label"]) == set(range(10))


def test_digits_net_is_right_on_97_percent_of_scans_it_was_not_trained_on(digits):
    model = digits.model()
    assert accuracy(model, digits.split()["judge"]) >= 0.97
    assert accuracy(model, digits.split()["studied"]) >= 0.97
    assert not model.training


def test_digits_net_is_the_same_whenever_it_is_trained(digits):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = digits.train(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same_weights(digits.train(0), first)
    assert accuracy(first, digits.split()["judge"]) >= 0.97


def test_digits_net_is_trained_on_first_use_and_kept(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "FOLDER", tmp_path / "new")
    monkeypatch.setattr(digits, "EPOCHS", 1)
    first = digits.model(seed=5)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["net-5.safetensors"]
    os.utime(tmp_path / "new/net-5.safetensors", (0, 0))
    assert same_weights(digits.model(seed=5), first)
    assert (tmp_path / "new/net-5.safetensors").stat().st_mtime == 0
    assert not same_weights(digits.model(seed=6), first)


def test_cifar10_pipeline(cifar10):
    loaded = load_pipeline(FOLDER / "cifar10.py")
    assert (loaded.name, loaded.masks, loaded.test_masks) == ("cifar10", cifar10.MASKS, cifar10.TEST_MASKS)
    study = loaded.study()
    assert len(study.components) == 688
    assert study.examples.metadata["id"].tolist() == list(range(256))
    assert accuracy(study.model, study.examples) > 0.88
    judge = loaded.judge()
    assert judge.metadata["id"][0] == 256
    assert accuracy(study.model, judge) > 0.88


@pytest.mark.parametrize("name", ["digits", "cifar10"])
@pytest.mark.parametrize(
    "options",
    [{}, {"ablation": "zero"}, {"ablation": "mean", "ablated_fraction": 0.05}, {"seed": 9}],
    ids=str,
)
def test_options_reach_the_study(name, options, request):
    request.getfixturevalue(name)
    study = load_pipeline(FOLDER / f"{name}.py").study(**options)
    assert study.ablation.label == options.get("ablation", "mean")
    assert study.sampler == coar.BernoulliSampler(
        ablated_fraction=options.get("ablated_fraction", 0.10), seed=options.get("seed", 0)
    )


@pytest.mark.parametrize("name", ["digits", "cifar10"])
@pytest.mark.parametrize("options", [{"ablation": "median"}, {"ablated_fraction": 1.0}, {"seed": -1}], ids=str)
def test_options_that_make_no_sense_are_refused(name, options, request):
    request.getfixturevalue(name)
    with pytest.raises(CoarError, match=next(iter(options))):
        load_pipeline(FOLDER / f"{name}.py").study(**options)


def test_options_that_are_none_are_left_to_the_file(written):
    assert written(OWN).study(ablation=None, seed=None).sampler.seed == 3


def test_option_that_the_file_does_not_take_is_refused(written):
    with pytest.raises(PipelineError, match=r"study\(\) in .*own\.py takes no 'seed'"):
        written(OWN).study(seed=1)


def test_settings_that_a_file_leaves_out_have_defaults(written):
    loaded = written("def study(): pass")
    assert (loaded.masks, loaded.gradients, loaded.test_masks, loaded.test_fractions) == (5_000, 0, 500, ())


@pytest.mark.parametrize(
    ("given", "expected"), [((None, None), (0, 32)), ((7, None), (7, 0)), ((None, 8), (0, 8)), ((7, 8), (7, 8))]
)
def test_sizes_are_the_files_where_none_is_given(written, given, expected):
    loaded = written("GRADIENTS = 32\ndef study(): pass")
    assert loaded.masks == 0
    assert loaded.sizes(*given) == dict(zip(("masks", "gradients"), expected, strict=True))


BROKEN = {
    "syntax error": ("def study(:", "SyntaxError"),
    "null byte": ("def study(): pass\0", "SyntaxError"),
    "failing import": ("import no_such_module_anywhere", "no_such_module_anywhere"),
    "failing code": ("1 / 0", "ZeroDivisionError"),
    "an old name": ("from coar import gradient_x_gate", r"an earlier version: .* use coar\.mask_gradient"),
    "an old member": (
        "import coar\nclass Own(coar.Output):\n    tells_right = True",
        "an earlier version: Own defines tells_right",
    ),
    "no study": ("STUDY = 3", r"defines no function study\(\)"),
    "study is no function": ("study = 3", r"defines no function study\(\)"),
    "masks in words": ("MASKS = 'many'\ndef study(): pass", "MASKS"),
    "half a gradient": ("GRADIENTS = 0.5\ndef study(): pass", "GRADIENTS"),
    "fractions as one number": ("TEST_FRACTIONS = 0.1\ndef study(): pass", "TEST_FRACTIONS"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_file_is_named(written, kind):
    text, words = BROKEN[kind]
    with pytest.raises(PipelineError, match=f"own.py.*{words}"):
        written(text)


def test_error_of_the_package_inside_a_file_is_kept(written):
    with pytest.raises(SettingsError, match="ablated_fraction"):
        written("import coar\ncoar.BernoulliSampler(ablated_fraction=3)")


@pytest.mark.parametrize("name", ["nothing.py", "notes.txt", "folder.py", "."])
def test_path_without_a_python_file_is_refused(tmp_path, name):
    (tmp_path / "notes.txt").write_text(OWN)
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(PipelineError, match=r"is not a Python file; give a pipeline such as pipelines/digits\.py"):
        load_pipeline(tmp_path / name)


@pytest.mark.parametrize("returned", ["None", "3", "'study'"])
def test_study_and_judge_must_return_what_they_say(written, returned):
    loaded = written(f"def study(): return {returned}\ndef judge(): return {returned}")
    with pytest.raises(PipelineError, match=r"study\(\) in .* returned a .*; it must return a coar\.Study"):
        loaded.study()
    with pytest.raises(PipelineError, match=r"judge\(\) in .* returned a .*; it must return coar\.Examples"):
        loaded.judge()


def test_missing_judge_is_an_error_only_when_it_is_needed(written):
    loaded = written(OWN)
    loaded.study()
    with pytest.raises(PipelineError, match=r"defines no function judge\(\)"):
        loaded.judge()


@pytest.mark.parametrize("options", [("mean", 0.10, 0), ("zero", 0.10, 7), ("zero", 0.25, 0), ("mean", 0.05, 1)])
def test_study_of_a_run_has_the_options_it_was_collected_with(digits, tmp_path, options):
    loaded = load_pipeline(FOLDER / "digits.py")
    asked = dict(zip(("ablation", "ablated_fraction", "seed"), options, strict=True))
    run = coar.collect(loaded.study(**asked), tmp_path / "r.zarr", masks=2, device="cpu", progress=False)
    again = loaded.study_of(run)
    assert again.fingerprint() == run.fingerprint
    assert (again.ablation.label, again.sampler.ablated_fraction, again.sampler.seed) == options


def test_study_of_a_run_of_something_else_is_refused(digits, tmp_path):
    loaded = load_pipeline(FOLDER / "digits.py")
    other = replace(loaded.study(ablation="zero"), examples=digits.judge().subset(range(5)))
    run = coar.collect(other, tmp_path / "r.zarr", masks=2, device="cpu", progress=False)
    with pytest.raises(MismatchError, match="\n  examples: the run has"):
        loaded.study_of(run)


def test_study_of_a_run_of_a_file_with_few_options(written, tmp_path):
    loaded = written(OWN)
    run = coar.collect(loaded.study(ablated_fraction=0.6), tmp_path / "r.zarr", masks=5, device="cpu", progress=False)
    assert loaded.study_of(run).sampler == coar.FixedSizeSampler(ablated_fraction=0.6, seed=3)
    other = written(OWN.replace("seed=3", "seed=4"), "other.py")
    with pytest.raises(MismatchError, match="sampler"):
        other.study_of(run)


def test_cifar10_without_its_files_says_what_is_missing(cifar10, tmp_path, monkeypatch):
    whole = Path(os.environ["COAR_DATA"]).resolve()
    monkeypatch.setenv("COAR_DATA", str(tmp_path))
    with pytest.raises(CoarError, match=r"cifar10_resnet20\.safetensors"):
        load_pipeline(FOLDER / "cifar10.py").study()
    with pytest.raises(CoarError, match=r"cifar10_subset\.npz"):
        load_pipeline(FOLDER / "cifar10.py").judge()
    (tmp_path / "cifar10_resnet20.safetensors").symlink_to(whole / "cifar10_resnet20.safetensors")
    with pytest.raises(CoarError, match=r"cifar10_subset\.npz"):
        load_pipeline(FOLDER / "cifar10.py").study()


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("content", ["text", "pickled objects"])
def test_cifar10_with_other_things_for_images_says_so(cifar10, tmp_path, monkeypatch, content):
    monkeypatch.setenv("COAR_DATA", str(tmp_path))
    file = tmp_path / "cifar10_subset.npz"
    if content == "text":
        file.write_text("not pictures")
    else:
        objects = np.array([Trap(tmp_path / "sprung")], dtype=object)
        np.savez(file, test_images=objects, test_labels=objects)
    with pytest.raises(CoarError, match=r"cifar10_subset\.npz"):
        load_pipeline(FOLDER / "cifar10.py").judge()
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("kind", ["model", "trap"])
def test_pickled_model_is_refused_and_not_run(written, tmp_path, kind):
    file = tmp_path / "net.pt"
    if kind == "model":
        torch.save(nn.Linear(4, 3), file)
    else:
        file.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    load = f"MODEL = coar.load_weights(torch.nn.Linear(4, 3), {str(file)!r})"
    with pytest.raises(WeightsError, match=r"net\.pt.*unpickling can run code"):
        written(OWN.replace("MODEL = torch.nn.Linear(4, 3)", load))
    assert not (tmp_path / "sprung").exists()


def test_state_dict_of_tensors_is_read(written, tmp_path):
    file = tmp_path / "net.pt"
    weights = {"weight": torch.full((3, 4), 2.0), "bias": torch.zeros(3)}
    torch.save(weights, file)
    load = f"MODEL = coar.load_weights(torch.nn.Linear(4, 3), {str(file)!r})"
    model = written(OWN.replace("MODEL = torch.nn.Linear(4, 3)", load)).study().model
    assert torch.equal(model.weight, weights["weight"])
