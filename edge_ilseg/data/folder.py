"""A folder of images and a folder of masks: one's own data, or what CVAT exports as "Segmentation mask 1.1".

1. Images lie in `images/` or `JPEGImages/`, masks in `masks/` or `SegmentationClass/`, classes in `classes.txt` or
   `labelmap.txt` (see `class_list`). An image id is the path below that folder without its suffix.
2. Splits are the first of these that is there: lists in `splits/`; lists in `ImageSets/Segmentation/`; `train.txt`,
   `val.txt`, `test.txt` in the root; sub-folders of the image folder, where no image lies beside them. Else train and
   val are made by a hash of the id (80 : 20), and likewise from a lone `default` list, CVAT's name for "no split".
   `FolderInfo.split_source` says which.
3. An id of a split whose image or mask is missing is an error when that one is read, not before: on a device one lost
   file is one bad image. Training and `data inspect` read every mask first, and stop there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edge_ilseg.data.class_list import read_class_list
from edge_ilseg.data.dataset import DatasetInfo
from edge_ilseg.data.masks import read_labels
from edge_ilseg.data.splits import check_unique, filled, hash_splits, read_lines, select_split
from edge_ilseg.errors import DataError
from edge_ilseg.images import IMAGE_SUFFIXES, open_image, read_image

IMAGE_FOLDERS = ("images", "JPEGImages")
MASK_FOLDERS = ("masks", "SegmentationClass")
MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")
LIST_FOLDERS = ("splits", "ImageSets/Segmentation")
ROOT_LISTS = ("train", "val", "test")
BY_HASH = "a hash of the image id (80 % train, 20 % val)"


class FolderInfo(DatasetInfo, frozen=True):
    """`DatasetInfo`, and where the splits come from."""

    split_source: str


class Folder:
    """Images and masks in two folders."""

    def __init__(self, root: Path) -> None:
        self._root = root
        class_list = read_class_list(root)
        self._code = class_list.code
        self._images = _index(_first_folder(root, IMAGE_FOLDERS), IMAGE_SUFFIXES)
        self._masks = _index(_first_folder(root, MASK_FOLDERS), MASK_SUFFIXES)
        self._splits, source = _splits(root, {*self._images, *self._masks})
        self._info = FolderInfo(
            kind="folder",
            classes=class_list.classes,
            background=class_list.background,
            colors=class_list.colors,
            aliases={},
            splits=filled(self._splits),
            split_source=source,
        )

    @property
    def info(self) -> FolderInfo:
        """Classes of the list; the background is the class named `background`, where there is one."""
        return self._info

    def ids(self, split: str) -> tuple[str, ...]:
        """Image ids of `split`: those of its list, or of its image or mask files; see rule 3."""
        return select_split(split, self._splits, self._root)

    def read_image(self, image_id: str) -> NDArray[np.uint8]:
        """The image, uint8, H x W x 3, RGB."""
        return read_image(self._path(image_id, self._images, IMAGE_FOLDERS))

    def open_image(self, image_id: str) -> Image.Image:
        """The same in Pillow's memory."""
        return open_image(self._path(image_id, self._images, IMAGE_FOLDERS))

    def read_labels(self, image_id: str) -> NDArray[np.uint8]:
        """The label ids, uint8, H x W."""
        mask_path = self._path(image_id, self._masks, MASK_FOLDERS)
        return read_labels(mask_path, self._path(image_id, self._images, IMAGE_FOLDERS), self._code)

    def _path(self, image_id: str, suffixes: dict[str, str], folders: tuple[str, ...]) -> Path:
        """The indexed file, or the one that should be there: reading that tells the user what is missing."""
        return _first_folder(self._root, folders) / f"{image_id}{suffixes.get(image_id, '.png')}"


def _first_folder(root: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise DataError(
        "a folder of the data set is missing",
        where=root,
        expected=f"{' or '.join(names)} in this folder",
        hint="make it, or correct the root of the data set",
    )


def _index(folder: Path, suffixes: tuple[str, ...]) -> dict[str, str]:
    """Image id -> suffix of its file. No paths: ten times the memory, and a device has tens of thousands of images."""
    found: dict[str, str] = {}
    for parent, folders, names in os.walk(folder):
        folders.sort()
        below = Path(parent).relative_to(folder)
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() not in suffixes or name.startswith(".") or not os.path.isfile(os.path.join(parent, name)):
                continue
            image_id = (below / stem).as_posix()
            if image_id in found:
                raise DataError(
                    "two files have one image id",
                    where=folder,
                    found=f"{stem}{found[image_id]} and {name}",
                    hint="remove or rename one of them",
                )
            found[image_id] = sys.intern(suffix)
    return found


def _splits(root: Path, ids: Iterable[str]) -> tuple[dict[str, tuple[str, ...]], str]:
    """Splits and the words for where they come from (rule 2)."""
    ids = sorted(ids)
    for folder in LIST_FOLDERS:
        lists = {path.stem: _read_list(path) for path in sorted((root / folder).glob("*.txt"))}
        if set(lists) == {"default"}:
            return {**lists, **hash_splits(lists["default"])}, f"{folder}/default.txt, divided by {BY_HASH}"
        if lists:
            return lists, f"the lists in {folder}/"
    lists = {name: _read_list(path) for name in ROOT_LISTS if (path := root / f"{name}.txt").is_file()}
    if lists:
        return lists, f"the lists {', '.join(f'{name}.txt' for name in lists)}"
    if ids and all("/" in image_id for image_id in ids):
        folders: dict[str, list[str]] = {}
        for image_id in ids:
            folders.setdefault(image_id.partition("/")[0], []).append(image_id)
        return {name: tuple(members) for name, members in folders.items()}, "the sub-folders of the image folder"
    return hash_splits(ids), BY_HASH


def _read_list(path: Path) -> tuple[str, ...]:
    """Ids with or without a suffix, and with or without the quotes that CVAT puts around a name with blanks."""
    return check_unique(((number, _parse_id(line)) for number, line in read_lines(path)), path)


def _parse_id(line: str) -> str:
    name = PurePosixPath(line.strip('"'))
    return name.with_suffix("").as_posix() if name.suffix.lower() in IMAGE_SUFFIXES else name.as_posix()
