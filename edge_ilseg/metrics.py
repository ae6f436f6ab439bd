"""Segmentation metrics: count first (one confusion matrix, void left out), score later.

`confusion[i, j]` is the number of pixels of true channel i that were predicted as channel j (int64, K x K).
A class without a pixel in truth and prediction has no IoU: it is `nan` here, `null` in JSON, and out of every mean.
Conventions, named with every table: mIoU "with background" averages over all classes, "without" leaves the background
class out; mPA is the overall pixel accuracy and mCA the mean class accuracy, in the words of Michieli & Zanuttigh.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

VOID = 255
LEAST_RUN_PX = 8
"""Pixels in a run on average from which counting by runs is faster."""


def confusion_matrix(
    labels_HW: NDArray[np.uint8],
    predicted_HW: NDArray[np.uint8],
    class_count: int,
    lookup: NDArray[np.uint8] | None = None,
) -> NDArray[np.int64]:
    """Count (true, predicted) pairs over the pixels that are not void.

    Args:
        labels_HW: true channels, uint8, any shape; `VOID` (255) is left out.
        predicted_HW: predicted channels, uint8, the same shape.
        class_count: K; every label that is not void and every prediction is below it.
        lookup: uint8 [256], where the labels are no channels yet: the channel, or `VOID`, that each counts as. The same
            as `lookup[labels_HW]` in the place of the labels, without looking at each pixel once more; a prediction
            counts as one where the label itself is not void.

    Returns:
        int64, K x K.

    Raises:
        ValueError: the shapes differ, a value is not below `class_count`, or `class_count` is above 255.
    """
    if not 0 < class_count <= VOID:
        raise ValueError(f"{class_count} classes: channels are uint8 and {VOID} is void")
    if labels_HW.shape != predicted_HW.shape:
        raise ValueError(f"labels {labels_HW.shape} and prediction {predicted_HW.shape} differ in shape")
    if predicted_HW.max(initial=0) >= class_count and (predicted_HW[labels_HW != VOID] >= class_count).any():
        raise ValueError(f"predicted channel {predicted_HW[labels_HW != VOID].max()} with {class_count} classes")
    places = labels_HW.astype(np.uint16)  # 255 * 255 + 255 is below 2 ** 16
    places *= class_count
    places += predicted_HW
    counts = _count(places.ravel(), VOID * class_count)[: VOID * class_count].reshape(VOID, class_count)
    if lookup is not None:
        counts = _fold(counts, lookup)
    if counts[class_count:].any():
        raise ValueError(f"true channel {np.flatnonzero(counts.any(axis=1))[-1]} with {class_count} classes")
    return counts[:class_count]


def _count(places_N: NDArray[np.uint16], least: int) -> NDArray[np.int64]:
    """As `np.bincount` to `least` places or more: by runs of equal neighbours where they are long, as in masks."""
    ends_R = np.flatnonzero(places_N[1:] != places_N[:-1])
    if LEAST_RUN_PX * len(ends_R) >= places_N.size:
        return np.bincount(places_N, minlength=least)
    ends_R = np.append(ends_R, places_N.size - 1)
    lengths_R = np.diff(ends_R, prepend=-1)
    counts = np.bincount(places_N[ends_R], weights=lengths_R, minlength=least)  # float64 is exact below 2 ** 53
    return counts.astype(np.int64)


def _fold(counts: NDArray[np.int64], lookup: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Rows of labels, added up in the rows of the channels that the labels count as."""
    folded = np.zeros_like(counts)
    for label in np.flatnonzero(counts.any(axis=1)):
        if lookup[label] != VOID:
            folded[lookup[label]] += counts[label]
    return folded


def class_iou(confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    """Intersection over union of each class, float64 in 0..1, `nan` for a class without a pixel."""
    hit = np.diag(confusion).astype(np.float64)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - hit
    iou = np.full_like(hit, np.nan)
    np.divide(hit, union, out=iou, where=union > 0)
    return iou


def class_accuracy(confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    """Share of each class's true pixels that were found, float64 in 0..1, `nan` for a class without a true pixel."""
    hit = np.diag(confusion).astype(np.float64)
    true = confusion.sum(axis=1).astype(np.float64)
    accuracy = np.full_like(hit, np.nan)
    np.divide(hit, true, out=accuracy, where=true > 0)
    return accuracy


def retention_confusion(confusion: NDArray[np.int64], old_count: int) -> NDArray[np.int64]:
    """The confusion matrix over the pixels whose truth is an old class: rows of the new classes are emptied.

    On this matrix a model and its parent, which cannot know the new classes, are compared on the same pixels: an old
    pixel that turned into a new class is a miss, and a new object that is not found yet is not counted as forgetting.
    """
    kept = confusion.copy()
    kept[old_count:, :] = 0
    return kept


def _mean(values: NDArray[np.float64]) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else None


def _harmonic_mean(a: float | None, b: float | None) -> float | None:
    """0 where one of the two is 0: a model that has lost all old classes has no balance, but it has a score."""
    if a is None or b is None:
        return None
    return 2 * a * b / (a + b) if a and b else 0.0


class Metrics(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Scores of one model on one set of images. Shares in 0..1; `None` where no pixel defines the score."""

    images: int
    pixels: int
    iou: dict[str, float | None]
    miou_old: float | None
    miou_new: float | None
    miou_all: float | None
    miou_old_without_background: float | None
    miou_all_without_background: float | None
    mpa: float | None
    mca: float | None
    hiou: float | None


def score(
    confusion: NDArray[np.int64],
    classes: Sequence[str],
    *,
    old_count: int,
    background: str | None,
    images: int,
) -> Metrics:
    """Score a confusion matrix.

    Args:
        confusion: int64, K x K, rows are the truth.
        classes: K class names in channel order.
        old_count: the first `old_count` channels are the old classes, the others the new ones; 0 at step 0, where
            every class counts as new in `miou_new` and there is no `miou_old`.
        background: name of the background class, or None where the data set has none.
        images: how many images were counted.

    Raises:
        ValueError: the matrix is not K x K for the K classes.
    """
    if confusion.shape != (len(classes), len(classes)):
        raise ValueError(f"confusion {confusion.shape} for {len(classes)} classes")
    iou = class_iou(confusion)
    foreground = np.array([name != background for name in classes])
    is_old = np.arange(len(classes)) < old_count
    old, new = _mean(iou[is_old]), _mean(iou[~is_old])
    total = int(confusion.sum())
    return Metrics(
        images=images,
        pixels=total,
        iou={name: None if np.isnan(value) else float(value) for name, value in zip(classes, iou, strict=True)},
        miou_old=old,
        miou_new=new,
        miou_all=_mean(iou),
        miou_old_without_background=_mean(iou[is_old & foreground]),
        miou_all_without_background=_mean(iou[foreground]),
        mpa=float(np.trace(confusion) / total) if total else None,
        mca=_mean(class_accuracy(confusion)),
        hiou=_harmonic_mean(old, new),
    )
