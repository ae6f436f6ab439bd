"""Options that several commands share, and how their text becomes values.

Configurations, which bring numpy and Pillow, are imported where a value is parsed: a device that shows help, or looks
for an update, needs neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import click

from edge_ilseg.errors import ConfigError, choice_hint

if TYPE_CHECKING:
    from edge_ilseg.config import DataConfig, DataOptions, TrainConfig
    from edge_ilseg.devices.limits import OwnLimits

workspace_argument = click.argument(
    "workspace", type=click.Path(file_okay=False, path_type=Path), default=Path("."), metavar="[WORKSPACE]"
)
hint_option = click.option(
    "--hint",
    type=click.Choice(["latency", "throughput"]),
    default="throughput",
    show_default=True,
    help="Images one at a time with all threads, or several side by side, each of which takes longer. The latency that "
    "a verdict is about is always that of one alone.",
)
step_option = click.option(
    "--step", "step_name", metavar="STEP", help="Name or number of a step; the latest if left out."
)


class FiniteFloat(click.ParamType):  # type: ignore[type-arg]
    """A number that a limit can be: infinity and what is no number would be kept always, or never."""

    name = "float"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number; fails for anything else."""
        number: float = click.FLOAT.convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number; without the option its default holds", param, ctx)
        return number


LIMIT = FiniteFloat()

