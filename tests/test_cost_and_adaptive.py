"""Collecting until it is good enough, and what a run will cost, on real nets and from the command line."""

import itertools
import logging
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import coar
from coar.cli.common import app
from coar.collection.adaptive import collect_until
from coar.collection.cost import estimate, has_gradients, measure
from coar.collection.quality import RunQuality
from coar.description import describe_estimate
from coar.errors import AblationError, MismatchError, SettingsError
from coar.store.gradients import MaskGradients
from coar.store.integrity import verify
from tests.faults import helpers
from tests.faults.helpers import study
from tests.test_cli import TINY
from tests.test_mask_gradients import Detached, Prediction, sliced, turned

QUIET = {"device": "cpu", "progress": False}


@pytest.fixture(autouse=True)
def _quiet():
    """Put the package's log level back, which commands turn up."""
    level = logging.getLogger("coar").level
    yield
    logging.getLogger("coar").setLevel(level)


def digits_study(digits, count):
    whole = digits.study()
    return replace(whole, examples=whole.examples.subset(range(count)))


def until(what, path, **settings):
    steps = []
    run, why = collect_until(what, path, report=steps.append, **QUIET, **settings)
    run.require_complete()
    assert MaskGradients(run).missing_units() == []
    counts = [(step.gradients, step.masks) for step in steps]
    assert all(one[0] <= two[0] and one[1] <= two[1] and one != two for one, two in itertools.pairwise(counts))
    assert counts[-1] == (MaskGradients(run).count, run.plan.count("train", what.sampler.ablated_fraction))
    return run, why, steps


def validated(run):
    """Mean correlation on validation masks of what `load` takes, example by example."""
    found = coar.load(run.path)
    rows = run.plan.rows("validation", run.sampler.ablated_fraction)
    predicted, outputs = found.predict(run.masks_at(rows)), run.outputs_at(rows, slice(0, run.n_examples))
    pairs = zip(predicted.T.astype(float), outputs.T.astype(float), strict=True)
    return np.mean([np.corrcoef(one, other)[0, 1] for one, other in pairs])


def test_a_target_that_can_be_reached_is_reached(digits, tmp_path):
    run, why, steps = until(digits_study(digits, 40), tmp_path / "r.zarr", correlation=0.95)
    assert why == f"reached {steps[-1].correlation:.3f}, and 0.95 was requested"
    assert steps[-1].correlation >= 0.95 > max([step.correlation for step in steps[:-1]], default=0)
    assert steps[-1].correlation == pytest.approx(validated(run), abs=1e-5)
    assert len(run.plan.rows("validation", 0.1)) == 64
    assert (steps[0].gradients, steps[0].masks) == (32, 0)


def test_a_target_beyond_the_ceiling_is_given_up(digits, tmp_path):
    what = digits_study(digits, 60)
    coar.collect(what, tmp_path / "r.zarr", gradients=96, **QUIET)
    run, why, steps = until(what, tmp_path / "r.zarr", correlation=0.999)
    words = r"stopped at ([\d.]+) short of 0.999: the linear model's ceiling is estimated at ([\d.]+) \+- ([\d.]+)"
    said = re.fullmatch(words, why)
    assert said, why
    correlation, ceiling, deviation = map(float, said.groups())
    assert correlation < ceiling < 0.999 - 2 * deviation
    assert correlation == pytest.approx(validated(run), abs=1e-3)
    assert len(steps) == 1


def test_until_flat_ends_when_more_promises_little(digits, tmp_path):
    what = digits_study(digits, 24)
    run, why, steps = until(what, tmp_path / "r.zarr")
    assert re.match(r"flat at 0\.9\d\d: 50 % more passes promise \+0\.00[0-4]\d; the linear", why), why
    assert steps[-1].correlation > 0.93
    later = coar.collect(what, run.path, gradients=MaskGradients(run).count * 2, **QUIET)
    assert coar.fit(later, progress=False).fit.validation < steps[-1].correlation + 0.02


