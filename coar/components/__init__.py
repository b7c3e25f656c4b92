"""Which parts of a model can be ablated: the table, the finders that fill it, and what they know of layers."""

from coar.components.attention import attention_heads
from coar.components.experts import experts
from coar.components.finders import conv_filters, input_features, modules, neurons, parameter_slices
from coar.components.layers import (
    CONVOLUTIONS,
    TRANSPOSED_CONVOLUTIONS,
    Stack,
    input_axis,
    input_channels,
    is_conv1d,
    is_layer,
    is_linear,
    output_axis,
    output_channels,
    stack_of,
    unwrapped,
)
from coar.components.table import Component, Components, Side, check_components, read_component

__all__ = [
    "CONVOLUTIONS",
    "TRANSPOSED_CONVOLUTIONS",
    "Component",
    "Components",
    "Side",
    "Stack",
    "attention_heads",
    "check_components",
    "conv_filters",
    "experts",
    "input_axis",
    "input_channels",
    "input_features",
    "is_conv1d",
    "is_layer",
    "is_linear",
    "modules",
    "neurons",
    "output_axis",
    "output_channels",
    "parameter_slices",
    "read_component",
    "stack_of",
    "unwrapped",
]
