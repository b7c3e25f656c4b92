"""Methods side by side, figures of circuits, and the command that makes both from a pipeline file."""

import json
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import coar
from coar.circuits.evaluator import CircuitEvaluator
from coar.circuits.figures import draw_sizes
from coar.cli.common import app
from coar.errors import CircuitError, OutputError, SettingsError
from tests.edge_oracle import build
from tests.test_circuits import study_of, texts

PIPELINE = """
from tests.test_circuits import study_of, texts


def study(*, ablation="mean"):
    import coar

    return study_of(ablation=coar.Counterfactual() if ablation == "counterfactual" else None)


def judge():
    return texts(9, 4)


def learning():
    return texts(3, 8)
"""


@pytest.fixture
def file(tmp_path):
    """A pipeline file of a small model."""
    (tmp_path / "small.py").write_text(PIPELINE)
    return tmp_path / "small.py"


def test_methods_are_compared_on_held_out_examples() -> None:
    """Rows are judgements of circuits that hold; a smaller circuit's constants may start from the larger one's."""
    evaluator = CircuitEvaluator(study_of(), device="cpu")
    methods = {"eap": {}, "random": {"seed": 3}}
    held = texts(9, 4)
    found = coar.compare_methods(evaluator, held, methods, [50, 60], constant_steps=40, progress=False)
    assert list(zip(found.table["method"], found.table["edges"], strict=True)) == [
        ("eap", 60),
        ("eap", 50),
        ("random", 60),
        ("random", 50),
    ]
    for _, row in found.table.iterrows():
        judged = coar.faithfulness(found.circuits[row["method"], row["edges"]], evaluator, held)
        assert (row["kl"], row["output"], row["kept"]) == pytest.approx((judged.kl, judged.output, judged.edges))
    scores = coar.circuit_scores(evaluator.study, "eap", evaluator=evaluator, progress=False)
    again = coar.circuit(scores, edges=50, constant_steps=40, start=found.circuits["eap", 60], progress=False)
    np.testing.assert_allclose(again.constants, found.circuits["eap", 50].constants, atol=1e-5)
    assert not np.allclose(again.constants, coar.circuit(scores, edges=50, constant_steps=40, progress=False).constants)
    with pytest.raises(SettingsError, match="a circuit of 5000 edges was requested"):
        coar.compare_methods(evaluator, held, methods, [20, 5000], progress=False)


def test_a_drawing_has_all_nodes_and_edges() -> None:
    """Labels of writers and the output, an arrow for each edge into each of its heads, layers from below to above."""
    model = build("llama")
    edges = ("embed -> L0.G0.v", "embed -> L0.H1.q", "L0.H1 -> L1.mlp", "L1.mlp -> out")
    facts = {"table": "edges", "size": 99, "weights": "w", "ablation": "Mean", "method": "eap", "constants": None}
    made = coar.Circuit(edges=edges, **facts)
    axes = made.plot(model, plt.figure().subplots())
    places = {text.get_text(): text.get_position() for text in axes.texts if text.get_text()}
    assert sorted(places, key=lambda label: places[label][1]) == ["embed", "L0.H1", "L1.mlp", "out"]
    ends = [(text.xyann, text.xy) for text in axes.texts if not text.get_text()]
    assert sorted(ends) == sorted(
        [
            (places["embed"], places["L0.H1"]),  # the group's values, of the one head that writes
            (places["embed"], places["L0.H1"]),
            (places["L0.H1"], places["L1.mlp"]),
            (places["L1.mlp"], places["out"]),
        ]
    )
    many = coar.Circuit(edges=tuple(f"{i} -> out" for i in range(200)), **facts | {"size": 200})
    with pytest.raises(CircuitError, match="a drawing shows at most 150 edges, and this circuit has 200 edges"):
        many.plot(model)
    axes = made.plot()  # without the model the group is a node of its own
    assert {"embed", "L0.G0", "L0.H1", "L1.mlp", "out"} == {text.get_text() for text in axes.texts} - {""}
    assert "Circuit of 4 of 99 edges, by eap" in made._repr_html_()
    assert "embed -&gt; L0.G0.v" in made._repr_html_()
    assert ", and 188 more" in many._repr_html_()
    plt.close("all")


