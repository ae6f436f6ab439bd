"""`edge-ilseg verify`: the verdict on a bundle, from a machine that has no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge_ilseg.cli.json_option import json_option
from edge_ilseg.cli.options import LIMIT, data_option_option, hint_option, parse_data_options, parse_data_text
from edge_ilseg.cli.verify_remote import remote_options, verify_remotely
from edge_ilseg.errors import ConfigError, EdgeIlsegError

if TYPE_CHECKING:
    from edge_ilseg.bundle import Precision, Runtime
    from edge_ilseg.data.dataset import Dataset
    from edge_ilseg.devices.runtime import Hint
    from edge_ilseg.devices.verify_report import VerifyReport

POSITIVE = click.IntRange(min=1)
DEFAULT_SPLITS = ("test", "val")


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--data", "data_text", metavar="KIND:ROOT", help="Labelled images: msrc:DIR, voc:DIR, folder:DIR, shapes."
)
@data_option_option
@click.option(
    "--split",
    metavar="NAME",
    help="Which of the images; if left out the split that the bundle was scored on, else test, val or the only one.",
)
@click.option("--limit", "max_images", type=POSITIVE, metavar="N", help="At most N images, evenly spread.")
@click.option(
    "--images", type=click.Path(path_type=Path), metavar="DIR", help="The device's own images, without labels."
)
@click.option("--profile", "profile_name", metavar="NAME|FILE", help="Device profile: limits, runtime, threads.")
@click.option("--against", type=click.Path(path_type=Path), metavar="BUNDLE", help="A bundle of the parent step.")
@click.option("--runtime", type=click.Choice(["onnxruntime", "openvino"]), help="The first installed if left out.")
@click.option("--precision", type=click.Choice(["fp32", "fp16", "int8"]), help="int8 if there, else fp32.")
@click.option("--threads", type=POSITIVE, metavar="N", help="Threads of the runtime; its own choice if left out.")
@hint_option
@click.option("--latency-runs", type=POSITIVE, default=30, show_default=True, metavar="N", help="Warm runs to time.")
@click.option("--max-old-drop", type=LIMIT, help="Points of old-class mIoU: 2, given --data and --against.")
@click.option("--max-class-drop", type=LIMIT, help="Points of IoU that a single old class may lose.")
@click.option("--min-new-iou", type=LIMIT, help="Least mean IoU of the new classes, per cent.")
@click.option("--min-agreement", type=LIMIT, help="With --images: agreement with the parent's masks, per cent.  [55]")
@click.option("--min-class-agreement", type=LIMIT, help="With --images: what is kept of each old class, per cent.")
@click.option("--max-moved", type=LIMIT, help="With --images: old pixels that became new ones, per cent.  [15]")
@click.option("--max-latency-ms", type=LIMIT, help="Highest 95th percentile of the latency.")
@click.option("--max-rss-mib", type=LIMIT, help="Highest peak memory of a process that runs the model.")
@click.option("--max-model-mib", type=LIMIT, help="Highest size of the model's files.")
@click.option(
    "--min-golden-agreement", type=LIMIT, help="Share of golden pixels; 0.999, or 0.99 for int8, if left out."
)
@click.option("--max-bad-images", type=click.IntRange(min=0), help="Images that may be left out.  [0]")
@click.option("--min-images", type=POSITIVE, metavar="N", help="Fewer images of old classes prove nothing.  [20]")
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FILE.json", help="Write the report, besides the table."
)
@remote_options
@json_option
@click.pass_context
def verify(
    ctx: click.Context,
    bundle: Path,
    data_text: str | None,
    data_option_items: tuple[str, ...],
    split: str | None,
    max_images: int | None,
    images: Path | None,
    profile_name: str | None,
    against: Path | None,
    runtime: Runtime | None,
    precision: Precision | None,
    threads: int | None,
    hint: Hint,
    latency_runs: int,
    max_old_drop: float | None,
    max_class_drop: float | None,
    min_new_iou: float | None,
    min_agreement: float | None,
    min_class_agreement: float | None,
    max_moved: float | None,
    max_latency_ms: float | None,
    max_rss_mib: float | None,
    max_model_mib: float | None,
    min_golden_agreement: float | None,
    max_bad_images: int | None,
    min_images: int | None,
    out: Path | None,
    on: tuple[str, ...],
    ssh_option_items: tuple[str, ...],
    remote_pythons: tuple[str, ...],
    remote_folders: tuple[str, ...],
    as_json: bool,
) -> None:
    """Judge BUNDLE on this device: is it whole, does it compute what it should, and what has it forgotten?

    Hashes and golden outputs are always checked. Old classes are compared with the parent's bundle on the same images:
    --data and --against. A drop passes when its whole 95 % interval over images is within the limit. Without labels,
    the masks are compared with the parent's: --images. Limits come from options, then from --profile; one in the
    bundle counts where it is stricter than the profile's or the default. What has no limit and no default is shown and
    not checked. Needs a runtime, and no torch.

    \b
    edge-ilseg verify boat.bundle
    edge-ilseg verify boat.bundle --data msrc:DATA --against base.bundle
    edge-ilseg verify boat.bundle --data folder:DATA --against base.bundle --max-old-drop 1 --max-class-drop 5 --json
    edge-ilseg verify boat.bundle --against base.bundle --images /var/camera --profile raspberry-pi-5 --out boat.json
    edge-ilseg verify boat.bundle --runtime openvino --precision fp32 --max-latency-ms 40 --threads 2
    edge-ilseg verify boat.bundle --on ssh://pi@camera-1 --on ssh://pi@camera-2 --remote-python venv/bin/python

    \b
    exit code 0   passed
              1   retention, new classes, agreement, latency, memory or size break a limit
              2   parity: the golden outputs differ
              3   the bundle, the images, this device or the command line cannot be used
              4   too few images to tell whether the old classes lost too much
              70  a defect of edge-ilseg, with its traceback
    """
    import msgspec

    from edge_ilseg.cli.progress_bar import progress_bar
    from edge_ilseg.devices.facts import read_device_facts
    from edge_ilseg.devices.profile_request import Measurable, fill_request
    from edge_ilseg.devices.verification import VerifyRequest, verify_bundle
    from edge_ilseg.devices.verify_report import check_device, encode_report
    from edge_ilseg.files import write_bytes

    _check_place(out)
    if data_text is None and (split is not None or data_option_items or (max_images is not None and images is None)):
        raise ConfigError(
            "--split, --limit and --data-option choose among images, and none are given", hint="add --data KIND:ROOT"
        )
    limits = {
        "min_golden_agreement": min_golden_agreement,
        "max_old_miou_drop_pct": max_old_drop,
        "max_class_drop_pct": max_class_drop,
        "min_new_miou_pct": min_new_iou,
        "min_agreement_pct": min_agreement,
        "min_class_agreement_pct": min_class_agreement,
        "max_moved_pct": max_moved,
        "max_latency_p95_ms": max_latency_ms,
        "max_rss_mib": max_rss_mib,
        "max_model_mib": max_model_mib,
        "max_bad_images": max_bad_images,
        "min_images": min_images,
    }
    dataset = None if data_text is None else _open_images(data_text, data_option_items)
    if dataset is not None and split is None:
        split = default_split(dataset.info.splits, _expected_data(bundle))
        click.echo(f"split: {split} of {data_text}", err=True)
    if on or ssh_option_items or remote_pythons or remote_folders:
        ctx.exit(verify_remotely(ctx, dataset, split, limits))
    check_device(read_device_facts())  # before minutes are spent on a report that would not be written
    request = VerifyRequest(runtime=runtime, precision=precision, threads=threads, latency_runs=latency_runs, hint=hint)
    request = fill_request(
        msgspec.structs.replace(request, split=split or "test", max_images=max_images),
        profile_name,
        limits,
        bundle,
        measurable=Measurable(data_text is not None, against is not None, images is not None),
    )
    with progress_bar("verify") as progress:
        report = verify_bundle(bundle, request, against=against, dataset=dataset, unlabelled=images, progress=progress)
    encoded = encode_report(report)
    if out is not None:
        write_bytes(out, encoded)
    if as_json:
        click.echo(encoded)
    else:
        _print_table(report)
    ctx.exit(report.exit_code)


def _print_table(report: VerifyReport) -> None:
    from rich.console import Console

    from edge_ilseg.devices.verdict_table import verdict_table

    console = Console()
    (console if console.is_terminal else Console(width=140)).print(verdict_table(report))


def _check_place(out: Path | None) -> None:
    """Raise `ConfigError` when no file can be written to `out`: looked at before minutes are spent on measuring."""
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        what = "the place of the report is a folder" if out.is_dir() else "the folder for the report is missing"
        hint = "name a file in it" if out.is_dir() else "make the folder, or name a file in another"
        found = out if out.is_dir() else out.parent
        raise ConfigError(what, where="--out", found=found, expected="a file in a folder that is there", hint=hint)


def _open_images(data_text: str, data_option_items: Sequence[str]) -> Dataset:
    from msgspec.structs import replace

    from edge_ilseg.data import open_data

    data = parse_data_text(data_text)
    return open_data(replace(data, options=parse_data_options(data.kind, data_option_items, "--data-option")))


def default_split(splits: Sequence[str], expected_data: str | None) -> str:
    """The split to judge a bundle on when none is named.

    Args:
        splits: those of the data set that have an image.
        expected_data: `kind:split` that the bundle was scored on when it was made, or None.

    Returns:
        That split where the data set has it (all parts of `train+val`), else `test`, else `val`, else the only one.

    Raises:
        ConfigError: there are several others, or none.
    """
    scored = expected_data.partition(":")[2] if expected_data else ""
    if scored and all(part.strip() in splits for part in scored.split("+")):
        return scored
    for name in (*DEFAULT_SPLITS, *(splits if len(splits) == 1 else ())):
        if name in splits:
            return name
    raise ConfigError(
        "it is not clear which images to judge by",
        found=f"splits {', '.join(splits)}" if splits else "no split with an image",
        expected=f"a split named {' or '.join(DEFAULT_SPLITS)}, or a single one",
        hint="say which: --split NAME" if splits else "check the lists of the data set",
    )


def _expected_data(bundle: Path) -> str | None:
    """What the bundle was scored on; None when its manifest cannot be read, which the report then says."""
    from edge_ilseg.bundle import read_manifest

    try:
        return read_manifest(bundle).expected_data
    except EdgeIlsegError:
        return None
