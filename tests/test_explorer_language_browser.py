"""Circuits, traces and lenses of a page in Chromium: drawings and charts show what the files have."""

import threading

import numpy as np
import pandas as pd
import pytest
import torch

import coar
from coar.explorer.server import serve_page
from coar.explorer.source import Source
from tests import test_explorer_browser, test_explorer_language
from tests.pages import numbers
from tests.test_explorer_browser import PHONE, Visit, axe, sync_api
from tests.test_explorer_language import HOSTILE, TYPED, Words

pytestmark = test_explorer_browser.pytestmark
browser = test_explorer_browser.browser
model, study, place = (getattr(test_explorer_language, name) for name in ("model", "study", "place"))


@pytest.fixture
def visit(browser, place):
    """Opens the page."""
    visits = []

    def opened(view, **options):
        visits.append(Visit(browser, place / "out/index.html", view=view, **options))
        return visits[-1]

    yield opened
    for one in visits:
        one.close()


def test_a_circuit_is_drawn_with_all_its_edges(visit):
    page = visit("circuits")
    assert page.facts()["edges"] == "4 of 99 edges"
    *lines, nodes = page.traces("Drawing of eap-4")
    at = dict(zip(nodes["text"], zip(nodes["x"], nodes["y"], strict=True), strict=True))
    assert sorted(at, key=lambda label: at[label][1]) == ["embed", "L0.G0", "L0.H1", "L1.mlp", "out"]
    drawn = {
        (line["name"], (line["x"][i], line["y"][i]), (line["x"][i + 1], line["y"][i + 1]))
        for line in lines
        for i in range(0, len(line["x"]), 3)
    }
    assert drawn == {
        ("values", at["embed"], at["L0.G0"]),
        ("queries", at["embed"], at["L0.H1"]),
        ("MLP and output", at["L0.H1"], at["L1.mlp"]),
        ("MLP and output", at["L1.mlp"], at["out"]),
    }
    page.page.get_by_label("Edges of", exact=True).select_option("L0.H1")
    sync_api.expect(page.page.get_by_role("heading", name="Edges of L0.H1")).to_be_visible()
    page.drawn()
    assert page.rows("Edges of the circuit") == [
        ["embed", "L0.H1", "queries"],
        ["L0.H1", "L1.mlp", "MLP and output"],
    ]
    eap = next(one for one in page.traces("Divergence by the number of edges") if one["name"] == "eap")
    assert (eap["x"], eap["y"]) == ([4, 160], [0.5, 0.1])
    assert page.rows("Judged circuits")[2] == [HOSTILE, "4", "0.700"]
    page.page.get_by_label("Circuit", exact=True).select_option("eap-160, 160 edges")
    sync_api.expect(page.page.locator("main")).to_contain_text("other weights than those of the run")
    (heat,) = page.traces("Edges between layers of eap-160")
    assert (heat["x"], heat["y"], heat["z"]) == (["L0"], ["L1"], [[160]])
    assert page.page.evaluate("window.harmed") is None


def test_a_trace_shows_effects_with_intervals(visit, place):
    page = visit("traces")
    table = pd.read_csv(place / "out/trace/trace-mean.csv")
    (heat,) = page.traces("Average indirect effect by layer")
    np.testing.assert_allclose(np.ravel(heat["z"]), table["aie"], rtol=1e-6)
    for row in page.rows("Best layers"):
        kind, where = row[0].split(", ")
        own = table[(table["kind"] == kind) & (table["place"] == where.replace(" ", "_"))]
        best = own.loc[own["aie"].idxmax()]
        assert row[1:] == [str(best["layer"]), f"{best['aie']:.3f}", f"{best['low']:.3f} to {best['high']:.3f}"]


def test_a_lens_shows_what_each_layer_predicts(visit, place):
    page = visit("lenses")
    (heat,) = page.traces("Most probable next tokens")
    first = pd.read_csv(place / "out/lens-logit.csv").query("rank == 1")
    np.testing.assert_allclose(np.ravel(heat["z"]), first["probability"], rtol=1e-6)
    assert np.ravel(heat["text"]).tolist() == first["prediction"].astype(str).tolist()
    (line,) = page.traces("Divergence of lenses by layer")
    np.testing.assert_allclose(line["y"], pd.read_csv(place / "out/lens.csv")["kl"], rtol=1e-6)


