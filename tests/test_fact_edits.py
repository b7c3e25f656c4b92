"""Edits of facts: the solver against scipy, and edited models, loaded by transformers alone, by their own logits."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import coar
from coar.editing.facts.harm import EMPHASIS, Harm, HarmModel, least_harm, shrinkage
from coar.errors import BoundError, EditError, GoalError, SettingsError

PEOPLE, WORDS, LENGTH = 24, 60, 4


def sentences():
    """A person of two tokens, a relation, and a place: two facts about each person."""
    draw = np.random.default_rng(1)
    pairs = [(person, relation) for person in range(PEOPLE) for relation in (50, 51)]
    return torch.tensor([[n // 5, 10 + n % 5, relation, 20 + int(draw.integers(12))] for n, relation in pairs])


def prose():
    """Sequences in which each token follows from the one before, but for some noise."""
    draw = torch.Generator().manual_seed(2)
    start = torch.randint(WORDS, (40, 1), generator=draw)
    steps = torch.arange(12) * 7
    noise = torch.rand(40, 12, generator=draw) < 0.1
    return torch.where(noise, torch.randint(WORDS, (40, 12), generator=draw), (start + steps) % WORDS)


@pytest.fixture(scope="module")
def model():
    """A small Llama that has learned the facts and the sequences."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    net = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=512, vocab_size=WORDS, max_position_embeddings=32))
    facts, text = sentences(), prose()
    adam = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(250):
        loss = torch.nn.functional.cross_entropy(net(facts[:, :-1]).logits[:, -1], facts[:, -1])
        said = net(text).logits[:, :-1]
        loss = loss + torch.nn.functional.cross_entropy(said.flatten(0, 1), text[:, 1:].flatten())
        adam.zero_grad()
        loss.backward()
        adam.step()
    net.config.use_cache = False
    return net.eval()


def studied(net, answers=None, ablation=None):
    facts = sentences()
    ids = facts[:, :-1]
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    people = np.arange(len(facts)) // 2
    return coar.Study(
        model=net,
        examples=coar.token_examples(
            tokens, answers=facts[:, -1] if answers is None else answers, metadata={"person": people}
        ),
        components=coar.mlp_neurons(net) + coar.attention_heads(net),
        output=coar.TokenMargin(reduction="last"),
        ablation=ablation or coar.ZeroActivation(),
    )


