"""Models from public reports about other tools: each gives what plain passes of its own give, or is refused in words.

Every case is a model of a few lines with what the report describes, named `owner/repository #number` on GitHub. The
oracle is the user's own model, run on one example at a time with plain hooks.
"""

from contextlib import ExitStack, contextmanager

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import coar
from coar.errors import AblationError, EditError, ExamplesError, MismatchError, OutputError
from tests import tiny

EXAMPLES, FEATURES, HIDDEN, CLASSES, MASKS = 8, 6, 8, 4, 6
TARGETS = torch.arange(EXAMPLES) % CLASSES


def numbers(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def strong(model):
    """The model in evaluation mode, with weights that make every unit matter."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 1.5 / fan**0.5)
    return model.eval()


class Net(nn.Module):
    """Two hidden layers and a last one; `way` is how the forward pass uses them."""

    def __init__(self, way=lambda net, x: net.last(net.two(net.one(x).tanh()).tanh())):
        super().__init__()
        self.one, self.two, self.last = (
            nn.Linear(FEATURES, HIDDEN),
            nn.Linear(HIDDEN, HIDDEN),
            nn.Linear(HIDDEN, CLASSES),
        )
        self.way = way

    def forward(self, x):
        return self.way(self, x)


def study(model, inputs, components, targets=TARGETS, **settings):
    examples = coar.Examples(inputs=inputs, targets=targets)
    sampler = coar.BernoulliSampler(ablated_fraction=0.4)
    parts = {"ablation": coar.ZeroActivation(), "sampler": sampler, **settings}
    return coar.Study(model=model, examples=examples, components=components, **parts)


def collect(what, folder, masks=MASKS, **settings):
    return coar.collect(what, folder / "run.zarr", masks=masks, device="cpu", progress=False, **settings)


def gate(row, keep, y):
    """The module's first tensor with the component's slice times `keep`."""
    if not isinstance(y, torch.Tensor):
        return type(y)([gate(row, keep, y[0]), *y[1:]])
    if row.size == 0 or row.side == "module":
        return y * keep
    factor = torch.ones(y.shape[row.axis]).index_put(
        (torch.arange(row.position, row.position + row.size),), keep * torch.ones(row.size)
    )
    return y * factor.view(-1, *[1] * (-row.axis - 1 if row.axis < 0 else y.ndim - row.axis - 1))


@contextmanager
def gated(model, components, keeps):
    """Plain hooks on the user's model that multiply what components give."""
    with ExitStack() as stack:
        for row, keep in zip(components, keeps, strict=True):
            module = model.get_submodule(row.site)
            if row.side == "input":
                hook = lambda _m, args, row=row, keep=keep: (gate(row, keep, args[0]), *args[1:])  # noqa: E731
                stack.callback(module.register_forward_pre_hook(hook).remove)
            else:
                hook = lambda _m, _args, y, row=row, keep=keep: gate(row, keep, y)  # noqa: E731
                stack.callback(module.register_forward_hook(hook).remove)
        yield


def one_by_one(model, inputs):
    """(examples, classes) logits of a model that is run on one example at a time."""
    rows = []
    for i in range(EXAMPLES):
        one = {k: v[i : i + 1] for k, v in inputs.items()} if isinstance(inputs, dict) else inputs[i : i + 1]
        found = model(**one) if isinstance(inputs, dict) else model(one)
        rows.append(found if isinstance(found, torch.Tensor) else found["logits"])
    return torch.cat(rows)


def margin(logits, targets=TARGETS):
    others = logits.clone()
    others[torch.arange(len(logits)), targets] = -torch.inf
    return logits[torch.arange(len(logits)), targets] - others.logsumexp(1)


# A. Gates that other tools lose on the way to the output.


def untouched(_model):
    pass


def compiled_and_called(net):
    net.forward = torch.compile(net.forward, backend="eager")
    net(numbers(EXAMPLES, FEATURES))


def overloaded(net):
    old = net.two.forward
    net.two.forward = lambda x: 2 * old(x + 1)


def called_by_forward(net, x):
    return net.last(net.two.forward(net.one.forward(x).tanh()).tanh())


def checkpointed(net, x):
    h = checkpoint(lambda x: net.one(x).tanh(), x, use_reentrant=False)
    return net.last(checkpoint(lambda h: net.two(h).tanh(), h, use_reentrant=False))


# B. Examples that do not lie on the first axis.


class SequenceFirst(nn.Module):
    """torch's LSTM in its default layout, (positions, texts, features), and a layer on its states."""

    def __init__(self):
        super().__init__()
        self.body, self.states = nn.LSTM(FEATURES, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.last = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x):
        h = self.states(self.body(x.transpose(0, 1))[0]).tanh()
        return self.last(h.mean(0))


class Documents(nn.Module):
    """Sentences of all documents are one batch of an encoder; a document is a mean of its sentences."""

    def __init__(self):
        super().__init__()
        self.encode, self.mix = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.last = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x):
        sentences = x.view(-1, FEATURES)
        h = self.encode(sentences).tanh().view(len(x), -1, HIDDEN).mean(1)
        return self.last(self.mix(h).tanh())


