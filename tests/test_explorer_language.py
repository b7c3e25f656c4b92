"""Circuits, traces and lenses on a page: its data is that of the files, and its charts show them."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch

import coar
from coar.errors import SettingsError
from coar.explorer.live import LiveModel
from coar.explorer.part import part_of
from coar.explorer.source import Source
from coar.report import write_lenses, write_trace
from tests import edge_oracle
from tests.pages import content, numbers
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


class Words:
    """A tokenizer of words such as t7."""

    def __call__(self, text, return_tensors):
        assert return_tensors == "pt"
        ids = torch.tensor([[int(word[1:]) for word in text.split()]], dtype=torch.long)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def decode(self, ids):
        return " ".join(f"t{one}" for one in ids)


TYPED = "t3 t9 t4 t3 t17 t6"


def live_model(place, study, folder, tokenizer=None):
    run = coar.Run.open(place / "heads.zarr")
    attributions = coar.load(run.path)
    return LiveModel(run, Source(study, tokenizer=tokenizer), attributions, part_of(attributions), folder, device="cpu")


def greedy(model, text, steps, ablated=None):
    """Probabilities of the next token, and a text's continuation token by token; a head's output may be zero."""
    handle = None
    if ablated is not None:
        columns = slice(ablated.position, ablated.position + ablated.size)

        def zero(_, args):
            changed = args[0].clone()
            changed[..., columns] = 0
            return (changed,)

        handle = model.get_submodule(ablated.site).register_forward_pre_hook(zero)
    ids, shares = Words()(text, "pt")["input_ids"], []
    with torch.no_grad():
        for _ in range(steps):
            shares.append(model(input_ids=ids).logits[0, -1].softmax(0))
            ids = torch.cat([ids, shares[-1].argmax().reshape(1, 1)], 1)
    if handle is not None:
        handle.remove()
    return shares[0], ids[0, -steps:].tolist()


def test_a_text_that_is_typed_is_read(place, model, study, tmp_path):
    live = live_model(place, study, tmp_path, Words())
    part = study.components[5]
    recorded = []
    handle = model.get_submodule(part.site).register_forward_pre_hook(lambda _, args: recorded.append(args[0]))
    model(**Words()(TYPED, "pt"))
    handle.remove()
    found = live.read([5], TYPED)
    assert found["words"] == TYPED.split()
    own = recorded[0][0, :, part.position : part.position + part.size].norm(dim=1).detach()
    np.testing.assert_allclose(numbers(found["values"]), own, rtol=1e-4)


def test_a_text_that_is_typed_is_continued_with_and_without_components(place, model, study, tmp_path):
    found = live_model(place, study, tmp_path, Words()).complete([2], TYPED)
    for side, ablated in (("with", None), ("without", study.components[2])):
        shares, longer = greedy(model, TYPED, 24, ablated)
        continued = [int(word[1:]) for word in found[side]["text"].split()]
        assert continued == longer[: len(continued)]
        assert len(continued) == 24 or continued[-1] == model.generation_config.eos_token_id
        best = shares.sort(descending=True)
        assert [word for word, _ in found[side]["next"]] == [f"t{i}" for i in best.indices[:5].tolist()]
        np.testing.assert_allclose([share for _, share in found[side]["next"]], best.values[:5], rtol=1e-3)
    assert found["with"] != found["without"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("  ", "2 characters"),
        ("t1 " * 2000, "6,000 characters"),
        ("t1 " * 257, "257 tokens; give some, and at most 256"),
    ],
    ids=["blank", "too long", "too many tokens"],
)
def test_texts_that_are_not_read(place, study, tmp_path, text, message):
    live = live_model(place, study, tmp_path, Words())
    for ask in (live.read, live.complete):
        with pytest.raises(SettingsError, match=message):
            ask([5], text)


def test_texts_need_a_tokenizer_and_one_component(place, study, tmp_path):
    bare = live_model(place, study, tmp_path)
    assert not bare.reads_texts
    for ask in (bare.read, bare.complete):
        with pytest.raises(SettingsError, match="no tokenizer"):
            ask([5], TYPED)
    with pytest.raises(SettingsError, match="2 components were given to read a text; give one"):
        live_model(place, study, tmp_path, Words()).read([1, 2], TYPED)
