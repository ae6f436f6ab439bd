"""`edge-ilseg scenario run`, `edge-ilseg scenario show` and `edge-ilseg reproduce`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_ilseg.cli.json_option import json_option
from edge_ilseg.cli.options import names, parse_data_options, parse_size
from edge_ilseg.errors import ConfigError, check_extra
from edge_ilseg.methods import METHODS
from edge_ilseg.scenario import CLASS_ORDERS, SETUPS

if TYPE_CHECKING:
    from edge_ilseg.config import Config, DataConfig
    from edge_ilseg.reproduce import Published
    from edge_ilseg.scenario_results import ScenarioResults
    from edge_ilseg.scenario_run import ScenarioPlan

DEFAULT_ORDER = {"msrc": "frequency"}
"""In the listed order of MSRC-v2 classes would be left without an image."""


def settings_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say which network, and how it is trained."""
    for option in reversed(
        (
            click.option(
                "--like", type=click.Path(file_okay=False, path_type=Path), help="Take the settings of this workspace."
            ),
            click.option("--backbone", help="As of init."),
            click.option("--head", help="As of init."),
            click.option("--size", metavar="WxH", help="The model's input in pixels."),
            click.option("--weights", help="imagenet, none, or a file with the backbone's weights."),
            click.option("--iterations", type=int, help="Of step 0."),
            click.option("--step-iterations", type=int, help="Of each increment."),
            click.option("--iterations-per-class", type=int, help="Of each increment, times the classes that it adds."),
            click.option("--batch-size", type=int, help="Images in a batch, in every step."),
        )
    ):
        command = option(command)
    return command


def process_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say on what, and in how many processes."""
    devices = click.Choice(["auto", "cpu", "cuda", "mps"])
    jobs = "Steps trained at the same time."
    for option in (
        click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help=jobs),
        click.option("--workers", type=int, default=0, show_default=True, help="Processes that decode and augment."),
        click.option("--accelerator", type=devices, default="auto", show_default=True),
    ):
        command = option(command)
    return command


@click.group()
def scenario() -> None:
    """Compare methods over whole scenarios: every step of every method, several seeds, and both bounds.

    \b
    edge-ilseg scenario run msrc:16+5 --root DATA/msrc-v2 --seeds 3
    edge-ilseg scenario show scenario-msrc-16+5
    """


@scenario.command()
@click.argument("source", metavar="KIND:SCENARIO")
@click.option("--root", type=click.Path(path_type=Path), help="The data set's folder.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder of the run.  [scenario-KIND-N+M]")
@click.option(
    "--methods", "method_names", default="finetune,freeze+kd-output", show_default=True, metavar="A,B,... or all"
)
@click.option("--seeds", default="1", show_default=True, metavar="N or A,B,...", help="How many, or which (`2,` is 2).")
@click.option("--joint/--no-joint", default=True, show_default=True, help="Train the upper bound, too.")
@click.option("--setup", type=click.Choice(SETUPS), help="Which images and labels a step sees.  [sequential]")
@click.option("--class-order", metavar="ORDER", help=f"{', '.join(CLASS_ORDERS)}, or names A,B,... of all classes.")
@click.option("--order-seed", type=int, default=0, show_default=True, help="Of the class order random.")
@click.option("--train-split", help="Split to learn from.  [train]")
@click.option("--eval-split", help="Split to score on.  [val]")
@click.option("--option", "dataset_options", multiple=True, metavar="KEY=VALUE", help="An option of the data set.")
@settings_options
@process_options
@json_option
def run(
    source: str,
    root: Path | None,
    out: Path | None,
    method_names: str,
    seeds: str,
    joint: bool,
    setup: str | None,
    class_order: str | None,
    order_seed: int,
    train_split: str | None,
    eval_split: str | None,
    dataset_options: tuple[str, ...],
    like: Path | None,
    iterations_per_class: int | None,
    accelerator: str,
    workers: int,
    jobs: int,
    as_json: bool,
    **settings: Any,
) -> None:
    """Run SCENARIO of a data set with several methods, and print the table.

    What is finished is not run again: the same command goes on after a kill, and more methods or seeds can be added.
    `results.json` and `results.md` in the run's folder hold the same as the tables.

    \b
    edge-ilseg scenario run msrc:16+5 --root DATA/msrc-v2 --methods finetune,freeze+kd-output --seeds 3
    edge-ilseg scenario run voc:15+1x5 --root VOCdevkit --methods all --setup overlapped
    edge-ilseg scenario run shapes:6+1x2 --backbone tiny --size 96x96 --class-order random
    """
    from edge_ilseg.cli.progress_bar import progress_bar
    from edge_ilseg.config import override
    from edge_ilseg.pipeline import TRAINING_MODULES
    from edge_ilseg.scenario_results import read_results
    from edge_ilseg.scenario_run import plan_scenario, run_scenario

    kind, text = _parse_source(source)
    config = _like(like, kind) if like else _default_config(kind)
    data = override(
        config.data,
        root=str(root.resolve()) if root else None,
        setup=setup,
        train_split=train_split,
        eval_split=eval_split,
        options={**config.data.options, **parse_data_options(kind, dataset_options, "--option")},
    )
    config = _override_settings(config, data, **settings)
    chosen = names(method_names)
    check_extra("train", TRAINING_MODULES, "training")
    folder = out or Path(f"scenario-{kind}-{text}")
    order = class_order or DEFAULT_ORDER.get(kind, "listed")
    with progress_bar(source) as progress:
        plan = plan_scenario(
            config,
            text,
            class_order=names(order) if "," in order else order,
            order_seed=order_seed,
            iterations_per_class=iterations_per_class,
            progress=progress,
        )
        if method_names == "all":
            chosen = _all_that_work(plan)
        run_scenario(
            folder,
            plan,
            chosen,
            _parse_seeds(seeds),
            joint=joint,
            accelerator=accelerator,
            workers=workers,
            jobs=jobs,
            progress=progress,
        )
    _show(read_results(folder), folder, as_json)


@scenario.command()
@click.argument("parts", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FOLDER|results.json...")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="Write results.json and results.md there."
)
@json_option
def show(parts: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Print the tables of a run, finished or not; one run's are written beside it, too.

    Several parts of one scenario become one table: folders of different methods or seeds, as several machines leave
    them, or the results.json of such folders.

    \b
    edge-ilseg scenario show scenario-msrc-16+5
    edge-ilseg scenario show machine-1/scenario-msrc-16+5 machine-2/results.json --out together
    """
    from edge_ilseg.scenario_merge import load_results, merge_results

    results = merge_results([(part, load_results(part)) for part in parts])
    if out is None and len(parts) == 1 and parts[0].is_dir():
        (out,) = parts
    _show(results, out, as_json)


