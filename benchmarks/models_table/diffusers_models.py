"""The models of diffusers: UNets, a transformer and autoencoders, with tiny sizes."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from benchmarks.models_table.subjects import ROWS, Subject, by_pretrained, numbers

UNET: dict[str, Any] = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 16}
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "UNet2DModel": (
        "UNet2DModel",
        UNET
        | {
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 8,
        },
    ),
    "UNet2DConditionModel": (
        "UNet2DConditionModel",
        UNET
        | {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 4,
            "cross_attention_dim": 24,
        },
    ),
    "DiTTransformer2DModel": (
        "DiTTransformer2DModel",
        {
            "num_attention_heads": 4,
            "attention_head_dim": 8,
            "num_layers": 2,
            "sample_size": 16,
            "num_embeds_ada_norm": 10,
        },
    ),
    "AutoencoderKL": (
        "AutoencoderKL",
        {
            "block_out_channels": (16, 32),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "norm_num_groups": 8,
            "sample_size": 16,
        },
    ),
    "VQModel": ("VQModel", {"block_out_channels": (16,), "norm_num_groups": 8, "num_vq_embeddings": 16}),
}


def _inputs(name: str, channels: int) -> Any:
    pictures = numbers(channels, 16, 16)

    def made(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        found = {"hidden_states" if name.startswith("DiT") else "sample": pictures(seed)}
        if not name.startswith(("Auto", "VQ")):
            found["timestep"] = torch.randint(0, 9, (ROWS,), generator=generator)
        if name == "UNet2DConditionModel":
            found["encoder_hidden_states"] = torch.randn(ROWS, 5, 24, generator=generator)
        if name.startswith("DiT"):
            found["class_labels"] = torch.randint(0, 9, (ROWS,), generator=generator)
        return found

    return made


def _make(kind: str, sizes: dict[str, Any]) -> nn.Module:
    return getattr(diffusers, kind)(**sizes)  # type: ignore[no-any-return]


def subjects() -> Iterator[Subject]:
    """Yield one tiny model of each class."""
    for name, (kind, sizes) in CLASSES.items():
        channels = 4 if name in ("UNet2DConditionModel", "DiTTransformer2DModel") else 3
        yield Subject(name, "diffusers", partial(_make, kind, sizes), _inputs(name, channels), by_pretrained)
