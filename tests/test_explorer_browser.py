"""The page in Chromium: every view and control, values equal to the run's, no network, and no barrier found by axe."""

import dataclasses
import os
import re
import shutil
import threading

import numpy as np
import pandas as pd
import pytest
import torch

import coar
from coar.explorer.server import serve_page
from coar.pipeline import load_pipeline
from tests.pages import numbers
from tests.synthetic import fit, linear, make, weights
from tests.test_cli import TINY, works
from tests.test_explorer import written

sync_api = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: make browser-packages"),
]
MINUS = "\N{MINUS SIGN}"
HOSTILE = "</script><img src=x onerror='window.harmed = 1'><b>&amp;"
VIEWS = ("examples", "example/3", "component/5", "whatif", "edits", "evaluation", "about")
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


LAYERS = {"digits": "layer2.conv1", "cifar10": "layer2.0.conv1"}  # by pipeline: one whose filters are studied


ERRORS_FIXED = pytest.mark.parametrize("place", ["digits"], indirect=True)


@pytest.fixture(scope="module", params=["digits", pytest.param("cifar10", marks=pytest.mark.slow)])
def place(tmp_path_factory, request):
    """A run of two layers of a net, edits of a class and of errors, and their page; read only."""
    request.getfixturevalue(request.param)  # trains the net, or skips where the data is missing
    folder = tmp_path_factory.mktemp("browser")
    some = TINY.replace('"layer2.*"', f'["conv1", "{LAYERS[request.param]}"]').replace("wrong)[:, 0]", "wrong)[:3, 0]")
    (folder / "tiny.py").write_text(some.replace("import digits", f"import {request.param} as digits"))
    run, out, forget = (
        folder / "tiny.zarr",
        ("--out", folder / "out", "--device", "cpu"),
        ("--task", "forget", "--label", 3),
    )
    tasks = (*forget, "--task", "fix") if request.param == "digits" else ()
    works("all", folder / "tiny.py", "--run", run, *out, "--masks", 60, *tasks)
    if request.param == "cifar10":  # a larger net: one edit, chosen without search
        pipeline = ("--pipeline", folder / "tiny.py")
        harm = ("--rule", "welch", "--harm", 100, "--group-harm", 100, "--constants", "run")
        works("edit", run, *pipeline, *forget, *harm, *out)
        works("report", run, *pipeline, *out[:2])
    return folder


@pytest.fixture(scope="module")
def attributions(place):
    return coar.load(place / "tiny.zarr")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """The page of a run without a pipeline, with markup in its name and metadata."""
    path = tmp_path_factory.mktemp("hostile") / "<script>window.harmed = 1<b>.zarr"
    metadata = {"word": np.array([HOSTILE] * 10 + ["größe"] * 10)}
    run = make(path, linear(weights(), noise=2.0), test_masks=30, masks=60, metadata=metadata)
    fit(run)
    folder = path.parent / "<i>out"
    (folder / "<u>edit").mkdir(parents=True)
    pd.DataFrame({"group": [HOSTILE], "points": [1.5]}).to_csv(folder / "<u>edit/table.csv", index=False)
    curve = {"components": [0, 1] * 2, "group": [HOSTILE] * 2 + ["others"] * 2, "accuracy": [1.0, 0.5, 1, 1]}
    pd.DataFrame(curve).to_csv(folder / "<u>edit/curve.csv", index=False)
    written(run, folder)
    return folder / "index.html"


@pytest.fixture(scope="module")
def browser():
    alone = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=alone)
        yield started
        started.close()


