"""`edge-ilseg train`, `edge-ilseg step` and `edge-ilseg evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_ilseg.cli.json_option import json_option
from edge_ilseg.cli.options import (
    data_config,
    data_option_option,
    data_options,
    names,
    parse_settings,
    run_options,
    step_option,
    training_options,
    workspace_argument,
)
from edge_ilseg.errors import ConfigError
from edge_ilseg.methods import METHODS

if TYPE_CHECKING:
    from edge_ilseg.checkpoint import StepRecord
    from edge_ilseg.planning import StepPlan
    from edge_ilseg.workspace import Workspace


@click.command()
@workspace_argument
@training_options
@run_options
@json_option
def train(
    workspace: Path,
    iterations: int | None,
    batch_size: int | None,
    learning_rate: float | None,
    seed: int | None,
    setting_items: tuple[str, ...],
    as_json: bool,
    **how: Any,
) -> None:
    """Train step 0 on the base classes of WORKSPACE, and score it.

    \b
    edge-ilseg train work
    edge-ilseg train work --iterations 2000 --learning-rate 0.02
    """
    from edge_ilseg.cli.progress_bar import progress_bar
    from edge_ilseg.config import override
    from edge_ilseg.planning import plan_base
    from edge_ilseg.workspace import open_workspace

    _check_training()
    opened = open_workspace(workspace)
    settings = override(
        override(opened.config.train, **parse_settings(opened.config.train, setting_items)),
        iterations=iterations,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
    )
    with progress_bar("step 0") as progress:
        plan = plan_base(opened, settings, progress=progress)
    _run_and_print(opened, plan, how, as_json)


@click.command()
@workspace_argument
@click.option("--add-classes", required=True, metavar="A,B,...", help="Classes to add; aliases such as tv are known.")
@click.option("--from", "parent_name", metavar="STEP", help="The step to go on from; the latest if left out.")
@click.option("--name", help="Name of the new step, behind its number; its classes if left out.")
@click.option("--method", help=f"{', '.join(METHODS)}; the workspace's if left out.")
@click.option("--freeze", help="none, stem, stages:<n>, encoder or all_but_head, in place of the method's own.")
@click.option("--loss", "losses", multiple=True, metavar="TERM=WEIGHT", help="A loss weight, such as kd_output=2.")
@training_options
@run_options
@data_options
@data_option_option
@json_option
def step(
    workspace: Path,
    add_classes: str,
    parent_name: str | None,
    name: str | None,
    method: str | None,
    freeze: str | None,
    losses: tuple[str, ...],
    iterations: int | None,
    batch_size: int | None,
    learning_rate: float | None,
    seed: int | None,
    setting_items: tuple[str, ...],
    data_text: str | None,
    train_split: str | None,
    eval_split: str | None,
    data_option_items: tuple[str, ...],
    as_json: bool,
    **how: Any,
) -> None:
    """Teach the model of WORKSPACE new classes, without the images of earlier steps.

    \b
    edge-ilseg step work --add-classes boat
    edge-ilseg step work --add-classes boat,bird --method kd-output --from 00-base --name by-hand
    edge-ilseg step work --add-classes boat --data folder:DATA/boats --loss kd_output=2 --set kd_temperature=2
    """
    from edge_ilseg.cli.progress_bar import progress_bar
    from edge_ilseg.config import override, step_method
    from edge_ilseg.methods import check_switches_act
    from edge_ilseg.planning import plan_step
    from edge_ilseg.workspace import open_workspace

    _check_training()
    opened = open_workspace(workspace)
    by_hand = parse_settings(opened.config.step, setting_items)
    settings = override(
        override(opened.config.step, **by_hand),
        method=method,
        freeze=freeze,
        losses={**opened.config.step.losses, **_parse_losses(losses)},
        iterations=iterations,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
    )
    check_switches_act(step_method(settings), by_hand)
    data = data_config(opened.config.data, data_text, train_split, eval_split, data_option_items)
    with progress_bar("step") as progress:
        plan = plan_step(
            opened,
            names(add_classes),
            settings,
            parent_name=parent_name,
            name=name,
            data=data,
            progress=progress,
        )
    _run_and_print(opened, plan, how, as_json)


def _check_training() -> None:
    """Say which extra is missing before anything is read."""
    from edge_ilseg.errors import check_extra
    from edge_ilseg.pipeline import TRAINING_MODULES

    check_extra("train", TRAINING_MODULES, "training")


def _parse_losses(items: tuple[str, ...]) -> dict[str, float]:
    weights = {}
    for item in items:
        term, _, text = item.partition("=")
        try:
            weights[term] = float(text)
        except ValueError as error:
            raise ConfigError(
                "the loss weight cannot be read",
                where="--loss",
                found=repr(item),
                expected="such as kd_output=1.0",
                hint="write TERM=WEIGHT, such as --loss kd_output=2",
            ) from error
    return weights


def _run_and_print(workspace: Workspace, plan: StepPlan, how: dict[str, Any], as_json: bool) -> None:
    """Train a plan as the options of `run_options` say, then print the record, or the scores beside the parent's."""
    import msgspec

    from edge_ilseg.cli.progress_bar import progress_bar
    from edge_ilseg.cli.tables import as_before, class_table, comparison_table, print_table
    from edge_ilseg.pipeline import run_plan
    from edge_ilseg.progress import is_first_process
    from edge_ilseg.train import WorkerDone

    if is_first_process():
        click.echo(describe_plan(plan), err=True)
    if how.pop("plan_only"):
        _print_forecast(workspace, plan, how, as_json)
        return
    say = _say if is_first_process() else _be_silent
    try:
        with progress_bar(plan.name) as progress:
            record = run_plan(workspace, plan, **how, say=say, progress=progress)
    except WorkerDone:
        return
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(record), indent=1).decode())
        return
    for split, metrics in record.metrics.items():
        print_table(class_table(metrics, record.new_classes if plan.parent else (), f"{record.name} on {split}"))
        if plan.parent and split in record.parent_metrics:
            before = as_before(record.parent_metrics[split])
            rows = {f"before ({plan.parent.name})": before, f"after ({record.name})": metrics}
            caption = (
                "per cent, on the same images; before: pixels of the new classes count as background, or not at all"
            )
            print_table(comparison_table(f"{split}, {metrics.images} images", rows, caption=caption))
    ran, asked = record.training.iterations, plan.settings.iterations
    fewer = f", {ran} of {asked} iterations: no more fitted into the time" if ran < asked else ""
    click.echo(f"written: {workspace.step_folder(record.name)} ({record.training_seconds:.0f} s of training{fewer})")


