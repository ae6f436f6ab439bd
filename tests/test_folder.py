"""A folder of images and masks, and what CVAT exports."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from edge_ilseg.data.folder import Folder
from edge_ilseg.data.step_view import count_pixels
from edge_ilseg.errors import DataError
from edge_ilseg.images import write_mask_png

LABELS_HW = np.array([[0, 0, 1, 2], [0, 1, 2, 255]], dtype=np.uint8)
COLORS = ((0, 0, 0), (250, 50, 50), (50, 250, 50))
COLORED = "background: 0,0,0\nbolt: 250,50,50\nnut: 50,250,50\n"
LABELMAP = """# label:color_rgb:parts:actions
background:0,0,0::
bolt:250,50,50::
nut:50,250,50::
"""


def make_folder(
    root: Path,
    ids: tuple[str, ...] = ("a", "b"),
    classes: str = "background\nbolt\nnut\n",
    names: tuple[str, str] = ("images", "masks"),
) -> Path:
    (root / "classes.txt").write_text(classes)
    for image_id in ids:
        write_pair(root, image_id, names=names)
    return root


def write_pair(
    root: Path,
    image_id: str,
    labels_HW: NDArray[np.uint8] = LABELS_HW,
    names: tuple[str, str] = ("images", "masks"),
) -> None:
    for name in names:
        (root / name / image_id).parent.mkdir(parents=True, exist_ok=True)
    image_HWC = np.full((2, 4, 3), len(image_id), dtype=np.uint8)
    Image.fromarray(image_HWC).save(root / names[0] / f"{image_id}.png")
    Image.fromarray(labels_HW).save(root / names[1] / f"{image_id}.png")


def write_lists(root: Path, **lists: str) -> None:
    (root / "splits").mkdir()
    for name, text in lists.items():
        (root / "splits" / f"{name}.txt").write_text(text)


def as_colors(labels_HW: NDArray[np.uint8], void: tuple[int, int, int] = (224, 224, 192)) -> NDArray[np.uint8]:
    table = np.full((256, 3), void, dtype=np.uint8)
    table[:3] = COLORS
    return table[labels_HW]


def labels_of(root: Path) -> list[list[int]]:
    return Folder(root).read_labels("a").tolist()


def test_files_are_found_below_and_with_capital_suffixes_and_nothing_hidden_or_that_is_no_file(tmp_path: Path) -> None:
    make_folder(tmp_path, ids=("b", "sub/a"))
    (tmp_path / "images" / "b.png").rename(tmp_path / "images" / "b.PNG")
    (tmp_path / "images" / ".c.png").write_bytes(b"")
    (tmp_path / "images" / "d.png").mkdir()
    (tmp_path / "images" / "e.png").symlink_to("nowhere")
    (tmp_path / "images" / "notes.txt").write_text("")
    dataset = Folder(tmp_path)
    assert sorted({image_id for split in dataset.info.splits for image_id in dataset.ids(split)}) == ["b", "sub/a"]
    assert [dataset.read_image(image_id)[0, 0, 0] for image_id in ("b", "sub/a")] == [1, 5]
    assert dataset.read_labels("sub/a").tolist() == LABELS_HW.tolist()


# --- masks ---


def test_an_index_mask_holds_label_ids(tmp_path: Path) -> None:
    assert labels_of(make_folder(tmp_path)) == LABELS_HW.tolist()


def test_a_palette_mask_holds_label_ids_whatever_its_colors(tmp_path: Path) -> None:
    make_folder(tmp_path)
    write_mask_png(tmp_path / "masks" / "a.png", LABELS_HW, ((9, 9, 9), (8, 8, 8), (7, 7, 7)))
    assert labels_of(tmp_path) == LABELS_HW.tolist()


def test_a_color_mask_is_read_by_the_declared_colors(tmp_path: Path) -> None:
    make_folder(tmp_path, classes=COLORED)
    Image.fromarray(as_colors(LABELS_HW)).save(tmp_path / "masks" / "a.png")
    assert labels_of(tmp_path) == LABELS_HW.tolist()
    assert Folder(tmp_path).info.colors == COLORS


def test_a_palette_mask_whose_colors_are_all_declared_is_read_by_them(tmp_path: Path) -> None:
    make_folder(tmp_path, classes=COLORED)
    shuffled_HW = np.array([[5, 5, 4, 3], [5, 4, 3, 5]], dtype=np.uint8)
    write_mask_png(tmp_path / "masks" / "a.png", shuffled_HW, ((1, 1, 1), (2, 2, 2), (3, 3, 3), *COLORS[::-1]))
    assert labels_of(tmp_path) == [[0, 0, 1, 2], [0, 1, 2, 0]]


def test_a_palette_mask_with_an_undeclared_color_is_read_by_its_indices(tmp_path: Path) -> None:
    make_folder(tmp_path, classes=COLORED)
    write_mask_png(tmp_path / "masks" / "a.png", LABELS_HW, ((0, 0, 0), (1, 1, 1), (2, 2, 2)))
    assert labels_of(tmp_path) == LABELS_HW.tolist()


def test_an_index_mask_saved_as_rgb_or_16_bit_is_read_by_its_values(tmp_path: Path) -> None:
    make_folder(tmp_path)
    Image.fromarray(np.repeat(LABELS_HW[:, :, None], 3, axis=2)).save(tmp_path / "masks" / "a.png")
    assert labels_of(tmp_path) == LABELS_HW.tolist()
    Image.fromarray(LABELS_HW.astype(np.uint16)).save(tmp_path / "masks" / "a.png")
    assert labels_of(tmp_path) == LABELS_HW.tolist()


def test_a_mask_value_outside_the_class_list_names_file_value_and_pixel(tmp_path: Path) -> None:
    make_folder(tmp_path)
    wrong_HW = LABELS_HW.copy()
    wrong_HW[1, 2] = 7
    write_pair(tmp_path, "a", wrong_HW)
    with pytest.raises(DataError) as caught:
        Folder(tmp_path).read_labels("a")
    text = str(caught.value)
    assert "masks/a.png" in text
    assert "value 7 at row 1, column 2" in text
    assert "0 to 2, or 255 for void" in text


def test_a_16_bit_value_is_not_cut_to_8_bits(tmp_path: Path) -> None:
    make_folder(tmp_path)
    Image.fromarray(np.full((2, 4), 257, dtype=np.uint16)).save(tmp_path / "masks" / "a.png")
    with pytest.raises(DataError, match="value 257 at row 0, column 0"):
        Folder(tmp_path).read_labels("a")


def test_an_undeclared_color_names_file_color_and_pixel(tmp_path: Path) -> None:
    make_folder(tmp_path, classes=COLORED)
    colors_HWC = as_colors(LABELS_HW)
    colors_HWC[1, 3] = (1, 2, 3)
    Image.fromarray(colors_HWC).save(tmp_path / "masks" / "a.png")
    with pytest.raises(DataError, match=r"(?s)masks/a\.png.*colour 1,2,3 at row 1, column 3"):
        Folder(tmp_path).read_labels("a")


def test_a_color_mask_without_declared_colors_says_where_to_write_them(tmp_path: Path) -> None:
    make_folder(tmp_path)
    Image.fromarray(as_colors(LABELS_HW)).save(tmp_path / "masks" / "a.png")
    with pytest.raises(DataError, match=r"(?s)names none.*column 2.*write the colours into classes\.txt"):
        Folder(tmp_path).read_labels("a")


def test_an_image_and_a_mask_of_different_size_are_refused_with_both_sizes(tmp_path: Path) -> None:
    make_folder(tmp_path)
    Image.fromarray(LABELS_HW[:, :3].copy()).save(tmp_path / "masks" / "a.png")
    with pytest.raises(DataError, match=r"(?s)differ in size.*masks/a\.png.*mask 2 x 3.*2 x 4"):
        Folder(tmp_path).read_labels("a")


def test_a_truncated_jpeg_is_refused_by_name(tmp_path: Path) -> None:
    make_folder(tmp_path, ids=("b",))
    path = tmp_path / "images" / "a.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:1500])
    Image.new("L", (64, 48)).save(tmp_path / "masks" / "a.png")
    with pytest.raises(DataError, match=r"(?s)truncated.*images/a\.jpg.*copy the file again"):
        Folder(tmp_path).read_image("a")
    with pytest.raises(DataError, match=r"(?s)truncated.*images/a\.jpg.*copy the file again"):
        Folder(tmp_path).open_image("a")
    assert np.array_equal(np.asarray(Folder(tmp_path).open_image("b")), Folder(tmp_path).read_image("b"))


# --- the list of classes ---


def test_a_list_may_name_void_which_is_no_class(tmp_path: Path) -> None:
    make_folder(tmp_path, classes="background\nbolt\nvoid\nnut\n")
    write_pair(tmp_path, "a", np.array([[0, 1, 2, 3], [0, 0, 0, 255]], dtype=np.uint8))
    info = Folder(tmp_path).info
    assert info.classes == ("background", "bolt", "nut")
    assert info.background == "background"
    assert labels_of(tmp_path) == [[0, 1, 255, 2], [0, 0, 0, 255]]


def test_a_list_without_background_has_none(tmp_path: Path) -> None:
    assert Folder(make_folder(tmp_path, classes="sky\nbolt\nnut")).info.background is None


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("", "the list of classes is empty"),
        ("# nothing\n\nvoid\n", "the list of classes is empty"),
        ("bolt\nnut\nBolt\n", r"(?s)'Bolt' is listed twice.*lines 1 and 3"),
        ("bolt: 1,2,3\nnut: 1,2,3\n", r"(?s)two classes have one colour.*lines 1 and 2"),
        ("bolt: 1,2,3\nnut\n", r"(?s)some classes have a colour.*line 2"),
        ("bolt: 1,2\n", r"(?s)cannot be read.*line 1.*'bolt: 1,2'"),
        ("bolt: 1,2,300\n", "levels from 0 to 255"),
        (": 1,2,3\n", "cannot be read"),
        ("\n".join(f"c{k}" for k in range(256)), "more classes than a mask can hold"),
    ],
)
def test_a_list_of_classes_that_cannot_be_used_is_refused(tmp_path: Path, classes: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Folder(make_folder(tmp_path, classes=classes))


def test_a_missing_list_of_classes_says_what_to_write(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(DataError, match=r"(?s)no list of classes.*classes\.txt.*labelmap\.txt"):
        Folder(tmp_path)


# --- splits ---


def test_splits_come_from_lists_with_or_without_suffixes(tmp_path: Path) -> None:
    make_folder(tmp_path, ids=("a", "b", "c"))
    write_lists(tmp_path, train="b.png\n\n# a comment\na\n", val='"c"\n', empty="")
    dataset = Folder(tmp_path)
    assert dataset.ids("train") == ("b", "a")
    assert dataset.ids("train+val") == ("b", "a", "c")
    assert set(dataset.info.splits) == {"train", "val"}
    assert "splits/" in dataset.info.split_source


def test_splits_come_from_lists_in_the_root(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "train.txt").write_text("a\n")
    (tmp_path / "val.txt").write_text("b\n")
    dataset = Folder(tmp_path)
    assert dataset.info.splits == ("train", "val")
    assert dataset.ids("val") == ("b",)


def test_splits_come_from_sub_folders(tmp_path: Path) -> None:
    dataset = Folder(make_folder(tmp_path, ids=("train/a", "train/b", "val/a")))
    assert dataset.ids("train") == ("train/a", "train/b")
    assert dataset.ids("val") == ("val/a",)
    assert dataset.read_labels("val/a").shape == (2, 4)


def test_without_lists_the_hash_of_the_id_decides_and_new_images_move_none(tmp_path: Path) -> None:
    ids = tuple(f"{k:03}" for k in range(60))
    dataset = Folder(make_folder(tmp_path, ids=ids))
    train, val = dataset.ids("train"), dataset.ids("val")
    assert set(train) | set(val) == set(ids)
    assert not set(train) & set(val)
    assert 4 <= len(val) <= 20
    assert "hash" in dataset.info.split_source
    write_pair(tmp_path, "extra")
    assert set(train) <= set(Folder(tmp_path).ids("train"))
    assert set(val) <= set(Folder(tmp_path).ids("val"))


def test_an_unknown_split_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    make_folder(tmp_path)
    write_lists(tmp_path, train="a\n", val="b\n")
    with pytest.raises(DataError, match=r"(?s)unknown split 'trian'.*train, val.*did you mean 'train'"):
        Folder(tmp_path).ids("trian")


def test_an_empty_split_is_refused_by_name(tmp_path: Path) -> None:
    make_folder(tmp_path)
    write_lists(tmp_path, train="a\n", val="# to do\n")
    with pytest.raises(DataError, match="the split 'val' is empty"):
        Folder(tmp_path).ids("train+val")


def test_an_image_listed_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    make_folder(tmp_path)
    write_lists(tmp_path, train="a\nb\na.png\n")
    with pytest.raises(DataError, match=r"(?s)'a' is listed twice.*train\.txt.*lines 1 and 3"):
        Folder(tmp_path)


def test_a_missing_mask_is_named_when_it_is_read_and_not_before(tmp_path: Path) -> None:
    make_folder(tmp_path)
    write_lists(tmp_path, train="a\nb\n")
    (tmp_path / "masks" / "b.png").unlink()
    dataset = Folder(tmp_path)
    assert dataset.ids("train") == ("a", "b")
    assert dataset.read_labels("a").tolist() == LABELS_HW.tolist()
    with pytest.raises(DataError, match=r"(?s)mask of an image is missing.*masks/b\.png"):
        dataset.read_labels("b")


def test_a_missing_image_is_named_when_it_or_its_mask_is_read(tmp_path: Path) -> None:
    make_folder(tmp_path)
    write_lists(tmp_path, train="a\nb\n")
    (tmp_path / "images" / "b.png").unlink()
    dataset = Folder(tmp_path)
    assert dataset.ids("train") == ("a", "b")
    with pytest.raises(DataError, match=r"(?s)missing.*images/b\.png"):
        dataset.read_image("b")
    with pytest.raises(DataError, match=r"(?s)missing.*images/b\.png"):
        dataset.read_labels("b")


def test_counting_labels_stops_at_the_first_missing_file(tmp_path: Path) -> None:
    make_folder(tmp_path, ids=("a", "b", "c"))
    (tmp_path / "masks" / "b.png").unlink()
    dataset = Folder(tmp_path)
    with pytest.raises(DataError, match=r"(?s)mask of an image is missing.*masks/b\.png"):
        count_pixels(dataset, ("a", "b", "c"))


def test_an_image_without_mask_and_a_mask_without_image_are_found_without_lists_too(tmp_path: Path) -> None:
    make_folder(tmp_path, ids=tuple("abcdefgh"))
    (tmp_path / "images" / "c.png").unlink()
    (tmp_path / "masks" / "d.png").unlink()
    dataset = Folder(tmp_path)
    assert set(dataset.ids("train+val")) == set("abcdefgh")
    with pytest.raises(DataError, match=r"(?s)missing.*images/c\.png"):
        dataset.read_labels("c")
    with pytest.raises(DataError, match=r"(?s)missing.*masks/d\.png"):
        dataset.read_labels("d")


def test_two_images_with_one_id_are_refused(tmp_path: Path) -> None:
    make_folder(tmp_path)
    Image.new("RGB", (4, 2)).save(tmp_path / "images" / "a.bmp")
    with pytest.raises(DataError, match=r"(?s)two files have one image id.*a\.bmp and a\.png"):
        Folder(tmp_path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("bolt\n")
    with pytest.raises(DataError, match="images or JPEGImages"):
        Folder(tmp_path)


# --- CVAT "Segmentation mask 1.1" ---


def make_cvat(root: Path, *lists: str) -> Path:
    names = ("JPEGImages", "SegmentationClass")
    make_folder(root, ids=("a", "my photo"), names=names)
    (root / "classes.txt").unlink()
    (root / "labelmap.txt").write_text(LABELMAP)
    for image_id in ("a", "my photo"):
        Image.fromarray(as_colors(LABELS_HW)).save(root / "SegmentationClass" / f"{image_id}.png")
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    for name in lists:
        (root / "ImageSets" / "Segmentation" / f"{name}.txt").write_text('a\n"my photo"\n')
    return root


def test_a_cvat_export_is_read_as_it_is(tmp_path: Path) -> None:
    dataset = Folder(make_cvat(tmp_path, "train"))
    assert dataset.info.classes == ("background", "bolt", "nut")
    assert dataset.info.background == "background"
    assert dataset.info.colors == COLORS
    assert dataset.ids("train") == ("a", "my photo")
    assert dataset.read_labels("my photo").tolist() == LABELS_HW.tolist()


def test_a_lone_default_list_of_cvat_is_divided_into_train_and_val(tmp_path: Path) -> None:
    dataset = Folder(make_cvat(tmp_path, "default"))
    assert dataset.ids("default") == ("a", "my photo")
    divided = [image_id for name in ("train", "val") if name in dataset.info.splits for image_id in dataset.ids(name)]
    assert sorted(divided) == ["a", "my photo"]
    assert "default.txt, divided by a hash" in dataset.info.split_source


def test_black_without_a_background_line_gets_the_advice_to_add_one(tmp_path: Path) -> None:
    make_cvat(tmp_path, "train")
    (tmp_path / "labelmap.txt").write_text("bolt:250,50,50::\nnut:50,250,50::\n")
    with pytest.raises(DataError, match=r"(?s)colour 0,0,0 at row 0, column 0.*background: 0,0,0"):
        Folder(tmp_path).read_labels("a")
