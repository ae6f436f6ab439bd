"""`edge-ilseg predict`: masks and overlays of images, so that people can look at what a bundle sees."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge_ilseg.cli.json_option import json_option
from edge_ilseg.cli.options import hint_option
from edge_ilseg.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from edge_ilseg.bundle import Precision, Runtime
    from edge_ilseg.devices.prediction import Predictions
    from edge_ilseg.devices.runtime import Hint

DEFAULT_ALPHA = 0.5


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True)
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Where the results go.")
@click.option("--runtime", type=click.Choice(["onnxruntime", "openvino"]), help="The first installed if left out.")
@click.option("--precision", type=click.Choice(["fp32", "fp16", "int8"]), help="int8 if there, else fp32.")
@click.option(
    "--threads", type=click.IntRange(min=1), metavar="N", help="Threads of the runtime; its own choice if left out."
)
@hint_option
@click.option(
    "--alpha",
    type=click.FloatRange(0.0, 1.0),
    metavar="SHARE",
    help=f"Weight of the class colours in overlays, 0 to 1; {DEFAULT_ALPHA} if left out.",
)
@click.option("--no-overlay", is_flag=True, help="Write masks alone.")
@click.option("--replace", is_flag=True, help="Replace the results of an earlier run.")
@json_option
@click.pass_context
def predict(
    ctx: click.Context,
    bundle: Path,
    images: tuple[str, ...],
    out: Path,
    runtime: Runtime | None,
    precision: Precision | None,
    threads: int | None,
    hint: Hint,
    alpha: float | None,
    no_overlay: bool,
    replace: bool,
    as_json: bool,
) -> None:
    """Run a model of BUNDLE on IMAGES and write what it sees.

    IMAGES are files, folders (every image in them and below), or patterns in quotes. Each gives DIR/masks/NAME.png,
    which holds the classes as indices with their colours as palette, and DIR/overlays/NAME.png, the image with the
    colours over it and a legend under it; both in the image's own size, turned upright. NAME keeps sub-folders.

    A GIF, APNG, WebP or TIFF of several frames is taken frame by frame: NAME/0000.png and so on. So is a video (mp4,
    mov, mkv, webm, avi), which needs: pip install 'edge-ilseg[video]'

    A bad image is named, and the others go on. Needs a runtime, and no torch.

    \b
    edge-ilseg predict boat.bundle harbour.jpg --out seen
    edge-ilseg predict boat.bundle photos 'more/**/*.jpg' --out seen --replace --alpha 0.7
    edge-ilseg predict boat.bundle clip.gif --out seen --runtime openvino --precision fp32 --json
    edge-ilseg predict boat.bundle clip.mp4 --out seen --no-overlay

    \b
    exit code 0   every image was read
              3   an image was bad, or nothing was run: the bundle, the results' places or the command line are no good
    """
    from edge_ilseg.cli.progress_bar import progress_bar
    from edge_ilseg.devices.prediction import encode_predictions, predict_images

    if no_overlay and alpha is not None:
        raise ConfigError("--alpha is for overlays, and --no-overlay leaves them out", hint="drop one of the two")
    with progress_bar("predict") as progress:
        predictions = predict_images(
            bundle,
            images,
            out,
            runtime=runtime,
            precision=precision,
            threads=threads,
            hint=hint,
            alpha=None if no_overlay else DEFAULT_ALPHA if alpha is None else alpha,
            replace=replace,
            progress=progress,
        )
    if as_json:
        click.echo(encode_predictions(predictions))
    else:
        from rich.console import Console

        console = Console()
        (console if console.is_terminal else Console(width=140)).print(_summary(predictions))
    ctx.exit(predictions.exit_code)


def _summary(predictions: Predictions) -> RenderableType:
    """Classes over all images, the bad images, how many of each. Names are shown as they are, never as markup."""
    from collections import Counter
    from statistics import median

    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = []
    if predictions.images:
        latency_ms = median(image.latency_ms for image in predictions.images)
        model = f"{predictions.model.runtime_version}, {predictions.model.precision}"
        others = f", {count} images side by side" if (count := predictions.side_by_side) > 1 else ""
        parts.append(Text(f"{model}: {latency_ms:.1f} ms an image (median, the model alone{others})"))
        parts.append(_class_table(predictions))
    for reason, count in Counter(bad.reason for bad in predictions.bad_images).items():
        others = f" (and {count - 1} more, for this reason)" if count > 1 else ""  # frames that build on a damaged one
        parts.append(Text(f"bad image: {reason}{others}", style="bold red"))
    counts = f"{len(predictions.images)} of {len(predictions.images) + len(predictions.bad_images)} images -> "
    parts.append(Text(counts + predictions.out, style="bold red" if predictions.bad_images else "green"))
    return Group(*parts)


def _class_table(predictions: Predictions) -> Table:
    from rich.table import Table
    from rich.text import Text

    from edge_ilseg.devices.overlay import percent_text

    images = predictions.images
    pixels = sum(image.height_px * image.width_px for image in images)
    table = Table()
    table.add_column("class")
    table.add_column("images", justify="right")
    table.add_column("of all pixels", justify="right")
    for name in predictions.class_names:
        shares = [(image.classes[name], image.height_px * image.width_px) for image in images if name in image.classes]
        share = sum(part * size for part, size in shares) / pixels
        table.add_row(Text(name), str(len(shares)), percent_text(share), style="" if shares else "dim")
    return table
