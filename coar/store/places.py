"""The place of a run: a folder on a local or mounted disk, or an address in an object store."""

import configparser
import os
import re
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from zarr.abc.store import Store
from zarr.storage import FsspecStore, ObjectStore

from coar.errors import SettingsError, install_hint
from coar.store.disk import DurableStore

OBSTORE = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl")
PATIENCE = timedelta(seconds=60)  # after which a repeatedly failing request is given up
CONNECTING = timedelta(seconds=10)  # for one attempt to reach a server
ANSWERING = timedelta(seconds=60)  # for one attempt at a request


@dataclass(frozen=True)
class Address:
    """A run's address in an object store.

    Attributes:
        url: The address, such as `s3://bucket/folder/digits.zarr`, without a slash at its end.
    """

    url: str

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.url.rpartition("/")[2]

    def __str__(self) -> str:
        return self.url


def locate(path: str | Path | Address) -> Path | Address:
    """Return the place of a run: a path on a disk, or an address.

    Raises:
        SettingsError: When an address has no bucket and path, or holds credentials.
    """
    if isinstance(path, Address):
        return path
    found = re.fullmatch(r"([a-z][a-z0-9+.-]+):/+(.+)", str(path), re.IGNORECASE)  # a `Path` keeps one slash of two
    if not found:
        return Path(os.path.expanduser(path))
    scheme, rest = found[1].lower(), found[2].rstrip("/")
    if scheme == "file":
        return Path("/", rest)
    if "@" in rest or "?" in rest:
        raise SettingsError(
            f"an address of scheme {scheme}:// with credentials or a query was given; leave them out, since addresses "
            f"are printed, and give credentials in the environment or the usual files"
        )
    if "/" not in rest:
        raise SettingsError(
            f"{str(path)!r} has no path; give a bucket and a path in it, as in {scheme}://bucket/r.zarr"
        )
    return Address(f"{scheme}://{rest}")


def open_store(place: Path | Address) -> Store:
    """Return a Zarr store of everything below a place, without reading or writing.

    Credentials come from the same sources as for the services' own tools: the environment, the usual files, the
    machine's role. A failing request is repeated for `PATIENCE`, then given up.

    Raises:
        SettingsError: When no installed package can open such an address.
    """
    if isinstance(place, Path):
        return DurableStore(place)
    scheme = urlsplit(place.url).scheme
    try:
        if scheme not in OBSTORE:
            return FsspecStore.from_url(place.url)
        from obstore.store import from_url
    except (ImportError, ValueError) as error:
        needed = install_hint("s3") if scheme in OBSTORE else f"install the fsspec file system for {scheme}://"
        raise SettingsError(f"{place} cannot be opened ({error}); {needed}, or give a path on a disk") from None
    return ObjectStore(
        from_url(
            place.url,
            config=_aws_files() if scheme in ("s3", "s3a") else None,
            client_options={
                "connect_timeout": CONNECTING,
                "timeout": ANSWERING,
                "allow_http": os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"),
            },
            retry_config={"max_retries": 20, "retry_timeout": PATIENCE},
        )
    )


def _aws_files() -> Any:
    """Read the current profile from `~/.aws`, which the client ignores; None when the environment has credentials."""
    if "AWS_ACCESS_KEY_ID" in os.environ:
        return None
    files = configparser.ConfigParser(interpolation=None)
    home = Path.home() / ".aws"
    files.read(os.environ.get("AWS_SHARED_CREDENTIALS_FILE", home / "credentials"))
    profile = os.environ.get("AWS_PROFILE", "default")
    if profile not in files:
        return None
    known = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token", "region")
    return {key: files[profile][key] for key in known if key in files[profile]}