class Visit:
    """A page that is open, and what it has said and asked for since."""

    def __init__(self, browser, file, *, size=DESK, scheme="light", view="examples"):
        self.context = browser.new_context(viewport=size, color_scheme=scheme)
        self.page = self.context.new_page()
        self.said, self.asked = [], []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file if isinstance(file, str) else file.as_uri())
        self.page.wait_for_selector("html[data-ready]")
        self.open(view)

    def open(self, view):
        self.page.evaluate("view => { window.location.hash = view; }", view)
        self.page.wait_for_selector(f"main[data-view={view.split('/')[0]}]")
        self.drawn()

    def drawn(self):
        sync_api.expect(self.page.locator(".chart:not([data-drawn])")).to_have_count(0)

    def heading(self, words):
        """Wait for the view with this first heading."""
        sync_api.expect(self.page.locator("h2").first).to_have_text(words)
        self.drawn()

    def text(self, selector="main"):
        return self.page.inner_text(selector).replace(MINUS, "-")

    def facts(self):
        names, values = (self.page.locator(f"main .facts {tag}").all_inner_texts() for tag in ("dt", "dd"))
        return dict(zip(names, (value.replace(MINUS, "-") for value in values), strict=True))

    def rows(self, caption):
        """The cells of a table, shown or folded away."""
        cells = (
            "table => [...table.querySelectorAll('tbody tr')].map(row => [...row.cells].map(one => one.textContent))"
        )
        found = self.page.locator(f"table:has(caption:text-is('{caption}'))").evaluate(cells)
        return [[cell.replace(MINUS, "-") for cell in row] for row in found]

    def shown(self, label=None):
        """Examples of a gallery, in order."""
        part = f"[aria-label='{label}'] " if label else "main "
        return [int(one.get_attribute("data-example")) for one in self.page.locator(f"{part}a[data-example]").all()]

    def traces(self, label):
        self.drawn()
        return self.page.locator(f"[data-chart='{label}'] .chart").evaluate(
            "place => place.data.map(one => ({x: [...(one.x ?? [])], y: [...(one.y ?? [])], z: one.z, name: one.name,"
            " text: one.text, error: [...((one.error_x ?? one.error_y)?.array ?? [])]}))"
        )

    def close(self):
        """Close the page; it must have been silent, and have asked for nothing but itself."""
        assert self.said == []
        assert [url for url in self.asked if not url.startswith(("file:", "data:"))] == []
        self.context.close()


@pytest.fixture
def visit(browser, place):
    """Opens the page of the small run."""
    visits = []

    def opened(view="examples", file=place / "out/index.html", **options):
        visits.append(Visit(browser, file, view=view, **options))
        return visits[-1]

    yield opened
    for one in visits:
        one.close()


def test_served_what_if_measures_judges_and_saves(browser, place, attributions, frame, tmp_path):
    source = load_pipeline(place / "tiny.py").source(coar.Run.open(place / "tiny.zarr"))
    server = serve_page(coar.Run.open(place / "tiny.zarr"), tmp_path, source, device="cpu")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    page = Visit(browser, server.url, view="whatif")
    page.page.get_by_label("A layer").select_option("conv1")
    check_prediction(page, attributions, frame, list(range(16)))
    page.page.get_by_role("button", name="Measure with the model").click()
    page.page.wait_for_selector("#measured")
    (points,) = page.traces("Predicted and measured outputs")
    measured = numbers(server.live.measure(list(range(16)))["output"])
    np.testing.assert_allclose(points["y"], measured, atol=1e-4)
    change, above0 = page.page.locator("#measured strong").all_inner_texts()[:2]
    assert float(change.replace(MINUS, "-")) == pytest.approx((measured - frame["output"]).mean(), abs=1e-3)
    assert above0 == f"{(measured > 0).mean():.1%}".replace("%", " %")
    page.page.get_by_role("button", name="Judge on other examples").click()
    page.page.wait_for_selector("table:has(caption:text-is('Judged by the model'))")
    judged = server.live.judge(list(range(16)))["table"]["rows"]
    assert [row[0] for row in page.rows("Judged by the model")] == [row[0] for row in judged]
    page.page.get_by_label("Name", exact=True).fill("no/such")
    page.page.get_by_role("button", name="Save as an edit").click()
    page.page.wait_for_selector("text=Not done: the name of an edit")
    page.said.clear()  # the browser reports the refused request
    page.page.get_by_label("Name", exact=True).fill("first-layer")
    page.page.get_by_role("button", name="Save as an edit").click()
    page.page.get_by_role("link", name="Edits", exact=True).click()
    check_saved_edit(page, source, tmp_path / "first-layer/edit.json")
    page.page.reload()
    page.page.wait_for_selector("main[data-view=edits]")
    check_saved_edit(page, source, tmp_path / "first-layer/edit.json")
    page.open("whatif")
    assert page.page.get_by_label("An edit").locator("option").all_inner_texts() == ["choose", "first-layer"]
    assert {url.rpartition("/")[0] + "/" for url in page.asked if not url.startswith("data:")} == {server.url}
    page.asked.clear()
    page.close()
    server.shutdown()
    server.server_close()
    thread.join()


