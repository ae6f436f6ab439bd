"""What a verification on another device needs of this machine's files, and nothing else.

1. Of a bundle: every plain file. A link in a bundle is an error here as it is there.
2. Of a data set: its lists, and the images and masks of the ids that are verified. Its folders are made on the device
   even where nothing in them is needed: some data sets tell by them what they are.
3. Where a split is made of the file names (a folder without lists), all of its images are needed: with fewer, the split
   would be another one.
4. A file that is missing here is missing there, and is in the report for what it is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from edge_ilseg.bundle import COPY_AGAIN, read_manifest
from edge_ilseg.data.class_list import LIST_NAMES
from edge_ilseg.data.dataset import Dataset
from edge_ilseg.data.folder import IMAGE_FOLDERS, LIST_FOLDERS, MASK_FOLDERS, ROOT_LISTS
from edge_ilseg.data.msrc import SPLITS
from edge_ilseg.data.voc import LAYOUTS
from edge_ilseg.devices.verification import spread
from edge_ilseg.errors import ACCESS_HINT, BundleError, DataError
from edge_ilseg.files import sha256_file
from edge_ilseg.images import IMAGE_SUFFIXES
from edge_ilseg.progress import ProgressCallback, no_progress


class DataLayout(NamedTuple):
    """Where a kind of data set has its files, below its root."""

    lists: tuple[str, ...]
    """Patterns of files that name ids."""
    others: tuple[str, ...]
    """Patterns of files that are always needed."""
    pictures: tuple[str, ...]
    """Folders of images or masks, named by id."""
    mask_ending: str = ""
    """What a mask's name has after the id."""


DATA_LAYOUTS: dict[str, DataLayout] = {
    "folder": DataLayout(
        lists=(*(f"{name}/*.txt" for name in LIST_FOLDERS), *(f"{name}.txt" for name in ROOT_LISTS)),
        others=LIST_NAMES,
        pictures=(*IMAGE_FOLDERS, *MASK_FOLDERS),
    ),
    "voc": DataLayout(
        lists=tuple(f"{root}/ImageSets/Segmentation/*.txt" for root in LAYOUTS),
        others=(),
        pictures=tuple(
            f"{root}/{name}" for root in LAYOUTS for name in ("JPEGImages", "SegmentationClass", "SegmentationClassAug")
        ),
    ),
    "msrc": DataLayout(
        lists=tuple(f"{name}.txt" for name in SPLITS),
        others=(),
        pictures=("Images", "GroundTruth"),
        mask_ending="_GT",
    ),
}
"""Every kind of data set that reads files."""


class SentFile(NamedTuple):
    """A file of this machine, and what it is called in the run's folder on the device."""

    path: Path
    name: str
    sha256: str
    size_bytes: int


class FilesNeeded(NamedTuple):
    """Files as (path here, name there), and folders that must be there."""

    files: tuple[tuple[Path, str], ...]
    folders: tuple[str, ...]


def bundle_files(folder: Path, name: str) -> FilesNeeded:
    """All files of a bundle, below `name` on the device (rule 1).

    Raises:
        BundleError: the folder is no bundle, or holds a link.
    """
    read_manifest(folder)
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise BundleError("a bundle holds plain files, and this is a link or a device", where=path, hint=COPY_AGAIN)
        if path.is_file():
            found.append((path, f"{name}/{path.relative_to(folder).as_posix()}"))
    return FilesNeeded(tuple(found), (name,))


def data_files(
    kind: str, root: Path, dataset: Dataset, split: str, max_images: int | None, name: str = "data"
) -> FilesNeeded:
    """The files of a data set that are read when `split` is verified, below `name` on the device (rules 2 to 4).

    Args:
        kind: a key of `DATA_LAYOUTS`.
        root: the folder of the data set.
        dataset: what is in it.
        split: which images.
        max_images: as in `verify_bundle`.
        name: of the data set's folder on the device.

    Raises:
        DataError: the split is unknown or empty.
    """
    layout = DATA_LAYOUTS[kind]
    lists = _matches(root, layout.lists)
    ids = set(spread(dataset.ids(split), max_images if lists else None))
    found = [*lists, *_matches(root, layout.others)]
    folders = [folder for folder in layout.pictures if (root / folder).is_dir()]
    for folder in folders:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
                stem = path.relative_to(root / folder).with_suffix("").as_posix()
                if _is_needed(stem, ids, layout.mask_ending):
                    found.append(path)
    unique = sorted(set(found))
    return FilesNeeded(
        tuple((path, f"{name}/{path.relative_to(root).as_posix()}") for path in unique),
        (name, *(PurePosixPath(name, folder).as_posix() for folder in folders)),
    )


def hash_files(needed: Iterable[FilesNeeded], progress: ProgressCallback = no_progress) -> tuple[SentFile, ...]:
    """Hash every file once.

    Raises:
        DataError: a file cannot be read.
    """
    files = [pair for item in needed for pair in item.files]
    sent = []
    for number, (path, name) in enumerate(files, start=1):
        try:
            sent.append(SentFile(path, name, sha256_file(path), path.stat().st_size))
        except OSError as error:
            raise DataError(
                "a file cannot be read", where=path, found=error.strerror or str(error), hint=ACCESS_HINT
            ) from error
        progress("hashing files", number / len(files))
    return tuple(sent)


def _matches(root: Path, patterns: Sequence[str]) -> list[Path]:
    return [path for pattern in patterns for path in sorted(root.glob(pattern)) if path.is_file()]


def _is_needed(stem: str, ids: Collection[str], mask_ending: str) -> bool:
    return stem in ids or bool(mask_ending and stem.endswith(mask_ending) and stem.removesuffix(mask_ending) in ids)
