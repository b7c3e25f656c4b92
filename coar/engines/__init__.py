"""Where a run's units are done: in this process, in the processes of a job array, or on a Ray cluster."""

from coar.engines.collecting import MASK_BLOCK, collect
from coar.engines.preparing import try_probe, worker_of
from coar.engines.ray import RayCluster

__all__ = ["MASK_BLOCK", "RayCluster", "collect", "try_probe", "worker_of"]