def check_saved_edit(page, source, file):
    """The view of edits shows an edit with its margins on the judging examples."""
    edit, judge = coar.Edit.load(file), source.judge()
    assert page.page.get_by_label("Task").locator("option").all_inner_texts() == [file.parent.name]
    assert len(page.rows("Components of the edit")) == len(edit) == 16
    points = page.traces("Margins before and after the edit")
    with torch.no_grad():
        logits = edit.apply(source.study.model)(judge.inputs)
    right = judge.targets[:, None]
    margins = logits.gather(1, right)[:, 0] - logits.scatter(1, right, -torch.inf).amax(1)
    np.testing.assert_allclose(np.sort(np.concatenate([one["y"] for one in points])), margins.sort()[0], atol=1e-3)
    assert str(file) in page.page.locator(".command code").first.inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_axe_finds_no_barrier_and_nothing_overflows(visit, scheme, size):
    page = visit(scheme=scheme, size=size)
    for view in VIEWS:
        page.open(view)
        if view == "whatif":
            page.page.get_by_role("button", name="Add strongest").click()
            page.drawn()
        found = axe.Axe().run(page.page).response["violations"]
        serious = [(one["id"], one["nodes"][0]["html"]) for one in found if one["impact"] in ("serious", "critical")]
        assert serious == [], view
        assert page.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), view


def test_tabs_work_with_the_keyboard(visit):
    page = visit()
    page.page.locator("#tab-examples").focus()
    for view in ("example", "component", "whatif", "edits", "evaluation", "about", "examples"):
        page.page.keyboard.press("ArrowRight")
        page.page.wait_for_selector(f"main[data-view={view}]")
        assert page.page.evaluate("document.activeElement.id") == f"tab-{view}"
        assert page.page.locator("[role=tab][aria-selected=true]").count() == 1
    page.page.keyboard.press("ArrowLeft")
    page.page.wait_for_selector("main[data-view=about]")
    page.page.keyboard.press("Home")
    page.page.wait_for_selector("main[data-view=examples]")
    page.page.keyboard.press("End")
    page.page.wait_for_selector("main[data-view=about]")
    page.page.locator("#tab-examples").click()
    page.page.locator("a[data-example='4']").focus()
    page.page.keyboard.press("Enter")
    page.page.wait_for_selector("main[data-view=example]")
    page.drawn()


def test_scheme_follows_the_system_and_the_switch(visit):
    ground = "getComputedStyle(document.body).backgroundColor"
    light, dark = visit("evaluation"), visit("evaluation", scheme="dark")
    assert light.page.evaluate(ground) != dark.page.evaluate(ground)
    light.page.get_by_role("button", name="Dark scheme").click()
    light.drawn()
    assert light.page.evaluate(ground) == dark.page.evaluate(ground)
    ink = "document.querySelector('.chart').layout.font.color"
    assert light.page.evaluate(ink) == dark.page.evaluate(ink)
    light.page.get_by_role("button", name="Light scheme").click()
    light.drawn()
    assert light.page.evaluate(ground) != dark.page.evaluate(ground)


