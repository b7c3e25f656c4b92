"""Means over padded batches, against passes of every example alone and without padding."""

import logging

import pytest
import torch
import transformers
from torch import nn

import coar
from coar.errors import AblationError
from tests import oracles

SIZES = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_attention_heads": 2}
SIZES |= {"decoder_attention_heads": 2, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 40}


def t5():
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))


def bart():
    config = transformers.BartConfig(**SIZES, max_position_embeddings=20, pad_token_id=0, scale_embedding=False)
    return transformers.BartForConditionalGeneration(config)


def wav2vec():
    config = transformers.Wav2Vec2Config(
        **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24},
        **{"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "feat_extract_norm": "layer"},
        **{"num_conv_pos_embeddings": 3, "num_conv_pos_embedding_groups": 2, "vocab_size": 12},
    )
    return transformers.Wav2Vec2ForCTC(config)


def lively(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model.eval()


def texts(lengths, longest, names=("input_ids", "attention_mask")):
    mask = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    ids = torch.randint(2, 40, mask.shape, generator=torch.Generator().manual_seed(longest))
    return {names[0]: ids * mask, names[1]: mask.long()}


def pairs(source, target):
    """Texts of two sequences, whose padding differs."""
    second = texts([target, 3, 2, 5], target, ("decoder_input_ids", "decoder_attention_mask"))
    return texts([3, source, 5, 2], source) | second


def alone(model, inputs, site, side="input"):
    """Mean of a module's activations over examples that pass one by one, cut to their own lengths."""
    seen = []
    module = model.get_submodule(site)
    hooks = {
        "input": lambda: module.register_forward_pre_hook(lambda _m, args: seen.append(args[0].flatten(0, -2))),
        "output": lambda: module.register_forward_hook(lambda _m, _args, y: seen.append(y.flatten(0, -2))),
    }
    handle = hooks[side]()
    for i in range(len(next(iter(inputs.values())))):
        row = {name: value[i : i + 1] for name, value in inputs.items()}
        for name in ("attention_mask", "decoder_attention_mask"):
            length = int(row[name].sum()) if name in row else 0
            others = [key for key in row if name in row and key.startswith("decoder") == name.startswith("decoder")]
            row |= {key: row[key][:, :length] for key in others}
        with torch.no_grad():
            model(**row)
    handle.remove()
    return torch.cat(seen).double().mean(0).float()


def means(model, inputs, components):
    count = len(next(iter(inputs.values())))
    examples = coar.Examples(inputs=inputs, targets=torch.arange(count))
    return coar.Mean(calibration=examples).replacements(model, components, batch_size=3)


T5_SITES = ["encoder.block.0.layer.1.DenseReluDense.wo", "decoder.block.0.layer.2.DenseReluDense.wo"]
T5_SITES += ["decoder.block.0.layer.1.EncDecAttention.q", "decoder.block.0.layer.1.EncDecAttention.v", "lm_head"]
BART_SITES = ["model.encoder.layers.0.fc2", "model.decoder.layers.0.fc2", "model.decoder.layers.0.encoder_attn.k_proj"]
BART_SITES += ["model.decoder.layers.0.encoder_attn.out_proj"]
CASES = [(t5, site) for site in T5_SITES] + [(bart, site) for site in BART_SITES]


@pytest.mark.parametrize(("source", "target"), [(6, 6), (8, 6)])
@pytest.mark.parametrize(("make", "site"), CASES, ids=[f"{make.__name__}-{site}" for make, site in CASES])
def test_encoder_and_decoder_have_masks_of_their_own(make, site, source, target):
    model, inputs = lively(make()), pairs(source, target)
    found = means(model, inputs, coar.input_features(model, include=site))
    torch.testing.assert_close(found, alone(model, inputs, site), rtol=1e-4, atol=1e-4)


def test_a_decoder_without_a_mask_of_its_own_must_have_no_padding():
    model, inputs = lively(t5()), pairs(6, 6)
    components = coar.input_features(model, include="decoder.*.wo")
    del inputs["decoder_attention_mask"]
    with pytest.raises(AblationError, match=r"hold token 0, .* no decoder_attention_mask"):
        means(model, inputs, components)
    inputs["decoder_input_ids"] = inputs["decoder_input_ids"].clamp_min(2)
    inputs["decoder_input_ids"][:, 0] = 0  # the token that decoding starts with is that of padding
    found = means(model, inputs, components)
    torch.testing.assert_close(found, alone(model, inputs, components[0].site), rtol=1e-4, atol=1e-4)
    with pytest.raises(AblationError, match="whose tokens the model makes from other inputs"):
        means(lively(bart()), texts([3, 6, 5, 2], 6), coar.input_features(bart(), include="*decoder*.fc2"))


def test_speech_is_masked_at_the_resolution_of_every_layer():
    model = lively(wav2vec())
    mask = (torch.arange(200)[None] < torch.tensor([200, 120, 63, 155])[:, None]).long()
    inputs = {"input_values": torch.randn(4, 200) * mask, "attention_mask": mask}
    site = "wav2vec2.encoder.layers.0.feed_forward.output_dense"
    found = means(model, inputs, coar.input_features(model, include=site))
    torch.testing.assert_close(found, alone(model, inputs, site), rtol=1e-3, atol=1e-3)
    between = coar.conv_filters(model, include="*conv_layers.0.conv")
    with pytest.raises(AblationError, match=r"shape \(3, 39\) .* attention_mask of shape \(3, 200\) shows padding"):
        means(model, inputs, between)
    full = {"input_values": inputs["input_values"], "attention_mask": torch.ones_like(mask)}
    assert means(model, full, between).isfinite().all()


class Patches(nn.Module):
    """Reads pictures of several sizes as patches, as DETR does by a mask of pixels."""

    def __init__(self):
        super().__init__()
        self.patch, self.mix, self.last = nn.Conv2d(3, 6, 2, stride=2), nn.Conv2d(6, 6, 1), nn.Linear(6, 4)
        oracles.rough(self)

    def forward(self, pixel_values, pixel_mask):
        y = self.mix(torch.tanh(self.patch(pixel_values)))
        return self.last(y.flatten(2).transpose(1, 2)).mean(1)


def test_pictures_are_masked_at_the_resolution_of_every_layer():
    model, sizes = Patches().eval(), [(8, 8), (4, 6), (6, 2), (2, 8)]
    pixels, mask = torch.randn(4, 3, 8, 8), torch.zeros(4, 8, 8, dtype=torch.long)
    for one, (height, width) in zip(mask, sizes, strict=True):
        one[:height, :width] = 1
    inputs = {"pixel_values": pixels, "pixel_mask": mask}
    kept = [
        model.mix(torch.tanh(model.patch(x[None, :, :h, :w]))).flatten(2)[0]
        for x, (h, w) in zip(pixels, sizes, strict=True)
    ]
    expected = torch.cat(kept, 1).detach().mean(1)
    torch.testing.assert_close(means(model, inputs, coar.conv_filters(model, include="mix")), expected)
    with pytest.raises(AblationError, match=r"'last' has activations of shape \(3, 16\) .*pixel_mask of shape"):
        means(model, inputs, coar.input_features(model))


class Layouts(nn.Module):
    """Layers that see the positions of texts in several places of their input's shape."""

    def __init__(self, length):
        super().__init__()
        self.plain, self.heads, self.second = nn.Linear(8, 8), nn.Linear(4, 4), nn.Linear(8, 8)
        self.flat, self.folded, self.pooled, self.cut = (nn.Linear(w, w) for w in (8, 4, 8, 8))
        self.emb, self.length = nn.Embedding(40, 8), length
        oracles.rough(self)

    def forward(self, input_ids, attention_mask):
        x = self.plain(self.emb(input_ids))
        apart = x.unflatten(-1, (2, 4)).transpose(1, 2)
        by_heads = self.heads(apart) + self.folded(apart.flatten(0, 1)).view(apart.shape)
        x = by_heads.transpose(1, 2).flatten(2) + self.second(x.transpose(0, 1)).transpose(0, 1)
        x = x + self.flat(x.flatten(0, 1)).view(x.shape)
        self.cut(x[:, : self.length])
        weights = attention_mask[..., None].float()
        return self.pooled((x * weights).sum(1) / weights.sum(1))


@pytest.mark.parametrize("site", ["plain", "heads", "second", "flat", "folded", "pooled"])
def test_positions_are_found_in_the_shape_of_activations(site):
    model, inputs = Layouts(6), texts([3, 6, 5, 2, 4, 1], 6)
    found = means(model, inputs, coar.input_features(model, include=site))
    torch.testing.assert_close(found, alone(model, inputs, site), rtol=1e-4, atol=1e-4)


def test_a_mask_that_fits_no_axis_is_an_error_unless_there_is_no_padding():
    model = Layouts(4)
    components = coar.input_features(model, include="cut")
    with pytest.raises(AblationError, match=r"'cut' has activations of shape \(3, 4\).*\(3, 6\) shows padding"):
        means(model, texts([3, 6, 5, 2], 6), components)
    whole = texts([6, 6, 6, 6], 6)
    seen = []
    handle = model.cut.register_forward_pre_hook(lambda _m, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(**whole)
    handle.remove()
    torch.testing.assert_close(means(model, whole, components), torch.cat(seen).mean(0))


class Named(nn.Module):
    """A model of two inputs, the second one named as a mask."""

    def __init__(self, name):
        super().__init__()
        self.emb, self.last, self.name = nn.Embedding(40, 8), nn.Linear(8, 4), name
        oracles.rough(self)

    def forward(self, tokens, **masks):
        return self.last(self.emb(tokens)).mean(1)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("src_key_padding_mask", lambda kept: ~kept),
        ("src_key_padding_mask", lambda kept: torch.zeros(kept.shape).masked_fill(~kept, -torch.inf)),
        ("attention_mask", lambda kept: kept.float()),
        ("attention_mask", lambda kept: torch.zeros(kept.shape).masked_fill(~kept, -1e9)),
    ],
)
def test_masks_are_read_as_their_names_and_values_mean(name, given):
    model, both = Named(name), texts([3, 6, 5, 2], 6)
    kept = both["attention_mask"].bool()
    found = means(model, {"tokens": both["input_ids"], name: given(kept)}, coar.input_features(model))
    torch.testing.assert_close(found, model.emb(both["input_ids"])[kept].detach().mean(0))


