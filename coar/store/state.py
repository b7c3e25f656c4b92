"""The state of a place: nothing, a run, an unfinished creation of a run, or something else."""

import json
import shutil
from pathlib import Path
from typing import Any

from zarr.core.buffer import default_buffer_prototype
from zarr.core.group import GroupMetadata

from coar.errors import MismatchError
from coar.store.places import Address
from coar.store.sealed import ROOT, create_object, digest, names, read_object, remove_object
from coar.store.storage_errors import storage_errors

ATTRIBUTE = "coar"
MARKER = "creating.json"  # exists from before the first array until the run is described


def state_of(place: Path | Address) -> str:
    """Return the state of a place: `nothing`, `creating`, `ready`, or a phrase for anything but a run."""
    if isinstance(place, Path) and place.exists() and not place.is_dir():
        return "a file"
    description = read_object(place, ROOT)
    if description is None:
        there = names(place)
        if MARKER in there:
            return "creating"
        return "a folder of other things" if there else "nothing"
    try:
        return str(_manifest_in(description)["state"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return "a damaged zarr.json or a Zarr store of another kind"


def read_manifest(place: Path | Address) -> dict[str, Any]:
    """Read the manifest of a run that `state_of` has found."""
    return _manifest_in(read_object(place, ROOT) or b"")


def describe(place: Path | Address, attributes: dict[str, Any]) -> None:
    """Write the description of a run's group unless it exists; this completes the creation."""
    for key, value in GroupMetadata(attributes=attributes).to_buffer_dict(default_buffer_prototype()).items():
        create_object(place, key, value.to_bytes())


def begin(place: Path | Address, study: dict[str, Any]) -> None:
    """Mark a place for the creation of a run; on a disk, remove the remains of an earlier creation.

    On a disk the caller holds the lock. In an object store other processes may be creating the same run; they write
    the same objects and replace none, so each can finish what another began. The mark names the study.

    Raises:
        MismatchError: When another study's run is being created in an object store.
    """
    if isinstance(place, Path):
        with storage_errors(place):
            _empty(place)
    mine = json.dumps({"study": digest(study).hex()}).encode()
    create_object(place, MARKER, mine)
    found = read_object(place, MARKER)
    if found not in (mine, None):  # None: another creator has finished
        raise MismatchError(
            f"the run of another study is being created at {place}, or its creation was interrupted; choose another "
            f"path, or delete the objects there once no process writes to it"
        )


def end(place: Path | Address) -> None:
    """Remove the mark of `begin`, if it exists, once the run is described."""
    if MARKER in names(place):
        remove_object(place, MARKER)


def _manifest_in(description: bytes) -> dict[str, Any]:
    return dict(json.loads(description)["attributes"][ATTRIBUTE])


def _empty(root: Path) -> None:
    """Remove the contents of a folder, but not the folder, which may be locked."""
    entries = root.iterdir() if root.exists() else ()
    for path in sorted(entries, key=lambda entry: entry.name in (ROOT, MARKER)):  # the mark goes last
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
