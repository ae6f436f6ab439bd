"""The passport of a tensor: the extremes of each of its channels, in 256 levels of the tensor's own range.

1. Levels are rounded outwards: what is read back contains what was written, and exceeds it by at most one level. A
   value beyond the tensor's range (`mean-minmax` leaves some there) is read back as the range's end. Read and written
   again within the same range, levels do not move.
2. Ranges for int8 are per tensor; this only shows which channels the images at hand do not excite. A channel that was
   alive on the parent's images and is silent on these would get a tiny range, if ranges were per channel.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LEVELS = 255
SILENT_SHARE = 0.05
"""A channel is silent when it covers less than this share of what it covered on the parent's images."""
ALIVE_SHARE = 0.02
"""A channel counts as alive on the parent's images when it covered at least this share of its tensor's range."""


class Extremes(NamedTuple):
    """Lowest and highest value of each channel, float32 [C]; one channel where a tensor has no channel axis."""

    lowest_C: NDArray[np.float32]
    highest_C: NDArray[np.float32]

    @property
    def lowest(self) -> float:
        """Of the whole tensor."""
        return float(self.lowest_C.min())

    @property
    def highest(self) -> float:
        """Of the whole tensor."""
        return float(self.highest_C.max())

    def merge(self, other: Extremes) -> Extremes:
        """The envelope, channel by channel."""
        return Extremes(np.minimum(self.lowest_C, other.lowest_C), np.maximum(self.highest_C, other.highest_C))


def write_levels(extremes: Extremes, lowest: float, highest: float) -> bytes:
    """Channel extremes as levels of the range `lowest` to `highest` (rule 1)."""
    unit = (highest - lowest) / LEVELS or 1.0
    # The nearest level inside first, then one outwards where that is needed: what was read back is written the same.
    low_C = np.ceil((extremes.lowest_C.astype(np.float64) - lowest) / unit).clip(0, LEVELS)
    high_C = np.floor((extremes.highest_C.astype(np.float64) - lowest) / unit).clip(0, LEVELS)
    low_C -= _values(low_C, lowest, highest) > extremes.lowest_C
    high_C += _values(high_C, lowest, highest) < extremes.highest_C
    return bytes(np.concatenate([low_C, high_C]).clip(0, LEVELS).astype(np.uint8))


def read_levels(levels: bytes, lowest: float, highest: float) -> Extremes:
    """Channel extremes from levels of the range `lowest` to `highest`.

    Raises:
        ValueError: not two levels a channel.
    """
    if not levels or len(levels) % 2:
        raise ValueError(f"{len(levels)} levels, expected two for each channel")
    low_C, high_C = np.frombuffer(levels, dtype=np.uint8).reshape(2, -1).astype(np.float64)
    return Extremes(_values(low_C, lowest, highest), _values(high_C, lowest, highest))


def _values(levels_C: NDArray[np.float64], lowest: float, highest: float) -> NDArray[np.float32]:
    """What the levels stand for; the last one is the range's end exactly, whatever the sum rounds to."""
    values_C = levels_C * ((highest - lowest) / LEVELS) + lowest
    return np.where(levels_C == LEVELS, highest, values_C).astype(np.float32)


def silent_channels(before: Extremes, now: Extremes) -> tuple[int, ...]:
    """Channels that were alive before and are silent now (rule 2).

    Args:
        before: on the parent's images.
        now: on the images at hand, the same number of channels.
    """
    span_C = before.highest_C.astype(np.float64) - before.lowest_C
    now_C = now.highest_C.astype(np.float64) - now.lowest_C
    is_silent_C = (span_C >= ALIVE_SHARE * (before.highest - before.lowest)) & (now_C < SILENT_SHARE * span_C)
    return tuple(int(channel) for channel in np.flatnonzero(is_silent_C))
