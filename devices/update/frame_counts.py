"""Counts of one content in one application: masks in, a heartbeat out. No file, no clock of its own.

1. Counts go on from an earlier process's heartbeat of the same content; of another content they begin at zero.
2. Masks of up to 128 Ki pixels are counted whole, of larger ones every n-th row; whether a mask is of one class whole
   is always looked at in every pixel.
3. Latencies are those of the last 512 frames of this process.
4. No count passes what a heartbeat can hold: one that is full stays where it is.
"""

from __future__ import annotations

from collections import deque
from datetime import datetime

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_ilseg.devices.update.heartbeat import (
    HEARTBEAT_FORMAT,
    HEARTBEAT_VERSION,
    ClassPixels,
    Heartbeat,
    percentile,
    short_error,
)
from edge_ilseg.errors import BundleError

LATENCIES = 512
COUNTED_PIXELS = 128 << 10
FULL = 2**53
LONGEST_LATENCY_MS = 1e9


class Origin(msgspec.Struct, frozen=True):
    """Which model the counts are of, and where."""

    content_id: str
    bundle_id: str
    class_names: tuple[str, ...]
    background: str | None
    pid: int
    started: datetime


class FrameCounts:
    """Counts that grow."""

    def __init__(self, origin: Origin, earlier: Heartbeat | None) -> None:
        """`earlier` is what the file says now (rule 1)."""
        self._origin = origin
        goes_on = earlier is not None and _is_same(earlier, origin)
        self._earlier = earlier if goes_on else None
        pixels = [item.pixels for item in self._earlier.classes] if self._earlier else [0] * len(origin.class_names)
        self._pixels_K = np.array(pixels, dtype=np.int64)
        self._first_frame = self._earlier.first_frame if self._earlier else None
        self._last_frame = self._earlier.last_frame if self._earlier else None
        self._last_failure = self._earlier.last_failure if self._earlier else None
        self._frames = self._failures = self._constant = 0
        self._first_s = self._last_s = 0.0
        self._latencies_ms: deque[float] = deque(maxlen=LATENCIES)
        self.has_news = True
        """Something was counted since the heartbeat was written; the caller says when it is."""

    @property
    def failures(self) -> int:
        """That this process has seen."""
        return self._failures

    def add_mask(self, mask_HW: NDArray[np.uint8], latency_ms: float, *, awake_s: float, now: datetime) -> None:
        """Count a mask (rules 2 and 3).

        Raises:
            BundleError: it holds a channel that the bundle does not have, and is not counted.
            ValueError: it is no mask.
        """
        counts_K = self._count(mask_HW)
        is_constant = bool(np.count_nonzero(counts_K) == 1 and (mask_HW == mask_HW.flat[0]).all())
        self._pixels_K = np.minimum(self._pixels_K + counts_K, FULL)
        self._constant += is_constant
        if not self._frames:
            self._first_s = awake_s
        self._frames += 1
        self._last_s = max(awake_s, self._first_s)
        self._first_frame = self._first_frame or now
        self._last_frame = now
        self.has_news = True
        if latency_ms >= 0:  # not a number is not counted
            self._latencies_ms.append(min(float(latency_ms), LONGEST_LATENCY_MS))

    def add_failure(self, error: BaseException | str) -> None:
        """Count a failure."""
        self._failures += 1
        self.has_news = True
        self._last_failure = short_error(error)

    def heartbeat(self, now: datetime) -> Heartbeat:
        """All that was counted so far."""
        origin, before = self._origin, self._earlier
        latencies_ms = list(self._latencies_ms)
        return Heartbeat(
            format=HEARTBEAT_FORMAT,
            format_version=HEARTBEAT_VERSION,
            content_id=origin.content_id,
            bundle_id=origin.bundle_id,
            pid=origin.pid,
            processes=min(1 + (before.processes if before else 0), 2**31),
            started=origin.started,
            updated=now,
            first_frame=self._first_frame,
            last_frame=self._last_frame,
            watched_s=min(self._last_s - self._first_s + (before.watched_s if before else 0.0), 1e10),
            frames=min(self._frames + (before.frames if before else 0), FULL),
            failures=min(self._failures + (before.failures if before else 0), FULL),
            last_failure=self._last_failure,
            constant_masks=min(self._constant + (before.constant_masks if before else 0), FULL),
            latency_frames=len(latencies_ms),
            latency_p50_ms=percentile(latencies_ms, 50) if latencies_ms else None,
            latency_p95_ms=percentile(latencies_ms, 95) if latencies_ms else None,
            latency_max_ms=max(latencies_ms, default=None),
            background=origin.background,
            classes=tuple(
                ClassPixels(name, int(pixels)) for name, pixels in zip(origin.class_names, self._pixels_K, strict=True)
            ),
        )

    def _count(self, mask_HW: NDArray[np.uint8]) -> NDArray[np.int64]:
        if mask_HW.ndim != 2 or not mask_HW.size or mask_HW.dtype.kind not in "ui":
            raise ValueError(f"a mask of integers, height x width, is expected, not {mask_HW.dtype} {mask_HW.shape}")
        count = len(self._origin.class_names)
        highest, lowest = int(mask_HW.max()), int(mask_HW.min())
        if highest >= count or lowest < 0:
            raise BundleError(
                "the model gives a channel that the bundle does not have",
                found=f"channel {highest if highest >= count else lowest}",
                expected=f"0 to {count - 1}",
                hint="publish a bundle that was exported again",
            )
        counted_HW = mask_HW[:: max(1, -(-mask_HW.size // COUNTED_PIXELS))]
        return np.bincount(counted_HW.ravel().astype(np.intp), minlength=count).astype(np.int64)


def _is_same(earlier: Heartbeat, origin: Origin) -> bool:
    names = tuple(item.name for item in earlier.classes)
    return (earlier.content_id, names, earlier.background) == (
        origin.content_id,
        origin.class_names,
        origin.background,
    )
