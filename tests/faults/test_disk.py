"""A disk that is really full, or really read-only: a small one is mounted where that is permitted."""

import shutil
import subprocess

import numpy as np
import pytest

import coar
from coar.errors import StorageError
from coar.store.fits import fit_names
from coar.store.integrity import repair, verify
from tests.faults.helpers import collect, differing, files, fill, mount, resize, study, whole
from tests.synthetic import fit, make

ASKED = {"masks": 140, "test_masks": 20, "mask_block": 4}  # 120 units, each a file, and a file takes 4 kB at least
UNITS = 40 * 3


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The run on a disk with room."""
    return collect(study(), tmp_path_factory.mktemp("run") / "whole.zarr", **ASKED)


def test_disk_full_in_mid_run(disk, reference):
    path = disk / "r.zarr"
    with pytest.raises(StorageError, match=r"the disk is full.*what was stored before is intact"):
        collect(study(), path, **ASKED)
    run = coar.Run.open(path)
    missing = run.missing_units()
    assert 0 < len(missing) < UNITS
    stored = files(path)
    assert not [name for name in stored if name.endswith(".partial")]
    for unit in set(run.units()) - set(missing):
        region = run.rows_of(unit)
        np.testing.assert_array_equal(run.outputs(*region), whole(reference, "outputs")[region])
    with pytest.raises(StorageError, match="the disk is full"):
        collect(study(), path, **ASKED)
    assert stored.items() <= files(path).items()
    resize(disk, "10m")
    collect(study(), path, **ASKED)
    assert differing(files(path), files(reference.path)) == []


@pytest.mark.parametrize("size", ["4k", "60k", "120k", "180k"])
def test_disk_full_in_creation(disk, reference, size):
    resize(disk, size)
    with pytest.raises(StorageError, match="the disk is full"):
        collect(study(), disk / "r.zarr", **ASKED)
    resize(disk, "10m")
    collect(study(), disk / "r.zarr", **ASKED)
    assert differing(files(disk / "r.zarr"), files(reference.path)) == []


@pytest.mark.parametrize("pages", [0, 1, 3])
def test_disk_full_in_an_extension(disk, reference, pages):
    resize(disk, "10m")
    path = disk / "r.zarr"
    collect(study(), path, **(ASKED | {"masks": 101}))
    before = whole(coar.Run.open(path), "outputs")
    filler = fill(disk)
    with filler.open("rb+") as file:
        file.truncate(filler.stat().st_size - pages * 4096)
    with pytest.raises(StorageError, match="the disk is full"):
        collect(study(), path, **ASKED)
    np.testing.assert_array_equal(coar.Run.open(path).outputs(slice(0, 121), slice(0, 20)), before)
    filler.unlink()
    collect(study(), path, **ASKED)
    assert differing(files(path), files(reference.path)) == ["zarr.json"]  # which says that it was extended
    assert verify(coar.Run.open(path)) == []


def test_disk_full_in_mid_fit(disk):
    """Five blocks of examples, of 17 MB each, where two fit; then there is room."""
    resize(disk, "150m")
    components, examples = 20_000, 420
    effects = np.random.default_rng(0).standard_normal((50, examples))
    run = make(disk / "r.zarr", lambda x: x[:, :50] @ effects, components=components, masks=40, blocks=(40, examples))
    expected = fit(run, method="ridge", name="before").weights()
    used = sum(file.stat().st_blocks * 512 for file in disk.rglob("*"))
    resize(disk, f"{used // 1024 + 45_000}k")
    with pytest.raises(StorageError, match=r"the disk is full.*run the same command again to continue"):
        fit(run, method="ridge", name="cut")
    assert fit_names(coar.Run.open(run.path)) == ["before"]
    np.testing.assert_array_equal(coar.load(run.path, "before").weights(), expected)
    folder = run.path / "attributions" / "cut"
    assert not list(folder.rglob("*.partial"))
    stored = {file: file.stat().st_mtime_ns for file in folder.glob("weight/c/[01]/0")}
    assert len(stored) == 2
    assert not (folder / "weight/c/4/0").exists()
    resize(disk, "250m")
    np.testing.assert_array_equal(fit(run, method="ridge", name="cut").weights(), expected)
    assert {file: file.stat().st_mtime_ns for file in stored} == stored


CREATING = '{"attributes": {"coar": {"format": 1, "state": "creating"}}, "zarr_format": 3, "node_type": "group"}'


@pytest.mark.parametrize("described", ["first", "last"])  # files are removed in the order of a listing
def test_creation_that_cannot_clear_up_may_be_tried_again(disk, reference, described):
    resize(disk, "10m")
    busy = disk / "r.zarr" / "outputs"
    if described == "first":
        busy.parent.mkdir()
        (busy.parent / "zarr.json").write_text(CREATING)
    busy.mkdir(parents=True)
    (busy.parent / "zarr.json").write_text(CREATING)
    assert mount("-t", "tmpfs", "tmpfs", busy).returncode == 0
    with pytest.raises(StorageError, match="busy"):
        collect(study(), busy.parent, **ASKED)
    subprocess.run(["umount", str(busy)], check=True)
    collect(study(), busy.parent, **ASKED)
    assert differing(files(busy.parent), files(reference.path)) == []


ATTEMPTS = {
    "go on": lambda path, problems: collect(study(), path, **ASKED),
    "extend": lambda path, problems: collect(study(), path, **(ASKED | {"masks": 150})),
    "create": lambda path, problems: collect(study(), path.with_name("new.zarr"), **ASKED),
    "repair": lambda path, problems: repair(coar.Run.open(path), problems),
}


@pytest.mark.parametrize("left_over", [False, True], ids=["", "left over"])
@pytest.mark.parametrize("attempt", ATTEMPTS.values(), ids=ATTEMPTS.keys())
def test_read_only_disk(disk, reference, attempt, left_over):
    resize(disk, "10m")
    path = disk / "r.zarr"
    shutil.copytree(reference.path, path)
    (path / "outputs/c/2/0").unlink()
    (path / "outputs/c/30/1").write_bytes(b"damaged")
    if left_over:
        (path / "outputs/c/7/0.0123456789abcdef0123456789abcdef.partial").write_bytes(b"by a writer that was killed")
    stored = files(disk)
    assert mount("-o", "remount,ro", disk).returncode == 0
    problems = verify(coar.Run.open(path))
    assert sorted(problem.chunk for problem in problems) == ["outputs/c/2/0", "outputs/c/30/1"]
    with pytest.raises(StorageError, match="Read-only file system"):
        attempt(path, problems)
    assert files(disk) == stored
    resize(disk, "10m")
    assert repair(coar.Run.open(path), problems) == []
    collect(study(), path, **ASKED)
    assert differing(files(path), files(reference.path)) == []


def test_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("hello")
    with pytest.raises(StorageError, match="Not a directory"):
        collect(study(), tmp_path / "file" / "r.zarr", masks=3)
