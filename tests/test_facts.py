"""The pipeline of facts, and the commands that trace facts and train lenses, on a small model with a tokenizer."""

import json
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

import coar
from coar.cli.common import app
from coar.errors import PipelineError
from pipelines import facts, gpt2, language_model

ROOT = Path(__file__).parent.parent
SUBJECTS = ("for", "while", "with", "try", "assert", "lambda", "class", "import", "return", "yield", "raise", "global")


ANSWERS = ("the", "a", "it", "an")


def taught(net, words, lines):
    """Train a model on facts until it recalls them."""
    adam = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(60):
        loss = 0
        for line in lines:
            ids = torch.tensor([words.encode(line["prompt"].format(line["subject"]))])
            answer = torch.tensor([words.encode(" " + line["answer"])[0]])
            loss = loss + torch.nn.functional.cross_entropy(net(ids).logits[:, -1], answer)
        adam.zero_grad()
        loss.backward()
        adam.step()
    return net.eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small model that recalls all facts of a file but the last, in a folder with its tokenizer."""
    folder = tmp_path_factory.mktemp("language")
    torch.manual_seed(0)
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 1_024}
    net = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    words = gpt2.byte_pairs(topics["assert"] + topics["class"])
    prompts = ("The statement {} is", "In {} we find the")
    lines = [
        {"relation": "says", "prompt": prompts[i % 2], "subject": subject, "answer": ANSWERS[i % len(ANSWERS)]}
        for i, subject in enumerate(SUBJECTS)
    ]
    taught(net, words, lines).save_pretrained(folder / "model")
    words.save_pretrained(folder / "model")
    lines.append({**lines[0], "answer": "never"})
    (folder / "facts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder, lines, words, net


@pytest.fixture
def own(made, tmp_path, monkeypatch):
    """The variables that name the model and the facts, and an empty working folder."""
    folder, *rest = made
    monkeypatch.setenv("COAR_LANGUAGE_MODEL", str(folder / "model"))
    monkeypatch.setenv("COAR_FACTS", str(folder / "facts.jsonl"))
    monkeypatch.chdir(tmp_path)
    facts.everything.cache_clear()
    yield rest
    facts.everything.cache_clear()


def test_subjects_are_marked_and_only_recalled_facts_are_kept(own, caplog):
    lines, words, model = own
    with caplog.at_level("INFO", "coar.pipelines"):
        known = facts.facts()
    assert f"recalls {len(known)} of {len(lines)} facts; left out: {lines[-1]['subject']}" in caplog.text
    long = [line["answer"] for line in lines if len(words.encode(" " + line["answer"].strip())) > 1]
    assert (f"compared by the first: {', '.join(long)}" in caplog.text) == bool(long)
    right = []
    for line in lines:
        ids = torch.tensor([words.encode(line["prompt"].format(line["subject"]))])
        answer = words.encode(" " + line["answer"].strip())[0]
        right.append(int(model(ids).logits[0, -1].argmax()) == answer)
    assert len(known) == sum(right) == len(SUBJECTS)
    assert not right[-1]
    kept = [line for line, there in zip(lines, right, strict=True) if there]
    for row, line in enumerate(kept):
        first, last = (int(known.positions[name][row]) for name in ("subject_first", "subject_last"))
        ids = known.inputs["input_ids"][row]
        assert words.decode(ids[first : last + 1]).strip() == line["subject"]
        real = known.inputs["attention_mask"][row].bool()
        assert words.decode(ids[real]) == line["prompt"].format(line["subject"])
        assert known.targets[row, -1] == words.encode(" " + line["answer"].strip())[0]
    assert len(facts.part(judged=True)) + len(facts.part(judged=False)) == len(known)
    study = facts.study()
    assert len(study.components) == 8
    assert study.examples.fingerprint() == facts.part(judged=False).fingerprint()


def test_the_facts_of_the_project_are_distinct():
    read = facts.read(facts.FILE)
    prompts = [line["prompt"].format(line["subject"]) for line in read]
    assert len(prompts) == len(set(prompts)) > 190


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 1 of .* is not JSON"),
        ('{"prompt": "The {} is", "subject": "sky"}', r"line 1 of .* is no fact; write the strings answer, prompt"),
        (
            '{"prompt": "The sky is", "subject": "sky", "answer": "blue", "relation": "r"}',
            r"with one \{\} in the prompt",
        ),
    ],
)
def test_a_line_that_is_no_fact_is_named(tmp_path, line, message):
    (tmp_path / "facts.jsonl").write_text(line)
    with pytest.raises(PipelineError, match=message):
        facts.read(tmp_path / "facts.jsonl")
    with pytest.raises(PipelineError, match="set COAR_FACTS to a file"):
        facts.read(tmp_path / "none.jsonl")


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_traces_facts_as_python_does(own, tmp_path):
    options = ["--corruption", "mean,noise", "--kinds", "mlp", "--windows", "1,3", "--places", "last", "--draws", 2]
    result = run("trace", ROOT / "pipelines/facts.py", *options)
    assert result.exit_code == 0, result.output
    for corruption in ("mean", "noise"):
        settings = {"kinds": ["mlp"], "windows": [1, 3], "places": ["last"], "draws": 2, "progress": False}
        expected = coar.trace(facts.study().model, facts.facts(), corruption=corruption, **settings)
        folder = tmp_path / "reports/facts"
        pd.testing.assert_frame_equal(
            pd.read_csv(folder / f"trace-{corruption}.csv"), expected.table, rtol=1e-4, atol=1e-5
        )
        assert (folder / f"trace-{corruption}.png").stat().st_size > 5_000
        assert len(pd.read_csv(folder / f"trace-{corruption}-per-fact.csv")) == len(expected.per_fact)
    assert "facts scored" in result.output


def test_the_command_says_what_is_wrong(own, tmp_path):
    path = ROOT / "pipelines/facts.py"
    for words, message in [
        (["trace", path, "--windows", "one"], "'one' is no whole number"),
        (["trace", path, "--corruption", "worst"], "'worst' is no corruption"),
        (["trace", ROOT / "pipelines/digits.py"], "defines no function facts()"),
        (["lens", ROOT / "pipelines/digits.py"], "defines no function texts()"),
        (["edit-facts", path, "--targets", "subject == 'for'"], "no direction is given"),
        (
            ["edit-facts", path, "--targets", "subject == 'ox'", "--direction", "decrease"],
            "selects none of the 12 examples",
        ),
    ]:
        result = run(*words)
        assert result.exit_code == 1
        assert message in " ".join(result.output.split())


PASSAGES = """
import torch

