"""Damaged chunks are found, named, and made again as they were."""

import shutil

import google_crc32c
import numpy as np
import pytest

import coar
from coar.errors import CorruptRunError, IncompleteRunError, RunError
from coar.store import arrays
from coar.store.integrity import Problem, repair, verify
from coar.store.run import pack
from tests.faults import helpers

ASKED = {"masks": 100, "test_masks": 20}
HEAD = bytes.fromhex("5c2a4d18 14000000") + b"coar"  # a skippable frame of 20 bytes, as RFC 8878 writes it
ROWS, EXAMPLES = slice(0, 120), slice(0, helpers.EXAMPLES)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """120 rows and 20 examples of the tiny net, in one go, read only."""
    return helpers.collect(helpers.study(), tmp_path_factory.mktemp("run") / "tiny.zarr", **ASKED)


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """The same rows, asked for in two steps, so that block 3 was once partly filled; read only."""
    path = tmp_path_factory.mktemp("run") / "steps.zarr"
    helpers.collect(helpers.study(), path, masks=40, test_masks=20)
    return helpers.collect(helpers.study(), path, **ASKED)


@pytest.fixture
def fresh(run, tmp_path):
    """A copy of the run to damage."""
    return helpers.copied(run, tmp_path / "copy.zarr")


def truncated(file):
    file.write_bytes(file.read_bytes()[:-7])


def emptied(file):
    file.write_bytes(b"")


