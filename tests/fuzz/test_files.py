"""Files from strangers: whatever is in them, only this package's errors come out, and nothing is run or written."""

import contextlib
import json
import struct
from copy import deepcopy

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import coar
from coar.editing.goal import matching_rows
from coar.errors import CoarError
from coar.store.fits import fit_names
from coar.store.gradients import MaskGradients
from coar.store.integrity import verify
from tests.faults import helpers

FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
MANY = settings(FEW, max_examples=400)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["../../outside", "/etc/passwd", "__import__('os')", "NaN", "float32", "bytes", "a" * 5000]),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    made = helpers.collect(
        helpers.study(), tmp_path_factory.mktemp("run") / "r.zarr", masks=30, test_masks=10, gradients=8
    )
    coar.fit(made, progress=False)
    return made


@pytest.fixture
def kept(run):
    """The run, put back as it was after every attempt."""
    before = helpers.files(run.path)
    yield run
    for name, content in helpers.files(run.path).items():
        if before.get(name) != content:
            (run.path / name).write_bytes(before[name])


def places_in(document, path=()):
    """Every place of a JSON document, as the keys that lead there."""
    found = [path]
    inner = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in inner:
        found += places_in(value, (*path, key))
    return found


@st.composite
def changes(draw, document):
    """The document with one or two places replaced by anything or removed."""
    changed = deepcopy(document)
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(places_in(changed)))
        if not path:
            changed = draw(VALUES)
            continue
        parent = changed
        for key in path[:-1]:
            parent = parent[key]
        if draw(st.booleans()):
            parent[path[-1]] = draw(VALUES)
        else:
            del parent[path[-1]]
    return changed


def only_own_errors(action, *arguments):
    with contextlib.suppress(CoarError):
        action(*arguments)


def use(path):
    """Do all that is done with a run without its study; what one step refuses, the next may still do."""
    run = None
    with contextlib.suppress(CoarError):
        run = coar.Run.open(path)
    for step in STEPS if run else ():
        only_own_errors(step, run)


STEPS = [
    verify,
    coar.Run.missing_units,
    coar.Run.rows_intact,
    lambda run: MaskGradients(run).missing_units(),
    lambda run: MaskGradients(run).outputs(len(MaskGradients(run).rounds), slice(0, 8)),
    lambda run: MaskGradients(run).means(range(len(MaskGradients(run).rounds)), slice(0, 8)),
    lambda run: run.components,
    lambda run: run.metadata,
    lambda run: run.replacements,
    fit_names,
    lambda run: run.outputs(slice(0, 8), slice(0, 8)),
    lambda run: run.masks(0, 8),
    lambda run: coar.load(run.path)[0].top(2),
    coar.evaluate,
]


NODES = [
    "",
    "outputs",
    "masks",
    "split",
    "component",
    "component/name",
    "example/id",
    "attributions/ridge",
    "gradient_kept",
]


@pytest.mark.slow  # each attempt reads the run through
@pytest.mark.parametrize("node", NODES)
def test_descriptions(kept, node):
    file = kept.path / node / "zarr.json"
    if not file.exists():
        file = kept.path / "attributions" / fit_names(kept)[0] / "zarr.json"
    content = file.read_bytes()
    document = json.loads(content)

    @FEW
    @given(changes(document))
    def attempt(changed):
        file.write_text(json.dumps(changed))
        only_own_errors(use, kept.path)

    try:
        attempt()
    finally:
        file.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["zarr.json", "outputs/zarr.json", "outputs/c/1/1", "component/name/c/0", "masks/c/0/0"]
)
def test_any_bytes(kept, name):
    file = kept.path / name
    content = file.read_bytes()

    @FEW
    @given(st.binary(max_size=200) | st.integers(0, 8 * len(content) - 1))
    def attempt(changed):
        if isinstance(changed, int):
            flipped = bytearray(content)
            flipped[changed // 8] ^= 1 << changed % 8
            changed = bytes(flipped)
        file.write_bytes(changed)
        only_own_errors(use, kept.path)

    try:
        attempt()
    finally:
        file.write_bytes(content)


def test_edits(run, tmp_path):
    goal = coar.EditGoal(targets="label == 1", references="label != 1", direction="decrease")
    file = tmp_path / "edit.json"
    coar.edit(coar.load(run.path), goal, budget=2).save(file)
    document = json.loads(file.read_text())

    def apply():
        coar.Edit.load(file).apply(helpers.net())

    @MANY
    @given(changes(document))
    def attempt(changed):
        file.write_text(json.dumps(changed))
        only_own_errors(apply)

    attempt()


def test_headers_of_attributions(run, tmp_path):
    file = tmp_path / "attributions.safetensors"
    coar.load(run.path).to_safetensors(file)
    content = file.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])

    def read():
        found = coar.load(file)
        found[0].top(2)
        found.weights()
        goal = coar.EditGoal(targets="label == 1", references="label != 1", direction="decrease")
        coar.edit(found, goal, budget=2)

    @MANY
    @given(changes(header) | changes(json.loads(header["__metadata__"]["facts"])))
    def attempt(changed):
        if "__metadata__" not in changed if isinstance(changed, dict) else True:
            changed = {**header, "__metadata__": {**header["__metadata__"], "facts": json.dumps(changed)}}
        written = json.dumps(changed).encode()
        file.write_bytes(struct.pack("<Q", len(written)) + written + content[8 + size :])
        only_own_errors(read)

    attempt()


@MANY
@given(st.binary(max_size=300))
def test_weights_of_any_bytes(tmp_path_factory, content):
    for ending in ("safetensors", "pt"):
        file = tmp_path_factory.getbasetemp() / f"weights.{ending}"
        file.write_bytes(content)
        only_own_errors(coar.load_weights, helpers.net(), file)


WORDS = [
    "label",
    "group",
    "==",
    "<",
    "in",
    "not",
    "and",
    "or",
    "(",
    ")",
    "[",
    "]",
    "1",
    "'land'",
    ",",
    "-",
    "lambda",
    ":",
    ".",
]
COLUMNS = {"label": np.arange(6) % 3, "group": np.array(["land", "water"] * 3)}


@MANY
@given(st.text(max_size=60) | st.lists(st.sampled_from(WORDS), max_size=14).map(" ".join))
def test_expressions(text):
    only_own_errors(matching_rows, text, COLUMNS)


def test_nothing_outside_the_run_is_written(run, tmp_path):
    """A stranger's column names cannot lead out of the folder: they name nothing but arrays of the group."""
    before = helpers.files(run.path.parent)

    @FEW
    @given(st.sampled_from(["../x", "/x", "a/../../x", "..", "a\x00b", "."]))
    def attempt(name):
        only_own_errors(lambda: coar.fit(coar.Run.open(run.path), name=name, progress=False))

    attempt()
    assert helpers.files(run.path.parent) == before


def test_no_file_is_unpickled():
    """Nothing in the package can read a pickle: numpy's and torch's readers of them are named nowhere unguarded."""
    from pathlib import Path

    for file in Path(coar.__file__).parent.rglob("*.py"):
        text = file.read_text().replace("np.load(file, allow_pickle=False)", "")
        for word in ("import pickle", "pickle.load", "joblib", "allow_pickle=True", "weights_only=False", "np.load("):
            assert word not in text, (file, word)
