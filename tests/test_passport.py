"""Passports: levels that contain the truth and hardly more, and channels that fell silent, against plain loops."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_ilseg.calibration.passport import (
    ALIVE_SHARE,
    LEVELS,
    SILENT_SHARE,
    Extremes,
    read_levels,
    silent_channels,
    write_levels,
)

values = st.floats(-1e6, 1e6, width=32)
pairs = st.lists(st.tuples(values, values).map(sorted), min_size=1, max_size=12)


def extremes_of(channels: list[list[float]]) -> Extremes:
    low_C, high_C = np.array(channels, dtype=np.float32).T
    return Extremes(low_C, high_C)


@given(pairs, st.floats(0, 1e3, width=32), st.floats(0, 1e3, width=32))
@example([[-127.0, 0.0], [-1e-30, 128.0]], 0.0, 0.0)
@settings(max_examples=300, deadline=None)
def test_levels_contain_what_was_written_and_exceed_it_by_at_most_one_level(
    channels: list[list[float]], below: float, above: float
) -> None:
    extremes = extremes_of(channels)
    lowest = float(np.float32(extremes.lowest - below))
    highest = float(np.float32(extremes.highest + above))
    data = write_levels(extremes, lowest, highest)
    assert len(data) == 2 * len(channels)
    found = read_levels(data, lowest, highest)
    level = (Fraction(highest) - Fraction(lowest)) / LEVELS
    rounding = Fraction(float(np.spacing(np.float32(max(abs(lowest), abs(highest))))))
    for channel, (low, high) in enumerate(zip(*extremes, strict=True)):
        assert 0 <= Fraction(float(low)) - Fraction(float(found.lowest_C[channel])) <= level + rounding
        assert 0 <= Fraction(float(found.highest_C[channel])) - Fraction(float(high)) <= level + rounding


def test_levels_by_hand() -> None:
    extremes = extremes_of([[-1.0, 254.0], [0.0, 0.0], [9.6, 10.4], [10.0, 20.5]])
    data = write_levels(extremes, -1.0, 254.0)
    assert list(data) == [0, 1, 10, 11, 255, 1, 12, 22]
    found = read_levels(data, -1.0, 254.0)
    assert found.lowest_C.tolist() == [-1.0, 0.0, 9.0, 10.0]
    assert found.highest_C.tolist() == [254.0, 0.0, 11.0, 21.0]
    assert found.lowest_C.dtype == found.highest_C.dtype == np.float32


def test_what_lies_beyond_the_range_is_read_back_as_its_end() -> None:
    extremes = extremes_of([[-3.0, 7.0], [2.0, 300.0], [-9.0, -8.0]])
    found = read_levels(write_levels(extremes, 0.0, 255.0), 0.0, 255.0)
    assert found.lowest_C.tolist() == [0.0, 2.0, 0.0]
    assert found.highest_C.tolist() == [7.0, 255.0, 0.0]


@pytest.mark.parametrize("value", [0.0, -2.5, 6.0])
def test_a_tensor_of_one_value_is_read_back_exactly(value: float) -> None:
    extremes = extremes_of([[value, value]] * 3)
    data = write_levels(extremes, value, value)
    assert data == bytes(6)
    found = read_levels(data, value, value)
    assert found.lowest_C.tolist() == found.highest_C.tolist() == [value] * 3


@pytest.mark.parametrize("data", [b"", b"\x00", b"\x00\x01\x02"])
def test_what_is_not_two_levels_a_channel_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=f"{len(data)} levels"):
        read_levels(data, 0.0, 1.0)


@given(pairs)
@example([[-1.0, 0.0], [0.0, 0.0]])
@settings(max_examples=200, deadline=None)
def test_written_again_in_the_same_range_nothing_moves(channels: list[list[float]]) -> None:
    extremes = extremes_of([*channels, [0.0, 0.0]])
    lowest, highest = extremes.lowest, extremes.highest
    first = found = read_levels(write_levels(extremes, lowest, highest), lowest, highest)
    for _ in range(10):
        found = read_levels(write_levels(found, lowest, highest), lowest, highest)
    np.testing.assert_array_equal(found, first)


@given(st.lists(st.tuples(values, values, values, values), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_merged_extremes_are_the_envelope_of_each_channel(rows: list[tuple[float, float, float, float]]) -> None:
    one, two = extremes_of([sorted(row[:2]) for row in rows]), extremes_of([sorted(row[2:]) for row in rows])
    found = one.merge(two)
    assert found.lowest_C.tolist() == [min(row) for row in rows]
    assert found.highest_C.tolist() == [max(row) for row in rows]
    assert found.lowest == min(min(row) for row in rows)
    assert found.highest == max(max(row) for row in rows)


def loop_silent(before: list[list[float]], now: list[list[float]]) -> tuple[int, ...]:
    whole = max(high for _, high in before) - min(low for low, _ in before)
    found = []
    for channel, ((low, high), (low_now, high_now)) in enumerate(zip(before, now, strict=True)):
        was_alive = high > low and high - low >= ALIVE_SHARE * whole
        if was_alive and high_now - low_now < SILENT_SHARE * (high - low):
            found.append(channel)
    return tuple(found)


levels = st.tuples(st.integers(0, 255), st.integers(0, 255)).map(lambda pair: [float(item) for item in sorted(pair)])


@given(st.lists(st.tuples(levels, levels), min_size=1, max_size=12), st.sampled_from([1.0, 0.04, 0.0]))
@settings(max_examples=300, deadline=None)
def test_silent_channels_are_those_of_a_plain_loop(rows: list[tuple[list[float], list[float]]], share: float) -> None:
    before = [row[0] for row in rows]
    now = [[item * share for item in row[1]] for row in rows]
    now = [[float(np.float32(item)) for item in pair] for pair in now]
    assert silent_channels(extremes_of(before), extremes_of(now)) == loop_silent(before, now)


def test_silent_channels_by_hand() -> None:
    """Of a range of 400: alive from 8 on, silent below a twentieth of what the channel covered before."""
    before = extremes_of([[-200.0, 200.0], [0.0, 100.0], [0.0, 100.0], [0.0, 7.9], [0.0, 8.0], [5.0, 5.0]])
    now = extremes_of([[-200.0, 200.0], [50.0, 54.9], [50.0, 55.0], [0.0, 0.0], [3.0, 3.0], [5.0, 5.0]])
    assert silent_channels(before, now) == (1, 4)
    assert silent_channels(before, before) == ()


def test_nothing_was_alive_in_a_tensor_of_one_value() -> None:
    still = extremes_of([[1.5, 1.5]] * 2)
    assert silent_channels(still, still) == ()
