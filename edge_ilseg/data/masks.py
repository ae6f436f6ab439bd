"""From what a mask file holds to label ids.

1. A *label id* is an index into the data set's classes; 255 is void. Nothing else leaves this module.
2. A value or a colour that has no class is an error that names the file, the value and the first pixel.
3. A palette mask is read by its colours where every colour in use is a class's declared colour, else by its indices.
4. A colour image whose channels are all equal is a mask of indices where its greys are not declared colours.
5. A mask is looked up by its runs of equal pixels, row after row, which are few; each pixel gets what its run got.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_ilseg.errors import DataError
from edge_ilseg.images import SAME_SIZE_HINT, Color, MaskFile, image_size, read_mask
from edge_ilseg.metrics import VOID


class MaskCode(msgspec.Struct, frozen=True):
    """What the values and colours of a data set's masks stand for."""

    values: Mapping[int, int]
    """value in the file -> label id; empty where masks hold colours only."""
    colors: Mapping[Color, int]
    """colour in the file -> label id; empty where masks hold indices only."""


def read_labels(mask_path: Path, image_path: Path, code: MaskCode) -> NDArray[np.uint8]:
    """Label ids of a mask file, uint8, H x W.

    Raises:
        DataError: the mask is missing or damaged, its size is not that of the upright image, or it holds a value or a
            colour without a class.
    """
    if not mask_path.is_file():
        raise DataError(
            "the mask of an image is missing",
            where=mask_path,
            found=f"the image {image_path}",
            hint="add the mask, or leave the image out of the split",
        )
    mask = read_mask(mask_path)
    height, width = image_size(image_path)
    if mask.values.shape[:2] != (height, width):
        raise DataError(
            "an image and its mask differ in size",
            where=mask_path,
            found=f"mask {mask.values.shape[0]} x {mask.values.shape[1]} (height x width)",
            expected=f"{height} x {width}, the upright size of {image_path}",
            hint=SAME_SIZE_HINT,
        )
    return decode_labels(mask, code, mask_path)


class _Runs(NamedTuple):
    """The runs of equal pixels of a mask (rule 5)."""

    pixels: NDArray[Any]
    """Of each run: R of values (int32), or R x 3 of colours (uint8)."""
    lengths_R: NDArray[np.int64]
    shape: tuple[int, ...]
    """Height and width of the mask."""

    def spread(self, labels_R: NDArray[np.int16]) -> NDArray[np.uint8]:
        """What each run got, given to its pixels; uint8, H x W."""
        return np.repeat(labels_R.astype(np.uint8), self.lengths_R).reshape(self.shape)

    def place(self, run: int) -> str:
        """Where a run begins."""
        row, column = divmod(int(self.lengths_R[:run].sum()), self.shape[1])
        return f"row {row}, column {column} (counted from 0)"


