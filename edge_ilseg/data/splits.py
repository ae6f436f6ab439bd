"""Lists of image ids, and the splits made of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from edge_ilseg.errors import DataError, choice_hint

TRAIN_SHARE = 0.8
Splits = Mapping[str, tuple[str, ...]]


def read_lines(path: Path) -> tuple[tuple[int, str], ...]:
    """The lines of a text file that are neither blank nor start with `#`: (line number from 1, text).

    Raises:
        DataError: the file is missing or not UTF-8 text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError("a list is missing", where=path, hint="write the list, or copy the data set again") from error
    except UnicodeDecodeError as error:
        raise DataError("a list is not UTF-8 text", where=path, found=str(error), hint="save it as UTF-8") from error
    numbered = ((number, line.strip()) for number, line in enumerate(text.splitlines(), start=1))
    return tuple((number, line) for number, line in numbered if line and not line.startswith("#"))


def check_unique(ids: Iterable[tuple[int, str]], path: Path) -> tuple[str, ...]:
    """The ids of a list, each of which may stand there once.

    Raises:
        DataError: an id stands twice; the error names both lines.
    """
    seen: dict[str, int] = {}
    for number, image_id in ids:
        if image_id in seen:
            raise DataError(
                f"the image {image_id!r} is listed twice",
                where=path,
                found=f"lines {seen[image_id]} and {number}",
                hint="remove one of them",
            )
        seen[image_id] = number
    return tuple(seen)


def select_split(split: str, splits: Splits, where: object) -> tuple[str, ...]:
    """Image ids of `split`; `"train+val"` joins splits, and an id in both comes once.

    Raises:
        DataError: a split is unknown or empty.
    """
    joined: dict[str, None] = {}
    for name in (part.strip() for part in split.split("+")):
        if name not in splits:
            raise DataError(
                f"unknown split {name!r}",
                where=where,
                expected=f"one of {', '.join(splits)}" if splits else "a data set with at least one split",
                hint=choice_hint(name, splits),
            )
        if not splits[name]:
            raise DataError(
                f"the split {name!r} is empty",
                where=where,
                expected="at least one image",
                hint="fill its list, or use another split",
            )
        joined.update(dict.fromkeys(splits[name]))
    return tuple(joined)


def filled(splits: Splits) -> tuple[str, ...]:
    """The splits with at least one image: those that a data set names of itself."""
    return tuple(name for name, ids in splits.items() if ids)


def hash_splits(ids: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Split ids into train (80 %) and val (20 %) by a hash of each id alone.

    An image keeps its side when others are added or removed; so the shares hold on average, not exactly.
    """
    sides: dict[str, list[str]] = {"train": [], "val": []}
    for image_id in ids:
        fraction = int(hashlib.sha256(image_id.encode()).hexdigest()[:16], 16) / 2**64
        sides["train" if fraction < TRAIN_SHARE else "val"].append(image_id)
    return {name: tuple(members) for name, members in sides.items()}
