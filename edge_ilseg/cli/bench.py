"""`edge-ilseg bench`: the models of bundles side by side on this device."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge_ilseg.cli.json_option import json_option
from edge_ilseg.errors import ConfigError

if TYPE_CHECKING:
    from edge_ilseg.bundle import Precision, Runtime

POSITIVE = click.IntRange(min=1)


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="BUNDLE...")
@click.option("--runtime", type=click.Choice(["onnxruntime", "openvino"]), help="All installed ones if left out.")
@click.option("--precision", type=click.Choice(["fp32", "fp16", "int8"]), help="All if left out.")
@click.option("--threads", type=POSITIVE, metavar="N", help="Threads of the runtime; its own choice if left out.")
@click.option("--rounds", type=POSITIVE, default=5, show_default=True, metavar="N", help="Turns of each model.")
@click.option("--runs", type=POSITIVE, default=30, show_default=True, metavar="N", help="Timed runs in a turn.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE.json", help="Write the report, samples and all.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw the latencies.")
@click.option("--replace", is_flag=True, help="Replace the files of an earlier run.")
@json_option
@click.pass_context
def bench(
    ctx: click.Context,
    bundles: tuple[Path, ...],
    runtime: Runtime | None,
    precision: Precision | None,
    threads: int | None,
    rounds: int,
    runs: int,
    out: Path | None,
    plot: Path | None,
    replace: bool,
    as_json: bool,
) -> None:
    """Measure the models of each BUNDLE on this device, in turns: A B C, A B C, and so on.

    Each model runs in processes of its own, on a golden image of its bundle at the size that the model takes: decoding
    and resizing are not measured. A cold start is everything from the making of a process to its first mask, the import
    of the runtime included. Images a second are given one after another, and side by side, as verify and predict run
    them. Figures are medians over the rounds. Needs a runtime, and no torch.

    \b
    edge-ilseg bench boat.bundle
    edge-ilseg bench boat.bundle base.bundle --precision int8 --threads 2 --out bench.json --plot bench.png
    edge-ilseg bench boat.bundle --runtime openvino --rounds 10 --runs 100 --json

    \b
    exit code 0   every model was measured
              3   a model failed, or nothing was run: a bundle, this device or the command line is no good
    """
    from edge_ilseg.cli.progress_bar import progress_bar
    from edge_ilseg.devices.bench import bench_bundles
    from edge_ilseg.devices.bench_report import encode_bench
    from edge_ilseg.files import write_bytes

    _check_places(out, plot, replace=replace)
    with progress_bar("bench") as progress:
        report = bench_bundles(
            bundles,
            runtime=runtime,
            precision=precision,
            threads=threads,
            rounds=rounds,
            runs=runs,
            progress=progress,
        )
    encoded = encode_bench(report)
    if as_json:
        click.echo(encoded, nl=False)
    else:
        from rich.console import Console

        from edge_ilseg.devices.bench_table import bench_table

        console = Console()
        (console if console.is_terminal else Console(width=160)).print(bench_table(report))
    if out is not None:
        write_bytes(out, encoded)
    if plot is not None:
        from edge_ilseg.devices.bench_plot import write_bench_plot

        write_bench_plot(plot, report)
    ctx.exit(report.exit_code)


def _check_places(out: Path | None, plot: Path | None, *, replace: bool) -> None:
    """Look at the places of the files before minutes are spent on measuring.

    Raises:
        ConfigError: a place is taken, has no folder, or both files have one place.
    """
    for option, path in (("--out", out), ("--plot", plot)):
        if path is None:
            continue
        if path.is_dir() or (os.path.lexists(path) and not replace):
            hint = "name a file" if path.is_dir() else "choose another name, or replace it with --replace"
            raise ConfigError("the file is there already", where=option, found=path, hint=hint)
        if not path.parent.is_dir():
            raise ConfigError("the folder for the file is missing", where=option, found=path.parent, hint="make it")
    if out is not None and out == plot:
        hint = "name two files"
        raise ConfigError("the report and the plot cannot be one file", where="--plot", found=plot, hint=hint)
