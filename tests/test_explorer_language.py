"""Circuits, traces and lenses on a page: its data is that of the files, and its charts show them."""

import shutil

import pandas as pd
import pytest
import torch

import coar
from coar.explorer.source import Source
from coar.report import write_lenses, write_trace
from tests import edge_oracle
from tests.pages import content
from tests.test_explorer import written
from tests.test_tracing import prompts

EDGES = ("embed -> L0.G0.v", "embed -> L0.H1.q", "L0.H1 -> L1.mlp", "L1.mlp -> out")
HOSTILE = "<img src=x onerror='window.harmed = 1'>"


@pytest.fixture(scope="module")
def model():
    return edge_oracle.build("llama")


@pytest.fixture(scope="module")
def study(model):
    facts = prompts(model)
    return coar.Study(model=model, examples=facts, components=coar.attention_heads(model), output=coar.TokenMargin())


@pytest.fixture(scope="module")
def place(model, study, tmp_path_factory):
    """A run of attention heads, and circuits, a trace and lenses in its reports folder; read only."""
    folder = tmp_path_factory.mktemp("language")
    run = coar.collect(study, folder / "heads.zarr", masks=30, test_masks=10, device="cpu", progress=False)
    coar.fit(run, progress=False)
    facts = {"size": 99, "ablation": "Mean", "method": "eap", "constants": None}
    small = coar.Circuit(edges=EDGES, table="edges", weights=run.fingerprint["weights"], **facts)
    small.save(folder / "out/circuits/eap-4.json")
    many = tuple(f"L0.H0 -> L1.H{i}.{port}" for i in range(80) for port in "qk")
    coar.Circuit(edges=many, table="edges", weights="0" * 64, **facts | {"size": 200}).save(
        folder / "out/circuits/eap-160.json"
    )
    table = pd.DataFrame({"method": ["eap", "eap", HOSTILE], "edges": [4, 160, 4], "kl": [0.5, 0.1, 0.7]})
    table.to_csv(folder / "out/circuits/circuits.csv", index=False)
    write_trace(coar.trace(model, study.examples, corruption="mean", progress=False), folder / "out/trace")
    lens = coar.lens(model, study.examples, "logit", progress=False)
    write_lenses(lens.summary(study.examples), {"logit": lens.read(torch.arange(2, 8))}, folder / "out")
    written(run, folder / "out", source=Source(study))
    return folder


def test_the_page_has_what_the_files_have(place):
    shown = content((place / "out/index.html").read_text(encoding="utf-8"))
    small, large = shown["circuits"]
    assert (small["name"], small["edges"], small["own"]) == ("eap-4", list(EDGES), True)
    assert (large["name"], len(large["edges"]), large["own"]) == ("eap-160", 160, False)
    assert small["judged"]["rows"] == [["eap", 4, 0.5], ["eap", 160, 0.1], [HOSTILE, 4, 0.7]]
    (trace,), (lens,) = shown["traces"], shown["lenses"]
    assert trace["corruption"] == "mean"
    for packed, file in (
        (trace["table"], "trace/trace-mean.csv"),
        (lens["table"], "lens.csv"),
        (lens["readings"]["logit"], "lens-logit.csv"),
    ):
        expected = pd.read_csv(place / "out" / file)
        expected = expected[expected["rank"] <= 3] if "rank" in expected else expected
        found = pd.DataFrame(packed["rows"], columns=packed["columns"])
        pd.testing.assert_frame_equal(found, expected[found.columns].reset_index(drop=True), check_dtype=False)


def test_files_that_are_damaged_are_named_and_the_rest_is_shown(place, tmp_path):
    shutil.copytree(place / "out", tmp_path / "out")
    (tmp_path / "out/circuits/eap-4.json").write_text("{}")
    (tmp_path / "out/trace/trace-mean.csv").write_text("kind,layer\nmlp,1\n")
    (tmp_path / "out/lens-logit.csv").write_bytes(b"\xff\xfe\x00")
    shown = content(written(coar.Run.open(place / "heads.zarr"), tmp_path / "out"))
    assert [one["name"] for one in shown["circuits"]] == ["eap-160"]
    assert "traces" not in shown
    assert shown["lenses"][0]["readings"] == {}
    notes = " ".join(shown["notes"])
    assert "eap-4.json does not hold a circuit" in notes
    assert "it has no column 'window'" in notes
    assert "lens-logit.csv" in notes


def test_folders_of_the_pipelines_commands_are_read(place, study, tmp_path):
    shutil.copytree(place / "out/circuits", tmp_path / "facts-circuit")
    shutil.copytree(place / "out/trace", tmp_path / "facts")
    run = coar.Run.open(place / "heads.zarr")
    shown = content(written(run, tmp_path / "heads", source=Source(study, file=tmp_path / "facts.py")))
    assert (len(shown["circuits"]), len(shown["traces"])) == (2, 1)
    assert "circuits" not in content(written(run, tmp_path / "heads"))
