"""Mask gradients are the model's under each example's own mask, and rounds are never rewritten."""

import itertools
import json
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import coar
from coar.description import describe
from coar.errors import AblationError, CorruptRunError, IncompleteRunError, MismatchError, OutputError, SettingsError
from coar.outputs.base import Output
from coar.store.gradients import MaskGradients, deal, next_rounds
from coar.store.integrity import verify
from tests import oracles
from tests.faults import helpers
from tests.faults.helpers import collect, study

STARTS = (0, 2, 4, 6, 8, 11)  # of five rounds, the last of which is cut short
GRADIENTS_COUNT = STARTS[-1]
ENDS = ("gradient_kept", "gradient_ablated")


def digits_study(digits, ablation, count=12):
    whole = digits.study(ablation=ablation)
    return replace(whole, examples=whole.examples.subset(range(count)))


@pytest.fixture(
    scope="module",
    params=[("zero", 64), ("mean", 64), ("mean", 5)],
    ids=lambda case: f"{case[0]}, {case[1]} mask groups",
)
def case(request, digits, tmp_path_factory):
    """Mask gradients of 12 digits by the trained net, with more mask groups than examples or fewer; read only."""
    ablation, mask_groups = request.param
    what = digits_study(digits, ablation)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("coar.store.gradients.MASK_GROUPS", mask_groups)
        run = collect(what, tmp_path_factory.mktemp("run") / "r.zarr", gradients=GRADIENTS_COUNT)
    return what, run, mask_groups


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Twelve mask gradients and twenty masks of the tiny net, read only."""
    return collect(study(), tmp_path_factory.mktemp("run") / "tiny.zarr", gradients=12, masks=20)


@pytest.fixture
def fresh(run, tmp_path):
    """A copy of the run to change."""
    return helpers.copied(run, tmp_path / "copy.zarr")


def own_masks(what, mask_groups, gradient_pass):
    """(examples, components) masks of one of the passes, example n taking that of group n modulo their number."""
    first, later = next(span for span in itertools.pairwise(STARTS) if span[0] <= gradient_pass < span[1])
    masks = []
    for n in range(len(what.examples)):
        indices = [of_round * mask_groups + n % mask_groups for of_round in range(first, later)]
        masks.append(what.sampler.stratified("gradient", indices, len(what.components))[gradient_pass - first])
    return np.stack(masks)


def gates(what, masks):
    """(examples, channels) gates by module, and where each component's gate is among them."""
    widths = {row.site: what.model.get_submodule(row.site).out_channels for row in what.components}
    by_site = {site: np.ones((len(masks), width)) for site, width in widths.items()}
    for i, row in enumerate(what.components):
        by_site[row.site][:, row.position] = masks[:, i]
    return by_site


def expected(what, run, mask_groups):
    """(passes, examples) outputs, and (passes, examples, components) gradients and masks, by plain autograd."""
    x, y = what.examples.block(0, len(what.examples))
    constants = {row.site: np.zeros(what.model.get_submodule(row.site).out_channels) for row in what.components}
    for row, value in zip(what.components, helpers.whole(run, "component/replacement"), strict=True):
        constants[row.site][row.position] = value
    outputs, gradients, masks = [], [], []
    for gradient_pass in range(GRADIENTS_COUNT):
        masks.append(own_masks(what, mask_groups, gradient_pass))
        margins, by_site = oracles.gated_margins(what.model, x, y, gates(what, masks[-1]), constants)
        outputs.append(margins)
        gradients.append(np.stack([by_site[row.site][:, row.position] for row in what.components], axis=1))
    return np.stack(outputs), np.stack(gradients), np.stack(masks)


