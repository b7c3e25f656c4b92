"""Fixtures that the tests of faults share."""

import pytest

from tests.faults.server import Server


@pytest.fixture(scope="session")
def server(digits, tmp_path_factory):
    """A process that forks children which collect the digits; the net is trained before it starts."""
    started = Server(tmp_path_factory.mktemp("logs"))
    yield started
    started.close()
