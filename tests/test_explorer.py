"""The page of a run: its data is the run's, it stands alone, and hostile words stay words."""

import base64
import dataclasses
import hashlib
import io
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import coar
from coar.errors import PipelineError, StorageError
from coar.explorer.activations import compute, first_kernels
from coar.explorer.attention import attention_patterns
from coar.explorer.inputs import input_maps
from coar.explorer.looks import looks_of
from coar.explorer.page import write_page
from coar.explorer.part import part_of
from coar.explorer.source import Source
from coar.pipeline import load_pipeline
from tests import edge_oracle, tiny
from tests.pages import Reader, content, numbers, scripts, shares
from tests.synthetic import fit, linear, make, weights
from tests.test_cli import TINY, coar_command, works

HOSTILE = "</script><img src=x onerror=alert(1)>&<!--"
DEVICE = ("--device", "cpu")


def written(run, folder, **options):
    file = write_page(run, folder, **options)
    assert file == folder / "index.html"
    return file.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    """A run with a hostile name and hostile metadata, two fits and test masks; read only."""
    path = tmp_path_factory.mktemp("run") / "<script>alert(1)<b>.zarr"
    metadata = {"word": np.array([HOSTILE] * 10 + ["größe"] * 10), "score": np.linspace(0, 1, 20)}
    made = make(path, linear(weights(), noise=2.0), test_masks=30, masks=60, metadata=metadata)
    fit(made)
    fit(made, method="ols")
    return made


