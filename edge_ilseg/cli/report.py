"""`edge-ilseg report`: one HTML file about a step, or about two side by side."""

from __future__ import annotations

from pathlib import Path

import click

from edge_ilseg.cli.json_option import json_option, print_json
from edge_ilseg.cli.options import data_option_option, step_option, workspace_argument

FILES = click.Path(path_type=Path)


@click.command()
@workspace_argument
@step_option
@click.option("--out", type=FILES, metavar="FILE", help="WORKSPACE/reports/STEP.html if left out.")
@click.option(
    "--verify-report", "verify_files", type=FILES, multiple=True, metavar="FILE", help="What verify --json printed."
)
@click.option("--bench", "bench_files", type=FILES, multiple=True, metavar="FILE", help="What bench --out wrote.")
@click.option(
    "--images", type=click.IntRange(min=0), metavar="N", help="Labelled images to run, evenly spread; 256 if left out."
)
@click.option("--pictures", type=click.IntRange(min=0), metavar="N", help="Images to show; 12 if left out.")
@click.option("--max-mib", type=click.FloatRange(min=0, min_open=True), default=5.0, show_default=True, metavar="MIB",
              help="Largest size of the page.")  # fmt: skip
@click.option("--data", "data_text", metavar="KIND:ROOT", help="Where the labelled images are now.")
@data_option_option
@click.option("--eval-split", metavar="NAME", help="Which of the images; the workspace's if left out.")
@click.option(
    "--compare",
    nargs=2,
    metavar="A B",
    help="Two side by side: steps of WORKSPACE, workspaces, steps' folders, or two verification reports.",
)
@json_option
def report(
    workspace: Path,
    step_name: str | None,
    out: Path | None,
    verify_files: tuple[Path, ...],
    bench_files: tuple[Path, ...],
    images: int | None,
    pictures: int | None,
    max_mib: float,
    data_text: str | None,
    data_option_items: tuple[str, ...],
    eval_split: str | None,
    compare: tuple[str, str] | None,
    as_json: bool,
) -> None:
    """Write one HTML file about a step: what it learned, what it forgot, and whether it may go out.

    The file holds everything that it shows and can be sent by mail. Whatever is not there (a bundle, a parent, images,
    a measurement) leaves a sentence. Reports of verify and bench that lie in WORKSPACE/reports or WORKSPACE/bundles are
    found. The models run once more over the labelled images, for the confusion of classes and for pictures.

    \b
    edge-ilseg report work
    edge-ilseg report work --step 01-boat --verify-report camera-1.json --bench bench.json --out boat.html
    edge-ilseg report work --compare 01-kd-output 01-mib
    edge-ilseg report --compare work-a work-b --out two.html
    edge-ilseg report --compare camera-1.json camera-2.json --out cameras.html
    """
    import msgspec

    from edge_ilseg.cli.options import data_config
    from edge_ilseg.cli.progress_bar import progress_bar
    from edge_ilseg.errors import check_extra
    from edge_ilseg.report.step_page import DEFAULT_IMAGES, DEFAULT_PICTURES
    from edge_ilseg.report.writing import Request, write_comparison, write_report
    from edge_ilseg.workspace import open_workspace

    check_extra("report", ["jinja2", "matplotlib"], "a report for people")
    request = Request(
        out=out,
        verify_files=verify_files,
        bench_files=bench_files,
        images=DEFAULT_IMAGES if images is None else images,
        pictures=DEFAULT_PICTURES if pictures is None else pictures,
        max_mib=max_mib,
    )
    with progress_bar("report") as progress:
        if compare is not None:
            outcome = write_comparison(workspace, compare, request, progress)
        else:
            opened = open_workspace(workspace)
            if data_text is not None or data_option_items or eval_split is not None:
                data = data_config(opened.config.data, data_text, None, eval_split, data_option_items)
                request = msgspec.structs.replace(request, data=data)
            outcome = write_report(opened, step_name, request, progress)
    if as_json:
        print_json(outcome)
        return
    if outcome.verdict:
        click.echo("; ".join((outcome.verdict, *outcome.reasons)))
    for name, sentence in outcome.left_out.items():
        click.echo(f"left out: {name}: {sentence}", err=True)
    click.echo(f"report: {outcome.out} ({outcome.bytes / (1 << 20):.2f} MiB)")
