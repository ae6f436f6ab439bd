"""What one step sees of a data set."""

from __future__ import annotations

import hashlib
import pickle

import numpy as np
import pytest

from edge_ilseg.data.dataset import DatasetInfo
from edge_ilseg.data.shapes import Shapes
from edge_ilseg.data.step_view import StepView, channel_pixels, class_pixels, count_pixels, image_set_sha256, presence
from edge_ilseg.errors import DataError
from edge_ilseg.scenario import label_lookup

SHAPES = Shapes(train=12, val=2, test=0, height_px=40, width_px=56)


class UnevenShapes(Shapes):
    """Labels that are a row short."""

    def read_labels(self, image_id: str) -> np.ndarray:
        return super().read_labels(image_id)[:-1]


def lookup_of(old: tuple[str, ...], new: tuple[str, ...]) -> np.ndarray:
    return label_lookup("disjoint", SHAPES.info.classes, "background", old=old, new=new)


def test_a_view_reads_the_image_and_its_channels() -> None:
    view = StepView(SHAPES, SHAPES.ids("train"), lookup_of(("background", "disk"), ("star", "ring")))
    assert len(view) == 12
    star, disk = SHAPES.info.classes.index("star"), SHAPES.info.classes.index("disk")
    seen = set()
    for image_id in view.image_ids:
        image_HWC, channels_HW = view.read(image_id)
        labels_HW = SHAPES.read_labels(image_id)
        np.testing.assert_array_equal(image_HWC, SHAPES.read_image(image_id))
        assert channels_HW.dtype == np.uint8
        assert (channels_HW[labels_HW == star] == 2).all()
        assert (channels_HW[labels_HW == disk] == 0).all()
        seen |= set(np.unique(channels_HW).tolist())
    assert seen == {0, 2, 3}


def test_a_view_refuses_an_image_of_another_step() -> None:
    view = StepView(SHAPES, SHAPES.ids("train")[:3], lookup_of((), ("background", "disk")))
    with pytest.raises(KeyError, match="train-00003"):
        view.read("train-00003")


def test_a_view_cannot_be_changed_but_can_be_sent_to_a_worker() -> None:
    view = StepView(SHAPES, SHAPES.ids("train"), lookup_of((), ("background", "disk")))
    with pytest.raises(AttributeError):
        view.image_ids = ()  # type: ignore[misc]
    copy = pickle.loads(pickle.dumps(view))  # noqa: S301 - what a worker process does
    np.testing.assert_array_equal(copy.read("train-00001")[1], view.read("train-00001")[1])


def test_labels_of_another_size_than_the_image_are_refused() -> None:
    view = StepView(UnevenShapes(height_px=40, width_px=56), ("train-00000",), lookup_of((), ("background",)))
    with pytest.raises(DataError, match=r"(?s)'train-00000'.*39 x 56.*40 x 56"):
        view.read("train-00000")


def test_pixels_are_counted_for_each_image_and_class_and_progress_is_told() -> None:
    told: list[tuple[str, float]] = []
    ids = SHAPES.ids("train")
    pixels_NK = count_pixels(SHAPES, ids, lambda text, share: told.append((text, share)))
    assert (pixels_NK.shape, pixels_NK.dtype) == ((12, 9), np.int64)
    for row, image_id in zip(pixels_NK, ids, strict=True):
        labels_HW = SHAPES.read_labels(image_id)
        assert row.tolist() == [int((labels_HW == label).sum()) for label in range(9)]
    assert told == [("counting labels", done / 12) for done in range(1, 13)]


def test_presence_leaves_the_background_out_and_pixels_are_summed_by_name() -> None:
    info = DatasetInfo(
        kind="x", classes=("cat", "background", "dog"), background="background", colors=(), aliases={}, splits=()
    )
    pixels_NK = np.array([[1, 5, 0], [0, 5, 0], [2, 0, 9]], dtype=np.int64)
    assert presence(info, ("a", "b", "c"), pixels_NK) == {
        "a": frozenset({"cat"}),
        "b": frozenset(),
        "c": frozenset({"cat", "dog"}),
    }
    assert class_pixels(info, pixels_NK) == {"cat": 3, "background": 10, "dog": 9}


def test_the_hash_of_a_set_of_images_is_the_documented_one() -> None:
    lines = "".join(
        f"{image_id} 40x56 {hashlib.sha256(SHAPES.read_image(image_id).tobytes()).hexdigest()}\n"
        for image_id in ("train-00001", "train-00002")
    )
    assert image_set_sha256(("train-00002", "train-00001"), SHAPES) == hashlib.sha256(lines.encode()).hexdigest()


def test_the_hash_of_a_set_of_images_changes_with_ids_and_pixels() -> None:
    ids = SHAPES.ids("val")
    reference = image_set_sha256(ids, SHAPES)
    assert image_set_sha256(ids[:1], SHAPES) != reference
    assert image_set_sha256(ids, Shapes(seed=1, height_px=40, width_px=56)) != reference


def test_pixels_of_a_channel_are_those_of_its_label_ids_in_the_chosen_images() -> None:
    pixels_NK = np.array([[5, 2, 0], [1, 0, 4]])
    lookup = np.full(256, 255, dtype=np.uint8)
    lookup[:3] = (1, 0, 1)
    assert channel_pixels(pixels_NK, lookup, 3) == (2, 10, 0)
    lookup[0] = 255
    assert channel_pixels(pixels_NK, lookup, 2) == (2, 4)
