"""The pipelines of prompts on small models: what the prompts ask, who is the partner, and what is left out."""

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import coar
from coar.errors import PipelineError, SettingsError
from coar.pipeline import load_pipeline
from pipelines import gpt2, greater_than, induction, ioi, language_model, prompts

FOLDER = Path(__file__).parent.parent / "pipelines"
PARTS = ["studied", "calibration", "judge"]
NAMES, NOUNS = ioi.NAMES.split(), greater_than.NOUNS.split()
WIDTH = 64
SIZES = {"n_embd": WIDTH, "n_layer": 1, "n_head": 4, "n_positions": 32, "bos_token_id": None, "eos_token_id": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a model that expects what occurred least, with tokens for all words of the prompts.

    Its one attention layer subtracts the mean of all embeddings, so a name that occurred once is likelier than a name
    that occurred twice.
    """
    place = tmp_path_factory.mktemp("model")
    sentences = [t.replace("{first}", a).replace("{second}", b) for t in ioi.TEMPLATES for a, b in pairwise(NAMES)]
    words = "\n".join([*sentences, *(f"The {noun} lasted from the year 1 7 3 2 to the year" for noun in NOUNS)])
    tokenizer = gpt2.byte_pairs(words)
    torch.manual_seed(0)
    net = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **SIZES))
    block = net.transformer.h[0]
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.fill_(float(name.startswith("ln") and name.endswith("weight")))
        net.transformer.wte.weight.normal_()
        net.transformer.wpe.weight.zero_()
        block.attn.c_attn.weight[:, 2 * WIDTH :] = torch.eye(WIDTH)
        block.attn.c_proj.weight.copy_(-20 * torch.eye(WIDTH))
    net.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture
def own(folder, monkeypatch):
    monkeypatch.setenv("COAR_LANGUAGE_MODEL", str(folder))


def alone(net, examples, row):
    """The logits after a prompt without padding."""
    length = int(examples.inputs["attention_mask"][row].sum())
    with torch.no_grad():
        return net(examples.inputs["input_ids"][row : row + 1, :length]).logits[0, -1]


def answers(examples, row):
    """An example's answers and wrong answers."""
    (place,) = (examples.targets[row].flatten(1) != -100).any(1).nonzero()[:, 0]
    return [[token for token in side if token >= 0] for side in examples.targets[row, place].tolist()]


@pytest.mark.parametrize("pipeline", [ioi, greater_than])
@pytest.mark.parametrize("part", PARTS)
def test_the_first_pairs_that_the_model_gets_right_are_used(own, pipeline, part):
    net, tokenizer = language_model.model(), language_model.tokenizer()
    made, used = prompts.examples_of(pipeline.pairs(part, tokenizer), tokenizer), pipeline.examples(part, net)
    right = []
    for row in range(len(made)):
        logits, (own_tokens, others) = alone(net, made, row), answers(made, row)
        right.append(float(logits[own_tokens].mean()) > float(logits[others].mean()))
    both = [2 * pair + i for pair in range(len(made) // 2) if all(right[2 * pair : 2 * pair + 2]) for i in (0, 1)]
    assert used.fingerprint() == made.subset(both[: 2 * pipeline.PAIRS[part]]).fingerprint()
    assert len(both) < len(made)


def partners(texts, examples):
    """The texts, two by two as counterfactuals pair them."""
    sources = coar.Counterfactual(pairs="pair").sources(examples)
    assert sources[sources].tolist() == list(range(len(texts)))
    return [(texts[row], texts[other]) for row, other in enumerate(sources)]


def test_the_answer_of_ioi_is_the_name_that_occurs_once(own):
    net, tokenizer = language_model.model(), language_model.tokenizer()
    seen = {}
    for part in [*PARTS, "learning"]:
        examples = ioi.examples(part, net)
        texts = examples.metadata["text"].tolist()
        for row, (text, partner) in enumerate(partners(texts, examples)):
            found = [word for word in re.findall(r"\w+", text) if word in NAMES]
            (answer, wrong) = ([tokenizer.decode(token).strip() for token in side] for side in answers(examples, row))
            assert sorted(found) == sorted([*answer, *wrong, *wrong])
            assert found[2:] == wrong
            assert partner == "".join(text.rpartition(wrong[0])[:1] + tuple(answer) + text.rpartition(wrong[0])[2:])
            ids = examples.inputs["input_ids"][row]
            words = {name: tokenizer.decode(ids[at[row]]).strip() for name, at in examples.positions.items()}
            assert words == {"answer": answer[0], "subject": wrong[0], "subject_again": wrong[0]}
            assert examples.positions["subject"][row] < examples.positions["subject_again"][row]
            seen.setdefault(part, set()).update(found)
        assert len(set(texts)) == len(texts)
    assert not seen["judge"] & (seen["studied"] | seen["calibration"] | seen["learning"])


def test_answers_of_greater_than_are_larger_digits(own):
    net, tokenizer = language_model.model(), language_model.tokenizer()
    nouns = {}
    for part in [*PARTS, "learning"]:
        examples = greater_than.examples(part, net)
        texts = examples.metadata["text"].tolist()
        for row, (text, partner) in enumerate(partners(texts, examples)):
            noun, century, tens, ones = re.fullmatch(
                r"The (\w+) lasted from the year (\d\d)(\d)(\d) to the year \2", text
            ).groups()
            larger, smaller = ([tokenizer.decode(token) for token in side] for side in answers(examples, row))
            assert larger == [d for d in "0123456789" if d > tens]
            assert smaller == [d for d in "0123456789" if d < tens]
            other = {"1": "5", "2": "6", "3": "7", "4": "8", "5": "1", "6": "2", "7": "3", "8": "4"}[tens]
            assert partner == f"The {noun} lasted from the year {century}{other}{ones} to the year {century}"
            assert tokenizer.decode(examples.inputs["input_ids"][row, examples.positions["year"][row]]) == ones
            nouns.setdefault(part, set()).add(noun)
    assert not nouns["judge"] & (nouns["studied"] | nouns["calibration"] | nouns["learning"])


class Numbers:
    """A tokenizer of words, and of numbers of two digits except 40."""

    def encode(self, text, *, add_special_tokens):
        return [piece.strip() for piece in re.findall(r" ?[a-z]+|(?!40) ?\d\d|\d", text)]

    def decode(self, tokens):
        return "".join(tokens)


def test_years_in_tokens_of_two_digits():
    larger, smaller = greater_than.continuations_of(Numbers())(38)
    assert larger == [f"{year}" for year in range(39, 100) if year != 40]
    assert smaller == [f"{year:02d}" for year in range(38)]


def test_a_tokenizer_of_other_numbers():
    class Whole(Numbers):
        def encode(self, text, *, add_special_tokens):
            return text.split()

    with pytest.raises(PipelineError, match=r"cuts the year 1732 into \['1732'\]; set COAR_LANGUAGE_MODEL to a model"):
        greater_than.continuations_of(Whole())


@pytest.mark.parametrize("name", ["ioi", "greater_than"])
def test_a_run_of_a_pipeline(own, name, tmp_path):
    loaded = load_pipeline(FOLDER / f"{name}.py")
    study = loaded.study(seed=3)
    assert study.components.of_edges
    assert study.fingerprint() == loaded.study(seed=3).fingerprint()
    run = coar.collect(study, tmp_path / "run.zarr", masks=2, gradients=2, device="cpu", progress=False)
    assert loaded.study_of(run).fingerprint() == study.fingerprint()
    assert float(run.array("base_output")[:].min()) > 0
    mean = loaded.study(ablation="mean").ablation.calibration
    assert not set(mean.input_hashes()) & set(study.examples.input_hashes())
    assert loaded.study(ablation="optimal").ablation.loss == coar.KLDivergence()
    assert not set(loaded.judge().input_hashes()) & set(study.examples.input_hashes())


@pytest.mark.parametrize(("kind", "first"), [("heads", "transformer.h.0.attn.head[0]"), ("nodes", "embed")])
def test_other_components(own, monkeypatch, kind, first):
    monkeypatch.setenv("COAR_PROMPTS_COMPONENTS", kind)
    assert ioi.study().components.names[0] == first
    monkeypatch.setenv("COAR_PROMPTS_COMPONENTS", "neurons")
    with pytest.raises(SettingsError, match="COAR_PROMPTS_COMPONENTS is 'neurons'; choose one of edges, nodes, heads"):
        ioi.study()


GOOD = prompts.Prompt(text="Then, Mary and John went", answers=[" Mary"], wrong=[" John"], positions={"name": 10})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": "Then, Mary and John went to"}, "have different numbers of tokens; set COAR_LANGUAGE_MODEL"),
        ({"answers": [" Mary and"]}, "the answer ' Mary and' is 2 tokens"),
        ({"positions": {"name": 9}}, "no token ends at character 9, the end of the name"),
    ],
)
def test_prompts_that_do_not_fit(own, change, message):
    with pytest.raises(PipelineError, match=message):
        prompts.examples_of([(GOOD, replace(GOOD, **change))], language_model.tokenizer())


def test_a_model_that_is_wrong(own):
    net, tokenizer = language_model.model(), language_model.tokenizer()
    turned = [
        tuple(replace(p, answers=p.wrong, wrong=p.answers) for p in pair) for pair in ioi.pairs("judge", tokenizer)
    ]
    made = prompts.examples_of(turned, tokenizer)
    with pytest.raises(PipelineError, match=r"right on both prompts of [01] of 48 pairs of names; set COAR_LANGUAGE"):
        prompts.right_pairs(net, made.subset(range(96)), most=3, what="names")


def test_names_of_several_tokens():
    with pytest.raises(PipelineError, match="0 names are single tokens and 8 are needed"):
        ioi.pairs("studied", gpt2.byte_pairs("the cat sat on the mat"))


class Copy(nn.Module):
    """Expects after a token what came after it before."""

    def forward(self, input_ids):
        logits = torch.zeros(*input_ids.shape, induction.VOCABULARY)
        for row, tokens in enumerate(input_ids.tolist()):
            for place, token in enumerate(tokens):
                for before in range(place):
                    if tokens[before] == token:
                        logits[row, place, tokens[before + 1]] += 1
        return logits


def test_sequences_are_repeated_and_partners_differ_in_what_is_repeated():
    hashes = []
    for part in PARTS:
        examples = induction.examples(part, Copy())
        assert len(examples) == 2 * induction.PAIRS[part]
        ids = examples.inputs["input_ids"]
        for row, (tokens, partner) in enumerate(partners(ids.tolist(), examples)):
            (answer,), (wrong,) = answers(examples, row)
            assert [wrong if token == answer else token for token in tokens] == partner
            assert wrong not in tokens
            place = examples.positions["repeated"][row]
            assert tokens[place] == answer
            assert tokens[examples.positions["before_repeated"][row]] == tokens[place - 1] == tokens[-1]
        hashes += examples.input_hashes()
    assert len(set(hashes)) == len(hashes)


def test_the_repetition_alone_is_learnt():
    examples = induction.training_examples(20)
    for tokens, targets in zip(examples.inputs["input_ids"].tolist(), examples.targets.tolist(), strict=True):
        period = tokens.index(tokens[0], 1)
        assert len(set(tokens[:period])) == period
        assert targets[:period] == [-100] * period
        assert targets[period:-1] == tokens[period + 1 :] == tokens[1 : len(tokens) - period]


@pytest.mark.slow
def test_two_layers_learn_induction(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = load_pipeline(FOLDER / "induction.py").study()
    assert induction.repeated_tokens_found(study.model)["repeated token"] > 0.99
    assert (len(study.components), len(study.examples)) == (81, 128)  # 4 readings of 5 and 9 writers, and the last
    assert len(list(Path("data/induction").iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ioi", "greater_than"])
def test_smollm2_knows_both_tasks(name, monkeypatch):
    monkeypatch.delenv("COAR_LANGUAGE_MODEL", raising=False)
    study = load_pipeline(FOLDER / f"{name}.py").study()
    assert len(study.examples) == 64
    assert len(study.components) == 70_651
    with torch.no_grad():
        differences = study.output(study.model(**study.examples.inputs), study.examples.targets)
    assert float(differences.mean()) > 1
