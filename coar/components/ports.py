"""The roles of the outputs of an attention block's projections, found by gradients: query, key or value, and its head.

A head's output for a text of one token depends on that token's value alone; so does its first output with a causal
mask. Its later outputs also depend on the keys and values of the first position, and on the queries at their own
position. So gradients distinguish the outputs of projections, separate or fused, for any names and any layout of heads.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from coar.components.table import Component
from coar.components.trace import random_tokens, run
from coar.errors import ComponentError

POSITIONS = 4  # tokens of the pass
DRAWS = 3  # draws of random outputs of projections, so that no slope is near 0 by chance in all draws
ROUNDED = 1e-5  # share of an output's largest slope, below which a slope is rounding error


class Port(NamedTuple):
    """Outputs of a projection that the same heads read, in one role.

    Attributes:
        kind: `q`, `k` or `v`: queries, keys or values.
        heads: The heads that read them: one, or all of a group with shared keys and values.
        rows: Numbers of the outputs, ascending.
    """

    kind: str
    heads: tuple[int, ...]
    rows: tuple[int, ...]


class Block(NamedTuple):
    """An attention block.

    Attributes:
        path: Its path.
        projections: Paths of the linear layers that read the block's input.
        heads: Its heads, slices of its output projection's input.
    """

    path: str
    projections: tuple[str, ...]
    heads: tuple[Component, ...]


@torch.inference_mode(False)
@torch.enable_grad()
def ports_of(model: nn.Module, blocks: Sequence[Block], *, causal: bool = True) -> list[dict[str, tuple[Port, ...]]]:
    """Return the ports of every block's projections by path, in the order of their rows.

    Args:
        model: The model.
        blocks: Its attention blocks.
        causal: Whether blocks in which tokens see later ones are refused.

    Raises:
        ComponentError: When a block is not causal, or an output of a projection is not a query, key or value of heads.
    """
    several = _recorded(model, blocks, POSITIONS)
    slopes = [_slopes(block, *several, POSITIONS) for block in blocks]
    scales = [[torch.maximum(*pair).amax((0, 1)) * ROUNDED for pair in own] for own in slopes]  # of each row
    backward = [_see_later(own, scale) for own, scale in zip(slopes, scales, strict=True)]
    if any(backward):
        if causal:
            raise ComponentError(
                f"{blocks[backward.index(True)].path!r} lets tokens see later ones, as encoders do; edges need a "
                f"decoder-only model, with causal attention: use attention_heads and modules for this one, or give "
                f"causal=False if its residual stream is a plain sum"
            )
        alone = _recorded(model, blocks, 1)
        single = [_slopes(block, *alone, 1) for block in blocks]
        slopes = [
            [(first, later) for (first, _), (_, later) in zip(*both, strict=True)]
            for both in zip(single, slopes, strict=True)
        ]
    return [_of_block(*each) for each in zip(blocks, slopes, scales, strict=True)]


def _recorded(model: nn.Module, blocks: Sequence[Block], positions: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Run the model with random outputs of projections; return these and the heads' outputs, each by path."""
    most = max(len(block.heads) for block in blocks)
    tokens = random_tokens(model, 1, positions).expand(DRAWS * most, -1)  # a row for each draw and head
    leaves: dict[str, Tensor] = {}
    heads: dict[str, Tensor] = {}
    draw = torch.Generator().manual_seed(0)

    def replace(path: str, result: Tensor) -> Tensor:
        """Return random float32 outputs, which replace a projection's and end the flow of gradients."""
        noise = torch.randn(DRAWS, 1, positions, result.shape[-1], generator=draw).to(result.device)
        leaves[path] = noise.expand(-1, most, -1, -1).reshape(result.shape).clone().requires_grad_()
        return leaves[path].clone()  # blocks may write into it

    with ExitStack() as stack:
        for block in blocks:
            for path in block.projections:

                def after(_module: nn.Module, _args: Any, result: Tensor, path: str = path) -> Tensor:
                    return replace(path, result)

                stack.callback(model.get_submodule(path).register_forward_hook(after).remove)
            site = block.heads[0].site

            def before(module: nn.Module, args: tuple[Any, ...], site: str = site) -> tuple[Any, ...]:
                heads[site] = args[0]
                return (args[0].detach().to(module.weight.dtype), *args[1:])

            stack.callback(model.get_submodule(site).register_forward_pre_hook(before).remove)
        run(model, tokens)
    return leaves, heads


