"""The outcome of the checks: each passes, or is an error unless the study accepts it."""

import logging
from collections.abc import Sequence

from coar.errors import AblationError
from coar.store.records import PreflightRecord

log = logging.getLogger(__name__)
COMPARISONS = ("gates", "rows", "gradients")  # of passes, which say nothing about a model that draws random numbers


class Findings:
    """Collects the outcomes of checks.

    Args:
        accept: Names of the checks that may fail.
    """

    def __init__(self, accept: Sequence[str]) -> None:
        self._accept = accept
        self._passed: list[str] = []
        self._accepted: dict[str, str] = {}

    def conclude(self, check: str, problem: str) -> None:
        """Note that a check passed, or failed where a problem is given.

        Comparisons of passes count as not made where random outputs are accepted.

        Raises:
            AblationError: When it failed and the study does not accept that.
        """
        if check in COMPARISONS and "random" in self._accepted:
            return
        if not problem:
            self._passed.append(check)
        elif check in self._accept:
            log.warning("accepted: %s", problem)
            self._accepted[check] = problem
        else:
            raise AblationError(
                f"{problem}; or accept it with coar.Study(..., accept=({check!r},)), which the run keeps"
            )

    @property
    def record(self) -> PreflightRecord:
        """The outcomes, for the run."""
        return PreflightRecord(passed=tuple(dict.fromkeys(self._passed)), accepted=self._accepted)
