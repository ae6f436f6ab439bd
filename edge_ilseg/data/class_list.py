"""The list of classes that lies beside a folder of masks: `classes.txt`, or the `labelmap.txt` that CVAT exports.

1. The id of a class is its line, counted from 0 without blank lines and comments (`#`).
2. A line named void, ignore or ignored is no class: its id and its colour mean void.
3. Line formats: `name`, `name: r,g,b`, and CVAT's `name:r,g,b:parts:actions`. Colours are given for all or for none.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from edge_ilseg.data.masks import MaskCode
from edge_ilseg.data.splits import read_lines
from edge_ilseg.errors import DataError
from edge_ilseg.images import VOID_COLOR, Color, default_colors
from edge_ilseg.metrics import VOID

LIST_NAMES = ("classes.txt", "labelmap.txt")
VOID_NAMES = frozenset({"void", "ignore", "ignored"})
BACKGROUND_NAMES = frozenset({"background", "_background_"})


class ClassList(msgspec.Struct, frozen=True):
    """Classes of a folder of masks, and what the masks' values and colours stand for."""

    classes: tuple[str, ...]
    background: str | None
    colors: tuple[Color, ...]
    code: MaskCode


def read_class_list(root: Path) -> ClassList:
    """Read `classes.txt` or, where it is not there, `labelmap.txt`.

    Raises:
        DataError: neither is there, a line cannot be read, a name or a colour stands twice, or there are more than 255.
    """
    path = next((path for name in LIST_NAMES if (path := root / name).is_file()), None)
    if path is None:
        raise DataError(
            "the data set has no list of classes",
            where=root,
            expected="classes.txt with one class name a line in the order of the label ids, or CVAT's labelmap.txt",
            hint="write classes.txt there, or give the folder that holds it",
        )
    entries = [(number, *_parse_line(line, number, path)) for number, line in read_lines(path)]
    _check_entries(entries, path)
    classes = tuple(name for _, name, _ in entries if name.lower() not in VOID_NAMES)
    label_of = {name: index for index, name in enumerate(classes)}
    values = {value: label_of.get(name, VOID) for value, (_, name, _) in enumerate(entries)}
    declared = {color: label_of.get(name, VOID) for _, name, color in entries if color is not None}
    own = {name: color for _, name, color in entries if color is not None}
    return ClassList(
        classes=classes,
        background=next((name for name in classes if name.lower() in BACKGROUND_NAMES), None),
        colors=tuple(own.get(name, color) for name, color in zip(classes, default_colors(len(classes)), strict=True)),
        code=MaskCode(
            values={VOID: VOID} | values,
            colors={VOID_COLOR: VOID} | declared if declared else {},
        ),
    )


def _parse_line(line: str, number: int, path: Path) -> tuple[str, Color | None]:
    name, _, rest = (part.strip() for part in line.partition(":"))
    color_text = rest.partition(":")[0].strip()
    levels = [level.strip() for level in color_text.split(",")] if color_text else []
    is_color = len(levels) == 3 and all(level.isascii() and level.isdigit() and int(level) <= 255 for level in levels)
    if not name or (levels and not is_color):
        raise DataError(
            "a line of the list of classes cannot be read",
            where=f"{path}, line {number}",
            found=repr(line),
            expected="`name` or `name: r,g,b` with levels from 0 to 255",
            hint="correct this line",
        )
    return name, (int(levels[0]), int(levels[1]), int(levels[2])) if levels else None


def _check_entries(entries: list[tuple[int, str, Color | None]], path: Path) -> None:
    if not any(name.lower() not in VOID_NAMES for _, name, _ in entries):
        raise DataError(
            "the list of classes is empty",
            where=path,
            expected="one class name a line",
            hint="write the names of the classes into it",
        )
    if len(entries) > VOID:
        raise DataError(
            "there are more classes than a mask can hold",
            where=path,
            found=len(entries),
            expected=f"at most {VOID}",
            hint="leave classes out, or merge some",
        )
    names: dict[str, int] = {}
    colors: dict[Color, int] = {}
    for number, name, color in entries:
        if name.lower() in names:
            raise DataError(
                f"the class {name!r} is listed twice",
                where=path,
                found=f"lines {names[name.lower()]} and {number}",
                hint="remove or rename one of the two",
            )
        names[name.lower()] = number
        if color is not None and color in colors:
            raise DataError(
                "two classes have one colour",
                where=path,
                found=f"lines {colors[color]} and {number}",
                hint="give one of the two another colour",
            )
        if color is not None:
            colors[color] = number
    if colors and len(colors) != len(entries):
        bare = next(number for number, _, color in entries if color is None)
        raise DataError(
            "some classes have a colour and some have none",
            where=path,
            found=f"no colour in line {bare}",
            expected="a colour for every class, or for none",
            hint="add the colours that are missing, or remove them all",
        )
