"""A run: its Zarr layout, its units of work, and its integrity."""

from coar.store.copying import copy, merge
from coar.store.integrity import Problem, repair, verify
from coar.store.plan import Plan, Segment, Unit
from coar.store.probes import Probes, ProbeUnit
from coar.store.run import Run

__all__ = ["Plan", "ProbeUnit", "Probes", "Problem", "Run", "Segment", "Unit", "copy", "merge", "repair", "verify"]
