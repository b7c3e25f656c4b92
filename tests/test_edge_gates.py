"""Gates on edges: against an oracle that shares no code with them, one position and one reader at a time."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import coar
from coar.components.table import Components
from coar.errors import AblationError, ComponentError
from coar.gates.gates import Gates
from tests import edge_oracle
from tests.edge_oracle import MODELS, WORDS, build

ROWS, LENGTH = 3, 5


def drawn(seed: int, *shape: int) -> Tensor:
    """Return normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(seed: int = 0) -> Tensor:
    """Return (rows, positions) tokens, none of them padding."""
    return torch.randint(2, WORDS, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed))


def small_circuits(edges: Components) -> Tensor:
    """Return a mask of its own for each row that keeps one edge in thirty, and no edge to the second layer's MLP."""
    masks = torch.rand(ROWS, len(edges), generator=torch.Generator().manual_seed(6)) < 1 / 30
    masks[:, [name.endswith("-> L1.mlp") for name in edges.names]] = False
    return masks.float()


def masks_for(edges: Components, seed: int = 1) -> Tensor:
    """Return a mask of its own for each row: mostly zeros and ones, some between."""
    draw = torch.Generator().manual_seed(seed)
    hard = (torch.rand(ROWS, len(edges), generator=draw) < 0.6).float()
    soft = torch.rand(ROWS, len(edges), generator=draw)
    return torch.where(torch.rand(ROWS, len(edges), generator=draw) < 0.2, soft, hard)


def keeps(edges: Components, mask: Tensor) -> Callable[[str, str], float]:
    """Return how much of an edge is kept, by the labels of its ends."""
    by_name = dict(zip(edges.names, mask.tolist(), strict=True))
    return lambda writer, reader: by_name[f"{writer} -> {reader}"]


def by_writer(edges: Components, constants: Tensor) -> Callable[[str, int], Tensor]:
    """Return the constants of a writer by its label, at any position."""
    first = {row.name.split(" -> ")[0]: row.position for row in edges}
    return lambda writer, _: constants[first[writer] : first[writer] + edges[0].size]


@pytest.mark.parametrize("family", MODELS)
def test_random_masks_give_what_the_oracle_gives(family: str) -> None:
    """Every family, a mask per row, hard and soft: logits at all positions are those of explicit loops."""
    model, ids = build(family), tokens()
    edges = coar.edges(model)
    constants, masks = drawn(2, edges.width), masks_for(edges)
    with torch.no_grad(), Gates(model, edges, constants, use_hooks=True) as gates:
        gates.set(masks)
        found = model(ids).logits
        gates.confirm()
    with torch.no_grad():
        for row in range(ROWS):
            expected = edge_oracle.logits(
                family, model, ids[row], keeps(edges, masks[row]), by_writer(edges, constants)
            )
            scale = expected.abs().max()
            assert (found[row] - expected).abs().max() < 1e-4 * scale
            assert (model(ids[row : row + 1]).logits[0] - expected).abs().max() > 1e-2 * scale  # masks matter