def flipped(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0b100
    file.write_bytes(content)


def checksum_flipped(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def replaced(file):
    file.write_bytes(b"not a chunk of this run")


def removed(file):
    file.unlink()


SPOILED = [truncated, emptied, flipped]

# chunk -> (how it is read, what mends it)
KINDS = {
    "outputs/c/1/1": (lambda run: run.outputs(ROWS, EXAMPLES), "coar collect"),
    "outputs/c/7/2": (lambda run: run.outputs(ROWS, EXAMPLES), "coar collect"),
    "masks/c/1/0": (lambda run: run.masks(0, 120), "coar collect"),
    "base_output/c/2": (lambda run: run.column("base_output"), "coar collect"),
    "split/c/0": (lambda run: run.column("split"), "coar verify --repair"),
    "ablated_fraction/c/0": (lambda run: run.column("ablated_fraction"), "coar verify --repair"),
    "example/label/c/0": (lambda run: run.metadata, ""),
    "example/group/c/0": (lambda run: run.metadata, ""),
    "component/name/c/0": (lambda run: run.components, ""),
    "component/replacement/c/0": (lambda run: run.replacements, ""),
}


def reopened(run):
    return coar.Run.open(run.path)


def check_mended(run, original, problems):
    """Repair, collect again, and compare all chunks with the original's, byte for byte."""
    assert repair(run, problems) == []
    helpers.collect(helpers.study(), run.path, **ASKED)
    assert helpers.differing(helpers.chunks(run.path), helpers.chunks(original.path)) == []
    assert verify(reopened(run)) == []


def test_an_intact_run_has_no_problems(run, extended):
    assert verify(run) == []
    assert verify(extended) == []


@pytest.mark.parametrize("chunk", KINDS)
@pytest.mark.parametrize("spoil", [*SPOILED, checksum_flipped, replaced])
def test_spoiled_chunk_is_found(fresh, chunk, spoil):
    spoil(fresh.path / chunk)
    name = chunk.split("/c/")[0]
    assert verify(reopened(fresh)) == [Problem(name, chunk, "damaged", KINDS[chunk][1])]


@pytest.mark.parametrize("chunk", KINDS)
def test_missing_chunk_is_found(fresh, chunk):
    removed(fresh.path / chunk)
    name = chunk.split("/c/")[0]
    assert verify(reopened(fresh)) == [Problem(name, chunk, "missing", KINDS[chunk][1])]


@pytest.mark.parametrize("chunk", KINDS)
@pytest.mark.parametrize("spoil", [*SPOILED, removed])
def test_reading_a_spoiled_chunk_names_it(fresh, chunk, spoil):
    spoil(fresh.path / chunk)
    read, _ = KINDS[chunk]
    with pytest.raises((CorruptRunError, IncompleteRunError), match=chunk):
        read(reopened(fresh))


@pytest.mark.parametrize("chunk", [chunk for chunk, (_, mended_by) in KINDS.items() if mended_by])
@pytest.mark.parametrize("spoil", [*SPOILED, removed])
def test_spoiled_chunk_is_made_again(run, fresh, chunk, spoil):
    spoil(fresh.path / chunk)
    check_mended(fresh, run, verify(reopened(fresh)))


@pytest.mark.parametrize("chunk", [chunk for chunk, (_, mended_by) in KINDS.items() if not mended_by])
@pytest.mark.parametrize("spoil", [truncated, removed])
def test_what_cannot_be_made_again_is_returned(fresh, chunk, spoil):
    spoil(fresh.path / chunk)
    flipped(fresh.path / "outputs/c/4/0")
    problems = verify(reopened(fresh))
    left = repair(reopened(fresh), problems)
    assert [problem.chunk for problem in left] == [chunk]
    assert not (fresh.path / "outputs/c/4/0").exists()
    assert (fresh.path / chunk).exists() == (spoil is truncated)


@pytest.mark.parametrize("chunk", ["outputs/c/3/0", "outputs/c/3/2", "masks/c/3/0"])
@pytest.mark.parametrize("spoil", [*SPOILED, removed])
def test_spoiled_chunk_of_a_block_filled_in_two_steps(run, extended, tmp_path, chunk, spoil):
    damaged = helpers.copied(extended, tmp_path / "copy.zarr")
    spoil(damaged.path / chunk)
    problems = verify(reopened(damaged))
    assert [problem.chunk for problem in problems] == [chunk]
    check_mended(damaged, run, problems)


def test_every_chunk_file_is_watched(fresh):
    names = list(helpers.chunks(fresh.path))
    rng = np.random.default_rng(0)
    for name in names:
        file = fresh.path / name
        content = bytearray(file.read_bytes())
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        file.write_bytes(content)
    problems = verify(reopened(fresh))
    assert sorted(problem.chunk for problem in problems) == sorted(names)
    assert {problem.what for problem in problems} == {"damaged"}


def test_many_problems_are_mended_at_once(run, fresh):
    flipped(fresh.path / "outputs/c/0/0")
    truncated(fresh.path / "outputs/c/7/1")
    removed(fresh.path / "outputs/c/5/2")
    emptied(fresh.path / "masks/c/2/0")
    flipped(fresh.path / "base_output/c/0")
    truncated(fresh.path / "split/c/0")
    problems = verify(reopened(fresh))
    assert len({problem.chunk for problem in problems}) == 6
    check_mended(fresh, run, problems)


@pytest.mark.parametrize("name", ["outputs/c/{}/1", "masks/c/{}/0"])
def test_swapped_chunks_are_found_and_made_again(run, fresh, name):
    """Each is whole and has a valid checksum, and only its seal says that it belongs elsewhere."""
    one, other = fresh.path / name.format(2), fresh.path / name.format(5)
    assert one.read_bytes() != other.read_bytes()
    between = one.rename(fresh.path.parent / "between")
    other.rename(one)
    between.rename(other)
    problems = verify(reopened(fresh))
    assert [problem.what for problem in problems] == ["from elsewhere"] * 2
    with pytest.raises(CorruptRunError, match=rf"{name.format(2)}.*another path or another study, and moved here"):
        reopened(fresh).outputs(ROWS, EXAMPLES) if "outputs" in name else reopened(fresh).masks(0, 120)
    check_mended(fresh, run, problems)


def test_chunk_of_another_study_is_found_and_made_again(run, fresh, tmp_path):
    other = helpers.collect(helpers.study(examples=helpers.examples(inputs=helpers.inputs(2))), tmp_path / "o", **ASKED)
    shutil.copy(other.path / "outputs/c/2/1", fresh.path / "outputs/c/2/1")
    problems = verify(reopened(fresh))
    assert problems == [Problem("outputs", "outputs/c/2/1", "from elsewhere", "coar collect")]
    check_mended(fresh, run, problems)


def test_run_written_before_there_were_seals(run, fresh):
    """Its chunks end in the checksum of the compressed bytes; they are read as ever."""
    for name, content in helpers.chunks(fresh.path).items():
        assert content[-32:-20] == HEAD
        body = content[:-32]
        (fresh.path / name).write_bytes(body + google_crc32c.value(body).to_bytes(4, "little"))
    assert verify(reopened(fresh)) == []
    np.testing.assert_array_equal(helpers.whole(reopened(fresh), "outputs"), helpers.whole(run, "outputs"))


def test_masks_of_other_rows_are_found_and_made_again(run, fresh):
    fresh.array("masks")[16:32] = pack(run.draw(slice(0, 16)))
    problems = verify(reopened(fresh))
    assert problems == [Problem("masks", "masks/c/1/0", "not from its seed", "coar collect")]
    row = 16 + int((run.masks(0, 16) != run.masks(16, 32)).any(axis=1).argmax())
    with pytest.raises(CorruptRunError, match=rf"masks/c/1/0 .*row {row} .*test mask {row} .*seed gives"):
        reopened(fresh).masks(0, 120)
    check_mended(fresh, run, problems)


def test_one_wrong_bit_under_a_valid_checksum(run, fresh):
    masks = fresh.array("masks")
    block = masks[32:48]
    block[5, 1] ^= 2
    masks[32:48] = block
    problems = verify(reopened(fresh))
    assert [(problem.chunk, problem.what) for problem in problems] == [("masks/c/2/0", "not from its seed")]
    check_mended(fresh, run, problems)


@pytest.mark.parametrize(
    ("name", "values"), [("split", ["train"] * 120), ("ablated_fraction", [0.2] * 120), ("split", ["test"] * 7)]
)
def test_rows_that_are_not_as_planned(run, fresh, name, values):
    arrays.write_all(fresh.group, name, np.array(values), "mask")
    problems = verify(reopened(fresh))
    assert {(problem.array, problem.what) for problem in problems} == {(name, "not as planned")}
    check_mended(fresh, run, problems)


def test_base_output_that_is_not_finite(run, fresh):
    fresh.array("base_output")[8:16] = np.nan
    problems = verify(reopened(fresh))
    assert problems == [Problem("base_output", "base_output/c/1", "not finite", "coar collect")]
    check_mended(fresh, run, problems)


def test_output_that_is_not_finite(run, fresh):
    fresh.array("outputs")[37, 11] = np.nan
    problems = verify(reopened(fresh))
    assert problems == [Problem("outputs", "outputs/c/2/1", "not finite", "coar collect")]
    check_mended(fresh, run, problems)


def test_units_not_collected_yet_are_missing_not_damaged(fresh):
    for name in ("outputs/c/0/0", "outputs/c/6/2"):
        removed(fresh.path / name)
    problems = verify(reopened(fresh))
    assert [(p.chunk, p.what) for p in problems] == [("outputs/c/0/0", "missing"), ("outputs/c/6/2", "missing")]
    assert repair(reopened(fresh), problems) == []


def test_rows_not_collected_yet_are_no_damage(run, extended, tmp_path):
    path = tmp_path / "r.zarr"
    part = helpers.collect(helpers.study(), path, masks=40, test_masks=20)
    part.extend(extended.plan)
    flipped(path / "outputs/c/0/1")
    problems = verify(reopened(part))
    found = {problem.chunk: problem.what for problem in problems if problem.what != "missing"}
    assert found == {"outputs/c/0/1": "damaged", "masks/c/3/0": "partly filled"} | {
        f"outputs/c/3/{j}": "partly filled" for j in range(3)
    }
    missing = {problem.chunk for problem in problems if problem.what == "missing"}
    assert missing == {f"outputs/c/{i}/{j}" for i in range(4, 8) for j in range(3)}
    assert repair(reopened(part), problems) == []
    assert (path / "outputs/c/3/2").exists()
    helpers.collect(helpers.study(), path, **ASKED)
    assert helpers.differing(helpers.files(path), helpers.files(extended.path)) == []


@pytest.mark.parametrize("name", ["outputs", "example/label"])
def test_damaged_description_of_an_array_is_named(fresh, name):
    truncated(fresh.path / name / "zarr.json")
    with pytest.raises(CorruptRunError, match=name):
        verify(reopened(fresh))


def test_damaged_fit_is_deleted_whole(fresh):
    values = np.arange(40, dtype=np.float32).reshape(2, 20)
    arrays.write_all(fresh.group, "attributions/ridge/intercept", values[0], "example")
    arrays.write_all(fresh.group, "attributions/ridge/penalty", values[1], "example")
    arrays.write_all(fresh.group, "attributions/ols/penalty", values[1], "example")
    flipped(fresh.path / "attributions/ridge/penalty/c/0")
    problems = verify(reopened(fresh))
    assert [(problem.chunk, problem.what) for problem in problems] == [("attributions/ridge/penalty/c/0", "damaged")]
    assert "coar fit" in problems[0].mended_by
    assert repair(reopened(fresh), problems) == []
    assert "attributions/ridge" not in reopened(fresh).group
    np.testing.assert_array_equal(helpers.whole(fresh, "attributions/ols/penalty"), values[1])


def test_repair_of_a_run_that_has_grown_since_it_was_opened(run, tmp_path):
    path = tmp_path / "r.zarr"
    opened = helpers.collect(helpers.study(), path, masks=40, test_masks=20)
    flipped(path / "split/c/0")
    problems = verify(opened)
    helpers.collect(helpers.study(), path, **ASKED)
    flipped(path / "split/c/0")
    assert repair(opened, problems) == []
    assert reopened(opened).plan.extents == (60, 120)
    assert helpers.differing(helpers.chunks(path), helpers.chunks(run.path)) == []
    assert verify(reopened(opened)) == []


def test_repair_waits_for_no_writer(fresh):
    flipped(fresh.path / "outputs/c/0/0")
    problems = verify(fresh)
    with fresh.lock(), pytest.raises(RunError, match="another process is writing"):
        repair(reopened(fresh), problems)
    assert (fresh.path / "outputs/c/0/0").exists()
