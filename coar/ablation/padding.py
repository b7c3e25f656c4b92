"""Positions of padding in texts; constants are not taken from them."""

from torch import Tensor, nn

from coar.errors import AblationError
from coar.inputs import Inputs


def tokens_of(model: nn.Module, inputs: Inputs) -> Tensor | None:
    """Return (texts, positions) booleans, False at padding; None where there is no padding.

    Args:
        model: The model; a `config` in it may name its padding token.
        inputs: A batch; its `attention_mask`, of the shape of `input_ids`, is 0 at padding.

    Raises:
        AblationError: When the texts contain the padding token and there is no mask.
    """
    named = inputs if isinstance(inputs, dict) else {"input_ids": inputs}
    ids, mask = named.get("input_ids"), named.get("attention_mask")
    if mask is not None and mask.ndim >= 2 and (ids is None or mask.shape == ids.shape):
        return mask.bool().flatten(0, -2)
    if ids is None or ids.is_floating_point():
        return None
    configs = [getattr(module, "config", None) for module in model.modules()]
    padding = {getattr(config, "pad_token_id", None) for config in configs} - {None}
    found = [token for token in padding if isinstance(token, int) and (ids == token).any()]
    if found:
        raise AblationError(
            f"the calibration texts hold token {found[0]}, which is this model's padding token, and there is no "
            f"attention_mask to show where it is padding; give inputs as a dict of input_ids and attention_mask, all "
            f"ones where nothing is padded"
        )
    return None


def without_padding(values: Tensor, tokens: Tensor | None) -> Tensor:
    """Flatten (..., channels) to (values, channels), without padding where there is one entry per token."""
    if tokens is not None:
        kept = tokens if values.shape[:2] == tokens.shape else tokens.flatten()
        if values.ndim > kept.ndim and values.shape[: kept.ndim] == kept.shape:
            values = values[kept.to(values.device)]
    return values.reshape(-1, values.shape[-1])