def test_it_goes_on_with_a_run_that_is_there(tmp_path):
    path = tmp_path / "r.zarr"
    first = coar.collect(study(), path, masks=30, test_masks=10, **QUIET)
    coar.fit(first, progress=False)
    coar.fit(coar.collect(study(), path, masks=30, gradients=12, **QUIET), progress=False)  # without validation masks
    before = helpers.chunks(path)
    run, why, steps = until(study(), path, correlation=0.97)
    assert why.startswith("reached")
    assert (steps[0].gradients, steps[0].masks) == (32, 30)
    after = helpers.chunks(path)
    kept = [name for name in before if name.startswith("gradient_")]
    assert len(kept) == 15  # five rounds of three arrays
    assert helpers.differing({name: before[name] for name in kept}, {name: after[name] for name in kept}) == []
    assert verify(run) == []
    again, why, steps = until(study(), path, correlation=0.97)
    assert (len(steps), why.split()[0]) == (1, "reached")
    assert helpers.files(again.path) == helpers.files(run.path)
    with pytest.raises(MismatchError):
        collect_until(study(output=coar.ClassLogit()), path, **QUIET)


MASKS_ONLY = {
    "parameter slices": sliced,
    "argmax": lambda: study(output=Prediction()),
    "detached": lambda: study(output=Detached()),
    "rows turned": turned,
}


@pytest.mark.parametrize("make", MASKS_ONLY.values(), ids=MASKS_ONLY.keys())
def test_what_has_no_gradient_is_collected_by_masks_alone(tmp_path, make):
    what = make()
    assert not has_gradients(what, device="cpu")
    run, why, steps = until(what, tmp_path / "r.zarr")
    assert why.startswith("flat at")
    assert why.endswith("cannot be estimated from masks alone")
    assert (MaskGradients(run).count, steps[0].masks, steps[1].masks) == (0, 256, 384)
    assert math.isnan(steps[-1].reachable)
    assert until(what, run.path, correlation=0.5)[1].startswith("reached")
    seconds = measure(what, run, gradients=False, device="cpu")
    assert min(seconds.mask, seconds.load) > 0
    assert math.isnan(seconds.gradient)


WRONG = {
    "zero": ({"correlation": 0}, "correlation of 0 "),
    "one": ({"correlation": 1.0}, "correlation of 1.0 "),
    "negative": ({"correlation": -0.5}, "correlation of -0.5 "),
    "in percent": ({"correlation": 95}, "correlation of 95 .* between 0 and 1"),
    "nan": ({"correlation": math.nan}, "correlation of nan "),
    "few to judge by": (
        {"correlation": 0.9, "validation_masks": 15},
        "15 validation masks are too few to judge by; give 16",
    ),
    "none to judge by": ({"validation_masks": 0}, "0 validation masks are too few"),
    "half masks": ({"validation_masks": 20.5}, "20.5 validation masks"),
    "device": ({"device": "tpu"}, "unknown device 'tpu'"),
}


@pytest.mark.parametrize(("settings", "message"), WRONG.values(), ids=WRONG.keys())
def test_bad_targets_make_nothing(tmp_path, settings, message):
    with pytest.raises(SettingsError, match=message):
        collect_until(study(), tmp_path / "r.zarr", **(QUIET | settings))
    assert list(tmp_path.iterdir()) == []


STANDS = [
    RunQuality(32, 0, 0.9, 0.95, 0.01, 0.05, 0.85),
    RunQuality(64, 300, 0.93, 0.95, 0.01, 0.01, 0.88),
    RunQuality(0, 256, 0.8, error=0.1, explained=0.64),
    RunQuality(128, 0, 0.99, 1.0, 0.001, 1e-5, 0.99),
]


@pytest.mark.parametrize("now", STANDS, ids=str)
def test_more_passes_never_promise_less(now):
    steps = (0, 1, 10, 100, 1_000, 10**6)
    for mask_gradients, masks in itertools.product(steps, steps):
        here = now.rise(mask_gradients, masks, 336)
        assert here >= 0
        assert now.rise(mask_gradients + 7, masks, 336) >= here
        assert now.rise(mask_gradients, masks + 7, 336) >= here
        assert now.correlation + here <= math.sqrt(now.correlation**2 + now.error) + 1e-12
    assert now.rise(0, 0, 336) == 0
    everything = now.rise(10**9, 10**9, 336)
    assert everything == pytest.approx(math.sqrt(now.correlation**2 + now.error) - now.correlation, abs=1e-3)