def _runs(values: NDArray[np.int32] | NDArray[np.uint8]) -> _Runs:
    channels = 1 if values.ndim == 2 else 3
    flat = values.reshape(-1)
    # A pixel ends a run where a channel of it differs from the next pixel's; further channels that do end runs of none.
    changes = np.flatnonzero(flat[channels:] != flat[:-channels]) // channels
    ends_R = np.append(changes, flat.size // channels - 1)
    pixels = values.reshape(-1, 3)[ends_R] if channels == 3 else flat[ends_R]
    return _Runs(pixels, np.diff(ends_R, prepend=-1), values.shape[:2])


def decode_labels(mask: MaskFile, code: MaskCode, where: Path) -> NDArray[np.uint8]:
    """Turn the values or colours of a mask into label ids (rules 2 to 5).

    Raises:
        DataError: a value or a colour has no class.
    """
    runs = _runs(mask.values)
    if mask.values.ndim == 2:
        if mask.palette is not None and code.colors:
            used = np.unique(runs.pixels)
            if used[-1] < len(mask.palette) and all(_color(mask.palette[index]) in code.colors for index in used):
                return _by_color(runs._replace(pixels=mask.palette[runs.pixels]), code, where)
        return _by_value(runs, code, where)
    if code.values and (runs.pixels == runs.pixels[:, :1]).all():
        greys = np.unique(runs.pixels[:, 0])
        if any((int(grey),) * 3 not in code.colors for grey in greys):
            return _by_value(runs._replace(pixels=runs.pixels[:, 0]), code, where)
    return _by_color(runs, code, where)


def _by_value(runs: _Runs, code: MaskCode, where: Path) -> NDArray[np.uint8]:
    if not code.values:
        raise DataError(
            "a mask holds indices, but this data set's masks hold colours",
            where=where,
            expected="an RGB image",
            hint="save the mask as RGB, in the colours of the data set",
        )
    lookup = np.full(65538, -1, dtype=np.int16)  # of value - 1: both ends catch what is out of range
    for value, label in code.values.items():
        lookup[value + 1] = label
    labels_R = lookup.take(runs.pixels.astype(np.int32) + 1, mode="clip")
    if labels_R.min() < 0:
        first = int(np.argmax(labels_R < 0))
        known = sorted(value for value in code.values if value != VOID)
        raise DataError(
            "a mask holds a value outside the list of classes",
            where=where,
            found=f"value {runs.pixels[first]} at {runs.place(first)}",
            expected=f"{known[0]} to {known[-1]}, or {VOID} for void",
            hint="add the class to the list of classes, or correct the mask",
        )
    return runs.spread(labels_R)


def _by_color(runs: _Runs, code: MaskCode, where: Path) -> NDArray[np.uint8]:
    if not code.colors:
        first = int(np.argmax((runs.pixels != runs.pixels[:, :1]).any(axis=1)))
        raise DataError(
            "a mask holds colours, but the list of classes names none",
            where=where,
            found=f"colour {_text(_color(runs.pixels[first]))} at {runs.place(first)}",
            hint="write the colours into classes.txt, one `name: r,g,b` a line, or save the masks as indices",
        )
    labels_R = _look_up_colors(runs.pixels, code.colors)
    if labels_R.min() < 0:
        first = int(np.argmax(labels_R < 0))
        raise DataError(
            "a mask holds a colour that no class has",
            where=where,
            found=f"colour {_text(_color(runs.pixels[first]))} at {runs.place(first)}",
            expected=f"one of the {len(code.colors)} declared colours",
            hint="add the line `background: 0,0,0` to the list of classes, if black is the background"
            if not runs.pixels[first].any()
            else "give the colour to a class in the list of classes, or correct the mask",
        )
    return runs.spread(labels_R)


def _look_up_colors(colors_N3: NDArray[np.uint8], labels: Mapping[Color, int]) -> NDArray[np.int16]:
    """Label ids, -1 where a colour has none.

    A table over the levels that occur in each channel of the known colours, and one more for any other: a few thousand
    entries, where one over all colours would have 16 million.
    """
    known_N3 = np.array(list(labels), dtype=np.uint8)
    table_size, places_N = 1, np.zeros(len(colors_N3), dtype=np.int32)
    known_places_N = np.zeros(len(known_N3), dtype=np.int32)
    for channel in range(3):
        levels = np.unique(known_N3[:, channel])
        rank = np.full(256, len(levels), dtype=np.int32)
        rank[levels] = np.arange(len(levels))
        rank *= table_size
        places_N += rank[colors_N3[:, channel]]
        known_places_N += rank[known_N3[:, channel]]
        table_size *= len(levels) + 1
    table = np.full(table_size, -1, dtype=np.int16)
    table[known_places_N] = list(labels.values())
    return table[places_N]


def _color(levels: NDArray[np.uint8]) -> Color:
    return int(levels[0]), int(levels[1]), int(levels[2])


def _text(color: Color) -> str:
    return ",".join(str(level) for level in color)
