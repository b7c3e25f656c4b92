"""Old public names are refused with the new name, which exists."""

import importlib
import inspect

import pytest
import torch
from torch import nn

import coar
from coar import renamed
from coar.editing.select import CHOICES
from coar.errors import CoarError, RenamedArgumentError, RenamedModuleError, RenamedNameError, SettingsError


def resolve(dotted):
    """Return what a dotted name stands for."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise AssertionError(dotted)


@pytest.fixture(scope="module")
def study():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    examples = coar.Examples(inputs=torch.randn(30, 6), targets=torch.arange(30) % 3)
    return coar.Study(model=model, examples=examples, components=coar.neurons(model, exclude="2"))


@pytest.fixture(scope="module")
def path(study, tmp_path_factory):
    place = tmp_path_factory.mktemp("renamed") / "r.zarr"
    coar.fit(coar.collect(study, place, masks=40, device="cpu", progress=False), progress=False)
    return place


def test_an_old_attribute_is_refused_as_an_attribute_error():
    with pytest.raises(RenamedNameError, match=r"use coar\.mask_gradient$"):
        _ = coar.gradient_x_gate
    assert not hasattr(coar, "gradient_x_gate")
    assert issubclass(RenamedNameError, (CoarError, AttributeError))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = coar.no_such_name


def test_an_old_name_is_refused_in_an_import():
    with pytest.raises(RenamedModuleError, match=r"use coar\.mask_gradient"):
        from coar import gradient_x_gate  # noqa: F401
    with pytest.raises(RenamedModuleError, match=r"use coar\.collection"):
        from coar.engines import RayCluster  # noqa: F401
    with pytest.raises(RenamedModuleError, match=r"use coar\.fit_share"):
        from coar.regression import fit_share  # noqa: F401
    with pytest.raises(RenamedModuleError, match=r"use coar\.gates\.gates\.Gates"):
        from coar.ablation import Gates  # noqa: F401
    with pytest.raises(ImportError, match="no_such_name"):
        from coar.regression import no_such_name  # noqa: F401
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        importlib.import_module("coar.no_such_module")


@pytest.mark.parametrize("old", sorted(renamed.NAMES))
def test_a_new_name_exists_and_the_old_one_does_not(old):
    resolve(renamed.NAMES[old].partition("(")[0])
    with pytest.raises(RenamedModuleError):
        importlib.import_module(f"coar.{old}")


@pytest.mark.parametrize("call", [coar.collect, coar.collect_until, coar.estimate, coar.fit])
def test_an_old_argument_is_refused_before_anything_is_done(call):
    with pytest.raises(RenamedArgumentError, match=r"probes= any more; use gradients="):
        call(None, probes=64)
    assert "probes" not in inspect.signature(call).parameters
    with pytest.raises(TypeError):
        call(None, no_such_argument=64)


@pytest.mark.parametrize("name", renamed.EXECUTION)
def test_a_setting_that_moved_into_another_is_refused_with_its_place(name, study, tmp_path):
    assert name in coar.Execution.model_fields
    words = rf"{name}= any more; use execution=coar\.Execution\({name}=\.\.\.\)"
    for call in (coar.collect, coar.collect_until):
        with pytest.raises(RenamedArgumentError, match=words):
            call(study, tmp_path / "r.zarr", masks=4, **{name: 2})
    assert list(tmp_path.iterdir()) == []


def test_an_old_option_of_a_selection_is_refused():
    with pytest.raises(RenamedArgumentError, match="n_boundary_references="):
        renamed.refuse_arguments("select", {"near": 3})


@pytest.mark.parametrize(("old", "new"), renamed.VALUES["strength"].items())
def test_an_old_strength_is_refused(old, new, study, path):
    assert new in CHOICES["strength"]
    goal = coar.EditGoal(targets="label == 1", references="label != 1", direction="decrease")
    with pytest.raises(SettingsError, match=f"strength '{old}' .* use '{new}'"):
        coar.select(coar.load(path), study.model, study.examples, goal, strength=old)


def test_an_old_fit_is_refused(path):
    with pytest.raises(SettingsError, match="use 'mask_gradient'"):
        coar.load(path, "gradient_x_gate")


def test_an_old_member_of_a_subclass_is_refused():
    with pytest.raises(RenamedNameError, match="call it hard_and_smooth"):

        class Mine(coar.Output):
            tells_right = True

    with pytest.raises(RenamedNameError, match="call it sources"):

        class Deeper(coar.Mean):
            def donors(self, examples):
                return None


def test_an_old_attribute_of_a_result_is_refused(path):
    found = coar.load(path)
    with pytest.raises(RenamedNameError, match=r"Attributions\.facts does not exist any more; use fit or origin"):
        _ = found.facts
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = found.no_such_name
    for owner, old in renamed.ATTRIBUTES.items():
        known = getattr(coar, owner).__dataclass_fields__
        assert all(new in known for names in old.values() for new in names.split(" or "))
