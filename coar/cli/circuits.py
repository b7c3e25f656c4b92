"""The command that finds circuits by several methods and compares them."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, cast, get_args

import typer

from coar.cli.common import EXECUTION, DeviceOption, app, report_errors, show, written
from coar.errors import SettingsError
from coar.store.storage_errors import storage_errors


@app.command(epilog="Example: coar circuit pipelines/ioi.py --edges 100,200,500,1000")
@report_errors
def circuit(
    pipeline: Annotated[Path, typer.Argument(metavar="FILE", help="A pipeline file with edges, and judge().")],
    edges: Annotated[str, typer.Option(help="Numbers of edges, separated by commas.")] = "100,200,500,1000",
    methods: Annotated[str, typer.Option(help="Methods that score edges, separated by commas.")] = "gradual,eap,random",
    run: Annotated[Path | None, typer.Option(help="A run of this study, whose fits are methods too.")] = None,
    ablation: Annotated[str, typer.Option(help="Replacement of ablated edges, a label.")] = "mean",
    constant_steps: Annotated[int, typer.Option(help="Steps that train each circuit's constants.")] = 8,
    refinement: Annotated[int, typer.Option(help="Rounds of swaps for each circuit.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder to write to [default: reports/<file>-circuit].")] = None,
    device: DeviceOption = "auto",
    precision: Annotated[str, typer.Option(help="float32 or bf16.", rich_help_panel=EXECUTION)] = "float32",
    batch_size: Annotated[int, typer.Option(help="Most prompts per pass.", rich_help_panel=EXECUTION)] = 8,
) -> None:
    """Find circuits of several sizes by several methods, and judge them on held-out prompts."""
    from coar.circuits.comparing import compare_methods
    from coar.circuits.evaluator import CircuitEvaluator
    from coar.circuits.figures import draw_sizes
    from coar.forward.execution_plan import Precision
    from coar.pipeline import load_pipeline
    from coar.report import save_figure
    from coar.store.run import Run

    sizes = _numbers(edges)
    if precision not in get_args(Precision):
        raise SettingsError(f"unknown precision {precision!r}; choose float32 or bf16")
    names = [name.strip() for name in methods.split(",")]
    loaded = load_pipeline(pipeline)
    study, held_out, learning = loaded.study(ablation=ablation), loaded.judge(), loaded.learning()
    if learning is not None and run is None:  # fits of a run are those of its own examples
        study = replace(study, examples=learning)
    typer.echo(
        f"{loaded.name}: {study.components!r}, {len(study.examples)} learning and {len(held_out)} held-out prompts"
    )
    evaluator = CircuitEvaluator(study, device=device, precision=cast(Precision, precision), batch_size=batch_size)
    found = compare_methods(
        evaluator,
        held_out,
        {name: {} for name in names},
        sizes,
        constant_steps=constant_steps,
        refinement=refinement,
        run=None if run is None else Run.open(run),
    )
    show(found.table)
    folder = out or Path("reports") / f"{loaded.name}-circuit"
    files = [folder / "circuits.csv", folder / "circuits.png"]
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        found.table.to_csv(files[0], index=False)
        save_figure(draw_sizes(None, found.table), files[1])
        for (method, size), made in found.circuits.items():
            files.append(folder / f"{method}-{size}.json")
            made.save(files[-1])
        smallest = found.circuits[names[0], min(sizes)]
        if smallest.is_drawable:
            files.append(folder / f"{names[0]}-{min(sizes)}.png")
            save_figure(smallest.plot(study.model), files[-1])
    written(files)


def _numbers(text: str) -> list[int]:
    """Parse numbers of edges."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise SettingsError(f"--edges {text} is not a list of numbers; write it as in 100,200,500")
    return sorted({int(part) for part in parts})
