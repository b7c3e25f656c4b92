"""Damaged chunks of mask gradients are found, named, and made again as they were."""

import json
import shutil

import numpy as np
import pytest

import coar
from coar.errors import CorruptRunError, IncompleteRunError
from coar.store.gradients import MaskGradients
from coar.store.integrity import Problem, repair, verify
from tests.faults import helpers
from tests.test_integrity import SPOILED, checksum_flipped, flipped, removed, reopened, replaced, truncated

ASKED = {"masks": 40, "gradients": 13}  # rounds of 2, 2, 2, 2, 4 and 1 mask gradients, on 3 blocks of examples
NAMES = ("gradient_kept", "gradient_ablated", "gradient_outputs")
CHUNKS = ["gradient_kept/c/1/0/0", "gradient_ablated/c/3/2/0", "gradient_outputs/c/0/0/1", "gradient_outputs/c/5/0/2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Forty masks and thirteen mask gradients of the tiny net, read only."""
    return helpers.collect(helpers.study(), tmp_path_factory.mktemp("run") / "tiny.zarr", **ASKED)


@pytest.fixture
def fresh(run, tmp_path):
    """A copy of the run to damage."""
    return helpers.copied(run, tmp_path / "copy.zarr")


def check_mended(run, original, problems):
    """Repair, collect again, and compare all chunks with the original's, byte for byte."""
    assert repair(run, problems) == []
    helpers.collect(helpers.study(), run.path, **ASKED)
    assert helpers.differing(helpers.chunks(run.path), helpers.chunks(original.path)) == []
    assert verify(reopened(run)) == []


def test_short_rounds_and_means_of_no_mask_gradients_are_no_problem(run):
    outputs = helpers.whole(run, "gradient_outputs")
    assert outputs.shape == (6, 32, helpers.EXAMPLES)
    assert [int(np.isfinite(part).all(1).sum()) for part in outputs] == [2, 2, 2, 2, 4, 1]
    assert any(np.isnan(helpers.whole(run, name)).any() for name in NAMES[:2])
    assert verify(run) == []


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("spoil", [*SPOILED, checksum_flipped, replaced])
def test_spoiled_chunk_is_found_and_made_again(run, fresh, chunk, spoil):
    spoil(fresh.path / chunk)
    problems = verify(reopened(fresh))
    assert problems == [Problem(chunk.split("/")[0], chunk, "damaged", "coar collect")]
    check_mended(fresh, run, problems)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_missing_chunk_is_found_and_made_again(run, fresh, chunk):
    removed(fresh.path / chunk)
    problems = verify(reopened(fresh))
    assert problems == [Problem(chunk.split("/")[0], chunk, "missing", "coar collect")]
    number, block = (int(chunk.split("/")[i]) for i in ((2, 4) if "outputs" in chunk else (2, 3)))
    assert MaskGradients(fresh).missing_units() == [(number, block)]
    check_mended(fresh, run, problems)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("spoil", [*SPOILED, removed])
def test_reading_a_spoiled_chunk_says_so(fresh, chunk, spoil):
    spoil(fresh.path / chunk)
    found = MaskGradients(reopened(fresh))
    read, rounds = (found.outputs, 6) if "outputs" in chunk else (found.means, range(6))
    with pytest.raises((CorruptRunError, IncompleteRunError), match="collect" if spoil is removed else chunk):
        read(rounds, slice(0, helpers.EXAMPLES))


def test_every_chunk_file_is_watched(fresh):
    names = [name for name in helpers.chunks(fresh.path) if name.startswith("gradient_")]
    assert len(names) == 3 * 6 * 3
    for name in names:
        flipped(fresh.path / name)
    problems = verify(reopened(fresh))
    assert sorted(problem.chunk for problem in problems) == sorted(names)
    assert {problem.what for problem in problems} == {"damaged"}


def test_many_problems_are_mended_at_once(run, fresh):
    flipped(fresh.path / "gradient_kept/c/0/0/0")
    removed(fresh.path / "gradient_outputs/c/0/0/0")
    truncated(fresh.path / "gradient_ablated/c/2/1/0")
    removed(fresh.path / "gradient_kept/c/5/2/0")
    flipped(fresh.path / "outputs/c/1/1")
    problems = verify(reopened(fresh))
    assert len({problem.chunk for problem in problems}) == 5
    check_mended(fresh, run, problems)


def entry_of_one(fresh, name, value, *, at=None):
    """Change an entry under a valid checksum: by default the first that is finite in the last round."""
    array = fresh.array(name)
    values = array[5:]
    place = tuple(np.argwhere(np.isfinite(values))[0]) if at is None else at
    values[place] = value
    array[5:] = values


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_entry_that_is_not_finite(run, fresh, name, value):
    entry_of_one(fresh, name, value)
    problems = verify(reopened(fresh))
    assert [(problem.array, problem.what, problem.mended_by) for problem in problems] == [
        (name, "not finite", "coar collect")
    ]
    check_mended(fresh, run, problems)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0.0, np.inf])
