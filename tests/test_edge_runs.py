"""Runs over edges: outputs are the oracle's, and they are stored, resumed and fitted as any other run."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import coar
from coar.errors import AblationError, EditError, SettingsError
from coar.forward.memory_limit import gradient_bytes, ledger_bytes, mask_bytes
from coar.forward.runner import FastRunner, ReferenceRunner
from coar.gates.folding import fold
from tests import edge_oracle
from tests.edge_oracle import WORDS, build
from tests.faults.helpers import grouped

FAMILY, EXAMPLES, LENGTH = "llama", 8, 5


def texts(seed: int, count: int, *, ragged: bool = False) -> coar.Examples:
    """Return texts of random tokens, of which some are padded in front; n and n + count / 2 are a pair."""
    ids = torch.randint(2, WORDS, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if ragged:
        mask[1::3, :2] = 0
    plain = coar.token_examples({"input_ids": ids * mask, "attention_mask": mask})
    pairs = {"pair": np.arange(count) % (count // 2)}
    return coar.Examples(inputs=plain.inputs, targets=plain.targets, metadata=pairs)


def study_of(ablation: coar.Ablation, *, ragged: bool = False) -> coar.Study:
    """Return a study of all edges of a small model."""
    model = build(FAMILY)
    return coar.Study(
        model=model,
        examples=texts(0, EXAMPLES, ragged=ragged),
        components=coar.edges(model),
        output=coar.TokenLogProbability(reduction="last"),
        ablation=ablation,
        sampler=coar.BernoulliSampler(ablated_fraction=0.3, seed=1),
    )


def collected(study: coar.Study, path, masks: int = 6, **settings) -> coar.Run:
    """Collect a run in several units."""
    blocks = {"mask_block": 4, "example_block": 5, "batch_size": 3, "device": "cpu", "progress": False}
    return coar.collect(study, path, masks=masks, **grouped(blocks | settings))


def expected(study: coar.Study, mask: np.ndarray, n: int) -> float:
    """Return the oracle's log-probability of an example's last token under a mask."""
    kept = dict(zip(study.components.names, mask.astype(float).tolist(), strict=True))
    inputs, targets = study.examples.block(0, EXAMPLES)

    def text(row: int) -> tuple[Tensor, int]:
        start = int(inputs["attention_mask"][row].argmax())
        return inputs["input_ids"][row, start:], start

    def written(ids: Tensor, start: int) -> dict[tuple[str, int], Tensor]:
        found: dict[tuple[str, int], Tensor] = {}
        edge_oracle.logits(
            FAMILY, study.model, ids, lambda *_: 1.0, lambda *_: torch.zeros(1), start=start, written=found
        )
        return found

    ablation = study.ablation
    if isinstance(ablation, coar.Mean):
        values: dict[str, list[Tensor]] = {}
        for row in ablation.calibration.inputs["input_ids"]:
            for (label, t), value in written(row, 0).items():
                if t > 0:
                    values.setdefault(label, []).append(value)
        means = {label: torch.stack(rows).mean(0) for label, rows in values.items()}
        replacement = lambda label, _: means[label]  # noqa: E731
    elif isinstance(ablation, coar.ZeroActivation):
        replacement = lambda *_: torch.zeros(1)  # noqa: E731
    else:
        other = written(*text(int(ablation.sources(study.examples)[n])))
        replacement = lambda label, t: other[label, t]  # noqa: E731
    ids, start = text(n)
    logits = edge_oracle.logits(FAMILY, study.model, ids, lambda w, r: kept[f"{w} -> {r}"], replacement, start=start)
    read = int((targets[n] != -100).nonzero().max())
    if isinstance(study.output, coar.KLDivergence):
        plain = edge_oracle.logits(FAMILY, study.model, ids, lambda *_: 1.0, replacement, start=start)
        p, q = (values[read - start].double().softmax(-1) for values in (logits, plain))
        return float((q * (q / p).log()).sum())
    return float(logits[read - start].log_softmax(-1)[targets[n, read]])


ABLATIONS = {
    "zero": coar.ZeroActivation(),
    "mean": coar.Mean(calibration=texts(5, 6)),
    "resample": coar.Resample(),
    "counterfactual": coar.Counterfactual(),
}


@pytest.mark.parametrize("label", ABLATIONS)
def test_outputs_of_a_run_are_those_of_the_oracle(label: str, tmp_path) -> None:
    """Every ablation, texts padded in front where they need not correspond."""
    study = study_of(ABLATIONS[label], ragged=label in ("zero", "mean"))
    run = collected(study, tmp_path / "run.zarr", gradients=8)
    masks = run.plan.masks(run.sampler, run.n_components, 0, 6)
    outputs = run.array("outputs")[:]
    with torch.no_grad():
        for m in (0, 5):
            for n in range(0, EXAMPLES, 3):
                assert abs(outputs[m, n] - expected(study, masks[m], n)) < 1e-4
    assert np.abs(outputs - run.array("base_output")[:]).mean() > 0.05
    assert run.components == study.components


def test_the_divergence_from_the_unablated_model_is_the_oracles(tmp_path) -> None:
    study = replace(study_of(coar.ZeroActivation(), ragged=True), output=coar.KLDivergence(reduction="last"))
    run = collected(study, tmp_path / "run.zarr", gradients=2)
    masks, outputs = run.plan.masks(run.sampler, run.n_components, 0, 6), run.array("outputs")[:]
    with torch.no_grad():
        for n in range(0, EXAMPLES, 3):
            assert abs(outputs[5, n] - expected(study, masks[5], n)) < 1e-4
    assert outputs.mean() > 0.01


def test_a_stopped_run_goes_on_and_is_fitted(tmp_path) -> None:
    """A run in two parts equals one at a time, bit by bit; fits and the mask gradient at the full model work."""
    study = study_of(ABLATIONS["mean"])
    whole = collected(study, tmp_path / "whole.zarr", masks=120, gradients=8)
    collected(study, tmp_path / "cut.zarr", masks=3)
    cut = collected(study, tmp_path / "cut.zarr", masks=120, gradients=8)
    np.testing.assert_array_equal(cut.array("outputs")[:], whole.array("outputs")[:])
    np.testing.assert_array_equal(cut.array("gradient_kept")[:], whole.array("gradient_kept")[:])
    assert coar.Run.open(tmp_path / "cut.zarr").replacements.shape == (study.components.width,)
    fitted = coar.fit(cut, method="ridge", progress=False)
    assert fitted.weights().shape == (EXAMPLES, len(study.components))
    eap = coar.mask_gradient(study, cut, device="cpu", progress=False).weights()
    runner = ReferenceRunner(study.model, study.components, torch.from_numpy(cut.replacements), study.output)
    block = runner.load(study.examples, 0, EXAMPLES)
    mask, step = np.ones((1, len(study.components)), dtype=np.float32), 2e-2
    strong = np.abs(eap).mean(0).argsort()[-4:]
    for i in strong:
        ends = []
        for end in (1, 1 - step, 1 - 2 * step):
            mask[0, i] = end
            ends.append(runner.outputs(block, mask)[0])
        mask[0, i] = 1
        slope = (3 * ends[0] - 4 * ends[1] + ends[2]) / (2 * step)  # one-sided, of second order
        np.testing.assert_allclose(eap[:, i], slope, atol=3e-2 * np.abs(eap).max())


def test_two_workers_of_a_job_array_fill_a_run_in_an_object_store(tmp_path) -> None:
    """Units dealt to two workers, in a store of fsspec, are those of one process on a disk."""
    study = study_of(ABLATIONS["counterfactual"])
    whole = collected(study, tmp_path / "whole.zarr", gradients=8)
    for number in (1, 2):
        run = collected(study, "memory://edges/run.zarr", gradients=8, worker=(number, 2))
    np.testing.assert_array_equal(run.array("outputs")[:], whole.array("outputs")[:])
    np.testing.assert_array_equal(run.array("gradient_kept")[:], whole.array("gradient_kept")[:])
    assert coar.verify(run) == []


def test_trained_constants(tmp_path) -> None:
    """Optimal constants belong to writers, and lose less on calibration texts than means do."""
    calibration = texts(6, 24)
    ablation = coar.Optimal(calibration=calibration, loss=_Loss(), steps=60, examples_per_step=12, ablated_fraction=0.3)
    study = study_of(ablation)
    trained = ablation.replacements(study.model, study.components, batch_size=8)
    means = coar.Mean(calibration=calibration).replacements(study.model, study.components, batch_size=8)
    assert trained.shape == means.shape == (study.components.width,)
    assert not torch.equal(trained, means)
    losses = {}
    masks = study.sampler.masks("test", range(8), len(study.components))
    for name, constants in (("trained", trained), ("means", means)):
        runner = FastRunner(study.model, study.components, constants, ablation.loss)
        losses[name] = runner.outputs(runner.load(calibration, 0, 24), masks).mean()
    assert losses["trained"] < losses["means"]


class _Loss(coar.TokenLogProbability):
    """Minus the log-probability of the tokens."""

    def __call__(self, result, targets):
        return -super().__call__(result, targets)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_weighted_gradients_are_those_of_the_oracle(share: float) -> None:
    """By all gates and constants, also where all edges are kept, so that constants have no effect."""
    study = study_of(ABLATIONS["zero"])
    table, draw = study.components, torch.Generator().manual_seed(3)
    constants = torch.randn(table.width, generator=draw, requires_grad=True)
    mask = (torch.rand(len(table), generator=draw) < share).float()
    keep = mask.clamp(max=1 - 1e-6).requires_grad_()  # at 1 the oracle has no term with a constant
    first = {row.name.split(" -> ")[0]: row.position for row in table}
    rows = {name: number for number, name in enumerate(table.names)}
    inputs, targets = study.examples.block(0, 2)
    total = torch.zeros(())
    for n, weight in enumerate((1.0, -0.5)):
        logits = edge_oracle.logits(
            FAMILY,
            study.model,
            inputs["input_ids"][n],
            lambda w, r: keep[rows[f"{w} -> {r}"]],
            lambda label, _: constants[first[label] : first[label] + edge_oracle.WIDTH],
        )
        read = int((targets[n] != -100).nonzero().max())
        total = total + weight * logits[read].log_softmax(-1)[targets[n, read]]
    expected = torch.autograd.grad(total, [constants, keep])
    runner = ReferenceRunner(study.model, table, torch.zeros(table.width), study.output)
    weights = np.array([1.0, -0.5], dtype=np.float32)
    _, *found = runner.weighted_gradients(
        runner.load(study.examples, 0, 2), mask.numpy(), constants.detach().numpy(), lambda _: weights
    )
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs.numpy(), rtol=1e-3, atol=1e-4)
    assert (np.abs(found[0]).max() > 0.01) == (share < 1)
    assert np.abs(found[1]).max() > 0.01


def test_memory_of_the_ledger_counts() -> None:
    """The bytes per example contain what all writers write; a limit below that is refused."""
    study = study_of(ABLATIONS["zero"])
    ledger = 4 * LENGTH * len(coar.nodes(study.model)) * edge_oracle.WIDTH
    assert ledger_bytes(study) == ledger
    assert mask_bytes(study, study.model) > ledger
    assert gradient_bytes(study, study.model) > 2 * ledger
    assert mask_bytes(study_of(ABLATIONS["resample"]), study.model) > 2 * ledger


def test_a_memory_limit_below_one_example(tmp_path) -> None:
    """The message names what one example takes."""
    study, execution = study_of(ABLATIONS["zero"]), coar.Execution(memory_limit=5000)
    with pytest.raises(SettingsError, match=r"the memory limit is 4\.88 KiB"):
        coar.collect(study, tmp_path / "r.zarr", masks=4, execution=execution, progress=False)


def test_what_edges_do_not_have(tmp_path) -> None:
    """Zeroed weights, peaks, means by position and permanent edits are refused in words."""
    study = study_of(ABLATIONS["zero"])
    calibration = texts(5, 6)
    for ablation, message in (
        (coar.ZeroWeight(), "no weights of its own"),
        (coar.Peak(calibration=calibration), "from no activation"),
        (coar.PositionMean(calibration=calibration), "from no activation"),
    ):
        with pytest.raises(AblationError, match=message):
            ablation.replacements(study.model, study.components, batch_size=4)
    run = collected(study, tmp_path / "run.zarr", masks=100)
    goal = coar.EditGoal(targets="id < 2", references="id >= 2", direction="decrease")
    attributions = coar.fit(run, method="ridge", progress=False)
    with pytest.raises(EditError, match="no weight belongs to one edge alone"):
        coar.edit(attributions, goal, budget=2)
    with pytest.raises(EditError, match="no weight belongs to one edge alone"):
        fold(study.model, study.components[:1], [0.0], batch_norms={})
