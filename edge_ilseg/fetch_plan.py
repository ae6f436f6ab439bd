"""What a device must fetch of a pack: decided from the index and from what it has, and nothing else.

1. A chunk that is there already is not fetched; one that is not comes as it is stored, or as a difference where its
   base is there and the difference is smaller.
2. Neighbours in the pack are one range; so are two with less than `MERGE_GAP_BYTES` between them, because a request
   costs more than that.
3. A chunk made of base and difference is taken only if base and result have their hashes; that checks the difference,
   too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import msgspec

from edge_ilseg.codecs import apply_difference, decompress
from edge_ilseg.errors import PackError
from edge_ilseg.pack_index import PackChunk, PackDifference, PackIndex

MERGE_GAP_BYTES = 1 << 10


class ChunkFetch(msgspec.Struct, frozen=True, gc=False):
    """One chunk that the device lacks, and the bytes of the pack that it comes from."""

    chunk: int
    """Number of the chunk in the index."""
    offset: int
    stored_bytes: int
    codec: int
    base_sha256: bytes | None = None
    """Of a chunk that the device has; None: the bytes are the chunk itself."""
    base_length: int = 0


class FetchPlan(msgspec.Struct, frozen=True):
    """What to fetch, in the order of the pack."""

    ranges: tuple[tuple[int, int], ...]
    """Begin and end (exclusive) in the pack; they rise and do not touch."""
    bytes: int
    """Of all ranges."""
    chunks: tuple[ChunkFetch, ...]


def fetch_plan(index: PackIndex, has: Callable[[bytes], bool]) -> FetchPlan:
    """Plan what is fetched of a pack by someone who has the chunks for whose SHA-256 `has` says so (rules 1 and 2)."""
    differences: dict[int, PackDifference] = {}
    for item in index.differences:
        best = differences.get(item.chunk, index.chunks[item.chunk])
        if item.stored_bytes < best.stored_bytes and has(item.base_sha256):
            differences[item.chunk] = item
    fetches = [
        _fetch(number, chunk, differences.get(number))
        for number, chunk in enumerate(index.chunks)
        if not has(chunk.sha256)
    ]
    fetches.sort(key=lambda fetch: fetch.offset)
    ranges = _merge((fetch.offset, fetch.offset + fetch.stored_bytes) for fetch in fetches)
    return FetchPlan(ranges, sum(end - start for start, end in ranges), tuple(fetches))


def _fetch(number: int, chunk: PackChunk, difference: PackDifference | None) -> ChunkFetch:
    if difference is None:
        return ChunkFetch(number, chunk.offset, chunk.stored_bytes, chunk.codec)
    return ChunkFetch(
        number,
        difference.offset,
        difference.stored_bytes,
        difference.codec,
        difference.base_sha256,
        difference.base_length,
    )


def _merge(spans: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Rule 2, for spans that rise."""
    merged: list[tuple[int, int]] = []
    for start, end in spans:
        if merged and start - merged[-1][1] < MERGE_GAP_BYTES:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return tuple(merged)


def rebuild_chunk(index: PackIndex, fetch: ChunkFetch, stored: bytes, base: bytes | None = None) -> bytes:
    """The chunk that `fetch` is for (rule 3).

    Args:
        index: of the pack.
        fetch: of a plan for that index.
        stored: the bytes of the pack that `fetch` names.
        base: the chunk `fetch.base_sha256`, which has `fetch.base_length` bytes; None if `fetch` has no base.

    Raises:
        UpdateError: the bytes, or those of the base, are not what the index speaks of.
    """
    chunk = index.chunks[fetch.chunk]
    if fetch.base_sha256 is None:
        data = decompress(fetch.codec, stored, chunk.length)
    else:
        _check_hash(base or b"", fetch.base_sha256, "the base of a difference is missing, or another one", fetch)
        data = apply_difference(fetch.codec, stored, base or b"", chunk.length)
    _check_hash(data, chunk.sha256, "a fetched chunk is damaged", fetch)
    return data


def _check_hash(data: bytes, sha256: bytes, what: str, fetch: ChunkFetch) -> None:
    found = hashlib.sha256(data).digest()
    if found != sha256:
        raise PackError(
            what,
            where=f"chunk {fetch.chunk}, bytes {fetch.offset} to {fetch.offset + fetch.stored_bytes} of the pack",
            found=f"{len(data)} bytes, sha256 {found.hex()[:12]}",
            expected=f"sha256 {sha256.hex()[:12]}",
        )