data_option_option = click.option(
    "--data-option",
    "data_option_items",
    multiple=True,
    metavar="KEY=VALUE",
    help="An option of the data set, such as void_classes=horse,mountain; may be repeated.",
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
            click.option(
                "--set",
                "setting_items",
                multiple=True,
                metavar="KEY=VALUE",
                help="Any other key of [train] or [step], such as kd_temperature=2; may be repeated.",
            ),
        )
    ):
        command = option(command)
    return command


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How a plan is run; `pipeline.run_plan` takes them under the same names."""
    from edge_ilseg.schedule import CHECKPOINT_SECONDS

    for option in reversed(
        (
            click.option(
                "--accelerator",
                type=click.Choice(["auto", "cpu", "cuda", "mps"]),
                default="auto",
                show_default=True,
                help="A GPU where there is one, or by name.",
            ),
            click.option(
                "--devices",
                type=click.IntRange(min=1),
                default=1,
                show_default=True,
                help="Processes that share each batch, one on each device.",
            ),
            click.option(
                "--workers",
                type=click.IntRange(min=0),
                default=0,
                show_default=True,
                help="Processes that decode images.",
            ),
            click.option(
                "--tuning",
                default="auto",
                show_default=True,
                metavar="CHOICE",
                help="Memory format and threads: auto (measured at the start), usual, or such as channels_last:1.",
            ),
            click.option(
                "--plan",
                "plan_only",
                is_flag=True,
                help="Train nothing: print images, parameters, and a forecast of time, memory and update size.",
            ),
            click.option(
                "--max-minutes",
                type=click.FloatRange(min=0, min_open=True),
                metavar="M",
                help="Train for M minutes at most, with fewer iterations where not all fit; scores are not counted.",
            ),
            click.option(
                "--checkpoint-seconds",
                type=click.FloatRange(min=0),
                default=CHECKPOINT_SECONDS,
                show_default=True,
                help="Between two checkpoints. Killed, the same command goes on from the last one.",
            ),
            click.option(
                "--tensorboard",
                type=click.Path(file_okay=False, path_type=Path),
                metavar="DIR",
                help="Write TensorBoard's files to DIR, too; training.csv is always written.",
            ),
        )
    ):
        command = option(command)
    return command


def parse_settings(settings: TrainConfig, items: Sequence[str]) -> dict[str, Any]:
    """`["kd_mask=all", "momentum=0.8"]` to values for `config.override`, each of its setting's own type.

    Raises:
        ConfigError: unknown key, one given twice, or a value that is not of the setting's type.
    """
    import msgspec

    hints = get_type_hints(type(settings), include_extras=True)
    values: dict[str, Any] = {}
    for item in items:
        key, separator, text = item.partition("=")
        if key not in hints or key in values or not separator:
            raise ConfigError(
                "the setting is given twice" if key in values else "there is no such setting",
                where="--set",
                found=repr(item),
                expected="KEY=VALUE, each key once",
                hint=choice_hint(key, hints),
            )
        try:
            values[key] = msgspec.convert(text, hints[key], strict=False)
        except msgspec.ValidationError as error:
            raise ConfigError(
                "the setting has a value that cannot be used",
                where=f"--set {key}",
                found=repr(text),
                expected=str(error),
                hint="give a value of that type",
            ) from error
    return values


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
    from edge_ilseg.config import DataConfig
    from edge_ilseg.data import DATASETS

    kind, _, root = text.partition(":")
    if kind not in DATASETS:
        raise ConfigError(
            "the data set cannot be read",
            found=repr(text),
            expected=f"KIND:ROOT, with KIND one of {', '.join(DATASETS)}",
            hint=choice_hint(kind, DATASETS),
        )
    return DataConfig(kind=kind, root=str(Path(root).resolve()) if root else None)


def parse_data_options(kind: str, items: Sequence[str], where: str) -> DataOptions:
    """`["void_classes=horse,mountain", "seed=3"]` to the options of a data set, each of its own type.

    Args:
        kind: of the data set.
        items: `KEY=VALUE`; a list is written `a,b`, a truth value `true` or `false`.
        where: the command's option, for errors.

    Raises:
        ConfigError: unknown kind or option, one given twice, or a value that is not of the option's type.
    """
    from edge_ilseg.data import parse_option

    return {key: parse_option(kind, key, text) for key, text in _key_values(items, where).items()}


def parse_limits(items: Sequence[str], where: str) -> OwnLimits | None:
    """`["max_old_miou_drop_pct=1"]` to limits; None where there are none.

    Args:
        items: `NAME=NUMBER`, names as in `edge_ilseg.devices.limits.OwnLimits`.
        where: the command's option, for errors.

    Raises:
        ConfigError: an unknown name, one given twice, or a number that such a limit cannot have.
    """
    import msgspec

    from edge_ilseg.devices.limits import OwnLimits, check_finite

    found = _key_values(items, where)
    names = OwnLimits.__struct_fields__
    for name in found:
        if name not in names:
            raise ConfigError(
                "there is no such limit",
                where=where,
                found=name,
                expected=", ".join(names),
                hint=choice_hint(name, names),
            )
    try:
        numbers = msgspec.convert(found, dict[str, float], strict=False)
        limits = msgspec.convert(numbers, OwnLimits, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(
            "a limit cannot be read",
            where=where,
            found=", ".join(f"{name}={text}" for name, text in found.items()),
            expected=str(error),
            hint="write each as NAME=NUMBER, such as max_old_miou_drop_pct=1",
        ) from error
    check_finite(limits, where)
    return limits if found else None


def _key_values(items: Sequence[str], where: str) -> dict[str, str]:
    texts: dict[str, str] = {}
    for item in items:
        key, separator, text = item.partition("=")
        if not separator or key in texts:
            raise ConfigError(
                "the option is given twice" if separator else "the option cannot be read",
                where=where,
                found=repr(item),
                expected="KEY=VALUE, each key once",
                hint="write each as KEY=VALUE, once",
            )
        texts[key] = text
    return texts


def data_config(
    default: DataConfig,
    data_text: str | None,
    train_split: str | None,
    eval_split: str | None,
    data_option_items: Sequence[str] = (),
) -> DataConfig:
    """The workspace's data configuration with what the options change.

    Another folder of the same kind keeps the workspace's splits and options. Another kind of data set has its own; the
    setup, which belongs to the plan and not to the images, is kept.

    Raises:
        ConfigError: a value cannot be used.
    """
    import msgspec

    from edge_ilseg.config import override

    if data_text is not None:
        other = parse_data_text(data_text)
        if other.kind == default.kind:
            default = msgspec.structs.replace(default, root=other.root)
        else:
            default = msgspec.structs.replace(other, setup=default.setup, partition_seed=default.partition_seed)
    options = parse_data_options(default.kind, data_option_items, "--data-option")
    changed: DataConfig = override(
        default, train_split=train_split, eval_split=eval_split, options={**default.options, **options}
    )
    return changed


def parse_size(text: str) -> tuple[int, int]:
    """`"160x112"` to width and height in pixels.

    Raises:
        ConfigError: anything else.
    """
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise ConfigError(
            "the size cannot be read",
            where="--size",
            found=repr(text),
            expected="WIDTHxHEIGHT in pixels",
            hint="--size 160x112",
        )
    return int(width), int(height)
