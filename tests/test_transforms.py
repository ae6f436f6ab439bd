"""Joint augmentation of image and labels."""

from __future__ import annotations

import time

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_ilseg.data.transforms import Augmentation, augment, check_augmentation
from edge_ilseg.errors import ConfigError
from edge_ilseg.images import resize_image, resize_mask

FILL = (1, 200, 3)
NONE = Augmentation(scale_min=1.0, scale_max=1.0, flip=False)
Pair = tuple[NDArray[np.uint8], NDArray[np.uint8]]


def edge_pair(height: int = 213, width: int = 320) -> Pair:
    """Black and white with a slanted edge; the label is 1 where it is white."""
    y, x = np.mgrid[:height, :width]
    labels_HW = (x + 0.4 * y > 0.6 * width).astype(np.uint8)
    return np.repeat((labels_HW * 255)[:, :, None], 3, axis=2), labels_HW


def augmented(pair: Pair, augmentation: Augmentation, seed: int, size: tuple[int, int] = (112, 160)) -> Pair:
    return augment(*pair, augmentation, *size, FILL, np.random.default_rng(seed))


def test_at_scale_1_an_image_is_what_the_device_will_see() -> None:
    image_HWC, labels_HW = edge_pair()
    got_image_HWC, got_labels_HW = augmented((image_HWC, labels_HW), NONE, 0)
    np.testing.assert_array_equal(got_image_HWC, resize_image(image_HWC, 112, 160))
    np.testing.assert_array_equal(got_labels_HW, resize_mask(labels_HW, 112, 160))


@pytest.mark.parametrize("seed", range(20))
def test_an_edge_in_the_image_and_in_the_labels_stays_one_edge(seed: int) -> None:
    image_HWC, labels_HW = augmented(edge_pair(), Augmentation(0.4, 2.0), seed)
    inside = labels_HW != 255
    white = image_HWC[:, :, 0] > 127
    wrong = inside & (white != (labels_HW == 1))
    # A shift by one pixel would be wrong in every row that the edge crosses: 45 rows at scale 0.4, 112 from 1 on.
    assert wrong.sum() <= 16


@pytest.mark.parametrize("shape", [(213, 320), (64, 48), (112, 160), (37, 501)])
def test_the_edge_is_not_shifted_on_average(shape: tuple[int, int]) -> None:
    image_HWC, labels_HW = augmented(edge_pair(*shape), NONE, 0)
    white = image_HWC[:, :, 0].astype(float) / 255
    assert abs(white.mean() - (labels_HW == 1).mean()) * 160 < 0.35  # columns


def test_shrinking_pads_with_the_fill_colour_and_void_together() -> None:
    image_HWC, labels_HW = np.full((50, 60, 3), 77, dtype=np.uint8), np.zeros((50, 60), dtype=np.uint8)
    offsets = set()
    for seed in range(8):
        out_HWC, out_HW = augmented((image_HWC, labels_HW), Augmentation(0.5, 0.5), seed, (40, 80))
        outside = out_HW == 255
        assert (~outside).sum() == 20 * 40
        assert (out_HWC[outside] == FILL).all()
        assert (out_HWC[~outside] == 77).all()
        offsets.add((int((~outside).any(axis=1).argmax()), int((~outside).any(axis=0).argmax())))
    assert len(offsets) > 4