@click.command()
@click.argument("experiment", metavar="voc-19+1|voc-15+5|voc-15+1x5|voc-10+10|voc-10+1x10|voc-10+5+5")
@click.option("--root", type=click.Path(path_type=Path), required=True, help="VOC 2012, with SegmentationClassAug.")
@click.option("--weights", required=True, help="File with ResNet-101's ImageNet weights (the usual keys), or none.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder of the run.  [reproduce-NAME]")
@click.option("--methods", "method_names", metavar="A,B,...", help="Those that the paper has a row for, if left out.")
@click.option("--seeds", default="1", show_default=True, metavar="N or A,B,...")
@click.option("--joint/--no-joint", default=True, show_default=True, help="Train the upper bound, too.")
@click.option("--iterations-per-class", type=int, default=1000, show_default=True, help="The paper's; fewer to try.")
@click.option("--batch-size", type=int, default=4, show_default=True, help="The paper's.")
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
    """Run an experiment of arXiv 1907.13372 on VOC 2012 as published, and print the paper's row beside ours.

    DeepLab v2 on ResNet-101 at output stride 8, crops of 321, batch 4, 1000 iterations for each class, batch norm in
    eval mode, scored on whole images. Hours on a GPU; it goes on after a kill.

    \b
    edge-ilseg reproduce voc-19+1 --root VOCdevkit --weights resnet101.pth
    """
    from edge_ilseg.cli.progress_bar import progress_bar
    from edge_ilseg.config import override
    from edge_ilseg.pipeline import TRAINING_MODULES
    from edge_ilseg.reproduce import (
        COMPARISON_HEADER,
        MODEL,
        PUBLISHED,
        check_experiment,
        comparison_rows,
        plan_reproduction,
    )
    from edge_ilseg.reproduce import METHODS as PAPERS_METHODS
    from edge_ilseg.scenario_results import add_table, read_results
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
            _parse_seeds(seeds),
            joint=joint,
            accelerator=accelerator,
            workers=workers,
            jobs=jobs,
            progress=progress,
        )
    results = read_results(folder)
    _show(results, folder, as_json, PUBLISHED[experiment])
    beside = comparison_rows(experiment, results)
    if not beside:
        click.echo("no published row of this experiment is at hand: the table above is ours alone", err=True)
        return
    add_table(folder / "results.md", "Beside the published rows", COMPARISON_HEADER, beside)
    if not as_json:
        _print_rows("beside the published rows", COMPARISON_HEADER, beside)


