"""What every data set offers, whatever its files look like."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_ilseg.metrics import VOID as VOID

if TYPE_CHECKING:
    from PIL import Image


class DatasetInfo(msgspec.Struct, frozen=True):
    """What a data set says of itself. A *label id* is an index into `classes`; 255 is void."""

    kind: str
    classes: tuple[str, ...]
    background: str | None
    colors: tuple[tuple[int, int, int], ...]
    aliases: dict[str, str]
    splits: tuple[str, ...]


class Dataset(Protocol):
    """Images with a label id for every pixel. Implementations hold paths, never pixels, and import no torch."""

    @property
    def info(self) -> DatasetInfo:
        """Classes, background, colours, aliases and splits."""

    def ids(self, split: str) -> tuple[str, ...]:
        """Image ids of `split` in a fixed order; `"train+val"` joins splits.

        Raises:
            DataError: the split is unknown or empty.
        """

    def read_image(self, image_id: str) -> NDArray[np.uint8]:
        """The image, uint8, H x W x 3, RGB.

        Raises:
            DataError: the file is missing or damaged.
        """

    def open_image(self, image_id: str) -> Image.Image:
        """The same image, decoded, in Pillow's memory: mode RGB (`edge_ilseg.images.open_image`).

        Raises:
            DataError: the file is missing or damaged.
        """

    def read_labels(self, image_id: str) -> NDArray[np.uint8]:
        """The label ids, uint8, H x W; 255 is void.

        Raises:
            DataError: the mask is missing, damaged, of another size than the image, or holds an unknown value.
        """
