"""Causal tracing against hooks on one fact and one cell at a time, and on a model whose facts sit in a known layer."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import coar
from coar.errors import ComponentError, ExamplesError, SettingsError
from coar.tracing.corruption import moments, train_constant
from coar.tracing.facts import Facts
from coar.tracing.restoring import Cell, Restoring
from tests import edge_oracle, tiny

LENGTHS = (7, 6, 7, 5, 6, 7, 7, 5)
FIRST, LAST = (1, 1, 2, 1, 1, 2, 1, 1), (3, 2, 3, 1, 3, 4, 1, 2)
SITES = {
    "gpt2": {"attention": "transformer.h.{}.attn", "mlp": "transformer.h.{}.mlp", "layer": "transformer.h.{}"},
    "llama": {"attention": "model.layers.{}.self_attn", "mlp": "model.layers.{}.mlp", "layer": "model.layers.{}"},
    "gemma2": {
        "attention": "model.layers.{}.post_attention_layernorm",
        "mlp": "model.layers.{}.post_feedforward_layernorm",
        "layer": "model.layers.{}",
    },
}


def prompts(model, *, left=False, **more):
    """Facts that the model recalls, since their answers are what it says."""
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(2, edge_oracle.WORDS, (len(LENGTHS), max(LENGTHS)), generator=draw)
    mask = torch.stack([torch.arange(max(LENGTHS)) < n for n in LENGTHS]).long()
    answers = [int(model(row[:n][None]).logits[0, -1].argmax()) for row, n in zip(ids, LENGTHS, strict=True)]
    if left:
        ids, mask = (
            torch.stack([row.roll(max(LENGTHS) - n) for row, n in zip(x, LENGTHS, strict=True)]) for x in (ids, mask)
        )
    tokens = {"input_ids": ids * mask, "attention_mask": mask}
    positions = {"subject_first": FIRST, "subject_last": LAST}
    return coar.token_examples(tokens, answers=torch.tensor(answers), positions=positions, **more)


def first(result):
    return result if isinstance(result, torch.Tensor) else result[0]


def replaced(result, value):
    return value if isinstance(result, torch.Tensor) else (value, *result[1:])


def patched(family, model, ids, subject, embedding, kind, layers, position):
    """The last position's probabilities with new subject embeddings and clean states restored, by hooks.

    `position` is one position, or a list.
    """
    clean, hooks = {}, []
    for layer in layers:
        module = model.get_submodule(SITES[family][kind].format(layer))
        hooks.append(module.register_forward_hook(lambda m, a, out, k=layer: clean.__setitem__(k, first(out).clone())))
    model(ids[None])
    [hook.remove() for hook in hooks]

    def corrupt(module, args, out):
        out = out.clone()
        out[0, subject] = embedding
        return out

    hooks = [model.get_input_embeddings().register_forward_hook(corrupt)]
    for layer in layers:

        def restore(module, args, out, layer=layer):
            value = first(out).clone()
            value[0, position] = clean[layer][0, position]
            return replaced(out, value)

        hooks.append(model.get_submodule(SITES[family][kind].format(layer)).register_forward_hook(restore))
    logits = model(ids[None]).logits[0, -1]
    [hook.remove() for hook in hooks]
    return logits.softmax(0)


def text(fact, facts, *, left=False):
    ids = facts.inputs["input_ids"][fact]
    return ids[max(LENGTHS) - LENGTHS[fact] :] if left else ids[: LENGTHS[fact]]


@pytest.mark.parametrize(("family", "left"), [("gpt2", False), ("llama", True), ("gemma2", False)])
def test_every_cell_is_that_of_hooks(family, left):
    model = edge_oracle.build(family)
    facts = prompts(model, left=left)
    places = ("subject_first", "subject_middle", "subject_last", "last", "subject", "all")
    found = coar.trace(model, facts, corruption="mean", windows=(1, 3), places=places, progress=False)
    assert found.left_out == ()
    assert len(found.learning) == 5
    scored = sorted(set(range(len(LENGTHS))) - set(found.learning))
    assert len(found.table) == 3 * 2 * 6 * edge_oracle.LAYERS
    texts = [text(fact, facts, left=left) for fact in range(len(LENGTHS))]
    embedding = model.get_input_embeddings()
    mean = torch.cat([embedding(texts[i][FIRST[i] : LAST[i] + 1]) for i in found.learning]).mean(0)
    for cell in found.table.itertuples():
        half, losses, totals = cell.window // 2, [], []
        layers = range(max(cell.layer - half, 0), min(cell.layer + half, edge_oracle.LAYERS - 1) + 1)
        for fact in scored:
            ids, subject = texts[fact], list(range(FIRST[fact], LAST[fact] + 1))
            position = {
                "subject_first": FIRST[fact],
                "subject_middle": (FIRST[fact] + LAST[fact]) // 2,
                "subject_last": LAST[fact],
                "last": len(ids) - 1,
                "subject": subject,
                "all": list(range(FIRST[fact], len(ids))),
            }[cell.place]
            clean = model(ids[None]).logits[0, -1].softmax(0)
            answer = clean.argmax()
            corrupted = patched(family, model, ids, subject, mean, "layer", [], 0)[answer]
            p = patched(family, model, ids, subject, mean, cell.kind, layers, position)[answer]
            losses.append(max(float(clean[answer] - p), 0.0))
            totals.append(float(clean[answer] - corrupted))
        assert cell.aie == pytest.approx(1 - np.mean(losses) / np.mean(totals), abs=1e-3)
        own = found.per_fact.query("kind == @cell.kind and layer == @cell.layer and window == @cell.window")
        own = own[own["place"] == cell.place]
        np.testing.assert_allclose(own["loss"], losses, atol=1e-4)
        np.testing.assert_allclose(own["clean"] - own["corrupted"], totals, atol=1e-4)


@pytest.fixture(scope="module")
def model():
    return edge_oracle.build("gpt2")


def test_restoring_the_state_that_the_answer_is_read_from_brings_the_fact_back(model):
    """So does the state after any layer of all tokens that the corruption can change."""
    ids = torch.randint(2, edge_oracle.WORDS, (8, 5), generator=torch.Generator().manual_seed(2))
    answers = model(ids).logits[:, -1].argmax(1)
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    facts = coar.token_examples(tokens, answers=answers, positions={"subject_first": [1] * 8, "subject_last": [1] * 8})
    for corruption in ("noise", "resample", "optimal"):
        options = {"kinds": ("layer",), "windows": (3,), "places": ("last",), "steps": 3, "progress": False}
        found = coar.trace(model, facts, corruption=corruption, **options)
        last = found.table[found.table["layer"] == edge_oracle.LAYERS - 1]
        np.testing.assert_allclose(last["aie"], 1, atol=1e-3)  # the last position's state after the last layer
        assert (found.table["low"] <= found.table["aie"] + 1e-9).all()
        assert (found.table["high"] >= found.table["aie"] - 1e-9).all()
        whole = coar.trace(model, facts, corruption=corruption, **options | {"windows": (1,), "places": ("all",)})
        np.testing.assert_allclose(whole.table["aie"], 1, atol=1e-3)  # nothing else of the pass is corrupted


def test_noise_and_resampling_are_those_drawn_by_hand(model):
    facts = prompts(model)
    texts = [text(fact, facts) for fact in range(len(LENGTHS))]
    table = model.get_input_embeddings().weight
    options = {"kinds": ("mlp",), "places": ("last",), "draws": 4, "progress": False}
    noise = coar.trace(model, facts, corruption="noise", seed=3, **options)
    assert set(noise.per_fact["fact"]) == set(range(len(LENGTHS))) - set(noise.learning)
    values = torch.cat([table[texts[i][FIRST[i] : LAST[i] + 1]] for i in noise.learning])
    draws = np.random.default_rng(3).standard_normal(
        (4, len(LENGTHS), max(LENGTHS), edge_oracle.WIDTH), dtype=np.float32
    )
    for fact, own in noise.per_fact.groupby("fact"):
        subject, found = list(range(FIRST[fact], LAST[fact] + 1)), []
        answer = model(texts[fact][None]).logits[0, -1].argmax()
        for drawn in torch.from_numpy(draws):
            embedding = table[texts[fact][subject]] + 3 * values.std() * drawn[fact, subject]
            found.append(patched("gpt2", model, texts[fact], subject, embedding, "mlp", [], 0)[answer])
        assert own["corrupted"].iloc[0] == pytest.approx(float(torch.stack(found).mean()), abs=1e-4)


def test_an_optimal_constant_is_a_minimum_over_the_learning_facts(model):
    """The loss is piecewise smooth, so the best of many random steps away may be only a little lower."""
    facts = prompts(model)
    options = {"kinds": ("mlp",), "places": ("subject_last",), "progress": False, "steps": 200}
    found = coar.trace(model, facts, corruption="optimal", **options)
    texts = [text(fact, facts) for fact in range(len(LENGTHS))]
    table = model.get_input_embeddings().weight

    def loss(constant):
        losses = []
        for fact in found.learning:
            p = model(texts[fact][None]).logits[0, -1].softmax(0)
            subject = list(range(FIRST[fact], LAST[fact] + 1))
            corrupted = patched("gpt2", model, texts[fact], subject, constant, "mlp", [], 0)
            losses.append(max(float(p.max() - corrupted[p.argmax()]), 0.0))
        return np.mean(losses)

    values = torch.cat([table[texts[i][FIRST[i] : LAST[i] + 1]] for i in found.learning])
    best = loss(torch.from_numpy(found.constant))
    assert best < 0.3 * loss(values.mean(0))
    draw = torch.Generator().manual_seed(0)
    steps = [values.std(0) * torch.randn(len(values[0]), generator=draw) * 0.3 for _ in range(20)]
    assert best < min(loss(torch.from_numpy(found.constant) + step) for step in steps) + 0.01


def test_a_constant_of_a_cell_is_trained_with_that_cell_restored(model):
    facts = prompts(model)
    options = {"kinds": ("mlp",), "places": ("subject_last",), "progress": False, "steps": 30}
    shared = coar.trace(model, facts, corruption="optimal", **options)
    own = coar.trace(model, facts, corruption="optimal", per_cell=True, **options)
    assert np.array_equal(own.constant, shared.constant)
    np.testing.assert_allclose(own.per_fact["corrupted"], shared.per_fact["corrupted"], atol=1e-6)
    given = Restoring(model, Facts.of(facts, torch.device("cpu")), torch.device("cpu"), ["mlp"], ["subject_last"])
    learning = torch.tensor(own.learning)
    deviation = moments(given, learning)[1]
    for layer in range(edge_oracle.LAYERS):
        cell = Cell("mlp", layer, layer, "subject_last")
        trained = train_constant(
            given, learning, cell=cell, start=torch.from_numpy(shared.constant), deviation=deviation, steps=30, seed=0
        )
        losses = []
        for fact in sorted(set(range(len(LENGTHS))) - set(own.learning)):
            ids, subject = text(fact, facts), list(range(FIRST[fact], LAST[fact] + 1))
            p = model(ids[None]).logits[0, -1].softmax(0)
            after = patched("gpt2", model, ids, subject, trained, "mlp", [layer], LAST[fact])
            losses.append(max(float(p.max() - after[p.argmax()]), 0.0))
        rows = own.per_fact[own.per_fact["layer"] == layer]
        np.testing.assert_allclose(rows["loss"], losses, atol=1e-4)


def test_partners_are_exchanged_position_by_position(model):
    ids = torch.randint(2, edge_oracle.WORDS, (8, 6), generator=torch.Generator().manual_seed(4))
    answers = model(ids).logits[:, -1].argmax(1)
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    positions = {"subject_first": [1, 1, 2, 2, 1, 1, 3, 3], "subject_last": [2, 2, 2, 2, 3, 3, 4, 4]}
    facts = coar.token_examples(
        tokens, answers=answers, positions=positions, metadata={"pair": [0, 0, 1, 1, 2, 2, 3, 3]}
    )
    options = {"corruption": "counterfactual", "kinds": ("layer",), "places": ("last",), "progress": False}
    found = coar.trace(model, facts, **options)
    for fact, own in found.per_fact.groupby("fact"):
        mixed, span = ids[fact].clone(), slice(positions["subject_first"][fact], positions["subject_last"][fact] + 1)
        mixed[span] = ids[fact ^ 1][span]
        p = model(mixed[None]).logits[0, -1].softmax(0)[answers[fact]]
        assert own["corrupted"].iloc[0] == pytest.approx(float(p), abs=1e-5)
    apart = coar.token_examples(
        tokens,
        answers=answers,
        positions=positions | {"subject_last": [2, 1] + [2] * 2 + [3, 3, 4, 4]},
        metadata=facts.metadata,
    )
    with pytest.raises(ExamplesError, match="the subjects of facts 0 and 1 are at other positions"):
        coar.trace(model, apart, **options)


def test_the_grid_is_drawn_and_its_concentration_counted(model):
    found = coar.trace(model, prompts(model), corruption="mean", windows=(1, 3), progress=False)
    axes = plt.figure().subplots()
    assert found.plot(axes) is axes
    (drawn,) = axes.images
    assert drawn.get_array().shape == (3 * 2 * 2, edge_oracle.LAYERS)
    np.testing.assert_allclose(drawn.get_array().ravel(), found.table["aie"])
    assert [label.get_text() for label in axes.get_yticklabels()][:3] == [
        "attention, subject last",
        "attention, last",
        "attention x 3, subject last",
    ]
    plt.close("all")
    assert f"<td>{found.table['aie'][: edge_oracle.LAYERS].max():.3f}</td>" in found._repr_html_()
    one = found.concentration(1)
    assert len(one) == 3 * 2 * 2
    for row in one.itertuples():
        own = found.table.query("kind == @row.kind and window == @row.window and place == @row.place")
        effects = own["aie"].clip(lower=0)
        assert row.best == [int(own.loc[effects.idxmax(), "layer"])]
        assert row.share == pytest.approx(effects.max() / effects.sum())


def test_what_cannot_be_traced_is_refused(model):
    facts = prompts(model)
    tokens = {name: facts.inputs[name] for name in ("input_ids", "attention_mask")}
    bare = coar.token_examples(tokens, answers=torch.zeros(len(LENGTHS), dtype=torch.long))
    with pytest.raises(ExamplesError, match="no positions subject_first and subject_last"):
        coar.trace(model, bare)
    named = {"subject_first": FIRST, "subject_last": LAST}
    with pytest.raises(ExamplesError, match="the model recalls 0 of 8 facts, and at least 4 are needed"):
        coar.trace(
            model, coar.token_examples(tokens, answers=torch.ones(len(LENGTHS), dtype=torch.long), positions=named)
        )
    with pytest.raises(ExamplesError, match="every fact needs one answer"):
        coar.trace(model, coar.token_examples(tokens, positions=named))
    turned = coar.token_examples(
        tokens, answers=[3] * len(LENGTHS), positions={"subject_first": LAST, "subject_last": FIRST}
    )
    with pytest.raises(ExamplesError, match="the subject of fact 0 ends at position 1, before it begins at 3"):
        coar.trace(model, turned)
    for options, message in [
        ({"corruption": "best"}, "'best' is no corruption; choose one of optimal, noise"),
        ({"kinds": ("head",)}, "'head' cannot be restored; choose among attention, mlp, layer"),
        ({"windows": (2,)}, r"windows of \(2,\) layers were given; give odd numbers"),
        ({"places": ("end",)}, "'end' is no place; choose among subject, all, subject_middle"),
        ({"places": ()}, "'nothing' is no place; choose among"),
        ({"learning_share": 1.0}, "learning_share is 1.0"),
    ]:
        with pytest.raises(SettingsError, match=message):
            coar.trace(model, facts, **options)
    with pytest.raises(ComponentError):
        coar.trace(tiny.model("bert"), facts)