@pytest.fixture(scope="module")
def frame(place, attributions):
    """Metadata, output, held-out correlation and correctness of each example, by its position."""
    study = load_pipeline(place / "tiny.py").study()
    found = pd.DataFrame(attributions.metadata)
    run = coar.Run.open(place / "tiny.zarr")
    found["output"] = run.array("base_output")[:]
    scores = coar.evaluate(run, fits=["ridge"]).per_example.query("ablated_fraction == 0.1")
    found["pearson"] = scores.set_index("example")["pearson"]
    with torch.no_grad():
        found["predicted"] = study.model(study.examples.inputs).argmax(1).numpy()
    return found


def test_gallery_sorts_and_filters(visit, frame):
    page = visit()
    assert page.shown() == list(range(len(frame)))
    assert page.text("#found") == f"{len(frame)} of {len(frame)} examples"
    page.page.get_by_label("Sort by").select_option("held-out correlation")
    assert page.shown() == frame.sort_values("pearson", kind="stable").index.tolist()
    page.page.get_by_role("button", name="Smallest first").click()
    assert page.shown()[0] == frame["pearson"].idxmax()
    page.page.get_by_role("button", name="Largest first").click()
    page.page.get_by_label("Sort by").select_option("output of the model")
    assert page.shown() == frame.sort_values("output", kind="stable").index.tolist()
    page.page.get_by_label("Show", exact=True).select_option("wrong ✗")
    wrong = frame.query("predicted != label")
    assert page.shown() == wrong.sort_values("output").index.tolist()
    assert page.text("#found") == f"{len(wrong)} of {len(frame)} examples"
    page.page.get_by_label("Show", exact=True).select_option("right ✓")
    page.page.get_by_label("label", exact=True).select_option("7")
    right = frame.query("predicted == label and label == 7").sort_values("output")
    assert page.shown() == right.index.tolist()
    page.page.get_by_label("held-out correlation at least").fill("0.8")
    assert page.shown() == right.query("pearson >= 0.8").index.tolist()
    page.page.get_by_label("held-out correlation at least").fill("-1")
    page.page.get_by_label("Search").fill(str(right["id"].iloc[0]))
    assert right.index[0] in page.shown()
    assert len(page.shown()) <= len(right)


def test_one_example_shows_its_attribution(visit, attributions, frame):
    at = int(frame.query("predicted != label").index[0])
    page = visit(f"example/{at}")
    facts, row = page.facts(), frame.loc[at]
    assert facts["output of the model"] == f"{row['output']:.3f}"
    assert facts["held-out correlation"] == f"{row['pearson']:.3f}"
    assert facts["prediction"].startswith(f"{row['predicted']:.0f}, with probability 0.")
    full = attributions.predict(np.ones((1, len(attributions.components)), dtype=bool))[0, at]
    assert facts["by the fit, all components kept"] == f"{full:.3f}"
    assert f"reads this {row['label']:.0f} as {row['predicted']:.0f}" in page.text()
    expected = attributions[at].to_pandas()
    chosen = pd.concat([expected.nlargest(10, "weight"), expected.nsmallest(10, "weight").iloc[::-1]])
    half = 1.96 * chosen["standard_error"]
    names, weights_shown, intervals = zip(*page.rows("Strongest components"), strict=True)
    assert list(names) == chosen["name"].tolist()
    np.testing.assert_allclose([float(one) for one in weights_shown], chosen["weight"], atol=6e-4)
    ends = np.array([[float(end) for end in one.split(" to ")] for one in intervals])
    np.testing.assert_allclose(ends, np.stack([chosen["weight"] - half, chosen["weight"] + half], 1), atol=7e-4)
    (bars,) = page.traces(f"Strongest components for and against id {row['id']:.0f}")
    np.testing.assert_allclose(bars["x"], chosen["weight"], atol=1e-3)
    np.testing.assert_allclose(bars["error"], half, atol=1e-3)
    page.page.get_by_label("components on each side").fill("4")
    assert len(page.rows("Strongest components")) == 8
    (removed,) = page.traces(f"Predicted output of id {row['id']:.0f} without its strongest components")
    strongest = np.sort(attributions[at].weight)[::-1][:40]
    np.testing.assert_allclose(removed["y"], row["output"] - np.r_[0, strongest.cumsum()], atol=1e-2)
    above, below = page.traces(f"Sums of weights by layer on id {row['id']:.0f}")
    totals = attributions[at].by_layer()
    np.testing.assert_allclose(above["x"] + np.array(below["x"]), totals["total"], atol=1e-2)
    np.testing.assert_allclose(above["x"] - np.array(below["x"]), totals["magnitude"], atol=1e-2)
    (cells,) = page.traces(f"Weights of all components on id {row['id']:.0f}")
    np.testing.assert_allclose([value for line in cells["z"] for value in line if value is not None],
                               attributions[at].weight, atol=1e-3)  # fmt: skip
    weight = attributions.weights()
    unit = weight / np.linalg.norm(weight, axis=1, keepdims=True)
    assert page.shown("Nearest examples") == np.argsort(-(unit @ unit[at]), kind="stable")[1:13].tolist()