def texts(rows=slice(None)):
    ids = prose()[rows]
    return coar.token_examples({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


@pytest.fixture(scope="module")
def editor(model):
    return coar.FactEditor(studied(model), texts(slice(30)), progress=False)


def answered(net, answers=None):
    """Probabilities of the answers by plain logits."""
    facts = sentences()
    with torch.no_grad():
        said = net(facts[:, :-1]).logits[:, -1].softmax(1)
    return said[torch.arange(len(facts)), facts[:, -1] if answers is None else answers].double().numpy()


def perplexity(net, rows):
    text = prose()[rows]
    with torch.no_grad():
        said = net(text).logits[:, :-1].double()
    return float(torch.nn.functional.cross_entropy(said.flatten(0, 1), text[:, 1:].flatten()).exp())


def test_the_least_harm_is_that_of_scipy():
    draw = torch.Generator().manual_seed(3)
    for number in range(6):
        target, harm = (torch.randn(n, 14, generator=draw, dtype=torch.float64) for n in (1, 9))
        values = 0.3 * torch.randn(9, generator=draw, dtype=torch.float64)
        now = torch.zeros(14, dtype=torch.float64) if number < 3 else torch.rand(14, generator=draw).double()
        spread = torch.zeros(14) if number == 0 else 2 * torch.rand(14, generator=draw)
        required = torch.tensor([0.4 + 0.1 * number], dtype=torch.float64)

        def cost(step, harm=harm, values=values, now=now, spread=spread):
            change = step @ step + np.sum((harm.numpy() @ step + values.numpy()) ** 2)
            return float(change + np.sum(spread.numpy() * (now.numpy() + step) ** 2))

        parts = [Harm(harm[:4], values[:4], spread / 3), Harm(harm[4:], values[4:], 2 * spread / 3)]
        after = least_harm(now, (target, required), parts).numpy()
        found = after - now.numpy()
        reached = {"type": "eq", "fun": lambda step, c=target, f=required: c.numpy()[0] @ step - f.item()}
        limits = [(-x, 1 - x) for x in now.tolist()]
        best = minimize(cost, np.zeros(14), bounds=limits, constraints=reached, method="SLSQP")
        assert best.success
        assert after.min() >= 0
        assert after.max() <= 1
        np.testing.assert_allclose(target.numpy()[0] @ found, required.item(), rtol=1e-6)
        assert cost(found) <= 1.02 * best.fun


def test_predicted_changes_are_exact_where_they_were_measured():
    draw = torch.Generator().manual_seed(4)
    gradients, weights = torch.randn(5, 8, generator=draw), torch.rand(5, generator=draw)
    model, strengths = HarmModel(gradients, weights), torch.rand(8, generator=draw)
    changes, anew = torch.randn(5, generator=draw), torch.randn(2, 8, generator=draw)
    model.correct(strengths, changes, torch.tensor([3, 1]), anew)
    gradients[[3, 1]] = anew
    share = shrinkage(gradients * weights[:, None])
    assert 0 < share < 1
    scale = ((1 - share) / 5) ** 0.5
    found = model.at(strengths)
    np.testing.assert_allclose(found.values[:5], scale * changes * weights, rtol=1e-5)
    np.testing.assert_allclose(found.values[5], EMPHASIS * (changes * weights).mean(), rtol=1e-5)
    np.testing.assert_allclose(found.gradients[3], scale * anew[0] * weights[3], rtol=1e-5)
    np.testing.assert_allclose(found.spread, share * ((gradients * weights[:, None]) ** 2).mean(0), rtol=1e-5)
    later = changes + gradients @ torch.full((8,), 0.5)
    np.testing.assert_allclose(model.at(strengths + 0.5).values[:5], scale * later * weights, rtol=1e-4)
    model.weigh(2.0)
    np.testing.assert_allclose(model.at(strengths).values, 2 * found.values, rtol=1e-5)
    np.testing.assert_allclose(model.at(strengths).spread, 4 * found.spread, rtol=1e-5)


def test_the_shrunk_second_moment_is_nearer_to_the_true_one():
    """The share is that of the formula, entry by entry, and it minimises the error up to sampling."""
    draw = np.random.default_rng(6)
    mixing = np.eye(12) + 0.3 * draw.standard_normal((12, 12))
    true, errors, shares = mixing @ mixing.T, np.zeros(21), []
    for _ in range(40):
        x = draw.standard_normal((10, 12)) @ mixing.T
        share = shrinkage(torch.from_numpy(x))
        products = x[:, :, None] * x[:, None, :]
        moment, off = products.mean(0), ~np.eye(12, dtype=bool)
        variance = products.var(0, ddof=1) / len(x)
        assert share == pytest.approx(min(1.0, variance[off].sum() / (moment[off] ** 2).sum()), rel=1e-9)
        shares.append(share)
        mixed = [np.where(off, (1 - a) * moment, moment) for a in np.linspace(0, 1, 21)]
        errors += [np.square(one - true).sum() for one in mixed]
    assert abs(np.mean(shares) - np.linspace(0, 1, 21)[errors.argmin()]) < 0.15
    assert shrinkage(torch.ones(3, 1)) == 1.0


@pytest.mark.parametrize("fact", [5, 20, 41])
def test_one_fact_is_forgotten_and_the_others_stay(model, editor, fact, tmp_path):
    goal = coar.EditGoal(targets=[fact], references=[i for i in range(2 * PEOPLE) if i != fact], direction="decrease")
    bound = coar.FactBound(facts=0.03, perplexity=0.02)
    found = editor.edit(goal, bound=bound, judge_texts=texts(slice(30, None)))
    found.edit.save_pretrained(model, tmp_path / "edited", studied(model).examples)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "edited").eval()
    before, after = answered(model), answered(loaded)
    others = np.arange(len(before)) != fact
    assert before[fact] > 0.5
    assert after[fact] < 0.02
    assert (before - after)[others].mean() <= 0.03
    bounding = slice(1, 30, 2)
    assert perplexity(loaded, bounding) / perplexity(model, bounding) <= 1.02
    table = found.table.set_index("group")
    np.testing.assert_allclose(
        table.loc["targets", ["before", "after"]].tolist(), [before[fact], after[fact]], atol=1e-5
    )
    of_bound = [perplexity(model, bounding), perplexity(loaded, bounding)]
    np.testing.assert_allclose(table.loc["texts", ["before", "after"]].tolist(), of_bound, rtol=1e-5)
    changes = (after - before)[others]
    error = changes.std(ddof=1) / len(changes) ** 0.5
    expected = [changes.mean(), changes.mean() - 1.96 * error, changes.mean() + 1.96 * error]
    np.testing.assert_allclose(table.loc["references", ["change", "low", "high"]].tolist(), expected, atol=1e-5)
    kept = slice(30, None)
    perplexities = [perplexity(model, kept), perplexity(loaded, kept)]
    np.testing.assert_allclose(table.loc["judged texts", ["before", "after"]].tolist(), perplexities, rtol=1e-5)
    np.testing.assert_allclose(
        table.loc["judged texts", "change"], perplexities[1] / perplexities[0] - 1, rtol=1e-3, atol=1e-6
    )
    assert (
        len(found.edit) == found.rounds["components"].tolist()[found.rounds["facts"].size - 1] or len(found.rounds) > 1
    )


def test_an_answer_is_corrected(model):
    answers = sentences()[:, -1].clone()
    with torch.no_grad():
        wanted = int(model(sentences()[7:8, :-1]).logits[0, -1].topk(2).indices[1])
    answers[7] = wanted
    editor = coar.FactEditor(studied(model, answers), texts(), progress=False)
    goal = coar.EditGoal(targets=[7], references=[i for i in range(2 * PEOPLE) if i != 7], direction="increase")
    found = editor.edit(goal, bound=coar.FactBound(facts=0.1, perplexity=0.1))
    after = answered(found.edit.apply(model), answers)
    assert answered(model, answers)[7] < 0.1
    assert after[7] >= 0.5
    assert (answered(model, answers) - after)[np.arange(2 * PEOPLE) != 7].mean() <= 0.1


def test_both_facts_about_a_person_are_forgotten_by_a_condition(model, editor):
    goal = coar.EditGoal(targets="person == 6", references="person != 6", direction="decrease")
    found = editor.edit(goal, bound=coar.FactBound(facts=0.06, perplexity=0.05))
    after = answered(found.edit.apply(model))
    assert after[12:14].max() < 0.02
    assert found.edit.goal == goal


def test_what_cannot_be_had_is_refused(model, editor):
    others = [i for i in range(2 * PEOPLE) if i != 5]
    goal = coar.EditGoal(targets=[5], references=others, direction="decrease")
    with pytest.raises(BoundError, match="within the bound"):
        editor.edit(goal, bound=coar.FactBound(facts=1e-9, perplexity=1e-9))
    with pytest.raises(SettingsError, match="between 0 and 1"):
        editor.edit(goal, probability=1.5)
    with pytest.raises(GoalError, match="already"):
        editor.edit(goal, probability=0.9999999)
    with pytest.raises(GoalError, match="there are 1 references"):
        editor.edit(coar.EditGoal(targets=[5], references=[6], direction="decrease"))
    with pytest.raises(GoalError, match="there are 3 texts"):
        coar.FactEditor(studied(model), texts(slice(3)), progress=False).edit(goal)
    with pytest.raises(EditError, match="no constant for each channel"):
        coar.FactEditor(studied(model, ablation=coar.Resample()), texts(), progress=False)
