"""What one step sees of a data set: its images, and labels in its own channels. Also what is counted to decide that."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_ilseg.data.dataset import Dataset, DatasetInfo
from edge_ilseg.errors import DataError
from edge_ilseg.images import SAME_SIZE_HINT
from edge_ilseg.progress import ProgressCallback, no_progress


class StepView(msgspec.Struct, frozen=True, eq=False):
    """The images of one step, with channels for labels."""

    dataset: Dataset
    image_ids: tuple[str, ...]
    lookup: NDArray[np.uint8]
    """uint8 [256], label id -> channel; from `scenario.label_lookup` or `scenario.evaluation_lookup`."""
    channel_pixels: tuple[int, ...] = ()
    """Labelled pixels of each channel in these images, where they were counted."""

    def __len__(self) -> int:
        return len(self.image_ids)

    def read(self, image_id: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """One image and its channels: uint8 H x W x 3 RGB, and uint8 H x W with 255 for void.

        Raises:
            KeyError: the image is not of this step (a step never reads an image that it may not see).
            DataError: a file is missing or damaged, or the two differ in size.
        """
        if image_id not in self.image_ids:
            raise KeyError(image_id)
        image_HWC = self.dataset.read_image(image_id)
        labels_HW = self.dataset.read_labels(image_id)
        if image_HWC.shape[:2] != labels_HW.shape:
            raise DataError(
                f"the image {image_id!r} and its labels differ in size",
                found=f"labels {labels_HW.shape[0]} x {labels_HW.shape[1]} (height x width)",
                expected=f"{image_HWC.shape[0]} x {image_HWC.shape[1]}",
                hint=SAME_SIZE_HINT,
            )
        return image_HWC, self.lookup[labels_HW]


def count_pixels(
    dataset: Dataset, image_ids: Sequence[str], progress: ProgressCallback = no_progress
) -> NDArray[np.int64]:
    """Labelled pixels of each class in each image; void is not counted.

    Returns:
        int64, N x K, rows as `image_ids`, columns as `dataset.info.classes`.

    Raises:
        DataError: a mask cannot be used; the error names it.
    """
    class_count = len(dataset.info.classes)
    pixels_NK = np.zeros((len(image_ids), class_count), dtype=np.int64)
    for row, image_id in enumerate(image_ids):
        counts = np.bincount(dataset.read_labels(image_id).ravel(), minlength=256)
        pixels_NK[row] = counts[:class_count]
        progress("counting labels", (row + 1) / len(image_ids))
    return pixels_NK


def presence(info: DatasetInfo, image_ids: Sequence[str], pixels_NK: NDArray[np.int64]) -> dict[str, frozenset[str]]:
    """Image id -> names of the classes with a pixel in it, background left out; from `count_pixels`."""
    return {
        image_id: frozenset(
            name for name, count in zip(info.classes, row, strict=True) if count and name != info.background
        )
        for image_id, row in zip(image_ids, pixels_NK, strict=True)
    }


def channel_pixels(pixels_NK: NDArray[np.int64], lookup: NDArray[np.uint8], channel_count: int) -> tuple[int, ...]:
    """Pixels of each channel, from the pixels of each label id in some images and the step's `lookup`."""
    counts = np.zeros(256, dtype=np.int64)
    np.add.at(counts, lookup[: pixels_NK.shape[1]], pixels_NK.sum(axis=0))
    return tuple(int(count) for count in counts[:channel_count])


def class_pixels(info: DatasetInfo, pixels_NK: NDArray[np.int64]) -> dict[str, int]:
    """Class name -> labelled pixels in all images; what `scenario.order_classes` takes."""
    return {name: int(count) for name, count in zip(info.classes, pixels_NK.sum(axis=0), strict=True)}


def image_set_sha256(image_ids: Iterable[str], dataset: Dataset) -> str:
    """Hash of a set of images: which they are and what they show. The order of the ids does not count.

    SHA-256 over one line for each image, sorted by id: `<id> <height>x<width> <sha256 of the decoded RGB bytes>` and a
    line feed. Decoded pixels are hashed, not files, so generated images have a hash too and a renamed or re-packed file
    keeps its own; another JPEG decoder may give another hash for the same file.
    """
    digest = hashlib.sha256()
    for image_id in sorted(image_ids):
        image_HWC = np.ascontiguousarray(dataset.read_image(image_id))
        height, width, _ = image_HWC.shape
        digest.update(f"{image_id} {height}x{width} {hashlib.sha256(image_HWC.data).hexdigest()}\n".encode())
    return digest.hexdigest()
