"""Files as chunks: cut so that what a step left unchanged is the same chunk in the old file and in the new one.

1. Chunks lie one after another and make up the file, to the byte; none is longer than `MAX_CHUNK_BYTES`.
2. What lies between two borders and has at least `ALONE_BYTES` bytes stands alone: a tensor is the same chunk wherever
   it is stored, so that a model that is shipped for two runtimes is stored and fetched once.
3. Smaller neighbours are merged to at least `MIN_CHUNK_BYTES` bytes, but not with what stands alone. Where a merged
   chunk ends is decided by the bytes before its end: something inserted moves few of the chunks behind it.
4. The same bytes with the same borders are always cut the same; another way of cutting in a later version costs a
   device bytes, never correctness.
5. What a device reads of its own files is hashed when it is read: bit rot is a chunk that is not there.

Page: docs/pack-format.md.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import stat
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from edge_ilseg.tensor_borders import Sliceable, ir_borders, line_borders, onnx_borders

MIN_CHUNK_BYTES = 8 << 10
ALONE_BYTES = 2 << 10
USUAL_EXTRA_BYTES = 4 << 10
"""So many bytes above the least a merged chunk has on average, where borders lie close."""
MAX_CHUNK_BYTES = 256 << 10
DECIDING_BYTES = 64
"""Before a border: they decide whether a merged chunk ends there."""
MAX_XML_BYTES = 64 << 20
BUFFER_BYTES = 64 << 10
TEXTS = frozenset({".xml", ".json", ".txt", ".csv", ".toml"})


class Chunk(msgspec.Struct, frozen=True, gc=False):
    """A piece of a file."""

    sha256: bytes
    start: int
    length: int


class FileBytes:
    """A file's bytes without having them all in memory; small slices come from a buffer."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._bytes = os.fstat(descriptor).st_size
        self._buffer, self._start = b"", 0

    def __len__(self) -> int:
        return self._bytes

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self._bytes)
        if stop - start > BUFFER_BYTES // 4:
            return self._read(start, stop - start)
        if not self._start <= start <= stop <= self._start + len(self._buffer):
            self._buffer, self._start = self._read(start, BUFFER_BYTES), start
        return self._buffer[start - self._start : stop - self._start]

    def _read(self, start: int, length: int) -> bytes:
        pieces = []
        while length > 0 and (piece := os.pread(self._descriptor, length, start)):
            pieces.append(piece)
            start, length = start + len(piece), length - len(piece)
        return b"".join(pieces)


def cut(
    data: Sliceable, borders: Iterable[int], minimum: int = MIN_CHUNK_BYTES, maximum: int = MAX_CHUNK_BYTES
) -> tuple[Chunk, ...]:
    """Cut bytes into chunks at borders (rules 1 to 4).

    Args:
        data: what to cut.
        borders: offsets in `data`, in any order; those outside are left out.
        minimum: smaller neighbours are merged until they have so many bytes.
        maximum: of a chunk.
    """
    inside = sorted({0, len(data), *(border for border in borders if 0 < border < len(data))})
    spans = (
        piece
        for span in _merged(data, itertools.pairwise(inside), minimum)
        for piece in _split(*span, minimum, maximum)
    )
    return tuple(Chunk(hashlib.sha256(data[start:end]).digest(), start, end - start) for start, end in spans)


def _merged(data: Sliceable, spans: Iterable[tuple[int, int]], minimum: int) -> Iterator[tuple[int, int]]:
    """Rules 2 and 3."""
    first = last = 0
    for start, end in spans:
        alone = end - start >= ALONE_BYTES
        if last > first and alone:
            yield first, last
            first = start
        last = end
        if alone or (end - first >= minimum and _ends_here(data, end, end - start)):
            yield first, end
            first = end
    if last > first:
        yield first, last


def _ends_here(data: Sliceable, end: int, length: int) -> bool:
    """By chance, but always the same for the same bytes: once in `USUAL_EXTRA_BYTES`, for spans of any length."""
    return zlib.crc32(data[max(end - DECIDING_BYTES, 0) : end]) * USUAL_EXTRA_BYTES < length << 32


def _split(start: int, end: int, minimum: int, maximum: int) -> Iterator[tuple[int, int]]:
    """Pieces of the greatest length; the last is not so small that it would better be merged."""
    while end - start > maximum:
        length = min(maximum, max(end - start - minimum, 1))
        yield start, start + length
        start += length
    yield start, end


def cut_file(path: Path) -> tuple[Chunk, ...]:
    """Cut a file at the borders that its kind has: tensors, lines, or none.

    Raises:
        OSError: it cannot be read, or is no plain file.
    """
    descriptor = _open(path)
    try:
        data = FileBytes(descriptor)
        return cut(data, _borders(path, data)) if len(data) else ()
    finally:
        os.close(descriptor)


def _borders(path: Path, data: FileBytes) -> tuple[int, ...]:
    suffix = path.suffix.lower()
    if suffix == ".onnx":
        return onnx_borders(data)
    if suffix in TEXTS:
        return line_borders(data)
    xml = path.with_suffix(".xml")
    if suffix == ".bin" and xml.is_file() and not xml.is_symlink() and xml.stat().st_size <= MAX_XML_BYTES:
        return ir_borders(xml.read_bytes(), len(data))
    return ()


def _open(path: Path) -> int:
    """Open a plain file and nothing else: neither a link, nor a pipe that never ends."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"not a plain file: {path}")
    return descriptor


class ChunkSource:
    """Every chunk of the files in some folders, such as the slots of a device.

    A file that cannot be read has no chunks; folders need not exist.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self._places: dict[bytes, tuple[Path, int]] = {}
        for path in (path for folder in folders for path in _plain_files(folder)):
            try:
                chunks = cut_file(path)
            except OSError:
                continue  # what cannot be read is fetched
            for chunk in chunks:
                self._places.setdefault(chunk.sha256, (path, chunk.start))

    def __contains__(self, sha256: bytes) -> bool:
        return sha256 in self._places

    def __len__(self) -> int:
        return len(self._places)

    def read(self, sha256: bytes, length: int) -> bytes | None:
        """The chunk of that hash and length; None where there is none, or no longer (rule 5)."""
        if sha256 not in self._places:
            return None
        path, start = self._places[sha256]
        try:
            descriptor = _open(path)
            try:
                data = FileBytes(descriptor)[start : start + length]
            finally:
                os.close(descriptor)
        except OSError:
            return None  # the same as bit rot: what cannot be read is fetched
        return data if hashlib.sha256(data).digest() == sha256 else None


def _plain_files(folder: Path) -> Iterator[Path]:
    """In a fixed order; links are not followed."""
    for place, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(place, name) for name in sorted(names))
