"""Reading attributions: lazily, by label, by hand, and from a file that needs no run."""

import json
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import safetensors.numpy

import coar
from coar.errors import CorruptRunError, IncompleteRunError, RunError, SettingsError, StorageError, WeightsError
from coar.store import fits
from coar.store.records import FitRecord
from tests.synthetic import arrays, fit, linear, make, table, weights

N, D = 20, 12
METADATA = {
    "label": np.arange(N) % 3,
    "group": np.array([f"größe {i % 2}" for i in range(N)]),
    "score": np.linspace(-1, 1, N),
    "flag": np.arange(N) % 2 == 0,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with one fit, `ridge`, in chunks of three examples; read only."""
    path = tmp_path_factory.mktemp("run") / "r.zarr"
    made = make(path, linear(weights(), 0.7, 0.5), masks=60, metadata=METADATA)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fits, "CHUNK_BYTES", 3 * 4 * D)
        fit(made)
    return made


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run to change."""
    shutil.copytree(run.path, tmp_path / "copy.zarr")
    return coar.Run.open(tmp_path / "copy.zarr")


@pytest.fixture(scope="module")
def found(run):
    return coar.load(run.path)


@pytest.fixture(scope="module")
def exported(found, tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "deep/er/a.safetensors"
    found.to_safetensors(path)
    return coar.load(path)


@pytest.fixture(params=["found", "exported"])
def either(request):
    """The same attributions from a run and from a safetensors file."""
    return request.getfixturevalue(request.param)


def raw(run, field):
    """An array of the fit, read with Zarr alone."""
    return run.group[f"attributions/ridge/{field}"][:]


def test_opening_reads_no_weights(copy):
    for field in ("weight", "standard_error"):
        shutil.rmtree(copy.path / "attributions/ridge" / field / "c")
    opened = coar.load(copy.path)
    assert (len(opened), opened.components.names[:2]) == (N, ("layer0[0]", "layer0[1]"))
    assert repr(opened) == "Attributions(20 examples, 12 components, ridge)"
    with pytest.raises(IncompleteRunError, match="attributions/ridge/weight"):
        opened.weights()
    with pytest.raises(IncompleteRunError, match="attributions/ridge/standard_error"):
        opened.standard_errors()


def test_only_the_chunks_asked_for_are_read(copy):
    expected = raw(copy, "weight")
    (copy.path / "attributions/ridge/weight/c/2/0").unlink()  # examples 6, 7 and 8
    damaged = copy.path / "attributions/ridge/weight/c/4/0"  # examples 12, 13 and 14
    damaged.write_bytes(damaged.read_bytes()[:-5])
    opened = coar.load(copy.path)
    np.testing.assert_array_equal(opened.weights(slice(0, 6)), expected[:6])
    np.testing.assert_array_equal(opened[9].weight, expected[9])
    with pytest.raises(IncompleteRunError, match="attributions/ridge/weight"):
        opened[7]
    with pytest.raises(CorruptRunError, match="attributions/ridge/weight/c/4/0"):
        opened[13]


def test_weights_of_all_of_slices_and_of_chosen_examples(either, run):
    for field, read in (("weight", either.weights), ("standard_error", either.standard_errors)):
        whole = raw(run, field)
        np.testing.assert_array_equal(read(), whole)
        for part in (slice(3, 9), slice(None, 4), slice(2, 19, 3), slice(5, 5), slice(15, 1000), slice(-3, None)):
            np.testing.assert_array_equal(read(part), whole[part], err_msg=str(part))
        for rows in ([4], [7, 0, 19, 7], []):
            np.testing.assert_array_equal(read(np.array(rows, dtype=int)), whole[rows], err_msg=str(rows))


def test_a_truth_value_per_example_chooses_examples(either, run):
    chosen = METADATA["label"] == 2
    np.testing.assert_array_equal(either.weights(chosen), raw(run, "weight")[chosen])


@pytest.mark.parametrize("length", [5, N + 1])
def test_truth_values_of_another_length_are_refused(either, length):
    with pytest.raises(IndexError, match=str(length)):
        either.weights(np.arange(length) < 3)


def test_chosen_examples_count_from_the_end_too(either, run):
    np.testing.assert_array_equal(either.weights(np.array([-1, 3])), raw(run, "weight")[[-1, 3]])


@pytest.mark.parametrize("index", [20, -21, 10_000])
def test_examples_that_are_not_there_are_named(either, index):
    with pytest.raises(IndexError, match=rf"example {index} .*there are 20"):
        either[index]


@pytest.mark.parametrize("index", [20, -21, 10_000])
def test_chosen_examples_that_are_not_there_are_named(either, index):
    with pytest.raises(IndexError, match=rf"example {index} .*there are 20"):
        either.weights(np.array([3, index]))


def test_one_example_has_its_own_rows_and_metadata(either, run):
    one = either[17]
    np.testing.assert_array_equal(one.weight, raw(run, "weight")[17])
    np.testing.assert_array_equal(one.standard_error, raw(run, "standard_error")[17])
    assert one.intercept == raw(run, "intercept")[17]
    assert one.identity == {"id": 17, "label": 2, "group": "größe 1", "score": METADATA["score"][17], "flag": False}
    last = either[-1]
    np.testing.assert_array_equal(last.weight, raw(run, "weight")[19])
    assert last.identity["id"] == 19
    assert either[np.int64(3)].identity["id"] == 3


@pytest.mark.parametrize("part", [slice(2, 9, 3), slice(-3, None), slice(None, None, -7), slice(5, 5)], ids=str)
def test_slices_are_lists_of_examples(found, part):
    assert [one.identity["id"] for one in found[part]] == list(range(N))[part]


def test_top_and_bottom_are_sorted_by_hand(found, run):
    for i in (0, 11):
        row = raw(run, "weight")[i]
        order = sorted(range(D), key=lambda j, row=row: -row[j])
        for k in (1, 5, D):
            top, bottom = found[i].top(k), found[i].bottom(k)
            assert top.index.tolist() == order[:k]
            assert bottom.index.tolist() == order[::-1][:k]
            assert top["name"].tolist() == [f"layer{j // 4}[{j % 4}]" for j in order[:k]]
            np.testing.assert_array_equal(bottom["weight"], row[order[::-1][:k]])
            np.testing.assert_array_equal(top["standard_error"], raw(run, "standard_error")[i][order[:k]])


def test_by_layer_adds_up_each_site(found, run):
    row = raw(run, "weight")[5].reshape(3, 4)
    layers = found[5].by_layer()
    assert layers.index.tolist() == ["layer0", "layer1", "layer2"]
    np.testing.assert_allclose(layers["total"], row.sum(1), rtol=1e-5)
    np.testing.assert_allclose(layers["magnitude"], np.abs(row).sum(1), rtol=1e-5)
    assert layers["components"].tolist() == [4, 4, 4]


@pytest.mark.parametrize("count", [1, 7])
def test_predict_is_masks_times_weights_plus_intercept(either, run, count):
    masks = np.random.default_rng(0).random((count, D)) > 0.3
    expected = masks.astype(float) @ raw(run, "weight").T.astype(float) + raw(run, "intercept")
    predicted = either.predict(masks)
    assert (predicted.shape, predicted.dtype) == ((count, N), np.float32)
    np.testing.assert_allclose(predicted, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(either.predict(masks[0]), predicted[:1], rtol=1e-5, atol=1e-5)


WRONG_MASKS = {
    "too few components": np.ones((3, D - 1), dtype=bool),
    "too many components": np.ones((3, D + 1), dtype=bool),
    "numbers": np.ones((3, D), dtype=int),
    "fractions": np.ones((3, D)),
    "an axis too many": np.ones((3, D, D), dtype=bool),
}


@pytest.mark.parametrize("wrong", WRONG_MASKS)
def test_masks_that_do_not_fit_are_refused(found, wrong):
    with pytest.raises(SettingsError, match=r"\(masks, 12\) booleans"):
        found.predict(WRONG_MASKS[wrong])


def test_to_pandas_is_labelled(either, run):
    frame = either.to_pandas()
    assert isinstance(frame, pd.DataFrame)
    assert frame.columns.tolist() == list(table(D).names)
    assert (frame.index.name, frame.columns.name, frame.index.tolist()) == ("id", "component", list(range(N)))
    np.testing.assert_array_equal(frame.to_numpy(), raw(run, "weight"))


def test_to_xarray_is_labelled(either, run):
    data = either.to_xarray()
    assert dict(data.sizes) == {"example": N, "component": D}
    for field in ("weight", "standard_error", "intercept", "penalty"):
        np.testing.assert_array_equal(data[field], raw(run, field))
    assert data["weight"].dims == ("example", "component")
    assert data["component"].to_numpy().tolist() == list(table(D).names)
    assert data["site"].to_numpy().tolist() == [f"layer{i // 4}" for i in range(D)]
    for name, column in METADATA.items():
        np.testing.assert_array_equal(data[name], column)
    chosen = data["weight"].sel(component="layer1[2]").where(data["label"] == 1, drop=True)
    np.testing.assert_array_equal(chosen, raw(run, "weight")[METADATA["label"] == 1, 6])


def test_to_xarray_says_how_to_get_xarray(found, monkeypatch):
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(SettingsError, match=r"clone .* pip install '\.\[xarray\]'"):
        found.to_xarray()


def test_safetensors_holds_everything(found, exported):
    assert exported.components == found.components
    assert exported.fit == found.fit
    assert exported.origin.fingerprint == found.origin.fingerprint
    assert exported.origin.batch_norms == found.origin.batch_norms
    np.testing.assert_array_equal(exported.origin.constants, found.origin.constants)
    assert sorted(exported.metadata) == sorted(found.metadata)
    for name, column in found.metadata.items():
        np.testing.assert_array_equal(exported.metadata[name], column)
        assert exported.metadata[name].dtype.kind == column.dtype.kind
    for field, values in arrays(found).items():
        np.testing.assert_array_equal(arrays(exported)[field], values)
        assert arrays(exported)[field].dtype == np.float32


@pytest.mark.parametrize(
    "changed",
    [{"masks": None}, {"method": 3}, {"validation": "high"}, {"gradients": 4, "prior_quality": {"error": 0.1}}],
    ids=["no masks", "a number for a method", "a word for a number", "half a quality"],
)
def test_fit_that_is_described_wrongly(copy, changed):
    description = copy.path / "attributions/ridge/zarr.json"
    content = json.loads(description.read_text())
    content["attributes"]["coar"] |= changed
    description.write_text(json.dumps(content))
    with pytest.raises(CorruptRunError, match=r"description of a fit in attributions/ridge .* is wrong .* fit again"):
        coar.load(copy.path)


def test_record_keeps_the_keys_that_were_stored():
    """Absent keys stay absent, null stays null, keys of other versions stay, and nothing is converted."""
    quality = {"explained": 0.5, "error": 0.1, "deviation": 0.01, "reachable": 0.7}
    rich = {"state": "ready", "method": "informed", "masks": 0, "ablated_fraction": 0.1, "gradients": 4}
    rich |= {"stages": {"gains": 2.0}, "mask_penalty": None, "prior_quality": quality, "validation": 0.9, "later": [1]}
    for stored in (rich, {"state": "ready", "method": "ridge", "masks": 7}):
        assert json.dumps(FitRecord.read(stored).stored()) == json.dumps(stored)
    for damaged in ({"masks": True}, {"stages": {"gains": "2"}}, {"state": "fitting"}, {"ablated_fraction": "0.1"}):
        with pytest.raises(ValueError, match=f"^{next(iter(damaged))}[^\n]*$"):
            FitRecord.read(rich | damaged)


def test_safetensors_of_a_baseline_has_no_standard_errors(copy, tmp_path):
    record = FitRecord(method="leave_one_out", masks=0)
    writer = fits.FitWriter(copy, "leave_one_out", ("weight", "intercept"), record)
    writer.write(slice(0, N), weight=np.full((N, D), 2.0), intercept=np.zeros(N))
    writer.finish()
    coar.load(copy.path, "leave_one_out").to_safetensors(tmp_path / "b.safetensors")
    assert coar.load(copy.path).fit.method == "ridge"
    for baseline in (coar.load(copy.path, "leave_one_out"), coar.load(tmp_path / "b.safetensors")):
        assert (baseline.weights() == 2).all()
        assert baseline[3].standard_error is None
        assert "standard_error" not in baseline[3].top(2)
        with pytest.raises(RunError, match="leave_one_out gives no standard errors"):
            baseline.standard_errors()
        assert set(baseline.to_xarray().data_vars) == {"weight", "intercept"}


def spoil(exported, file, how):
    content = exported._source.path.read_bytes()
    if how == "cut short":
        file.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "text":
        file.write_text("weights: none")
    elif how == "other tensors":
        safetensors.numpy.save_file({"weight": np.zeros(3, dtype=np.float32)}, file)
    elif how == "other metadata":
        header = {"components": json.dumps({"a": 1}), "examples": "[]", "facts": "{}"}
        safetensors.numpy.save_file({"weight": np.zeros(3, dtype=np.float32)}, file, metadata=header)
    elif how == "no tensors":
        header = {"components": json.dumps(list(table(D))), "examples": '{"id": [0]}', "facts": "{}"}
        safetensors.numpy.save_file({}, file, metadata=header)


@pytest.mark.parametrize("how", ["cut short", "empty", "text", "other tensors", "other metadata", "no tensors"])
def test_file_without_attributions_is_refused(exported, tmp_path, how):
    spoil(exported, tmp_path / "x.safetensors", how)
    with pytest.raises(WeightsError, match=r"x\.safetensors does not hold attributions"):
        coar.load(tmp_path / "x.safetensors")


def test_unwritable_place_is_a_storage_error(found, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file/a\.safetensors"):
        found.to_safetensors(tmp_path / "file/a.safetensors")


def test_load_prefers_ridge_and_takes_any_name(copy):
    fit(copy, name="another")
    fit(copy, method="ols")
    assert coar.load(copy.path).fit.method == "ridge"
    assert coar.load(copy.path, "ols").fit.method == "ols"
    shutil.rmtree(copy.path / "attributions/ridge")
    assert coar.load(copy.path).fit.method == "ols"
    shutil.rmtree(copy.path / "attributions/ols")
    np.testing.assert_array_equal(coar.load(copy.path).weights(), coar.load(copy.path, "another").weights())


def test_a_fit_may_be_called_as_the_folder_of_chunks_is(copy):
    made = fit(copy, name="c")
    np.testing.assert_array_equal(coar.load(copy.path, "c").weights(), made.weights())
    np.testing.assert_array_equal(made.weights(), coar.load(copy.path).weights())


def test_missing_fit_lists_those_there_are(copy):
    with pytest.raises(RunError, match=r"no finished fit 'lasso' \(finished: ridge\)"):
        coar.load(copy.path, "lasso")
    shutil.rmtree(copy.path / "attributions")
    with pytest.raises(RunError, match=r"no finished fit 'ridge' \(finished: none\)"):
        coar.load(copy.path)


def test_a_baseline_is_loaded_only_by_name(copy):
    shutil.move(copy.path / "attributions/ridge", copy.path / "attributions/cheap")
    description = copy.path / "attributions/cheap/zarr.json"
    content = json.loads(description.read_text())
    content["attributes"]["coar"] |= {"method": "leave_one_out", "masks": 0}
    description.write_text(json.dumps(content))
    with pytest.raises(RunError, match=r"no finished fit 'ridge' \(finished: cheap\)"):
        coar.load(copy.path)
    assert coar.load(copy.path, "cheap").fit.method == "leave_one_out"


def test_missing_path_is_a_run_error(tmp_path):
    with pytest.raises(RunError, match="there is no run"):
        coar.load(tmp_path / "nothing.zarr")