def test_what_twice_as_many_promise_by_hand():
    assert RunQuality(32, 0, 0.9, error=0.04, explained=0.8).rise(32, 0, 100) == pytest.approx(
        math.sqrt(0.81 + 0.04 - 0.02) - 0.9
    )
    noise = 1 - 0.8 - 0.04
    left = 0.04 / (1 + 500 * 0.04 / (100 * noise))
    assert RunQuality(32, 0, 0.9, error=0.04, explained=0.8).rise(0, 500, 100) == pytest.approx(
        math.sqrt(0.81 + 0.04 - left) - 0.9
    )
    assert RunQuality(0, 200, 0.8, error=0.1, explained=0.64).rise(0, 200, 100) == pytest.approx(
        math.sqrt(0.64 + 0.05) - 0.8
    )


def size_of(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


PLANS = [{"masks": 400}, {"masks": 0, "gradients": 64}, {"masks": 200, "gradients": 40, "test_masks": 100}]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_disk_and_passes_are_those_of_a_run_of_that_plan(digits, tmp_path, plan):
    what = digits_study(digits, 60)
    found = estimate(what, device="cpu", **plan)
    run = coar.collect(what, tmp_path / "r.zarr", **QUIET, **plan)
    coar.fit(run, progress=False)
    assert 0.8 < found.disk_bytes / size_of(run.path) < 1.25
    masks = plan["masks"] + plan.get("test_masks", 0)
    ratio = found.seconds_per_gradient / found.seconds_per_mask
    assert found.passes == pytest.approx(masks + plan.get("gradients", 0) * ratio)
    taken = (found.passes + bool(masks)) * found.seconds_per_mask  # with a pass of the unablated model
    assert found.hours == pytest.approx((found.seconds_to_prepare + taken) / 3600)
    assert min(found.seconds_to_prepare, found.fit_bytes - 2**25) > 0


def test_estimate_has_a_pilot_and_is_described_in_words(digits):
    what = digits_study(digits, 40)
    found = estimate(what, masks=1000, workers=4, device="cpu")
    assert found.hours == pytest.approx((found.seconds_to_prepare + found.seconds_per_mask * 1001 / 4) / 3600)
    assert (found.pilot.gradients, found.pilot.masks) == (32, 0)
    assert 0.85 < found.pilot.correlation < found.pilot.reachable
    most = math.sqrt(found.pilot.correlation**2 + found.pilot.error) - found.pilot.correlation  # with no errors left
    assert (1 <= found.passes_per_hundredth < 1e7) == (most > 0.01)
    words = describe_estimate(found)
    assert words["passes"] == "1,000"
    assert re.fullmatch(r"[\d.]+ s on each worker", words["preparation"])
    assert re.fullmatch(r"[\d.]+ masks", words["one gradient"])
    assert re.fullmatch(
        r"correlation 0\.\d+ from 32 mask gradients and 0 masks .*ceiling is estimated at .*", words["pilot"]
    )
    assert re.fullmatch(r"about [\d,]+ passes" if most > 0.01 else r"\D+", words["0.01 more"])
    one = estimate(replace(what, examples=what.examples.subset([3])), masks=5, device="cpu")
    assert one.disk_bytes > 0


def test_estimate_without_gradients(tmp_path):
    found = estimate(sliced(), masks=100, device="cpu")
    assert math.isnan(found.seconds_per_gradient)
    assert found.passes == 100
    assert (found.pilot.gradients, found.pilot.masks) == (0, 256)
    assert found.passes_per_hundredth == math.inf  # a net of one layer is linear: nothing is left to be reached
    words = describe_estimate(found)
    assert words["one gradient"] == "none: these components have no gradient"
    assert words["0.01 more"] == "beyond what is reachable"
    assert words["pilot"].endswith("cannot be estimated from masks alone")
    with pytest.raises(AblationError, match="parameter slice"):
        estimate(sliced(), masks=0, gradients=32, device="cpu")
    assert list(tmp_path.iterdir()) == []


NUMBERS = [
    {"masks": 0},
    {"masks": -1, "gradients": 32},
    {"masks": 10, "gradients": -1},
    {"masks": 10, "test_masks": -1},
    {"masks": 10, "workers": 0},
    {"masks": 10, "workers": -2},
    {"masks": 2.5},
    {"masks": True},
    {"masks": 10, "gradients": "32"},
    {"masks": math.nan},
]


@pytest.mark.parametrize("numbers", NUMBERS, ids=str)
def test_numbers_that_make_no_run(numbers):
    with pytest.raises(SettingsError, match=r"make no run; ask for masks or mask gradients, and one worker or more"):
        estimate(study(), device="cpu", **numbers)


@pytest.fixture(scope="module")
def place(digits, tmp_path_factory):
    """A folder with a pipeline, read only."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "tiny.py").write_text(TINY)
    return folder


def works(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_commands_with_mask_gradients(place, tmp_path):
    path, pipeline = tmp_path / "r.zarr", place / "tiny.py"
    said = works("collect", pipeline, "--run", path, "--gradients", 16, "--device", "cpu")
    assert re.search(r"r\.zarr: 24 masks and 16 mask gradients x 5\d examples, complete\n$", said)
    said = works("fit", path)
    assert re.search(
        r"Attributions\(5\d examples, 96 components, informed\), fitted on 0 masks and 16 mask gradients\n$", said
    )
    works("collect", pipeline, "--run", path, "--gradients", 20, "--masks", 60, "--device", "cpu")
    assert "fitted on 60 masks and 16 mask gradients" in works("fit", path, "--method", "informed", "--gradients", 16)
    assert "fitted on 30 masks\n" in works("fit", path, "--gradients", 0, "--masks", 30)
    assert coar.load(path).fit.method == "informed"
    assert "fitted on 60 masks and 8 mask gradients" in works("fit", path, "--method", "informed", "--gradients", 9)
    for gradients, message in (
        (7, "needs at least 8 mask gradients and would use 6 of the 20"),
        (21, "choose up to 20"),
    ):
        result = CliRunner().invoke(app, ["fit", str(path), "--gradients", str(gradients)])
        assert (result.exit_code, message in result.stderr) == (1, True)
    assert "gradients   20" in works("info", path)
    assert "gradients" in works("evaluate", path, "--out", tmp_path / "out")


def test_commands_that_collect_until(place, tmp_path):
    for options in (("--until", 0.9), ("--until-flat",)):
        path = tmp_path / f"{len(options)}.zarr"
        said = works("collect", place / "tiny.py", "--run", path, "--device", "cpu", *options).splitlines()
        assert re.match(
            r"32 mask gradients, 0 masks: correlation 0\.\d+; the linear model's ceiling is estimated at", said[0]
        )
        assert re.match("reached" if len(options) == 2 else "flat at", said[-2])
        assert said[-1].endswith("examples, complete")
        plan = coar.Run.open(path).plan
        assert (plan.count("validation", 0.1), plan.count("test", 0.1), plan.count("test", 0.3)) == (64, 12, 12)


CLASHES = [
    ("--until", "0.9", "--until-flat"),
    ("--until", "0.9", "--masks", "10"),
    ("--until-flat", "--gradients", "32"),
]


@pytest.mark.parametrize("options", CLASHES, ids=" ".join)
def test_until_clashes_with_what_it_chooses_itself(place, tmp_path, options):
    path = tmp_path / "r.zarr"
    result = CliRunner().invoke(app, ["collect", str(place / "tiny.py"), "--run", str(path), *options])
    assert result.exit_code == 1
    assert "choose masks and mask gradients themselves; give one of them alone" in result.stderr
    assert not path.exists()


def test_command_plan(place):
    said = works("plan", place / "tiny.py", "--gradients", 32, "--device", "cpu", "--workers", 2)
    words = dict(re.findall(r"^(.{16}) (.*)$", said, re.MULTILINE))
    headings = ["one mask", "one gradient", "preparation", "passes", "time", "disk", "memory to fit", "pilot"]
    assert [heading.strip() for heading in words] == [*headings, "0.01 more"]
    plain = works("plan", place / "tiny.py", "--device", "cpu")
    assert re.search(r"^passes +84$", plain, re.MULTILINE)  # 60 training masks, and 12 for each of two fractions
    for options in (("--masks", "0"), ("--masks", "-5"), ("--workers", "0")):
        result = CliRunner().invoke(app, ["plan", str(place / "tiny.py"), *options])
        assert (result.exit_code, "make no run" in result.stderr) == (1, True)
    assert not list(Path.cwd().glob("pilot*"))
