"""PASCAL VOC 2012 segmentation in the layout of the VOCdevkit; 21 classes with background at label id 0.

1. `augmented` (the default) reads `SegmentationClassAug` and, as split `train`, its list `train_aug` (10,582 images),
   where both are there; else the official `SegmentationClass` and `train` (1,464 images).
2. A mask that the augmented folder lacks is taken from the official one.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edge_ilseg.data.dataset import DatasetInfo
from edge_ilseg.data.masks import MaskCode, read_labels
from edge_ilseg.data.splits import check_unique, filled, read_lines, select_split
from edge_ilseg.errors import DataError
from edge_ilseg.images import VOID_COLOR, default_colors, open_image, read_image
from edge_ilseg.metrics import VOID

CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
ALIASES = {
    "airplane": "aeroplane",
    "plane": "aeroplane",
    "bike": "bicycle",
    "couch": "sofa",
    "houseplant": "pottedplant",
    "human": "person",
    "monitor": "tvmonitor",
    "motorcycle": "motorbike",
    "people": "person",
    "plant": "pottedplant",
    "screen": "tvmonitor",
    "ship": "boat",
    "table": "diningtable",
    "television": "tvmonitor",
    "tv": "tvmonitor",
}
AUGMENTED_LISTS = ("train_aug", "trainaug")
LISTS = ("train", "val", "trainval", *AUGMENTED_LISTS)
LAYOUTS = (".", "VOC2012", "VOCdevkit/VOC2012")


class Voc:
    """VOC 2012. `root` is the folder VOC2012, the VOCdevkit around it, or the folder around that."""

    def __init__(self, root: Path, *, augmented: bool = True) -> None:
        self._root = _find_root(root)
        lists_folder = self._root / "ImageSets" / "Segmentation"
        lists = {name: _read_list(path) for name in LISTS if (path := lists_folder / f"{name}.txt").is_file()}
        folders = ["SegmentationClass"]
        train_aug = next((lists[name] for name in AUGMENTED_LISTS if name in lists), None)
        if augmented and train_aug is not None and (self._root / "SegmentationClassAug").is_dir():
            folders.insert(0, "SegmentationClassAug")
            lists["train"] = train_aug
        self._lists = {name: lists[name] for name in LISTS if name in lists}
        self._mask_folders = [self._root / name for name in folders]
        colors = default_colors(len(CLASSES))
        self._code = MaskCode(
            values={index: index for index in range(len(CLASSES))} | {VOID: VOID},
            colors={color: index for index, color in enumerate(colors)} | {VOID_COLOR: VOID},
        )
        self._info = DatasetInfo(
            kind="voc",
            classes=CLASSES,
            background="background",
            colors=colors,
            aliases=ALIASES,
            splits=filled(self._lists),
        )

    @property
    def info(self) -> DatasetInfo:
        """The 21 classes in the order of VOC's ids."""
        return self._info

    def ids(self, split: str) -> tuple[str, ...]:
        """Image ids in the order of the list, such as `2007_000032`."""
        return select_split(split, self._lists, self._root)

    def read_image(self, image_id: str) -> NDArray[np.uint8]:
        """The photograph, uint8, H x W x 3, RGB."""
        return read_image(self._image_path(image_id))

    def open_image(self, image_id: str) -> Image.Image:
        """The same in Pillow's memory."""
        return open_image(self._image_path(image_id))

    def read_labels(self, image_id: str) -> NDArray[np.uint8]:
        """The label ids, uint8, H x W."""
        paths = [folder / f"{image_id}.png" for folder in self._mask_folders]
        mask_path = next((path for path in paths if path.is_file()), paths[0])
        return read_labels(mask_path, self._image_path(image_id), self._code)

    def _image_path(self, image_id: str) -> Path:
        return self._root / "JPEGImages" / f"{image_id}.jpg"


def _find_root(root: Path) -> Path:
    for layout in LAYOUTS:
        folder = root / layout
        if (folder / "JPEGImages").is_dir() and (folder / "ImageSets" / "Segmentation").is_dir():
            return folder
    raise DataError(
        "no VOC 2012 here",
        where=root,
        expected="JPEGImages, SegmentationClass and ImageSets/Segmentation, in this folder, in VOC2012 or in "
        "VOCdevkit/VOC2012",
        hint="give the folder that VOC 2012 was unpacked into",
    )


def _read_list(path: Path) -> tuple[str, ...]:
    """Ids from lines such as `2007_000032` or `/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png`."""
    return check_unique(((number, PurePosixPath(line.split()[0]).stem) for number, line in read_lines(path)), path)
