"""Options that several commands share, and how their text becomes values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from edge_ilseg.config import DataConfig, override
from edge_ilseg.errors import ConfigError, did_you_mean

workspace_argument = click.argument(
    "workspace", type=click.Path(file_okay=False, path_type=Path), default=Path("."), metavar="[WORKSPACE]"
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON in place of the table.")
step_option = click.option(
    "--step", "step_name", metavar="STEP", help="Name or number of a step; the latest if left out."
)


def names(text: str | None) -> tuple[str, ...]:
    """`"boat, tv"` to `("boat", "tv")`."""
    return tuple(item.strip() for item in (text or "").split(",") if item.strip())


def training_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of `[train]` and `[step]` that are changed most often."""
    for option in reversed(
        (
            click.option("--iterations", type=int, help="Optimiser iterations."),
            click.option("--batch-size", type=int, help="Images in a batch."),
            click.option("--learning-rate", type=float, help="At the start; it decays polynomially."),
            click.option("--seed", type=int, help="Of initial weights, order and augmentation."),
            click.option("--accelerator", default="auto", show_default=True, help="auto, cpu, cuda or mps."),
            click.option("--workers", type=int, default=0, show_default=True, help="Processes that decode images."),
        )
    ):
        command = option(command)
    return command


def data_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that put another data set in the place of the workspace's."""
    for option in reversed(
        (
            click.option("--data", "data_text", metavar="KIND:ROOT", help="Other images, such as folder:/data/boats."),
            click.option("--train-split", help="Split to learn from, such as train or train+val."),
            click.option("--eval-split", help="Split to score on."),
        )
    ):
        command = option(command)
    return command


def parse_data_text(text: str) -> DataConfig:
    """`"folder:/data/boats"` to a data configuration.

    Raises:
        ConfigError: the kind is unknown.
    """
    from edge_ilseg.data import DATASETS

    kind, _, root = text.partition(":")
    if kind not in DATASETS:
        raise ConfigError(
            "the data set cannot be read",
            found=repr(text),
            expected=f"KIND:ROOT, with KIND one of {', '.join(DATASETS)}",
            hint=did_you_mean(kind, DATASETS),
        )
    return DataConfig(kind=kind, root=str(Path(root).resolve()) if root else None)


def data_config(
    default: DataConfig, data_text: str | None, train_split: str | None, eval_split: str | None
) -> DataConfig:
    """The workspace's data configuration with what the options change."""
    if data_text is not None:
        default = override(parse_data_text(data_text), setup=default.setup)
    changed: DataConfig = override(default, train_split=train_split, eval_split=eval_split)
    return changed
