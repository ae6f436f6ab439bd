"""The plan of a fetch: every chunk that lacks, the cheaper way, in few requests; a chunk is believed by its hash."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_ilseg.codecs import RAW, ZLIB, ZSTD_FROM_BASE, compress_smallest, difference_smallest
from edge_ilseg.errors import UpdateError
from edge_ilseg.fetch_plan import MERGE_GAP_BYTES, ChunkFetch, FetchPlan, fetch_plan, rebuild_chunk
from edge_ilseg.pack_index import PackChunk, PackDifference, PackIndex

INDEX_BYTES = 500
OLD = b"".join(b"line %d of an old text\n" % (number * 31 % 97) for number in range(60))
NEW = OLD.replace(b"line 31", b"a line that is new")


def sha(data: object) -> bytes:
    return hashlib.sha256(data if isinstance(data, bytes) else str(data).encode()).digest()


def make_index(stored: list[int], differences: list[tuple[int, str, int]] | None = None) -> PackIndex:
    """Chunks of so many stored bytes, called 0, 1, ...; differences: (chunk, name of the base, stored bytes)."""
    offset = INDEX_BYTES
    chunks, others = [], []
    for number, stored_bytes in enumerate(stored):
        chunks.append(PackChunk(sha(number), 9999, offset, stored_bytes, ZLIB))
        offset += stored_bytes
    for number, base, stored_bytes in differences or []:
        others.append(PackDifference(number, sha(base), 8888, offset, stored_bytes, ZSTD_FROM_BASE))
        offset += stored_bytes
    return PackIndex((), tuple(chunks), tuple(others))


def plan(index: PackIndex, *has: object) -> FetchPlan:
    return fetch_plan(index, {sha(item) for item in has}.__contains__)


def test_a_device_with_nothing_fetches_every_chunk_in_one_range() -> None:
    """Rule 2."""
    found = plan(make_index([100, 5000, 1], [(1, "base", 7)]))
    assert found.ranges == ((500, 5601),)
    assert found.bytes == 5101
    assert [item.chunk for item in found.chunks] == [0, 1, 2]
    assert found.chunks[1] == ChunkFetch(1, 600, 5000, ZLIB)


def test_a_device_with_everything_fetches_nothing() -> None:
    assert plan(make_index([100, 5000], [(1, "base", 7)]), 0, 1, "base") == FetchPlan((), 0, ())


def test_a_chunk_that_is_there_is_not_fetched() -> None:
    """Rule 1."""
    found = plan(make_index([100, 5000, 300]), 1)
    assert found.ranges == ((500, 600), (5600, 5900))
    assert (found.bytes, [item.chunk for item in found.chunks]) == (400, [0, 2])


def test_a_smaller_difference_is_fetched_where_its_base_is_there() -> None:
    """Rule 1."""
    index = make_index([100, 5000], [(1, "base", 40)])
    assert plan(index, "base").chunks == (ChunkFetch(0, 500, 100, ZLIB), _difference(index, 0))
    assert plan(index).chunks[1] == ChunkFetch(1, 600, 5000, ZLIB)


def _difference(index: PackIndex, number: int) -> ChunkFetch:
    item = index.differences[number]
    return ChunkFetch(item.chunk, item.offset, item.stored_bytes, item.codec, item.base_sha256, item.base_length)


def test_the_smallest_difference_whose_base_is_there_is_taken() -> None:
    """Rule 1."""
    index = make_index([5000], [(0, "a", 40), (0, "b", 30), (0, "c", 20)])
    assert plan(index, "a", "b").chunks == (_difference(index, 1),)
    assert plan(index, "a").chunks == (_difference(index, 0),)
    assert plan(index, "a", "b", "c").chunks == (_difference(index, 2),)


@pytest.mark.parametrize("stored_bytes", [100, 101])
def test_a_difference_that_is_not_smaller_is_not_taken(stored_bytes: int) -> None:
    """Rule 1."""
    assert plan(make_index([100], [(0, "base", stored_bytes)]), "base").chunks == (ChunkFetch(0, 500, 100, ZLIB),)


@pytest.mark.parametrize(("gap", "ranges"), [(MERGE_GAP_BYTES - 1, 1), (MERGE_GAP_BYTES, 2)])
def test_a_small_gap_is_fetched_along_and_a_greater_one_is_not(gap: int, ranges: int) -> None:
    """Rule 2."""
    found = plan(make_index([10, gap, 20]), 1)
    assert len(found.ranges) == ranges
    assert found.bytes == 30 + (gap if ranges == 1 else 0)
    assert [item.chunk for item in found.chunks] == [0, 2]


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_every_chunk_that_lacks_lies_in_one_of_the_ranges(data: st.DataObject) -> None:
    stored = data.draw(st.lists(st.integers(1, 3000), max_size=12))
    numbers = st.integers(0, max(len(stored) - 1, 0))
    listed = data.draw(st.lists(st.tuples(numbers, st.sampled_from("abc"), st.integers(1, 3000)), max_size=8))
    index = make_index(stored, listed if stored else [])
    has = set(data.draw(st.lists(st.sampled_from([*map(str, range(len(stored))), *"abc"]))))
    found = plan(index, *has)
    assert [item.chunk for item in sorted(found.chunks, key=lambda item: item.chunk)] == [
        number for number in range(len(stored)) if str(number) not in has
    ]
    for item in found.chunks:
        assert any(start <= item.offset and item.offset + item.stored_bytes <= end for start, end in found.ranges)
        assert item.stored_bytes <= index.chunks[item.chunk].stored_bytes
    assert found.bytes == sum(end - start for start, end in found.ranges)
    for (_, end), (start, _) in zip(found.ranges, found.ranges[1:], strict=False):
        assert start - end >= MERGE_GAP_BYTES
    covered = {item.offset for item in found.chunks} | {item.offset + item.stored_bytes for item in found.chunks}
    assert {border for span in found.ranges for border in span} <= covered


@pytest.fixture
def stored() -> tuple[PackIndex, bytes, bytes]:
    """An index of `NEW`, its chunk, and its difference from `OLD`."""
    codec, chunk = compress_smallest(NEW)
    found = difference_smallest(NEW, OLD)
    assert found is not None
    item = PackChunk(sha(NEW), len(NEW), 0, len(chunk), codec)
    other = PackDifference(0, sha(OLD), len(OLD), len(chunk), len(found[1]), found[0])
    return PackIndex((), (item,), (other,)), chunk, found[1]


Stored = tuple[PackIndex, bytes, bytes]


def test_a_chunk_comes_of_its_bytes_and_of_base_and_difference(stored: Stored) -> None:
    index, chunk, difference = stored
    assert rebuild_chunk(index, fetch_plan(index, set().__contains__).chunks[0], chunk) == NEW
    (fetch,) = fetch_plan(index, {sha(OLD)}.__contains__).chunks
    assert (fetch.stored_bytes, fetch.base_length) == (len(difference), len(OLD))
    assert rebuild_chunk(index, fetch, difference, OLD) == NEW


@pytest.mark.parametrize("base", [None, b"", OLD[:-1], OLD + b"x", OLD.replace(b"old", b"odd"), NEW])
def test_another_base_is_refused(stored: Stored, base: bytes | None) -> None:
    """Rule 3."""
    index, _, difference = stored
    (fetch,) = fetch_plan(index, {sha(OLD)}.__contains__).chunks
    with pytest.raises(UpdateError, match="the base of a difference is missing, or another one"):
        rebuild_chunk(index, fetch, difference, base)


def test_bytes_that_give_another_chunk_of_the_same_length_are_refused(stored: Stored) -> None:
    """Rule 3."""
    index, _, _ = stored
    other = bytes(reversed(NEW))
    with pytest.raises(UpdateError, match=r"a fetched chunk is damaged\n.*chunk 0, bytes 0 to") as caught:
        rebuild_chunk(index, ChunkFetch(0, 0, len(other), RAW), other)
    assert sha(NEW).hex()[:12] in str(caught.value)
    (fetch,) = fetch_plan(index, {sha(OLD)}.__contains__).chunks
    wrong = difference_smallest(other, OLD)
    assert wrong is not None
    fetch = ChunkFetch(0, fetch.offset, len(wrong[1]), wrong[0], fetch.base_sha256, fetch.base_length)
    with pytest.raises(UpdateError, match="a fetched chunk is damaged"):
        rebuild_chunk(index, fetch, wrong[1], OLD)


def test_a_damaged_difference_is_refused(stored: Stored) -> None:
    """Rule 3: every byte of it, although the index has no hash of it."""
    index, _, difference = stored
    (fetch,) = fetch_plan(index, {sha(OLD)}.__contains__).chunks
    for place in range(len(difference)):
        changed = bytearray(difference)
        changed[place] ^= 0x10
        try:
            assert rebuild_chunk(index, fetch, bytes(changed), OLD) == NEW
        except UpdateError:
            continue
