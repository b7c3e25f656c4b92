"""Padding in a batch, at every module of a model; constants are not taken from there."""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from coar.errors import AblationError
from coar.inputs import Inputs

# Masks by the sequence that they belong to; models of one sequence have an `encoder`. Names of torch's masks end in
# `padding_mask`, and they are true at padding; transformers' masks are 0 there.
READ = {
    "attention_mask": "encoder",
    "padding_mask": "encoder",
    "key_padding_mask": "encoder",
    "src_key_padding_mask": "encoder",
    "memory_key_padding_mask": "encoder",
    "encoder_attention_mask": "encoder",
    "decoder_attention_mask": "decoder",
    "tgt_key_padding_mask": "decoder",
}
PIXELS = "pixel_mask"  # (pictures, height, width), as DETR takes it
NOT_PADDING = ("bool_masked_pos", "mask_time_indices", "global_attention_mask")  # and masks of heads
SECOND = ("decoder_input_ids", "decoder_inputs_embeds", "decoder_attention_mask", "tgt_key_padding_mask")
OTHER_INPUTS = ("pixel_values", "pixel_values_videos", "input_features", "input_values")
OTHER_PARTS = re.compile("vision|visual|image|pixel|patch|video|audio|speech")  # in names of modules that read these
CROSS = re.compile("encoder_attn|encdecattention|cross_?att|encoder_decoder_att", re.IGNORECASE)
KEYS_AND_VALUES = re.compile("(to_)?(k|v|kv|key|value)(_proj|_lin)?|c_attn")
LAST = ("lm_head", "proj_out", "output_projection")  # modules outside of the decoder that read its states


class Mask(NamedTuple):
    """One mask among the inputs.

    Attributes:
        name: Its name.
        kept: (entries, positions) booleans, False at padding.
    """

    name: str
    kept: Tensor


