"""Groups of any column are strengthened, judged with intervals, reported, and compared with a retrained last layer."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import coar
from coar.editing.last_layer import retrain_last_layer
from coar.errors import EditError, ExamplesError, GoalError
from tests.pages import Reader
from tests.synthetic import fit
from tests.test_cli import works

FEATURES = 8
QUICK = {"device": "cpu", "progress": False}


class Net(nn.Module):
    """Two classes by the first feature, and at night by the second one too, which means nothing."""

    def __init__(self, classes=2):
        super().__init__()
        self.hidden = nn.Linear(FEATURES, FEATURES)
        self.head = nn.Linear(FEATURES, classes)
        with torch.no_grad():
            self.hidden.weight.copy_(torch.eye(FEATURES))
            self.hidden.bias.fill_(4.0)
            self.head.weight.zero_()
            self.head.weight[1, :2] = torch.tensor([1.0, 3.0])
            self.head.bias.zero_()
            self.head.bias[1] = -16.0

    def forward(self, x):
        return self.head(self.hidden(x).relu())


def points(count, seed, classes=2):
    """Points whose second feature is noise at night and 0 by day; a third of the nights are late."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 0.3, (count, FEATURES))
    label, night = np.arange(count) % classes, np.arange(count) // classes % 2 == 1
    x[:, 0] = np.where(label == 1, 1, -1) + rng.normal(0, 0.4, count)
    x[:, 1] = np.where(night, rng.normal(0, 1, count), 0)
    light = np.where(night, np.where(rng.random(count) < 0.3, "late", "night"), "day")
    columns = {"light": light, "hour": np.where(night, 23, 12), "batch": np.arange(count) // 2}
    return coar.Examples(inputs=torch.from_numpy(x).float(), targets=torch.from_numpy(label), metadata=columns)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Attributions of the hidden neurons, the net, studied and judging points."""
    net, studied = Net().eval(), points(160, 0)
    ablation = coar.Mean(calibration=points(80, 3))
    study = coar.Study(model=net, examples=studied, components=coar.neurons(net, include="hidden"), ablation=ablation)
    run = coar.collect(study, tmp_path_factory.mktemp("groups") / "r.zarr", masks=40, **QUICK)
    return fit(run), net, studied, points(200, 1)


@pytest.fixture(scope="module")
def repaired(case):
    return coar.strengthen_group(*case, group="night", **QUICK)


def right(net, examples):
    with torch.no_grad():
        return (net(examples.inputs).argmax(1) == examples.targets).numpy()


def test_a_group_is_a_value_of_any_column(case, repaired):
    assert repaired.edits[0].goal.targets == "light == 'night'"
    assert [component.name for component in repaired.edits[0].components] == ["hidden[1]"]
    named = coar.strengthen_group(*case, group="night", column="light", **QUICK)
    assert named.edits == repaired.edits
    worst = coar.strengthen_group(*case, column="light", **QUICK)
    by_light = {
        one: right(case[1], case[2])[case[2].metadata["light"] == one].mean() for one in ("day", "night", "late")
    }
    assert worst.edits[0].goal.targets == f"light == {min(by_light, key=by_light.get)!r}"
    by_hour = coar.strengthen_group(*case, group=23, column="hour", bound=coar.Bound(mean=0.1, group=0.3), **QUICK)
    assert by_hour.edits[0].goal.targets == "hour == 23"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no metadata column 'group'; there are batch, hour, id, label, light: name one by column="),
        ({"column": "lamp"}, "no metadata column 'lamp'"),
        ({"group": "noon"}, "0 metadata columns have the value 'noon', of batch, hour"),
        ({"group": 12}, "2 metadata columns have the value 12: hour, batch"),
        ({"group": "noon", "column": "light"}, "selects none of the 200 examples"),
    ],
)
def test_unclear_groups_are_refused(case, options, message):
    with pytest.raises(GoalError, match=message):
        coar.strengthen_group(*case, **options, **QUICK)


def test_every_group_is_judged_with_intervals(case, repaired):
    _, net, _, judge = case
    edited = repaired.edits[0].apply(net)
    before, after, light = right(net, judge), right(edited, judge), judge.metadata["light"]
    table = repaired.table.set_index("group")
    assert list(table.index[:3]) == ["targets", "references", "average of groups"]
    assert set(table.index[3:]) in ({"most harmed: day", "references: late"}, {"most harmed: late", "references: day"})
    assert table["points"].iloc[3] <= table["points"].iloc[4]
    for name, row in table.iterrows():
        if name == "average of groups":
            continue
        chosen = {"targets": light == "night", "references": light != "night"}.get(name, light == name.split()[-1])
        assert row["examples"] == chosen.sum()
        assert row["accuracy_after"] == after[chosen].mean()
        assert row["low"] <= row["accuracy_after"] <= row["high"]
        assert row["points"] == pytest.approx(100 * (after[chosen].mean() - before[chosen].mean()))
        assert row["points_low"] <= row["points"] <= row["points_high"]
    several = coar.EditGoal(
        targets="light != 'day'", references="light == 'day'", direction="increase", groups="light", clusters="batch"
    )
    judged = coar.judge_edit(repaired.edits[0], net, judge, goal=several, device="cpu")
    assert judged["group"][:2].tolist() == ["targets", "references"]
    assert set(judged["group"][2:]) == {"targets: night", "targets: late"}


def test_the_page_says_gain_cost_and_risk_and_stays_text(case, repaired, tmp_path):
    file = replace(repaired, name="<script>alert(1)</script>").report(tmp_path / "new" / "page.html")
    page = file.read_text()
    found = Reader(page)
    assert found.title == "<script>alert(1)</script>"
    assert "script" not in found.tags
    assert [link for link in found.links if not link.startswith("data:image/png;base64,")] == []
    row = repaired.table.iloc[0]
    for number in (row["accuracy_before"], row["accuracy_after"]):
        assert f"{number:.1%}" in page
    assert f"{row['points']:+.1f} points" in page
    assert "1 of 8" in page
    assert "160 examples" in page


def test_the_last_layer_is_retrained_and_judged_on_the_same_points(case, repaired, tmp_path):
    _, net, _, judge = case
    train = points(300, 7)
    versus = repaired.versus_last_layer(train)
    rows, night = versus.table.set_index("group"), judge.metadata["light"] == "night"
    edited = repaired.edits[0].apply(net)
    for name, chosen in (("all", slice(None)), ("targets", night), ("light: night", night)):
        for method, model in (("before", net), ("edit", edited), ("last_layer", versus.model)):
            assert rows.loc[name, method] == right(model, judge)[chosen].mean()
    groups = [name for name in rows.index if name.startswith("light: ")]
    assert rows.loc["worst group", "last_layer"] == rows.loc[groups, "last_layer"].min()
    assert rows.loc["average of groups", "edit"] == pytest.approx(rows.loc[groups, "edit"].mean())
    assert rows.loc["light: night", "last_layer"] > rows.loc["light: night", "before"] + 0.1
    assert versus.layer == "head"
    weight = versus.model.head.weight[1] - versus.model.head.weight[0]
    assert weight[0] > 5 * weight[1].abs()
    assert all(
        torch.equal(value, net.state_dict()[name])
        for name, value in versus.model.state_dict().items()
        if "hidden" in name
    )
    page = repaired.report(tmp_path / "page.html", versus=versus).read_text()
    assert f"{rows.loc['worst group', 'last_layer']:.1%} by retraining" in page
    default = repaired.versus_last_layer()
    assert default.table["examples"].tolist() == versus.table["examples"].tolist()


def test_several_classes_are_retrained_too():
    net = Net(classes=3).eval()
    train, judge = points(360, 7, classes=3), points(240, 8, classes=3)
    for part in (train, judge):
        part.inputs[:, 2] += 2.0 * (part.targets == 2)
    retrained = retrain_last_layer(net, train, "hour", device="cpu")
    assert right(retrained.model, judge).mean() > 0.9 > right(net, judge).mean() + 0.2
    assert retrained.examples == 6 * 60


def test_what_cannot_be_retrained_is_refused(case, repaired):
    _, net, studied, _ = case
    rows = np.flatnonzero((studied.targets.numpy() == 1) | (studied.metadata["hour"] == 12))
    few = np.flatnonzero((studied.targets.numpy() == 0) & (studied.metadata["hour"] == 23))[:3]
    with pytest.raises(ExamplesError, match="class 0 with hour == '23' has 3 examples and at least 4"):
        repaired.versus_last_layer(studied.subset(np.concatenate([rows, few])), group="hour")
    with pytest.raises(ExamplesError, match="no example has class 1 of 2"):
        repaired.versus_last_layer(studied.subset(studied.targets.numpy() == 0))
    with pytest.raises(GoalError, match="no metadata column 'lamp'"):
        repaired.versus_last_layer(group="lamp")
    with pytest.raises(EditError, match="not those of a linear layer"):
        retrain_last_layer(nn.Sequential(net, nn.Softmax(1)).eval(), studied, "light", device="cpu")
    with pytest.raises(EditError, match="made 0 edits"):
        replace(repaired, edits=()).versus_last_layer()
    with pytest.raises(EditError, match="has tables only"):
        replace(repaired, judging=None).versus_last_layer()


PIPELINE = '''
"""Points by day and by night."""

import coar
from tests.test_groups import Net, points


def study():
    net = Net().eval()
    parts, ablation = coar.neurons(net, include="hidden"), coar.Mean(calibration=points(80, 3))
    return coar.Study(model=net, examples=points(160, 0), components=parts, ablation=ablation)


def judge():
    return points(200, 1)
'''


def test_the_command_takes_the_column_of_groups(case, repaired, tmp_path):
    file, run = tmp_path / "lights.py", tmp_path / "r.zarr"
    file.write_text(PIPELINE)
    works("collect", file, "--run", run, "--masks", 40, "--test-masks", 2, "--device", "cpu")
    works("fit", run)
    common = ("edit", run, "--pipeline", file, "--device", "cpu", "--dry-run", "--task")
    said = works(*common, "group", "--group", "light=night")
    assert f"{repaired.table['accuracy_after'][0]:.3f}" in said
    assert "hidden[1]" in said
    assert "most harmed" in works(*common, "group", "--group", "light")
    loose = ("--harm", 20, "--group-harm", 50)
    late = (case[3].metadata["light"] == "late").sum()
    assert re.search(rf"targets +{late} ", works(*common, "group", "--group", "light=late", *loose))
    with pytest.raises(AssertionError, match="'light' has: day, late, night"):
        works(*common, "group", "--group", "light=noon")
    with pytest.raises(AssertionError, match="add that task, or leave --group out"):
        works(*common, "fix", "--group", "light")
