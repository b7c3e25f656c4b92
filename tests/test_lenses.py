"""Lenses against loops over the modules of each family, an independent optimiser, and interrupted training."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.optimize
import torch
from torch import nn

import coar
from coar.errors import ComponentError, MismatchError, SettingsError, WeightsError
from coar.lenses.layer_stack import LayerStack
from tests import edge_oracle, tiny

KINDS = ("logit", "mean", "tuned", "optimal")
LENGTHS = (6, 4, 5)


def texts(rows=3, seed=0):
    """Texts of several lengths, padded on the right."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, edge_oracle.WORDS, (rows, max(LENGTHS)), generator=draw)
    mask = torch.stack([torch.arange(max(LENGTHS)) < LENGTHS[i % len(LENGTHS)] for i in range(rows)]).long()
    return coar.token_examples({"input_ids": ids * mask, "attention_mask": mask})


def plain(family, model, examples, row):
    """What every writer of a family writes in one text, and its logits, position by position."""
    written = {}
    ids = examples.inputs["input_ids"][row][: LENGTHS[row % len(LENGTHS)]]
    logits = edge_oracle.logits(family, model, ids, lambda *_: 1.0, lambda *_: None, written=written)
    return written, logits


def attention_outputs(family, model, written, position):
    """(layers, width) what each layer's attention adds to the residual stream, with its bias."""
    found = []
    for number, layer in enumerate(edge_oracle.layers_of(family, model)):
        heads = [value for (label, t), value in written.items() if t == position and label.startswith(f"L{number}.H")]
        found.append(sum(heads) + layer.out_bias if heads else written[f"L{number}.attn", position])
    return torch.stack(found)


def states(family, model, written, position):
    """(layers, width) residual stream before each layer."""
    stream, found = written["embed", position], []
    for number, added in enumerate(attention_outputs(family, model, written, position)):
        found.append(stream)
        stream = stream + added + written[f"L{number}.mlp", position]
    return torch.stack(found)


def continued(family, model, x, start, constants):
    """Logits of (tokens, width) latents whose later attention outputs are constants."""
    for layer, constant in zip(edge_oracle.layers_of(family, model)[start:], constants, strict=True):
        read = x if layer.parallel else x + constant
        x = x + constant + layer.after_mlp(layer.mlp(layer.mlp_norm(read)))
    return edge_oracle.finish(family, model, x)


