"""PASCAL VOC 2012 in the layout of the VOCdevkit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_ilseg.data.voc import CLASSES, Voc
from edge_ilseg.errors import DataError
from edge_ilseg.images import default_colors, write_mask_png

OFFICIAL_HW = np.array([[0, 15, 20], [255, 0, 0]], dtype=np.uint8)
AUGMENTED_HW = np.array([[15, 15, 20], [20, 0, 0]], dtype=np.uint8)


def make_voc(root: Path, *, augmented: bool) -> Path:
    """VOC2012 with three images: `1` official train, `2` only in train_aug, `3` val."""
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    for image_id in "123":
        Image.new("RGB", (3, 2)).save(root / "JPEGImages" / f"{image_id}.jpg")
    for image_id in "13":
        write_mask_png(root / "SegmentationClass" / f"{image_id}.png", OFFICIAL_HW, default_colors(21))
    lists = {"train": "1\n", "val": "3\n", "trainval": "1\n3\n"}
    if augmented:
        (root / "SegmentationClassAug").mkdir()
        for image_id in "12":
            Image.fromarray(AUGMENTED_HW).save(root / "SegmentationClassAug" / f"{image_id}.png")
        lists["train_aug"] = (
            "/JPEGImages/1.jpg /SegmentationClassAug/1.png\n/JPEGImages/2.jpg /SegmentationClassAug/2.png\n"
        )
    for name, text in lists.items():
        (root / "ImageSets" / "Segmentation" / f"{name}.txt").write_text(text)
    return root


@pytest.mark.parametrize("place", [".", "VOC2012", "VOCdevkit/VOC2012"])
def test_the_root_may_be_the_folder_itself_or_one_around_it(tmp_path: Path, place: str) -> None:
    make_voc(tmp_path / place, augmented=False)
    assert Voc(tmp_path).ids("train+val") == ("1", "3")


def test_a_folder_without_voc_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)no VOC 2012 here.*JPEGImages"):
        Voc(tmp_path)


def test_there_are_21_classes_with_background_at_0(tmp_path: Path) -> None:
    info = Voc(make_voc(tmp_path, augmented=False)).info
    assert info.classes == CLASSES
    assert len(CLASSES) == 21
    assert (CLASSES[0], CLASSES[15], CLASSES[20]) == ("background", "person", "tvmonitor")
    assert info.background == "background"
    assert info.aliases["tv"] == "tvmonitor"
    assert set(info.aliases.values()) <= set(CLASSES)


def test_a_palette_mask_holds_label_ids_and_void(tmp_path: Path) -> None:
    dataset = Voc(make_voc(tmp_path, augmented=False))
    np.testing.assert_array_equal(dataset.read_labels("1"), OFFICIAL_HW)
    assert dataset.read_image("1").shape == (2, 3, 3)
    np.testing.assert_array_equal(np.asarray(dataset.open_image("1")), dataset.read_image("1"))


def test_train_means_the_augmented_list_and_masks_where_both_are_there(tmp_path: Path) -> None:
    dataset = Voc(make_voc(tmp_path, augmented=True))
    assert dataset.ids("train") == ("1", "2")
    np.testing.assert_array_equal(dataset.read_labels("1"), AUGMENTED_HW)


def test_a_mask_that_the_augmented_folder_lacks_is_the_official_one(tmp_path: Path) -> None:
    np.testing.assert_array_equal(Voc(make_voc(tmp_path, augmented=True)).read_labels("3"), OFFICIAL_HW)


def test_the_augmented_masks_can_be_left_aside(tmp_path: Path) -> None:
    dataset = Voc(make_voc(tmp_path, augmented=True), augmented=False)
    assert dataset.ids("train") == ("1",)
    np.testing.assert_array_equal(dataset.read_labels("1"), OFFICIAL_HW)


def test_an_augmented_list_without_its_masks_is_not_used(tmp_path: Path) -> None:
    make_voc(tmp_path, augmented=False)
    (tmp_path / "ImageSets" / "Segmentation" / "trainaug.txt").write_text("1\n2\n")
    assert Voc(tmp_path).ids("train") == ("1",)


def test_a_value_that_is_no_voc_class_is_refused(tmp_path: Path) -> None:
    make_voc(tmp_path, augmented=False)
    Image.fromarray(np.full((2, 3), 21, dtype=np.uint8)).save(tmp_path / "SegmentationClass" / "1.png")
    with pytest.raises(DataError, match=r"(?s)SegmentationClass/1\.png.*value 21 at row 0, column 0"):
        Voc(tmp_path).read_labels("1")


def test_a_missing_mask_and_an_unknown_split_are_refused_by_name(tmp_path: Path) -> None:
    dataset = Voc(make_voc(tmp_path, augmented=False))
    with pytest.raises(DataError, match=r"(?s)mask of an image is missing.*SegmentationClass/2\.png"):
        dataset.read_labels("2")
    with pytest.raises(DataError, match="did you mean 'val'"):
        dataset.ids("vall")