@pytest.fixture(scope="module")
def page(synthetic, tmp_path_factory):
    return written(synthetic, tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def place(digits, tmp_path_factory):
    """A small pipeline, its run, an edit of a class and edits of errors, and their page; read only."""
    folder = tmp_path_factory.mktemp("explorer")
    (folder / "tiny.py").write_text(TINY.replace('include="layer2.*"', 'include=["conv1", "layer2.conv1"]'))
    words = ("--run", folder / "tiny.zarr", "--out", folder / "out", *DEVICE)
    works("all", folder / "tiny.py", *words, "--masks", 60, "--task", "forget", "--label", 3)
    return folder


@pytest.fixture(scope="module")
def shown(place):
    return content((place / "out/index.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def study(place):
    return load_pipeline(place / "tiny.py").study()


def test_page_has_the_numbers_of_the_run(page, synthetic):
    shown, attributions = content(page), coar.load(synthetic.path)
    assert (shown["fit"]["name"], shown["fit"]["masks"]) == ("ridge", 60)
    size = np.abs(attributions.weights()).max(1, keepdims=True)
    assert (np.abs(numbers(shown["fit"]["weights"]) - attributions.weights()) <= 1.6e-5 * size).all()
    errors = attributions.standard_errors()
    assert (np.abs(numbers(shown["fit"]["errors"]) - errors) <= 1.6e-5 * errors.max(1, keepdims=True)).all()
    np.testing.assert_allclose(
        numbers(shown["fit"]["full"]), attributions.predict(np.ones((1, 12), bool))[0], rtol=1e-5
    )
    np.testing.assert_array_equal(numbers(shown["examples"]["output"]), synthetic.array("base_output")[:])
    assert shown["examples"]["metadata"]["score"] == synthetic.metadata["score"].tolist()
    assert shown["components"]["names"] == list(attributions.components.names)


def test_sums_over_layers_are_those_of_the_weights(page, synthetic):
    shown, weight = content(page), coar.load(synthetic.path).weights().reshape(20, 3, 4)
    np.testing.assert_allclose(numbers(shown["fit"]["above"]), weight.clip(min=0).sum(2), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(numbers(shown["fit"]["below"]), weight.clip(max=0).sum(2), rtol=1e-3, atol=1e-3)


def test_page_has_the_scores_of_the_evaluation(page, synthetic):
    shown, expected = content(page)["evaluation"], coar.evaluate(synthetic)
    rows = pd.DataFrame(shown["table"]["rows"], columns=shown["table"]["columns"])
    pd.testing.assert_frame_equal(rows, expected.table, check_dtype=False)
    for name, scores in shown["fits"].items():
        rows = expected.per_example[expected.per_example["fit"] == name]
        np.testing.assert_allclose(numbers(scores["pearson"]), rows["pearson"], rtol=1e-6)


def test_another_fit_may_be_shown(synthetic, tmp_path):
    shown = content(written(synthetic, tmp_path, fit="ols"))
    assert shown["fit"]["name"] == shown["fit"]["method"] == "ols"
    np.testing.assert_allclose(numbers(shown["fit"]["weights"]), coar.load(synthetic.path, "ols").weights(), atol=1e-3)


def test_page_stands_alone(page):
    found = Reader(page)
    assert [link for link in found.links if not link.startswith(("#", "data:"))] == []
    assert found.tags.count("script") == 3
    directives = dict(part.split(" ", 1) for part in found.policy.split("; "))
    assert directives["default-src"] == "'none'"
    assert "connect-src" not in directives
    parts = scripts(page)
    allowed = set(re.findall(r"'sha256-([^']+)'", directives["script-src"]))
    expected = {
        base64.b64encode(hashlib.sha256(parts[kind].encode()).digest()).decode() for kind in ("module", "text/plain")
    }
    assert allowed == expected
    charts = parts["text/plain"]
    assert "plotly.js (cartesian - minified) v4.1.1" in charts
    assert "Licensed under the MIT license" in charts
    assert len(page) < 3e6


def test_hostile_words_stay_words(page, synthetic):
    found, shown = Reader(page), content(page)
    assert found.title == shown["title"] == synthetic.path.name
    assert shown["examples"]["metadata"]["word"][:10] == [HOSTILE] * 10
    assert not {"img", "b", "iframe", "object"} & set(found.tags)
    assert HOSTILE not in page
    assert not set("<>&") & set(scripts(page)["application/json"])


def test_a_run_without_a_fit_has_a_page_that_says_so(tmp_path):
    run = make(tmp_path / "r.zarr", linear(weights()), masks=20)
    shown = content(written(run, tmp_path))
    assert "fit" not in shown
    assert "evaluation" not in shown
    assert any("'coar fit RUN' makes one" in note for note in shown["notes"])
    assert len(shown["examples"]["rows"]) == 20


def test_a_run_without_test_masks_or_units_says_so(tmp_path):
    run = make(tmp_path / "r.zarr", linear(weights()), masks=20)
    fit(run)
    notes = content(written(run, tmp_path))["notes"]
    assert any("collect with --test-masks" in note for note in notes)
    assert any("--pipeline FILE" in note for note in notes)
    (run.path / "outputs/c/1/2").unlink()
    notes = content(written(run, tmp_path))["notes"]
    assert any("1 of 6 units" in note for note in notes)


def test_unwritable_place_is_a_storage_error(synthetic, tmp_path):
    (tmp_path / "file").write_text("kept")
    for folder in ("file", "file/folder"):
        with pytest.raises(StorageError, match="file"):
            write_page(synthetic, tmp_path / folder)
    assert (tmp_path / "file").read_text() == "kept"


def test_a_pipeline_that_does_not_match_is_refused(place, synthetic, tmp_path):
    result = coar_command("report", synthetic.path, "--pipeline", place / "tiny.py", "--out", tmp_path)
    assert result.exit_code == 1
    assert "this study is not the one" in result.stderr
    assert "without --pipeline writes a page of what the run itself holds" in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())


def test_a_run_whose_examples_are_not_at_hand_has_a_page_without_them(place, tmp_path):
    (tmp_path / "far.py").write_text(
        "import coar\n\ndef study():\n    raise coar.errors.PipelineError('there is no data at /nowhere')\n"
    )
    result = coar_command("report", place / "tiny.zarr", "--pipeline", tmp_path / "far.py", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "there is no data at /nowhere" in result.stderr
    assert "without --pipeline writes a page" in " ".join(result.stderr.split())
    works("report", place / "tiny.zarr", "--out", tmp_path / "out")
    shown = content((tmp_path / "out/index.html").read_text(encoding="utf-8"))
    assert len(shown["examples"]["rows"]) == len(coar.load(place / "tiny.zarr"))
    assert any("no pictures or texts" in note for note in shown["notes"])


@pytest.mark.parametrize("examples", [20, 3000])
def test_what_does_not_fit_is_left_out_and_named(tmp_path, examples):
    truth = weights(examples=examples, components=40)
    run = make(tmp_path / "r.zarr", linear(truth), components=40, masks=60, blocks=(16, 1000))
    attributions = fit(run)
    part = part_of(attributions, numbers=200)
    assert part.examples.tolist() == np.linspace(0, examples - 1, min(examples, 400)).round().tolist()
    size = np.abs(attributions.weights(part.examples))
    ranks = (size[:, None, :] > size[:, :, None]).sum(2)  # how many are larger
    count = max(1, 200 // len(part.examples))
    strongest = sorted(range(40), key=lambda j: (ranks[:, j].min(), -size[:, j].max()))[:count]
    assert part.components.tolist() == sorted(strongest)
    words = " ".join(part.sentences())
    assert f"{count} of the run's 40 components" in words
    assert ("of the run's 3,000 examples" in words) == (examples == 3000)
    assert part_of(attributions, numbers=40 * examples).sentences() == []


def test_sums_over_very_many_layers_are_left_out_and_named(tmp_path):
    run = make(tmp_path / "r.zarr", linear(weights(components=1204)), components=1204, masks=4)
    coar.add_fit(run, "mine", weights(components=1204), np.zeros(20))
    shown = content(written(run, tmp_path, fit="mine"))
    assert "above" not in shown["fit"]
    assert any("301 layers" in note for note in shown["notes"])


def sheet(packed):
    """The pictures of a sheet, in order."""
    head, _, data = packed["url"].partition(",")
    assert head == "data:image/webp;base64"
    whole = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
    rows, columns, height, width = (packed[name] for name in ("rows", "columns", "height", "width"))
    return whole.reshape(rows, height, columns, width, 3).swapaxes(1, 2).reshape(-1, height, width, 3)


def test_pictures_are_those_of_the_examples(shown, study):
    pictures = sheet(shown["examples"]["sheet"])[: len(study.examples)]
    inputs = study.examples.inputs[:, 0]
    scaled = (255 * (inputs - inputs.min()) / (inputs.max() - inputs.min())).round()
    for channel in range(3):
        np.testing.assert_array_equal(pictures[..., channel], scaled)


def test_predictions_are_those_of_the_model(shown, study):
    logits = study.model(study.examples.inputs)
    assert shown["examples"]["predicted"] == logits.argmax(1).tolist()
    np.testing.assert_allclose(numbers(shown["examples"]["probability"]), logits.softmax(1).amax(1).detach(), rtol=1e-4)
    assert shown["examples"]["correct"] == (logits.argmax(1) == study.examples.targets).tolist()
    assert not all(shown["examples"]["correct"])


def test_exciting_examples_are_those_of_plain_hooks(shown, study):
    """Of a layer with a batch norm, the batch norm's output."""
    recorded = {}
    modules = {"conv1": study.model.bn1, "layer2.conv1": study.model.layer2.bn1}
    for site, module in modules.items():
        module.register_forward_hook(lambda _, __, out, site=site: recorded.update({site: out}))
    with torch.no_grad():
        study.model(study.examples.inputs)
    exciting = shown["components"]["exciting"]
    values, places = numbers(exciting["values"]), numbers(exciting["places"])
    for j, component in enumerate(study.components):
        maps = recorded[component.site][:, component.position]
        largest, order = maps.flatten(1).amax(1).sort(descending=True, stable=True)
        np.testing.assert_allclose(values[j], largest[:8], rtol=1e-4, atol=1e-5)
        first = exciting["rows"][j][0]
        assert first == int(order[0]) or largest[0] - largest[1] < 1e-4
        height, width = maps.shape[1:]
        left, top, wide, high = places[j, 0]
        assert (wide, high) == pytest.approx((1 / width, 1 / height))
        at = maps[first, round(float(top) * height), round(float(left) * width)]
        assert float(at) == pytest.approx(float(maps[first].max()), abs=1e-4)


def test_maps_are_the_activations_of_plain_hooks(shown, study):
    """Each of 8 x 8 parts has its largest activation, as a share of the component's largest."""
    recorded = {}
    study.model.layer2.bn1.register_forward_hook(lambda _, __, out: recorded.update(out=out))
    with torch.no_grad():
        study.model(study.examples.inputs)
    exciting = shown["components"]["exciting"]
    maps = shares(exciting["maps"]).reshape(-1, 8, 4, 2, 4, 2)  # a cell of the 4 x 4 feature map is 2 x 2 parts
    for j, component in enumerate(study.components):
        if component.site == "layer2.conv1":
            rows = exciting["rows"][j]
            own = recorded["out"][rows, component.position].clamp(min=0)
            expected = np.kron((own / own.max()).numpy(), np.ones((1, 2, 2)))
            np.testing.assert_allclose(maps[j].reshape(8, 8, 8), expected, atol=0.0021)


def test_maps_of_large_pictures_have_the_largest_activation_of_each_part():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1, bias=False), torch.nn.Flatten(), torch.nn.Linear(512, 3))
    net[0].weight.data = torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1)
    inputs = coar.Examples(inputs=torch.randn(2, 1, 16, 16), targets=torch.tensor([0, 1]))
    study = coar.Study(model=net, examples=inputs, components=coar.conv_filters(net))
    found = compute(study, np.arange(2), {}, device="cpu").exciting
    activations = net[0](inputs.inputs).detach().clamp(min=0).numpy().reshape(2, 2, 8, 2, 8, 2).max((3, 5))
    for j in range(2):
        own = activations[found.rows[j, :2], j].reshape(2, 64)
        np.testing.assert_allclose(found.maps[j, :2], own / own.max(), rtol=1e-5)


def test_heads_excite_by_their_norm_and_padding_does_not_count():
    net, lengths = tiny.classifier(), [9, 2, 3, 2, 3, 4, 2, 3]
    examples = tiny.sentences(lengths)
    study = coar.Study(model=net, examples=examples, components=coar.attention_heads(net))
    found = compute(study, np.arange(8), {}, device="cpu").exciting
    recorded = {}
    for site in {component.site for component in study.components}:
        net.get_submodule(site).register_forward_pre_hook(lambda _, args, site=site: recorded.update({site: args[0]}))
    net(**examples.inputs)
    for j, component in enumerate(study.components):
        norms = recorded[component.site][..., component.position : component.position + component.size].norm(dim=2)
        there = norms.masked_fill(examples.inputs["attention_mask"] == 0, 0).amax(1)
        assert (there < norms.amax(1)).any()  # padding would count
        np.testing.assert_allclose(found.values[j], there.sort(descending=True)[0], rtol=1e-4)
        row = int(found.rows[j][0])
        assert found.places[j][0].tolist() == [int(norms[row, : lengths[row]].argmax()), -1, -1, -1]
        expected = norms[row, : lengths[row]] / there.max()
        np.testing.assert_allclose(found.maps[j, 0, : lengths[row]], expected, rtol=1e-4)
        assert not found.maps[j, 0, lengths[row] :].any()


def test_places_in_texts_do_not_count_padding_on_the_left():
    net = edge_oracle.build("llama")
    tokens = {"input_ids": torch.tensor([[0, 0, 5, 6, 7]]), "attention_mask": torch.tensor([[0, 0, 1, 1, 1]])}
    padded, plain = (
        coar.token_examples({name: value[:, start:] for name, value in tokens.items()}, answers=torch.tensor([1]))
        for start in (0, 2)
    )
    parts = coar.mlp_neurons(net)
    left, alone = (
        compute(coar.Study(model=net, examples=one, components=parts, output=coar.TokenMargin()), np.arange(1), {},
                device="cpu").exciting
        for one in (padded, plain)
    )  # fmt: skip
    np.testing.assert_allclose(left.values[:, 0], alone.values[:, 0], rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(left.places[:, 0], alone.places[:, 0])
    np.testing.assert_allclose(left.maps[:, 0], alone.maps[:, 0], rtol=1e-3, atol=1e-5)


def test_kernels_are_the_weights_of_filters_on_the_picture(study, digits):
    kernels = first_kernels(study.model, study.components)
    assert list(kernels) == list(range(16))
    for row, kernel in kernels.items():
        np.testing.assert_array_equal(kernel[:, :, 0], study.model.conv1.weight[row, 0].detach())
    assert first_kernels(study.model, coar.conv_filters(study.model, include="layer2.*")) == {}


def test_edits_have_the_margins_of_the_judged_table(shown, place, study):
    (task,) = shown["edits"]["tasks"]
    assert (task["name"], task["all"]) == ("forget-3", 1)
    (edit,) = task["edits"]
    made = coar.Edit.load(place / "out/forget-3/edit.json")
    assert edit["names"] == [component.name for component in made.components]
    assert [shown["components"]["names"][j] for j in edit["components"]] == edit["names"]
    judged = pd.read_csv(place / "out/forget-3/table.csv").set_index("group")
    label = np.array(shown["edits"]["judge"]["metadata"]["label"])
    assert edit["targets"] == np.flatnonzero(label == 3).tolist()
    for when, values in (("before", shown["edits"]["judge"]["before"]), ("after", edit["after"])):
        margins = numbers(values)
        assert margins[label == 3].mean() == pytest.approx(judged.loc["targets", f"margin_{when}"], abs=1e-4)
        assert margins[label != 3].mean() == pytest.approx(judged.loc["references", f"margin_{when}"], abs=1e-4)
        assert (margins[label != 3] > 0).mean() == pytest.approx(judged.loc["references", f"accuracy_{when}"])
    assert task["table"]["rows"][0][0] == "targets"
    assert len(task["curve"]["rows"]) == len(pd.read_csv(place / "out/forget-3/curve.csv"))


def test_edits_of_positions_show_their_own_targets(place, study, digits, tmp_path):
    goal = coar.EditGoal(targets=[4, 7], references=[0, 1, 2], direction="increase")
    edit = coar.edit(coar.load(place / "tiny.zarr"), goal, budget=2)
    edit.save(tmp_path / "mine/edit.json")
    source = Source(study, digits.judge)
    shown = content(written(coar.Run.open(place / "tiny.zarr"), tmp_path, source=source))
    (made,) = shown["edits"]["tasks"][0]["edits"]
    assert made["own"]["rows"] == [4, 7]
    assert (made["targets"], made["weights"], made["undo"], made["own_constants"]) == ([], None, False, False)
    for when, net in (("before", study.model), ("after", edit.apply(study.model))):
        logits = net(study.examples.inputs[[4, 7]]).detach()
        right = study.examples.targets[[4, 7], None]
        margin = logits.gather(1, right)[:, 0] - logits.scatter(1, right, -torch.inf).amax(1)
        np.testing.assert_allclose(numbers(made["own"][when]), margin, rtol=1e-3, atol=1e-4)
    other = dataclasses.replace(edit, replacements=tuple(0.123 for _ in edit.replacements))
    other.save(tmp_path / "mine/edit.json")
    shown = content(written(coar.Run.open(place / "tiny.zarr"), tmp_path))
    assert shown["edits"]["tasks"][0]["edits"][0]["own_constants"]
    assert shown["edits"]["judge"] is None


def test_an_edit_of_another_model_is_shown_with_the_reason(place, study, digits, tmp_path):
    goal = coar.EditGoal(targets="label == 3", references="label != 3", direction="decrease")
    edit = coar.edit(coar.load(place / "tiny.zarr"), goal, budget=2)
    edit.save(tmp_path / "mine/edit.json")
    dataclasses.replace(edit, weights="0" * 64).save(tmp_path / "old/edit.json")
    source = Source(study, digits.judge)
    shown = content(written(coar.Run.open(place / "tiny.zarr"), tmp_path, source=source))
    mine, old = (task["edits"][0] for task in shown["edits"]["tasks"])
    assert "after" in mine
    assert "after" not in old
    assert "this edit was made for weights 000000000000" in old["refused"]
    assert len(old["names"]) == 2


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_attention_patterns_are_those_that_the_model_returns(family):
    """For each head of the table, over the tokens that are no padding; an encoder's attention module is elsewhere."""
    lengths = [6, 3, 5]
    if family == "bert":
        net, examples, output = tiny.classifier(), tiny.sentences(lengths), None
    else:
        net, output = edge_oracle.build(family), coar.TokenMargin()
        examples = coar.token_examples(tiny.sentences(lengths).inputs, answers=torch.tensor([1, 2, 3]))
    parts = coar.attention_heads(net)
    some = coar.Components([part for i, part in enumerate(parts) if i != 1])
    options = {} if output is None else {"output": output}
    study = coar.Study(model=net, examples=examples, components=some, **options)
    found = attention_patterns(study, np.array([0, 1, 2]), device="cpu")
    net.set_attn_implementation("eager")
    for text, row in enumerate(found.examples):
        inputs = {name: value[row : row + 1, : lengths[row]] for name, value in examples.inputs.items()}
        expected = torch.cat(net(**inputs, output_attentions=True).attentions, 1)[0]
        kept = [i for i in range(len(parts)) if i != 1]
        size = lengths[row]
        np.testing.assert_allclose(found.values[text][:, :size, :size], expected[kept], atol=1e-5)
        assert found.lengths[text] == size
        assert not found.values[text][:, size:].any()
    packed = found.packed(np.array([0, 2]))
    assert packed["heads"] == [0, 1]
    np.testing.assert_allclose(shares(packed["values"]), found.values[:, [0, 2]], atol=0.0021)


def test_models_without_patterns_or_texts_have_none(study):
    assert attention_patterns(study, np.arange(3), device="cpu") is None


def test_input_maps_of_pictures_are_gradient_times_input():
    """Of a linear model: weight times input, in a picture of 16 x 16 pixels averaged over parts of 2 x 2."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 16), torch.nn.Flatten())
    pictures, targets = torch.randn(5, 3, 16, 16), torch.tensor([0, 1, 2, 3, 0])
    study = coar.Study(
        model=net,
        examples=coar.Examples(inputs=pictures, targets=targets),
        components=coar.conv_filters(net),
        output=coar.ClassLogit(),
    )
    found = input_maps(study, np.array([1, 4]), [], device="cpu")
    product = (net[0].weight[targets[[1, 4]]] * pictures[[1, 4]]).sum(1).detach().numpy()
    expected = product.reshape(2, 8, 2, 8, 2).mean((2, 4)).reshape(2, 64)
    np.testing.assert_allclose(found, expected / np.abs(expected).max(1, keepdims=True), rtol=1e-4, atol=1e-6)


def test_input_maps_of_texts_are_those_of_their_embeddings():
    """Padding on the left does not count."""
    net = edge_oracle.build("llama")
    ids = torch.tensor([[0, 0, 5, 6, 7]])
    mask = (ids > 0).long()
    padded = coar.token_examples({"input_ids": ids, "attention_mask": mask}, answers=torch.tensor([3]))
    study = coar.Study(
        model=net, examples=padded, components=coar.attention_heads(net), output=coar.TokenLogProbability()
    )
    found = input_maps(study, np.array([0]), [], device="cpu")
    embedded = net.get_input_embeddings()(ids[:, 2:]).detach().requires_grad_()
    net(inputs_embeds=embedded).logits[0, -1].log_softmax(0)[3].backward()
    expected = (embedded.grad * embedded).sum(-1)[0].detach()
    np.testing.assert_allclose(found[0, :3], expected / expected.abs().max(), rtol=1e-3, atol=1e-5)
    assert not found[0, 3:].any()


class Cut(torch.nn.Module):
    """A convolution whose result has no gradient."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 3, 4)

    def forward(self, x):
        return self.conv(x).flatten(1).detach()


def test_models_without_a_gradient_have_no_input_maps_and_a_note():
    net, notes = Cut(), []
    inputs = coar.Examples(inputs=torch.randn(3, 1, 4, 4), targets=torch.tensor([0, 1, 2]))
    study = coar.Study(model=net, examples=inputs, components=coar.conv_filters(net))
    assert input_maps(study, np.arange(3), notes, device="cpu") is None
    assert notes[0].startswith("No maps of inputs: the output has no gradient by them")


def examples(inputs, n=3):
    return coar.Examples(inputs=inputs, targets=torch.zeros(n, dtype=torch.long))


def test_default_looks():
    rows = np.array([2, 0])
    assert looks_of(examples(torch.arange(12).reshape(3, 4)), rows).words == [["8", "9", "10", "11"], list("0123")]
    tokens = {"input_ids": torch.arange(6).reshape(3, 2), "attention_mask": torch.tensor([[1, 1], [1, 1], [0, 1]])}
    assert looks_of(examples(tokens), rows).words == [["5"], ["0", "1"]]
    words = SimpleNamespace(decode=lambda ids: f"<{ids[0]}>")
    assert looks_of(examples(tokens), rows, tokenizer=words).words == [["<5>"], ["<0>", "<1>"]]
    assert looks_of(examples(torch.full((3, 2), 0.25)), rows).words == [["0.25", "0.25"]] * 2
    assert looks_of(examples(torch.zeros(3, 5, 7)), rows).packed() == {}
    assert looks_of(examples({"x": torch.zeros(3, 3, 8, 8)}), rows).packed() == {}
    assert looks_of(examples({"pixel_values": torch.rand(3, 3, 90, 60)}), rows).pictures.shape == (2, 64, 43, 3)


SHOWN = {
    "shares": (lambda one: one[0], np.uint8([0, 128, 255])),
    "bytes": (lambda one: (255 * one[0]).round().byte().numpy(), np.uint8([0, 128, 255])),
    "image": (lambda one: Image.fromarray((255 * one[0]).round().byte().numpy()), np.uint8([0, 128, 255])),
    "colours": (lambda one: one[0].unsqueeze(2).expand(-1, -1, 3), np.uint8([0, 128, 255])),
}


@pytest.mark.parametrize("kind", SHOWN)
def test_show_may_return_pictures(kind):
    show, expected = SHOWN[kind]
    inputs = torch.tensor([0, 0.5, 1]).reshape(3, 1, 1, 1).expand(3, 1, 4, 6)
    found = looks_of(examples(inputs), np.arange(3), show).pictures
    assert found.shape == (3, 4, 6, 3)
    np.testing.assert_array_equal(found[:, 0, 0, 0], expected)
    np.testing.assert_array_equal(found.std((1, 2, 3)), 0)


def test_show_may_return_words():
    inputs = torch.arange(3)[:, None]
    assert looks_of(examples(inputs), np.arange(2), lambda one: f"a text {int(one)}").words == [
        ["a", "text", "0"],
        ["a", "text", "1"],
    ]
    assert looks_of(examples(inputs), np.arange(1), lambda one: ["a b", "c"]).words == [["a b", "c"]]


WRONG = {
    "values": (lambda one: one + 5, "values from 5 to 5; return uint8"),
    "shape": (lambda one: one[None, None], "shape (1, 1, 4, 4)"),
    "nothing": (lambda one: None, "NoneType"),
    "both": (lambda one: "words" if one.sum() else one, "a picture for some examples and words for others"),
    "not a number": (lambda one: one * torch.nan, "values from nan"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_other_looks_are_refused(kind):
    show, message = WRONG[kind]
    inputs = torch.arange(3.0)[:, None, None].expand(3, 4, 4)
    with pytest.raises(PipelineError, match=re.escape(message)):
        looks_of(examples(inputs), np.arange(3), show)


def test_a_pipelines_show_is_used(place, tmp_path):
    text = (place / "tiny.py").read_text() + "\n\ndef show(example):\n    return ['sum', f'{example.sum():.2f}']\n"
    (tmp_path / "shows.py").write_text(text)
    works("report", place / "tiny.zarr", "--pipeline", tmp_path / "shows.py", "--out", tmp_path)
    shown = content((tmp_path / "index.html").read_text(encoding="utf-8"))
    inputs = load_pipeline(tmp_path / "shows.py").study().examples.inputs
    assert shown["examples"]["words"] == [["sum", f"{one.sum():.2f}"] for one in inputs]
