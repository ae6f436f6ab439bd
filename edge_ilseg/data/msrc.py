"""MSRC-v2: Microsoft Research Cambridge object recognition image database, 591 photographs, no background class.

Layout: `Images/<id>.jpg|.bmp`, `GroundTruth/<id>_GT.png|.bmp` in the official colours, and the official split in
`train.txt`, `val.txt`, `test.txt`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edge_ilseg.classes import resolve_classes
from edge_ilseg.data.dataset import DatasetInfo
from edge_ilseg.data.masks import MaskCode, read_labels
from edge_ilseg.data.splits import check_unique, filled, read_lines, select_split
from edge_ilseg.errors import DataError
from edge_ilseg.images import Color, open_image, read_image
from edge_ilseg.metrics import VOID

COLORS: dict[str, Color] = {
    "building": (128, 0, 0),
    "grass": (0, 128, 0),
    "tree": (128, 128, 0),
    "cow": (0, 0, 128),
    "horse": (128, 0, 128),
    "sheep": (0, 128, 128),
    "sky": (128, 128, 128),
    "mountain": (64, 0, 0),
    "aeroplane": (192, 0, 0),
    "water": (64, 128, 0),
    "face": (192, 128, 0),
    "car": (64, 0, 128),
    "bicycle": (192, 0, 128),
    "flower": (64, 128, 128),
    "sign": (192, 128, 128),
    "bird": (0, 64, 0),
    "book": (128, 64, 0),
    "chair": (0, 192, 0),
    "road": (128, 64, 128),
    "cat": (0, 192, 128),
    "dog": (128, 192, 128),
    "body": (64, 64, 0),
    "boat": (192, 64, 0),
}
ALIASES = {"airplane": "aeroplane", "plane": "aeroplane", "bike": "bicycle", "ship": "boat", "street": "road"}
SPLITS = ("train", "val", "test")
SUFFIXES = (".jpg", ".bmp", ".png")


class Msrc:
    """MSRC-v2 in its official layout. The classes of `void_classes` become void: horse and mountain by custom."""

    def __init__(self, root: Path, *, void_classes: Sequence[str] = ("horse", "mountain")) -> None:
        if not (root / "Images").is_dir() or not (root / "GroundTruth").is_dir():
            raise DataError(
                "this folder is no MSRC-v2",
                where=root,
                expected="the folders Images and GroundTruth, and the lists train.txt, val.txt, test.txt",
                hint="give the folder that MSRC-v2 was unpacked into",
            )
        left_out = resolve_classes(void_classes, tuple(COLORS), ALIASES)
        classes = tuple(name for name in COLORS if name not in left_out)
        self._root = root
        self._lists = {name: _read_list(path) for name in SPLITS if (path := root / f"{name}.txt").is_file()}
        self._code = MaskCode(
            values={},
            colors={(0, 0, 0): VOID}
            | {color: classes.index(name) if name in classes else VOID for name, color in COLORS.items()},
        )
        self._info = DatasetInfo(
            kind="msrc",
            classes=classes,
            background=None,
            colors=tuple(COLORS[name] for name in classes),
            aliases=ALIASES,
            splits=filled(self._lists),
        )

    @property
    def info(self) -> DatasetInfo:
        """Classes in the official order without the void ones, no background."""
        return self._info

    def ids(self, split: str) -> tuple[str, ...]:
        """Image ids in the order of the official list, such as `1_9_s`."""
        return select_split(split, self._lists, self._root)

    def read_image(self, image_id: str) -> NDArray[np.uint8]:
        """The photograph, uint8, H x W x 3, RGB."""
        return read_image(self._image_path(image_id))

    def open_image(self, image_id: str) -> Image.Image:
        """The same in Pillow's memory."""
        return open_image(self._image_path(image_id))

    def read_labels(self, image_id: str) -> NDArray[np.uint8]:
        """The label ids, uint8, H x W."""
        mask_path = _existing(self._root / "GroundTruth", f"{image_id}_GT", (".png", ".bmp"))
        return read_labels(mask_path, self._image_path(image_id), self._code)

    def _image_path(self, image_id: str) -> Path:
        return _existing(self._root / "Images", image_id, SUFFIXES)


def _existing(folder: Path, stem: str, suffixes: Sequence[str]) -> Path:
    """The file that is there, or the first that could be: reading that one tells the user what is missing."""
    paths = [folder / f"{stem}{suffix}" for suffix in suffixes]
    return next((path for path in paths if path.is_file()), paths[0])


def _read_list(path: Path) -> tuple[str, ...]:
    """Ids with or without a suffix: lists that go round have `1_9_s` or `1_9_s.bmp`."""
    return check_unique(((number, PurePosixPath(line).stem) for number, line in read_lines(path)), path)
