"""Zero-shot classification with CLIP (Radford et al. 2021, section 3.1), as a model from pictures to logits."""

import torch
from torch import Tensor, nn
from torch.nn import functional

import coar

CONSTANTS = ("mean", "peak", "optimal")  # ablations by one constant, too few for the many features of a head


class ZeroShot(nn.Module):
    """CLIP's image encoder, and the text embeddings of one prompt per class, computed once.

    Attributes:
        prompts: (classes, width) embeddings of the prompts, of unit length.
        scale: The factor of the cosines that CLIP learnt.
    """

    prompts: Tensor
    scale: Tensor

    def __init__(self, clip: nn.Module, tokens: dict[str, Tensor]) -> None:
        super().__init__()
        self.vision = clip.vision_model
        self.projection = clip.visual_projection
        with torch.no_grad():
            texts = clip.text_projection(clip.text_model(**tokens).pooler_output)
            self.register_buffer("prompts", functional.normalize(texts, dim=-1))
            self.register_buffer("scale", clip.logit_scale.exp())
        self.eval().requires_grad_(False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map (rows, channels, height, width) pictures to (rows, classes) logits: scaled cosines with the prompts."""
        pictures = self.projection(self.vision(pixel_values=pixel_values).pooler_output)
        return self.scale * functional.normalize(pictures, dim=-1) @ self.prompts.T


def components(model: ZeroShot, ablation: str) -> coar.Components:
    """Return attention heads, split into their features where constants replace them, and feed-forward neurons."""
    features = coar.input_features(model, include="*.out_proj")
    heads = features if ablation in CONSTANTS else coar.attention_heads(model)
    return heads + coar.input_features(model, include="*.mlp.fc2")