def _print_forecast(workspace: Workspace, plan: StepPlan, how: dict[str, Any], as_json: bool) -> None:
    """Say what a plan will take, and write nothing."""
    from edge_ilseg.cli.plan_table import print_forecast
    from edge_ilseg.cli.progress_bar import progress_bar
    from edge_ilseg.forecast import forecast_plan

    probed = {name: how[name] for name in ("accelerator", "devices", "workers")}
    with progress_bar(plan.name) as progress:
        forecast = forecast_plan(workspace, plan, **probed, progress=progress)
    print_forecast(forecast, as_json=as_json)


def _say(sentence: str) -> None:
    click.echo(sentence, err=True)


def _be_silent(_sentence: str) -> None:
    """What another process has said already."""


def describe_plan(plan: StepPlan) -> str:
    """One line: which images, classes, iterations and method."""
    effort = f"{plan.settings.iterations} iterations of {plan.settings.batch_size}"
    if plan.is_closed_form:
        effort = "one pass and a closed form"
    added = [item.name for item in plan.classes if item.step == plan.index and item.name != plan.background]
    method = f", method {plan.method.name}" if plan.method else ""
    return (
        f"{plan.name}: {len(plan.view.image_ids)} images, {len(added)} new "
        f"{'class' if len(added) == 1 else 'classes'} ({', '.join(added)}), "
        f"{effort}{method}" + "".join(f"\n  {note}" for note in plan.notes)
    )


@click.command()
@workspace_argument
@step_option
@click.option("--data", "data_text", metavar="KIND:ROOT", help="Other images, such as folder:DATA.")
@data_option_option
@click.option("--split", help="Split to score on; the workspace's eval_split if left out.")
@json_option
def evaluate(
    workspace: Path,
    step_name: str | None,
    data_text: str | None,
    data_option_items: tuple[str, ...],
    split: str | None,
    as_json: bool,
) -> None:
    """Score a step of WORKSPACE: IoU of each class, mIoU old / new / all, mPA, mCA.

    \b
    edge-ilseg evaluate work --split test
    edge-ilseg evaluate work --step 01-boat --split test --json
    """
    import msgspec

    from edge_ilseg.cli.progress_bar import progress_bar
    from edge_ilseg.cli.tables import class_table, print_table
    from edge_ilseg.pipeline import evaluate_step
    from edge_ilseg.workspace import open_workspace

    opened = open_workspace(workspace)
    record: StepRecord = opened.read_step(step_name) if step_name else opened.latest_step()
    data = data_config(opened.config.data, data_text, None, split, data_option_items)
    with progress_bar(record.name) as progress:
        metrics = evaluate_step(opened, record, split=split, data=data, progress=progress)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(metrics), indent=1).decode())
    else:
        new = record.new_classes if record.index else ()
        print_table(class_table(metrics, new, f"{record.name} on {data.eval_split}, {metrics.images} images"))