def test_single_components_are_compared_by_what_else_they_break(visit, attributions, frame):
    at = int(frame["output"].argmin())
    page = visit(f"example/{at}")
    weight, before = attributions.weights(), frame["output"].to_numpy()
    others = np.arange(len(frame)) != at
    for side, sign in (("against this output", 1), ("for this output", -1)):
        page.page.get_by_label("components that are").select_option(side)
        chosen = np.argsort(sign * weight[at], kind="stable")[:10]
        rows = page.rows("Predictions without one component")
        assert [row[0] for row in rows] == [attributions.components[j].name for j in chosen]
        for j, row in zip(chosen, rows, strict=True):
            after = before - weight[:, j]
            falls = ((before > 0) & (after <= 0) & others).sum()
            rises = ((before <= 0) & (after > 0) & others).sum()
            assert float(row[1]) == pytest.approx(after[at], abs=6e-3)
            assert row[2:4] == [str(falls), str(rises)]
            means = -pd.Series(weight[:, j]).groupby(frame["label"]).mean()
            assert float(row[4]) == pytest.approx(-weight[:, j].mean(), abs=6e-3)
            assert row[5] == (f"{means.idxmin()} ({means.min():+.2f})" if means.min() < 0 else "none")
    page.page.get_by_role("button", name="What if").first.click()
    page.page.wait_for_selector("main[data-view=whatif]")
    check_prediction(page, attributions, frame, [chosen[0]])


def test_the_first_view_leads_to_the_errors(visit, frame):
    page = visit()
    wrong = np.flatnonzero(frame["label"] != frame["predicted"])
    page.page.get_by_role("button", name=f"Show the {len(wrong)} that the model gets wrong").click()
    assert page.shown() == wrong.tolist()


def test_an_example_shows_what_its_output_depends_on(visit):
    page = visit("example/3")
    assert page.page.locator("canvas.overlay").count() == 1
    assert "gradient times input" in page.text()


def test_steps_between_examples_and_to_components(visit, attributions):
    page = visit("example/0")
    assert page.page.get_by_role("button", name="Previous").is_disabled()
    page.page.get_by_role("button", name="Next").click()
    page.heading("Example 1")
    page.drawn()
    page.page.locator("summary").click()
    first = attributions[1].top(1).index[0]
    page.page.get_by_role("link", name=attributions.components[first].name, exact=True).first.click()
    page.page.wait_for_selector("main[data-view=component]")
    page.drawn()
    later = attributions.components[23].name
    page.page.get_by_label("Component", exact=True).fill(later)
    page.page.keyboard.press("Tab")
    page.heading(later)
    page.drawn()
    page.open("example/999")
    assert f"Example {len(attributions) - 1}" in page.text()