# D, E. Models that other tools cannot copy.


class KeepsAttention(Net):
    """Keeps what it computes for later inspection, with its graph."""

    def forward(self, x):
        self.intensity = self.one(x).tanh()
        self.kept = [self.intensity, {"attention": self.two(self.intensity)}]
        return self.last(self.kept[1]["attention"].tanh())


class Subclass(torch.Tensor):
    """A subclass of tensors that has no method of its own, as of fastai and docarray."""


def with_subclass(net):
    with torch.no_grad():
        net.two.weight = nn.Parameter(net.two.weight.detach().as_subclass(Subclass))


class OwnWeightNorm(nn.Module):
    """Weight normalisation by hand: the weight is computed before each pass, and stays on the layer with its graph."""

    def __init__(self, size):
        super().__init__()
        self.inner = nn.Linear(size, size)
        weight = self.inner.weight.detach()
        del self.inner._parameters["weight"]
        self.length, self.direction = nn.Parameter(weight.norm(dim=1)), nn.Parameter(weight)

    def forward(self, x):
        self.inner.weight = self.length[:, None] * functional.normalize(self.direction, dim=1)
        return self.inner(x)


def weight_normed(net):
    net.two = strong(OwnWeightNorm(HIDDEN))
    net(numbers(2, FEATURES))


# G. Layers that are not linear in their weight.


class StdConv2d(nn.Conv2d):
    """A convolution that standardises its weight in every pass."""

    def forward(self, x):
        variance, mean = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
        return self._conv_forward(x, (self.weight - mean) / (variance + 1e-5).sqrt(), self.bias)


class ScaledStdConv2d(StdConv2d):
    """One with a gain per filter and a fixed scale."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.gain, self.scale = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1)), self.weight[0].numel() ** -0.5

    def forward(self, x):
        variance, mean = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
        weight = self.gain * self.scale * (self.weight - mean) / (variance + 1e-5).sqrt()
        return self._conv_forward(x, weight, self.bias)


class StdNet(nn.Module):
    def __init__(self, kind=StdConv2d):
        super().__init__()
        self.conv, self.last = kind(3, HIDDEN, 3), nn.Linear(HIDDEN, CLASSES)

    def forward(self, x):
        return self.last(self.conv(x).tanh().mean((2, 3)) * 4)


# K. Heads of torch's attention, whose projection is never called.


class TorchAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.attention = nn.Linear(FEATURES, HIDDEN), nn.MultiheadAttention(HIDDEN, 2, batch_first=True)
        self.last = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x):
        h = self.inp(x)
        return self.last(self.attention(h, h, h, need_weights=False)[0].mean(1))


class TorchEncoder(nn.Module):
    """torch's encoder layer, which takes a fused path in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.inp, self.last = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, CLASSES)
        self.layer = nn.TransformerEncoderLayer(HIDDEN, 2, 12, batch_first=True)

    def forward(self, x):
        return self.last(self.layer(self.inp(x)).mean(1))


