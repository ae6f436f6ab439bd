"""Label ids from values and colours: a mask is looked up by its runs, and gets what a plain loop gives each pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_ilseg.data.masks import MaskCode, decode_labels
from edge_ilseg.errors import DataError
from edge_ilseg.images import Color, MaskFile

COLORS: dict[Color, int] = {(0, 0, 0): 255, (128, 0, 0): 0, (0, 128, 0): 1, (0, 0, 128): 2, (128, 128, 0): 3}
GREYS: dict[Color, int] = {(0, 0, 0): 0, (90, 90, 90): 1}
WHERE = Path("mask.png")
VALUES = {0: 0, 1: 1, 5: 2, 300: 3, 255: 255}


@st.composite
def pixels(draw: st.DrawFn, count: int) -> NDArray[np.intp]:
    """Numbers below `count`, H x W, in runs that do not end where rows do."""
    width = draw(st.integers(1, 9))
    runs = draw(st.lists(st.tuples(st.integers(0, count - 1), st.integers(1, 12)), min_size=1, max_size=12))
    flat = [number for number, length in runs for _ in range(length)]
    return np.array(flat + [flat[-1]] * (-len(flat) % width)).reshape(-1, width)


def one_by_one(values: NDArray[np.int32] | NDArray[np.uint8], labels: dict[object, int]) -> list[list[int]]:
    """The oracle."""
    keys = [[tuple(pixel) if isinstance(pixel, list) else pixel for pixel in row] for row in values.tolist()]
    return [[labels[key] for key in row] for row in keys]


@given(pixels(len(COLORS)))
@settings(max_examples=150, deadline=None)
def test_colors_get_the_labels_that_a_plain_loop_gives(numbers_HW: NDArray[np.intp]) -> None:
    values = np.array(list(COLORS), np.uint8)[numbers_HW]
    for stored in (values, np.concatenate([values, values], axis=2)[:, :, :3]):  # as of an RGBA file: not contiguous
        found_HW = decode_labels(MaskFile(stored, None), MaskCode({}, COLORS), WHERE)
        assert found_HW.tolist() == one_by_one(values, COLORS)  # type: ignore[arg-type]
        assert (found_HW.dtype, found_HW.flags.writeable) == (np.uint8, True)


@given(pixels(len(VALUES)))
@settings(max_examples=150, deadline=None)
def test_values_get_the_labels_that_a_plain_loop_gives(numbers_HW: NDArray[np.intp]) -> None:
    values = np.array(list(VALUES), np.int32)[numbers_HW]
    found_HW = decode_labels(MaskFile(values, None), MaskCode(VALUES, {}), WHERE)
    assert found_HW.tolist() == one_by_one(values, VALUES)  # type: ignore[arg-type]


@given(pixels(len(COLORS)))
@settings(max_examples=50, deadline=None)
def test_a_palette_gets_the_labels_of_its_colors(numbers_HW: NDArray[np.intp]) -> None:
    palette = np.array([*COLORS, (7, 7, 7)], np.uint8)  # the last is in no mask
    mask = MaskFile(numbers_HW.astype(np.int32), palette)
    found_HW = decode_labels(mask, MaskCode(VALUES, COLORS), WHERE)
    assert found_HW.tolist() == one_by_one(palette[numbers_HW], COLORS)  # type: ignore[arg-type]


@pytest.mark.parametrize(("levels", "expected"), [((0, 5, 1), [0, 2, 1]), ((0, 90, 90), [0, 1, 1])])
def test_equal_channels_are_indices_unless_all_are_declared_colors(levels: list[int], expected: list[int]) -> None:
    values = np.repeat(np.array(levels, np.uint8), 3).reshape(1, 3, 3)
    found_HW = decode_labels(MaskFile(values, None), MaskCode(VALUES, GREYS), WHERE)
    assert found_HW.tolist() == [expected]


@pytest.mark.parametrize("row", range(3))
@pytest.mark.parametrize("column", range(4))
def test_the_first_pixel_without_a_class_is_named(row: int, column: int) -> None:
    place = f"row {row}, column {column} "
    values = np.zeros((3, 4), np.int32)
    values[2, 3] = values[row, column] = 7
    with pytest.raises(DataError, match=f"value 7 at {place}"):
        decode_labels(MaskFile(values, None), MaskCode(VALUES, {}), WHERE)
    colors = np.zeros((3, 4, 3), np.uint8)
    colors[2, 3] = colors[row, column] = (0, 128, 9)
    with pytest.raises(DataError, match=f"colour 0,128,9 at {place}"):
        decode_labels(MaskFile(colors, None), MaskCode({}, COLORS), WHERE)
    with pytest.raises(DataError, match=f"colour 0,128,9 at {place}"):
        decode_labels(MaskFile(colors, None), MaskCode(VALUES, {}), WHERE)