def test_one_component_shows_its_effects(visit, attributions, frame):
    weight = attributions.weights()
    j = int(np.abs(weight).mean(0).argmax())
    page = visit(f"component/{j}")
    own = weight[:, j]
    assert f"lowers the output of {(own > 0).mean():.1%}".replace("%", " %") in page.text()
    facts = page.facts()
    half = 1.96 * own.std(ddof=1) / np.sqrt(len(own))
    assert facts["mean weight"] == f"{own.mean():+.4f} ± {half:.4f}"
    assert facts["rank by mean magnitude"] == f"1 of {weight.shape[1]}"
    for side, sign in (("supports", 1), ("opposes", -1)):
        first = [i for i in np.argsort(-sign * own, kind="stable")[:12].tolist() if sign * own[i] > 0]
        assert page.shown(f"Examples that it {side} most") == first
    name = attributions.components[j].name
    (groups,) = page.traces(f"Mean weight of {name} by label")
    means = pd.Series(own).groupby(frame["label"]).mean()
    np.testing.assert_allclose(groups["x"], means, atol=1e-3)
    (drawn,) = page.traces(f"Weights of {name} over examples")
    np.testing.assert_allclose(np.sort(drawn["x"]), np.sort(own), atol=1e-3)
    unit = weight / np.linalg.norm(weight, axis=0)
    similar = np.argsort(-(unit.T @ unit[:, j]), kind="stable")[1:11]
    assert [row[0] for row in page.rows("Most similar components")] == [
        attributions.components[k].name for k in similar
    ]
    assert len(page.shown("Most exciting examples")) == 8
    assert page.page.locator(".box").count() == page.page.locator("canvas.overlay").count() == 8
    page.open("component/0")
    assert page.page.get_by_role("img", name="Kernel of conv1[0]").is_visible()


def changes(attributions, chosen):
    """Predicted changes of outputs when some components are ablated."""
    masks = np.ones((2, len(attributions.components)), dtype=bool)
    masks[1, chosen] = False
    everything, without = attributions.predict(masks)
    return without - everything


def check_prediction(page, attributions, frame, chosen):
    page.drawn()
    change = changes(attributions, chosen)
    after = frame["output"] + change
    big = page.page.locator(".big strong").all_inner_texts()
    expected = [f"{change.mean():+.3f}", f"{(frame['output'] > 0).mean():.1%}", f"{(after > 0).mean():.1%}"]
    assert [one.replace(MINUS, "-") for one in big] == [one.replace("%", " %") for one in expected]
    rows = page.rows("Predicted change by group")
    for (label, members), row in zip(frame.groupby("label"), rows, strict=True):
        assert row[:2] == [str(label), str(len(members))]
        assert float(row[2]) == pytest.approx(change[members.index].mean(), abs=1.1e-3)
        assert row[5] == f"{(after[members.index] > 0).mean():.1%}".replace("%", " %")
    points = page.traces("Outputs before and predicted outputs after")
    assert sorted(np.concatenate([one["y"] for one in points])) == pytest.approx(sorted(after), abs=1e-2)
    falls = page.shown("Examples that fall most")
    np.testing.assert_allclose(change[falls], np.sort(change)[:12], atol=1e-3)
    rises = page.shown("Examples that rise most")
    np.testing.assert_allclose(change[rises], -np.sort(-change)[:12], atol=1e-3)


def test_what_if_predicts_as_python_does(visit, place, attributions, frame):
    page = visit("whatif")
    names = list(attributions.components.names)
    page.page.get_by_label("By name").fill("conv1[3]")
    page.page.keyboard.press("Tab")
    check_prediction(page, attributions, frame, [3])
    page.page.get_by_label("Strongest", exact=True).fill("5")
    page.page.get_by_label("the output of").select_option("label 3")
    page.page.get_by_role("button", name="Add strongest").click()
    weight = attributions.weights()
    best = np.argsort(-weight[frame["label"] == 3].astype(np.float64).sum(0))[:5]
    check_prediction(page, attributions, frame, sorted({3, *best}))
    page.page.get_by_role("button", name="Keep conv1[3]").click()
    check_prediction(page, attributions, frame, sorted({*best} - {3}))
    page.page.get_by_role("button", name="Clear").click()
    assert "Choose components above" in page.text()
    page.page.get_by_label("for or against").select_option("against")
    page.page.get_by_label("the output of").select_option("wrong examples")
    page.page.get_by_role("button", name="Add strongest").click()
    wrong = frame["label"] != frame["predicted"]
    check_prediction(page, attributions, frame, np.argsort(weight[wrong].astype(np.float64).sum(0))[:5])
    page.page.get_by_role("button", name="Clear").click()
    page.page.get_by_label("A layer").select_option("conv1")
    check_prediction(page, attributions, frame, list(range(16)))
    assert "More than twice as many components" in page.text()
    page.page.get_by_label("An edit").select_option("forget-3")
    edit = coar.Edit.load(place / "out/forget-3/edit.json")
    check_prediction(page, attributions, frame, [names.index(component.name) for component in edit.components])