ROWS, TEXTS, PICTURES = numbers(EXAMPLES, FEATURES), numbers(EXAMPLES, 5, FEATURES), numbers(EXAMPLES, 3, 6, 6)
HIDDEN_LAYERS = lambda model: coar.neurons(model, include=["one", "two"])  # noqa: E731
EXACT = {  # the report: the model, what is done to it, its inputs, its components
    "pytorch/pytorch #117758": (Net, compiled_and_called, ROWS, HIDDEN_LAYERS),
    "pytorch/pytorch #117265": (Net, overloaded, ROWS, HIDDEN_LAYERS),
    "stanfordnlp/pyvene #231": (lambda: Net(checkpointed), untouched, ROWS, HIDDEN_LAYERS),
    "meta-pytorch/captum #427": (SequenceFirst, untouched, TEXTS, lambda m: coar.neurons(m, include="states")),
    "meta-pytorch/captum #329": (Documents, untouched, TEXTS, lambda m: coar.neurons(m, include=["encode", "mix"])),
    "sktime/sktime #10928": (KeepsAttention, lambda m: m(ROWS), ROWS, HIDDEN_LAYERS),
    "fastai/fastai #3882": (Net, with_subclass, ROWS, HIDDEN_LAYERS),
    "locuslab/deq #23": (Net, weight_normed, ROWS, lambda m: coar.neurons(m, include=["one", "two.inner"])),
    "jeonsworld/ViT-pytorch #21": (StdNet, untouched, PICTURES, coar.conv_filters),
    "vballoli/nfnets-pytorch #10": (lambda: StdNet(ScaledStdConv2d), untouched, PICTURES, coar.conv_filters),
    "pytorch/pytorch #128413": (TorchEncoder, untouched, TEXTS, lambda m: coar.neurons(m, include="layer.linear1")),
}


@pytest.mark.parametrize("report", EXACT)
def test_a_reported_model_gives_what_its_own_plain_passes_give(report, tmp_path):
    make, change, inputs, find = EXACT[report]
    model, plain = strong(make()), strong(make())
    change(model)
    if change is not compiled_and_called:
        change(plain)
    components = find(model)
    what = study(model, inputs, components)
    run = collect(what, tmp_path, gradients=8)
    expected = []
    for mask in run.masks(0, MASKS):
        with torch.no_grad(), gated(plain, components, torch.tensor(mask).float()):
            expected.append(margin(one_by_one(plain, inputs)).numpy())
    assert np.std(expected, 0).min() > 0.01
    assert np.allclose(run.array("outputs")[:], expected, atol=1e-4)
    gates = torch.ones(len(components), requires_grad=True)
    with gated(plain, components, gates):
        margins = margin(one_by_one(plain, inputs))
        slopes = torch.stack([torch.autograd.grad(one, gates, retain_graph=True)[0] for one in margins])
    found = coar.mask_gradient(what, run, device="cpu", progress=False).weights()
    assert np.allclose(found, slopes, atol=1e-4)


def test_layers_whose_forward_is_called_directly_are_ablated_in_weights_alone(tmp_path):
    """numenta/nupic.torch #51, pytorch/executorch #16456: hooks are not called there."""
    model = strong(Net(called_by_forward))
    what = study(model, ROWS, HIDDEN_LAYERS(model))
    run = collect(what, tmp_path)
    by_call = strong(Net())
    for mask, found in zip(run.masks(0, MASKS), run.array("outputs")[:], strict=True):
        with torch.no_grad(), gated(by_call, what.components, torch.tensor(mask).float()):
            assert np.allclose(found, margin(one_by_one(by_call, ROWS)), atol=1e-4)
    with pytest.raises(AblationError, match="'one' was not called"):
        collect(what, tmp_path / "other", gradients=8)


class Reshaped(nn.Module):
    """An attention-like block whose hook point gets a reshaped view that the forward pass then drops."""

    def __init__(self):
        super().__init__()
        self.inp, self.point, self.last = nn.Linear(FEATURES, HIDDEN), nn.Identity(), nn.Linear(HIDDEN, CLASSES)

    def forward(self, x):
        h = self.inp(x).tanh()
        self.point(h.view(len(h), 2, -1))
        return self.last(h)


def test_a_hook_point_whose_result_is_dropped_has_no_weight_and_is_named(tmp_path, caplog):
    """TransformerLensOrg/TransformerLens #1750."""
    model = strong(Reshaped())
    run = collect(study(model, ROWS, coar.modules(model, ["point"])), tmp_path)
    assert (np.ptp(run.array("outputs")[:], 0) == 0).all()
    assert "changes when all that module 'point', a Identity, returns is 0" in caplog.text


# C. Models that are no function of one example.


