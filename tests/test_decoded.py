"""A data set that keeps what it has decoded: the same pixels, each read once, up to a limit, and nobody's to change."""

from __future__ import annotations

import numpy as np
import pytest

from edge_ilseg.data.decoded import DecodedDataset
from edge_ilseg.data.shapes import Shapes


class Counting(Shapes):
    """Shapes that count how often each is drawn."""

    reads = 0

    def read_image(self, image_id: str) -> np.ndarray:
        self.reads += 1
        return super().read_image(image_id)


def make(**options: int) -> tuple[Counting, DecodedDataset]:
    dataset = Counting(train=3, height_px=20, width_px=30)
    return dataset, DecodedDataset(dataset, **options)


def test_pixels_are_those_of_the_data_set_and_read_once() -> None:
    dataset, decoded = make()
    assert decoded.info == dataset.info
    assert decoded.ids("train") == dataset.ids("train")
    for _ in range(2):
        for image_id in decoded.ids("train"):
            assert np.array_equal(decoded.read_image(image_id), Shapes.read_image(dataset, image_id))
            assert np.array_equal(decoded.read_labels(image_id), dataset.read_labels(image_id))
            assert np.array_equal(decoded.open_image(image_id), Shapes.read_image(dataset, image_id))
    assert dataset.reads == 3
    assert decoded.kept_bytes == 3 * 20 * 30 * 4


def test_what_does_not_fit_is_read_each_time() -> None:
    dataset, decoded = make(limit_bytes=2 * 20 * 30 * 3)
    for _ in range(2):
        for image_id in decoded.ids("train"):
            decoded.read_image(image_id)
    assert dataset.reads == 2 + 2
    assert decoded.kept_bytes == 2 * 20 * 30 * 3


def test_nobody_can_change_what_is_kept() -> None:
    _, decoded = make()
    image_HWC = decoded.read_image(decoded.ids("train")[0])
    with pytest.raises(ValueError, match="read-only"):
        image_HWC[0, 0, 0] = 1
