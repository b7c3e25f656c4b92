"""Runs collected apart become one, and copies are checked; anything that does not belong together is refused."""

import shutil

import numpy as np
import pytest

import coar
from coar.errors import CorruptRunError, MismatchError, RunError, SettingsError
from coar.store.copying import copy, merge
from coar.store.gradients import MaskGradients
from coar.store.integrity import verify
from tests.faults import helpers

ASKED = {"masks": 100, "test_masks": 20, "gradients": 8}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """120 rows, 8 mask gradients and 20 examples of the tiny net, in one go, read only."""
    return helpers.collect(helpers.study(), tmp_path_factory.mktemp("run") / "whole.zarr", **ASKED)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The same run in three places, with a third of the units each; read only."""
    root = tmp_path_factory.mktemp("parts")
    return [helpers.collect(helpers.study(), root / f"{k}.zarr", **ASKED, worker=(k, 3)) for k in (1, 2, 3)]


def paths(runs):
    return [run.path for run in runs]


def test_shares_of_a_job_array_become_the_run(run, parts, tmp_path):
    counts = [len(part.missing_units()) for part in parts]
    assert all(count == 16 for count in counts)  # of 24 units a third is there
    merge(paths(parts), into=tmp_path / "m.zarr")
    assert helpers.differing(helpers.files(tmp_path / "m.zarr"), helpers.files(run.path)) == []


def test_what_no_part_has_is_left_to_collect(run, parts, tmp_path):
    made = merge(paths(parts[:2]), into=tmp_path / "m.zarr")
    assert len(made.missing_units()) == 8
    assert len(MaskGradients(made).missing_units()) == len(MaskGradients(made).units()) // 3
    helpers.collect(helpers.study(), made.path, **ASKED)
    assert helpers.differing(helpers.files(made.path), helpers.files(run.path)) == []


def test_runs_of_different_lengths(run, tmp_path):
    """The rows of one lie elsewhere in the other: more test masks push them on."""
    one = helpers.collect(helpers.study(), tmp_path / "1.zarr", masks=100, test_masks=4)
    other = helpers.collect(helpers.study(), tmp_path / "2.zarr", masks=10, test_masks=20)
    made = merge([one.path, other.path], into=tmp_path / "m.zarr")
    made.require_complete()
    assert verify(made) == []
    for split, count in (("test", 20), ("train", 100)):
        rows, expected = (r.plan.rows(split, 0.1) for r in (made, run))
        assert len(rows) == count
        np.testing.assert_allclose(
            helpers.whole(made, "outputs")[rows], helpers.whole(run, "outputs")[expected], atol=1e-6
        )
    np.testing.assert_array_equal(helpers.whole(made, "base_output"), helpers.whole(run, "base_output"))


def test_merged_run_fits_as_the_whole_one(run, parts, tmp_path):
    made = merge(paths(parts), into=tmp_path / "m.zarr")
    whole = helpers.copied(run, tmp_path / "w.zarr")
    np.testing.assert_array_equal(coar.fit(made, progress=False).weights(), coar.fit(whole, progress=False).weights())


def other_study(tmp_path):
    return helpers.collect(helpers.study(examples=helpers.examples(inputs=helpers.inputs(2))), tmp_path / "o", **ASKED)


def other_blocks(tmp_path):
    return helpers.collect(helpers.study(), tmp_path / "o", **ASKED, mask_block=8)


def other_rounds(tmp_path):
    return helpers.collect(helpers.study(), tmp_path / "o", **(ASKED | {"gradients": 3}))


def other_outputs(tmp_path):
    changed = helpers.collect(helpers.study(), tmp_path / "o", **ASKED)
    changed.array("outputs")[0:16, 0:8] = changed.outputs(slice(0, 16), slice(0, 8)) + 0.1
    return changed


OTHERS = {
    "study": (other_study, "examples: the run has"),
    "blocks": (other_blocks, r"units of \(16, 8\) and \(8, 8\)"),
    "rounds": (other_rounds, "rounds of mask gradients"),
    "outputs": (other_outputs, r"other outputs .* by 1\.\de-01"),
}


@pytest.mark.parametrize(("make", "message"), OTHERS.values(), ids=OTHERS.keys())
def test_what_does_not_belong_together_is_refused(run, tmp_path, make, message):
    other = make(tmp_path)
    with pytest.raises(MismatchError, match=message):
        merge([run.path, other.path], into=tmp_path / "m.zarr")


def test_damage_in_a_part_is_named(run, parts, tmp_path):
    bad = helpers.copied(parts[0], tmp_path / "bad.zarr")
    file = next(file for file in bad.path.glob("outputs/c/*/*"))
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(CorruptRunError, match=str(file.relative_to(bad.path))):
        merge([bad.path, parts[1].path], into=tmp_path / "m.zarr")


def test_merge_needs_two_and_a_free_place(run, parts, tmp_path):
    with pytest.raises(SettingsError, match="1 runs were given"):
        merge([run.path], into=tmp_path / "m.zarr")
    whole = helpers.copied(run, tmp_path / "w.zarr")
    with pytest.raises(RunError, match="already holds a run"):
        merge(paths(parts), into=whole.path)


def test_copy_is_the_same_byte_for_byte(run, parts, tmp_path):
    for source in (run, parts[1]):
        place = tmp_path / source.path.name
        copy(source, place)
        assert helpers.differing(helpers.files(place), helpers.files(source.path)) == []


def test_copy_refuses_damage_and_what_is_there(run, tmp_path):
    bad = helpers.copied(run, tmp_path / "bad.zarr")
    shutil.copy(bad.path / "outputs/c/2/1", bad.path / "outputs/c/3/1")
    with pytest.raises(CorruptRunError, match=r"outputs/c/3/1 of .*bad\.zarr is from elsewhere"):
        copy(bad, tmp_path / "c.zarr")
    assert not (tmp_path / "c.zarr").exists()
    with pytest.raises(RunError, match="already holds a run"):
        copy(run, bad.path)


def test_copy_cut_short_begins_again(run, tmp_path):
    place = tmp_path / "c.zarr"
    copy(run, place)
    (place / "zarr.json").unlink()
    (place / "creating.json").write_text("{}")
    shutil.rmtree(place / "outputs")
    with pytest.raises(RunError, match=r"creation of the run .* was interrupted"):
        coar.Run.open(place)
    copy(run, place)
    assert helpers.differing(helpers.files(place), helpers.files(run.path)) == []
