"""Where the features of views are kept: rows of one size, in memory or in a memory-mapped file.

1. float32 gives back the bits that it was given. float16 rounds to the nearest: 2^-11 of the value at most, for values
   from 6e-5 to 65504; greater ones are cut off there. int8 has 256 levels between the least and the greatest value of
   each channel of each view: half a level at most, (greatest - least) / 510.
2. A file's bytes are reserved when it is made: a disk too small for it is met before training, not in it.
3. A file belongs to its key, a hash over all that its content depends on; a file of another key is not read, and goes.
4. Every row of a file has a checksum. After a kill or a power cut a row is whole, or as if it had never been written.
5. `close` removes the file: it is worth nothing once the step is trained.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_ilseg.config import FeatureDtype
from edge_ilseg.errors import TrainingError
from edge_ilseg.files import disk_error

STORED: dict[FeatureDtype, tuple[str, str]] = {
    # name: types of the stored features and of the teacher's stored logits
    "float32": ("<f4", "<f4"),
    "float16": ("<f2", "<f2"),
    "int8": ("u1", "<f2"),
}
LEVELS = 255
FLOAT16_MAX = float(np.finfo(np.float16).max)
FILE_SUFFIX = ".cache"


class ViewShape(NamedTuple):
    """Sizes of what is kept of one view."""

    features_CHW: tuple[int, int, int]
    labels_HW: tuple[int, int]
    teacher_KHW: tuple[int, int, int] | None
    """Of the teacher's logits at the features' size; None where they are not kept."""


def row_type(shape: ViewShape, dtype: FeatureDtype) -> np.dtype[np.void]:
    """A row: what is kept of one view, with its checksum in front."""
    features_type, logits_type = STORED[dtype]
    channels = shape.features_CHW[0]
    fields: list[tuple[str, str, tuple[int, ...]]] = [("checksum", "<u4", ())]
    if dtype == "int8":
        fields += [("least", "<f4", (channels,)), ("level", "<f4", (channels,))]
    fields.append(("features", features_type, shape.features_CHW))
    if shape.teacher_KHW is not None:
        fields.append(("teacher", logits_type, shape.teacher_KHW))
    fields.append(("labels", "u1", shape.labels_HW))
    return np.dtype(fields)


def check_fits(views: int, image_count: int, row_bytes: int, limit_mib: int) -> None:
    """Refuse a cache above its limit, and say what would fit.

    It is not made smaller by itself: what a step learns must follow from its settings, not from a machine.

    Raises:
        TrainingError: it would be larger than `limit_mib`.
    """
    needed_mib = -(-views * image_count * row_bytes // (1 << 20))
    if needed_mib <= limit_mib:
        return
    fitting = (limit_mib << 20) // (image_count * row_bytes)
    fewer = f"augment_views = {fitting}, " if fitting else ""
    raise TrainingError(
        "the features of the views do not fit into the cache",
        where="augment_views, feature_cache_mib",
        found=f"{needed_mib} MiB for {views} views of {image_count} images, {row_bytes} bytes each",
        expected=f"at most {limit_mib} MiB",
        hint=f"set {fewer}feature_cache_dtype = int8, or feature_cache_mib = {needed_mib}",
    )


class FeatureStore:
    """Rows of views by number. Build with `memory_store` or `file_store`.

    Attributes:
        is_kept: bool, for each row, whether it holds a view.
        path: of the file; None in memory.
    """

    def __init__(self, rows: NDArray[np.void], is_kept: NDArray[np.bool_], path: Path | None) -> None:
        self.is_kept, self.path = is_kept, path
        self._rows: NDArray[np.void] | None = rows

    @property
    def rows(self) -> NDArray[np.void]:
        """The rows themselves, of `row_type`."""
        if self._rows is None:
            raise ValueError("the store was closed")
        return self._rows

    @property
    def has_teacher(self) -> bool:
        """Whether the teacher's logits are kept."""
        return "teacher" in (self.rows.dtype.names or ())

    def write(
        self,
        numbers: Sequence[int],
        features_NCHW: NDArray[np.float32],
        labels_NHW: NDArray[np.uint8],
        teacher_NKHW: NDArray[np.float32] | None,
    ) -> None:
        """Keep views; their rows are not read before their checksums are in place (rule 4)."""
        rows = np.zeros(len(numbers), dtype=self.rows.dtype)
        if "least" in (rows.dtype.names or ()):
            rows["least"], rows["level"], rows["features"] = _quantize(features_NCHW)
        else:
            rows["features"] = _within(features_NCHW, rows["features"].dtype)
        if teacher_NKHW is not None:
            rows["teacher"] = _within(teacher_NKHW, rows["teacher"].dtype)
        rows["labels"] = labels_NHW
        for row, number in enumerate(numbers):
            if self.path is not None:
                rows["checksum"][row] = _checksum(rows[row : row + 1])
            self.rows[number] = rows[row]
            self.is_kept[number] = True

    def read(
        self, numbers: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.float32] | None]:
        """Features, labels and the teacher's logits (None where they are not kept), as new arrays."""
        features_NCHW = self.rows["features"][numbers].astype(np.float32, copy=False)
        if "least" in (self.rows.dtype.names or ()):
            features_NCHW *= self.rows["level"][numbers][:, :, None, None]
            features_NCHW += self.rows["least"][numbers][:, :, None, None]
        teacher_NKHW = self.rows["teacher"][numbers].astype(np.float32, copy=False) if self.has_teacher else None
        return features_NCHW, self.rows["labels"][numbers], teacher_NKHW

    def close(self) -> None:
        """Give the memory back and remove the file (rule 5)."""
        self._rows = None
        if self.path is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()


