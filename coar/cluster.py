"""A Ray cluster: its settings, and how to join or start one."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

from pydantic import Field

from coar.errors import CoarError, EngineError, SettingsError, install_hint
from coar.settings import Settings
from coar.store.gradients import AnyUnit
from coar.study import Study

REACHING = 10.0  # seconds within which a cluster's address must answer


LOOPBACK = "127.0.0.1"


TRIES = 5  # workers lost on one unit, or in a row before they are ready, that end the work


class RayCluster(Settings):
    """A Ray cluster whose workers do a run's units; needs the extra `ray`.

    Attributes:
        study: Function that returns the study, for collecting; each worker calls it once. Every machine must have its
            imports and data. A fit needs none.
        workers: Number of workers; the work begins when the first of them is ready.
        address: The cluster, as in `10.0.0.5:6379`, or `auto` for the cluster of this machine; by default a cluster is
            started on this machine, reachable from it alone, and stopped afterwards.
        cpus_per_worker: Processors per worker.
        gpus_per_worker: GPUs per worker; with a fraction, several workers share a GPU.
    """

    study: Callable[[], Study] | None = None
    workers: int = Field(default=2, ge=1)
    address: str | None = None
    cpus_per_worker: float = Field(default=1.0, ge=0)
    gpus_per_worker: float = Field(default=0.0, ge=0)

    def builder(self) -> Callable[[], Study]:
        """Return the function that builds the study; raise `SettingsError` without one."""
        if self.study is None:
            raise SettingsError(
                "the cluster has no study for its workers; give RayCluster(study=...) a function that builds it"
            )
        return self.study


@contextmanager
def connected(cluster: RayCluster) -> Iterator[ModuleType]:
    """Join the cluster, or start one that only this machine can reach; keep an existing connection."""
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # else 'uv run' makes Ray copy the folder to workers
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise EngineError(f"the Ray engine needs ray; {install_hint('ray')}") from None
    if cluster.address is not None:
        _reach(cluster.address)
    if ray.is_initialized():
        yield ray
        return
    settings: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if cluster.address is None:
        processors = max(os.cpu_count() or 1, int(cluster.workers * cluster.cpus_per_worker + 0.999))
        settings |= {"address": "local", "num_cpus": processors, "include_dashboard": False}
        settings |= {"_node_ip_address": LOOPBACK}
    else:
        settings |= {"address": cluster.address}
    try:
        with _loopback(ray) if cluster.address is None else nullcontext():
            ray.init(**settings)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise EngineError(
            f"the Ray cluster at {cluster.address or 'this machine'} cannot be joined ({_first(error)}); check that it "
            f"runs, with the same versions of Python and ray as here"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def _loopback(ray: ModuleType) -> Iterator[None]:
    """Make Ray listen on the loopback address, as on macOS; on Linux it would use this machine's network address."""
    constants = ray._private.ray_constants
    before, constants.ENABLE_RAY_CLUSTER = constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before


def _reach(address: str) -> None:
    """Raise `EngineError` unless a server listens at an address; Ray itself would retry for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address == "auto":
        return
    if not host or not port.isdigit():
        raise EngineError(f"{address!r} is no address of a Ray cluster; give one as in 10.0.0.5:6379, or auto")
    try:
        socket.create_connection((host, int(port)), timeout=REACHING).close()
    except OSError as error:
        raise EngineError(
            f"nothing answers at {address} within {REACHING:.0f} s ({error}); check the address, and that the head of "
            f"the cluster runs"
        ) from None


def unwrap(error: Any, unit: AnyUnit | None) -> CoarError:
    """Return a worker's error: this package's errors unchanged, others as `EngineError`."""
    cause = error.cause if isinstance(error.cause, BaseException) else error
    if isinstance(cause, CoarError):
        return cause
    doing = f"doing {unit}" if unit else "building the study"
    return EngineError(
        f"a worker failed while {doing}: {cause!r}; fix that, then run the same command again to continue"
    )


def _first(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