def test_a_head_shows_its_attention_on_a_chosen_text(visit, study):
    page = visit("component/5")
    page.page.get_by_label("Text", exact=True).select_option("id 3")
    (heat,) = page.traces(f"Attention of {study.components[5].name}")
    model, length = study.model, int(study.examples.inputs["attention_mask"][3].sum())
    model.set_attn_implementation("eager")
    inputs = {"input_ids": study.examples.inputs["input_ids"][3:4, :length]}
    expected = torch.cat(model(**inputs, output_attentions=True).attentions, 1)[0, 5]
    np.testing.assert_allclose(np.array(heat["z"]), expected, atol=0.0021)


def test_all_heads_of_a_layer_are_shown_at_once(visit, study):
    """Each small pattern is that of its head: the share is how opaque a pixel is."""
    page = visit("component/5")
    page.page.get_by_label("Text", exact=True).select_option("id 3")
    page.drawn()
    model, length = study.model, int(study.examples.inputs["attention_mask"][3].sum())
    model.set_attn_implementation("eager")
    inputs = {"input_ids": study.examples.inputs["input_ids"][3:4, :length]}
    expected = model(**inputs, output_attentions=True).attentions[1][0].detach()
    data = "one.getContext('2d').getImageData(0, 0, one.width, one.height).data"
    opacity = f"all => all.map(one => [...{data}].filter((_, i) => i % 4 === 3))"
    drawn = page.page.locator("[aria-label='Patterns of all heads of this layer'] canvas").evaluate_all(opacity)
    assert len(drawn) == len(expected) == 4
    np.testing.assert_allclose(np.array(drawn).reshape(expected.shape) / 255, expected, atol=0.004)
    assert page.page.locator("[aria-current=true]").get_attribute("aria-label") == study.components[5].name
    page.page.get_by_role("link", name=study.components[7].name, exact=True).first.click()
    page.heading(study.components[7].name)


def test_a_text_is_typed_read_and_continued(browser, place, study, tmp_path):
    source = Source(study, tokenizer=Words())
    server = serve_page(coar.Run.open(place / "heads.zarr"), tmp_path, source, device="cpu")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    page = Visit(browser, server.url, view="component/5")
    page.page.get_by_label("A text of your own").fill(TYPED)
    page.page.get_by_role("button", name="Read it").click()
    page.page.wait_for_selector("#read")
    assert page.page.locator("#read .tokens span").all_inner_texts() == TYPED.split()
    values = numbers(server.live.read([5], TYPED)["values"])
    assert page.page.locator("#read .marked").inner_text() == TYPED.split()[int(values.argmax())]
    assert f"the largest activation, {values.max():.2f}" in page.text()
    page.page.get_by_role("button", name="What if it were ablated?").click()
    page.page.wait_for_selector("main[data-view=whatif]")
    page.page.get_by_label("A text of your own").fill(TYPED)
    page.page.get_by_role("button", name="Continue it with and without them").click()
    page.page.wait_for_selector("table:has(caption:text-is('Continuations'))")
    found = server.live.complete([5], TYPED)
    for side, (_, following, text) in zip(("with", "without"), page.rows("Continuations"), strict=True):
        assert text == found[side]["text"]
        assert following == ", ".join(f'"{word}" {share:.1%}'.replace("%", " %") for word, share in found[side]["next"])
    page.page.get_by_label("A text of your own").fill("t1 " * 300)
    page.page.get_by_role("button", name="Continue it with and without them").click()
    page.page.wait_for_selector("text=Not done: the text has 300 tokens")
    page.drawn()
    serious = [
        one["id"] for one in axe.Axe().run(page.page).response["violations"] if one["impact"] in ("serious", "critical")
    ]
    assert serious == []
    page.said.clear()  # the browser reports the refused request
    page.asked.clear()
    page.close()
    server.shutdown()
    server.server_close()
    thread.join()


def test_heads_are_a_grid_of_layers_and_heads(visit, place):
    page = visit("example/2")
    (heat,) = page.traces("Weights of all components on id 2")
    assert heat["y"] == ["layer 0", "layer 1"]
    weight = coar.load(place / "heads.zarr").weights()[2]
    np.testing.assert_allclose(np.ravel(heat["z"]), weight, atol=1e-3)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_barrier(visit, scheme):
    page = visit("circuits", scheme=scheme)
    small = visit("circuits", scheme=scheme, size=PHONE)
    for view in ("circuits", "circuits/1", "traces", "lenses", "component/5", "example/2"):
        page.open(view)
        found = axe.Axe().run(page.page).response["violations"]
        serious = [(one["id"], one["nodes"][0]["html"]) for one in found if one["impact"] in ("serious", "critical")]
        assert serious == [], view
        small.open(view)
        assert small.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), view
