"""The tables of benchmarks/edits.py, from kept pieces of work written by hand."""

import json

import pytest

from benchmarks import edits_report

ABOUT = {"task": "forget", "pipeline": "toy", "increase": False, "passes": 100, "seconds": 2.0, "cpu_seconds": 1.0}
RANKED = {
    "components": [0, 1, 2, 4],
    "targets": [90.0, 40.0, 9.0, 0.0],
    "others_points": [0.0, 0.5, -1.0, -4.0],
    "worst_points": [0.0, -1.0, -5.0, -9.0],
    "lowest": [80.0, 40.0, 9.0, 0.0],
    "average": [90.0, 85.0, 80.0, 70.0],
}


def chosen(targets, others):
    return {
        "components": [0, 3],
        "targets": [90.0, targets],
        "others_points": [0.0, others],
        "worst_points": [0.0, others - 2],
        "lowest": [80.0, targets],
        "average": [90.0, 88.0],
    }


@pytest.fixture
def folder(tmp_path):
    """Two seeds of one target: the verified choice reaches 10 and 20 %, at 2 points and at none."""
    (tmp_path / "done").mkdir()
    for seed, (targets, others) in enumerate([(10.0, -2.0), (20.0, 0.0)]):
        for rule, found in (("verified", chosen(targets, others)), ("welch", RANKED)):
            about = {**ABOUT, "seed": seed, "target": "1", "rule": rule}
            (tmp_path / "done" / f"{seed}-{rule}.json").write_text(json.dumps(about | found))
    return tmp_path


def test_other_rules_are_compared_at_the_same_effect_and_at_the_same_harm(folder):
    rows = edits_report.read(folder).set_index(["seed", "rule"])
    for seed, harm in ((0, -2.0), (1, 0.0)):
        assert rows.loc[(seed, "verified"), "others_points"] == harm
        welch = rows.loc[(seed, "welch")]
        assert (welch["components"], welch["targets"], welch["others_points"]) == (2, 9.0, -1.0)
        assert welch["worst_points"] == -5.0
    assert rows.loc[(0, "welch"), "targets_at_same_harm"] == 9.0  # two components, within two points
    assert rows.loc[(1, "welch"), "targets_at_same_harm"] == 40.0  # one component, which costs nothing


def test_effect_out_of_reach_has_no_components(folder):
    file = folder / "done" / "0-verified.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"targets": [90.0, -1.0]}))
    rows = edits_report.read(folder).set_index(["seed", "rule"])
    assert not rows.loc[(0, "welch"), "reached"]
    assert rows.loc[(1, "welch"), "reached"]
    assert rows.isna().loc[(0, "welch"), ["components", "targets", "others_points"]].all()


def test_summary_is_a_mean_and_a_spread_over_seeds(folder):
    short = edits_report.summary(edits_report.read(folder)).set_index("rule")
    mine = short.loc["verified"]
    assert (mine["seeds"], mine["edits"], mine["before"]) == (2, 2, 90.0)
    assert (mine["targets"], mine["others_points"]) == (15.0, -1.0)
    assert mine["targets_sd"] == pytest.approx(50**0.5)
    line = edits_report.markdown(short.reset_index()).splitlines()[2]
    assert "90.0 -> 15.00 ± 7.07" in line
    assert "-1.00 ± 1.41" in line


def test_corrections_are_counted_with_their_cost(folder):
    for seed, (targets, others) in enumerate([(100.0, -0.6), (100.0, 0.4)]):
        found = chosen(targets, others) | {"targets": [0.0, targets]}
        about = {**ABOUT, "task": "fix", "increase": True, "seed": seed, "target": "id 3", "rule": "verified"}
        (folder / "done" / f"fix-{seed}.json").write_text(json.dumps(about | found))
    text = edits_report.corrections(edits_report.read(folder))
    assert text.startswith("- toy, verified: 2 of 2 errors corrected (100%), 1 of them at a cost of at most 0.5 points")
    assert "the dearest -0.60" in text


def test_groups_and_clean_examples_have_rows_of_their_own(folder):
    more = {"pipeline": "misled", "clean": [91.0, 89.0], "partners": [92.0, 90.5]}
    for seed in (0, 1):
        kept = {key: value for key, value in chosen(10.0, 0.0).items() if key not in ("lowest", "average")}
        about = {**ABOUT, "seed": seed, "target": "all", "rule": "verified"}
        (folder / "done" / f"misled-{seed}.json").write_text(json.dumps(about | kept | more))
    assert edits_report.accuracies(edits_report.read(folder)).splitlines() == [
        "- toy, verified: worst group 80.0 -> 15.00 ± 7.07 %, average of groups 90.0 -> 88.00 ± 0.00 %",
        "- toy, welch: worst group 80.0 -> 9.00 ± 0.00 %, average of groups 90.0 -> 80.00 ± 0.00 %",
        "- misled, verified: clean references 91.0 -> 89.00 ± 0.00 %, those of them that are targets too 92.0 -> "
        "90.50 ± 0.00 %",
    ]


def test_figures_show_the_best_that_a_cost_allows():
    """Welch's numbers by hand: half a point gained with one component, one point lost with two, four with four."""
    at = dict(zip(edits_report.COSTS.tolist(), edits_report.best_within(RANKED | {"increase": False}), strict=True))
    assert (at[0.0], at[0.5], at[1.0], at[3.5], at[4.0], at[10.0]) == (40.0, 40.0, 9.0, 9.0, 0.0, 0.0)
    assert set(edits_report.best_within(RANKED | {"increase": True})) == {90.0}


def test_tables_and_figures_are_written(folder, capsys):
    edits_report.write(folder)
    assert {file.name for file in folder.iterdir()} == {"done", "forget.csv", "forget.png", "summary.md"}
    assert "| forget, toy | verified |" in (folder / "summary.md").read_text()
    assert "wrote tables" in capsys.readouterr().out