class Padding:
    """Which positions of a batch are padding, for the activations of any module.

    A module's path and the shape of its activations determine the mask. In an encoder-decoder these are different ones
    for the encoder, the decoder, and the keys and values that the decoder takes from the encoder.

    Args:
        model: The model; a `config` in it may name its padding token.
        inputs: A batch; its masks are those of `READ` and a `pixel_mask`.

    Raises:
        AblationError: When the texts contain the padding token and there is no mask.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        named = inputs if isinstance(inputs, dict) else {"input_ids": inputs}
        self._model, self._inputs = model, named
        self._configs = [config for module in model.modules() if (config := getattr(module, "config", None))]
        self._two = any(name in named for name in SECOND) or any(
            getattr(config, "is_encoder_decoder", False) for config in self._configs
        )
        self._masks: dict[str, list[Mask]] = {"encoder": [], "decoder": []}
        for name, sequence in READ.items():
            ids = named.get("input_ids" if sequence == "encoder" else "decoder_input_ids")
            kept = _kept(name, named[name], ids) if name in named else None
            if kept is not None:
                self._masks[sequence].append(Mask(name, kept))
        ids = named.get("input_ids")
        if not self._masks["encoder"] and ids is not None and not ids.is_floating_point():
            self._check_unpadded("input_ids", ids, "attention_mask")

    @property
    def unread(self) -> list[str]:
        """Names of inputs that seem to be masks and are not read as padding."""
        read = {mask.name for masks in self._masks.values() for mask in masks} | {PIXELS, *NOT_PADDING}
        return [name for name in self._inputs if name not in read and ("mask" in name or "pad" in name.split("_"))]

    def at(self, site: str, shape: torch.Size) -> Tensor | None:
        """Return where the activations of a module belong to the batch, and not to its padding.

        Args:
            site: Path of the module.
            shape: Shape of its activations without the axis of channels.

        Returns:
            Booleans of this shape, False at padding; None where there is no padding.

        Raises:
            AblationError: When there is padding, and no mask fits the activations or two different ones do.
        """
        other = any(name in self._inputs for name in OTHER_INPUTS) and "input_ids" in self._inputs
        masks = [] if other and OTHER_PARTS.search(site) else self._masks_of(site)
        fitting = [laid for mask in masks if (laid := self._laid(mask.kept, shape)) is not None]
        if fitting and all(torch.equal(laid, fitting[0]) for laid in fitting):
            return None if bool(fitting[0].all()) else fitting[0]
        padded = [mask for mask in masks if not bool(mask.kept.all())]
        if padded and any(shape != mask.kept.shape[:1] for mask in padded):  # not one entry per text
            raise _unclear(site, shape, padded)
        return self._pixels_at(site, shape)

    def _pixels_at(self, site: str, shape: torch.Size) -> Tensor | None:
        """Return where the activations of a module belong to pictures, by the `pixel_mask`."""
        pixels = self._inputs.get(PIXELS)
        if pixels is None or bool(pixels.all()) or shape == pixels.shape[:1]:
            return None
        if len(shape) != 3:
            raise _unclear(site, shape, [Mask(PIXELS, pixels)])
        shrunk = nn.functional.interpolate(pixels[:, None].float(), size=shape[1:])  # as transformers does it
        return shrunk[:, 0].bool()

    def _masks_of(self, site: str) -> list[Mask]:
        """Return the masks that may belong to a module's activations."""
        sequence = self._sequence(site)
        if sequence == "decoder" and not self._masks["decoder"]:
            self._check_decoder(site)
        return self._masks[sequence] if sequence else [mask for masks in self._masks.values() for mask in masks]

    def _sequence(self, site: str) -> str:
        """Return which of the model's sequences a module runs on; empty if the path does not say so."""
        if not self._two:
            return "encoder"
        names = site.split(".")
        if any(CROSS.search(name) for name in names) and KEYS_AND_VALUES.fullmatch(names[-1]):
            return "encoder"
        stacks = [name[-7:] for name in names if name.endswith(("encoder", "decoder"))]
        return stacks[0] if stacks else "decoder" if names[-1] in LAST else ""

    def _laid(self, kept: Tensor, shape: torch.Size) -> Tensor | None:
        """Return a mask in the shape of activations; None where it does not fit."""
        texts, length = kept.shape
        if shape[:2] == kept.shape:
            return kept.view(texts, length, *[1] * (len(shape) - 2)).expand(shape)
        if len(shape) == 1:
            unpadded = kept[kept] if shape == (int(kept.sum()),) else None  # of a model that removes the padding
            return kept.flatten() if shape == (kept.numel(),) else unpadded
        if len(shape) == 2 and shape[1] == length and shape[0] % texts == 0:  # several entries of a text, side by side
            return kept.repeat_interleave(shape[0] // texts, dim=0)
        if len(shape) == 3 and (shape[0], shape[2]) == (texts, length):  # heads before positions
            return kept[:, None].expand(shape)
        if shape == (length, texts):
            return kept.T
        return self._downsampled(kept, shape)

    def _downsampled(self, kept: Tensor, shape: torch.Size) -> Tensor | None:
        """Return a mask after the convolutions by which speech models of transformers shorten their input."""
        lengths, ends_with_padding = kept.sum(1), not bool((~kept[:, :-1] & kept[:, 1:]).any())
        for module in self._model.modules():
            shortened: Any = getattr(module, "_get_feat_extract_output_lengths", None)
            if shortened is not None and ends_with_padding:
                length = int(shortened(torch.tensor([kept.shape[1]]))[0])
                if shape == (len(kept), length):
                    ends: Tensor = shortened(lengths)[:, None]
                    return torch.arange(length, device=kept.device) < ends
        return None

    def _check_decoder(self, site: str) -> None:
        """Raise `AblationError` unless the decoder's tokens are seen to have no padding."""
        ids = self._inputs.get("decoder_input_ids")
        if ids is not None:
            self._check_unpadded("decoder_input_ids", ids[:, 1:], "decoder_attention_mask")  # texts may begin with it
        elif "decoder_inputs_embeds" not in self._inputs and any(
            not bool(mask.kept.all()) for mask in self._masks["encoder"]
        ):
            raise AblationError(
                f"{site!r} is in the decoder, whose tokens the model makes from other inputs, so its padding is not "
                f"known; give decoder_input_ids and decoder_attention_mask"
            )

    def _check_unpadded(self, name: str, ids: Tensor, mask: str) -> None:
        padding = {getattr(config, "pad_token_id", None) for config in self._configs} - {None}
        found = [token for token in padding if isinstance(token, int) and (ids == token).any()]
        if found:
            raise AblationError(
                f"the calibration texts hold token {found[0]}, which is this model's padding token, and there is no "
                f"{mask} to show where it is padding; give inputs as a dict of {name} and {mask}, all "
                f"ones where nothing is padded"
            )


def without_padding(values: Tensor, tokens: Tensor | None) -> Tensor:
    """Flatten (..., channels) to (values, channels), without padding.

    Args:
        values: Activations.
        tokens: Booleans of the shape of the first axes of the activations, False at padding; None for none.
    """
    kept = values if tokens is None else values[tokens.to(values.device)]
    return kept.reshape(-1, values.shape[-1])


def _kept(name: str, mask: Tensor, ids: Tensor | None) -> Tensor | None:
    """Return a mask as (entries, positions) booleans, False at padding; None where it is no mask of positions."""
    if mask.shape != ids.shape if ids is not None else mask.ndim != 2:
        return None
    if name.endswith("padding_mask"):
        kept = mask == 0
    else:
        kept = mask >= 0 if mask.is_floating_point() and bool((mask < 0).any()) else mask.bool()
    return kept.flatten(0, -2)


def _unclear(site: str, shape: torch.Size, masks: Iterable[Mask]) -> AblationError:
    given = " and ".join(f"{mask.name} of shape {tuple(mask.kept.shape)}" for mask in masks)
    return AblationError(
        f"{site!r} has activations of shape {tuple(shape)} without their features, and {given} shows padding; which of "
        f"these activations are padding cannot be determined: exclude the component, give calibration examples without "
        f"padding, or use an ablation that takes no means"
    )