class RandomState(nn.Module):
    """A GRU whose first state is drawn in every pass."""

    def __init__(self):
        super().__init__()
        self.body, self.last = nn.GRU(FEATURES, HIDDEN, batch_first=True), nn.Linear(HIDDEN, CLASSES)

    def forward(self, x):
        return self.last(self.body(x, torch.randn(1, len(x), HIDDEN))[0].mean(1))


def functional_dropout(net, x):
    return net.last(functional.dropout(net.two(net.one(x).tanh()).tanh(), 0.1, training=True))


class MeanOfPadded(nn.Module):
    """A text is the mean of its states up to the longest text of the batch, padding included."""

    def __init__(self):
        super().__init__()
        self.words, self.mid, self.last = nn.Embedding(9, HIDDEN, 0), nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, 4)

    def forward(self, x):
        longest = int((x != 0).sum(1).max())
        return self.last(self.mid(self.words(x[:, :longest])).tanh().mean(1))


LENGTHS = 2 + torch.arange(EXAMPLES) % 5
WORDS = (1 + torch.arange(EXAMPLES * 6).view(EXAMPLES, 6) % 8) * (torch.arange(6) < LENGTHS[:, None])
NOT_ALONE = {
    "meta-pytorch/captum #741": (RandomState, TEXTS, "last", "random", "second pass"),
    "Coderx7/SimpleNet #2": (lambda: Net(functional_dropout), ROWS, ["one", "two"], "random", "second pass"),
    "huggingface/transformers #17463": (MeanOfPadded, WORDS, "mid", "batch", "other examples are in its batch"),
}


@pytest.mark.parametrize("report", NOT_ALONE)
def test_a_reported_model_that_is_no_function_of_one_example_is_refused(report, tmp_path):
    make, inputs, include, check, message = NOT_ALONE[report]
    model = strong(make())
    with pytest.raises(AblationError, match=f"{message}.*accept=\\('{check}',\\)"):
        collect(study(model, inputs, coar.neurons(model, include=include)), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [StdConv2d, ScaledStdConv2d])
def test_an_edit_of_a_part_of_a_standardised_filter_is_refused(kind, tmp_path):
    """jeonsworld/ViT-pytorch #21, vballoli/nfnets-pytorch #10: half a weight is a whole one after standardising."""
    model = strong(StdNet(kind))
    what = study(model, PICTURES, coar.conv_filters(model))
    whole, half = (coar.Edit.of(what, what.components.names[:2], strength=strength) for strength in (1.0, 0.5))
    with torch.no_grad(), gated(model, whole.components, [0.0] * 2):
        expected = model(PICTURES)
    assert torch.allclose(whole.apply(model)(PICTURES), expected, atol=1e-5)
    with pytest.raises(EditError, match="computes its weight"):
        half.apply(model)


# E. Weights that are packed.


@pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated",
    "ignore:torch.quantize_per_tensor",
    "ignore:quantized..linear_dynamic. an autograd kernel was not registered",
)
def test_a_packed_layer_is_ablated_at_its_output(tmp_path):
    """pytorch/pytorch #28328: a model with quantised weights that is to be copied."""
    model = torch.ao.quantization.quantize_dynamic(strong(Net()), {"last"}, dtype=torch.qint8)
    what = study(model, ROWS, HIDDEN_LAYERS(model), accept=("batch",))  # the scale of its input is the batch's
    run = collect(what, tmp_path)
    for mask, found in zip(run.masks(0, MASKS), run.array("outputs")[:], strict=True):
        with torch.no_grad(), gated(model, what.components, torch.tensor(mask).float()):
            assert np.allclose(found, margin(model(ROWS)), atol=1e-4)


# F. The same weights in another model.


