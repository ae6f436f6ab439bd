"""From confusion matrices to one score a class: numbers in, numbers out.

Old classes are compared on the pixels whose truth is an old class (`edge_ilseg.metrics.retention_confusion`), new ones
on all pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_ilseg.bundle import Manifest
from edge_ilseg.devices.bootstrap import Interval
from edge_ilseg.devices.verify_report import ClassScore
from edge_ilseg.metrics import class_iou, retention_confusion


def measured_iou(confusion: NDArray[np.int64], old_count: int) -> NDArray[np.float64]:
    """IoU of each class by the definition in `ClassScore`: float64, K, `nan` for a class that no pixel is truly of."""
    iou = class_iou(confusion)
    iou[:old_count] = class_iou(retention_confusion(confusion, old_count))[:old_count]
    iou[confusion.sum(axis=1) == 0] = np.nan
    return iou


def class_scores(
    manifest: Manifest,
    confusion: NDArray[np.int64],
    parent_confusion: NDArray[np.int64] | None,
    drops: Sequence[Interval] = (),
    images: Sequence[int] = (),
) -> tuple[ClassScore, ...]:
    """Score every class of a bundle, and its parent on the old ones.

    Args:
        manifest: the bundle's.
        confusion: int64, K x K, in the bundle's channels.
        parent_confusion: the same of the parent, in the bundle's channels too.
        drops: interval of the drop of each old class, or nothing.
        images: how many images show each old class, or nothing.
    """
    old_count = manifest.old_count
    iou = measured_iou(confusion, old_count)
    parent_iou = np.full_like(iou, np.nan)
    if parent_confusion is not None:
        parent_iou[:old_count] = measured_iou(parent_confusion, old_count)[:old_count]
    return tuple(
        ClassScore(
            name=entry.name,
            step=entry.step,
            is_old=channel < old_count,
            pixels=int(confusion[channel].sum()),
            iou=known(iou[channel]),
            parent_iou=known(parent_iou[channel]),
            drop_low_pct=known(drops[channel].low) if channel < len(drops) else None,
            drop_high_pct=known(drops[channel].high) if channel < len(drops) else None,
            images=images[channel] if channel < len(images) else None,
        )
        for channel, entry in enumerate(manifest.classes)
    )


def mean_iou(values: Sequence[float | None]) -> float | None:
    """The mean of those that are known."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def known(value: float) -> float | None:
    """None in place of nan."""
    return None if np.isnan(value) else float(value)
