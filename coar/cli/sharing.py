"""The commands import and export."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from coar.cli.common import DeviceOption, RunArgument, app, report_errors, written

if TYPE_CHECKING:
    from coar.published import NotFinite


@app.command(
    "import",
    epilog="Example: coar import imagenet_vit.pt --setup imagenet_vit_b16 --pipeline pipelines/imagenet_vit_b16.py",
)
@report_errors
def import_file(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file of published attributions.")],
    setup: Annotated[str, typer.Option(help="cifar10, imagenet_resnet50, imagenet_vit_b16, celeba or waterbirds.")],
    run: Annotated[Path | None, typer.Option(help="The run [default: runs/published-<setup>.zarr].")] = None,
    pipeline: Annotated[
        Path | None, typer.Option(help="A pipeline with published(); adds the model and the examples.")
    ] = None,
    metadata: Annotated[
        Path | None, typer.Option(help="A .npz file of columns over the examples, such as label; without --pipeline.")
    ] = None,
    not_finite: Annotated[
        str, typer.Option(help="What to do with NaNs: refuse, leave_out (their examples) or zero (their weights).")
    ] = "refuse",
    name: Annotated[str, typer.Option("--fit", help="Name of the fit.")] = "published",
    device: DeviceOption = "auto",
) -> None:
    """Write published attributions into a run. With a pipeline, masks can be collected into it, to evaluate them."""
    from coar.pipeline import load_pipeline
    from coar.published import columns_in, import_published

    made = import_published(
        file,
        run or Path("runs") / f"published-{setup}.zarr",
        setup=setup,
        study=None if pipeline is None else load_pipeline(pipeline).published(),
        metadata=None if metadata is None else columns_in(metadata),
        not_finite=cast("NotFinite", not_finite),
        name=name,
        device=device,
    )
    record = made.published
    found = f", {record.dtype} weights, {record.not_finite} numbers not finite" if record else ""
    typer.echo(f"{made.path}: {made.n_examples} examples, {made.n_components} components{found}")


@app.command(epilog="Example: coar export runs/digits-zero.zarr digits.pt --published")
@report_errors
def export(
    run: RunArgument,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write.")],
    fit_name: Annotated[str | None, typer.Option("--fit", help="Name of the fit [default: the best one].")] = None,
    published: Annotated[
        bool, typer.Option("--published", help="In the format of published files, and not as safetensors.")
    ] = False,
) -> None:
    """Write a fit into one file: safetensors with all labels, which coar.load reads, or the published format."""
    from coar.attributions import load
    from coar.published import export_published
    from coar.store.run import Run

    if published:
        export_published(Run.open(run), file, fit=fit_name)
    else:
        load(run, fit_name).to_safetensors(file)
    written([file])