def test_entry_where_there_was_no_mask_gradient(run, fresh, name, value):
    nowhere = tuple(np.argwhere(np.isnan(helpers.whole(fresh, name)[5:]))[0])
    entry_of_one(fresh, name, value, at=nowhere)
    problems = verify(reopened(fresh))
    assert [(problem.array, problem.what) for problem in problems] == [(name, "not as planned")]
    check_mended(fresh, run, problems)


def unplanned(run):
    """Take the mask gradients out of the run's description."""
    description = json.loads((run.path / "zarr.json").read_text())
    del description["attributes"]["coar"]["gradients"]
    (run.path / "zarr.json").write_text(json.dumps(description))


@pytest.mark.parametrize("then", [0, 13, 3])
def test_mask_gradients_planned_but_cut_before_they_were_written_down(run, fresh, then):
    for name in NAMES:
        shutil.rmtree(fresh.path / name / "c")
    unplanned(fresh)
    assert verify(reopened(fresh)) == []
    collected = helpers.collect(helpers.study(), fresh.path, **(ASKED | {"gradients": then}))
    assert MaskGradients(collected).count == then
    assert verify(reopened(fresh)) == []
    if then == 13:
        assert helpers.differing(helpers.files(fresh.path), helpers.files(run.path)) == []


@pytest.mark.parametrize("stage", range(4))
def test_extension_cut_short(run, fresh, tmp_path, stage):
    longer = helpers.collect(helpers.study(), helpers.copied(run, tmp_path / "longer.zarr").path, gradients=20)
    for name in NAMES[:stage]:
        shutil.copy(longer.path / name / "zarr.json", fresh.path / name)  # resized, in the order of an extension
    assert verify(reopened(fresh)) == []
    assert MaskGradients(reopened(fresh)).missing_units() == []
    helpers.collect(helpers.study(), fresh.path, gradients=20)
    assert helpers.differing(helpers.files(fresh.path), helpers.files(longer.path)) == []


def test_chunks_beyond_the_plan_are_found_and_removed(run, fresh):
    unplanned(fresh)
    problems = verify(reopened(fresh))
    assert len(problems) == 3 * 6 * 3
    assert {problem.what for problem in problems} == {"not as planned"}
    check_mended(fresh, run, problems)


def test_incomplete_mask_gradients_are_missing_by_their_outputs(fresh):
    for name in NAMES:
        removed(fresh.path / name / ("c/2/0/1" if name == "gradient_outputs" else "c/2/1/0"))
    assert verify(reopened(fresh)) == [
        Problem("gradient_outputs", "gradient_outputs/c/2/0/1", "missing", "coar collect")
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_lost_array_is_corrupt(fresh, name):
    shutil.rmtree(fresh.path / name)
    with pytest.raises(CorruptRunError, match=rf"'{name}' .* is missing"):
        verify(reopened(fresh))


def test_damage_is_reported_and_cleared_on_the_command_line(run, fresh):
    from typer.testing import CliRunner

    from coar.cli.common import app

    flipped(fresh.path / "gradient_kept/c/1/0/0")
    result = CliRunner().invoke(app, ["verify", str(fresh.path), "--repair"])
    assert result.exit_code == 0
    assert "gradient_kept/c/1/0/0: damaged; 'coar collect' makes it again" in result.stdout
    helpers.collect(helpers.study(), fresh.path, **ASKED)
    assert helpers.differing(helpers.chunks(fresh.path), helpers.chunks(run.path)) == []
    assert coar.verify(reopened(fresh)) == []