@ERRORS_FIXED
def test_what_if_warns_of_an_edit_in_part(visit):
    page = visit("whatif")
    page.page.get_by_label("An edit").select_option("fix 0")
    page.drawn()
    assert "Careful: this edit ablates in part" in page.text()


def test_what_if_says_how_far_to_trust_it(visit, place):
    page = visit("whatif")
    row = (
        coar.evaluate(coar.Run.open(place / "tiny.zarr"), fits=["ridge"]).table.query("ablated_fraction == 0.1").iloc[0]
    )
    said = page.text("#trust")
    assert f"r = {row['pearson']:.3f} (95 % interval {row['low']:.3f} to {row['high']:.3f})" in said
    assert f"the slope is {row['slope']:.2f}" in said
    assert "12 held-out masks that ablate 10.0 %" in said


def test_edits_show_tables_harm_and_commands(visit, place):
    page = visit("edits")
    page.page.get_by_label("Task").select_option("forget-3")
    page.heading("Judged: forget-3")
    page.drawn()
    table = pd.read_csv(place / "out/forget-3/table.csv")
    for row, cells in zip(table.itertuples(), page.rows("Table of forget-3"), strict=True):
        assert cells[0] == row.group
        assert float(cells[4]) == pytest.approx(row.accuracy_after, abs=5e-4)
        assert float(cells[7]) == pytest.approx(row.margin_after, abs=5e-4)
    traces = {one["name"]: one for one in page.traces("Accuracy against ablated components in forget-3")}
    curve = pd.read_csv(place / "out/forget-3/curve.csv")
    for group, rows in curve.groupby("group"):
        np.testing.assert_allclose(traces[group]["y"], 100 * rows["accuracy"])
    points = page.traces("Margins before and after the edit")
    margins = np.concatenate([one["y"] for one in points])
    groups = table.set_index("group")
    sizes = groups.loc[["targets", "references"], "examples"]
    means = groups.loc[["targets", "references"], "margin_after"]
    assert len(margins) == sizes.sum()
    assert margins.mean() == pytest.approx((sizes * means).sum() / sizes.sum(), abs=1e-3)
    wrong = round((1 - groups.loc["targets", "accuracy_after"]) * groups.loc["targets", "examples"])
    assert f"{wrong} of {groups.loc['targets', 'examples']} targets are wrong after the edit." in page.text()
    lost = [int(found) for found in re.findall(r"right before and wrong after: (\d+)", page.text())]
    gained = [int(found) for found in re.findall(r"wrong before and right after: (\d+)", page.text())]
    before, after = (
        round(groups.loc["references", f"accuracy_{when}"] * sizes["references"]) for when in ("before", "after")
    )
    assert after - before == gained[0] - lost[0]
    commands = page.page.locator(".command code").all_inner_texts()
    assert str(place / "out/forget-3/edit.json") in commands[0]
    assert commands[1].startswith("coar undo ")
    words = commands[1].split()[1:]
    words[words.index("--out") + 1] = str(place / "original.safetensors")
    works(*words)
    page.page.get_by_role("button", name="Copy").first.click()
    sync_api.expect(page.page.locator(".command button").first).to_have_text(re.compile("Copied|Selected"))


