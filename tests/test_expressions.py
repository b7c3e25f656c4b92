"""Conditions over metadata columns: what they select, and that nothing else is understood."""

import operator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coar.editing.goal import matching_rows
from coar.errors import GoalError

COLUMNS = {
    "label": np.array([0, 1, 2, 3, 3, -4]),
    "other": np.array([3, 1, 0, 3, 2, 5]),
    "score": np.array([0.5, -1.5, 2.0, 0.0, 1e-3, 7.25]),
    "group": np.array(["land", "sea", "sky", "land", "o'er", "größe"]),
    "flag": np.array([True, False, True, True, False, False]),
}
FRAME = pd.DataFrame(COLUMNS)
label, other, score, group, flag = COLUMNS.values()

MEANINGS = {
    "label == 3": label == 3,
    "label != 3": label != 3,
    "label < 2": label < 2,
    "label <= 2": label <= 2,
    "score > 0": score > 0,
    "score >= 0.5": score >= 0.5,
    "label == -4": label == -4,
    "score == -1.5": score == -1.5,
    "score < 1e-2": score < 1e-2,
    "label == 3.0": label == 3,
    "3 == label": label == 3,
    "1 > score": score < 1,
    "'land' == group": group == "land",
    'group == "o\'er"': group == "o'er",
    "group != 'größe'": group != "größe",
    "group == 'nowhere'": np.zeros(6, dtype=bool),
    "flag": flag,
    "not flag": ~flag,
    "flag == True": flag,
    "flag == False": ~flag,
    "label == other": label == other,
    "0 < label <= 3": (label > 0) & (label <= 3),
    "0 <= other < label <= 3": (other >= 0) & (other < label) & (label <= 3),
    "label in [1, 3]": np.isin(label, [1, 3]),
    "label in (-4,)": label == -4,
    "label not in [1, 3]": ~np.isin(label, [1, 3]),
    "label in []": np.zeros(6, dtype=bool),
    "score in [2, 0.5]": np.isin(score, [2, 0.5]),
    "group in ['sea', 'sky']": np.isin(group, ["sea", "sky"]),
    "group not in ['sea', 'sky']": ~np.isin(group, ["sea", "sky"]),
    "label == 3 and flag": (label == 3) & flag,
    "label == 3 or flag": (label == 3) | flag,
    "flag or label == 1 and score > 0": flag | ((label == 1) & (score > 0)),
    "(flag or label == 1) and score > 0": (flag | (label == 1)) & (score > 0),
    "label == 1 and score < 0 or flag": ((label == 1) & (score < 0)) | flag,
    "not flag and label == 3": ~flag & (label == 3),
    "not (flag and label == 3)": ~(flag & (label == 3)),
    "not flag == True": ~flag,
    "not not flag": flag,
    "label == 0 or label == 1 or label == 2": np.isin(label, [0, 1, 2]),
    "  ((label == 3))  ": label == 3,
    " or ".join(["label == 3"] * 700): label == 3,
    f"label == 1{'0' * 400}": np.zeros(6, dtype=bool),
}


@pytest.mark.parametrize("expression", MEANINGS, ids=lambda text: text[:60])
def test_meaning(expression):
    found = matching_rows(expression, COLUMNS)
    assert found.dtype == bool
    np.testing.assert_array_equal(found, MEANINGS[expression])


SIGNS = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
NUMBERS = st.one_of(st.integers(-5, 5), st.floats(-3, 8, allow_nan=False).map(lambda x: round(x, 3)))
WORDS = st.sampled_from(["land", "sea", "sky", "o'er", "größe", "air", ""])
CONSTANTS = {"label": NUMBERS, "other": NUMBERS, "score": NUMBERS, "group": WORDS}


@st.composite
def comparisons(draw):
    """A comparison as text, and what pandas says it is."""
    name = draw(st.sampled_from(sorted(CONSTANTS)))
    kind = draw(st.sampled_from(["constant", "swapped", "in", "not in", "chain", "flag"]))
    sign, second = (draw(st.sampled_from(sorted(SIGNS))) for _ in range(2))
    one, two = draw(CONSTANTS[name]), draw(CONSTANTS[name])
    column = FRAME[name]
    if kind == "flag":
        return "flag", FRAME["flag"]
    if kind == "constant":
        return f"{name} {sign} {one!r}", SIGNS[sign](column, one)
    if kind == "swapped":
        return f"{one!r} {sign} {name}", column.map(lambda value: SIGNS[sign](one, value))
    if kind == "chain":
        both = column.map(lambda value: SIGNS[sign](one, value) and SIGNS[second](value, two))
        return f"{one!r} {sign} {name} {second} {two!r}", both
    inside = column.isin([one, two])
    return f"{name} {kind} [{one!r}, {two!r}]", inside if kind == "in" else ~inside


