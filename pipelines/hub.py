"""Loading of Hugging Face models, from a folder or from the hub."""

import os
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError
from torch import nn

import coar


@dataclass(frozen=True, kw_only=True)
class Source:
    """The source of a pretrained model.

    Attributes:
        name: Name of the model in messages.
        variable: The environment variable with a folder, or a name on the hub.
        default: The folder or name without the variable.
        contents: Description of the folder's contents for messages.
    """

    name: str
    variable: str
    default: str
    contents: str

    def load(self, part: type[Any], **options: Any) -> Any:
        """Load a part, such as a tokenizer; raise `PipelineError` when it is missing."""
        try:
            return part.from_pretrained(self._place(), **options)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise self.unusable(str(error).splitlines()[0]) from None

    def model(self, part: type[Any], **options: Any) -> nn.Module:
        """Load a model with all its weights; raise `PipelineError` when some are missing."""
        # the eager attention kernel gives gradients on every device
        model, found = self.load(part, attn_implementation="eager", output_loading_info=True, **options)
        if found["missing_keys"]:  # transformers fills missing weights with random numbers
            raise self.unusable(f"{len(found['missing_keys'])} weights are missing, first {min(found['missing_keys'])}")
        return model.eval()

    def unusable(self, reason: str) -> coar.CoarError:
        """Return the error about a model that cannot be loaded, with the reason and a remedy."""
        return coar.errors.PipelineError(
            f"cannot load {self.name} from {self._place()!r}: {reason.rstrip('.')}; set {self.variable} to a folder "
            f"with {self.contents} as save_pretrained writes them"
        )

    def _place(self) -> str:
        return os.environ.get(self.variable, self.default)
