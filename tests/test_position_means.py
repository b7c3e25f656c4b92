"""Means at each position of a sequence, against plain sums over texts, position by position."""

import numpy as np
import pytest
import torch
from torch import nn

import coar
from coar.errors import AblationError, EditError
from coar.gates.folding import fold
from coar.gates.gates import Gates
from tests import oracles, tiny
from tests.contract import Contract

LENGTH, TEXTS = 6, 7


def tokens_of(lengths, *, left=False, seed=0):
    """Texts of these lengths in LENGTH columns, padded in front or behind."""
    words = torch.randint(1, tiny.WORDS, (len(lengths), LENGTH), generator=torch.Generator().manual_seed(seed))
    there = torch.arange(LENGTH) < torch.tensor(lengths)[:, None]
    there = there.flip(1) if left else there
    inputs = {"input_ids": words * there, "attention_mask": there.long()}
    return coar.Examples(inputs=inputs, targets=torch.zeros(len(lengths)))


class Named(nn.Module):
    """A GPT-2 given tokens by name."""

    def __init__(self):
        super().__init__()
        self.inner = tiny.model("gpt2")

    def forward(self, input_ids, attention_mask):
        return self.inner.body(input_ids, attention_mask=attention_mask).last_hidden_state.mean(1)


def parts(model):
    return (
        coar.attention_heads(model)
        + coar.input_features(model, include="*.mlp.c_proj")
        + coar.neurons(model, include="*.c_fc")
        + coar.modules(model, "*.mlp.act", axis=-1, size=tiny.FEED)
    )


