"""Neurons of MLPs: where they are in each family, what they are worth, and what is refused."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torchvision.models import resnet18
from transformers import (
    AlbertConfig,
    AlbertModel,
    BartConfig,
    BartModel,
    GPTNeoXConfig,
    GPTNeoXModel,
    LlamaConfig,
    LlamaModel,
    MixtralConfig,
    MixtralModel,
    Phi3Config,
    Phi3Model,
    SwinConfig,
    SwinModel,
    T5Config,
    T5Model,
)

import coar
from coar.errors import ComponentError
from tests import tiny

FEED = tiny.FEED
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"d_model": 24, "d_kv": 6, "d_ff": FEED, "num_layers": 1, "num_heads": 4, "vocab_size": 50}
BART = {"d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "vocab_size": 50}
BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": FEED, "decoder_ffn_dim": FEED}
SWIN = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "image_size": 32, "patch_size": 4, "window_size": 4}
FAMILIES = {  # a model, and where the neurons of each MLP are: label, layer that reads them, number
    **{
        name: (
            lambda name=name: tiny.Pooled(tiny.MODELS[name]()),
            [(label.format(i), site.format(i), FEED) for i in (0, 1)],
        )
        for name, label, site in (
            ("bert", "body.encoder.layer.{}", "body.encoder.layer.{}.output.dense"),
            ("gpt2", "body.h.{}.mlp", "body.h.{}.mlp.c_proj"),
            ("llama", "body.layers.{}.mlp", "body.layers.{}.mlp.down_proj"),
            ("vit", "body.layers.{}.mlp", "body.layers.{}.mlp.fc2"),
            ("clip", "body.encoder.layers.{}.mlp", "body.encoder.layers.{}.mlp.fc2"),
        )
    },
    "phi3, gate and projection in one layer": (
        lambda: Phi3Model(Phi3Config(**tiny.TEXT | {"num_hidden_layers": 1}, **ENDS)),
        [("layers.0.mlp", "layers.0.mlp.down_proj", FEED)],
    ),
    "neox, parallel": (
        lambda: GPTNeoXModel(GPTNeoXConfig(**tiny.TEXT | {"num_hidden_layers": 1}, **ENDS)),
        [("layers.0.mlp", "layers.0.mlp.dense_4h_to_h", FEED)],
    ),
    "albert, one layer for all": (
        lambda: AlbertModel(AlbertConfig(**tiny.TEXT, **ENDS, embedding_size=8)),
        [
            (
                "encoder.albert_layer_groups.0.albert_layers.0",
                "encoder.albert_layer_groups.0.albert_layers.0.ffn_output",
                FEED,
            )
        ],
    ),
    "t5, gated": (
        lambda: T5Model(T5Config(**T5, feed_forward_proj="gated-gelu")),
        [
            (f"{side}.block.0.layer.{i}.DenseReluDense", f"{side}.block.0.layer.{i}.DenseReluDense.wo", FEED)
            for side, i in (("encoder", 1), ("decoder", 2))
        ],
    ),
    "bart": (
        lambda: BartModel(BartConfig(**BART, **ENDS, decoder_start_token_id=1)),
        [(f"{side}.layers.0", f"{side}.layers.0.fc2", FEED) for side in ("encoder", "decoder")],
    ),
    "swin, wider and wider": (
        lambda: SwinModel(SwinConfig(**SWIN)),
        [(f"encoder.layers.{i}.blocks.0.mlp", f"encoder.layers.{i}.blocks.0.mlp.fc2", 64 * (i + 1)) for i in (0, 1)],
    ),
    "torch": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 4, FEED, batch_first=True), 2),
        [(f"layers.{i}", f"layers.{i}.linear2", FEED) for i in (0, 1)],
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_neurons_of_every_family(name):
    build, expected = FAMILIES[name]
    assert list(coar.mlp_neurons(build())) == [
        coar.Component(f"{label}.neuron[{i}]", "mlp neuron", site, "input", -1, i, 1)
        for label, site, count in expected
        for i in range(count)
    ]


def silenced(net, name, x, layer, neuron):
    """The output without a neuron, by a hook on the activation, or on one of the two factors of a gated neuron."""
    block = {
        "bert": lambda: net.body.encoder.layer[layer].intermediate,  # returns the activations
        "gpt2": lambda: net.body.h[layer].mlp.act,
        "llama": lambda: net.body.layers[layer].mlp.up_proj,
        "clip": lambda: net.body.encoder.layers[layer].mlp.activation_fn,
    }[name]()

    def without(_module, _args, y):
        y = y.clone()
        y[..., neuron] = 0
        return y

    handle = block.register_forward_hook(without)
    with torch.no_grad():
        found = net(x)
    handle.remove()
    return found


class Sum(coar.Output):
    """The sum of what a model returns for an example."""

    def __call__(self, result, targets):
        return result.sum(1)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "clip"])
def test_ablated_neurons_are_those_after_the_activation(name, tmp_path):
    net, x = tiny.model(name), tiny.inputs(name)
    examples = coar.Examples(inputs={"x": x}, targets=torch.zeros(len(x)))
    neurons = coar.mlp_neurons(net)
    study = coar.Study(model=net, examples=examples, components=neurons, output=Sum(), ablation=coar.ZeroActivation())
    run = coar.collect(study, tmp_path / "run.zarr", masks=2, device="cpu", progress=False)
    found = coar.leave_one_out(study, run, device="cpu", progress=False)
    with torch.no_grad():
        plain = net(x).sum(1)
    for layer, neuron in ((0, 3), (1, 30)):
        drop = plain - silenced(net, name, x, layer, neuron).sum(1)
        torch.testing.assert_close(
            torch.tensor(found.weights()[:, layer * FEED + neuron]),
            drop,
            rtol=1e-3,
            atol=1e-4 * float(plain.abs().max()),
        )


def test_patterns_match_the_names_of_mlps():
    net = tiny.MODELS["gpt2"]()
    assert {row.site for row in coar.mlp_neurons(net, include="h.1.*")} == {"h.1.mlp.c_proj"}
    assert {row.site for row in coar.mlp_neurons(net, exclude="h.1.mlp")} == {"h.0.mlp.c_proj"}
    with pytest.raises(ComponentError, match=r"matches no MLP of this model; it has 2, such as 'h.0.mlp'"):
        coar.mlp_neurons(net, include="*.c_proj")


def adapted():
    """A Llama with an adapter at the layer that reads the neurons."""
    return get_peft_model(LlamaModel(LlamaConfig(**tiny.TEXT)), LoraConfig(r=2, target_modules=["down_proj"]))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # of peft's call
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (resnet18, "ResNet has no layers of attention and MLPs; choose neurons or input_features"),
        (
            lambda: MixtralModel(MixtralConfig(**tiny.TEXT, num_local_experts=2)),
            "experts.* choose coar.experts, or excl",
        ),
        (adapted, r"an adapter wraps the layer '.*layers.0.mlp.down_proj', which also reads .*merge_and_unload\(\)"),
        (
            lambda: LlamaModel(LlamaConfig(**tiny.TEXT | {"intermediate_size": 24})),
            r"cannot determine the MLP of 'layers.0.mlp': \['layers.0.mlp.up_proj', 'layers.0.mlp.down_proj'\] could",
        ),
    ],
)
def test_models_without_such_neurons(build, message):
    with pytest.raises(ComponentError, match=message):
        coar.mlp_neurons(build())