@pytest.mark.parametrize("family", ["gpt2", "neox", "gemma2", "opt"])
@pytest.mark.parametrize("replaced", ["constants", "other texts"])
def test_small_circuits_give_what_the_oracle_gives(family: str, replaced: str) -> None:
    """Where few edges are kept, also in padded texts: logits are the oracle's, with constants and with sources."""
    model, ids, others = build(family), tokens(), tokens(9)
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask[0, :2] = 0
    edges = coar.edges(model)
    constants, masks = drawn(2, edges.width), small_circuits(edges)
    resample = replaced == "other texts"
    with torch.no_grad(), Gates(model, edges, constants, use_hooks=True, resample=resample) as gates:
        if resample:
            gates.record(lambda: model(input_ids=others, attention_mask=mask))
        gates.set(masks)
        found = model(input_ids=ids, attention_mask=mask).logits
        gates.set(masks[1])
        shared = model(input_ids=ids, attention_mask=mask).logits
    with torch.no_grad():
        for row, start in enumerate((2, 0, 0)):
            written: dict[tuple[str, int], Tensor] = {}
            text, other = ids[row, start:], others[row, start:]
            edge_oracle.logits(
                family, model, other, lambda *_: 1.0, lambda *_: torch.zeros(1), start=start, written=written
            )
            constant = (lambda label, t, w=written: w[label, t]) if resample else by_writer(edges, constants)
            for mine, own in ((found, masks[row]), (shared, masks[1])):
                expected = edge_oracle.logits(family, model, text, keeps(edges, own), constant, start=start)
                assert (mine[row, start:] - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("family", MODELS)
def test_the_full_mask_is_the_plain_model(family: str) -> None:
    """With every edge kept, logits are those of the model; afterwards the model is as before."""
    model, ids = build(family), tokens()
    edges = coar.edges(model)
    with torch.no_grad():
        plain = model(ids).logits
        with Gates(model, edges, drawn(2, edges.width), use_hooks=True) as gates:
            assert torch.equal(model(ids).logits, plain)  # no mask yet
            gates.set(torch.ones(len(edges)))
            assert (model(ids).logits - plain).abs().max() < 1e-5 * plain.abs().max()
        assert torch.equal(model(ids).logits, plain)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gemma3"])
def test_padding_changes_nothing(family: str, side: str) -> None:
    """Texts of several lengths, padded on either side: logits of each are the oracle's of it without padding."""
    model, ids = build(family), tokens()
    lengths = [LENGTH, LENGTH - 2, 2]
    mask = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, LENGTH - length if side == "left" else 0 :][:length] = 1
    ids = ids * mask
    edges = coar.edges(model)
    constants, masks = drawn(2, edges.width), masks_for(edges)
    with torch.no_grad(), Gates(model, edges, constants, use_hooks=True) as gates:
        gates.set(masks)
        found = model(input_ids=ids, attention_mask=mask).logits
    with torch.no_grad():
        for row, length in enumerate(lengths):
            start = LENGTH - length if side == "left" else 0
            text = ids[row, start : start + length]
            expected = edge_oracle.logits(
                family, model, text, keeps(edges, masks[row]), by_writer(edges, constants), start=start
            )
            assert (found[row, start : start + length] - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("family", ["gpt2", "neox", "opt", "phi"])
def test_gradients_are_finite_differences(family: str) -> None:
    """Gradients by masks of each row and by shared constants, in float64, are slopes of the output itself."""
    model, ids = build(family).double(), tokens()
    edges = coar.edges(model)
    masks = masks_for(edges).double().requires_grad_()
    constants = drawn(2, edges.width).double().requires_grad_()
    weights = drawn(3, ROWS, LENGTH, WORDS).double()
    with Gates(model, edges, torch.zeros(edges.width), use_hooks=True) as gates:

        def value(mask: Tensor, constant: Tensor) -> Tensor:
            gates.replace(constant)
            gates.set(mask)
            return (model(ids).logits * weights).sum()

        by_mask, by_constant = torch.autograd.grad(value(masks, constants), [masks, constants])
        step, draw = 1e-5, torch.Generator().manual_seed(4)
        with torch.no_grad():
            for _ in range(3):
                a = torch.randn(masks.shape, generator=draw, dtype=torch.float64)
                b = torch.randn(constants.shape, generator=draw, dtype=torch.float64)
                for da, db in ((a, 0 * b), (0 * a, b)):
                    ends = [value(masks + s * step * da, constants + s * step * db) for s in (1, -1)]
                    slope = (ends[0] - ends[1]) / (2 * step)
                    expected = (by_mask * da).sum() + (by_constant * db).sum()
                    assert abs(slope - expected) < 1e-5 * abs(slope)


@pytest.mark.parametrize("lacking", ["nothing", "one reader's edges", "one row's edges", "most edges"])
def test_gradients_where_little_is_lacking(lacking: str) -> None:
    """At the full model and near it, where modules that lack nothing take the residual itself, slopes are the same."""
    model, ids = build("gpt2").double(), tokens()
    edges = coar.edges(model)
    masks = torch.ones(ROWS, len(edges), dtype=torch.float64)
    if lacking == "one reader's edges":
        masks[:, [name.endswith("-> L1.mlp") for name in edges.names]] = 0.3
    if lacking == "one row's edges":
        masks[1, ::3] = 0
    if lacking == "most edges":
        masks = small_circuits(edges).double()
    masks.requires_grad_()
    constants = drawn(2, edges.width).double().requires_grad_()
    with Gates(model, edges, torch.zeros(edges.width), use_hooks=True) as gates:

        def value(mask: Tensor, constant: Tensor) -> Tensor:
            gates.replace(constant)
            gates.set(mask)
            return model(ids).logits.square().sum()

        by_mask, by_constant = torch.autograd.grad(value(masks, constants), [masks, constants])
        alone = value(masks.detach(), constants)  # without gradients to masks; at the full model there is none at all
        assert alone.requires_grad == (lacking != "nothing")
        if alone.requires_grad:
            assert torch.allclose(torch.autograd.grad(alone, constants)[0], by_constant, rtol=1e-9, atol=1e-12)
        step, draw = 1e-5, torch.Generator().manual_seed(4)
        with torch.no_grad():
            for _ in range(3):
                way, turn = (torch.randn(one.shape, generator=draw, dtype=torch.float64) for one in (masks, constants))
                turn = turn if lacking == "most edges" else 0 * turn  # at the full model, nothing depends on it
                ends = [value(masks + s * step * way, constants + s * step * turn) for s in (1, -1)]
                slope = (ends[0] - ends[1]) / (2 * step)
                assert abs(slope - (by_mask * way).sum() - (by_constant * turn).sum()) < 1e-5 * abs(slope)


def test_gradients_of_a_root_mean_square_norm() -> None:
    """Norms that compute in float32 allow coarser differences; each mask entry's gradient is still its own slope."""
    model, ids = build("llama"), tokens()
    edges = coar.edges(model)
    masks = masks_for(edges).requires_grad_()
    with Gates(model, edges, drawn(2, edges.width), use_hooks=True) as gates:

        def value(mask: Tensor) -> Tensor:
            gates.set(mask)
            return model(ids).logits[:, -1, 7].double().sum()

        (slopes,) = torch.autograd.grad(value(masks), masks)
        step = torch.zeros_like(masks)
        with torch.no_grad():
            for i in range(0, len(edges), 9):
                step.zero_()[1, i] = 1e-2
                slope = (value(masks + step) - value(masks - step)) / 2e-2
                assert abs(slope - slopes[1, i]) < 2e-3 * slopes.abs().max()


@pytest.mark.parametrize("chunk", [1, 3000])
def test_what_readers_take_in_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With memory for one position, or for some, outputs and gradients are those of all at once."""
    model, ids = build("llama"), tokens()
    edges = coar.edges(model)
    constants = drawn(2, edges.width)

    def passed() -> tuple[Tensor, Tensor]:
        masks = masks_for(edges).requires_grad_()
        with Gates(model, edges, constants, use_hooks=True) as gates:
            gates.set(masks)
            logits = model(ids).logits
            return logits.detach(), torch.autograd.grad(logits[:, -1].square().sum(), masks)[0]

    whole = passed()
    monkeypatch.setattr("coar.gates.ledger.CHUNK", chunk)
    for expected, found in zip(whole, passed(), strict=True):
        assert (expected - found).abs().max() < 1e-5 * expected.abs().max()


def test_a_mask_for_all_rows_and_several_masks_for_one_batch() -> None:
    """One mask for all rows, and two masks with three examples each, are those masks row by row."""
    model, ids = build("qwen2"), tokens()
    edges = coar.edges(model)
    masks = masks_for(edges)
    with torch.no_grad(), Gates(model, edges, drawn(2, edges.width), use_hooks=True) as gates:

        def passed(mask: Tensor, inputs: Tensor) -> Tensor:
            gates.set(mask)
            return model(inputs).logits

        both = passed(masks[:2], torch.cat([ids, ids]))
        for number in range(2):
            one = passed(masks[number], ids)
            assert torch.allclose(one, passed(masks[number].expand(ROWS, -1), ids), atol=1e-5)
            assert torch.allclose(both[number * ROWS : (number + 1) * ROWS], one, atol=1e-5)


def test_coarser_tables_gate_the_edges_they_stand_for() -> None:
    """Nodes, layers' attention as one reader, and a part of the edges give what masks of all edges give."""
    model, ids = build("llama"), tokens()
    edges = coar.edges(model)
    constants, draw = drawn(2, edges.width), torch.Generator().manual_seed(5)
    with torch.no_grad():

        def passed(table: Components, mask: Tensor) -> Tensor:
            with Gates(model, table, constants[: table.width], use_hooks=True) as gates:
                gates.set(mask)
                return model(ids).logits

        for table in (coar.nodes(model), coar.edges(model, ports=False), Components(edges[i] for i in range(5, 60, 3))):
            mask = (torch.rand(len(table), generator=draw) < 0.5).float()
            kept = dict(zip(table.names, mask.tolist(), strict=True))
            every = []
            for name in edges.names:
                writer, reader = name.split(" -> ")
                block = ".".join([reader.split(".")[0], "attn"])
                every.append(kept.get(name, kept.get(f"{writer} -> {block}", kept.get(writer, 1.0))))
            assert torch.allclose(passed(table, mask), passed(edges, torch.tensor(every)), atol=1e-5)


def test_other_examples_replace_what_is_written() -> None:
    """With sources, what replaces a writer is what it wrote for another text at the same position."""
    family = "neox"
    model, ids, others = build(family), tokens(), tokens(9)
    edges = coar.edges(model)
    masks = masks_for(edges)
    nothing = torch.full((edges.width,), torch.nan)
    with torch.no_grad(), Gates(model, edges, nothing, use_hooks=True, resample=True) as gates:
        gates.record(lambda: model(others))
        gates.set(masks)
        found = model(ids).logits
        short = torch.ones(ROWS, LENGTH, dtype=torch.long)
        short[0, -1] = 0
        gates.record(lambda: model(others, attention_mask=short))
        gates.set(masks)
        with pytest.raises(AblationError, match="same number of tokens"):
            model(ids)
    with torch.no_grad():
        for row in range(ROWS):
            written: dict[tuple[str, int], Tensor] = {}
            edge_oracle.logits(family, model, others[row], lambda *_: 1.0, lambda *_: torch.zeros(1), written=written)
            expected = edge_oracle.logits(
                family, model, ids[row], keeps(edges, masks[row]), lambda label, t, w=written: w[label, t]
            )
            assert (found[row] - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_bfloat16(family: str) -> None:
    """A model in bfloat16, and automatic mixed precision, are as near to float32 under masks as the plain model is."""
    model, ids = build(family), tokens()
    edges = coar.edges(model)
    masks, constants = masks_for(edges), drawn(2, edges.width)

    def passed(model: nn.Module) -> tuple[Tensor, Tensor]:
        mask = masks.clone().requires_grad_()
        with Gates(model, edges, constants, use_hooks=True) as gates:
            gates.set(mask)
            logits = model(ids).logits.float()
            return logits.detach(), torch.autograd.grad(logits[:, -1].sum(), mask)[0]

    exact = passed(model)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = passed(model)
    low = passed(build(family).bfloat16())
    for found in (mixed, low):
        for a, b in zip(exact, found, strict=True):
            assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] > 0.99
            assert (a - b).abs().max() < 0.1 * a.abs().max()


def test_tables_that_do_not_fit() -> None:
    """Edges of another model, overlaps, mixtures of kinds, constants by position: each refused in words."""
    model = build("llama")
    edges = coar.edges(model)
    foreign = edges[edges.index("embed -> L0.G1.k")]._replace(site="transformer")
    with pytest.raises(ComponentError, match="belong to another model"):
        Gates(build("gpt2"), Components([foreign]), torch.zeros(32), use_hooks=True)
    table = coar.nodes(model) + edges
    with pytest.raises(ComponentError, match="overlaps"):
        Gates(model, table, torch.zeros(table.width), use_hooks=True)
    with pytest.raises(ComponentError, match="cannot be in one table"):
        edges + coar.attention_heads(model)
    with pytest.raises(AblationError, match="not one per position"):
        Gates(model, edges, torch.zeros(4, edges.width), use_hooks=True)
