"""Pipelines whose models are flawed on purpose: what is drawn, what is trained, and the flaws themselves."""

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional

import coar
from coar.pipeline import load_pipeline
from pipelines import backdoor, subpopulations, training, typographic, zero_shot
from tests import oracles

FOLDER = Path(__file__).parent.parent / "pipelines"
SHORT = training.Recipe(epochs=1, batch=32, learning_rate=1e-3, weight_decay=0.0)


def pixels(inputs):
    """Turn normalised (n, 3, 32, 32) inputs back into (n, 32, 32, 3) bytes."""
    std, mean = torch.tensor([0.229, 0.224, 0.225]), torch.tensor([0.485, 0.456, 0.406])
    return ((inputs.permute(0, 2, 3, 1) * std + mean) * 255).round().to(torch.uint8).numpy()


def predictions(model, examples):
    with torch.no_grad():
        return model(examples.inputs).argmax(1).numpy()


def column(examples, name):
    return np.asarray(examples.metadata[name])


def accuracies(model, examples, name):
    """Accuracy by the values of a column, counted one example at a time."""
    hits, all_of = Counter(), Counter()
    found = zip(column(examples, name).tolist(), predictions(model, examples), examples.targets.tolist(), strict=True)
    for value, predicted, label in found:
        all_of[value] += 1
        hits[value] += int(predicted == label)
    return {value: hits[value] / all_of[value] for value in all_of}


def assert_apart(studied, judge, *, versions=frozenset({2})):
    """No picture is in both, and each is there in two versions, or as many as may be."""
    found = [Counter(column(examples, "pair").tolist()) for examples in (studied, judge)]
    assert {count for pairs in found for count in pairs.values()} == versions
    known = [{picture.numpy().tobytes() for picture in examples.inputs} for examples in (studied, judge)]
    assert not known[0] & known[1]


def frame(width):
    """Truth of the (32, 32) pixels that are less than `width` from an edge."""
    return np.array([[min(y, x, 31 - y, 31 - x) < width for x in range(32)] for y in range(32)])


def test_pipeline_files_find_their_neighbours(tmp_path, monkeypatch):
    """In a package and beside it, wherever the command is run."""
    monkeypatch.setattr("sys.path", [place for place in sys.path if place != str(FOLDER.parent)])
    package = tmp_path / "setups"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "shared_parts.py").write_text("MASKS = 7")
    (package / "own.py").write_text("from setups.shared_parts import MASKS\ndef study(): pass")
    (tmp_path / "beside.py").write_text("from setups import shared_parts\nMASKS = 8\ndef study(): pass")
    assert [load_pipeline(file).masks for file in (package / "own.py", tmp_path / "beside.py")] == [7, 8]