class Sequences(nn.Module):
    """Two layers on every position of a sequence, before an in-place layer, and one on their mean."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 6), nn.Linear(6, 5), nn.Linear(5, 4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.last(torch.tanh(self.second(self.relu(self.first(x).add_(0.2)))).mean(1)) * 3


def sequences():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = oracles.rough(Sequences())
    with torch.no_grad():
        model.first.weight.mul_(2)
        model.second.weight.mul_(3)
    return model


def on_sequences(count, seed):
    x = torch.randn(count, 5, 3, generator=torch.Generator().manual_seed(seed)) + torch.arange(5.0)[:, None] / 2
    return coar.Examples(inputs=x, targets=torch.arange(count) % 4)


class TestPositionMean(Contract):
    """Means over examples, position by position."""

    label = "position_mean"
    net, examples = staticmethod(sequences), staticmethod(on_sequences)

    @staticmethod
    def parts(model):
        return coar.neurons(model, include=["first", "second"]) + coar.input_features(model, include="second")

    def constant(self, model, row):
        (passed,) = oracles.held(model, self.examples(16, 7).inputs, [(row.site, row.side)])[row.site, row.side]
        return [[sum(text[at, row.position].item() for text in passed) / len(passed)] for at in range(5)]

    def test_a_permanent_edit_gives_what_gates_give(self, study, tmp_path):
        run = self.collect(study, tmp_path / "r.zarr")
        assert run.replacements.shape == (5, study.components.width)
        goal = coar.EditGoal(targets="label == 1", references="label != 1", direction="decrease")
        with pytest.raises(EditError, match=r"by other means at every position, which no weights can hold"):
            coar.edit(coar.fit(run, progress=False), goal, budget=2)


@pytest.mark.parametrize("left", [False, True])
def test_means_are_of_what_is_no_padding_at_each_position(left):
    model = Named()
    examples = tokens_of([6, 3, 5, 2, 6], left=left)
    components, seen = parts(model), {}
    for site, side, _ in components.sites():
        kept = seen[site, side] = []
        module = model.get_submodule(site)
        if side == "input":
            module.register_forward_pre_hook(lambda _m, args, kept=kept: kept.append(args[0]))
        else:
            module.register_forward_hook(lambda _m, _a, y, kept=kept: kept.append(y))
    with torch.no_grad():
        model(**examples.inputs)
    found = coar.PositionMean(calibration=examples).replacements(Named(), components, batch_size=2)
    assert found.shape == (LENGTH, components.width)
    column = 0
    there = examples.inputs["attention_mask"].bool()
    for row in components:
        (passed,) = seen[row.site, row.side]
        for channel in range(row.position, row.position + row.size):
            for at in range(LENGTH):
                values = [float(text[at, channel]) for text, real in zip(passed, there, strict=True) if real[at]]
                assert float(found[at, column]) == pytest.approx(sum(values) / len(values), abs=1e-5)
            column += 1


def study(**settings):
    model = tiny.model("gpt2").requires_grad_(False)
    calibration = coar.Examples(inputs=tiny.inputs("gpt2", rows=TEXTS, seed=8), targets=torch.zeros(TEXTS))
    return coar.Study(
        model=model,
        examples=coar.Examples(inputs=tiny.inputs("gpt2", rows=TEXTS), targets=torch.arange(TEXTS)),
        components=parts(model),
        ablation=coar.PositionMean(calibration=calibration),
        sampler=coar.BernoulliSampler(ablated_fraction=0.3),
        **settings,
    )


def expected(what, constants, masks):
    """(masks, texts) margins of copies that are written over, position by position."""
    rows, columns = [], np.cumsum([0, *(row.size for row in what.components)])
    for mask in masks:
        patches = [
            (c.site, c.side, c.axis, c.position, c.position + c.size, constants[:, columns[i] : columns[i + 1]])
            for i, c in enumerate(what.components)
            if not mask[i]
        ]
        logits = oracles.patched(what.model, what.examples.inputs, patches)
        rows.append(oracles.read_outputs(logits, what.examples.targets, "logsumexp"))
    return np.stack(rows)


def test_a_run_is_the_oracles_and_makes_no_edits(tmp_path):
    what = study()
    run = coar.collect(what, tmp_path / "r.zarr", masks=5, gradients=8, device="cpu", progress=False)
    again = coar.collect(what, tmp_path / "r.zarr", masks=9, device="cpu", progress=False)
    constants = torch.from_numpy(run.replacements)
    own = what.ablation.replacements(what.model, what.components, batch_size=3)
    torch.testing.assert_close(constants, own, rtol=0, atol=1e-6)
    masks = again.plan.masks(again.sampler, again.n_components, 0, 9)
    np.testing.assert_allclose(again.array("outputs")[:], expected(what, constants, masks), atol=1e-4)
    assert np.abs(again.array("outputs")[:] - again.array("base_output")[:]).max() > 0.1
    assert coar.verify(again) == []
    fitted = coar.fit(again, progress=False)
    fitted.to_safetensors(tmp_path / "a.safetensors")
    goal = coar.EditGoal(targets=[0, 1], references=[2, 3, 4], direction="decrease")
    for attributions in (fitted, coar.load(tmp_path / "a.safetensors")):
        with pytest.raises(EditError, match=r"by other means at every position, which no weights can hold"):
            coar.edit(attributions, goal, budget=2).apply(what.model)
    with pytest.raises(AblationError, match=r"means by position; .* for edits collect with an ablation by constants"):
        coar.select(fitted, what.model, what.examples, goal, device="cpu", progress=False)


def test_masks_of_each_row_and_gradients():
    what = study()
    d = len(what.components)
    constants = what.ablation.replacements(what.model, what.components, batch_size=4).double()
    model, x = what.model.double(), what.examples.inputs
    keep = torch.rand(TEXTS, d, generator=torch.Generator().manual_seed(1)).double()
    with Gates(model, what.components, constants) as gates:
        hard = keep < 0.6
        gates.set(hard)
        with torch.no_grad():
            found = model(x)
        live = keep.clone().requires_grad_()
        gates.set(live)
        (gradient,) = torch.autograd.grad(model(x).sum(), live)
        for column in range(0, d, 5):
            ends = []
            for step in (1e-5, -1e-5):
                moved = keep.clone()
                moved[:, column] += step
                gates.set(moved)
                with torch.no_grad():
                    ends.append(model(x).sum(1))
            torch.testing.assert_close(gradient[:, column], (ends[0] - ends[1]) / 2e-5, rtol=1e-4, atol=1e-6)
    margins = expected(what, constants, hard.numpy()).diagonal()
    np.testing.assert_allclose(oracles.read_outputs(found, what.examples.targets, "logsumexp"), margins, atol=1e-6)


def test_sequences_longer_than_calibration_saw_are_errors():
    what = study()
    constants = what.ablation.replacements(what.model, what.components, batch_size=4)
    longer = torch.ones(2, LENGTH + 2, dtype=torch.long)
    with Gates(what.model, what.components, constants) as gates, torch.no_grad():
        gates.set(torch.zeros(len(what.components)))
        what.model(longer[:, : LENGTH - 2])  # shorter ones take the first means
        with pytest.raises(AblationError, match=r"sequences of 8 positions, .* tokens at 6 of these; give calibration"):
            what.model(longer)
    model = Named()
    short = coar.PositionMean(calibration=tokens_of([4, 3])).replacements(model, parts(model), batch_size=4)
    with Gates(model, parts(model), short) as gates, torch.no_grad():
        gates.set(torch.ones(len(parts(model))))
        with pytest.raises(AblationError, match=r"sequences of 6 positions, .* tokens at 4 of these; give calibration"):
            model(**tokens_of([6, 6]).inputs)


def test_what_has_no_positions_is_an_error():
    flat = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    examples = coar.Examples(inputs=torch.randn(5, 3), targets=torch.zeros(5))
    with pytest.raises(AblationError, match=r"'0' works on tensors of \(5, 4\) entries, .* a mean for each position"):
        coar.PositionMean(calibration=examples).replacements(flat, coar.neurons(flat), batch_size=8)
    with pytest.raises(AblationError, match=r"'0.weight\[0\]' is a slice of a parameter"):
        coar.PositionMean(calibration=examples).replacements(
            flat, coar.parameter_slices(flat, "0.weight"), batch_size=8
        )
    with Gates(flat, coar.neurons(flat), torch.zeros(3, 6)) as gates:
        gates.set(torch.ones(6))
        with pytest.raises(AblationError, match=r"of \(5, 4\) entries; a mean for each position"):
            flat(examples.inputs)
    with pytest.raises(EditError, match="at every position"):
        fold(flat, list(coar.neurons(flat))[:1], [float("nan")], batch_norms={})


def test_positions_of_a_convolution_lie_along_its_last_axis():
    model, x = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Conv1d(3, 2, 1)), torch.randn(9, 2, 7)
    components = coar.conv_filters(model)
    examples = coar.Examples(inputs=x, targets=torch.zeros(9))
    found = coar.PositionMean(calibration=examples).replacements(model, components, batch_size=4)
    with torch.no_grad():
        torch.testing.assert_close(found, torch.cat([model[0](x).mean(0), model(x).mean(0)]).T)
    keep = torch.tensor([True, False, True, True, True])
    with Gates(model, components, found) as gates, torch.no_grad():
        gates.set(keep)
        torch.testing.assert_close(model(x), oracles.patched(model, x, [("0", "output", 1, 1, 2, found[:, 1:2])]))
