"""On a GPU float32 is not rounded to TF32, whatever the user's own code has chosen."""

import numpy as np
import pytest
import torch

import coar
from coar.forward.devices import full_float32
from tests import contract

KINDS = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)


@pytest.fixture
def rounding():
    """Products in TF32, as training scripts choose it; afterwards the usual ones."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def settings():
    return [kind.fp32_precision for kind in KINDS]


class Noting(coar.ZeroWeight):
    """Notes the settings under which constants are computed."""

    def replacements(self, model, components, *, batch_size):
        SEEN.append(settings())
        return super().replacements(model, components, batch_size=batch_size)


class NotingMargin(coar.CorrectClassMargin):
    """Notes the settings under which outputs are read."""

    def __call__(self, result, targets):
        SEEN.append(settings())
        return super().__call__(result, targets)


SEEN = []


def test_passes_and_constants_are_full_and_the_settings_are_restored(rounding, tmp_path):
    SEEN.clear()
    before, net = settings(), contract.net()
    study = coar.Study(
        model=net,
        examples=contract.pictures(4, 1),
        components=coar.conv_filters(net),
        output=NotingMargin(),
        ablation=Noting(),
    )
    run = coar.collect(study, tmp_path / "r.zarr", masks=2, gradients=2, device="cpu", progress=False)
    assert before[0] == "tf32"
    assert {kind for seen in SEEN for kind in seen} == {"ieee"}
    assert settings() == before
    assert np.isfinite(run.array("outputs")[:]).all()


def interrupted():
    with full_float32():
        assert settings() == ["ieee"] * 3
        raise ZeroDivisionError


def test_the_settings_are_restored_after_an_error(rounding):
    before = settings()
    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert settings() == before