def test_gradients_and_outputs_are_those_of_plain_autograd(case):
    what, run, mask_groups = case
    outputs, gradients, masks = expected(what, run, mask_groups)
    starts = np.cumsum([0, *MaskGradients(run).rounds])
    assert tuple(starts) == STARTS
    for i, part in enumerate(map(slice, starts[:-1], starts[1:])):
        count = starts[i + 1] - starts[i]
        np.testing.assert_allclose(helpers.whole(run, "gradient_outputs")[i, :count], outputs[part], atol=1e-4)
        for end, chosen in zip(ENDS, (masks[part], ~masks[part]), strict=True):
            found = helpers.whole(run, end)[i]
            np.testing.assert_array_equal(np.isnan(found), ~chosen.any(0))  # only where there is nothing to average
            means = (gradients[part] * chosen).sum(0) / np.maximum(chosen.sum(0), 1)
            np.testing.assert_allclose(found[chosen.any(0)], means[chosen.any(0)], atol=1e-4)
    assert np.abs(gradients).max() > 1


def test_outputs_are_those_of_a_plain_forward_under_each_examples_own_mask(case):
    what, run, mask_groups = case
    x, y = what.examples.block(0, len(what.examples))
    constants = helpers.whole(run, "component/replacement")
    for gradient_pass, place in ((0, (0, 0)), (3, (1, 1)), (10, (4, 2))):
        masks = own_masks(what, mask_groups, gradient_pass)
        for n in (0, 5, 11):
            ablated = {
                (row.site, row.position): float(constants[i])
                for i, row in enumerate(what.components)
                if not masks[n, i]
            }
            plain = oracles.replaced_outputs(what.model, x[n : n + 1], y[n : n + 1], ablated)
            np.testing.assert_allclose(helpers.whole(run, "gradient_outputs")[place][n], plain[0], atol=1e-4)


