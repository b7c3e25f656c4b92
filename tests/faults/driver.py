"""A driver that tests may kill: `python -m tests.faults.driver ADDRESS PATH [fit]` collects or fits on a cluster."""

import sys
import time
from pathlib import Path

import coar
from coar.cluster import RayCluster
from coar.regression.distributed import cluster as fitting
from coar.store.records import FitLearned
from tests.faults.helpers import collect, study
from tests.test_ray_engine import ASKED, study_slowly


def main() -> None:
    address, path, *what = sys.argv[1:]
    crew = RayCluster(study=study_slowly, workers=2, address=address)
    if not what:
        collect(study(), Path(path), **ASKED, cluster=crew)
        return
    prepare = fitting.ClusterFit.prepare

    def slowly(self: fitting.ClusterFit) -> FitLearned:
        learned = prepare(self)
        Path(path).with_name("begun").touch()
        time.sleep(5)  # long enough to lose the node that has made the sums
        return learned

    fitting.ClusterFit.prepare = slowly  # type: ignore[method-assign]
    coar.fit(coar.Run.open(path), method="ridge", cluster=crew, progress=False)


if __name__ == "__main__":
    main()
