"""A run on disk: its layout, what can be opened, and who may write."""

import asyncio
import json
import subprocess
import sys
from contextlib import suppress

import numpy as np
import pytest
import xarray
import zarr

import coar
from coar.errors import CorruptRunError, IncompleteRunError, RunError
from coar.store import arrays
from coar.store.integrity import verify
from coar.store.plan import Unit
from tests.faults import helpers

FLOAT = {"float32": "NaN", "float64": "NaN"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """120 rows and 20 examples of the tiny net, read only."""
    return helpers.collect(helpers.study(), tmp_path_factory.mktemp("run") / "tiny.zarr", masks=100, test_masks=20)


@pytest.fixture
def fresh(run, tmp_path):
    """A copy of the run to change."""
    return helpers.copied(run, tmp_path / "copy.zarr")


def description(run, name):
    return json.loads((run.path / name / "zarr.json").read_text())


LAYOUT = {
    "outputs": ("float32", [120, 20], [16, 8], ["mask", "example"]),
    "masks": ("uint8", [120, 2], [16, 2], ["mask", "byte"]),
    "base_output": ("float32", [20], [8], ["example"]),
    "split": ("string", [120], [120], ["mask"]),
    "ablated_fraction": ("float64", [120], [120], ["mask"]),
    "example/id": ("int64", [20], [20], ["example"]),
    "example/label": ("int64", [20], [20], ["example"]),
    "example/group": ("string", [20], [20], ["example"]),
    "component/name": ("string", [11], [11], ["component"]),
    "component/kind": ("string", [11], [11], ["component"]),
    "component/site": ("string", [11], [11], ["component"]),
    "component/side": ("string", [11], [11], ["component"]),
    "component/axis": ("int64", [11], [11], ["component"]),
    "component/position": ("int64", [11], [11], ["component"]),
    "component/size": ("int64", [11], [11], ["component"]),
    "component/replacement": ("float32", [11], [11], ["component"]),
}


@pytest.mark.parametrize("name", LAYOUT)
def test_array_is_as_designed(run, name):
    dtype, shape, chunk, dimensions = LAYOUT[name]
    found = description(run, name)
    assert found["data_type"] == dtype
    assert found["shape"] == shape
    assert found["chunk_grid"] == {"name": "regular", "configuration": {"chunk_shape": chunk}}
    assert found["dimension_names"] == dimensions
    assert found["fill_value"] == FLOAT.get(dtype, "" if dtype == "string" else 0)
    serializer = "vlen-utf8" if dtype == "string" else "bytes"
    assert [codec["name"] for codec in found["codecs"]] == [serializer, "zstd", "crc32c"]


def test_nothing_else_is_in_the_run(run):
    arrays = {name for name, node in run.group.members(max_depth=None) if isinstance(node, zarr.Array)}
    assert arrays == set(LAYOUT)
    chunks = {name.split("/c/")[0] for name in helpers.chunks(run.path)}
    assert chunks == set(LAYOUT)
    assert len([name for name in helpers.chunks(run.path) if name.startswith("outputs/")]) == 8 * 3


def test_masks_are_packed_little_endian_and_one_keeps(run):
    packed = helpers.whole(run, "masks")
    sampler = coar.BernoulliSampler()
    expected = np.concatenate([sampler.masks("test", range(20), 11), sampler.masks("train", range(100), 11)])
    bits = [[packed[row, i // 8] >> (i % 8) & 1 for i in range(16)] for row in range(120)]
    np.testing.assert_array_equal(np.array(bits)[:, :11], expected)
    assert not np.array(bits)[:, 11:].any()
    np.testing.assert_array_equal(run.masks(0, 120), expected)
    np.testing.assert_array_equal(run.masks(30, 41), expected[30:41])


def test_row_columns_follow_the_plan(tmp_path):
    run = helpers.collect(
        helpers.study(), tmp_path / "r.zarr", masks=7, test_masks=3, validation_masks=2, test_fractions=[0.3]
    )
    assert helpers.whole(run, "split").tolist() == ["test"] * 6 + ["validation"] * 2 + ["train"] * 7
    np.testing.assert_array_equal(helpers.whole(run, "ablated_fraction"), [0.1] * 3 + [0.3] * 3 + [0.1] * 9)


def test_example_and_component_columns_are_the_study(run):
    study = helpers.study()
    assert {name: column.tolist() for name, column in run.metadata.items()} == {
        "id": list(range(20)),
        "label": [i % 3 for i in range(20)],
        "group": [f"group {i % 2}" for i in range(20)],
    }
    assert run.components == study.components
    assert helpers.whole(run, "component/name").tolist() == [f"hidden[{i}]" for i in range(11)]
    np.testing.assert_array_equal(run.replacements, study.model.hidden.bias.detach().numpy())


def test_run_says_what_it_is(run):
    manifest = description(run, "")["attributes"]["coar"]
    assert (manifest["format"], manifest["state"]) == (2, "ready")
    assert manifest["fingerprint"] == helpers.study().fingerprint() == run.fingerprint
    assert manifest["plan"] == {"segments": [["test", 0.1, 0, 20], ["train", 0.1, 0, 100]], "extents": [120]}
    assert (run.n_examples, run.blocks, len(run.plan)) == (20, (16, 8), 120)
    assert run.sampler == coar.BernoulliSampler()


def test_units_cover_every_output_once(run):
    seen = np.zeros((120, 20), dtype=int)
    for unit in run.units():
        seen[run.rows_of(unit)] += 1
    assert (seen == 1).all()
    assert run.rows_of(Unit(7, 2)) == (slice(112, 120), slice(16, 20))
    assert run.missing_units() == []
    run.require_complete()


def test_xarray_opens_the_run_as_it_is(run):
    with xarray.open_zarr(run.path, consolidated=False) as data:
        assert dict(data.sizes) == {"mask": 120, "example": 20, "byte": 2}
        assert data["outputs"].dims == ("mask", "example")
        np.testing.assert_array_equal(data["outputs"].values, run.outputs(slice(None), slice(None)))
        train = data["outputs"].values[data["split"].values == "train"]
        np.testing.assert_array_equal(train, run.outputs(slice(20, 120), slice(None)))
    with xarray.open_zarr(run.path, group="component", consolidated=False) as data:
        assert data["name"].values.tolist() == list(run.components.names)


def test_reads_inside_a_running_event_loop(run):
    async def notebook():
        opened = coar.Run.open(run.path)
        assert opened.missing_units() == []
        assert opened.components == run.components
        return opened.outputs(slice(10, 20), slice(0, 20))

    np.testing.assert_array_equal(asyncio.run(notebook()), run.outputs(slice(10, 20), slice(0, 20)))


def test_collect_inside_a_running_event_loop(run, tmp_path):
    async def notebook():
        return helpers.collect(helpers.study(), tmp_path / "r.zarr", masks=100, test_masks=20)

    assert helpers.differing(helpers.files(asyncio.run(notebook()).path), helpers.files(run.path)) == []


def test_reading_what_is_not_collected_names_the_chunk(fresh):
    (fresh.path / "outputs/c/3/1").unlink()
    with pytest.raises(IncompleteRunError, match=r"outputs/c/3/1 .*coar collect"):
        fresh.outputs(slice(40, 60), slice(5, 20))
    with pytest.raises(IncompleteRunError, match="1 of 24 units"):
        fresh.require_complete()
    assert fresh.missing_units() == [Unit(3, 1)]
    np.testing.assert_array_equal(fresh.outputs(slice(0, 48), slice(0, 8)).shape, (48, 8))


def nothing(path):
    pass


def empty_folder(path):
    path.mkdir()


def link_to_empty_folder(path):
    path.with_name("scratch").mkdir()
    path.symlink_to(path.with_name("scratch"))


def a_file(path):
    path.write_text("hello")


def other_things(path):
    path.mkdir()
    (path / "notes.txt").write_text("hello")


def half_a_download(path):
    path.mkdir()
    (path / "thesis.pdf.partial").write_text("hello")


def other_group(path):
    zarr.create_group(path, attributes={"title": "somebody else's"})


def other_array(path):
    zarr.create_array(path, shape=(3,), dtype="int32")


def other_zarr_2(path):
    zarr.create_group(path, zarr_format=2)


def writes(text):
    def build(path):
        path.mkdir()
        (path / "zarr.json").write_bytes(text)

    return build


FOREIGN = {
    "file": (a_file, "holds a file"),
    "other things": (other_things, "folder of other things"),
    "half a download": (half_a_download, "folder of other things"),
    "other group": (other_group, "another kind"),
    "other array": (other_array, "another kind"),
    "zarr 2": (other_zarr_2, "folder of other things"),
    "empty description": (writes(b""), "damaged zarr.json"),
    "cut description": (writes(b'{"attributes": {"coar": {"fo'), "damaged zarr.json"),
    "bytes": (writes(b"\xff\xfe\x00\x9f"), "damaged zarr.json"),
    "a list": (writes(b"[1, 2]"), "damaged zarr.json"),
    "a number": (writes(b"7"), "damaged zarr.json"),
}


@pytest.mark.parametrize("build", [nothing, empty_folder])
def test_open_where_nothing_is(tmp_path, build):
    build(tmp_path / "r.zarr")
    with pytest.raises(RunError, match=r"no run at .*r\.zarr.*coar collect"):
        coar.Run.open(tmp_path / "r.zarr")


@pytest.mark.parametrize(("build", "message"), FOREIGN.values(), ids=FOREIGN.keys())
def test_open_something_else(tmp_path, build, message):
    build(tmp_path / "r.zarr")
    with pytest.raises(RunError, match=message):
        coar.Run.open(tmp_path / "r.zarr")


@pytest.mark.parametrize(("build", "message"), FOREIGN.values(), ids=FOREIGN.keys())
def test_collect_leaves_something_else_alone(tmp_path, build, message):
    build(tmp_path / "r.zarr")
    before = helpers.files(tmp_path)
    with pytest.raises(RunError, match=message):
        helpers.collect(helpers.study(), tmp_path / "r.zarr", masks=3)
    assert helpers.files(tmp_path) == before


@pytest.mark.parametrize("build", [nothing, empty_folder, link_to_empty_folder])
def test_collect_begins_where_nothing_is(tmp_path, build):
    build(tmp_path / "r.zarr")
    assert helpers.collect(helpers.study(), tmp_path / "r.zarr", masks=3).missing_units() == []


def edited(run, change):
    """Change the run's own attributes on disk."""
    whole = description(run, "")
    change(whole["attributes"]["coar"])
    (run.path / "zarr.json").write_text(json.dumps(whole))


def test_newer_format(fresh):
    edited(fresh, lambda manifest: manifest.update(format=3))
    for attempt in (lambda: coar.Run.open(fresh.path), lambda: helpers.collect(helpers.study(), fresh.path, masks=3)):
        with pytest.raises(RunError, match="has format 3, and this version reads up to 2; update coar"):
            attempt()


DAMAGE = {
    "no format": lambda manifest: manifest.pop("format"),
    "format in words": lambda manifest: manifest.update(format="one"),
    "no plan": lambda manifest: manifest.pop("plan"),
    "plan in words": lambda manifest: manifest.update(plan="all"),
    "plan disagrees": lambda manifest: manifest["plan"].update(extents=[119]),
    "no fingerprint": lambda manifest: manifest.pop("fingerprint"),
    "no sampler": lambda manifest: manifest["fingerprint"].pop("sampler"),
    "unknown sampler": lambda manifest: manifest["fingerprint"].update(sampler={"name": "Dice"}),
    "no facts": lambda manifest: manifest.pop("facts"),
    "no precision": lambda manifest: manifest["facts"].pop("precision"),
    "unknown precision": lambda manifest: manifest["facts"]["precision"].update(name="float64"),
    "a number for a batch norm": lambda manifest: manifest["facts"].update(batch_norms={"layer1": 1}),
    "a word for an error": lambda manifest: manifest["facts"].update(gate_error="small"),
}


@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_attributes(fresh, change):
    edited(fresh, change)
    with pytest.raises(CorruptRunError, match=r"damaged .*copy"):
        coar.Run.open(fresh.path)


@pytest.mark.parametrize("name", ["outputs", "masks", "component/name", "example/id"])
@pytest.mark.parametrize("content", [None, b"", b"{}", b'{"shape": [12'], ids=["missing", "empty", "hollow", "cut"])
def test_damaged_description_of_an_array(fresh, name, content):
    file = fresh.path / name / "zarr.json"
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(CorruptRunError, match=name):
        coar.Run.open(fresh.path).array(name)


CHANGES = {  # of one description alone, each parsed by Zarr without complaint
    "outputs": [("shape", [120, 7]), ("shape", [119, 20]), ("chunk", [16, 0]), ("data_type", "float64")],
    "masks": [("shape", [120, 3]), ("chunk", [16, 1]), ("chunk", [0, 2])],
    "base_output": [("shape", [2**40]), ("shape", [0]), ("chunk", [7]), ("chunk", [0])],
    "split": [("chunk", [7]), ("shape", [2**40])],
    "component/name": [("shape", [2**40]), ("shape", [7])],
    "component/axis": [("shape", [12]), ("chunk", [2])],
    "example/id": [("shape", [19]), ("chunk", [0])],
}


@pytest.mark.parametrize(
    ("name", "what", "value"), [(name, *change) for name, changes in CHANGES.items() for change in changes]
)
def test_description_that_does_not_fit_the_rest(fresh, name, what, value):
    found = description(fresh, name)
    if what == "chunk":
        found["chunk_grid"]["configuration"]["chunk_shape"] = value
    else:
        found[what] = value
    (fresh.path / name / "zarr.json").write_text(json.dumps(found))
    changed = coar.Run.open(fresh.path)
    with pytest.raises(CorruptRunError, match=f"{name}.*copy"):
        changed.array(name)
    for attempt in (verify, coar.Run.missing_units, coar.Run.rows_intact):
        with suppress(CorruptRunError):
            attempt(changed)  # nothing else is raised, and nothing takes for ever


def test_array_that_is_no_part_of_a_run(fresh):
    arrays.write_all(fresh.group, "weights", np.zeros(3), "mask")
    with pytest.raises(CorruptRunError, match=r"'weights' .* is no array of a run; remove it"):
        verify(coar.Run.open(fresh.path))


def test_many_chunks_are_listed(tmp_path):
    """Every file counts once, strays of killed writers and folders do not; how fast is for benchmarks/scale.py."""
    run = helpers.collect(helpers.study(), tmp_path / "r.zarr", masks=3)
    folder = run.path / "outputs/c"
    for i in range(100, 200):
        (folder / str(i)).mkdir()
        for j in range(30):
            (folder / str(i) / str(j)).touch()
        (folder / str(i) / "0.0123456789abcdef0123456789abcdef.partial").touch()
    found = arrays.stored_chunks(run.array("outputs"))
    assert {key for key in found if key[0] >= 100} == {(i, j) for i in range(100, 200) for j in range(30)}


def test_creation_cut_short_begins_again(run, fresh):
    edited(fresh, lambda manifest: [manifest.pop(key) for key in ("plan", "facts", "fingerprint")])
    edited(fresh, lambda manifest: manifest.update(state="creating"))
    (fresh.path / "outputs" / "zarr.json").unlink()
    with pytest.raises(RunError, match="was interrupted; run 'coar collect' again"):
        coar.Run.open(fresh.path)
    helpers.collect(helpers.study(), fresh.path, masks=100, test_masks=20)
    assert helpers.differing(helpers.files(fresh.path), helpers.files(run.path)) == []


def test_creation_cut_short_in_its_first_write_begins_again(run, tmp_path):
    path = tmp_path / "r.zarr"
    path.mkdir()
    (path / "zarr.0123456789abcdef0123456789abcdef.partial").write_bytes(b'{"attr')
    helpers.collect(helpers.study(), path, masks=100, test_masks=20)
    assert helpers.differing(helpers.files(path), helpers.files(run.path)) == []


HOLD = """
import sys, coar
with coar.Run.open(sys.argv[1]).lock():
    sys.stdout.write("held\\n"); sys.stdout.flush()
    sys.stdin.read()
"""


def test_second_writer_is_refused_until_the_first_is_done(run, fresh):
    (fresh.path / "outputs/c/0/0").unlink()
    command = [sys.executable, "-c", HOLD, str(fresh.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=r"another process is writing to .*copy\.zarr"):
            helpers.collect(helpers.study(), fresh.path, masks=100, test_masks=20)
        assert not (fresh.path / "outputs/c/0/0").exists()
        assert coar.Run.open(fresh.path).outputs(slice(16, 32), slice(0, 8)).shape == (16, 8)
        holder.kill()  # however the process ends, the system lets go
    helpers.collect(helpers.study(), fresh.path, masks=100, test_masks=20)
    assert helpers.differing(helpers.files(fresh.path), helpers.files(run.path)) == []
