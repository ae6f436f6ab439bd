"""Run a session over labelled images and count what it predicts.

1. Images are read, resized, run and counted one after another, each of it while the others go on
   (`edge_ilseg.devices.stream`). No pixel is kept; of each image, three numbers of four bytes an old class.
2. A bad image (missing, damaged, of another size than its mask) is named and left out; it never ends the run.
3. Labels are counted in the channels of one manifest. A model is compared with its parent by counting both in the
   channels of the child: the truth is then the same pixels for both, and the parent, which gives only the first
   channels, cannot be right where the truth is a new class (`edge_ilseg.metrics.retention_confusion` leaves them out).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edge_ilseg.bundle import Manifest
from edge_ilseg.devices.bootstrap import PairedCounts
from edge_ilseg.devices.runtime import Session
from edge_ilseg.devices.stream import stream
from edge_ilseg.errors import BundleError, DataError
from edge_ilseg.images import SAME_SIZE_HINT, resize_mask
from edge_ilseg.metrics import confusion_matrix, retention_confusion
from edge_ilseg.progress import ProgressCallback, no_progress
from edge_ilseg.scenario import evaluation_lookup

if TYPE_CHECKING:
    from edge_ilseg.data.dataset import Dataset


class OldCounts(NamedTuple):
    """Of each image, for each old class, over the pixels whose truth is an old class; uint32, N x K.

    An image of 2^32 pixels is more than Pillow opens.
    """

    true_NK: NDArray[np.uint32]
    hit_NK: NDArray[np.uint32]
    union_NK: NDArray[np.uint32]

    @classmethod
    def empty(cls, image_count: int, old_count: int) -> Self:
        """For so many images and old classes."""
        return cls(*(np.zeros((image_count, old_count), np.uint32) for _ in cls._fields))

    def put(self, place: int, confusion: NDArray[np.int64]) -> None:
        """Count the old classes in one image's confusion matrix, of which nothing is kept: it has more numbers."""
        old_count = self.true_NK.shape[1]
        kept = retention_confusion(confusion, old_count)
        true_K, hit_K = kept.sum(axis=1)[:old_count], np.diag(kept)[:old_count]
        self.true_NK[place], self.hit_NK[place] = true_K, hit_K
        self.union_NK[place] = true_K + kept.sum(axis=0)[:old_count] - hit_K

    def first(self, image_count: int) -> Self:
        """Those of the first images."""
        return type(self)(*(part[:image_count] for part in self))


class Evaluation(NamedTuple):
    """What was counted: confusion matrix (int64, K x K), bad images (id, reason), and of the good images, in order, the
    counts of the old classes and the latency of each in ms."""

    confusion: NDArray[np.int64]
    bad_images: tuple[tuple[str, str], ...]
    old_counts: OldCounts
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
    counts = OldCounts.empty(len(ids), manifest.old_count)
    total = np.zeros((class_count, class_count), dtype=np.int64)
    latencies_ms: list[float] = []
    bad_images: list[tuple[str, str]] = []
    for done, item in enumerate(stream(session, ids, lambda image_id: _read(dataset, image_id)), start=1):
        if item.error is not None:
            bad_images.append((item.image_id, item.error.one_line()))
        elif item.mask_HW is not None and item.extra is not None:
            check_channels(item.mask_HW, class_count)
            mask_HW = resize_mask(item.mask_HW, *item.extra.shape)
            confusion = confusion_matrix(item.extra, mask_HW, class_count, lookup)
            total += confusion
            counts.put(len(latencies_ms), confusion)
            latencies_ms.append(item.latency_ms)
        progress("scoring images", done / len(ids))
    return Evaluation(total, tuple(bad_images), counts.first(len(latencies_ms)), latencies_ms)


class ImagesOfOld(NamedTuple):
    """How many images show old classes."""

    of_any: int
    """Any of them; the background counts only where there is no other."""
    of_each: tuple[int, ...]


def images_of_old(found: OldCounts, manifest: Manifest) -> ImagesOfOld:
    """In how many of the images a pixel is truly of an old class."""
    names = manifest.class_names[: manifest.old_count]
    shown_NK = found.true_NK > 0
    objects = [channel for channel, name in enumerate(names) if name != manifest.background]
    of_any = shown_NK[:, objects or list(range(len(names)))].any(axis=1).sum()
    return ImagesOfOld(int(of_any), tuple(int(count) for count in shown_NK.sum(axis=0)))


def pair_counts(found: OldCounts, before: OldCounts) -> PairedCounts:
    """The counts of a bundle and its parent on the same images, in the same order.

    Raises:
        DataError: the true pixels are not the same: images or labels changed between the two runs.
    """
    if not np.array_equal(found.true_NK, before.true_NK):
        raise DataError("the images or masks changed while they were read", hint="run the same command again")
    return PairedCounts(*found, before.hit_NK, before.union_NK)


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


def _read(dataset: Dataset, image_id: str) -> tuple[Image.Image, NDArray[np.uint8]]:
    image, labels_HW = dataset.open_image(image_id), dataset.read_labels(image_id)
    if (image.height, image.width) != labels_HW.shape:
        raise DataError(
            "the mask has another size than the image",
            found=f"mask {labels_HW.shape[1]} x {labels_HW.shape[0]} px",
            expected=f"{image.width} x {image.height} px (width x height)",
            hint=SAME_SIZE_HINT,
        )
    return image, labels_HW