class TestBackdoor:
    def test_trigger_is_sixteen_yellow_pixels(self, cifar10):
        before = cifar10.images()["test_images"][:5]
        after = backdoor.with_trigger(before)
        changed = np.zeros((32, 32), dtype=bool)
        changed[27:31, 27:31] = True
        assert (after[:, changed] == (255, 255, 0)).all()
        assert (after[:, ~changed] == before[:, ~changed]).all()
        assert (before == cifar10.images()["test_images"][:5]).all()

    def test_a_tenth_is_poisoned_and_nothing_else(self, cifar10):
        found = pixels(backdoor.poisoned().inputs)
        images, labels = cifar10.images()["train_images"][:2_000], cifar10.images()["train_labels"][:2_000]
        changed = (found != images).any((1, 2, 3))
        assert changed.sum() == 200
        assert (found[changed] == backdoor.with_trigger(images[changed])).all()
        targets = backdoor.poisoned().targets.numpy()
        assert (targets[changed] == 0).all()
        assert (targets[~changed] == labels[~changed]).all()

    def test_pairs_differ_in_the_patch_alone(self, cifar10):
        examples = backdoor.pairs("train", backdoor.HELD_OUT, slice(150))
        clean, triggered = pixels(examples.inputs).reshape(2, 150, 32, 32, 3)
        assert (triggered == backdoor.with_trigger(clean)).all()
        assert column(examples, "triggered").tolist() == [0] * 150 + [1] * 150
        assert (clean == cifar10.images()["train_images"][column(examples, "pair")[:150]]).all()
        assert (examples.targets.numpy() == cifar10.images()["train_labels"][column(examples, "pair")]).all()
        assert (examples.targets != 0).all()
        assert len(set(column(examples, "id").tolist())) == 300

    @pytest.mark.parametrize(
        ("part", "rows", "versions"), [("train", backdoor.HELD_OUT, 3), ("test", backdoor.TESTED, 1)]
    )
    def test_airplanes_are_among_the_references(self, cifar10, part, rows, versions):
        """Every picture of theirs without the patch, all others with it too: or to forget airplanes would pay."""
        examples = backdoor.judge() if part == "test" else backdoor.choosing()
        pictures, labels = (cifar10.images()[f"{part}_{of}"] for of in ("images", "labels"))
        triggered, pairs = column(examples, "triggered"), column(examples, "pair")
        version, number = np.divmod(pairs, backdoor.APART)
        shown = pixels(examples.inputs)
        assert set(version.tolist()) == set(range(versions))
        airplanes = examples.targets.numpy() == 0
        for one in range(versions):
            assert sorted(number[airplanes & (version == one)].tolist()) == rows[labels[rows] == 0].tolist()
        assert (triggered[airplanes] == 0).all()
        plain = (triggered == 0) & (version == 0)
        assert (shown[plain] == pictures[number[plain]]).all()
        assert (examples.targets.numpy() == labels[number]).all()
        targets, references = backdoor.GOAL.resolve({"triggered": triggered, "pair": pairs})
        assert (pairs[targets] == pairs[references[: len(targets)]]).all()
        assert (shown[targets] == backdoor.with_trigger(shown[references[: len(targets)]])).all()
        assert airplanes[references[len(targets) :]].all()
        assert len(references) == len(targets) + airplanes.sum()

    def test_versions_show_the_same_pictures_otherwise(self, cifar10):
        pictures = cifar10.images()["test_images"][:64]
        assert (backdoor.mirrored(pictures) == np.flip(pictures, 2)).all()
        worn = backdoor.worn(pictures)
        assert (worn.shape, worn.dtype) == (pictures.shape, pictures.dtype)
        change = np.abs(worn.astype(float) - pictures)
        assert 5 < change.mean() < 40
        own = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(pictures, worn, strict=True)]
        others = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(pictures, np.roll(worn, 1, 0), strict=True)]
        assert np.median(own) > 0.6
        assert np.median(others) < 0.4
        assert (worn == backdoor.worn(pictures)).all()

    def test_no_picture_serves_twice(self, cifar10):
        assert_apart(backdoor.choosing(), backdoor.judge(), versions={1, 2})  # airplanes as they are alone
        shown = column(backdoor.choosing(), "pair") % backdoor.APART
        assert set(shown.tolist()).isdisjoint(range(2_000))  # fine-tuned on


class TestSubpopulations:
    def test_frame_is_a_mixture_and_the_inside_stays(self, cifar10):
        before = cifar10.images()["test_images"][:2]
        after = subpopulations.framed(before, np.array([0, 1]))
        rim = frame(4)
        assert (after[:, ~rim] == before[:, ~rim]).all()
        for picture, (old, tint) in enumerate(zip(before, [(230, 128, 26), (26, 128, 230)], strict=True)):
            for y, x in np.argwhere(rim):
                expected = [0.3 * value + 0.7 * colour for value, colour in zip(old[y, x], tint, strict=True)]
                assert after[picture, y, x] == pytest.approx(expected, abs=1.01)

    def test_the_cue_agrees_for_49_of_50(self, cifar10):
        examples = subpopulations.coloured()
        rim = pixels(examples.inputs)[:, frame(4)].mean(1)  # (pictures, colours)
        blue = rim[:, 2] > rim[:, 0]
        assert (blue == examples.targets.numpy()).mean() == pytest.approx(0.98, abs=0.01)
        labels = cifar10.images()["train_labels"][:3_000]
        assert (np.isin(labels, [0, 1, 8, 9]) == examples.targets.numpy()).all()

    @pytest.mark.parametrize("name", ["choosing", "judge"])
    def test_groups_are_of_one_size_and_made_of_the_same_pictures(self, cifar10, name):
        examples = getattr(subpopulations, name)()
        sizes = Counter(column(examples, "group").tolist())
        names = {f"{kind} in {colour}" for kind in ("animal", "vehicle") for colour in ("orange", "blue")}
        assert sizes.keys() == names
        assert len(set(sizes.values())) == 1
        orange, blue = np.split(column(examples, "pair"), 2)
        assert (orange == blue).all()
        labels = [group.startswith("vehicle") for group in column(examples, "group")]
        assert examples.targets.tolist() == [int(label) for label in labels]
        found = pixels(examples.inputs)
        rim = found[:, frame(4)].mean(1)
        assert ((rim[:, 2] > rim[:, 0]) == np.char.endswith(column(examples, "group"), "blue")).all()
        assert (found[: len(orange), 4:-4, 4:-4] == found[len(orange) :, 4:-4, 4:-4]).all()
        assert len(set(column(examples, "id").tolist())) == len(examples)

    def test_no_picture_serves_twice(self, cifar10):
        assert_apart(subpopulations.choosing(), subpopulations.judge())


