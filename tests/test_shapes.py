"""The generated data set."""

from __future__ import annotations

import hashlib
import time

import numpy as np
import pytest

from edge_ilseg.data.shapes import CLASSES, KINDS, Shapes
from edge_ilseg.data.step_view import count_pixels, presence
from edge_ilseg.errors import ConfigError, DataError

GOLDEN_SHA256 = "70648129506e3a7c8536affd3b60b2e108343d3b87150e575cf09175ba2a90cb"
SCENE_LIMIT_MS = 3.0


def test_a_scene_depends_on_seed_id_and_size_alone() -> None:
    first, second = Shapes(train=50), Shapes(train=7, val=3)
    np.testing.assert_array_equal(first.read_image("train-00003"), second.read_image("train-00003"))
    np.testing.assert_array_equal(first.read_labels("train-00003"), second.read_labels("train-00003"))
    assert (first.read_image("train-00003") != Shapes(seed=1).read_image("train-00003")).any()
    assert (first.read_image("train-00003") != first.read_image("val-00003")).any()


def test_the_pixels_are_the_same_on_every_machine() -> None:
    dataset, digest = Shapes(), hashlib.sha256()
    for image_id in ("train-00000", "train-00001", "val-00007", "test-00199"):
        digest.update(dataset.read_image(image_id).tobytes() + dataset.read_labels(image_id).tobytes())
    assert digest.hexdigest() == GOLDEN_SHA256


def test_an_image_has_the_size_asked_for_and_labels_of_the_classes() -> None:
    dataset = Shapes(height_px=48, width_px=64)
    image_HWC, labels_HW = dataset.read_image("test-00000"), dataset.read_labels("test-00000")
    np.testing.assert_array_equal(np.asarray(dataset.open_image("test-00000")), image_HWC)
    assert (image_HWC.shape, image_HWC.dtype) == ((48, 64, 3), np.uint8)
    assert (labels_HW.shape, labels_HW.dtype) == ((48, 64), np.uint8)
    assert labels_HW.max() < len(dataset.info.classes)


def test_there_are_eight_kinds_of_object_and_a_background() -> None:
    info = Shapes().info
    assert info.classes == CLASSES == ("background", *KINDS)
    assert len(KINDS) >= 8
    assert info.background == "background"


def test_an_image_usually_shows_one_to_three_kinds_and_every_kind_is_frequent() -> None:
    dataset = Shapes()
    ids = dataset.ids("train")
    shown = presence(dataset.info, ids, count_pixels(dataset, ids))
    kinds = np.array([len(names) for names in shown.values()])
    assert kinds.min() >= 1
    assert ((kinds >= 1) & (kinds <= 3)).mean() > 0.98
    assert 0.3 < (kinds == 1).mean() < 0.7
    for name in KINDS:
        assert sum(name in names for names in shown.values()) > 0.12 * len(ids)


def test_objects_occlude_each_other() -> None:
    """Somewhere a later object covers part of an earlier one: the earlier has fewer pixels than when drawn alone."""
    dataset = Shapes()
    covered = 0
    for image_id in dataset.ids("train")[:40]:
        _, objects = dataset._scene(image_id)
        drawn = sum(_area(dataset, item) for item in objects)
        covered += drawn > np.count_nonzero(dataset.read_labels(image_id))
    assert covered > 5


def _area(dataset: Shapes, item: object) -> int:
    _, u, v = dataset._local(item)  # type: ignore[arg-type]
    return int(KINDS[CLASSES[item.label]].covers(u, v).sum())  # type: ignore[attr-defined]


def test_objects_stand_out_from_what_is_behind_them() -> None:
    """The labels fit the picture: across an outline the picture changes more than elsewhere."""
    dataset, across, elsewhere = Shapes(), [], []
    for image_id in dataset.ids("train")[:30]:
        image_HWC, labels_HW = dataset.read_image(image_id).astype(float), dataset.read_labels(image_id)
        jump = abs(np.diff(image_HWC, axis=1)).sum(axis=2)
        outline = np.diff(labels_HW.astype(int), axis=1) != 0
        across.append(jump[outline].mean())
        elsewhere.append(jump[~outline].mean())
    assert np.mean(across) > 2 * np.mean(elsewhere)


def test_colour_alone_does_not_tell_the_kinds_apart() -> None:
    """Mean colours of two kinds overlap: the nearest usual colour is often another kind's."""
    dataset, right = Shapes(), []
    usual = np.array([kind.color for kind in KINDS.values()], dtype=float)
    for image_id in dataset.ids("train")[:200]:
        image_HWC, labels_HW = dataset.read_image(image_id), dataset.read_labels(image_id)
        for label in np.unique(labels_HW[labels_HW > 0]):
            mean = image_HWC[labels_HW == label].mean(axis=0)
            right.append(abs(usual - mean).sum(axis=1).argmin() + 1 == label)
    assert 0.4 < np.mean(right) < 0.9


def test_a_scene_is_drawn_in_less_than_3_ms() -> None:
    dataset, times_ms = Shapes(), []
    for image_id in dataset.ids("train")[:30]:
        start = time.process_time()
        dataset.read_image(image_id)
        times_ms.append(1000 * (time.process_time() - start))
    assert np.median(times_ms) < SCENE_LIMIT_MS


@pytest.mark.parametrize("image_id", ["train", "train-3", "training-00003", "train-0000x", "../00003", ""])
def test_an_id_that_is_none_of_its_own_is_refused(image_id: str) -> None:
    with pytest.raises(DataError, match="no such generated image"):
        Shapes().read_image(image_id)


def test_splits_have_the_sizes_asked_for_and_an_empty_one_is_refused() -> None:
    dataset = Shapes(train=5, val=2, test=0)
    assert dataset.ids("train+val") == (*(f"train-{k:05d}" for k in range(5)), "val-00000", "val-00001")
    assert dataset.info.splits == ("train", "val")
    with pytest.raises(DataError, match="the split 'test' is empty"):
        dataset.ids("test")
    with pytest.raises(DataError, match="did you mean 'train'"):
        dataset.ids("trainn")


@pytest.mark.parametrize("option", ["train", "height_px", "width_px"])
def test_an_option_out_of_range_is_refused(option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option!r} is out of range"):
        Shapes(**{option: -1})
