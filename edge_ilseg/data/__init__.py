"""Data sets. `DATASETS` lists every kind; `open_dataset` opens one with options from a configuration file."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from edge_ilseg.data.dataset import Dataset
from edge_ilseg.data.folder import Folder
from edge_ilseg.data.msrc import Msrc
from edge_ilseg.data.shapes import Shapes
from edge_ilseg.data.voc import Voc
from edge_ilseg.errors import ConfigError, DataError, did_you_mean

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
    if kind not in DATASETS:
        raise ConfigError(
            f"unknown kind of data set {kind!r}",
            expected=f"one of {', '.join(DATASETS)}",
            hint=did_you_mean(kind, DATASETS),
        )
    if (root is None) != (kind in GENERATED):
        raise ConfigError(
            f"the data set {kind!r} " + ("needs a folder" if root is None else "is generated and reads no folder"),
            found=f"root {root}" if root is not None else "no root",
            hint="give its root" if root is None else "leave the root out",
        )
    if root is not None and not root.is_dir():
        raise DataError("the folder of the data set does not exist", where=root, hint="correct the root")
    return DATASETS[kind](root, **_converted_options(kind, options))


def option_types(kind: str) -> dict[str, object]:
    """Names and types of the options of a kind of data set: the keyword arguments of its class."""
    opener = DATASETS[kind]
    hints = typing.get_type_hints(opener.__init__)
    parameters = inspect.signature(opener).parameters.values()
    return {item.name: hints[item.name] for item in parameters if item.kind is item.KEYWORD_ONLY}


def _converted_options(kind: str, options: Mapping[str, object]) -> dict[str, object]:
    types = option_types(kind)
    for name in options:
        if name not in types:
            raise ConfigError(
                f"the data set {kind!r} has no option {name!r}",
                expected=f"one of {', '.join(types)}" if types else "no option at all",
                hint=did_you_mean(name, types),
            )
    converted: dict[str, object] = {}
    for name, value in options.items():
        try:
            converted[name] = msgspec.convert(value, types[name])
        except msgspec.ValidationError as error:
            raise ConfigError(
                f"the option {name!r} of the data set {kind!r} has a value that cannot be used",
                found=repr(value),
                expected=str(error),
            ) from error
    return converted
