"""Conversion of runs of format 1, which called mask gradients probes and mask groups slots, to format 2."""

import json
from pathlib import Path
from typing import Any

from zarr.core.buffer import Buffer, default_buffer_prototype

from coar.errors import CorruptRunError
from coar.store.places import Address
from coar.store.sealed import CHECKSUM, HEAD, ROOT, SEAL, checksum, is_chunk, seal_of
from coar.store.state import ATTRIBUTE, read_manifest, state_of

OLD = 1  # the format that can be migrated
PREFIXES = {  # of paths inside a run
    "probe_kept/": "gradient_kept/",
    "probe_ablated/": "gradient_ablated/",
    "probe_outputs/": "gradient_outputs/",
    "attributions/gradient_x_gate/": "attributions/mask_gradient/",
}
KEYS = {"probes": "gradients", "slots": "mask_groups"}  # of attributes
WORDS = {"probe": "gradient", "gradient_x_gate": "mask_gradient"}  # an axis, and a method


def study_to_migrate(place: Path | Address) -> dict[str, Any] | None:
    """Return the study's fingerprint of a run of format 1; None for other runs, and without a run."""
    if state_of(place) != "ready":
        return None
    manifest = read_manifest(place)
    if manifest.get("format") != OLD:
        return None
    if not isinstance(manifest.get("fingerprint"), dict):
        raise CorruptRunError(f"the attributes of the run at {place} are damaged; restore its zarr.json from a copy")
    return dict(manifest["fingerprint"])


def migrated(key: str, value: Buffer, study: dict[str, Any]) -> tuple[str, Buffer]:
    """Return the path and the content in format 2 of an object of a format 1 run.

    Args:
        key: The object's path inside the run.
        value: Its content.
        study: The fingerprint of the run's study, the key of the seals.

    Raises:
        CorruptRunError: When a chunk is damaged or was moved there; the new seal would hide that in the copy.
    """
    new = next((name + key.removeprefix(old) for old, name in PREFIXES.items() if key.startswith(old)), key)
    content = value.to_bytes()
    if is_chunk(key):
        body = content[:-CHECKSUM]
        seal = body[-SEAL:]
        sealed = seal.startswith(HEAD)  # the first runs have no seals
        if checksum(body) != content[-CHECKSUM:] or (sealed and seal != seal_of(key, study)):
            raise CorruptRunError(
                f"chunk {key} of the run is damaged or was moved there; delete it if 'coar collect' or 'coar fit' can "
                f"make it again, or restore it from a copy"
            )
        body = (body[:-SEAL] if sealed else body) + seal_of(new, study)
        content = body + checksum(body)
    elif key.rpartition("/")[2] == ROOT:
        try:
            description = _renamed(json.loads(content))
        except ValueError as error:
            raise CorruptRunError(f"{key} of the run is damaged ({error}); restore it from a copy") from None
        if key == ROOT:
            description["attributes"][ATTRIBUTE]["format"] = OLD + 1
        content = json.dumps(description, indent=2).encode()
    return new, default_buffer_prototype().buffer.from_bytes(content)


def _renamed(value: Any) -> Any:
    """Return a description with the keys and words of format 2; the study's fingerprint stays as it is."""
    if isinstance(value, dict):
        return {KEYS.get(key, key): old if key == "fingerprint" else _renamed(old) for key, old in value.items()}
    if isinstance(value, list):
        return [_renamed(part) for part in value]
    return WORDS.get(value, value) if isinstance(value, str) else value
