"""What is kept of a step's images for the closed form: sums of products of features, class by class. No torch.

1. With x = [features; 1] of a pixel, of d + 1 elements, the moments of class c are M_c = sum of x x^T over its pixels.
   The last column has the sum of the features, its last element the number of pixels: nothing else is needed to weigh
   the classes in any way and to fit a head (`edge_ilseg.analytic`).
2. Sums over several steps are sums of sums: `merge` gives, but for the order of additions in float64, what one pass
   over all images would give.
3. M_c is symmetric: its upper triangle is kept, row by row, as float64. That takes the room of whole matrices in
   float32 and rounds nothing.
4. Sums hold for the trunk that the features come from, and for no other: they carry its hash.
5. The file is no part of the step's identity: it may be deleted, and collected again from the images. It has a hash
   over its own numbers instead, so that a changed byte is found. Nothing is pickled. Format page:
   docs/workspace-format.md.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from edge_ilseg.errors import WorkspaceError
from edge_ilseg.files import disk_error, sha256_bytes
from edge_ilseg.records import parse_versioned

FORMAT: Final = "edge-ilseg-statistics"
FORMAT_VERSION = 1
STATISTICS_NAME = "statistics.safetensors"
MOMENTS = "moments"
HEADER = "statistics"
MAX_HEADER_BYTES = 1 << 20
COLLECT_HINT = "while the images of all its steps are there: edge-ilseg statistics WORKSPACE --step STEP"


class StatisticsHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All of the file but the sums."""

    format: Literal["edge-ilseg-statistics"]
    format_version: int
    classes: tuple[str, ...]
    """In channel order."""
    features: Annotated[int, Meta(ge=1)]
    """d, how many features a pixel has."""
    images: int
    """How many images the sums are over, mirrored ones not counted."""
    trunk_sha256: str
    """Of the network's part that makes the features (rule 4)."""
    moments_sha256: str
    """Of the sums, little-endian float64 (rule 5)."""


class FeatureStatistics(msgspec.Struct, frozen=True, eq=False):
    """Sums over the pixels of each class (rules 1 and 3)."""

    classes: tuple[str, ...]
    trunk_sha256: str
    images: int
    moments_CP: NDArray[np.float64]
    """float64, C x P, P = (d + 1)(d + 2) / 2: the upper triangle of each class's M_c, row by row."""

    @property
    def features(self) -> int:
        """d, how many features a pixel has."""
        return side_of(self.moments_CP.shape[1]) - 1

    @property
    def pixels_C(self) -> NDArray[np.float64]:
        """Pixels of each class: grid cells, mirrored ones counted."""
        pixels_C: NDArray[np.float64] = self.moments_CP[:, -1]
        return pixels_C

    @property
    def sums_Cd(self) -> NDArray[np.float64]:
        """Sum of the features of each class, C x d: the last column of its moments, at the end of each packed row."""
        ends = np.cumsum(np.arange(self.features + 1, 0, -1)) - 1
        sums_Cd: NDArray[np.float64] = self.moments_CP[:, ends[:-1]]
        return sums_Cd


def packed_count(features: int) -> int:
    """P, the elements of the upper triangle of a class's moments."""
    return (features + 1) * (features + 2) // 2


def side_of(packed: int) -> int:
    """d + 1 from P.

    Raises:
        ValueError: no triangle has so many elements.
    """
    side = (math.isqrt(8 * packed + 1) - 1) // 2
    if side * (side + 1) // 2 != packed:
        raise ValueError(f"{packed} elements are no triangle")
    return side


def pack(moments_CDD: NDArray[np.float64]) -> NDArray[np.float64]:
    """C x (d + 1) x (d + 1) to the upper triangles, C x P."""
    rows, columns = np.triu_indices(moments_CDD.shape[1])
    return moments_CDD[:, rows, columns]


def unpack(moments_P: NDArray[np.float64]) -> NDArray[np.float64]:
    """One upper triangle to the whole (d + 1) x (d + 1)."""
    side = side_of(len(moments_P))
    whole_DD = np.zeros((side, side))
    whole_DD[np.triu_indices(side)] = moments_P
    return whole_DD + np.triu(whole_DD, 1).T


