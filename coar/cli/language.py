"""The commands trace, lens and edit-facts, for language models."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from coar.cli.common import EXECUTION, DeviceOption, app, report_errors, show, written
from coar.errors import SettingsError

FileArgument = Annotated[Path, typer.Argument(metavar="PIPELINE", help="A pipeline file, such as pipelines/facts.py.")]
FolderOption = Annotated[Path | None, typer.Option("--out", help="Folder to write to [default: reports/<pipeline>].")]
SeedOption = Annotated[int, typer.Option(help="Seed of draws and of training.")]


@app.command(epilog="Example: coar trace pipelines/facts.py --corruption optimal,noise --windows 1,5")
@report_errors
def trace(
    pipeline: FileArgument,
    corruption: Annotated[str, typer.Option(help="optimal, noise, mean, resample, counterfactual.")] = "optimal",
    kinds: Annotated[str, typer.Option(help="Restored parts: attention, mlp, layer.")] = "attention,mlp,layer",
    windows: Annotated[str, typer.Option(help="Numbers of layers that are restored together, odd.")] = "1",
    places: Annotated[str, typer.Option(help="Restored positions: subject, all, last, ...")] = "subject_last,last",
    facts: Annotated[int | None, typer.Option(help="Use only this many facts, spread over all.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of training a constant.")] = 60,
    per_cell: Annotated[bool, typer.Option("--per-cell", help="Train a constant for each cell.")] = False,
    draws: Annotated[int, typer.Option(help="Draws of noise and of other subjects.")] = 5,
    seed: SeedOption = 0,
    out: FolderOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Find where a language model recalls the facts of a pipeline, one table and heat map for each corruption."""
    import numpy as np

    from coar.pipeline import load_pipeline
    from coar.report import write_trace
    from coar.tracing.trace import trace as trace_facts

    numbers = [_whole(word) for word in _words(windows)]
    loaded = load_pipeline(pipeline)
    given, model = loaded.facts(), loaded.study().model
    if facts is not None:
        given = given.subset(np.unique(np.linspace(0, len(given) - 1, facts).round().astype(int)))
    for name in _words(corruption):
        found = trace_facts(
            model,
            given,
            corruption=name,
            kinds=_words(kinds),
            windows=numbers,
            places=_words(places),
            steps=steps,
            per_cell=per_cell,
            draws=draws,
            seed=seed,
            device=device,
            progress=sys.stderr.isatty(),
        )
        scored = found.per_fact["fact"].nunique()
        typer.echo(
            f"\n{name}: {scored} facts scored, {len(found.learning)} for constants, {len(found.left_out)} left out"
        )
        best = found.table.sort_values("aie", ascending=False).groupby(["kind", "window", "place"], sort=False).head(1)
        show(best.sort_index())
        written(write_trace(found, out or Path("reports") / loaded.name))


@app.command(epilog='Example: coar lens pipelines/gpt2.py --kind optimal,tuned --text "The capital of France is"')
@report_errors
def lens(
    pipeline: FileArgument,
    kind: Annotated[str, typer.Option(help="optimal, mean, tuned, logit.")] = "optimal,mean,tuned,logit",
    layers: Annotated[str | None, typer.Option(help="Numbers of layers [default: all].")] = None,
    steps: Annotated[int, typer.Option(help="Steps of training.")] = 200,
    texts_per_step: Annotated[int, typer.Option(help="Texts of a step.")] = 8,
    text: Annotated[str | None, typer.Option(help="A text to read with each lens.")] = None,
    seed: SeedOption = 0,
    out: FolderOption = None,
    device: DeviceOption = "auto",
    folder: Annotated[
        Path | None,
        typer.Option(help="Where lenses are kept [default: runs/<pipeline>-lens].", rich_help_panel=EXECUTION),
    ] = None,
) -> None:
    """Train lenses on the texts of a pipeline, and compare them with the model on held-out texts."""
    import pandas as pd

    from coar.lenses.training import lens as train_lens
    from coar.pipeline import load_pipeline
    from coar.report import write_lenses

    numbers = None if layers is None else [_whole(word) for word in _words(layers)]
    loaded = load_pipeline(pipeline)
    (training, held_out), model = loaded.texts(), loaded.study().model
    place, tables, readings = folder or Path("runs") / f"{loaded.name}-lens", [], {}
    for name in _words(kind):
        made = train_lens(
            model,
            training,
            name,
            layers=numbers,
            steps=steps,
            texts_per_step=texts_per_step,
            seed=seed,
            folder=place / name,
            device=device,
            progress=sys.stderr.isatty(),
        )
        tables.append(made.summary(held_out))
        if text is not None:
            readings[name] = made.read(text, loaded.tokenizer())
    table = pd.concat(tables, ignore_index=True)
    typer.echo("mean KL(model || lens) on held-out texts, in nats, before each layer")
    show(table.pivot_table(index="layer", columns="kind", values="kl", sort=False).reset_index())
    written(write_lenses(table, readings, out or Path("reports") / loaded.name))


@app.command(
    "edit-facts",
    epilog="Example: coar edit-facts pipelines/facts.py --targets \"subject == 'France'\" --direction decrease",
)
@report_errors
def edit_facts(
    pipeline: FileArgument,
    targets: Annotated[str, typer.Option(help="Condition over metadata columns: the facts to change.")],
    references: Annotated[
        str | None, typer.Option(help="Condition of the same kind: what not to change [default: all other facts].")
    ] = None,
    direction: Annotated[
        str | None,
        typer.Option(help="decrease, to lose the answers, or increase, to find them."),
    ] = None,
    probability: Annotated[
        float | None, typer.Option(help="What answers may keep or must reach [default: 0.02 or 0.5].")
    ] = None,
    harm: Annotated[float, typer.Option(help="Points of mean probability that other facts may lose.")] = 1.0,
    perplexity: Annotated[float, typer.Option(help="Per cent by which the perplexity of text may rise.")] = 0.5,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write to [default: reports/<pipeline>/edit].")
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Make a language model lose or find the answers of some facts, by the strengths of its MLP neurons and heads."""
    from dataclasses import replace

    from coar.ablation.zero import ZeroActivation
    from coar.components.attention import attention_heads
    from coar.components.mlps import mlp_neurons
    from coar.editing.facts.editor import FactBound, FactEditor
    from coar.editing.goal import EditGoal
    from coar.pipeline import load_pipeline
    from coar.report import write_fact_edit

    others = references or f"not ({targets})"
    goal = EditGoal(**{"targets": targets, "references": others, "direction": direction})
    bound = FactBound(facts=harm / 100, perplexity=perplexity / 100)
    loaded = load_pipeline(pipeline)
    study = loaded.study()
    components = mlp_neurons(study.model) + attention_heads(study.model)
    study = replace(study, examples=loaded.facts(), components=components, ablation=ZeroActivation())
    training, held_out = loaded.texts()
    editor = FactEditor(study, training, device=device, progress=sys.stderr.isatty())
    found = editor.edit(goal, probability=probability, bound=bound, judge_texts=held_out)
    show(found.table)
    typer.echo(f"{len(found.edit):,} components, chosen by {found.passes:,} forward passes of one example")
    written(write_fact_edit(found, study.model, out or Path("reports") / loaded.name / "edit", study.examples))


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _whole(word: str) -> int:
    if not word.isdecimal():
        raise SettingsError(f"{word!r} is no whole number; write numbers with commas between them, such as 1,5,9")
    return int(word)
