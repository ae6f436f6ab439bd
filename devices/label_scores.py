"""What a verification counts on labelled images: the part `scores` of its report, the bundle beside its parent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge_ilseg.devices.bootstrap import Interval, bootstrap_intervals, old_drops
from edge_ilseg.devices.class_scores import class_scores, known, mean_iou
from edge_ilseg.devices.evaluation import Evaluation, evaluate_session, images_of_old, pair_counts
from edge_ilseg.devices.loaded_bundle import LoadedBundle
from edge_ilseg.devices.verify_report import BadImage, Confusion, Scores
from edge_ilseg.files import sha256_bytes
from edge_ilseg.metrics import score
from edge_ilseg.progress import ProgressCallback

if TYPE_CHECKING:
    from edge_ilseg.data.dataset import Dataset


def score_images(
    loaded: LoadedBundle,
    parent: LoadedBundle | None,
    dataset: Dataset,
    split: str,
    ids: Sequence[str],
    progress: ProgressCallback,
) -> Scores:
    """Count the bundle's and its parent's confusion on the same images, in the bundle's channels.

    Args:
        loaded: the bundle.
        parent: its parent; None: there is nothing to compare with.
        dataset: where images and labels come from.
        split: its name, for the report.
        ids: of the images.
        progress: told the share of the images that is done.

    Raises:
        BundleError: a model gives a channel without a class, or cannot be run.
        ClassNameError: the data set's classes cannot be counted in the bundle's.
        DataError: images or masks changed while they were read.
    """
    manifest = loaded.manifest
    found = evaluate_session(loaded.session, dataset, ids, manifest, progress)
    before = None
    if parent is not None:
        before = evaluate_session(parent.session, dataset, ids, manifest, progress)
    intervals = _drop_intervals(found, before)
    background = manifest.background
    shown = images_of_old(found.old_counts, manifest)
    classes = class_scores(
        manifest, found.confusion, before.confusion if before else None, intervals[1:], shown.of_each
    )
    return Scores(
        dataset=dataset.info.kind,
        split=split,
        images_asked=len(ids),
        images_counted=len(ids) - len(found.bad_images),
        images_of_old=shown.of_any,
        image_ids_sha256=sha256_bytes("\n".join(ids).encode()),
        bad_images=tuple(BadImage(image_id, reason) for image_id, reason in found.bad_images),
        classes=classes,
        metrics=score(
            found.confusion,
            manifest.class_names,
            old_count=manifest.old_count,
            background=background,
            images=len(ids) - len(found.bad_images),
        ),
        miou_old=mean_iou([item.iou for item in classes if item.is_old]),
        parent_miou_old=mean_iou([item.parent_iou for item in classes if item.is_old]),
        drop_low_pct=known(intervals[0].low) if intervals else None,
        drop_high_pct=known(intervals[0].high) if intervals else None,
        confusion=_rows(found.confusion),
        parent_confusion=_rows(before.confusion) if before else None,
        latency_median_ms=float(np.median(found.latencies_ms)) if found.latencies_ms else None,
    )


def _drop_intervals(found: Evaluation, before: Evaluation | None) -> tuple[Interval, ...]:
    """Of the drop of the old mIoU, and of each old class; empty where there is nothing to compare."""
    if before is None or not found.old_counts.true_NK.size:
        return ()
    counts = pair_counts(found.old_counts, before.old_counts)
    return bootstrap_intervals(old_drops(counts), len(counts.true_NK))


def _rows(confusion: NDArray[np.int64]) -> Confusion:
    return tuple(tuple(row) for row in confusion.tolist())
