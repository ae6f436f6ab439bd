"""A data set that keeps what it has decoded, for work that reads the same images again and again.

1. Pixels are kept up to a limit in bytes, first come first kept; what does not fit is decoded each time, as without.
2. What is handed out cannot be written to: a change would be everybody's.
3. It is asked for by name (`scenario run`); a data set as `open_data` gives it holds paths, never pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edge_ilseg.data.dataset import Dataset, DatasetInfo

DECODED_BYTES = 1 << 30
"""Decoded images and labels that are kept, in bytes."""


class DecodedDataset:
    """`dataset`, with its decoded images and labels kept in memory (rule 1)."""

    def __init__(self, dataset: Dataset, limit_bytes: int = DECODED_BYTES) -> None:
        self._dataset = dataset
        self._limit_bytes = limit_bytes
        self._kept: dict[tuple[str, str], NDArray[np.uint8]] = {}
        self.kept_bytes = 0

    @property
    def info(self) -> DatasetInfo:
        """As of the data set."""
        return self._dataset.info

    def ids(self, split: str) -> tuple[str, ...]:
        """As of the data set."""
        return self._dataset.ids(split)

    def read_image(self, image_id: str) -> NDArray[np.uint8]:
        """The image, uint8, H x W x 3, RGB, read-only.

        Raises:
            DataError: the file is missing or damaged.
        """
        return self._read("image", image_id, self._dataset.read_image)

    def open_image(self, image_id: str) -> Image.Image:
        """The same in Pillow's memory.

        Raises:
            DataError: the file is missing or damaged.
        """
        return Image.fromarray(self.read_image(image_id))

    def read_labels(self, image_id: str) -> NDArray[np.uint8]:
        """The label ids, uint8, H x W, read-only; 255 is void.

        Raises:
            DataError: the mask is missing, damaged, of another size than the image, or holds an unknown value.
        """
        return self._read("labels", image_id, self._dataset.read_labels)

    def _read(self, what: str, image_id: str, read: Callable[[str], NDArray[np.uint8]]) -> NDArray[np.uint8]:
        key = (what, image_id)
        if key in self._kept:
            return self._kept[key]
        pixels = read(image_id)
        pixels.setflags(write=False)
        if self.kept_bytes + pixels.nbytes <= self._limit_bytes:
            self._kept[key] = pixels
            self.kept_bytes += pixels.nbytes
        return pixels