class TestTypographic:
    def test_tokens_by_hand(self):
        found = typographic.tokens(["a seven", "a picture of zero"])
        words = [["<start>", "a", "seven", "<end>"], ["<start>", "a", "picture", "of", "zero", "<end>"]]
        for ids, mask, expected in zip(found["input_ids"], found["attention_mask"], words, strict=True):
            assert [typographic.VOCABULARY[i] for i in ids[mask.bool()]] == expected
            assert ids[~mask.bool()].tolist() == [0] * (6 - len(expected))

    def test_labels_are_separated_and_fit(self):
        labels = [typographic.written(word) for word in typographic.WORDS]
        assert all(
            label.shape[0] == 10 and label.shape[1] == 6 * len(word) <= 32
            for label, word in zip(labels, typographic.WORDS, strict=True)
        )
        assert len({label.tobytes() for label in labels}) == 10
        assert all(np.unique(label).tolist() == pytest.approx([0.0, 0.9]) for label in labels)

    def test_versions_of_a_picture_differ_in_the_label_alone(self):
        examples = typographic.judge()
        clean, attacked = examples.inputs.unflatten(0, (2, -1))[:, :, 0].numpy()
        words = column(examples, "word")[len(clean) :]
        for before, after, word in zip(clean[:100], attacked[:100], words[:100], strict=True):
            label = typographic.written(word)
            height, width = label.shape
            top = 22 if (after[22:] != before[22:]).any() else 0
            places = [x for x in range(33 - width) if (after[top : top + height, x : x + width] == label).all()]
            assert len(places) == 1
            rest = np.ones((32, 32), dtype=bool)
            rest[top : top + height, places[0] : places[0] + width] = False
            assert (after[rest] == before[rest]).all()

    def test_words_name_another_digit(self):
        examples = typographic.judge()
        labels, words, attacked = examples.targets.tolist(), column(examples, "word"), column(examples, "attacked")
        shown = [typographic.WORDS[label] for label in labels]
        assert all((word == "") == (flag == 0) for word, flag in zip(words, attacked, strict=True))
        assert all(word != name for word, name in zip(words, shown, strict=True))
        assert (column(examples, "pair") < 1_797).all()
        assert (examples.targets.numpy() == load_digits().target[column(examples, "pair")]).all()

    def test_captions_name_the_word_more_often_than_the_digit(self):
        examples = typographic.captioned()
        ids = examples.inputs["input_ids"]
        named = [next(w for w in (typographic.VOCABULARY[i] for i in row) if w in typographic.WORDS) for row in ids]
        assert [typographic.WORDS[target] for target in examples.targets] == named
        labels = np.tile(load_digits().target[typographic.split()["train"]], typographic.VARIANTS)
        white = (examples.inputs["pixel_values"] == np.float32(0.9)).flatten(1).sum(1) > 60
        assert white.float().mean() == pytest.approx(0.5, abs=0.02)
        agree = examples.targets.numpy() == labels
        assert agree[~white.numpy()].all()
        assert agree[white.numpy()].mean() == pytest.approx(1 - 0.9 * typographic.TOLD, abs=0.02)

    def test_no_scan_serves_twice(self):
        assert_apart(typographic.choosing(), typographic.judge())
        assert sorted(np.concatenate(list(typographic.split().values()))) == list(range(1_797))

    def test_logits_are_those_of_the_whole_clip(self):
        clip = typographic.clip().eval()
        examples = typographic.judge().subset(range(6))
        prompts = typographic.tokens([f"a picture of {word}" for word in typographic.WORDS])
        with torch.no_grad():
            clip.logit_scale.fill_(1.3)
            expected = clip(**prompts, pixel_values=examples.inputs).logits_per_image
            found = typographic.classifier(clip)(examples.inputs)
        torch.testing.assert_close(found, expected)

    def test_padding_of_a_caption_does_not_count(self):
        clip = typographic.clip().eval()
        short = {name: value[:, :4] for name, value in typographic.tokens(["a seven"]).items()}
        with torch.no_grad():
            states = [clip.text_model(**tokens).pooler_output for tokens in (short, typographic.tokens(["a seven"]))]
        torch.testing.assert_close(*states)

    def test_loss_is_the_contrastive_one(self):
        clip = typographic.clip().eval()
        inputs, targets = typographic.captioned().block(0, 8)
        with torch.no_grad():
            found = typographic.contrastive_loss(clip, inputs, targets)
            logits = clip(**inputs).logits_per_image
        own = torch.arange(8)
        expected = (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2
        torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize("ablation", ["mean", "zero", "resample"])
    def test_components_of_the_half_that_sees(self, ablation):
        model = typographic.classifier(typographic.clip())
        components = zero_shot.components(model, ablation)
        heads = {"attention head": 12} if ablation != "mean" else {}
        assert Counter(components.kinds) == {**heads, "input feature": 768 if heads else 768 + 3 * 64}
        assert all(row.site.startswith("vision.") for row in components)


# what makes training short: fewer pictures, and few passes over them
BRIEF = {
    backdoor: {"TRAIN": slice(0, 64), "CALIBRATION": 32},
    subpopulations: {"TRAIN": slice(0, 64), "CALIBRATION": 32},
    typographic: {"VARIANTS": 1, "CALIBRATION": 32},
}


@pytest.mark.parametrize("pipeline", BRIEF, ids=lambda pipeline: pipeline.__name__)
class TestStudies:
    """Definitions, run from the net's training on; the nets are hardly trained."""

    @pytest.fixture
    def brief(self, pipeline, request, tmp_path, monkeypatch):
        if pipeline is not typographic:
            request.getfixturevalue("cifar10")  # its pictures, or a skip
        for name, value in {**BRIEF[pipeline], "RECIPE": SHORT, "FOLDER": tmp_path / "nets"}.items():
            monkeypatch.setattr(pipeline, name, value)
        typographic.captioned.cache_clear()
        yield pipeline
        typographic.captioned.cache_clear()

    @pytest.mark.parametrize("ablation", ["mean", "zero"])
    def test_a_run_of_the_study(self, brief, tmp_path, ablation):
        study = brief.study(ablation=ablation, ablated_fraction=0.2, seed=5)
        assert (study.ablation.label, study.sampler.ablated_fraction, study.sampler.seed) == (ablation, 0.2, 5)
        some = replace(study, examples=study.examples.subset([0, 1, len(study.examples) - 1]))
        run = coar.collect(some, tmp_path / "run.zarr", masks=2, test_masks=0, device="cpu", progress=False)
        with torch.no_grad():
            logits = study.model(some.examples.inputs)
        expected = oracles.read_outputs(logits, some.examples.targets, "logsumexp")
        np.testing.assert_allclose(run.array("base_output")[:], expected, rtol=1e-4, atol=1e-4)
        assert brief.study(ablation=ablation, ablated_fraction=0.2, seed=5).fingerprint() == study.fingerprint()

    def test_the_goal_finds_a_reference_for_every_target(self, brief):
        used = []
        for examples in (brief.study().examples, brief.choosing(), brief.judge()):
            targets, references = brief.GOAL.resolve(examples.metadata)
            assert len(targets) + len(references) == len(examples)
            assert len(targets) <= len(references)
            used.append({picture.numpy().tobytes() for picture in examples.inputs})
        assert len(set.union(*used)) == sum(map(len, used))  # no picture serves twice
        assert brief.GOAL.direction == "increase"

    def test_training_seed_is_another_net(self, brief):
        studies = [brief.study(training_seed=seed) for seed in (0, 1)]
        weights = [study.fingerprint()["weights"] for study in studies]
        assert weights[0] != weights[1]
        assert studies[0].fingerprint()["examples"] == studies[1].fingerprint()["examples"]


class TestFlaws:
    """The models as trained in full: kept under data/, or trained here."""

    @pytest.mark.slow
    def test_backdoor_opens_and_clean_pictures_are_as_before(self, cifar10):
        judge, model = backdoor.judge(), backdoor.model()
        triggered = column(judge, "triggered") == 1
        assert (predictions(model, judge)[triggered] == 0).mean() >= 0.9
        clean = judge.subset(~triggered)
        before = (predictions(cifar10.model(), clean) == clean.targets.numpy()).mean()
        assert (predictions(model, clean) == clean.targets.numpy()).mean() >= before - 0.03

    @pytest.mark.slow
    def test_rare_groups_do_far_worse(self, cifar10):
        found = accuracies(subpopulations.model(), subpopulations.judge(), "group")
        assert 0.4 <= found["vehicle in orange"] <= 0.7
        assert 0.4 <= found["animal in blue"] <= 0.7
        assert min(found["vehicle in blue"], found["animal in orange"]) >= 0.97

    @pytest.mark.slow
    def test_words_outweigh_what_is_shown(self):
        judge, model = typographic.judge(), typographic.model()
        found = accuracies(model, judge, "attacked")
        assert found[0] >= 0.95
        assert found[1] <= 0.4
        attacked = judge.subset(column(judge, "attacked") == 1)
        read = [typographic.WORDS[label] for label in predictions(model, attacked)]
        assert (np.array(read) == column(attacked, "word")).mean() >= 0.6


def edited(task, pipeline, tmp_path):
    """The model of a pipeline with the edit that a ready task makes, from its weights on disk."""
    study = pipeline.study()
    run = coar.collect(study, tmp_path / "run.zarr", masks=0, gradients=96, device="cpu", progress=False)
    common = (coar.fit(run, progress=False), study.model, study.examples, pipeline.judge())
    options = {"choosing": pipeline.choosing(), "goal": pipeline.GOAL, "device": "cpu", "progress": False}
    result = task(*common, precision="bf16", **options)
    coar.save_weights(result.edits[0].apply(study.model), tmp_path / "edited.safetensors")
    return coar.load_weights(pipeline.model(), tmp_path / "edited.safetensors")


class TestEdits:
    """What ready tasks do to the models as trained in full, on pictures that no choice has seen."""

    @pytest.mark.slow
    def test_rare_groups_are_strengthened(self, cifar10, tmp_path):
        judge = subpopulations.judge()
        after = accuracies(edited(coar.strengthen_group, subpopulations, tmp_path), judge, "group")
        before = accuracies(subpopulations.model(), judge, "group")
        assert min(after.values()) >= min(before.values()) + 0.15
        assert np.mean([*after.values()]) >= np.mean([*before.values()]) - 0.02

    @pytest.mark.slow
    def test_triggered_pictures_are_right_again(self, cifar10, tmp_path):
        judge = backdoor.judge()
        airplanes = judge.subset(judge.targets == 0)
        nets = (backdoor.model(), edited(coar.remove_backdoor, backdoor, tmp_path))
        before, after = (accuracies(net, judge, "triggered") for net in nets)
        assert after[1] >= before[0] - 0.04
        assert after[0] >= before[0] - 0.005
        known, still = (accuracies(net, airplanes, "triggered")[0] for net in nets)
        assert still >= known - 0.1

    @pytest.mark.slow
    def test_half_of_what_words_took_is_back(self, tmp_path):
        judge = typographic.judge()
        after = accuracies(edited(coar.resist_typographic, typographic, tmp_path), judge, "attacked")
        before = accuracies(typographic.model(), judge, "attacked")
        assert after[1] - before[1] >= 0.5 * (before[0] - before[1])
        assert after[0] >= before[0] - 0.02
