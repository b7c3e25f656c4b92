"""The finder of attention heads, one component per head."""

import logging
from collections.abc import Iterator, Sequence

from torch import nn

from coar.components.finders import Patterns, inside, matching
from coar.components.layers import input_channels, is_linear, unwrapped
from coar.components.table import Component, Components
from coar.errors import ComponentError

log = logging.getLogger(__name__)
HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")  # attributes with the number of heads
HEAD_WIDTHS = ("head_dim", "attention_head_size", "head_size", "dim_head")  # attributes with the width of a head
PROJECTIONS = (
    "o_proj",
    "out_proj",
    "c_proj",
    "out_lin",
    "to_out",
    "to_add_out",
    "linear_out",
    "Wo",
    "o",
    "proj",
    "projection",
    "merge",
    "dense",
)
QUERIES = ("qkv", "to_qkv", "qk", "to_qk", "q", "to_q", "q_proj", "query", "wq")  # layers that make queries
INTERLEAVED = ("timm.models.nest.Attention",)  # types whose heads are not slices: head h has features h, h + heads, ...
SIBLING_PROJECTION = "output.dense"  # of BERT and its relatives, next to the block that computes the heads


def attention_heads(model: nn.Module, *, include: Patterns = None, exclude: Patterns = None) -> Components:
    """Find the heads of every attention block: one component per head.

    A head is a contiguous slice of the input of the block's output projection, for any attention kernel; with grouped
    queries there is one head per query head.

    Blocks are found by type and role. A block has `attention` or `attn` in the name of its type, or a number of heads,
    a layer of queries and an output projection; it has parameters, and no smaller block inside. Its output projection
    is a linear layer with one of the usual names (`o_proj`, `out_proj`, `c_proj`, ...), the first layer of a sequence
    of that name, the only layer of a module of that name or, as in BERT, `output.dense` next to the block. An attribute
    of the block such as `num_heads` or `head_dim`, or `num_attention_heads` of its configuration, gives the heads,
    which must fill the projection's input exactly. A warning names blocks with queries and a projection that are left
    out, since nothing gives their heads.

    Args:
        model: The model to look through.
        include: Shell-style patterns of the blocks' names; only blocks that match one are taken.
        exclude: Patterns of the blocks' names to leave out; applied after `include`.

    Raises:
        ComponentError: When the model has no attention block, a pattern matches none, or the heads or the projection
            of a block cannot be determined.
    """
    model = unwrapped(model)
    blocks, others = attention_blocks(model), _without_heads(model)
    left = f"{others[0]!r}, a {_kind(model.get_submodule(others[0]))}," if others else ""
    if not blocks:
        also = f"; {left} has queries and an output projection, and no number of heads among its attributes"
        raise ComponentError(
            f"{type(model).__name__} has no attention block{also if others else ''}; choose a finder for another kind "
            f"of component, such as input_features of the projection"
        )
    if others:
        log.warning(
            "%s has queries and an output projection, and no number of heads among its attributes, so no head of it is "
            "found (%d such blocks); find its inputs by input_features of the projection",
            left,
            len(others),
        )
    names = matching(blocks, include, exclude, "attention block")
    return Components(head for name in names for head in _heads(model, name))


def attention_blocks(model: nn.Module) -> list[str]:
    """Return the paths of blocks that have parameters and no smaller block inside."""
    named = [
        name
        for name, module in model.named_modules()
        if next(module.parameters(), None) is not None and (_is_named_attention(module) or _acts_as_attention(module))
    ]
    return [name for name in named if not any(other.startswith(inside(name, "")) for other in named if other != name)]


def _is_named_attention(module: nn.Module) -> bool:
    return any(word in type(module).__name__.lower() for word in ("attention", "attn"))


def _acts_as_attention(module: nn.Module) -> bool:
    """Return whether a module has a number of heads, a layer of queries and a linear output projection."""
    return bool(_number(module, HEAD_COUNTS)) and _has_queries(module)


def _without_heads(model: nn.Module) -> list[str]:
    """Return the paths of blocks with queries and a projection, and without a number of heads or a telling name."""
    return [
        name
        for name, module in model.named_modules()
        if not _is_named_attention(module) and not _number(module, HEAD_COUNTS) and _has_queries(module)
    ]


