"""Every architecture, kind of component and ablation against an oracle, or refused with a reason."""

import pytest

from tests import coverage


@pytest.mark.parametrize(("name", "kind", "label"), coverage.CELLS)
def test_every_cell_equals_its_oracle_or_is_refused(name, kind, label):
    found = coverage.cell(name, kind, label)
    if coverage.reason(name, kind, label):
        assert isinstance(found, str)
        assert "use " in found
        return
    error, effect = found
    assert error < 1e-4
    assert effect > 0.01