def test_enlarging_crops_at_random_places_and_leaves_no_void() -> None:
    y, x = np.mgrid[:40, :80]
    labels_HW = (y // 4 * 20 + x // 4).astype(np.uint8)
    corners = set()
    for seed in range(10):
        image_HWC, out_HW = augmented((np.zeros((40, 80, 3), np.uint8), labels_HW), Augmentation(2, 2), seed, (40, 80))
        assert not (out_HW == 255).any()
        assert not image_HWC.any()
        corners.add(int(out_HW[0, 0]))
    assert len(corners) > 4


def test_every_offset_can_be_drawn() -> None:
    labels_HW = np.arange(8, dtype=np.uint8)[None].repeat(2, axis=0)
    image_HWC = np.zeros((2, 8, 3), dtype=np.uint8)
    first = set()
    for seed in range(60):
        _, out_HW = augmented((image_HWC, labels_HW), Augmentation(2.0, 2.0, flip=False), seed, (2, 4))
        first.add(int(out_HW[0, 0]))
    assert first == {0, 1, 2, 3, 4}


def test_a_flip_mirrors_image_and_labels_in_half_of_the_draws() -> None:
    pair = edge_pair()
    plain_HWC, plain_HW = augmented(pair, NONE, 0)
    flips = 0
    for seed in range(40):
        image_HWC, labels_HW = augmented(pair, Augmentation(1.0, 1.0), seed)
        flipped = (image_HWC == plain_HWC[:, ::-1]).all()
        assert flipped or (image_HWC == plain_HWC).all()
        np.testing.assert_array_equal(labels_HW, plain_HW[:, ::-1] if flipped else plain_HW)
        assert image_HWC.flags.c_contiguous
        assert labels_HW.flags.c_contiguous
        flips += bool(flipped)
    assert 10 <= flips <= 30


def test_the_same_generator_state_gives_the_same_result_and_the_input_stays() -> None:
    pair = edge_pair()
    before = pair[0].copy(), pair[1].copy()
    first, second = augmented(pair, Augmentation(), 5), augmented(pair, Augmentation(), 5)
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])
    np.testing.assert_array_equal(pair[0], before[0])
    np.testing.assert_array_equal(pair[1], before[1])
    assert (augmented(pair, Augmentation(), 6)[0] != first[0]).any()


def test_scales_lie_between_the_limits() -> None:
    shares = []
    for seed in range(60):
        _, labels_HW = augmented(edge_pair(), Augmentation(0.5, 0.9), seed, (100, 100))
        shares.append(np.sqrt((labels_HW != 255).mean()))
    assert 0.49 <= min(shares) < 0.55
    assert 0.85 < max(shares) <= 0.91


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (1.5, 0.5), (0.5, 50.0), (float("nan"), 1.0)])
def test_a_range_of_scales_that_cannot_be_used_is_refused(low: float, high: float) -> None:
    with pytest.raises(ConfigError, match="range of scales"):
        check_augmentation(Augmentation(low, high))
    check_augmentation(Augmentation())


def test_labels_of_another_size_than_the_image_are_a_defect_of_the_caller() -> None:
    with pytest.raises(ValueError, match="differ in size"):
        augmented((np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5), np.uint8)), NONE, 0)


def test_an_augmentation_takes_about_a_millisecond() -> None:
    pair, times_ms = edge_pair(), []
    for seed in range(30):
        start = time.process_time()
        augmented(pair, Augmentation(), seed)
        times_ms.append(1000 * (time.process_time() - start))
    assert np.median(times_ms) < 4.0


def test_native_scales_are_of_the_images_own_size() -> None:
    """A 20 x 30 image at scale 1 in a 16 x 24 crop: the pixels are the image's own, none is resized."""
    image_HWC = np.arange(20 * 30 * 3, dtype=np.uint16).reshape(20, 30, 3).astype(np.uint8)
    labels_HW = (np.arange(20 * 30) % 7).reshape(20, 30).astype(np.uint8)
    own = Augmentation(1.0, 1.0, flip=False, native=True)
    crop_HWC, crop_HW = augment(image_HWC, labels_HW, own, 16, 24, FILL, np.random.default_rng(4))
    places = [(y, x) for y in range(5) for x in range(7) if (image_HWC[y : y + 16, x : x + 24] == crop_HWC).all()]
    assert len(places) == 1
    y, x = places[0]
    assert (labels_HW[y : y + 16, x : x + 24] == crop_HW).all()
    padded_HWC, padded_HW = augment(image_HWC, labels_HW, own, 40, 40, FILL, np.random.default_rng(4))
    assert (padded_HW != 255).sum() == 20 * 30
    assert (padded_HWC[padded_HW == 255] == FILL).all()
