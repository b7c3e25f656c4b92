"""Every architecture, kind of component and ablation against an oracle, or refused with a reason."""

import re

import pytest

from coar.ablation.registry import ABLATIONS
from tests import architectures

LABELS = {cls.__name__: label for label, cls in ABLATIONS.items()}


def advised(message):
    """The labels of the ablations that a refusal advises: those called after the last "use"."""
    advice = re.fullmatch(r"'[\w.\[\]]+' .*[;,] (?:or )?use ((?:\w+\([^()]*\)(?:, | or )?)+)", message)
    return [LABELS[name] for name in re.findall(r"(\w+)\(", advice[1])] if advice else []


def test_a_refusal_that_advises_nothing_is_noticed():
    assert advised("'conv[0]' is refused because Mean() is no use here") == []
    assert advised("'conv[0]' is refused; use Mean(calibration=...) or Resample()") == ["mean", "resample"]


@pytest.mark.parametrize(("name", "kind", "label"), architectures.CELLS)
def test_every_cell_equals_its_oracle_or_is_refused(name, kind, label):
    found = architectures.cell(name, kind, label)
    if architectures.reason(name, kind, label):
        assert isinstance(found, str)
        others = advised(found)
        assert others
        assert [label for label in others if architectures.reason(name, kind, label)] == []  # what is advised works
        return
    error, effect = found
    assert error < 1e-4
    assert effect > 0.01
