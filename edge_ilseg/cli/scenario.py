"""`edge-ilseg scenario run` and `edge-ilseg scenario show`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_ilseg.cli.json_option import json_option
from edge_ilseg.cli.options import names, parse_data_options, parse_size
from edge_ilseg.cli.scenario_tables import show_results
from edge_ilseg.errors import ConfigError, check_extra
from edge_ilseg.methods import METHODS
from edge_ilseg.scenario import CLASS_ORDERS, SETUPS

if TYPE_CHECKING:
    from edge_ilseg.config import Config, DataConfig
    from edge_ilseg.scenario_plan import ScenarioPlan

DEFAULT_ORDER = {"msrc": "frequency"}
"""In the listed order of MSRC-v2 classes would be left without an image."""


def settings_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say which network, and how it is trained."""
    like = "Take the settings of this workspace, but for what changes a method."
    at_least_one = click.IntRange(1)
    for option in reversed(
        (
            click.option("--like", type=click.Path(file_okay=False, path_type=Path), help=like),
            click.option("--backbone", help="As of init."),
            click.option("--head", help="As of init."),
            click.option("--size", metavar="WxH", help="The model's input in pixels."),
            click.option("--weights", help="imagenet, none, or a file with the backbone's weights."),
            click.option("--iterations", type=at_least_one, help="Of step 0."),
            click.option("--step-iterations", type=at_least_one, help="Of each increment."),
            click.option(
                "--iterations-per-class", type=at_least_one, help="Of each increment, times the classes that it adds."
            ),
            click.option("--batch-size", type=at_least_one, help="Images in a batch, in every step."),
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
        click.option(
            "--workers", type=click.IntRange(0), default=0, show_default=True, help="Processes that decode and augment."
        ),
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
    "--methods",
    "method_names",
    default="finetune,freeze+kd-output",
    show_default=True,
    metavar="A,B,... or all",
    help="Presets; kd-output@stages:2:kd_output=3 is one that is set by hand.",
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
    edge-ilseg scenario run shapes:6+2 --methods kd-output,kd-output:kd_output=3,kd-output:kd_temperature=2
    """
    from edge_ilseg.cli.progress_bar import progress_bar
    from edge_ilseg.config import override, step_method
    from edge_ilseg.method_text import parse_method
    from edge_ilseg.pipeline import TRAINING_MODULES
    from edge_ilseg.scenario_plan import plan_scenario, without_changes
    from edge_ilseg.scenario_results import read_results
    from edge_ilseg.scenario_run import run_scenario

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
    if without_changes(config.step) != config.step:
        click.echo(
            "losses, switches and freeze of [step] are left out: each method is its preset, or METHOD:KEY=VALUE",
            err=True,
        )
    chosen = () if method_names == "all" else tuple(dict.fromkeys(names(method_names)))
    for name in chosen:
        step_method(parse_method(name).settings(without_changes(config.step)))
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
            parse_seeds(seeds),
            joint=joint,
            accelerator=accelerator,
            workers=workers,
            jobs=jobs,
            progress=progress,
        )
    show_results(read_results(folder), folder, as_json)


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
    show_results(results, out, as_json)


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


def parse_seeds(text: str) -> tuple[int, ...]:
    parts = names(text)
    if not parts or not all(part.isdecimal() for part in parts) or ("," not in text and int(text) == 0):
        raise ConfigError(
            "the seeds cannot be read",
            where="--seeds",
            found=repr(text),
            expected="a number, 1 or more, or a list such as 0,4",
            hint="--seeds 3 runs seeds 0, 1 and 2",
        )
    return tuple(dict.fromkeys(int(part) for part in parts)) if "," in text else tuple(range(int(text)))


def _all_that_work(plan: ScenarioPlan) -> tuple[str, ...]:
    """Names of all methods that can work here; says why of the others."""
    from edge_ilseg.scenario_plan import check_works

    chosen, reasons = [], []
    for name in METHODS:
        try:
            check_works(plan, name)
        except ConfigError as error:
            reasons.append(error)
            click.echo(f"left out: {name}: {error.one_line()}", err=True)
        else:
            chosen.append(name)
    if not chosen:
        raise reasons[-1]
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
