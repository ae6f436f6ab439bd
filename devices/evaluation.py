"""Run a session over labelled images and count what it predicts.

1. One image at a time: read, resize, run, bring the mask to the label's size, count. No pixel is kept.
2. A bad image (missing, damaged, of another size than its mask) is named and left out; it never ends the run.
3. Labels are counted in the channels of one manifest. A model is compared with its parent by counting both in the
   channels of the child: the truth is then the same pixels for both, and the parent, which gives only the first
   channels, cannot be right where the truth is a new class (`edge_ilseg.metrics.retention_confusion` leaves them out).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_ilseg.bundle import Manifest
from edge_ilseg.data.dataset import Dataset
from edge_ilseg.devices.runtime import Session
from edge_ilseg.errors import BundleError, DataError
from edge_ilseg.images import resize_image, resize_mask
from edge_ilseg.metrics import confusion_matrix
from edge_ilseg.progress import ProgressCallback, no_progress
from edge_ilseg.scenario import evaluation_lookup


class Evaluation(NamedTuple):
    """What was counted: confusion matrix (int64, K x K), bad images (id, reason), one latency per good image in ms."""

    confusion: NDArray[np.int64]
    bad_images: tuple[tuple[str, str], ...]
    latencies_ms: list[float]


def evaluate_session(
    session: Session,
    dataset: Dataset,
    ids: Sequence[str],
    manifest: Manifest,
    progress: ProgressCallback = no_progress,
) -> Evaluation:
    """Count the confusion of a model over the images `ids` of a data set.

    Args:
        session: the model; images are resized to its input size by the resizer that the manifest names.
        dataset: where images and labels come from.
        ids: which images.
        manifest: whose classes the labels are counted in (rule 3). A class of the data set that it does not know
            counts as background, or as void where there is no background.
        progress: told the share of the images that is done.

    Raises:
        BundleError: the model gives a channel that the manifest does not have, or the runtime cannot run it.
        ClassNameError: the data set's classes cannot be counted in the manifest's.
    """
    class_count = len(manifest.classes)
    lookup = evaluation_lookup(dataset.info.classes, dataset.info.background, manifest.class_names)
    confusion = np.zeros((class_count, class_count), dtype=np.int64)
    bad_images: list[tuple[str, str]] = []
    latencies_ms: list[float] = []
    for done, image_id in enumerate(ids, start=1):
        try:
            image_HWC, labels_HW = _read(dataset, image_id)
        except DataError as error:
            bad_images.append((image_id, error.one_line()))
        else:
            input_HWC = resize_image(image_HWC, session.input_height_px, session.input_width_px)
            start_ns = time.perf_counter_ns()
            mask_HW = session.mask(input_HWC)
            latencies_ms.append((time.perf_counter_ns() - start_ns) / 1e6)
            check_channels(mask_HW, class_count)
            confusion += confusion_matrix(lookup[labels_HW], resize_mask(mask_HW, *labels_HW.shape), class_count)
        progress("scoring images", done / len(ids))
    return Evaluation(confusion, tuple(bad_images), latencies_ms)


def check_channels(mask_HW: NDArray[np.uint8], class_count: int) -> None:
    """Raise `BundleError` when a predicted mask holds a channel that the manifest does not have."""
    highest = int(mask_HW.max(initial=0))
    if highest >= class_count:
        raise BundleError(
            "the model gives a channel that the manifest does not have",
            found=f"channel {highest}",
            expected=f"0 to {class_count - 1}: {class_count} classes",
            hint="export the bundle again",
        )


def _read(dataset: Dataset, image_id: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    image_HWC, labels_HW = dataset.read_image(image_id), dataset.read_labels(image_id)
    if image_HWC.shape[:2] != labels_HW.shape:
        raise DataError(
            "the mask has another size than the image",
            found=f"mask {labels_HW.shape[1]} x {labels_HW.shape[0]} px",
            expected=f"{image_HWC.shape[1]} x {image_HWC.shape[0]} px (width x height)",
        )
    return image_HWC, labels_HW