def _slopes(
    block: Block, leaves: dict[str, Tensor], heads: dict[str, Tensor], positions: int
) -> list[tuple[Tensor, Tensor]]:
    """Return the slopes of a block's first outputs, and of its later ones, by the outputs of each projection.

    Each is (heads, positions, outputs of the projection), the largest absolute slope of all draws.
    """
    z = heads[block.heads[0].site]
    z = z.reshape(DRAWS, -1, positions, z.shape[-1])
    own = [leaves[path] for path in block.projections]
    found = []
    for read in (slice(0, 1), slice(1, None)):
        mix = torch.zeros_like(z)
        draw = torch.Generator().manual_seed(1)
        for number, head in enumerate(block.heads):
            part = mix[:, number, read, head.position : head.position + head.size]
            part.copy_(torch.randint(2, part.shape, generator=draw) * 2 - 1)
        slopes = torch.autograd.grad((z * mix).sum(), own, retain_graph=True, allow_unused=True, materialize_grads=True)
        shape = (DRAWS, z.shape[1], positions, -1)
        found.append([slope.abs().reshape(shape)[:, : len(block.heads)].amax(0) for slope in slopes])
    return list(zip(*found, strict=True))


def _see_later(slopes: list[tuple[Tensor, Tensor]], scales: list[Tensor]) -> bool:
    """Return whether a block's first outputs depend on later positions."""
    return any(bool((first[:, 1:] > scale).any()) for (first, _), scale in zip(slopes, scales, strict=True))


def _of_block(block: Block, slopes: list[tuple[Tensor, Tensor]], scales: list[Tensor]) -> dict[str, tuple[Port, ...]]:
    found = {}
    for path, (first, later), scale in zip(block.projections, slopes, scales, strict=True):
        # whether a head's first output, and its later ones, depend on the first position, and on later ones
        parts = (first[:, 0] > scale, later[:, 0] > scale, (later[:, 1:] > scale).any(1))
        found[path] = _grouped(block, path, torch.stack(parts, -1))
    return found


KINDS = {(True, True, True): "v", (False, True, True): "k", (False, False, True): "q"}


def _grouped(block: Block, path: str, signs: Tensor) -> tuple[Port, ...]:
    """Return the ports of a projection from (heads, rows, 3) booleans."""
    rows: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for row, own in enumerate(signs.transpose(0, 1).tolist()):
        heads = tuple(head for head, (_, _, later) in enumerate(own) if later)
        seen = {tuple(own[head]) for head in heads}
        kind = KINDS.get(next(iter(seen))) if len(seen) == 1 else None
        if kind is None or (kind == "q" and len(heads) > 1):
            raise ComponentError(
                f"output {row} of {path!r} acts on heads {list(heads)} of {block.path!r} neither as a query of one "
                f"head nor as a key or a value of a group; such attention (gates, low-rank projections, norms over all "
                f"heads) has no edges here: use attention_heads and modules"
            )
        rows.setdefault((kind, heads), []).append(row)
    ports = [Port(kind, heads, tuple(numbers)) for (kind, heads), numbers in rows.items()]
    if len({len(port.rows) for port in ports}) > 1:
        sizes = {f"{port.kind} of heads {port.heads}": len(port.rows) for port in ports}
        raise ComponentError(
            f"{path!r} has queries, keys and values of different sizes: {sizes}; edges need equal ones: use "
            f"attention_heads and modules"
        )
    return tuple(ports)
