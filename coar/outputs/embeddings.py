"""Outputs of embedding models: similarity of a pair, and zero-shot margins of images."""

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
    """Cosine similarity of the two embeddings of a pair: f_M(x, C') = <u, v> / (|u| |v|), between -1 and 1.

    u and v are the embeddings that M returns for the pair x under the ablation; targets are not used. Sentence encoders
    compare texts by it (Reimers and Gurevych 2019, "Sentence-BERT").
    """

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
    """Margin of zero-shot classification: `CorrectClassMargin` of the logits l_c = scale * cos(v, t_c).

    v is the embedding of the image x under the ablation and t_c the embedding of the prompt for class c (Radford et al.
    2021, "Learning transferable visual models from natural language supervision", section 3.1). The model is the image
    encoder of a CLIP and returns `image_embeds`, as transformers' `CLIPVisionModelWithProjection` does. For a model
    that returns these logits itself use `CorrectClassMargin`.

    Attributes:
        prompts: (classes, width) embeddings t of the prompts; they are normalised to length 1.
        scale: Factor of the cosines, the inverse temperature; 100 in the published CLIP.
        against: As in `CorrectClassMargin`.
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
        """Return (examples,) margins from the model's (examples, width) embeddings of images.

        Raises:
            OutputError: When the model returned something else, or a target is not one of the classes.
        """
        embeddings = result.get("image_embeds") if isinstance(result, dict) else getattr(result, "image_embeds", None)
        width = self.prompts.shape[1]
        if not isinstance(embeddings, Tensor) or embeddings.ndim != 2 or embeddings.shape[1] != width:
            found = f"image_embeds {tuple(embeddings.shape)}" if isinstance(embeddings, Tensor) else "no image_embeds"
            raise OutputError(
                f"the model returned {found} in a {type(result).__name__}; an object or dict with 'image_embeds' "
                f"(examples, {width}), as wide as the prompts', was expected: wrap the model, or embed the prompts "
                f"with the same model"
            )
        with torch.autocast(embeddings.device.type, enabled=False):  # differences of cosines are too fine for bfloat16
            cosines = functional.normalize(embeddings.float(), dim=1) @ self.prompts.to(embeddings.device).T
        return margins(*class_logits(self.scale * cosines, targets), self.against)

    def settings(self) -> dict[str, Any]:
        """Return the name and settings, with the prompts' embeddings as SHA-256."""
        digest = hashlib.sha256(self.prompts.contiguous().numpy().tobytes()).hexdigest()
        return {"name": type(self).__name__, "prompts": digest, "scale": self.scale, "against": self.against}
