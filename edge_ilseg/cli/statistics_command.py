"""`edge-ilseg statistics`: for steps that were trained before there were any."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from edge_ilseg.cli.options import data_config, data_option_option, step_option, workspace_argument


@click.command()
@workspace_argument
@step_option
@click.option("--data", "data_text", metavar="KIND:ROOT", help="Where the step's images are, such as folder:DATA.")
@data_option_option
@click.option("--train-split", help="Split that has them; the workspace's if left out.")
@click.option(
    "--accelerator",
    type=click.Choice(["auto", "cpu", "cuda", "mps"]),
    default="auto",
    show_default=True,
    help="A GPU where there is one, or by name.",
)
def statistics(
    workspace: Path,
    step_name: str | None,
    data_text: str | None,
    data_option_items: Sequence[str],
    train_split: str | None,
    accelerator: str,
) -> None:
    """Collect the statistics of a step of WORKSPACE from the images that it learned from.

    Steps leave them by themselves; this is for a step of an older version, or one whose file was deleted. With them a
    later step can be learned with the method analytic.

    \b
    edge-ilseg statistics work --step 00-base
    """
    from edge_ilseg.cli.progress_bar import progress_bar
    from edge_ilseg.errors import check_extra
    from edge_ilseg.pipeline import TRAINING_MODULES
    from edge_ilseg.workspace import open_workspace

    check_extra("train", TRAINING_MODULES, "collecting statistics")
    from edge_ilseg.analytic_step import collect_again
    from edge_ilseg.feature_statistics import STATISTICS_NAME

    opened = open_workspace(workspace)
    record = opened.read_step(step_name) if step_name else opened.latest_step()
    data = data_config(opened.config.data, data_text, train_split, None, data_option_items)
    with progress_bar(record.name) as progress:
        found = collect_again(opened, record, data=data, accelerator=accelerator, progress=progress)
    path = opened.step_folder(record.name) / STATISTICS_NAME
    size_mb = path.stat().st_size / 1e6
    click.echo(
        f"written: {path} ({len(found.classes)} classes, {found.features} features, {found.images} images, "
        f"{size_mb:.1f} MB)"
    )