def _has_queries(module: nn.Module) -> bool:
    """Return whether a module has a layer of queries and a linear output projection."""
    children = dict(module.named_children())
    return bool(
        any(is_linear(children[name]) for name in QUERIES if name in children)
        and any(_first_linear(name, children[name]) for name in PROJECTIONS if name in children)
    )


def _heads(model: nn.Module, name: str) -> Iterator[Component]:
    block, projections = model.get_submodule(name), _projections(model, name)
    if _kind(block) in INTERLEAVED:
        raise ComponentError(
            f"the heads of {name!r}, a {_kind(block)}, alternate along the input of its output projection, and a head "
            f"must be a slice of it; exclude the block, or choose input_features of the projection"
        )
    width = input_channels(model.get_submodule(projections[0])) if len(projections) == 1 else 0
    count = _count(block, width) if width else 0
    if count == 0:
        raise _not_understood(model, name, projections)
    size = width // count
    for i in range(count):
        yield Component(f"{inside(name, 'head')}[{i}]", "attention head", projections[0], "input", -1, i * size, size)


def _projections(model: nn.Module, name: str) -> list[str]:
    """Return the paths of the linear layers that may be a block's output projection."""
    modules = dict(model.named_modules())
    own = [inside(name, child) for child in PROJECTIONS]
    found = [linear for path in own if path in modules and (linear := _first_linear(path, modules[path]))]
    sibling = inside(name.rpartition(".")[0], SIBLING_PROJECTION)
    return found or [path for path in [sibling] if name and path in modules and is_linear(modules[path])]


def _first_linear(path: str, module: nn.Module) -> str:
    """Return the path of a linear layer, of the one that begins a sequence, or of the only one inside; "" for none."""
    if is_linear(module):
        return path
    inner = [name for name, part in module.named_children() if next(part.parameters(), None) is not None]
    if len(inner) == 1 and not module._parameters and is_linear(module.get_submodule(inner[0])):
        return inside(path, inner[0])
    parts = module.named_children() if isinstance(module, nn.Sequential | nn.ModuleList) else []
    reading = [(name, part) for name, part in parts if not isinstance(part, nn.Dropout | nn.Identity)]
    return inside(path, reading[0][0]) if reading and is_linear(reading[0][1]) else ""


def _count(block: nn.Module, width: int) -> int:
    """Return the number of heads that fill the projection's input, 0 when the block's attributes do not fit it."""
    count = _number(block, HEAD_COUNTS) or _number(getattr(block, "config", None), HEAD_COUNTS)
    size = _number(block, HEAD_WIDTHS)
    count = count or (width // size if size else 0)
    fits = bool(count) and width % count == 0 and size in (0, width // count)
    return count if fits else 0


def _number(holder: object, names: Sequence[str]) -> int:
    """Return the value of the first of these attributes that is a whole number, 0 when none is."""
    values = [getattr(holder, name, None) for name in names]
    return next((value for value in values if type(value) is int), 0)


def _not_understood(model: nn.Module, name: str, projections: list[str]) -> ComponentError:
    block, parent = model.get_submodule(name), name.rpartition(".")[0]
    adapted = [
        child for child, layer in block.named_children() if child in PROJECTIONS and hasattr(layer, "base_layer")
    ]
    if adapted:
        return ComponentError(
            f"cannot determine the heads of {name!r}: an adapter, {_kind(block.get_submodule(adapted[0]))}, "
            f"wraps its output projection {adapted[0]!r}; merge the adapter first, as with "
            f"model = model.merge_and_unload() of peft, or leave the projection out of the adapter's target_modules"
        )
    attributes = {key: getattr(block, key) for key in (*HEAD_COUNTS, *HEAD_WIDTHS) if hasattr(block, key)}
    widths = {path: input_channels(model.get_submodule(path)) for path in projections}
    around = f", in {_described(model.get_submodule(parent))}" if name else ""
    return ComponentError(
        f"cannot determine the heads of {name!r}: it is {_described(block)}{around}; its attributes are {attributes}, "
        f"and the layers that could be its output projection have inputs {widths}; heads were expected to fill the "
        f"input of exactly one such layer: exclude the block, or cut the projection's weight with parameter_slices"
    )


def _kind(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _described(module: nn.Module) -> str:
    children = ", ".join(f"{name} ({type(child).__name__})" for name, child in module.named_children())
    return f"a {type(module).__name__} of {children or 'no children'}"
