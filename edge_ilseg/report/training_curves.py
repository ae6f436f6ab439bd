"""What a step's training left in its folder (`edge_ilseg.training_log`), as curves.

Tolerant: a step without a log, or with one that cannot be read, has no curves, and the report says so in a sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from edge_ilseg.errors import EdgeIlsegError
from edge_ilseg.training_log import RATES, SCORES, LogRow, read_training_log

ITERATION, SPEED = "iteration", "images_per_s"
MOST_POINTS = 200


class Column(msgspec.Struct, frozen=True):
    """One quantity over the iterations; where it was not written, there is no point."""

    name: str
    iterations: tuple[float, ...]
    values: tuple[float, ...]


class TrainingCurves(msgspec.Struct, frozen=True):
    """Loss terms, learning rates and images a second, each over the iterations."""

    losses: tuple[Column, ...]
    rates: tuple[Column, ...]
    speed: tuple[Column, ...]
    rows: int

    @property
    def columns(self) -> tuple[Column, ...]:
        """All of them."""
        return self.losses + self.rates + self.speed


def read_curves(folder: Path) -> TrainingCurves | None:
    """The curves of a step; None where there are none."""
    try:
        rows = read_training_log(folder)
    except EdgeIlsegError:
        return None
    names = [name for name in (rows[0] if rows else {}) if name != ITERATION and name not in SCORES]
    columns = [column for name in names if (column := _column(name, rows)).values]
    if not columns:
        return None
    return TrainingCurves(
        losses=tuple(column for column in columns if column.name not in (*RATES, SPEED)),
        rates=tuple(column for column in columns if column.name in RATES),
        speed=tuple(column for column in columns if column.name == SPEED),
        rows=len(rows),
    )


def _column(name: str, rows: Sequence[LogRow]) -> Column:
    points = [
        (iteration, value)
        for row in rows
        if (iteration := row.get(ITERATION)) is not None and (value := row.get(name)) is not None
        if abs(value) < float("inf")
    ]
    thin = _thinned(points)
    return Column(name, tuple(point[0] for point in thin), tuple(point[1] for point in thin))


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MOST_POINTS` points: means of neighbours, so that a peak between two is not lost without a trace."""
    group = max(-(-len(points) // MOST_POINTS), 1)
    parts = [points[start : start + group] for start in range(0, len(points), group)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]
