"""`edge-ilseg data inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edge_ilseg.cli.json_option import json_option
from edge_ilseg.cli.options import data_option_option, names, parse_data_options, parse_data_text
from edge_ilseg.errors import ConfigError, WorkspaceError
from edge_ilseg.scenario import CLASS_ORDERS, SETUPS

if TYPE_CHECKING:
    from edge_ilseg.config import DataConfig
    from edge_ilseg.data.census import ClassCount, Inspection
    from edge_ilseg.data.dataset import Dataset, DatasetInfo
    from edge_ilseg.progress import ProgressCallback
    from edge_ilseg.workspace import Workspace

Plan = tuple[tuple[str, ...], ...]
"""Class names of each step."""


@click.group()
def data() -> None:
    """Look at a data set and at what each step would see of it.

    \b
    edge-ilseg data inspect work
    edge-ilseg data inspect folder:DATA --plan road,car/boat
    """


@data.command()
@click.argument("source", metavar="WORKSPACE|KIND:ROOT")
@click.option("--plan", "plan_text", metavar="A,B/C/D,...", help="Classes of each step, steps divided by a slash.")
@click.option("--scenario", metavar="N+M", help="Such as 16+5, 15+1x5, 10+5+5, in the class order given.")
@click.option(
    "--class-order",
    type=click.Choice(CLASS_ORDERS),
    default="listed",
    show_default=True,
    help="For --scenario; frequency counts labelled pixels of the training split.",
)
@click.option(
    "--setup",
    type=click.Choice(SETUPS),
    help="Default: the workspace's, or sequential.",
)
@click.option("--train-split", help="Default: the workspace's, or train.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the class order random.")
@click.option("--partition-seed", type=int, help="Of the setup partitioned. Default: the workspace's, or 0.")
@data_option_option
@json_option
def inspect(
    source: str,
    plan_text: str | None,
    scenario: str | None,
    class_order: str,
    setup: str | None,
    train_split: str | None,
    seed: int,
    partition_seed: int | None,
    data_option_items: tuple[str, ...],
    as_json: bool,
) -> None:
    """Images and pixels of each class in each split, and what each step would see.

    Every mask is read, so a missing, damaged or wrong one is found here. A background belongs to step 0 of every plan.
    For a WORKSPACE the plan is its base classes, the classes of each step up to the latest, and the data set's other
    classes in one step after them.

    \b
    edge-ilseg data inspect work
    edge-ilseg data inspect msrc:DATA/msrc-v2 --scenario 16+5 --class-order frequency --train-split train+val
    edge-ilseg data inspect folder:DATA --plan road,car/boat --setup disjoint
    """
    import msgspec

    from edge_ilseg.cli.progress_bar import progress_bar
    from edge_ilseg.config import override
    from edge_ilseg.data import open_data
    from edge_ilseg.workspace import open_workspace

    if plan_text and scenario:
        raise ConfigError("--plan and --scenario exclude each other", hint="drop one of the two")
    opened = None if ":" in source or not Path(source).is_dir() else open_workspace(Path(source))
    config = opened.config.data if opened else parse_data_text(source)
    options = {**config.options, **parse_data_options(config.kind, data_option_items, "--data-option")}
    config = override(config, setup=setup, train_split=train_split, partition_seed=partition_seed, options=options)
    dataset = open_data(config)
    with progress_bar("inspect") as progress:
        if plan_text:
            plan = _typed_plan(plan_text, dataset.info)
        elif scenario:
            plan = _scenario_plan(dataset, config, scenario, class_order, seed, progress)
        else:
            plan = _workspace_plan(dataset.info, opened) if opened else ()
        inspection = _inspect(dataset, config, plan, progress)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(inspection), indent=1).decode())
    else:
        _print(inspection, source)


def _typed_plan(text: str, info: DatasetInfo) -> Plan:
    """`"road,car/boat"` to the classes of each step, found as training finds them."""
    from edge_ilseg.classes import resolve_classes
    from edge_ilseg.planning import base_classes

    first, *rest = (names(step) for step in text.split("/"))
    if not all((first, *rest)):
        raise ConfigError(
            "a step of the plan has no class",
            where="--plan",
            found=repr(text),
            expected="such as road,car/boat",
            hint="name the classes of each step, with one slash between two steps",
        )
    return (base_classes(first, info), *(resolve_classes(step, info.classes, info.aliases) for step in rest))


def _scenario_plan(
    dataset: Dataset, config: DataConfig, scenario: str, class_order: str, seed: int, progress: ProgressCallback
) -> Plan:
    from edge_ilseg.data.step_view import class_pixels, count_pixels
    from edge_ilseg.scenario import order_classes, parse_scenario

    info = dataset.info
    ids = dataset.ids(config.train_split)
    pixels: Mapping[str, int] = {}
    if class_order == "frequency":
        counts_NK = count_pixels(dataset, ids, progress)
        pixels = class_pixels(info, counts_NK)
    ordered = order_classes(class_order, pixels, info.classes, info.background, seed)  # type: ignore[arg-type]
    return parse_scenario(scenario, ordered, info.background)


def _workspace_plan(info: DatasetInfo, workspace: Workspace) -> Plan:
    """The base classes, those of each step up to the latest, and the data set's other classes as one last step.

    Of several latest steps it is the first by name; damaged ones are left to `edge-ilseg steps`. Classes that a step
    learned from another data set are left out.
    """
    from edge_ilseg.planning import base_classes

    records = []
    for name in workspace.step_names():
        try:
            records.append(workspace.read_step(name))
        except WorkspaceError:
            continue
    if not records:
        plan: Plan = (base_classes(workspace.config.classes.base, info),)
    else:
        latest = min(records, key=lambda record: (-record.index, record.name))
        plan = tuple(
            tuple(item.name for item in latest.classes if item.step == index and item.name in info.classes)
            for index in range(latest.index + 1)
        )
    planned = {name for step in plan for name in step}
    rest = tuple(name for name in info.classes if name not in planned)
    return (*plan, rest) if rest else plan


def _inspect(dataset: Dataset, config: DataConfig, plan: Plan, progress: ProgressCallback) -> Inspection:
    from edge_ilseg.data.census import inspect_dataset

    return inspect_dataset(
        dataset,
        plan=plan,
        setup=config.setup,
        train_split=config.train_split,
        seed=config.partition_seed,
        progress=progress,
    )


def _print(inspection: Inspection, source: str) -> None:
    from rich.table import Table

    from edge_ilseg.cli.tables import print_table

    def cell(count: ClassCount | None) -> str:
        return f"{count.images} / {count.pixels:,}" if count and count.images else "-"

    table = Table(title=f"{source}: images / labelled pixels of each class")
    table.add_column("class")
    for split in inspection.splits:
        table.add_column(f"{split.name} ({split.images})", justify="right")
    for name in inspection.info.classes:
        mark = " (background)" if name == inspection.info.background else ""
        table.add_row(name + mark, *(cell(split.classes.get(name)) for split in inspection.splits))
    print_table(table)
    if not inspection.steps:
        return
    table = Table(
        title=f"what each step sees of {inspection.train_split}, setup {inspection.setup}",
        caption="v visible, h hidden (background, or void where there is none): images / pixels",
    )
    table.add_column("class")
    for step in inspection.steps:
        table.add_column(f"step {step.index} ({step.images} images)", justify="right")
    for name in inspection.info.classes:
        cells = []
        for step in inspection.steps:
            seen, hidden = step.visible.get(name), step.hidden.get(name)
            mark = "*" if name in step.new else ""
            cells.append(
                f"v {cell(seen)}{mark}" if seen and seen.images else f"h {cell(hidden)}" if hidden else f"-{mark}"
            )
        table.add_row(name, *cells)
    print_table(table)
    click.echo("* added by this step")
    for step in inspection.steps:
        if step.without_image:
            click.echo(f"step {step.index} would be refused: no image of {', '.join(step.without_image)}")