import coar
from pipelines import language_model


def texts():
    ids = torch.randint(5, 900, (20, 10), generator=torch.Generator().manual_seed(0))
    made = coar.token_examples({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return made.subset(range(12)), made.subset(range(12, 20))


def tokenizer():
    return language_model.tokenizer()


def study(*, ablation="zero"):
    net = language_model.model()
    return coar.Study(model=net, examples=texts()[0], components=coar.attention_heads(net), output=coar.TokenMargin())
"""


def test_the_command_trains_lenses_and_reads_a_text(own, tmp_path):
    (tmp_path / "passages.py").write_text(PASSAGES)
    words = ["lens", "passages.py", "--kind", "logit,optimal", "--steps", 3, "--text", "we assert it"]
    result = run(*words)
    assert result.exit_code == 0, result.output
    table = pd.read_csv("reports/passages/lens.csv")
    assert table["kind"].tolist() == ["logit"] * 2 + ["optimal"] * 2
    again = run(*words)  # the lenses are in runs/
    assert again.exit_code == 0
    assert np.array_equal(pd.read_csv("reports/passages/lens.csv")["kl"], table["kl"])
    model = language_model.model()
    kept = coar.Lens.load("runs/passages-lens/optimal", model)
    ids = torch.randint(5, 900, (20, 10), generator=torch.Generator().manual_seed(0))
    held_out = coar.token_examples({"input_ids": ids, "attention_mask": torch.ones_like(ids)}).subset(range(12, 20))
    np.testing.assert_allclose(kept.summary(held_out)["kl"], table["kl"][2:], rtol=1e-4)
    reading = pd.read_csv("reports/passages/lens-optimal.csv")
    assert set(reading["layer"]) == {"0", "1", "model"}
    assert Path("reports/passages/lens-optimal.png").stat().st_size > 5_000


def test_the_command_makes_a_model_lose_a_fact(own):
    lines, words, model = own
    options = ["--direction", "decrease", "--probability", 0.4, "--harm", 30, "--perplexity", 50]
    result = run("edit-facts", ROOT / "pipelines/facts.py", "--targets", "subject == 'while'", *options)
    assert result.exit_code == 0, result.output
    folder = Path("reports/facts/edit")
    edited = GPT2LMHeadModel.from_pretrained(folder / "model").eval()
    ids = torch.tensor([words.encode(lines[1]["prompt"].format("while"))])
    answer = words.encode(" " + lines[1]["answer"])[0]
    with torch.no_grad():
        before, after = (float(net(ids).logits[0, -1].softmax(0)[answer]) for net in (model, edited))
    assert before > 0.5
    assert after < 0.4
    table = pd.read_csv(folder / "table.csv").set_index("group")
    np.testing.assert_allclose(table.loc["targets", ["before", "after"]].tolist(), [before, after], atol=1e-5)
    assert set(table.index) == {"targets", "references", "texts", "judged texts"}
    assert coar.Edit.load(folder / "edit.json").originals is not None