@pytest.mark.parametrize("family", edge_oracle.MODELS)
def test_latents_and_continued_logits_are_those_of_loops(family):
    model, examples = edge_oracle.build(family), texts()
    stack = LayerStack(model)
    passed = stack.latents(examples.inputs)
    pairs = list(zip(passed.text.tolist(), passed.position.tolist(), strict=True))
    assert pairs == [(row, t) for row, length in enumerate(LENGTHS) for t in range(1, length)]
    by_row = [plain(family, model, examples, row) for row in range(len(LENGTHS))]
    for number, (row, t) in enumerate(pairs):
        written, logits = by_row[row]
        torch.testing.assert_close(passed.logits[number], logits[t], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(passed.states[:, number], states(family, model, written, t), rtol=1e-4, atol=1e-4)
        expected = attention_outputs(family, model, written, t)
        torch.testing.assert_close(passed.attention[:, number], expected, rtol=1e-4, atol=1e-4)
    draw = torch.Generator().manual_seed(1)
    for start in range(len(stack) + 1):
        constants = torch.randn(len(stack) - start, stack.width, generator=draw)
        latents = passed.states[min(start, len(stack) - 1)]
        expected = continued(family, model, latents, start, constants)
        torch.testing.assert_close(stack.continued(latents, start, constants), expected, rtol=1e-4, atol=1e-4)


def test_texts_padded_on_the_left_have_the_same_latents():
    model, right = edge_oracle.build("llama"), texts()
    mask = right.inputs["attention_mask"]
    shift = [max(LENGTHS) - int(n) for n in mask.sum(1)]
    left = {
        name: torch.stack([torch.roll(row, by) for row, by in zip(right.inputs[name], shift, strict=True)])
        for name in ("input_ids", "attention_mask")
    }
    stack = LayerStack(model)
    expected, found = stack.latents(right.inputs), stack.latents(coar.token_examples(left).inputs)
    torch.testing.assert_close(found.states, expected.states, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def model():
    return edge_oracle.build("gpt2")


@pytest.fixture(scope="module")
def learning():
    return texts(12, seed=3)


def expected_lens(kind, model, examples):
    """Latents of each layer, with the mean of each layer's attention over all tokens that are read."""
    found = []
    for row in range(len(examples)):
        written, logits = plain("gpt2", model, examples, row)
        for t in range(1, len(logits)):
            pair = states("gpt2", model, written, t), attention_outputs("gpt2", model, written, t)
            found.append((row, *pair, logits[t]))
    return found


def divergence(p, q):
    """KL(p || q) of logits, one token at a time."""
    return np.array(
        [float((a.softmax(0) * (a.log_softmax(0) - b.log_softmax(0))).sum()) for a, b in zip(p, q, strict=True)]
    )


@pytest.mark.parametrize("kind", ["logit", "mean"])
def test_lenses_without_training_are_those_of_loops(kind, model, learning):
    made = coar.lens(model, learning, kind, progress=False)
    known = expected_lens(kind, model, learning)
    means = torch.stack([attention for _, _, attention, _ in known]).mean(0)
    table = made.divergence(learning)
    assert table.groupby("layer").size().tolist() == [len(learning)] * edge_oracle.LAYERS
    for layer in range(edge_oracle.LAYERS):
        x, logits = torch.stack([s[layer] for _, s, _, _ in known]), torch.stack([full for *_, full in known])
        start = layer if kind == "mean" else edge_oracle.LAYERS
        expected = continued("gpt2", model, x, start, means[start:])
        torch.testing.assert_close(made.logits(x, layer), expected, rtol=1e-4, atol=1e-4)
        by_token, rows = divergence(logits, expected), np.array([row for row, *_ in known])
        by_text = [by_token[rows == row].mean() for row in range(len(learning))]
        np.testing.assert_allclose(table.query("layer == @layer")["kl"], by_text, rtol=1e-3, atol=1e-5)


def test_optimal_constants_reach_the_minimum_of_an_independent_optimiser(model, learning):
    made = coar.lens(model, learning, "optimal", layers=[1], steps=400, texts_per_step=12, progress=False)
    known = expected_lens("optimal", model, learning)
    x, logits = torch.stack([s[1] for _, s, _, _ in known]), torch.stack([full for *_, full in known])
    logs = logits.log_softmax(1)

    def loss(values):
        constants = torch.tensor(values, dtype=torch.float32).view(1, -1).requires_grad_()
        lens = continued("gpt2", model, x, 1, constants).log_softmax(1)
        kl = (logs.exp() * (logs - lens)).sum(1).mean()
        kl.backward()
        return float(kl.detach()), constants.grad.double().numpy().ravel()

    start = torch.stack([attention[1] for _, _, attention, _ in known]).mean(0).double().numpy()
    best = scipy.optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 500}).fun
    reached = divergence(logits, made.logits(x, 1)).mean()
    assert best < 0.9 * loss(start)[0]  # means are worse
    assert reached == pytest.approx(best, rel=0.01)


def test_a_tuned_lens_starts_at_the_logit_lens_and_improves(model, learning):
    logit = coar.lens(model, learning, "logit", progress=False).summary(learning)
    still = coar.lens(model, learning, "tuned", steps=1, learning_rate=0.0, progress=False).summary(learning)
    np.testing.assert_allclose(still["kl"], logit["kl"], rtol=1e-5)
    tuned = coar.lens(model, learning, "tuned", steps=100, texts_per_step=12, progress=False).summary(learning)
    assert (tuned["kl"] < 0.8 * logit["kl"]).all()
    assert ((tuned["low"] < tuned["kl"]) & (tuned["kl"] < tuned["high"])).all()


class Stopping(nn.Module):
    """A language model that is interrupted after a number of passes over texts of more than one token."""

    def __init__(self, body, passes):
        super().__init__()
        self.body, self.left = body, passes

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        if input_ids.shape[1] > 1:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        return self.body(input_ids, attention_mask=attention_mask)