def merge(parent: FeatureStatistics, own: FeatureStatistics) -> FeatureStatistics:
    """The parent's sums and a step's own (rule 2): the parent's classes come first and may have got more pixels.

    Raises:
        WorkspaceError: the sums are over other features (rule 4), or other classes.
    """
    known = len(parent.classes)
    if own.classes[:known] != parent.classes:
        raise WorkspaceError(
            "the parent's statistics are of other classes",
            found=", ".join(parent.classes),
            expected=", ".join(own.classes[:known]),
            hint="delete the file, and collect them again " + COLLECT_HINT,
        )
    if (own.trunk_sha256, own.features) != (parent.trunk_sha256, parent.features):
        raise WorkspaceError(
            "the parent's statistics are sums over the features of another network",
            found=f"trunk {parent.trunk_sha256[:12]}, {parent.features} features",
            expected=f"trunk {own.trunk_sha256[:12]}, {own.features} features",
            hint="delete the file, and collect them again " + COLLECT_HINT,
        )
    moments_CP = own.moments_CP.copy()
    moments_CP[:known] += parent.moments_CP
    return FeatureStatistics(own.classes, own.trunk_sha256, parent.images + own.images, moments_CP)


def statistics_bytes(statistics: FeatureStatistics) -> bytes:
    """The bytes of `statistics.safetensors`."""
    from safetensors.numpy import save

    moments_CP = np.ascontiguousarray(statistics.moments_CP, dtype="<f8")
    header = StatisticsHeader(
        FORMAT,
        FORMAT_VERSION,
        statistics.classes,
        statistics.features,
        statistics.images,
        statistics.trunk_sha256,
        sha256_bytes(moments_CP.tobytes()),
    )
    return save({MOMENTS: moments_CP}, metadata={HEADER: msgspec.json.encode(header).decode()})


def read_header(folder: Path) -> StatisticsHeader | None:
    """What a step's statistics say of themselves, without reading the sums; None where there is no file.

    Raises:
        WorkspaceError: the file is damaged or of another version.
    """
    path = folder / STATISTICS_NAME
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            text = file.read(min(size, MAX_HEADER_BYTES))
        entries = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(entries["__metadata__"], type=dict[str, str])
        return _parse_header(metadata.get(HEADER, ""), path)
    except FileNotFoundError:
        return None
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError) as error:
        raise _damaged(path, str(error)) from error
    except OSError as error:
        raise disk_error(error, path) from error


def read_statistics(folder: Path) -> FeatureStatistics | None:
    """A step's statistics, every byte checked; None where there is no file.

    Raises:
        WorkspaceError: the file is damaged or of another version.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    header = read_header(folder)
    if header is None:
        return None
    path = folder / STATISTICS_NAME
    try:
        moments_CP = load(path.read_bytes())[MOMENTS]
    except (SafetensorError, KeyError) as error:
        raise _damaged(path, str(error)) from error
    except OSError as error:
        raise disk_error(error, path) from error
    expected = (len(header.classes), packed_count(header.features))
    if (moments_CP.shape, moments_CP.dtype) != (expected, np.dtype("<f8")):
        raise _damaged(path, f"moments {moments_CP.dtype} {moments_CP.shape}, not float64 {expected}")
    if sha256_bytes(moments_CP.tobytes()) != header.moments_sha256:
        raise _damaged(path, "sums that were changed after they were written")
    return FeatureStatistics(header.classes, header.trunk_sha256, header.images, moments_CP)


def _parse_header(text: str, path: Path) -> StatisticsHeader:
    return parse_versioned(
        text.encode(),
        StatisticsHeader,
        format=FORMAT,
        version=FORMAT_VERSION,
        error=WorkspaceError,
        what="the file of statistics",
        where=path,
        hint="delete it, and collect them again " + COLLECT_HINT,
    )


def _damaged(path: Path, found: str) -> WorkspaceError:
    return WorkspaceError(
        "the statistics of the step are damaged",
        where=path,
        found=found,
        hint="restore the file from a copy, or delete it and collect them again " + COLLECT_HINT,
    )
