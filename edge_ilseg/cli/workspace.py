"""`edge-ilseg init` and `edge-ilseg steps`."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import click

from edge_ilseg.cli.json_option import json_option
from edge_ilseg.cli.options import names, parse_data_options, parse_size, workspace_argument
from edge_ilseg.config import ClassesConfig, Config, DataConfig, default_weights, override
from edge_ilseg.data import DATASETS
from edge_ilseg.errors import ConfigError
from edge_ilseg.models.spec import Backbone
from edge_ilseg.scenario import SETUPS


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--dataset", "kind", required=True, help=f"One of {', '.join(DATASETS)} (generated).")
@click.option("--root", type=click.Path(path_type=Path), help="The data set's folder.")
@click.option("--base-classes", metavar="A,B,...", help="Classes of step 0, in channel order.")
@click.option("--later-classes", metavar="A,B,...", help="Step 0 gets every class but these.")
@click.option(
    "--setup",
    type=click.Choice(SETUPS),
    default="sequential",
    show_default=True,
    help="Which images a step sees, and which labels in them.",
)
@click.option("--partition-seed", type=int, help="What the setup partitioned draws with; 0 if left out.")
@click.option("--train-split", default="train", show_default=True, help="Split to learn from.")
@click.option("--eval-split", default="val", show_default=True, help="Split to score on.")
@click.option(
    "--option",
    "dataset_options",
    multiple=True,
    metavar="KEY=VALUE",
    help="An option of the data set, such as void_classes=horse,mountain; may be repeated.",
)
@click.option("--backbone", help=f"One of {', '.join(get_args(Backbone))}; the first if left out.")
@click.option("--head", help="deeplab_v3 (default) or deeplab_v2 (the paper's).")
@click.option("--output-stride", type=int, help="8 or 16.")
@click.option("--size", metavar="WxH", help="The model's input in pixels, such as 160x112 (default).")
@click.option("--weights", help="imagenet, none, or a file with the backbone's weights.")
def init(
    folder: Path,
    kind: str,
    root: Path | None,
    base_classes: str | None,
    later_classes: str | None,
    setup: str,
    partition_seed: int | None,
    train_split: str,
    eval_split: str,
    dataset_options: tuple[str, ...],
    backbone: str | None,
    head: str | None,
    output_stride: int | None,
    size: str | None,
    weights: str | None,
) -> None:
    """Make a workspace in FOLDER: a configuration, and a place for steps.

    \b
    edge-ilseg init work --dataset msrc --root DATA/msrc-v2 --later-classes boat
    edge-ilseg init work --dataset folder --root DATA --base-classes road,car --size 320x224
    """
    import msgspec

    from edge_ilseg.data import open_data
    from edge_ilseg.planning import base_classes as resolve_base
    from edge_ilseg.workspace import create_workspace

    if (base_classes is None) == (later_classes is None):
        raise ConfigError(
            "which classes step 0 gets is not clear",
            found="both options" if base_classes else "no option",
            expected="either --base-classes or --later-classes",
            hint="--later-classes boat gives step 0 every class but boat",
        )
    data = override(
        DataConfig(kind=kind, options=parse_data_options(kind, dataset_options, "--option")),
        root=str(root.resolve()) if root else None,
        setup=setup,
        partition_seed=partition_seed,
        train_split=train_split,
        eval_split=eval_split,
    )
    info = open_data(data).info
    if later_classes is not None:
        from edge_ilseg.classes import resolve_classes

        later = resolve_classes(names(later_classes), info.classes, info.aliases)
        chosen = tuple(name for name in info.classes if name not in later)
    else:
        chosen = names(base_classes)
    width_px, height_px = parse_size(size) if size else (None, None)
    default = Config(data=data, classes=ClassesConfig(base=resolve_base(chosen, info)))
    model = override(
        default.model,
        backbone=backbone,
        head=head,
        output_stride=output_stride,
        input_width_px=width_px,
        input_height_px=height_px,
    )
    weights = weights or default_weights(model.backbone)
    if weights not in ("imagenet", "none"):
        weights = str(Path(weights).resolve())
    workspace = create_workspace(folder, msgspec.structs.replace(default, weights=weights, model=model))
    click.echo(f"workspace {folder}: step 0 gets {len(default.classes.base)} classes; next: edge-ilseg train {folder}")
    click.echo(f"settings: {workspace.root / 'edge-ilseg.toml'}")


@click.command()
@workspace_argument
@json_option
def steps(workspace: Path, as_json: bool) -> None:
    """List the steps of a workspace: classes, method, parent and scores.

    A damaged step is listed with what is wrong with it; the exit code is 3 then.

    \b
    edge-ilseg steps work
    edge-ilseg steps work --json
    """
    import msgspec
    from rich.table import Table

    from edge_ilseg.checkpoint import StepRecord, check_weights
    from edge_ilseg.cli.tables import percent, print_table
    from edge_ilseg.errors import EXIT_ARTEFACT, WorkspaceError
    from edge_ilseg.workspace import open_workspace

    opened = open_workspace(workspace)
    records: list[StepRecord] = []
    damaged: dict[str, str] = {}
    for name in opened.step_names():
        try:
            record = opened.read_step(name)
            check_weights(opened.step_folder(name), record)
            records.append(record)
        except WorkspaceError as error:
            damaged[name] = str(error)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode({"steps": records, "damaged": damaged}), indent=1).decode())
    else:
        table = Table(title=f"steps of {workspace}")
        for column in ("step", "from", "method", "new classes", "images", "scored on", "old", "new", "all"):
            table.add_column(column, justify="right" if column in ("images", "old", "new", "all") else "left")
        for record in records:
            for split, scores in record.metrics.items() or [("-", None)]:
                values = (scores.miou_old, scores.miou_new, scores.miou_all) if scores else (None, None, None)
                table.add_row(
                    record.name,
                    record.parent_name or "-",
                    record.method.name if record.method else "base",
                    ", ".join(record.new_classes),
                    str(len(record.data.image_ids)),
                    split,
                    *(percent(value) for value in values),
                )
        print_table(table)
        for name, text in damaged.items():
            click.echo(f"damaged step {name}: {text}", err=True)
    if damaged:
        raise click.exceptions.Exit(EXIT_ARTEFACT)