def combined(parts):
    """Join conditions; the brackets are left out where Python's precedence makes them needless."""
    join = st.tuples(parts, parts, st.booleans())
    return st.one_of(
        join.map(lambda t: (f"({t[0][0]}) and ({t[1][0]})", t[0][1] & t[1][1])),
        join.map(lambda t: (f"({t[0][0]}) or ({t[1][0]})", t[0][1] | t[1][1])),
        parts.map(lambda t: (f"not ({t[0]})", ~t[1])),
    )


@given(st.recursive(comparisons(), combined, max_leaves=8))
@settings(max_examples=150, deadline=None)
def test_random_conditions_mean_what_pandas_says(case):
    text, expected = case
    np.testing.assert_array_equal(matching_rows(text, COLUMNS), expected.to_numpy(dtype=bool))


@given(st.lists(st.tuples(comparisons(), st.sampled_from(["and", "or", "and not", "or not"])), min_size=2, max_size=6))
@settings(max_examples=150, deadline=None)
def test_random_conditions_without_brackets_follow_precedence(parts):
    text, alternatives = parts[0][0][0], [[parts[0][0][1]]]
    for (more, truth), join in parts[1:]:
        text += f" {join} {more}"
        truth = ~truth if "not" in join else truth  # noqa: PLW2901
        if join.startswith("and"):
            alternatives[-1].append(truth)
        else:
            alternatives.append([truth])
    expected = np.logical_or.reduce([np.logical_and.reduce(terms) for terms in alternatives])
    np.testing.assert_array_equal(matching_rows(text, COLUMNS), expected)


@given(st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_text_is_a_condition_or_a_goal_error(text):
    try:
        found = matching_rows(text, COLUMNS)
    except GoalError:
        return
    assert (found.dtype, found.shape) == (bool, (6,))


REFUSED = [
    "print(1)",
    "__import__('pathlib').Path('touched').touch()",
    "open('touched', 'w')",
    "label.max() == 3",
    "label.dtype == 3",
    "label.__class__",
    "label[0] == 3",
    "label[:2]",
    "lambda: label",
    "(lambda: flag)()",
    "[x for x in label] == 3",
    "{x for x in label}",
    "{x: 1 for x in label}",
    "label in (x for x in label)",
    "label in {1: 2}",
    "f'{print(1)}' == group",
    "group == f'land'",
    "label == (x := 3)",
    "(x := flag)",
    "flag if flag else flag",
    "label + 1 == 3",
    "label == 1 + 2",
    "label == 10 ** 9 ** 9",
    "label % 2 == 1",
    "label & flag",
    "flag | flag",
    "~flag",
    "-label == 4",
    "label == +3",
    "label == --3",
    "label is 3",
    "label is not 3",
    "label == 3j",
    "label == None",
    "label == ...",
    "group == b'land'",
    "*label",
    "label in [*[1]]",
    "await label",
    "yield",
    "label == 3; 1",
    "label = 3",
    "import os",
    "label == 3\nother == 3",
    "label ==",
    "label === 3",
    "(label == 3",
    "group == 'land",
    "group == '\x00'",
    "",
    "   ",
    "# label == 3",
    "label",
    "score and flag",
    "not label",
    "3",
    "True",
    "'land'",
    "[1]",
    "3 == 3",
    "label == 3 == 3",
    "label == [3]",
    "[3] == label",
    "label < [3]",
    "label in 3",
    "label in (3)",
    "label in other",
    "'a' in group",
    "[3] in label",
    "3 in [label]",
    "label in [other]",
    "label in [[3]]",
    "label in [[3], 4]",
    "label == '3'",
    "label in ['3']",
    "group == 3",
    "group in ['land', 3]",
    "group == True",
    "flag == 'True'",
    "group == label",
    "group < label",
]


@pytest.mark.parametrize("expression", REFUSED)
def test_everything_else_is_refused_and_nothing_is_run(expression, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GoalError):
        matching_rows(expression, COLUMNS)
    assert not any(Path().iterdir())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("expression", ["lable == 3", "flag and lable in [3]", "label == three", "print", "True_"])
def test_unknown_name_lists_the_columns(expression):
    with pytest.raises(GoalError, match=r"no metadata column .*there are flag, group, label, other, score"):
        matching_rows(expression, COLUMNS)


HUGE = {
    "too long": "label == 3 or " * 800 + "flag",
    "deep brackets": "(" * 4000 + "label == 3" + ")" * 4000,
    "open brackets": "(" * 9999,
    "deep lists": "label in " + "[" * 90 + "]" * 90,
    "many nots": "not " * 2400 + "flag",
    "many signs": "-" * 9000 + "1",
    "many digits": "label == " + "9" * 5000,
    "digits beyond floats": "score < 1" + "0" * 400,
    "nested operators": "label == " + "+".join(["1"] * 4000),
}


@pytest.mark.parametrize("kind", HUGE)
def test_huge_or_deep_text_is_a_goal_error(kind):
    with pytest.raises(GoalError):
        matching_rows(HUGE[kind], COLUMNS)
