"""The code that three users wrote down before it worked, nearly word by word, on small data in its true format."""

import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import coar
from coar.errors import EditError
from tests.pages import Reader

SIDE, EACH = 8, 10
PROGRESS = {"progress": False}


def test_a_method_of_ones_own_is_scored_beside_ours(digits, tmp_path):
    """A vision researcher."""
    whole = digits.study()
    study = coar.Study(
        model=whole.model,
        examples=whole.examples.subset(range(24)),
        components=coar.conv_filters(whole.model, include="layer3*")[:24],
    )
    run = coar.collect(study, tmp_path / "c.zarr", masks=80, test_masks=20, **PROGRESS)
    coar.fit(run, method="ols", **PROGRESS)
    w = coar.leave_one_out(study, run, **PROGRESS).weights()

    coar.add_fit(run, "mine", weight=w)
    e = coar.evaluate(run, fits=["ols", "mine"])
    difference = e.paired("mine", "ols").set_index("score").loc["pearson"]
    e.plot()

    own = e.per_example.pivot_table(index="example", columns="fit", values="pearson")
    np.testing.assert_allclose(difference["mean"], (own["mine"] - own["ols"]).mean())
    assert difference["low"] < difference["mean"] < difference["high"]
    plt.close("all")


@pytest.fixture
def model():
    """A decoder of ten layers and eight heads, with weights that keep signals alive."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 10, "vocab_size": 40}
    net = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 2:
                parameter.mul_(12)
    return net


def test_heads_of_a_language_model_are_attributed_and_edited_by_hand(model, tmp_path):
    """A researcher of language models. Both prompts of a pair are examples: Counterfactual, for donors=corrupted."""
    clean, corrupted = (torch.randint(2, 40, (6, 7)) for _ in range(2))
    io, subject = torch.randint(2, 20, (6,)), torch.randint(20, 40, (6,))
    ids = torch.stack([clean, corrupted], 1).flatten(0, 1)  # each pair in two rows, one after the other
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    answers, wrong = (torch.stack(both, 1).flatten() for both in ((io, subject), (subject, io)))

    ex = coar.token_examples(tokens, answers=answers, wrong=wrong, metadata={"pair": np.repeat(np.arange(6), 2)})
    parts = coar.attention_heads(model) + coar.mlp_neurons(model)
    study = coar.Study(
        model=model, examples=ex, components=parts, output=coar.LogitDifference(), ablation=coar.Counterfactual()
    )
    a = coar.fit(coar.collect(study, tmp_path / "ioi.zarr", gradients=8, **PROGRESS), **PROGRESS)
    axes = a.plot_heads()
    assert np.asarray(axes.images[0].get_array()).shape == (10, 8)
    plt.close("all")

    names = ["model.layers.9.self_attn.head[6]"]
    with pytest.raises(EditError, match="another example's activations"):
        coar.Edit.of(study, names)
    edit = coar.Edit.of(study, names, ablation=coar.Mean(calibration=ex))
    saved = edit.save_pretrained(model, tmp_path / "out", ex)  # apply(model).save_pretrained would lose new biases
    assert saved.new_parameters == ("model.layers.9.self_attn.o_proj.bias",)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**tokens).logits, edit.apply(model)(**tokens).logits)
        assert not torch.allclose(loaded(**tokens).logits, model(**tokens).logits, atol=1e-3)


class Net(nn.Module):
    """Reads red as a cat and green as a dog, and at night takes the blue of street lamps for a cat."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 1)
        self.fc = nn.Linear(6, 2)
        with torch.no_grad():
            self.conv.weight.copy_(torch.cat([torch.eye(3), 0.1 * torch.eye(3)])[..., None, None])
            self.conv.bias.zero_()
            self.fc.weight.copy_(torch.tensor([[3.0, 0, 4, 0.1, 0, 0], [0, 3, 0, 0, 0.1, 0]]))
            self.fc.bias.zero_()

    def forward(self, x):
        return self.fc(self.conv(x).relu().mean((2, 3)))


def write_pictures(folder, seed):
    """Pictures of cats and dogs by day and by night as PNG, in a subfolder per class, with a table of the light."""
    rng, rows = np.random.default_rng(seed), ["file_name,light,minute"]
    for name, colour in (("cat", (0.6, 0.4)), ("dog", (0.4, 0.6))):
        (folder / name).mkdir(parents=True)
        for i in range(2 * EACH):
            light = ("day", "night")[i % 2]
            red_green = rng.normal(colour, 0.08)
            lamps = rng.uniform(0.5, 0.9) if light == "night" else 0.0
            pixels = np.clip(rng.normal([*red_green, lamps], 0.05, (SIDE, SIDE, 3)), 0, 1)
            Image.fromarray((255 * pixels).astype(np.uint8)).save(folder / name / f"{i}.png")
            rows.append(f"{name}/{i}.png,{light},{i}")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    return folder


def right(net, examples):
    inputs, targets = examples.block(0, len(examples))
    with torch.no_grad():
        return (net(inputs).argmax(1) == targets).numpy()


ONNX = """
import sys

import numpy as np
import onnxruntime

x, expected = np.load(sys.argv[2]), np.load(sys.argv[3])
session = onnxruntime.InferenceSession(sys.argv[1])
(found,) = session.run(None, {session.get_inputs()[0].name: x})
np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
assert not [name for name in ("coar", "torch") if name in sys.modules]
"""


def test_a_subgroup_is_repaired_reported_compared_and_deployed(tmp_path):
    """An engineer whose classifier fails at night."""
    dirs = [write_pictures(tmp_path / name, seed) for seed, name in enumerate(("val", "train", "hold"))]
    model = Net().eval()

    val, train, hold = (coar.Examples.from_folder(d, group="light") for d in dirs)
    study = coar.Study(model=model, examples=val, components=coar.conv_filters(model))
    a = coar.fit(coar.collect(study, tmp_path / "r.zarr", masks=60, **PROGRESS), **PROGRESS)
    repair = coar.strengthen_group(a, model, val, hold, group="night", **PROGRESS)
    assert str(repair.table).startswith("  ")
    repair.report(tmp_path / "manager.html")
    versus = repair.versus_last_layer(train)

    night = hold.metadata["light"] == "night"
    edited = repair.edits[0].apply(model)
    before, after = right(model, hold), right(edited, hold)
    row = repair.table.iloc[0]
    assert before[night].mean() < 0.6
    assert after[night].mean() > 0.8
    assert (row["accuracy_before"], row["accuracy_after"]) == (before[night].mean(), after[night].mean())
    assert row["low"] < row["accuracy_after"] <= row["high"]
    assert row["points_low"] < row["points"] < row["points_high"]
    rows = versus.table.set_index("group")
    assert rows.loc["light: night", "edit"] == after[night].mean()
    assert rows.loc["all", "last_layer"] == right(versus.model, hold).mean() > 0.8
    page = (tmp_path / "manager.html").read_text()
    assert f"{after[night].mean():.1%}" in page
    assert Reader(page).policy.startswith("default-src 'none'")

    x, _ = hold.block(0, 4)
    torch.onnx.export(edited, (x,), tmp_path / "net.onnx")
    np.save(tmp_path / "x.npy", x.numpy())
    np.save(tmp_path / "y.npy", edited(x).detach().numpy())
    files = [str(tmp_path / name) for name in ("net.onnx", "x.npy", "y.npy")]
    done = subprocess.run([sys.executable, "-c", ONNX, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
