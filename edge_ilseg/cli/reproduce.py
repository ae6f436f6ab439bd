"""`edge-ilseg reproduce`."""

from __future__ import annotations

from pathlib import Path

import click

from edge_ilseg.cli.json_option import json_option
from edge_ilseg.cli.options import names, parse_size
from edge_ilseg.cli.scenario import parse_seeds, process_options
from edge_ilseg.cli.scenario_tables import print_rows, show_results
from edge_ilseg.errors import check_extra

at_least_one = click.IntRange(1)


@click.command()
@click.argument("experiment", metavar="voc-19+1|voc-15+5|voc-15+1x5|voc-10+10|voc-10+1x10|voc-10+5+5")
@click.option("--root", type=click.Path(path_type=Path), required=True, help="VOC 2012, with SegmentationClassAug.")
@click.option("--weights", required=True, help="File with ResNet-101's ImageNet weights (the usual keys), or none.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder of the run.  [reproduce-NAME]")
@click.option("--methods", "method_names", metavar="A,B,...", help="Those of the paper, if left out.")
@click.option("--seeds", default="1", show_default=True, metavar="N or A,B,...")
@click.option("--joint/--no-joint", default=True, show_default=True, help="Train the upper bound, too.")
@click.option(
    "--iterations-per-class", type=at_least_one, default=1000, show_default=True, help="The paper's; fewer to try."
)
@click.option("--batch-size", type=at_least_one, default=4, show_default=True, help="The paper's.")
@click.option("--backbone", default="resnet101", show_default=True, help="The paper's; a smaller one to try.")
@click.option("--size", default="321x321", show_default=True, metavar="WxH", help="The paper's crop.")
@process_options
@json_option
def reproduce(
    experiment: str,
    root: Path,
    weights: str,
    out: Path | None,
    method_names: str | None,
    seeds: str,
    joint: bool,
    iterations_per_class: int,
    batch_size: int,
    backbone: str,
    size: str,
    accelerator: str,
    workers: int,
    jobs: int,
    as_json: bool,
) -> None:
    """Run an experiment of arXiv 1907.13372 on VOC 2012 as published, and print its row, if it has one, beside ours.

    DeepLab v2 on ResNet-101 at output stride 8, crops of 321, batch 4, 1000 iterations for each class, batch norm in
    eval mode, scored on whole images. Hours on a GPU; it goes on after a kill.

    \b
    edge-ilseg reproduce voc-19+1 --root VOCdevkit --weights resnet101.pth
    """
    from edge_ilseg.cli.progress_bar import progress_bar
    from edge_ilseg.config import override
    from edge_ilseg.files import write_bytes
    from edge_ilseg.pipeline import TRAINING_MODULES
    from edge_ilseg.reproduce import (
        COMPARISON_HEADER,
        MODEL,
        PAPERS_METHODS,
        PUBLISHED,
        check_experiment,
        comparison_rows,
        plan_reproduction,
    )
    from edge_ilseg.scenario_results import markdown_table, read_results
    from edge_ilseg.scenario_run import JOINT, run_scenario

    check_experiment(experiment)
    check_extra("train", TRAINING_MODULES, "training")
    width_px, height_px = parse_size(size)
    model = override(MODEL, backbone=backbone, input_width_px=width_px, input_height_px=height_px)
    rows = tuple(name for name in PUBLISHED[experiment] if name != JOINT) or PAPERS_METHODS
    folder = out or Path(f"reproduce-{experiment}")
    with progress_bar(experiment) as progress:
        plan = plan_reproduction(
            experiment,
            root,
            weights if weights == "none" else str(Path(weights).resolve()),
            model=model,
            iterations_per_class=iterations_per_class,
            batch_size=batch_size,
            progress=progress,
        )
        run_scenario(
            folder,
            plan,
            names(method_names) or rows,
            parse_seeds(seeds),
            joint=joint,
            accelerator=accelerator,
            workers=workers,
            jobs=jobs,
            progress=progress,
        )
    results = read_results(folder)
    show_results(results, folder, as_json, PUBLISHED[experiment])
    beside = comparison_rows(experiment, results)
    if not beside:
        click.echo("no published row of this experiment is at hand: the table above is ours alone", err=True)
        return
    write_bytes(folder / "published.md", markdown_table(COMPARISON_HEADER, beside).encode())
    if not as_json:
        print_rows("beside the published rows", COMPARISON_HEADER, beside)