def test_a_figure_has_a_line_for_each_method() -> None:
    """With the divergence of each size, smallest circuit first."""
    table = pd.DataFrame({"method": ["eap", "eap", "ugs"], "edges": [50, 10, 10], "kl": [0.1, 0.5, 0.2]})
    axes = draw_sizes(plt.figure().subplots(), table)
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert lines == {"eap": ([10, 50], [0.5, 0.1]), "ugs": ([10], [0.2])}
    plt.close("all")


def test_the_command_writes_what_python_finds(file, tmp_path) -> None:
    """Table, figure, drawing and circuits; they are those of `compare_methods` on the prompts of `learning()`."""
    words = ["circuit", str(file), "--edges", "60,20", "--methods", "eap,random", "--constant-steps", "3"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "8 learning and 4 held-out prompts" in done.output
    files = {path.name for path in (tmp_path / "out").iterdir()}
    circuits = {f"{method}-{size}.json" for method in ("eap", "random") for size in (20, 60)}
    assert files == {"circuits.csv", "circuits.png", "eap-20.png", *circuits}
    evaluator = CircuitEvaluator(replace(study_of(), examples=texts(3, 8)), device="cpu")
    found = coar.compare_methods(
        evaluator, texts(9, 4), {"eap": {}, "random": {}}, [20, 60], constant_steps=3, progress=False
    )
    told = pd.read_csv(tmp_path / "out" / "circuits.csv")
    columns = ["kept", "kl", "output", "faithfulness", "agreement", "complement_kl", "passes"]
    np.testing.assert_allclose(told[columns], found.table[columns].astype(float), atol=1e-5)
    stored = json.loads((tmp_path / "out" / "eap-20.json").read_text())
    assert tuple(stored["edges"]) == found.circuits["eap", 20].edges


def test_fits_of_a_run_are_methods_of_the_command(file, tmp_path) -> None:
    """Circuits are then found on the examples of the run."""
    study = study_of()
    run = coar.collect(study, tmp_path / "run.zarr", masks=2, device="cpu", progress=False)
    coar.mask_gradient(study, run, device="cpu", progress=False)
    words = ["circuit", str(file), "--edges", "20", "--methods", "mask_gradient", "--constant-steps", "2"]
    done = CliRunner().invoke(
        app, [*words, "--run", str(tmp_path / "run.zarr"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    )
    assert done.exit_code == 0, done.output
    assert "6 learning and 4 held-out prompts" in done.output
    assert (tmp_path / "out" / "mask_gradient-20.json").is_file()


def test_wrong_options_of_the_command(file) -> None:
    """A list that is none, an unknown method and an unknown precision are errors of one line."""
    for words, message in (
        (["--edges", "many"], "--edges many is not a list of numbers"),
        (["--methods", "eap,best", "--edges", "20"], "unknown method 'best'"),
        (["--precision", "half"], "unknown precision 'half'"),
    ):
        done = CliRunner().invoke(app, ["circuit", str(file), *words])
        assert done.exit_code == 1
        assert message in done.output


def test_relative_outputs_are_refused() -> None:
    """The divergence is measured in any case, so the output has to be something else."""
    study = study_of()
    relative = coar.Study(
        model=study.model,
        examples=study.examples,
        components=study.components,
        output=coar.KLDivergence(),
        ablation=study.ablation,
    )
    with pytest.raises(OutputError, match="the divergence from the unablated model is measured in any case"):
        coar.circuit_scores(relative, "eap", device="cpu", progress=False)


def test_bfloat16_is_close() -> None:
    """Gradients and divergences under automatic mixed precision, within its rounding."""
    study = study_of()
    exact, low = (CircuitEvaluator(study, device="cpu", precision=one) for one in ("float32", "bf16"))
    keep = (torch.rand(exact.components, generator=torch.Generator().manual_seed(0)) < 0.8).float()
    slopes = [one.gradients(keep).by_keep for one in (exact, low)]
    assert 0 < (slopes[0] - slopes[1]).abs().max() < 0.1 * slopes[0].abs().max()
    np.testing.assert_allclose(low.measure(keep).kl, exact.measure(keep).kl, atol=0.05)
