"""`edge-ilseg export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge_ilseg.cli.json_option import json_option
from edge_ilseg.cli.options import data_config, data_option_option, parse_limits, step_option, workspace_argument

if TYPE_CHECKING:
    from edge_ilseg.int8_record import RangesMethod, RangesPolicy, WeightRounding


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
    "--ranges",
    type=click.Choice(["carry", "union", "new-only", "weights-only"]),
    default="carry",
    show_default=True,
    help="Whose int8 ranges: the parent's for what is frozen, the envelope of both, this step's alone, or none.",
)
@click.option(
    "--range-method",
    type=click.Choice(["minmax", "mean-minmax"]),
    help="Extremes over all images, or the average of each image's.  [minmax]",
)
@click.option(
    "--rounding",
    type=click.Choice(["fitted", "nearest"]),
    default="fitted",
    show_default=True,
    help="Of the int8 weights: fitted to what each layer reads on the step's images, or each to its nearest level.",
)
@click.option(
    "--parent",
    type=click.Path(file_okay=False, path_type=Path),
    help="Bundle of the parent step; WORKSPACE/bundles/PARENT if left out.",
)
@click.option(
    "--max-old-drop",
    type=click.FloatRange(min=0),
    help="Points that int8 may cost the old classes against fp32 before another way is tried.  [2]",
)
@click.option("--no-guard", is_flag=True, help="Take the first way to int8 whatever it costs, and record the cost.")
@click.option(
    "--keep-float",
    "float_layers",
    multiple=True,
    metavar="LAYER",
    help="A layer that stays in float: first, last, or a node or module of the ONNX. Several by repeating.",
)
@click.option("--max-changed", type=float, metavar="PCT", help="How much of an int8 model may be new to a device.")
@click.option(
    "--profile",
    metavar="NAME|FILE",
    help="Device profile. Without one, or without integer dot products, int8 weights have 7 bits, depthwise ones 8.",
)
@click.option(
    "--bundle-limit",
    "limit_items",
    multiple=True,
    metavar="NAME=NUMBER",
    help="Written into the bundle: a limit that it is held to wherever it is verified. Several by repeating.",
)
@click.option("--explain", is_flag=True, help="Time every form of the model, and show how int8 came about.")
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
    ranges: RangesPolicy,
    range_method: RangesMethod | None,
    rounding: WeightRounding,
    parent: Path | None,
    max_old_drop: float | None,
    no_guard: bool,
    float_layers: tuple[str, ...],
    max_changed: float | None,
    profile: str | None,
    limit_items: tuple[str, ...],
    explain: bool,
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
    What is frozen keeps the int8 ranges of the parent's bundle, so that old classes lose nothing; where int8 costs them
    too much all the same, other ways are tried.

    \b
    edge-ilseg export work
    edge-ilseg export work --step 01-boat --target openvino --precision fp16 --precision int8 --out boat.bundle
    edge-ilseg export work --bundle-limit max_old_miou_drop_pct=1 --bundle-limit max_class_drop_pct=5
    edge-ilseg export work --parent base.bundle --profile raspberry-pi-5 --explain
    """
    import msgspec

    from edge_ilseg.cli.export_tables import show_export
    from edge_ilseg.cli.progress_bar import progress_bar
    from edge_ilseg.devices.device_profile import read_profile
    from edge_ilseg.errors import ConfigError, check_extra
    from edge_ilseg.pipeline import EXPORT_MODULES, export_step
    from edge_ilseg.workspace import open_workspace

    check_extra("export", EXPORT_MODULES, "export")
    if no_guard and max_old_drop is not None:
        raise ConfigError("--no-guard and --max-old-drop exclude each other", hint="drop one of the two")
    from edge_ilseg.export.request import ExportRequest

    opened = open_workspace(workspace)
    record = opened.read_step(step_name) if step_name else opened.latest_step()
    default = ExportRequest()
    request = ExportRequest(
        targets=targets or default.targets,  # type: ignore[arg-type]
        precisions=precisions or default.precisions,  # type: ignore[arg-type]
        logits=logits,
        reduce_range=profile is None or not read_profile(profile).allows_8_bit_weights,
        min_fp16_agreement=default.min_fp16_agreement if min_fp16_agreement is None else min_fp16_agreement,
        min_int8_agreement=min_int8_agreement,
        ranges=ranges,
        ranges_method=range_method or default.ranges_method,
        max_old_drop_points=None if no_guard else default.max_old_drop_points if max_old_drop is None else max_old_drop,
        rounding=rounding,
        float_layers=float_layers,
        max_changed_pct=max_changed,
        limits=parse_limits(limit_items, "--bundle-limit"),
        time_stages=explain,
    )
    out = out or opened.bundle_folder(record.name)
    with progress_bar(f"export {record.name}") as progress:
        manifest = export_step(
            opened,
            record,
            request,
            out,
            calibration_count=calibration_images,
            parent=parent,
            data=data_config(opened.config.data, data_text, None, None, data_option_items),
            evaluation_data=data_config(opened.config.data, eval_data_text, None, split),
            replace=replace,
            progress=progress,
        )
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(manifest), indent=1).decode())
        return
    show_export(manifest, explain=explain)
    click.echo(f"written: {out}")
