"""What pipelines on models of Hugging Face share: parts of a model, read from a folder or fetched from the hub."""

import os
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError
from torch import nn

import coar


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a pretrained model is.

    Attributes:
        name: What the model is called in messages.
        variable: The environment variable that names a folder, or a name on the hub.
        default: What is taken without the variable.
        wanted: What the folder holds, in words.
    """

    name: str
    variable: str
    default: str
    wanted: str

    def load(self, part: type[Any], **options: Any) -> Any:
        """Load a part, such as a tokenizer; raise `PipelineError` when it is not there."""
        try:
            return part.from_pretrained(self._place(), **options)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise self.unusable(str(error).splitlines()[0]) from None

    def model(self, part: type[Any]) -> nn.Module:
        """Load a model with all its weights; raise `PipelineError` when some are missing."""
        # the plainest attention kernel gives gradients on every device
        model, found = self.load(part, attn_implementation="eager", output_loading_info=True)
        if found["missing_keys"]:  # transformers draws weights that it does not find
            raise self.unusable(f"{len(found['missing_keys'])} weights are missing, first {min(found['missing_keys'])}")
        return model.eval()

    def unusable(self, reason: str) -> coar.CoarError:
        """Return the error that says why the model cannot be loaded, and how to mend it."""
        return coar.errors.PipelineError(
            f"cannot load {self.name} from {self._place()!r}: {reason.rstrip('.')}; set {self.variable} to a folder "
            f"with {self.wanted} as save_pretrained writes them"
        )

    def _place(self) -> str:
        return os.environ.get(self.variable, self.default)