def test_gradients_of_the_oracle_are_finite_differences(digits):
    what = digits_study(digits, "zero", 2)
    x, y = what.examples.block(0, 2)
    masks = gates(what, own_masks(what, 64, 0))
    constants = {site: np.full(gate.shape[1], 0.3) for site, gate in masks.items()}
    _, gradients = oracles.gated_margins(what.model, x, y, masks, constants)
    for site, row, channel in (("conv1", 0, 3), ("layer2.conv1", 1, 7), ("layer2.shortcut.0", 0, 30)):
        moved = []
        for step in (-1e-5, 1e-5):
            nudged = {path: gate.copy() for path, gate in masks.items()}
            nudged[site][row, channel] += step
            moved.append(oracles.gated_margins(what.model, x, y, nudged, constants)[0])
        difference = (moved[1] - moved[0]) / 2e-5
        np.testing.assert_allclose(difference[row], gradients[site][row, channel], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(difference[1 - row], 0, atol=1e-9)


def test_masks_are_functions_of_seed_split_and_index(case):
    what, run, mask_groups = case
    found = MaskGradients(coar.Run.open(run.path))
    by_round = {number: found.masks(number) for number in (3, 0, 4, 2, 1)}  # in any order
    masks = np.concatenate([by_round[number] for number in sorted(by_round)])
    indices = range(GRADIENTS_COUNT * mask_groups)
    count = len(what.components)
    expected = np.empty((GRADIENTS_COUNT, mask_groups, count), dtype=bool)
    for first, later in itertools.pairwise(STARTS):
        for mask_group in range(mask_groups):
            own = [gradient_pass * mask_groups + mask_group for gradient_pass in range(first, later)]
            expected[first:later, mask_group] = what.sampler.stratified("gradient", own, count)
    expected = expected.reshape(-1, count)
    np.testing.assert_array_equal(masks.reshape(-1, len(what.components)), expected)
    assert (
        len({row.tobytes() for row in expected}) == GRADIENTS_COUNT * mask_groups
    )  # no two mask gradients or mask groups have the same
    for other in (
        what.sampler.masks("train", indices, len(what.components)),
        coar.BernoulliSampler(seed=1).masks("gradient", indices, len(what.components)),
    ):
        assert not {row.tobytes() for row in expected} & {row.tobytes() for row in other}
    assert found.group_of(slice(0, 12)).tolist() == [n % mask_groups for n in range(12)]


def test_mask_gradients_of_another_way_to_draw_masks_are_refused(fresh):
    for words, entry in (
        ("independent", {"rounds": [3], "mask_groups": 64}),
        ("odd", {**fresh.entry("gradients"), "masks": "odd"}),
    ):
        fresh.set_entry("gradients", entry)
        with pytest.raises(MismatchError, match=f"have {words} masks.*in a new run"):
            MaskGradients(coar.Run.open(fresh.path))


FIRST_64 = (2, 2, 2, 2, 4, 4, 8, 8, 16, 16)
ROUNDS = [
    ((1,), (1,)),
    ((3,), (2, 1)),
    ((10,), (2, 2, 2, 2, 2)),
    ((64,), FIRST_64),
    ((130,), (*FIRST_64, 32, 32, 2)),
    ((200,), (*FIRST_64, 32, 32, 32, 32, 8)),
    ((64, 200), (*FIRST_64, 32, 32, 32, 32, 8)),
    ((8, 0, 8, 3), (2, 2, 2, 2)),
    ((8, 11, 32), (2, 2, 2, 2, 3, 4, 4, 8, 5)),
    ((1, 5, 64), (1, 2, 2, 2, 2, 4, 4, 8, 8, 16, 15)),
]


@pytest.mark.parametrize(("steps", "rounds"), ROUNDS, ids=str)
def test_rounds_grow_and_are_only_added(tmp_path, steps, rounds):
    made = collect(study(), tmp_path / "r.zarr", masks=2)
    for total in steps:
        MaskGradients(made).extend(total)
    found = MaskGradients(coar.Run.open(made.path))
    assert (found.rounds, found.count) == (rounds, max(steps))
    assert made.array("gradient_kept").shape == (len(rounds), helpers.EXAMPLES, 11)
    totals = [sum(rounds[:i]) for i in range(len(rounds) + 1)]
    assert [found.whole_rounds(total) for total in totals] == list(range(len(rounds) + 1))
    assert found.whole_rounds(None) == len(rounds)
    with pytest.raises(SettingsError, match=rf"{max(steps) + 1} mask gradients .* has {max(steps)}; choose up to"):
        found.whole_rounds(max(steps) + 1)


@pytest.mark.parametrize("steps", [(300,), (1, 300), (7, 9, 50, 300), (31, 63, 300), (100, 101, 300)], ids=str)
def test_any_number_of_mask_gradients_fills_folds_of_about_a_size(steps):
    rounds = ()
    for total in steps:
        rounds += next_rounds(sum(rounds), total)
    assert sum(rounds) == 300
    totals = np.cumsum(rounds)
    for whole in range(4, len(rounds) + 1):
        folds = deal(rounds[:whole], 4)
        assert sorted(i for fold in folds for i in fold) == list(range(whole))
        sizes = [sum(rounds[i] for i in fold) for fold in folds]
        assert min(sizes) >= max(sizes) / 2
        assert max(sizes) - min(sizes) <= max(rounds[:whole])
    for wanted in range(8, 301):
        used = totals[totals <= wanted][-1]
        assert used > wanted * 2 / 3
        assert (totals <= wanted).sum() >= 4
    if steps == (300,):
        for power in (8, 16, 32, 64, 128, 256):
            whole = int((totals <= power).sum())
            assert {sum(rounds[i] for i in fold) for fold in deal(rounds[:whole], 4)} == {power // 4}


def test_mask_gradients_of_a_round_that_is_not_asked_for_whole_are_left_out_with_a_warning(run, caplog):
    found = MaskGradients(run)
    assert found.rounds == (2, 2, 2, 2, 4)
    assert (found.whole_rounds(8), found.whole_rounds(12), caplog.text) == (4, 5, "")
    assert found.whole_rounds(11) == 4
    assert "8 of the 11 mask gradients are used" in caplog.text
    assert "the next round has 4" in caplog.text


def flat(run):
    """(mask gradients, examples) outputs in the order of the mask gradients, whatever the rounds."""
    outputs = helpers.whole(run, "gradient_outputs")
    return np.concatenate([part[:count] for part, count in zip(outputs, MaskGradients(run).rounds, strict=True)])


@pytest.mark.parametrize("steps", [(8, 30), (1, 2, 17, 30)], ids=str)
def test_mask_gradients_added_later_leave_the_old_ones(tmp_path, steps):
    again = tmp_path / "again.zarr"
    for total in steps:
        before = helpers.stamps(tmp_path / "steps.zarr")
        grown = collect(study(), tmp_path / "steps.zarr", gradients=total, masks=20)
        after = helpers.stamps(tmp_path / "steps.zarr")
        chunks = {name for name in before if "/c/" in name}
        assert {name for name in chunks if before[name] != after[name]} == set()
        collect(study(), again, gradients=total, masks=20)
    assert helpers.differing(helpers.chunks(grown.path), helpers.chunks(again)) == []
    assert MaskGradients(grown).count == 30


def test_calls_that_end_with_a_round_give_the_run_of_one_call(tmp_path):
    for total in (8, 16, 64):
        steps = collect(study(), tmp_path / "steps.zarr", gradients=total)
    whole = collect(study(), tmp_path / "whole.zarr", gradients=64)
    assert helpers.differing(helpers.chunks(steps.path), helpers.chunks(whole.path)) == []


@pytest.mark.parametrize("calls", [(256,), (60, 256)], ids=str)
def test_any_number_of_a_long_runs_mask_gradients_can_be_fitted(tmp_path, calls):
    for total in calls:
        made = collect(study(), tmp_path / "r.zarr", gradients=total)
    for wanted in (8, 64, 100, 255, 256):
        fitted = coar.fit(made, method="informed", gradients=wanted, name=f"g-{wanted}", progress=False)
        used = fitted.fit.gradients
        assert wanted * 2 / 3 < used <= wanted
        assert np.isfinite(fitted.weights()).all()
        assert calls != (256,) or used == {100: 96, 255: 224}.get(wanted, wanted)


@pytest.mark.parametrize("wanted", [{}, {"gradients": 12}, {"gradients": 3}, {"gradients": 12, "masks": 20}], ids=str)
def test_asking_for_no_more_touches_nothing(fresh, wanted):
    before = helpers.stamps(fresh.path)
    collect(study(), fresh.path, **({"masks": 10} | wanted))
    assert helpers.stamps(fresh.path) == before


def test_masks_added_later_leave_the_mask_gradients(run, fresh):
    collect(study(), fresh.path, masks=50)
    changed = helpers.differing(helpers.chunks(run.path), helpers.chunks(fresh.path))
    assert [name for name in changed if name.startswith("gradient_")] == []


def test_gradients_over_rounds_are_means_over_their_mask_gradients(run):
    found = MaskGradients(run)
    masks = np.concatenate([found.masks(i) for i in range(5)])[:, found.group_of(slice(0, 20))]  # (12, 20, 11)
    per_round = np.stack([helpers.whole(run, end) for end in ENDS], axis=1)  # (rounds, 2, examples, components)
    means, counts = found.means([1, 4], slice(1, 20, 3))
    chosen = masks[[2, 3, 8, 9, 10, 11], 1::3]
    np.testing.assert_array_equal(counts, np.stack([chosen.sum(0), (~chosen).sum(0)]))
    parts = masks[2:4], masks[8:12]
    weight = np.stack([np.stack([part.sum(0), (~part).sum(0)]) for part in parts])
    sums = np.nansum(per_round[[1, 4]] * weight, axis=0)[:, 1::3]
    np.testing.assert_allclose(means, sums / np.maximum(counts, 1), atol=1e-5)


def test_mask_gradients_alone_make_a_run(tmp_path):
    made = collect(study(), tmp_path / "r.zarr", gradients=12)
    assert (len(made.plan), made.missing_units(), verify(made)) == (0, [], [])
    assert collect(study(), made.path, gradients=12).rows_intact()
    extended = collect(study(), made.path, masks=20)
    assert helpers.whole(extended, "split").tolist() == ["train"] * 20
    assert MaskGradients(extended).count == 12
    assert verify(extended) == []


def test_blocks_and_batches_of_examples_hardly_matter(tmp_path, run):
    other = collect(study(), tmp_path / "r.zarr", gradients=12, masks=20, example_block=3, batch_size=2)
    np.testing.assert_allclose(
        helpers.whole(other, "gradient_outputs"), helpers.whole(run, "gradient_outputs"), atol=1e-5
    )
    for end in ENDS:
        np.testing.assert_allclose(helpers.whole(other, end), helpers.whole(run, end), atol=1e-5)


def test_a_run_without_mask_gradients_is_as_before_and_takes_them(tmp_path, run):
    made = collect(study(), tmp_path / "r.zarr", masks=20)
    entries = json.loads((made.path / "zarr.json").read_text())["attributes"]["coar"]
    assert sorted(entries) == ["facts", "fingerprint", "format", "plan", "state"]
    assert not list(made.path.glob("mask gradient*"))
    assert (MaskGradients(made).count, MaskGradients(made).units(), MaskGradients(made).missing_units()) == (0, [], [])
    assert describe(made)["gradients"] == "none"
    collect(study(), made.path, gradients=12)
    assert helpers.differing(helpers.chunks(made.path), helpers.chunks(run.path)) == []


def test_description_counts_mask_gradients(fresh):
    assert (describe(fresh)["gradients"], describe(fresh)["collected"]) == ("12", "21 of 21 units, complete")
    (fresh.path / "gradient_kept/c/1/2/0").unlink()
    assert describe(fresh)["collected"] == "20 of 21 units"


DAMAGED = [{"rounds": 3, "mask_groups": 64}, {"mask_groups": 64}, "none", {"rounds": ["many"], "mask_groups": 64}]


@pytest.mark.parametrize("entry", DAMAGED, ids=str)
def test_damaged_description_is_corrupt(fresh, entry):
    description = json.loads((fresh.path / "zarr.json").read_text())
    description["attributes"]["coar"]["gradients"] = entry
    (fresh.path / "zarr.json").write_text(json.dumps(description))
    with pytest.raises(CorruptRunError, match=r"description of the mask gradients of .* is wrong .* from a copy"):
        MaskGradients(coar.Run.open(fresh.path))


def test_mask_gradients_that_are_missing_cannot_be_fitted(fresh):
    (fresh.path / "gradient_outputs/c/2/0/1").unlink()
    with pytest.raises(IncompleteRunError, match=r"1 of 15 units of mask gradients .* run 'coar collect' again"):
        coar.fit(coar.Run.open(fresh.path), progress=False)
    with pytest.raises(IncompleteRunError, match="not been collected"):
        MaskGradients(fresh).outputs(4, slice(0, 20))
    (fresh.path / "gradient_ablated/c/2/1/0").unlink()
    with pytest.raises(IncompleteRunError, match="not been collected"):
        MaskGradients(fresh).means([2], slice(8, 16))


class Prediction(Output):
    """The predicted class, which has no gradient."""

    def __call__(self, result, targets):
        return result.argmax(1).float()


class Detached(Output):
    """A logit that somebody detached."""

    def __call__(self, result, targets):
        return result.detach()[:, 0]


class Turned(nn.Module):
    """Runs the batch in reverse order, so that examples meet each other's masks."""

    def __init__(self):
        super().__init__()
        self.inner = helpers.net()

    def forward(self, x):
        return self.inner(x.flip(0)).flip(0)


def sliced():
    model = helpers.net()
    return study(model=model, components=coar.parameter_slices(model, "hidden.weight"))


def turned():
    model = Turned()
    return study(model=model, components=coar.neurons(model, include="*hidden"))


WITHOUT = {
    "parameter slices": (sliced, "parameter slice"),
    "argmax": (lambda: study(output=Prediction()), "no gradient by the gates: .* collect masks instead"),
    "detached": (lambda: study(output=Detached()), "no gradient by the gates"),
    "rows turned": (turned, "at the output of 'inner.hidden': .* exclude it, or collect masks instead"),
}


@pytest.mark.parametrize(("make", "message"), WITHOUT.values(), ids=WITHOUT.keys())
def test_mask_gradients_of_what_has_no_gradient_are_refused_before_anything_is_made(tmp_path, make, message):
    with pytest.raises(AblationError, match=message):
        collect(make(), tmp_path / "r.zarr", gradients=8, masks=20)
    assert list(tmp_path.iterdir()) == []
    made = collect(make(), tmp_path / "r.zarr", masks=20)
    before = helpers.files(made.path)
    with pytest.raises(AblationError, match=message):
        collect(make(), made.path, gradients=8, masks=50)
    assert helpers.files(made.path) == before
    collect(make(), made.path, masks=50).require_complete()


WRONG = {"negative": -1, "half": 2.5, "in words": "10", "a truth value": True, "infinite": float("inf")}


@pytest.mark.parametrize("gradients", WRONG.values(), ids=WRONG.keys())
def test_mask_gradients_must_be_a_whole_number(tmp_path, gradients):
    with pytest.raises(
        SettingsError, match=rf"{gradients!r} mask gradients were requested; give a whole number, 0 or more"
    ):
        collect(study(), tmp_path / "r.zarr", gradients=gradients, masks=20)
    assert list(tmp_path.iterdir()) == []


class Steep(nn.Module):
    """Adds the root of a zero to rows with a large first value: finite itself, its gradient is not."""

    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(6, 11), nn.Linear(11, 3)

    def forward(self, x):
        h = self.hidden(x)
        root = torch.where(x[:, :1] > 50, h[:, :1] - h[:, :1], 1.0).sqrt()
        return self.head(torch.tanh(h)) + root


def test_gradient_that_is_not_finite_names_the_example(tmp_path):
    x, model = helpers.inputs(), Steep()
    x[13, 0] = 100.0
    what = study(
        model=model,
        examples=helpers.examples(inputs=x, metadata={"id": np.arange(500, 520)}),
        components=coar.neurons(model, include="hidden"),
        output=coar.ClassLogit(),
    )
    with pytest.raises(
        OutputError, match=r"round 0 of mask gradients .* not finite for example 13 \(id 513\); nothing"
    ):
        collect(what, tmp_path / "r.zarr", gradients=12, masks=20)
    opened = coar.Run.open(tmp_path / "r.zarr")
    assert {unit.example_block for unit in MaskGradients(opened).missing_units()} == {1, 2}
    assert len([name for name in helpers.chunks(opened.path) if name.startswith("gradient_")]) == 3 * 5


def test_mask_gradients_in_bf16(tmp_path, run):
    made = collect(study(), tmp_path / "r.zarr", gradients=12, masks=20, precision="bf16", precision_tolerance=10)
    for name in ("gradient_outputs", *ENDS):
        low, exact = helpers.whole(made, name), helpers.whole(run, name)
        assert low.dtype == np.float32
        assert not np.array_equal(low, exact, equal_nan=True)
        np.testing.assert_allclose(low, exact, atol=0.1)
    assert verify(made) == []


def test_the_users_model_stays_as_it_is(tmp_path):
    model = helpers.net().train()
    before = deepcopy(model.state_dict())
    collect(study(model=model), tmp_path / "r.zarr", gradients=3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert model.training
