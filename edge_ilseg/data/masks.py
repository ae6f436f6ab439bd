"""From what a mask file holds to label ids.

1. A *label id* is an index into the data set's classes; 255 is void. Nothing else leaves this module.
2. A value or a colour that has no class is an error that names the file, the value and the first pixel.
3. A palette mask is read by its colours where every colour in use is a class's declared colour, else by its indices.
4. A colour image whose channels are all equal is a mask of indices where its greys are not declared colours.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_ilseg.errors import DataError
from edge_ilseg.images import Color, MaskFile, image_size, read_mask
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
            hint="export the mask again at the size of the image",
        )
    return decode_labels(mask, code, mask_path)


def decode_labels(mask: MaskFile, code: MaskCode, where: Path) -> NDArray[np.uint8]:
    """Turn the values or colours of a mask into label ids (rules 2 to 4).

    Raises:
        DataError: a value or a colour has no class.
    """
    if mask.values.ndim == 2:
        if mask.palette is not None and code.colors:
            used = np.unique(mask.values)
            if used[-1] < len(mask.palette) and all(_color(mask.palette[index]) in code.colors for index in used):
                return _by_color(mask.palette[mask.values], code, where)
        return _by_value(mask.values.astype(np.int32), code, where)
    colors_HWC = mask.values.astype(np.uint8)
    first_HW = colors_HWC[:, :, 0]
    if code.values and (colors_HWC == first_HW[:, :, None]).all():
        greys = np.unique(first_HW)
        if any((int(grey),) * 3 not in code.colors for grey in greys):
            return _by_value(first_HW.astype(np.int32), code, where)
    return _by_color(colors_HWC, code, where)


def _by_value(values_HW: NDArray[np.int32], code: MaskCode, where: Path) -> NDArray[np.uint8]:
    if not code.values:
        raise DataError(
            "a mask holds indices, but this data set's masks hold colours", where=where, expected="an RGB image"
        )
    lookup = np.full(65538, -1, dtype=np.int16)  # of value - 1: both ends catch what is out of range
    for value, label in code.values.items():
        lookup[value + 1] = label
    labels_HW = lookup.take(values_HW + 1, mode="clip")
    if labels_HW.min() < 0:
        row, column = _first(labels_HW < 0)
        known = sorted(value for value in code.values if value != VOID)
        raise DataError(
            "a mask holds a value outside the list of classes",
            where=where,
            found=f"value {values_HW[row, column]} at row {row}, column {column} (counted from 0)",
            expected=f"{known[0]} to {known[-1]}, or {VOID} for void",
            hint="add the class to the list of classes, or correct the mask",
        )
    return labels_HW.astype(np.uint8)


def _by_color(colors_HWC: NDArray[np.uint8], code: MaskCode, where: Path) -> NDArray[np.uint8]:
    if not code.colors:
        row, column = _first((colors_HWC != colors_HWC[:, :, :1]).any(axis=2))
        raise DataError(
            "a mask holds colours, but the list of classes names none",
            where=where,
            found=f"colour {_text(_color(colors_HWC[row, column]))} at row {row}, column {column} (counted from 0)",
            hint="write the colours into classes.txt, one `name: r,g,b` a line, or save the masks as indices",
        )
    labels_HW = _look_up_colors(colors_HWC, code.colors)
    unknown_HW = labels_HW < 0
    if unknown_HW.any():
        row, column = _first(unknown_HW)
        raise DataError(
            "a mask holds a colour that no class has",
            where=where,
            found=f"colour {_text(_color(colors_HWC[row, column]))} at row {row}, column {column} (counted from 0)",
            expected=f"one of the {len(code.colors)} declared colours",
            hint="add the line `background: 0,0,0` to the list of classes, if black is the background"
            if not colors_HWC[row, column].any()
            else "give the colour to a class in the list of classes, or correct the mask",
        )
    return labels_HW.astype(np.uint8)


def _look_up_colors(colors_HWC: NDArray[np.uint8], labels: Mapping[Color, int]) -> NDArray[np.int16]:
    """Label ids, -1 where a colour has none.

    A table over the levels that occur in each channel of the known colours, and one more for any other: a few thousand
    entries, where one over all colours would have 16 million.
    """
    known_N3 = np.array(list(labels), dtype=np.uint8)
    table_size, places_HW = 1, np.zeros(colors_HWC.shape[:2], dtype=np.int32)
    known_places_N = np.zeros(len(known_N3), dtype=np.int32)
    for channel in range(3):
        levels = np.unique(known_N3[:, channel])
        rank = np.full(256, len(levels), dtype=np.int32)
        rank[levels] = np.arange(len(levels))
        rank *= table_size
        places_HW += rank[colors_HWC[:, :, channel]]
        known_places_N += rank[known_N3[:, channel]]
        table_size *= len(levels) + 1
    table = np.full(table_size, -1, dtype=np.int16)
    table[known_places_N] = list(labels.values())
    return table[places_HW]


def _first(wrong_HW: NDArray[np.bool_]) -> tuple[int, int]:
    row, column = np.unravel_index(int(wrong_HW.argmax()), wrong_HW.shape)
    return int(row), int(column)


def _color(levels: NDArray[np.uint8]) -> Color:
    return int(levels[0]), int(levels[1]), int(levels[2])


def _text(color: Color) -> str:
    return ",".join(str(level) for level in color)