def test_masks_that_are_not_read_are_in_the_log(caplog):
    model, both = Named("pad"), texts([3, 6, 5, 2], 6)
    inputs = {"tokens": both["input_ids"], "pad": both["attention_mask"] == 0, "bool_masked_pos": both["input_ids"] > 9}
    with caplog.at_level(logging.WARNING):
        found = means(model, inputs, coar.input_features(model))
    assert ["pad are not read as masks" in record.message for record in caplog.records] == [True]
    torch.testing.assert_close(found, model.emb(both["input_ids"]).detach().flatten(0, 1).mean(0))


def test_a_text_mask_is_not_laid_over_pictures():
    config = transformers.CLIPConfig(
        text_config={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        | {"vocab_size": 40, "max_position_embeddings": 8, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": 2},
        vision_config={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        | {"image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    model = transformers.CLIPModel(config).eval()
    inputs = texts([3, 5, 2], 5) | {"pixel_values": torch.randn(3, 3, 8, 8)}  # 5 tokens, as there are patches
    seen, site = [], "vision_model.encoder.layers.0.mlp.fc2"
    handle = model.get_submodule(site).register_forward_pre_hook(lambda _m, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    torch.testing.assert_close(means(model, inputs, coar.input_features(model, include=site)), seen[0].mean(0))
