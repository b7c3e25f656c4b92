"""Runs of format 1 are refused in words wherever a run is taken, and copied into the present format whole."""

import hashlib
import json
import shutil

import google_crc32c
import numpy as np
import pytest
from typer.testing import CliRunner

import coar
from coar.cli.common import app
from coar.errors import CorruptRunError, MismatchError, RunError
from coar.store.copying import copy, merge
from coar.store.gradients import MaskGradients
from coar.store.integrity import verify
from tests.faults import helpers

ASKED = {"gradients": 12, "masks": 40, "test_masks": 20, "validation_masks": 10}
OLD_PATHS = {
    "gradient_kept": "probe_kept",
    "gradient_ablated": "probe_ablated",
    "gradient_outputs": "probe_outputs",
    "attributions/mask_gradient": "attributions/gradient_x_gate",
}
FRAME = bytes.fromhex("5c2a4d18 14000000") + b"coar"  # of a seal, as docs/run_format.md has it


def resealed(content, path, key):
    """A chunk's bytes with the seal of another path."""
    body = content[: -len(FRAME) - 16 - 4] + FRAME + hashlib.blake2b(path.encode(), key=key, digest_size=16).digest()
    return body + int(google_crc32c.value(body)).to_bytes(4, "little")


def made_old(run, path):
    """Write a run as format 1 had it: other names of arrays, axes, attributes and a baseline, no code of the model."""
    study = {name: value for name, value in run.fingerprint.items() if name != "code"}
    key = hashlib.blake2b(json.dumps(study, sort_keys=True).encode(), digest_size=32).digest()
    for file in [file for file in run.path.rglob("*") if file.is_file()]:
        name, content = str(file.relative_to(run.path)), file.read_bytes()
        for new, old in OLD_PATHS.items():
            if name.startswith(f"{new}/"):
                name = old + name.removeprefix(new)
        if "/c/" in name:
            content = resealed(content, name, key)
        else:
            words = content.decode().replace('"gradient"', '"probe"').replace('"gradients"', '"probes"')
            words = words.replace('"mask_groups"', '"slots"').replace('"mask_gradient"', '"gradient_x_gate"')
            description = json.loads(words.replace('"format": 2', '"format": 1'))
            if name == "zarr.json":
                description["attributes"]["coar"]["fingerprint"] = study
            content = json.dumps(description).encode()
        target = path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with mask gradients, two fits and a baseline; read only."""
    made = helpers.collect(helpers.study(), tmp_path_factory.mktemp("run") / "new.zarr", **ASKED)
    coar.fit(made, progress=False)
    coar.mask_gradient(helpers.study(), made, device="cpu", progress=False)
    return made


@pytest.fixture(scope="module")
def old(run, tmp_path_factory):
    """The same as a run of format 1; read only."""
    return made_old(run, tmp_path_factory.mktemp("run") / "old.zarr")


def test_the_old_run_differs_in_every_name(run, old):
    manifest = json.loads((old / "zarr.json").read_text())["attributes"]["coar"]
    assert manifest["format"] == 1
    assert manifest["probes"] == {"rounds": [2, 2, 2, 2, 4], "slots": 64, "masks": "stratified"}
    assert not any("gradient_outputs" in name or "mask_gradient" in name for name in helpers.files(old))


PYTHON = {
    "open": lambda old, new: coar.Run.open(old),
    "collect": lambda old, new: helpers.collect(helpers.study(), old, **ASKED),
    "collect as a worker": lambda old, new: helpers.collect(helpers.study(), old, **ASKED, worker=(1, 2)),
    "load": lambda old, new: coar.load(old),
    "merge": lambda old, new: merge([old, old], into=new),
}
WORDS = r"has format 1, and this version reads format 2; make a copy in format 2 with 'coar copy .* NEW'"


@pytest.mark.parametrize("call", PYTHON.values(), ids=PYTHON)
def test_python_refuses_it_in_words_and_changes_nothing(old, tmp_path, call):
    before = helpers.stamps(old)
    with pytest.raises(RunError, match=WORDS):
        call(old, tmp_path / "new.zarr")
    assert helpers.stamps(old) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [
        ["fit"],
        ["evaluate"],
        ["info"],
        ["verify"],
        ["verify", "--repair"],
        ["report"],
        ["explore", "--pipeline", "any.py"],
        ["merge", "--into", "new.zarr"],
    ],
    ids=" ".join,
)
def test_commands_refuse_it_in_words_and_change_nothing(old, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    before = helpers.stamps(old)
    runs = [str(old)] * (2 if command[0] == "merge" else 1)
    result = CliRunner().invoke(app, [command[0], *runs, *command[1:]])
    assert result.exit_code == 1
    assert "has format 1, and this version reads format 2" in result.output
    assert helpers.stamps(old) == before
    assert list(tmp_path.iterdir()) == []


def test_a_copy_is_the_run_of_the_present_format(run, old, tmp_path):
    before = helpers.stamps(old)
    made = copy(old, tmp_path / "copy.zarr")
    assert helpers.stamps(old) == before
    assert helpers.chunks(made.path).keys() == helpers.chunks(run.path).keys()
    for name in ("outputs", "masks", "base_output", *list(OLD_PATHS)[:3]):
        np.testing.assert_array_equal(helpers.whole(made, name), helpers.whole(run, name))
    assert verify(made) == []
    assert MaskGradients(made).rounds == MaskGradients(run).rounds
    for name in ("informed", "ridge", "mask_gradient"):
        np.testing.assert_array_equal(coar.load(made.path, name).weights(), coar.load(run.path, name).weights())
        assert coar.load(made.path, name).fit == coar.load(run.path, name).fit


def test_a_copy_goes_on_once_the_models_code_is_accepted(old, tmp_path):
    made = copy(old, tmp_path / "copy.zarr")
    longer = ASKED | {"gradients": 16, "masks": 60}
    with pytest.raises(MismatchError, match="accept_code"):
        helpers.collect(helpers.study(), made.path, **longer)
    made.accept_code(helpers.net())
    again = helpers.collect(helpers.study(), made.path, **longer)
    assert MaskGradients(again).rounds == (2, 2, 2, 2, 4, 4)
    assert verify(again) == []


def test_the_command_copies_it(old, tmp_path):
    result = CliRunner().invoke(app, ["copy", str(old), str(tmp_path / "copy.zarr")])
    assert result.exit_code == 0, result.output
    assert verify(coar.Run.open(tmp_path / "copy.zarr")) == []


def flipped(path):
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)


def moved(path):
    shutil.copy(path.parent / "1", path)


@pytest.mark.parametrize("spoil", [flipped, moved])
@pytest.mark.parametrize("chunk", ["outputs/c/0/0", "probe_outputs/c/0/0/0"])
def test_a_spoiled_chunk_is_named_and_not_copied(old, tmp_path, chunk, spoil):
    fresh = shutil.copytree(old, tmp_path / "old.zarr")
    spoil(fresh / chunk)
    with pytest.raises(CorruptRunError, match=f"chunk {chunk} of the run is damaged or was moved there"):
        copy(fresh, tmp_path / "copy.zarr")
    with pytest.raises(RunError, match=r"creation of the run .* was interrupted"):
        coar.Run.open(tmp_path / "copy.zarr")


def test_a_damaged_description_is_named(old, tmp_path):
    fresh = shutil.copytree(old, tmp_path / "old.zarr")
    (fresh / "probe_kept/zarr.json").write_text("{")
    with pytest.raises(CorruptRunError, match=r"probe_kept/zarr\.json of the run is damaged"):
        copy(fresh, tmp_path / "copy.zarr")


def test_nothing_is_written_over(old, run, tmp_path):
    place = helpers.copied(run, tmp_path / "there.zarr").path
    before = helpers.stamps(place)
    with pytest.raises(RunError, match="already holds a run; copy to another path"):
        copy(old, place)
    assert helpers.stamps(place) == before