@ERRORS_FIXED
def test_edits_of_errors_are_shown_one_by_one(visit, place):
    page = visit("edits")
    page.page.get_by_label("Task").select_option("fix")
    page.heading("Judged: fix")
    table = pd.read_csv(place / "out/fix/table.csv").query("corrected")
    for n, row in enumerate(table.itertuples()):
        if len(table) > 1:
            page.page.get_by_label("Edit", exact=True).select_option(index=n)
        sync_api.expect(page.page.locator("main")).to_contain_text(f"id {row.id}: margin")
        page.drawn()
        assert f"id {row.id}: margin {row.margin_before:.2f} before, {row.margin_after:.2f} after" in page.text()
        assert len(page.rows("Components of the edit")) == row.components


def test_evaluation_shows_all_scores(visit, place):
    page = visit("evaluation")
    table = coar.evaluate(coar.Run.open(place / "tiny.zarr")).table
    rows = page.rows("Scores of all fits")
    assert len(rows) == len(table) == 6
    for row, cells in zip(table.itertuples(), rows, strict=True):
        assert cells[0] == row.fit
        shown = [float(cell) for cell in cells[3:4] + cells[5:]]
        expected = [row.ablated_fraction, *row[6:]]
        np.testing.assert_allclose(shown, expected, atol=5e-4)
    for trace in page.traces("Mean held-out correlation"):
        own = table[table["fit"] == trace["name"]].sort_values("ablated_fraction")
        np.testing.assert_allclose(trace["y"], own["pearson"], rtol=1e-6)
    assert "60 masks" in visit("about").text()


def test_markup_in_names_and_metadata_is_text(visit, hostile):
    page = visit(file=hostile)
    assert "<script>window.harmed = 1<b>.zarr" in page.text("h1")
    assert HOSTILE in page.text()
    for view in VIEWS:
        page.open(view)
        if view == "whatif":
            page.page.get_by_role("button", name="Add strongest").click()
            page.drawn()
        assert page.page.locator("main img, main b, main script, main u, main i").count() == 0
    page.open("component/2")
    labels = page.page.locator("[data-chart='Mean weight of layer0[2] by word'] .ytick text").all_text_contents()
    assert HOSTILE in labels
    assert page.page.evaluate("window.harmed") is None
    assert HOSTILE in visit("edits", file=hostile).rows("Table of <u>edit")[0]


def test_without_a_pipeline_examples_are_rows_of_a_table(visit, hostile):
    page = visit(file=hostile)
    assert page.shown() == list(range(20))
    assert len(page.rows("Examples")) == 20
    page.open("about")
    assert "was made without the pipeline" in page.text()


def test_an_edit_of_another_model_shows_the_reason(browser, place, tmp_path):
    made = coar.Edit.load(place / "out/forget-3/edit.json")
    dataclasses.replace(made, weights="0" * 64, originals=None).save(tmp_path / "old/edit.json")
    run = coar.Run.open(place / "tiny.zarr")
    written(run, tmp_path, source=load_pipeline(place / "tiny.py").source(run))
    page = Visit(browser, tmp_path / "index.html", view="edits")
    assert "There are no margins of single examples: this edit was made for weights 000000000000" in page.text()
    page.close()


def test_a_model_of_very_many_layers_has_no_sums_over_them(browser, tmp_path):
    run = make(tmp_path / "r.zarr", linear(weights(components=1204)), components=1204, masks=4)
    coar.add_fit(run, "mine", weights(components=1204), np.zeros(20))
    written(run, tmp_path, fit="mine")
    page = Visit(browser, tmp_path / "index.html", view="example/2")
    assert "Strongest components" in page.text()
    assert "Layer by layer" not in page.text()
    page.open("component/7")
    assert "Distribution of its effect" in page.text()
    page.close()


def test_the_page_of_a_run_without_a_fit_opens(browser, tmp_path):
    run = make(tmp_path / "r.zarr", linear(weights()), masks=20)
    written(run, tmp_path)
    page = Visit(browser, tmp_path / "index.html")
    for view, words in (("example/1", "no fit"), ("component/1", "no fit"), ("whatif", "no fit"),
                        ("evaluation", "no evaluation"), ("edits", "coar edit"), ("about", "has no fit")):  # fmt: skip
        page.open(view)
        assert words in page.text()
    page.close()
