"""Getting a pack's content onto the disk of a device: the index, and then the chunks that the device lacks.

1. The index is believed because its hash is signed, a chunk because its hash is in the index; nothing else is believed.
2. What arrives is written to `<content id>.part` at its own place in the pack, and synced about every MiB. A start
   after a power cut checks every chunk in it, and fetches those that are wrong or lacking, and no others.
3. A connection that is cut goes on at the byte where it was cut, until the deadline (`tries.py`).
4. A chunk that arrives wrong is fetched a second time; wrong again, the repository holds other bytes than were signed.
5. Local chunks are read and hashed before they are counted on: what has rotted is fetched.
6. Any error leaves the part, but for one: where a *sync* fails it is removed, because what is read back from the page
   cache afterwards is not what is on the disk.
7. One chunk and one piece are in memory at a time, beside the index.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path

import msgspec

from edge_ilseg.chunks import ChunkSource
from edge_ilseg.codecs import ZSTD, ZSTD_FROM_BASE, decompress
from edge_ilseg.devices.update.part_file import PartFile, check_space, disk_errors
from edge_ilseg.devices.update.release import PackRef
from edge_ilseg.devices.update.transport import Transport, TransportError
from edge_ilseg.devices.update.tries import Tries
from edge_ilseg.errors import UpdateError
from edge_ilseg.fetch_plan import MERGE_GAP_BYTES, ChunkFetch, fetch_plan, rebuild_chunk
from edge_ilseg.pack_index import PackIndex, parse_index
from edge_ilseg.progress import ProgressCallback, no_progress

SYNC_BYTES = 1 << 20
MAX_WRONG = 2
"""Times that the same bytes may arrive wrong."""
A_BY_ZSTD = bytes.fromhex("28b52ffd200109000061")
"""The letter a, packed."""


class FetchedContent(msgspec.Struct, frozen=True):
    """Every chunk of the index is in the part, or in the source that was given."""

    index: PackIndex
    part: Path
    fetched_bytes: int
    """Arrived in this call, of index and chunks."""
    reused_bytes: int
    """Of the chunks that the device had, unpacked."""


def fetch_content(
    transport: Transport,
    pack: PackRef,
    source: ChunkSource,
    incoming: Path,
    *,
    deadline_s: float,
    progress: ProgressCallback = no_progress,
) -> FetchedContent:
    """Fetch what a device lacks of a pack (rules 1 to 7).

    Args:
        transport: to the repository.
        pack: as it is signed.
        source: the chunks that the device has.
        incoming: folder for the part and the index; made if it is not there.
        deadline_s: for everything that comes from the repository.
        progress: told how far it is.

    Raises:
        TransportError: the bytes did not come.
        UpdateError: other bytes came than were signed, the disk is full or fails, or a codec is missing here.
    """
    with disk_errors(incoming):
        incoming.mkdir(parents=True, exist_ok=True)
    tries = Tries(deadline_s)
    index, index_bytes = _get_index(transport, pack, incoming / f"{pack.index_sha256}.index", tries)
    local = _Local(index, source)
    with PartFile(incoming / f"{pack.index_sha256}.part", pack.bytes) as part:
        fetch = _Fetch(transport, pack.path, index, part, local, tries, progress)
        while lacking := [item for item in fetch_plan(index, local.has).chunks if not fetch.is_there(item.chunk)]:
            if any(item.codec in (ZSTD, ZSTD_FROM_BASE) for item in lacking):
                decompress(ZSTD, A_BY_ZSTD, 1)  # where zstd is missing, that is said before a byte is fetched
            slot_bytes = sum(file.bytes for file in index.files)
            check_space(incoming, sum(item.stored_bytes for item in lacking) + slot_bytes)
            fetch.get(lacking)  # and again, where a local chunk was lost meanwhile
        part.sync()
    reused_bytes = sum(chunk.length for chunk in index.chunks if local.has(chunk.sha256))
    return FetchedContent(index, part.path, index_bytes + fetch.fetched_bytes, reused_bytes)


def open_chunks(fetched: FetchedContent, source: ChunkSource) -> Callable[[int], bytes]:
    """A function that gives any chunk of the index by its number, checked.

    It raises `UpdateError` where the chunk has been lost since: fetching again mends that.
    """
    forms = _forms(fetched.index)

    def chunk(number: int) -> bytes:
        entry = fetched.index.chunks[number]
        data = source.read(entry.sha256, entry.length)
        if data is None and fetched.part.is_file():
            with PartFile(fetched.part, None) as part:
                data = _from_part(fetched.index, forms[number], source, part)
        if data is None:
            raise UpdateError(
                "a chunk of the fetched content has been lost or damaged on this device",
                where=fetched.part,
                found=f"chunk {number} is not there",
                hint="fetch the release again",
            )
        return data

    return chunk


def _get_index(transport: Transport, pack: PackRef, path: Path, tries: Tries) -> tuple[PackIndex, int]:
    """The index, from the disk or from the repository, and how many bytes of it came from there."""
    data, fetched_bytes = _read_index(path, pack), 0
    while data is None:
        arrived = _fetch_index(transport, pack, tries)
        fetched_bytes += len(arrived)
        if hashlib.sha256(arrived).hexdigest() == pack.index_sha256:
            data = arrived
            with disk_errors(path), path.open("wb") as file:  # a torn one is found by its hash, too
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        elif fetched_bytes >= MAX_WRONG * pack.index_bytes:
            raise _other_bytes(pack.path, "the index of the pack has another hash")
    return parse_index(data, pack_bytes=pack.bytes, where=pack.path), fetched_bytes


def _read_index(path: Path, pack: PackRef) -> bytes | None:
    """From an earlier start."""
    try:
        if path.stat().st_size != pack.index_bytes:
            return None
        data = path.read_bytes()
    except OSError:
        return None  # not there, or not to be read: it is fetched
    return data if hashlib.sha256(data).hexdigest() == pack.index_sha256 else None


def _fetch_index(transport: Transport, pack: PackRef, tries: Tries) -> bytes:
    data = bytearray()
    while len(data) < pack.index_bytes:
        try:
            for piece in transport.read_range(pack.path, len(data), pack.index_bytes):
                data += piece
                tries.progressed()
        except TransportError as error:
            tries.failed(error)
    return bytes(data)


class _Local:
    """What the device has, read and hashed once (rule 5)."""

    def __init__(self, index: PackIndex, source: ChunkSource) -> None:
        self.source = source
        self._lengths = {item.base_sha256: item.base_length for item in index.differences}
        self._lengths.update((chunk.sha256, chunk.length) for chunk in index.chunks)
        self._known: dict[bytes, bool] = {}

    def has(self, sha256: bytes) -> bool:
        if sha256 not in self._known:
            self._known[sha256] = self.source.read(sha256, self._lengths[sha256]) is not None
        return self._known[sha256]

    def lose(self, sha256: bytes) -> None:
        """It was there, and is no longer."""
        self._known[sha256] = False


class _Fetch:
    """The chunks of one pack on their way into the part."""

    def __init__(
        self,
        transport: Transport,
        path: str,
        index: PackIndex,
        part: PartFile,
        local: _Local,
        tries: Tries,
        progress: ProgressCallback,
    ) -> None:
        self._transport, self._path, self._index, self._part = transport, path, index, part
        self._local, self._tries, self._progress = local, tries, progress
        self._forms = _forms(index)
        self._there: set[int] = set()
        self._wrong: Counter[int] = Counter()
        self._position = self._unsynced_bytes = self._done_bytes = self._total_bytes = 0
        self.fetched_bytes = 0

    def is_there(self, number: int) -> bool:
        """Whether the part has the chunk, in any form (rule 2)."""
        if number not in self._there:
            data = _from_part(self._index, self._forms[number], self._local.source, self._part)
            if data is not None:
                self._there.add(number)
        return number in self._there

    def get(self, lacking: Sequence[ChunkFetch]) -> None:
        """Fetch chunks, given in the order of the pack."""
        self._done_bytes, self._total_bytes = 0, sum(item.stored_bytes for item in lacking)
        left = deque(lacking)
        while left:
            group = _next_group(left, self._transport.has_ranges)
            self._position = group[0].offset
            while group:
                try:
                    self._stream(group)
                except TransportError as error:
                    self._tries.failed(error)

    def _stream(self, group: deque[ChunkFetch]) -> None:
        """Take chunks from the front of a group as they arrive: all of them, or until one is wrong."""
        with closing(self._transport.read_range(self._path, self._position, _end(group[-1]))) as pieces:
            for piece in pieces:
                self.fetched_bytes += len(piece)
                if not self._take(group, piece):
                    return
                self._tries.progressed()

    def _take(self, group: deque[ChunkFetch], piece: bytes) -> bool:
        """Write what belongs to a chunk, and check each chunk that is whole; `False`: one is wrong, and asked again."""
        start, stop = self._position, self._position + len(piece)
        while group and group[0].offset < stop:
            item = group[0]
            first, last = max(item.offset, start), min(_end(item), stop)
            self._part.write(first, piece[first - start : last - start])
            if _end(item) > stop:
                break
            if not self._is_right(item):
                self._position = item.offset
                return False
            group.popleft()
            self._done_bytes += item.stored_bytes
            self._progress("fetching", self._done_bytes / self._total_bytes)
        self._position = stop
        return True

    def _is_right(self, item: ChunkFetch) -> bool:
        """Check a chunk that has arrived (rules 2 and 4)."""
        base = _read_base(self._local.source, item)
        if item.base_sha256 is not None and base is None:
            self._local.lose(item.base_sha256)  # the next plan does without it
            return True
        try:
            rebuild_chunk(self._index, item, self._part.read(item.offset, item.stored_bytes), base)
        except UpdateError as error:
            self._wrong[item.offset] += 1
            if self._wrong[item.offset] >= MAX_WRONG:
                raise _other_bytes(self._path, error.one_line()) from error
            return False
        self._there.add(item.chunk)
        self._unsynced_bytes += item.stored_bytes
        if self._unsynced_bytes >= SYNC_BYTES:
            self._part.sync()
            self._unsynced_bytes = 0
        return True


def _next_group(left: deque[ChunkFetch], has_ranges: bool) -> deque[ChunkFetch]:
    """Take what one request fetches: neighbours, or all where every request begins at the start of the file."""
    group = deque([left.popleft()])
    while left and (not has_ranges or left[0].offset - _end(group[-1]) < MERGE_GAP_BYTES):
        group.append(left.popleft())
    return group


def _end(item: ChunkFetch) -> int:
    return item.offset + item.stored_bytes


def _forms(index: PackIndex) -> tuple[tuple[ChunkFetch, ...], ...]:
    """For each chunk, all the ways to get it from the pack."""
    forms = [
        [ChunkFetch(number, chunk.offset, chunk.stored_bytes, chunk.codec)] for number, chunk in enumerate(index.chunks)
    ]
    for item in index.differences:
        forms[item.chunk].append(
            ChunkFetch(item.chunk, item.offset, item.stored_bytes, item.codec, item.base_sha256, item.base_length)
        )
    return tuple(map(tuple, forms))


def _from_part(index: PackIndex, forms: Sequence[ChunkFetch], source: ChunkSource, part: PartFile) -> bytes | None:
    """A chunk that the part has in one of its forms."""
    for item in forms:
        with suppress(UpdateError):  # it has never arrived, or not whole
            stored = part.read(item.offset, item.stored_bytes)
            return rebuild_chunk(index, item, stored, _read_base(source, item))
    return None


def _read_base(source: ChunkSource, item: ChunkFetch) -> bytes | None:
    return None if item.base_sha256 is None else source.read(item.base_sha256, item.base_length)


def _other_bytes(path: str, found: str) -> UpdateError:
    return UpdateError(
        "the repository holds other bytes than were signed",
        where=path,
        found=found,
        hint="publish or copy the pack again; a proxy on the way may be at fault, too",
    )