def _parse_source(source: str) -> tuple[str, str]:
    from edge_ilseg.data import check_kind

    kind, separator, text = source.partition(":")
    if not separator or not text:
        raise ConfigError(
            "the scenario cannot be read",
            found=repr(source),
            expected="KIND:N+M, such as msrc:16+5",
            hint="name data set and plan: edge-ilseg scenario run --help",
        )
    check_kind(kind)
    return kind, text


def _parse_seeds(text: str) -> tuple[int, ...]:
    parts = names(text)
    if not parts or not all(part.isdecimal() for part in parts):
        raise ConfigError(
            "the seeds cannot be read",
            where="--seeds",
            found=repr(text),
            expected="a number, or a list such as 0,4",
            hint="--seeds 3 runs seeds 0, 1 and 2",
        )
    return tuple(int(part) for part in parts) if "," in text else tuple(range(int(text)))


def _all_that_work(plan: ScenarioPlan) -> tuple[str, ...]:
    """Names of all methods that can work here; says why of the others."""
    from edge_ilseg.scenario_run import check_works

    chosen = []
    for name in METHODS:
        try:
            check_works(plan, name)
        except ConfigError as error:
            click.echo(f"left out: {name}: {error.what}", err=True)
        else:
            chosen.append(name)
    return tuple(chosen)


def _default_config(kind: str) -> Config:
    from edge_ilseg.config import ClassesConfig, Config, DataConfig

    return Config(DataConfig(kind), ClassesConfig(()))


def _like(folder: Path, kind: str) -> Config:
    """The settings of a workspace; its data only where it is of the same kind."""
    import msgspec

    from edge_ilseg.config import DataConfig
    from edge_ilseg.workspace import open_workspace

    config = open_workspace(folder).config
    return config if config.data.kind == kind else msgspec.structs.replace(config, data=DataConfig(kind))


def _override_settings(
    config: Config,
    data: DataConfig,
    backbone: str | None,
    head: str | None,
    size: str | None,
    weights: str | None,
    iterations: int | None,
    step_iterations: int | None,
    batch_size: int | None,
) -> Config:
    import msgspec

    from edge_ilseg.config import default_weights, override

    width_px, height_px = parse_size(size) if size else (None, None)
    model = override(config.model, backbone=backbone, head=head, input_width_px=width_px, input_height_px=height_px)
    return msgspec.structs.replace(
        config,
        data=data,
        model=model,
        weights=weights or (default_weights(model.backbone) if backbone else config.weights),
        train=override(config.train, iterations=iterations, batch_size=batch_size),
        step=override(config.step, iterations=step_iterations, batch_size=batch_size),
    )


def _show(
    results: ScenarioResults, out: Path | None, as_json: bool, published: Mapping[str, Published] | None = None
) -> None:
    """Write results into a folder, if one is given, and print them; `published` rows are in what is printed as JSON."""
    import msgspec

    from edge_ilseg.files import write_bytes
    from edge_ilseg.scenario_results import (
        STEP_TABLES,
        SUMMARY_HEADER,
        class_rows,
        describe,
        markdown,
        step_rows,
        summary_rows,
    )

    encoded = msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n"
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_bytes(out / "results.json", encoded)
        write_bytes(out / "results.md", markdown(results).encode())
    if as_json:
        if published is not None:
            both = {**msgspec.to_builtins(results), "published": msgspec.to_builtins(published)}
            encoded = msgspec.json.format(msgspec.json.encode(both), indent=1) + b"\n"
        click.echo(encoded.decode(), nl=False)
        return
    click.echo(describe(results))
    tables = (
        ("after the last step", SUMMARY_HEADER, summary_rows(results)),
        *((title, *step_rows(results, score)) for title, score in STEP_TABLES.items()),
        ("IoU of each class after the last step", *class_rows(results, "iou")),
        ("forgetting of each class, points", *class_rows(results, "forgetting")),
    )
    for title, header, rows in tables:
        _print_rows(title, header, rows)
    if results.unfinished:
        click.echo(f"not finished, and left out: {'; '.join(results.unfinished)}")
    if out is not None:
        click.echo(f"written: {out / 'results.json'}, {out / 'results.md'}")


def _print_rows(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table

    from edge_ilseg.cli.tables import print_table

    table = Table(title=title)
    for number, column in enumerate(header):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    print_table(table)