class Resized(Net):
    """A net that is built with the size to which it resizes its inputs."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, x):
        x = functional.interpolate(x[:, None], self.size, mode="linear")[:, 0]
        return super().forward(functional.interpolate(x[:, None], FEATURES)[:, 0])


def more_weights(model):
    with torch.no_grad():
        model.last.weight[0, 0] += 1e-3


OTHER = {
    "brain-score/vision #2503": (lambda: Resized(4), lambda: Resized(5), "settings of module ''"),
    "huggingface/lighteval #1364": (Net, Net, "weights"),
}


@pytest.mark.parametrize("report", OTHER)
def test_results_of_one_model_are_not_taken_for_those_of_another(report, tmp_path):
    make, other, word = OTHER[report]
    one, two = strong(make()), strong(other())
    if word == "weights":
        more_weights(two)
    collect(study(one, ROWS, HIDDEN_LAYERS(one)), tmp_path)
    with pytest.raises(MismatchError, match=word):
        collect(study(two, ROWS, HIDDEN_LAYERS(two)), tmp_path, masks=12)


# H. Padding.


def texts_with_padding(side):
    """Words with padding on a side, where the padding's number is that of a word too, and what to attend to."""
    mask = torch.arange(6) < LENGTHS[:, None]
    mask = mask.flip(1) if side == "left" else mask
    return {
        "input_ids": torch.where(mask, 1 + torch.arange(EXAMPLES * 6).view(EXAMPLES, 6) % 8, 0),
        "attention_mask": mask.long(),
    }


PADDED = {
    "NVIDIA-NeMo/Automodel #3704": ("gpt2", "left"),
    "Biohub/esm #299": ("bert", "right"),
}


@pytest.mark.parametrize("report", PADDED)
def test_means_leave_out_padding_on_any_side(report):
    kind, side = PADDED[report]
    body, inputs = tiny.lively(tiny.MODELS[kind]()), texts_with_padding(side)
    site = tiny.PROJECTION[kind][0].format(1).removeprefix("body.")
    seen, module = [], body.get_submodule(site)
    handle = module.register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach()[0]))
    for i in range(EXAMPLES):
        real = inputs["attention_mask"][i] == 1
        body(inputs["input_ids"][i : i + 1, real])
    handle.remove()
    if side == "left":  # positions of a text without padding begin with 0
        inputs |= {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)}
    calibration = coar.Examples(inputs=inputs, targets=TARGETS)
    found = coar.Mean(calibration=calibration).replacements(body, coar.input_features(body, include=site), batch_size=5)
    assert torch.allclose(found, torch.cat(seen).mean(0), atol=1e-5)


# I. Biases that a library drops.


def llama():
    config = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    return tiny.lively(transformers.LlamaForCausalLM(transformers.LlamaConfig(**config, vocab_size=12)))


@pytest.mark.parametrize("site", ["*o_proj", "*down_proj"], ids=["przemek-arch", "both"])
def test_new_biases_of_projections_survive_saving(site, tmp_path):
    """mlc-ai/mlc-llm #3494: biases of attention and of feed-forward blocks, which some loaders drop."""
    model, words = llama(), texts_with_padding("right")
    table = coar.input_features(model, include=site)
    what = coar.Study(
        model=model,
        examples=coar.token_examples(words),
        components=table,
        ablation=coar.Mean(calibration=coar.token_examples(words)),
        output=coar.TokenMargin(),
    )
    edit = coar.Edit.of(what, table.names[:9])
    folder = edit.save_pretrained(model, tmp_path / "edited", what.examples).path
    loaded, edited = transformers.LlamaForCausalLM.from_pretrained(folder).eval(), edit.apply(model)
    real = words["attention_mask"].bool()
    with torch.no_grad():
        logits = [one(**words).logits[real] for one in (loaded, edited, model)]
    assert torch.allclose(logits[0], logits[1], atol=1e-5)
    assert (logits[1] - logits[2]).abs().max() > 1e-2


def test_an_edit_of_an_adapted_layer_stays_when_it_is_merged(tmp_path):
    """huggingface/peft #3306: the bias of an adapted layer is not saved with the adapter."""
    model = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["two"], bias="lora_only"))
    strong(model)
    what = study(model, ROWS, coar.neurons(model, include="*two*"))
    edit = coar.Edit.of(what, what.components.names[:2])
    with torch.no_grad(), gated(model, edit.components, [0.0] * 2):
        expected = model(ROWS)
    with torch.no_grad():
        assert torch.allclose(edit.apply(model)(ROWS), expected, atol=1e-5)
        assert torch.allclose(edit.apply(model).merge_and_unload()(ROWS), expected, atol=1e-5)


# J. Inputs and classifiers of every day.


