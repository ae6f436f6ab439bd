"""`edge-ilseg export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge_ilseg.cli.options import data_config, data_option_option, json_option, step_option, workspace_argument

if TYPE_CHECKING:
    from rich.table import Table

    from edge_ilseg.bundle import Manifest


@click.command()
@workspace_argument
@step_option
@click.option(
    "--target",
    "targets",
    multiple=True,
    type=click.Choice(["onnx", "openvino"]),
    help="Several at once by repeating; both if left out.",
)
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    type=click.Choice(["fp32", "fp16", "int8"]),
    help="Several at once by repeating; fp32 and int8 if left out. fp16 is for openvino.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder of the bundle; WORKSPACE/bundles/STEP if left out."
)
@click.option("--logits", is_flag=True, help="The models give logits besides the mask.")
@click.option("--calibration-images", type=int, default=96, show_default=True, help="At most, of the step's own.")
@click.option(
    "--full-range-weights",
    is_flag=True,
    help="8-bit weights in place of 7-bit ones: only for devices with VNNI or ARM dot-product instructions.",
)
@click.option("--min-fp16-agreement", type=float, help="Least share of pixels on which fp16 agrees with torch: 0.995.")
@click.option("--min-int8-agreement", type=float, help="The same for int8; not checked if left out.")
@click.option("--data", "data_text", metavar="KIND:ROOT", help="The images that the step learned from, if elsewhere.")
@data_option_option
@click.option("--eval-data", "eval_data_text", metavar="KIND:ROOT", help="Other images to score the models on.")
@click.option("--split", help="Split to score the models on; the workspace's eval_split if left out.")
@click.option("--replace", is_flag=True, help="Put the new bundle in the place of one that is there.")
@json_option
def export(
    workspace: Path,
    step_name: str | None,
    targets: tuple[str, ...],
    precisions: tuple[str, ...],
    out: Path | None,
    logits: bool,
    calibration_images: int,
    full_range_weights: bool,
    min_fp16_agreement: float | None,
    min_int8_agreement: float | None,
    data_text: str | None,
    data_option_items: tuple[str, ...],
    eval_data_text: str | None,
    split: str | None,
    replace: bool,
    as_json: bool,
) -> None:
    """Make the bundle of a step: ONNX and OpenVINO models, int8 calibrated on the step's new-class images alone.

    Each form of the model is compared with the one before; a form that does not compute the same stops the export.

    \b
    edge-ilseg export work
    edge-ilseg export work --step 01-boat --target openvino --precision fp16 --precision int8 --out boat.bundle
    """
    import msgspec

    from edge_ilseg.cli.progress_bar import progress_bar
    from edge_ilseg.cli.tables import print_table
    from edge_ilseg.errors import check_extra
    from edge_ilseg.pipeline import EXPORT_MODULES, export_step
    from edge_ilseg.workspace import open_workspace

    check_extra("export", EXPORT_MODULES, "export")
    from edge_ilseg.export.request import ExportRequest

    opened = open_workspace(workspace)
    record = opened.read_step(step_name) if step_name else opened.latest_step()
    default = ExportRequest()
    request = ExportRequest(
        targets=targets or default.targets,  # type: ignore[arg-type]
        precisions=precisions or default.precisions,  # type: ignore[arg-type]
        logits=logits,
        reduce_range=not full_range_weights,
        min_fp16_agreement=default.min_fp16_agreement if min_fp16_agreement is None else min_fp16_agreement,
        min_int8_agreement=min_int8_agreement,
    )
    out = out or workspace / "bundles" / record.name
    with progress_bar(f"export {record.name}") as progress:
        manifest = export_step(
            opened,
            record,
            request,
            out,
            calibration_count=calibration_images,
            data=data_config(opened.config.data, data_text, None, None, data_option_items),
            evaluation_data=data_config(opened.config.data, eval_data_text, None, split),
            replace=replace,
            progress=progress,
        )
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(manifest), indent=1).decode())
        return
    print_table(parity_table(manifest))
    print_table(models_table(manifest))
    click.echo(f"written: {out}")


def parity_table(manifest: Manifest) -> Table:
    """The chain torch -> ... -> int8, each stage compared with the first."""
    from rich.table import Table

    from edge_ilseg.cli.tables import percent

    table = Table(title=f"{manifest.step.name}: from torch to the shipped models")
    for column in ("stage", "max abs", "relative RMSE", "same pixels", "mIoU old", "mIoU new"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for row in manifest.parity:
        table.add_row(
            row.stage,
            "-" if row.max_abs is None else f"{row.max_abs:.2g}",
            "-" if row.relative_rmse is None else f"{row.relative_rmse:.2g}",
            f"{100 * row.agreement:.3f} %",
            percent(row.miou_old),
            percent(row.miou_new),
        )
    return table


def models_table(manifest: Manifest) -> Table:
    """What is in the bundle: size and expected scores of each model."""
    from rich.table import Table

    from edge_ilseg.cli.tables import percent

    table = Table(title="models of the bundle", caption=f"scores in per cent, on {manifest.expected_data or 'no data'}")
    for column in ("runtime", "precision", "MiB", "mIoU old", "mIoU new", "mIoU all"):
        table.add_column(column, justify="left" if column in ("runtime", "precision") else "right")
    for entry in manifest.models:
        size_mib = sum(manifest.files[name].bytes for name in entry.files) / 2**20
        scores = entry.expected
        values = (scores.miou_old, scores.miou_new, scores.miou_all) if scores else (None, None, None)
        table.add_row(entry.runtime, entry.precision, f"{size_mib:.2f}", *(percent(value) for value in values))
    return table
