"""The finder of the hidden neurons of a transformer's MLPs."""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from coar.components.attention import SIBLING_PROJECTION, attention_blocks
from coar.components.finders import Patterns, inside, matching
from coar.components.layers import expert_stack_of, input_channels, is_linear, output_channels, unwrapped
from coar.components.table import Component, Components
from coar.errors import ComponentError


class Mlp(NamedTuple):
    """An MLP of a transformer.

    Attributes:
        path: Path of the smallest module that contains both layers.
        down: Path of the linear layer that reads the neurons.
    """

    path: str
    down: str


def mlp_neurons(model: nn.Module, *, include: Patterns = None, exclude: Patterns = None) -> Components:
    """Find the hidden neurons of every MLP of a transformer: one component per neuron, after its activation.

    A neuron is an input feature of the linear layer that maps back to the width of the residual stream; in a gated MLP,
    such as Llama's, it is the product of gate and projection. Its label is that of the MLP: `h.9.mlp.neuron[123]`.

    MLPs are found by type and role, in lists of layers with attention blocks: two linear layers outside of attention,
    of which the first maps some width to the neurons, or to twice as many where gate and projection are one layer, and
    a later one maps as many neurons to that width. All names are possible.

    Args:
        model: The model to look through.
        include: Shell-style patterns of the MLPs' names; only those that match one are taken. An MLP without a module
            of its own, as in BERT, has the name of its layer.
        exclude: Patterns of the MLPs' names to leave out; applied after `include`.

    Raises:
        ComponentError: When the model has no such MLP, a pattern matches none, an adapter wraps a layer of one, or
            experts are stacked in one parameter.
    """
    model = unwrapped(model)
    found = {mlp.path: mlp for mlp in _mlps(model)}
    if not found:
        raise ComponentError(
            f"{type(model).__name__} has no layers of attention and MLPs; choose neurons or input_features instead"
        )
    names = matching(list(found), include, exclude, "MLP")
    return Components(row for name in names for row in _neurons(model, found[name]))


def _neurons(model: nn.Module, mlp: Mlp) -> Iterator[Component]:
    if not mlp.down:
        raise ComponentError(
            f"{mlp.path!r} keeps the projections of all its experts in one parameter, and their neurons have no layer "
            f"that reads them; choose coar.experts, or exclude {mlp.path!r}"
        )
    if mlp.down.endswith("base_layer"):
        raise ComponentError(
            f"an adapter wraps the layer {mlp.down.removesuffix('.base_layer')!r}, which also reads the neurons; merge "
            f"the adapter first, as with model = model.merge_and_unload() of peft, or exclude {mlp.path!r}"
        )
    for i in range(input_channels(model.get_submodule(mlp.down))):
        yield Component(f"{inside(mlp.path, 'neuron')}[{i}]", "mlp neuron", mlp.down, "input", -1, i, 1)


def _mlps(model: nn.Module) -> list[Mlp]:
    """Return the MLPs in the order of the model's modules; `down` is empty for stacks of experts.

    Raises:
        ComponentError: When two linear layers of one MLP could read its neurons.
    """
    blocks = attention_blocks(model)
    attention = [*blocks, *(inside(block.rpartition(".")[0], SIBLING_PROJECTION) for block in blocks)]
    holders = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList | nn.Sequential)}
    lists = {name for name in holders if any(block.startswith(inside(name, "")) for block in blocks)}
    linear: list[str] = []
    found: list[Mlp] = []
    for name, module in model.named_modules():
        in_attention = any(name == block or name.startswith(inside(block, "")) for block in attention)
        if in_attention or not any(name.startswith(inside(holder, "")) for holder in lists):
            continue
        if expert_stack_of(module) is not None:
            found.append(Mlp(name, ""))
        if is_linear(module):
            path = _shared_with(name, linear, model, lists)
            linear.append(name)
            if path is not None:
                found.append(Mlp(path, name))
    twice = [path for path, count in Counter(mlp.path for mlp in found).items() if count > 1]
    if twice:
        layers = [mlp.down for mlp in found if mlp.path == twice[0]]
        raise ComponentError(
            f"cannot determine the MLP of {twice[0]!r}: {layers} could all read its neurons; choose input_features of "
            f"one of them"
        )
    return found


def _shared_with(down: str, earlier: list[str], model: nn.Module, lists: set[str]) -> str | None:
    """Return the smallest module that a linear layer shares with an earlier one that computes what it reads."""
    layer = model.get_submodule(down)
    neurons, width = input_channels(layer), output_channels(layer)
    path = down
    while (path := path.rpartition(".")[0]) and path not in lists:
        for name in earlier:
            up = model.get_submodule(name)
            fits = input_channels(up) == width and output_channels(up) in (neurons, 2 * neurons)
            if fits and name.startswith(inside(path, "")):
                return path
    return None