@pytest.mark.parametrize("kind", ["optimal", "tuned"])
def test_interrupted_training_continues_to_the_same_lens(kind, model, learning, tmp_path):
    def make(passes, folder):
        settings = {"steps": 8, "texts_per_step": 5, "seed": 4, "folder": folder, "progress": False}
        return coar.lens(Stopping(model, passes), learning, kind, **settings)

    whole = make(1000, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        make(6, tmp_path / "parts")
    assert {file.name for file in (tmp_path / "parts").iterdir()} == {"lens.json", "checkpoint.safetensors"}
    continued = make(1000, tmp_path / "parts")
    assert {file.name for file in (tmp_path / "parts").iterdir()} == {"lens.json", "lens.safetensors"}
    read = coar.Lens.load(tmp_path / "whole", Stopping(model, 1000))
    assert read.facts == whole.facts
    x = torch.randn(5, edge_oracle.WIDTH, generator=torch.Generator().manual_seed(0))
    for layer in whole.layers:
        assert torch.equal(whole.logits(x, layer), continued.logits(x, layer))
        assert torch.equal(whole.logits(x, layer), read.logits(x, layer))


def test_a_finished_lens_is_returned_and_another_call_refused(model, learning, tmp_path):
    first = coar.lens(model, learning, "mean", folder=tmp_path, progress=False)
    before = (tmp_path / "lens.safetensors").stat().st_mtime_ns
    again = coar.lens(model, learning, "mean", folder=tmp_path, progress=False)
    assert (tmp_path / "lens.safetensors").stat().st_mtime_ns == before
    assert again.facts == first.facts
    with pytest.raises(MismatchError, match="kind 'mean' there, 'logit' here"):
        coar.lens(model, learning, "logit", folder=tmp_path, progress=False)
    with pytest.raises(WeightsError, match="was made for weights"):
        coar.Lens.load(tmp_path, edge_oracle.build("gpt2", seed=1))
    (tmp_path / "lens.json").write_text("{")
    with pytest.raises(WeightsError, match="holds no lens"):
        coar.Lens.load(tmp_path, model)


class Words:
    """A tokenizer whose tokens are letters."""

    def __call__(self, text, *, return_tensors):
        return {"input_ids": torch.tensor([[ord(letter) - ord("a") for letter in text]])}

    def decode(self, token_ids):
        return "".join(chr(ord("a") + token) for token in token_ids)


def test_a_text_is_read_as_tables_and_a_heat_map(model, learning):
    made = coar.lens(model, learning, "optimal", steps=2, progress=False)
    reading = made.read("badge", Words(), top=3)
    assert reading.table.columns.tolist() == ["layer", "position", "token", "rank", "prediction", "probability"]
    ids = torch.tensor([[1, 0, 3, 6, 4]])
    with torch.no_grad():
        probabilities = model(ids).logits[0].softmax(1)
        latents = model(ids, output_hidden_states=True).hidden_states
    for layer in (0, 1, "model"):
        for t in range(1, 5):
            rows = reading.table.query("layer == @layer and position == @t")
            lens = (
                probabilities[t] if layer == "model" else made.logits(latents[layer][0, t : t + 1], layer).softmax(1)[0]
            )
            best = lens.topk(3)
            np.testing.assert_allclose(rows["probability"], best.values, rtol=1e-4)
            assert rows["prediction"].tolist() == [chr(ord("a") + int(token)) for token in best.indices]
            assert rows["token"].tolist() == ["badge"[t]] * 3
    assert reading.grid().shape == (3, 4)
    axes = plt.figure().subplots()
    assert reading.plot(axes) is axes
    shown = [text.get_text() for text in axes.texts]
    assert shown == [word for row in reading.grid().to_numpy() for word in row]
    plt.close("all")
    assert all(f"<td>{word}</td>" in reading._repr_html_() for word in shown)
    assert "Lens of kind" in made._repr_html_()
    assert f"<td>{made.facts['weights']}</td>" in made._repr_html_()
    numbers = made.read(ids[0], top=1)
    assert set(numbers.table["token"]) == {"0", "3", "6", "4"}


def test_what_has_no_lens_is_refused(model, learning):
    with pytest.raises(SettingsError, match="'best' is no kind of lens; choose one of optimal, mean, tuned, logit"):
        coar.lens(model, learning, "best")
    with pytest.raises(SettingsError, match=r"layers \[2\] were given; choose among 0 to 1"):
        coar.lens(model, learning, layers=[0, 2])
    made = coar.lens(model, learning, "logit", layers=[1], progress=False)
    with pytest.raises(SettingsError, match=r"layer 0 has no lens; choose one of \(1,\)"):
        made.logits(torch.zeros(1, edge_oracle.WIDTH), 0)
    with pytest.raises(SettingsError, match="a text was given without a tokenizer"):
        made.read("badge")
    with pytest.raises(SettingsError, match="at least 2 are needed"):
        made.read(torch.tensor([3]))
    with pytest.raises(ComponentError):
        coar.lens(tiny.model("bert"), learning)


class Skipping(nn.Module):
    """A language model that adds its embedding again after its layers, which no latent shows."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, input_ids):
        return self.body(input_ids).logits + self.body.transformer.wte(input_ids) @ self.body.transformer.wte.weight.T


def test_a_model_whose_end_reads_more_than_the_stream_is_refused(model, learning):
    with pytest.raises(ComponentError, match="a lens needs a model whose later layers depend on the residual stream"):
        coar.lens(
            Skipping(model), coar.Examples(inputs=learning.inputs["input_ids"], targets=learning.targets), "logit"
        )


@pytest.mark.parametrize("directions", ["random", "singular"])
def test_steering_moves_the_model_and_the_lens_alike(directions, model, learning):
    made = coar.lens(model, learning, "mean", progress=False)
    table = made.steering(learning, 1, directions=directions, count=3, kl=0.2)
    assert table.groupby("direction")["kl_lens"].mean().to_numpy() == pytest.approx([0.2] * 3, rel=1e-3)
    known = expected_lens("mean", model, learning)
    means = torch.stack([attention[1] for _, _, attention, _ in known]).mean(0)[None]
    last = [[s[1] for row, s, _, _ in known if row == text][-1] for text in range(len(learning))]
    x = torch.stack(last)

    def lens(latents):
        return continued("gpt2", model, latents, 1, means)

    if directions == "random":
        drawn = torch.randn(3, edge_oracle.WIDTH, generator=torch.Generator().manual_seed(0))
        vectors = drawn / drawn.norm(dim=1, keepdim=True)
    else:
        jacobian = torch.func.jacrev(lambda h: lens(h[None])[0])(x.mean(0))
        vectors = torch.linalg.svd(jacobian - jacobian.mean(0)).Vh[:3]
    for number, vector in enumerate(vectors):
        rows = table[table["direction"] == number]
        errors = []
        for sign in (1, -1):  # of a singular vector, which is free

            def excess(length, sign=sign, vector=vector):
                return divergence(lens(x), lens(x + sign * length * vector)).mean() - 0.2

            length = scipy.optimize.brentq(excess, 1e-3, 100)
            kl = divergence(lens(x), lens(x + sign * length * vector))
            errors.append((np.abs(kl - rows["kl_lens"]).max(), sign * length))
        error, length = min(errors)
        assert error < 2e-3
        for text, kl, similarity in zip(rows["text"], rows["kl_model"], rows["similarity"], strict=True):
            ids = learning.inputs["input_ids"][text][: LENGTHS[text % len(LENGTHS)]]

            def moved(module, args, length=length, vector=vector):
                return (torch.cat([args[0][:, :-1], args[0][:, -1:] + length * vector], 1), *args[1:])

            plain_logits = model(ids[None]).logits[0, -1:]
            handle = model.transformer.h[1].register_forward_pre_hook(moved)
            logits = model(ids[None]).logits[0, -1:]
            handle.remove()
            assert kl == pytest.approx(divergence(plain_logits, logits)[0], rel=0.02, abs=1e-4)
            h = x[text : text + 1]
            changes = [
                b.softmax(1) - a.softmax(1) for a, b in ((plain_logits, logits), (lens(h), lens(h + length * vector)))
            ]
            assert similarity == pytest.approx(float(torch.cosine_similarity(*changes)), abs=0.02)
