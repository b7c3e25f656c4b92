"""Outputs of models that embed: similarity of a pair, and zero-shot margins of pictures."""

import hashlib
from typing import Any

import torch
from pydantic import field_validator
from torch import Tensor
from torch.nn import functional

from coar.errors import OutputError
from coar.outputs.base import Margin, Output
from coar.outputs.classification import class_logits, margins


class CosineSimilarity(Output):
    """Cosine similarity of the two embeddings of a pair, between -1 and 1; targets are not read."""

    def __call__(self, result: Any, targets: Tensor) -> Tensor:
        """Return (examples,) similarities from the model's (examples, 2, width) embeddings.

        Raises:
            OutputError: When the model returned something else.
        """
        shape = tuple(result.shape) if isinstance(result, Tensor) else None
        if shape is None or len(shape) != 3 or shape[:2] != (len(targets), 2):
            given = f"a tensor of shape {shape}" if shape is not None else f"a {type(result).__name__}"
            raise OutputError(
                f"the model returned {given} for {len(targets)} pairs; a tensor of shape (pairs, 2, width) was "
                f"expected: wrap the model so that it returns both embeddings of each pair"
            )
        first, second = result.float().unbind(1)
        return functional.cosine_similarity(first, second, dim=1)


class ZeroShotMargin(Margin):
    """Margin of zero-shot classification: how near a picture is to its class's prompt.

    The logits are scaled cosines of the picture's embedding with the embeddings of one prompt per class (Radford et al.
    2021, section 3.1). The model is the half of a CLIP that sees, and returns `image_embeds`, as transformers'
    `CLIPVisionModelWithProjection` does. A model that returns these logits itself goes with `CorrectClassMargin`, by
    which edits are judged.

    Attributes:
        prompts: (classes, width) embeddings of the prompts; their lengths do not matter.
        scale: What cosines are multiplied by; 100 in the published CLIP.
        against: As for `CorrectClassMargin`.
    """

    prompts: Tensor
    scale: float = 100.0

    @field_validator("prompts")
    @classmethod
    def _embeddings(cls, prompts: Tensor) -> Tensor:
        if prompts.ndim != 2 or len(prompts) < 2 or not prompts.is_floating_point() or not prompts.norm(dim=1).all():
            raise ValueError(f"{prompts.dtype} of shape {tuple(prompts.shape)} is not (classes, width) embeddings")
        return functional.normalize(prompts.detach().cpu().float(), dim=1)

    def __call__(self, result: Any, targets: Tensor) -> Tensor:
        """Return (examples,) margins from the model's (examples, width) embeddings of pictures.

        Raises:
            OutputError: When the model returned something else, or a target is none of the classes.
        """
        pictures = result.get("image_embeds") if isinstance(result, dict) else getattr(result, "image_embeds", None)
        width = self.prompts.shape[1]
        if not isinstance(pictures, Tensor) or pictures.ndim != 2 or pictures.shape[1] != width:
            found = f"image_embeds {tuple(pictures.shape)}" if isinstance(pictures, Tensor) else "no image_embeds"
            raise OutputError(
                f"the model returned {found} in a {type(result).__name__}; an object or dict with 'image_embeds' "
                f"(examples, {width}), as wide as the prompts', was expected: wrap the model, or embed the prompts "
                f"with the same model"
            )
        with torch.autocast(pictures.device.type, enabled=False):  # differences of cosines are too fine for bfloat16
            cosines = functional.normalize(pictures.float(), dim=1) @ self.prompts.to(pictures.device).T
        return margins(*class_logits(self.scale * cosines, targets), self.against)

    def settings(self) -> dict[str, Any]:
        """Return the name and settings, with the prompts' embeddings as SHA-256."""
        digest = hashlib.sha256(self.prompts.contiguous().numpy().tobytes()).hexdigest()
        return {"name": type(self).__name__, "prompts": digest, "scale": self.scale, "against": self.against}
