"""Data sets. `DATASETS` lists every kind; `open_dataset` opens one with options from a configuration file."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edge_ilseg.data.dataset import Dataset
from edge_ilseg.data.folder import Folder
from edge_ilseg.data.msrc import Msrc
from edge_ilseg.data.shapes import Shapes
from edge_ilseg.data.voc import Voc
from edge_ilseg.errors import ConfigError, DataError, choice_hint

if TYPE_CHECKING:
    from edge_ilseg.config import DataConfig  # which checks itself with `data.transforms`

DATASETS: dict[str, Callable[..., Dataset]] = {
    "folder": Folder,
    "voc": Voc,
    "msrc": Msrc,
    "shapes": Shapes,
}
GENERATED = frozenset({"shapes"})
_NO_OPTIONS: Mapping[str, object] = {}


def open_dataset(kind: str, root: Path | None, options: Mapping[str, object] = _NO_OPTIONS) -> Dataset:
    """Open a data set.

    Args:
        kind: a key of `DATASETS`.
        root: its folder; None for a generated data set.
        options: keyword arguments of its class, as plain values (numbers, strings, lists) from a configuration file.

    Raises:
        ConfigError: unknown kind or option, a value of the wrong type, a root too many or too few.
        DataError: the folder is missing or is no such data set.
    """
    check_kind(kind)
    if (root is None) != (kind in GENERATED):
        raise ConfigError(
            f"the data set {kind!r} " + ("needs a folder" if root is None else "is generated and reads no folder"),
            found=f"root {root}" if root is not None else "no root",
            hint="give its root" if root is None else "leave the root out",
        )
    if root is not None and not root.is_dir():
        raise DataError("the folder of the data set does not exist", where=root, hint="correct the root")
    return DATASETS[kind](root, **_converted_options(kind, options))


def open_data(data: DataConfig) -> Dataset:
    """The data set that a configuration names.

    Raises:
        ConfigError: unknown kind or option, a value of the wrong type, a root too many or too few.
        DataError: the folder is missing or is no such data set.
    """
    return open_dataset(data.kind, Path(data.root) if data.root else None, data.options)


def check_kind(kind: str) -> None:
    """Raise `ConfigError` when there is no such kind of data set."""
    if kind not in DATASETS:
        raise ConfigError(
            f"unknown kind of data set {kind!r}",
            expected=f"one of {', '.join(DATASETS)}",
            hint=choice_hint(kind, DATASETS),
        )


def parse_option(kind: str, name: str, text: str) -> int | float | str | bool | list[str]:
    """The value that the text of an option means: a number, `true` or `false`, a list `a,b`, or the text itself.

    Raises:
        ConfigError: unknown kind or option, or the text cannot be read as the option's type.
    """
    check_kind(kind)
    types = option_types(kind)
    _check_option(kind, name, types)
    value: object = text
    if typing.get_origin(types[name]) is Sequence:
        value = [item.strip() for item in text.split(",") if item.strip()]
    parsed: int | float | str | bool | list[str] = _converted(kind, name, value, types[name], strict=False)
    return parsed


def option_types(kind: str) -> dict[str, object]:
    """Names and types of the options of a kind of data set: the keyword arguments of its class."""
    opener = DATASETS[kind]
    hints = typing.get_type_hints(opener.__init__)
    parameters = inspect.signature(opener).parameters.values()
    return {item.name: hints[item.name] for item in parameters if item.kind is item.KEYWORD_ONLY}


def _converted_options(kind: str, options: Mapping[str, object]) -> dict[str, object]:
    types = option_types(kind)
    for name in options:
        _check_option(kind, name, types)
    return {name: _converted(kind, name, value, types[name], strict=True) for name, value in options.items()}


def _check_option(kind: str, name: str, types: Mapping[str, object]) -> None:
    if name not in types:
        raise ConfigError(
            f"the data set {kind!r} has no option {name!r}",
            expected=f"one of {', '.join(types)}" if types else "no option at all",
            hint=choice_hint(name, types),
        )


def _converted(kind: str, name: str, value: object, to: Any, *, strict: bool) -> Any:
    try:
        return msgspec.convert(value, to, strict=strict)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"the option {name!r} of the data set {kind!r} has a value that cannot be used",
            found=repr(value),
            expected=str(error),
            hint=f"write {name}=VALUE with a value of this type",
        ) from error