def memory_store(count: int, row: np.dtype[np.void]) -> FeatureStore:
    """Rows in memory; a page of it is taken when it is first written to."""
    return FeatureStore(np.empty(count, dtype=row), np.zeros(count, dtype=np.bool_), None)


def file_store(stem: Path, key: str, count: int, row: np.dtype[np.void]) -> FeatureStore:
    """Rows in the file `<stem>-<key>.cache`, made or found again (rules 2 to 4); others of that stem are removed.

    Args:
        stem: in the step's hidden folder, which is made if it is not there.
        key: hash over all that the content depends on.
        count: rows.
        row: from `row_type`.

    Raises:
        EdgeIlsegError: the disk is full, or refuses the file.
    """
    path = stem.with_name(f"{stem.name}-{key[:32]}{FILE_SUFFIX}")
    size_bytes = count * row.itemsize
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        for other in stem.parent.glob(f"{stem.name}-*{FILE_SUFFIX}"):
            if other != path or other.stat().st_size != size_bytes:
                other.unlink()
        is_found = path.exists()
        if not is_found:
            _reserve(path, size_bytes)
        rows: NDArray[np.void] = np.asarray(np.memmap(path, dtype=row, mode="r+", shape=(count,)))
    except OSError as error:
        raise disk_error(error, path) from error
    whole = [is_found and rows["checksum"][n] == _checksum(rows[n : n + 1]) for n in range(count)]
    return FeatureStore(rows, np.array(whole, dtype=np.bool_), path)


def _reserve(path: Path, size_bytes: int) -> None:
    """Make a file whose every byte has its place on the disk: a mapped write cannot fail for want of space."""
    try:
        with path.open("xb") as file:
            os.posix_fallocate(file.fileno(), 0, size_bytes)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _checksum(row: NDArray[np.void]) -> int:
    """CRC-32 of one row but its checksum; never 0, which is what a reserved row has."""
    return zlib.crc32(row.tobytes()[4:]) or 1


def _within(values: NDArray[np.float32], dtype: np.dtype[np.generic]) -> NDArray[np.float32]:
    """Cut off what float16 cannot hold; other types hold everything."""
    return np.clip(values, -FLOAT16_MAX, FLOAT16_MAX) if dtype == np.float16 else values


def _quantize(
    features_NCHW: NDArray[np.float32],
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.uint8]]:
    """Least value, width of a level, and level of each value; a constant channel has levels of width 0."""
    least_NC = features_NCHW.min(axis=(2, 3))
    level_NC = (features_NCHW.max(axis=(2, 3)) - least_NC) / np.float32(LEVELS)
    divisor_NC11 = np.where(level_NC > 0, level_NC, 1)[:, :, None, None]
    levels_NCHW = np.rint((features_NCHW - least_NC[:, :, None, None]) / divisor_NC11)
    return least_NC, level_NC, np.clip(levels_NCHW, 0, LEVELS).astype(np.uint8)
