"""MSRC-v2 in its official layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_ilseg.data.msrc import COLORS, Msrc
from edge_ilseg.data.step_view import count_pixels, presence
from edge_ilseg.errors import ClassNameError, DataError

CLASSES = (
    "building", "grass", "tree", "cow", "sheep", "sky", "aeroplane", "water", "face", "car", "bicycle", "flower",
    "sign", "bird", "book", "chair", "road", "cat", "dog", "body", "boat",
)  # fmt: skip
IMAGES_PER_CLASS = {
    "building": 150, "grass": 242, "tree": 144, "cow": 45, "sheep": 35, "sky": 160, "aeroplane": 30, "water": 79,
    "face": 60, "car": 46, "bicycle": 32, "flower": 35, "sign": 34, "bird": 38, "book": 35, "chair": 32, "road": 161,
    "cat": 24, "dog": 30, "body": 67, "boat": 33, "horse": 3, "mountain": 26,
}  # fmt: skip


def make_msrc(root: Path, suffix: str = ".jpg", mask_suffix: str = ".png") -> Path:
    (root / "Images").mkdir()
    (root / "GroundTruth").mkdir()
    mask_HWC = np.array([[COLORS["grass"], COLORS["horse"], (0, 0, 0), COLORS["boat"]]], dtype=np.uint8)
    Image.new("RGB", (4, 1)).save(root / "Images" / f"1_1_s{suffix}")
    Image.fromarray(mask_HWC).save(root / "GroundTruth" / f"1_1_s_GT{mask_suffix}")
    (root / "train.txt").write_text(f"1_1_s{suffix}\n")
    return root


@pytest.mark.parametrize(("suffix", "mask_suffix"), [(".jpg", ".png"), (".bmp", ".bmp")])
def test_colors_become_label_ids_and_horse_becomes_void(tmp_path: Path, suffix: str, mask_suffix: str) -> None:
    dataset = Msrc(make_msrc(tmp_path, suffix, mask_suffix))
    assert dataset.ids("train") == ("1_1_s",)
    assert dataset.read_labels("1_1_s").tolist() == [[1, 255, 255, 20]]
    assert dataset.read_image("1_1_s").shape == (1, 4, 3)
    np.testing.assert_array_equal(np.asarray(dataset.open_image("1_1_s")), dataset.read_image("1_1_s"))


def test_there_are_21_classes_and_no_background(tmp_path: Path) -> None:
    info = Msrc(make_msrc(tmp_path)).info
    assert info.classes == CLASSES
    assert info.background is None
    assert info.splits == ("train",)
    assert info.colors[20] == (192, 64, 0)


def test_horse_and_mountain_can_be_kept_as_classes(tmp_path: Path) -> None:
    dataset = Msrc(make_msrc(tmp_path), void_classes=())
    assert dataset.info.classes == tuple(COLORS)
    assert dataset.read_labels("1_1_s").tolist() == [[1, 4, 255, 22]]


def test_a_misspelt_void_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ClassNameError, match="did you mean 'horse'"):
        Msrc(make_msrc(tmp_path), void_classes=("horses",))


def test_an_unknown_color_names_file_color_and_pixel(tmp_path: Path) -> None:
    make_msrc(tmp_path)
    mask_HWC = np.zeros((1, 4, 3), dtype=np.uint8)
    mask_HWC[0, 2] = (1, 128, 0)
    Image.fromarray(mask_HWC).save(tmp_path / "GroundTruth" / "1_1_s_GT.png")
    with pytest.raises(DataError, match=r"(?s)1_1_s_GT\.png.*colour 1,128,0 at row 0, column 2"):
        Msrc(tmp_path).read_labels("1_1_s")


def test_a_mask_of_one_channel_is_refused(tmp_path: Path) -> None:
    make_msrc(tmp_path)
    Image.new("L", (4, 1)).save(tmp_path / "GroundTruth" / "1_1_s_GT.png")
    with pytest.raises(DataError, match="holds indices, but this data set's masks hold colours"):
        Msrc(tmp_path).read_labels("1_1_s")


def test_missing_files_and_lists_are_refused_by_name(tmp_path: Path) -> None:
    dataset = Msrc(make_msrc(tmp_path))
    with pytest.raises(DataError, match=r"(?s)missing.*GroundTruth/9_9_s_GT\.png"):
        dataset.read_labels("9_9_s")
    with pytest.raises(DataError, match=r"(?s)missing.*Images/9_9_s\.jpg"):
        dataset.read_image("9_9_s")
    with pytest.raises(DataError, match="unknown split 'test'"):
        dataset.ids("test")
    with pytest.raises(DataError, match=r"(?s)no MSRC-v2.*Images and GroundTruth"):
        Msrc(tmp_path / "Images")


@pytest.mark.msrc
def test_the_real_split_and_the_images_of_each_class_are_the_known_ones(msrc_root: Path) -> None:
    dataset = Msrc(msrc_root, void_classes=())
    assert [len(dataset.ids(split)) for split in ("train", "val", "test")] == [276, 59, 256]
    ids = dataset.ids("train+val+test")
    assert len(ids) == 591
    shown = presence(dataset.info, ids, count_pixels(dataset, ids)).values()
    assert {name: sum(name in names for names in shown) for name in COLORS} == IMAGES_PER_CLASS


@pytest.mark.msrc
def test_a_real_photograph_and_its_labels_have_one_size(msrc_root: Path) -> None:
    dataset = Msrc(msrc_root)
    for image_id in dataset.ids("val")[:3]:
        assert dataset.read_image(image_id).shape[:2] == dataset.read_labels(image_id).shape