class ByName(nn.Module):
    """A model of features by name, each a number per example, which returns an object."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, **features):
        return {"logits": self.net(torch.stack([features[f"f{i}"] for i in range(FEATURES)], 1))}


def test_features_by_name_are_taken(tmp_path):
    """meta-pytorch/captum #1196: a dict of one number per feature."""
    model, features = strong(ByName()), {f"f{i}": ROWS[:, i] for i in range(FEATURES)}
    what = study(model, features, coar.neurons(model, include="net.one"))
    run = collect(what, tmp_path)
    for mask, found in zip(run.masks(0, MASKS), run.array("outputs")[:], strict=True):
        with torch.no_grad(), gated(model, what.components, torch.tensor(mask).float()):
            assert np.allclose(found, margin(one_by_one(model, features)), atol=1e-4)


def test_a_list_of_inputs_is_refused_in_words():
    """meta-pytorch/captum #1066: a list of ids, masks and segments."""
    with pytest.raises(ExamplesError, match="dict with their names"):
        coar.Examples(inputs=[WORDS, WORDS != 0, torch.zeros_like(WORDS)], targets=TARGETS)


class OneLogit(Net):
    def forward(self, x):
        return super().forward(x)[:, :1]


def test_a_classifier_with_one_logit_names_its_output(tmp_path):
    """meta-pytorch/captum #352: label 1 of one column."""
    model = strong(OneLogit())
    labels, components = torch.arange(EXAMPLES) % 2, coar.neurons(model, include="one")
    with pytest.raises(OutputError, match="BinaryMargin"):
        collect(study(model, ROWS, components, labels), tmp_path)
    run = collect(study(model, ROWS, components, labels, output=coar.BinaryMargin()), tmp_path)
    for mask, found in zip(run.masks(0, MASKS), run.array("outputs")[:], strict=True):
        with torch.no_grad(), gated(model, components, torch.tensor(mask).float()):
            assert np.allclose(found, one_by_one(model, ROWS)[:, 0] * (2 * labels - 1), atol=1e-4)


# K. Heads.


@pytest.mark.parametrize(
    "make", [TorchAttention, TorchEncoder], ids=["pytorch/pytorch #78109", "pytorch/pytorch #128413"]
)
def test_heads_of_torchs_attention_are_found_before_the_projection(make, tmp_path):
    """A head is a block of the projection's input: interp-reasoning/thought-anchors #7, ndif-team/nnsight #525."""
    model = strong(make())
    heads = coar.attention_heads(model)
    assert len(heads) == 2
    run = collect(study(model, TEXTS, heads), tmp_path)
    attention = model.attention if make is TorchAttention else model.layer.self_attn
    kept = attention.out_proj.weight.detach().clone()
    for mask, found in zip(run.masks(0, MASKS), run.array("outputs")[:], strict=True):
        with torch.no_grad():  # the columns of the projection that read the head
            attention.out_proj.weight.copy_(kept * torch.tensor(mask).float().repeat_interleave(HIDDEN // 2))
            assert np.allclose(found, margin(one_by_one(model, TEXTS)), atol=1e-4)
    with torch.no_grad():
        attention.out_proj.weight.copy_(kept)


# M. Examples that are used twice.


def test_calibration_on_the_studied_examples_is_a_warning(tmp_path, caplog):
    """OpenRLHF/OpenRLHF #1089: evaluation by default on what the method was fitted on."""
    model = strong(Net())
    examples = coar.Examples(inputs=ROWS, targets=TARGETS)
    what = study(model, ROWS, HIDDEN_LAYERS(model), ablation=coar.Mean(calibration=examples))
    collect(what, tmp_path)
    assert "8 of 8 examples of the study are calibration examples too" in caplog.text


def test_judging_on_the_choosing_examples_is_a_warning(tmp_path, caplog):
    """openai/parameter-golf #2127: most of the validation documents are training documents."""
    model = strong(Net())
    rows, labels = numbers(40, FEATURES), model(numbers(40, FEATURES)).argmax(1)
    what = study(model, rows, HIDDEN_LAYERS(model), labels)
    fit = coar.fit(collect(what, tmp_path, masks=64), progress=False)
    others = numbers(40, FEATURES, seed=2)
    for judge, seen in ((coar.Examples(inputs=others, targets=model(others).argmax(1)), False), (what.examples, True)):
        coar.forget_class(fit, model, what.examples, judge, label=int(labels[0]), device="cpu", progress=False)
        assert ("40 of 40 examples to judge on were studied" in caplog.text) == seen
