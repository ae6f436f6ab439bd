"""The index of a pack: any bytes are an index or refused, and no name leaves its folder."""

from __future__ import annotations

import hashlib
import random
import tracemalloc
from collections.abc import Iterable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_ilseg.chunks import MAX_CHUNK_BYTES
from edge_ilseg.codecs import LZMA, RAW, ZLIB, ZSTD, ZSTD_FROM_BASE
from edge_ilseg.devices.update.release import MAX_INDEX_BYTES, MAX_PACK_BYTES
from edge_ilseg.errors import UpdateError
from edge_ilseg.pack_index import (
    EMPTY_SHA256,
    MAX_NAME_BYTES,
    PackChunk,
    PackDifference,
    PackFile,
    PackIndex,
    check_name,
    encode_index,
    parse_index,
)


def sha(text: object) -> bytes:
    return hashlib.sha256(str(text).encode()).digest()


def make_index(
    files: dict[str, tuple[int, ...]],
    chunks: Iterable[tuple[int, int, int]],
    differences: Iterable[PackDifference] = (),
) -> PackIndex:
    """An index of chunks (length, codec, stored bytes), with offsets as they will be read."""
    listed = [PackChunk(sha(number), *chunk[:1], 0, chunk[2], chunk[1]) for number, chunk in enumerate(chunks)]
    entries = []
    for path, numbers in sorted(files.items(), key=lambda item: item[0].encode()):
        content = b"".join(listed[number].sha256 for number in numbers)
        sha256 = sha(content) if len(numbers) > 1 else (content or EMPTY_SHA256)
        entries.append(PackFile(path, sum(listed[number].length for number in numbers), sha256, numbers))
    index = PackIndex(tuple(entries), tuple(listed), tuple(differences))
    offset = len(encode_index(index))
    placed: list[list[PackChunk | PackDifference]] = [[], []]
    for items, kept in ((index.chunks, placed[0]), (index.differences, placed[1])):
        for item in items:
            kept.append(msgspec.structs.replace(item, offset=offset))
            offset += item.stored_bytes
    return PackIndex(index.files, tuple(placed[0]), tuple(placed[1]))  # type: ignore[arg-type]


def end_of(index: PackIndex) -> int:
    """Size of the pack."""
    stored = sum(item.stored_bytes for item in (*index.chunks, *index.differences))
    return len(encode_index(index)) + stored


def read(index: PackIndex) -> PackIndex:
    return parse_index(encode_index(index), pack_bytes=end_of(index))


def refused(data: bytes, pack_bytes: int, match: str) -> UpdateError:
    with pytest.raises(UpdateError, match=match) as caught:
        parse_index(data, pack_bytes=pack_bytes)
    return caught.value


DIFFERENCES = (
    PackDifference(0, sha("a"), 100, 0, 7, LZMA),
    PackDifference(1, sha("b"), 500, 0, 9, ZSTD_FROM_BASE),
)
SMALL = make_index(
    {"bundle/manifest.json": (0,), "bundle/models/a.onnx": (1, 0, 2), "validation/empty": ()},
    [(100, RAW, 100), (MAX_CHUNK_BYTES, ZSTD, 1000), (300, ZLIB, 299)],
    sorted(DIFFERENCES, key=lambda item: (item.chunk, item.base_sha256)),
)


@st.composite
def indexes(draw: st.DrawFn) -> PackIndex:
    """Any index that a publisher could write."""
    counts = draw(st.lists(st.integers(0, 5), max_size=6))
    names = draw(st.permutations(["bundle/a", "bundle/b/c.onnx", "validation/x", "bundle/ü/1", "bundle/d", "bundle/e"]))
    files: dict[str, tuple[int, ...]] = {}
    following = 0
    for name, count in sorted(zip(names, counts, strict=False), key=lambda item: item[0].encode()):
        numbers = []
        for _ in range(count):
            number = draw(st.integers(0, following)) if draw(st.booleans()) else following
            following += number == following
            numbers.append(number)
        files[name] = tuple(numbers)
    chunks = []
    for _ in range(following):
        length = draw(st.integers(1, MAX_CHUNK_BYTES))
        codec = draw(st.sampled_from((RAW, ZLIB, LZMA, ZSTD))) if length > 1 else RAW
        chunks.append((length, codec, length if codec == RAW else draw(st.integers(1, length - 1))))
    differences = []
    for number, (length, _, _) in enumerate(chunks):
        if length > 1 and draw(st.booleans()):
            codec = draw(st.sampled_from((ZLIB, ZSTD_FROM_BASE)))
            base_length = draw(st.integers(8, MAX_CHUNK_BYTES)) if codec == ZSTD_FROM_BASE else length
            stored = draw(st.integers(1, length - 1))
            differences.append(PackDifference(number, sha(("base", number)), base_length, 0, stored, codec))
    return make_index(files, chunks, differences)


@given(index=indexes())
@settings(max_examples=80, deadline=None)
def test_an_index_is_read_as_it_was_written(index: PackIndex) -> None:
    assert read(index) == index


def test_version_1_is_written_in_these_bytes() -> None:
    """The example of docs/pack-format.md."""
    index = make_index(
        {"bundle/manifest.json": (0,), "bundle/model.onnx": (1, 0)},
        [(5, RAW, 5), (300, ZSTD, 200)],
        [PackDifference(1, sha("base"), 290, 0, 17, ZSTD_FROM_BASE)],
    )
    expected = (
        b"EILPACK\x01"
        + (b"\x02" + b"\x01" + b"\x02")
        + (sha(0) + b"\x05" + b"\x00" + b"\x05")
        + (sha(1) + b"\xac\x02" + b"\x03" + b"\xc8\x01")
        + (sha("base") + b"\x01" + b"\x04" + b"\xa2\x02" + b"\x11")
        + (b"\x14bundle/manifest.json" + b"\x01" + b"\x00")
        + (b"\x11bundle/model.onnx" + b"\x02" + b"\x00" + b"\x02" + index.files[1].sha256)
    )
    assert encode_index(index) == expected
    parsed = parse_index(expected, pack_bytes=len(expected) + 5 + 200 + 17)
    assert parsed == index
    assert [item.offset - len(expected) for item in (*parsed.chunks, *parsed.differences)] == [0, 5, 205]


def test_an_index_that_ends_anywhere_is_refused() -> None:
    data = encode_index(SMALL)
    for end in range(len(data)):
        with pytest.raises(UpdateError):
            parse_index(data[:end], pack_bytes=end_of(SMALL) - len(data) + end)


@pytest.mark.parametrize("more", [b"\0", b"EILPACK\x01", bytes(500)])
def test_bytes_behind_the_index_are_refused(more: bytes) -> None:
    refused(encode_index(SMALL) + more, end_of(SMALL) + len(more), "behind the end")


def test_another_version_is_refused_with_what_to_do() -> None:
    data = bytearray(encode_index(SMALL))
    data[7] = 2
    error = refused(bytes(data), end_of(SMALL), "format that this version does not read")
    assert (error.found, error.expected) == ("version 2", "version 1")
    assert error.hint == "update edge-ilseg on this device"


@pytest.mark.parametrize("data", [b"", b"EILPACK", b"PK\x03\x04aaaaaaaaaaaaaaaa", b"<html>404 not found</html>"])
def test_what_is_no_index_is_called_so(data: bytes) -> None:
    refused(data, 1000, "not the index of a pack|ends early")


def test_an_error_names_the_place() -> None:
    with pytest.raises(UpdateError, match=r"packs/abc\.pack"):
        parse_index(b"", pack_bytes=5, where="packs/abc.pack")


@pytest.mark.parametrize("difference", [-1, 1, -100_000, 1 << 40])
def test_a_pack_of_another_size_is_refused(difference: int) -> None:
    """Rule 3: so no chunk lies outside the pack, and nothing of the pack is outside a chunk."""
    refused(encode_index(SMALL), end_of(SMALL) + difference, "do not fill the pack|a size that cannot be")


def test_an_index_that_is_too_large_is_not_read() -> None:
    refused(bytes(MAX_INDEX_BYTES + 1), MAX_PACK_BYTES, "a size that cannot be")
    refused(encode_index(SMALL), MAX_PACK_BYTES + 1, "a size that cannot be")


@pytest.mark.parametrize("place", [8, 9, 10])
@pytest.mark.parametrize("count", [b"\xff\xff\xff\xff\x0f", b"\xff\xff\xff\x7f", b"\xff\x7f"])
def test_a_count_that_the_bytes_cannot_hold_is_refused_without_memory(place: int, count: bytes) -> None:
    """Rule 1."""
    data = encode_index(SMALL)
    data = data[:place] + count + data[place + 1 :]
    tracemalloc.start()
    refused(data, end_of(SMALL) + len(count) - 1, "out of range")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_small_index_cannot_stand_for_more_than_a_pack_may_hold() -> None:
    """Rule 5: one chunk of 256 KiB, over and over, takes a byte each."""
    times = MAX_PACK_BYTES // MAX_CHUNK_BYTES
    chunk = [(MAX_CHUNK_BYTES, ZSTD, 20)]
    assert read(make_index({"bundle/zeros": (0,) * times}, chunk)).files[0].bytes == MAX_PACK_BYTES
    for files in ({"bundle/zeros": (0,) * (times + 1)}, {"bundle/a": (0,) * times, "bundle/b": (0,)}):
        index = make_index(files, chunk)
        refused(encode_index(index), end_of(index), "too large")


@pytest.mark.parametrize(
    ("chunk", "match"),
    [
        ((0, RAW, 0), "length of a chunk is out of range"),
        ((MAX_CHUNK_BYTES + 1, ZSTD, 5), "length of a chunk is out of range"),
        ((100, 4, 50), "codec of a chunk is out of range"),
        ((100, 127, 50), "codec of a chunk is out of range"),
        ((100, RAW, 99), "stored size of a chunk is out of range"),
        ((100, ZSTD, 100), "stored size of a chunk is out of range"),
        ((100, ZLIB, 0), "stored size of a chunk is out of range"),
        ((1, LZMA, 1), "stored size of a chunk is out of range"),
    ],
)
def test_a_chunk_that_cannot_be_is_refused(chunk: tuple[int, int, int], match: str) -> None:
    """Rule 5."""
    index = make_index({"bundle/a": (0,)}, [chunk])
    refused(encode_index(index), end_of(index), match)


@pytest.mark.parametrize(
    ("difference", "match"),
    [
        (PackDifference(2, sha("b"), 100, 0, 5, ZLIB), "chunk of a difference is out of range"),
        (PackDifference(1, sha("b"), 100, 0, 5, 5), "codec of a difference is out of range"),
        (PackDifference(1, sha("b"), 7, 0, 5, ZSTD_FROM_BASE), "length of a base is out of range"),
        (PackDifference(1, sha("b"), MAX_CHUNK_BYTES + 1, 0, 5, ZSTD_FROM_BASE), "length of a base is out of range"),
        (PackDifference(1, sha("b"), 100, 0, 100, ZLIB), "stored size of a chunk is out of range"),
        (PackDifference(0, sha("b"), 100, 0, 5, ZLIB), "not in its place"),
        (PackDifference(1, sha("a"), 100, 0, 5, ZLIB), "not in its place"),
    ],
)
def test_a_difference_that_cannot_be_is_refused(difference: PackDifference, match: str) -> None:
    first = PackDifference(1, sha("a"), 100, 0, 5, ZLIB)
    index = make_index({"bundle/a": (0, 1)}, [(100, RAW, 100), (100, RAW, 100)], [first, difference])
    refused(encode_index(index), end_of(index), match)


def test_a_difference_from_the_chunk_itself_is_refused() -> None:
    item = PackDifference(0, sha(0), 100, 0, 5, ZLIB)
    index = make_index({"bundle/a": (0,)}, [(100, RAW, 100)], [item])
    refused(encode_index(index), end_of(index), "from the chunk itself")


def test_a_chunk_that_is_there_twice_is_refused() -> None:
    """Rule 2."""
    index = make_index({"bundle/a": (0, 1)}, [(10, RAW, 10), (10, RAW, 10)])
    twice = msgspec.structs.replace(index, chunks=(index.chunks[0], index.chunks[0]))
    refused(encode_index(twice), end_of(twice), "in the index twice")


@pytest.mark.parametrize(
    ("numbers", "match"),
    [((0,), "is in no file"), ((0, 1, 2), "not in the index"), ((), "is in no file")],
)
def test_chunks_and_files_that_do_not_fit_together_are_refused(numbers: tuple[int, ...], match: str) -> None:
    """Rule 2."""
    index = make_index({"bundle/a": (0, 1)}, [(10, RAW, 10), (10, RAW, 10)])
    file = msgspec.structs.replace(index.files[0], chunks=numbers)
    changed = msgspec.structs.replace(index, files=(file,))
    refused(encode_index(changed), end_of(changed), match)


def test_a_chunk_before_the_first_is_refused() -> None:
    data = encode_index(make_index({"bundle/a": (0,)}, [(10, RAW, 10)]))
    assert data[-1] == 0
    refused(data[:-1] + b"\x01", len(data) + 10, "a chunk of a file is out of range")


@pytest.mark.parametrize(
    "number", [b"\x80\x00", b"\x81\x80\x00", b"\xff\xff\xff\xff\xff\x01", b"\x81\x80\x80\x80\x80\x00"]
)
def test_a_number_in_another_form_is_refused(number: bytes) -> None:
    """Rule 2: else the same index would have several content ids."""
    data = encode_index(make_index({"bundle/a": ()}, []))
    assert data[8:9] == b"\x00"
    refused(data[:8] + number + data[9:], len(data) + len(number) - 1, "shortest form")


LEAVING = [
    "../manifest.json",
    "bundle/../manifest.json",
    "bundle/..",
    "bundle/../../etc/passwd",
    "bundle/models/../../../x",
    "bundle/./manifest.json",
    "./bundle/manifest.json",
    "/etc/passwd",
    "/bundle/manifest.json",
    "//bundle/x",
    "bundle//x",
    "bundle/",
    "bundle",
    "bundle/x/",
    "validation",
    "validation/../bundle/x",
    "index",
    "state.json",
    "current/bundle/x",
    "slots/abc/bundle/x",
    "Bundle/x",
    "bundle2/x",
    "bundle\\x",
    "bundle/..\\..\\x",
    "bundle/a\\b",
    "C:/bundle/x",
    "C:bundle/x",
    "bundle/C:x",
    "bundle/x:stream",
    "\\\\server\\share\\x",
    "bundle/x\0",
    "bundle/x\0/../../y",
    "bundle/\n",
    "bundle/x\x1b[2J",
    "bundle/x\x7f",
    "bundle/x\x85",
    "bundle/...",
    "bundle/x.",
    "bundle/x ",
    "bundle/ ",
    "bundle/.. /x",
    "bundle /x",
    " bundle/x",
    "~/x",
    "bundle/e\u0301",
    "bundle/\u212b",
    "bundle/" + "x" * 256,
    "bundle/" + "é" * 128,
    "bundle/" + "/".join(["x"] * 32),
    "bundle/" + "/".join(["x" * 200] * 6),
    "%2e%2e/x",
    "file:///etc/passwd",
    "",
]


@pytest.mark.parametrize("name", LEAVING)
def test_a_name_that_leaves_its_folder_is_refused(name: str) -> None:
    """Rule 4."""
    with pytest.raises(UpdateError):
        check_name(name.encode())
    index = make_index({name: (0,)}, [(10, RAW, 10)])
    with pytest.raises(UpdateError):
        read(index)


@pytest.mark.parametrize(
    "name", [b"bundle/\xff", b"bundle/\xc0\xae\xc0\xae/x", b"bundle/\xed\xa0\x80", b"bundle/\xe2\x82"]
)
def test_a_name_that_is_no_utf_8_is_refused(name: bytes) -> None:
    """Rule 4: `\\xc0\\xae` is a dot to a decoder that is not strict."""
    with pytest.raises(UpdateError, match="UTF-8"):
        check_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "bundle/manifest.json",
        "bundle/models/onnx/model.int8.onnx",
        "validation/images/2026-01-01 12.00.jpg",
        "bundle/.hidden",
        "bundle/..x",
        "bundle/x..y",
        "bundle/größe/日本.json",
        "bundle/" + "x" * 255,
        "bundle/bundle/validation",
    ],
)
def test_a_plain_name_is_taken(name: str) -> None:
    assert check_name(name.encode()) == name


def test_a_name_of_the_greatest_length_is_taken_and_one_more_is_not() -> None:
    name = "bundle/" + "/".join(["x" * 200] * 5)
    name += "/" + "y" * (MAX_NAME_BYTES - len(name) - 1)
    assert check_name(name.encode()) == name
    with pytest.raises(UpdateError):
        check_name(name.encode() + b"y")


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (("bundle/a", "bundle/a"), "there twice"),
        (("bundle/b", "bundle/a"), "not in order"),
        (("bundle/A", "bundle/a"), "in case alone"),
        (("bundle/STRASSE", "bundle/straße"), "in case alone"),
        (("bundle/a", "bundle/a/b"), "a file and a folder"),
        (("bundle/a", "bundle/a!", "bundle/a/b/c"), "a file and a folder"),
        (("bundle/A", "bundle/a/b"), "a file and a folder"),
    ],
)
def test_names_that_cannot_stand_beside_each_other_are_refused(names: tuple[str, ...], match: str) -> None:
    """Rule 4."""
    files = tuple(PackFile(name, 0, EMPTY_SHA256, ()) for name in names)
    index = PackIndex(files, (), ())
    refused(encode_index(index), end_of(index), match)


def check_bytes(data: bytes, pack_bytes: int) -> bool:
    """Rules 1 and 2, for any bytes; whether they are an index."""
    try:
        index = parse_index(data, pack_bytes=pack_bytes)
    except UpdateError:
        return False
    assert encode_index(index) == data
    assert end_of(index) == pack_bytes
    return True


def mutated(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        place = chance.randrange(len(changed) + 1)
        match chance.randrange(5):
            case 0:
                changed[place : place + 1] = bytes([chance.randrange(256)])
            case 1:
                del changed[place : place + chance.choice((1, 1, 40))]
            case 2:
                changed[place:place] = chance.randbytes(chance.choice((1, 1, 4, 40)))
            case 3:
                other = chance.randrange(len(changed) + 1)
                changed[place : place + 35] = changed[other : other + 35]
            case 4 if changed:
                changed[place % len(changed)] ^= 1 << chance.randrange(8)
    return bytes(changed)


def fuzz_raw(data: bytes) -> None:
    check_bytes(data, len(data))
    check_bytes(b"EILPACK\x01" + data, 8 + len(data) + 5)


def fuzz_mutants(index: PackIndex, seed: int, count: int) -> None:
    chance = random.Random(seed)
    data = encode_index(index)
    for _ in range(count):
        changed = mutated(data, chance)
        for pack_bytes in (end_of(index), end_of(index) + len(changed) - len(data)):
            if check_bytes(changed, pack_bytes) and changed == data:
                assert parse_index(changed, pack_bytes=pack_bytes) == index


SEEDS = st.integers(0, 1 << 32)


@given(data=st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_an_index_or_refused(data: bytes) -> None:
    fuzz_raw(data)


@given(index=indexes(), seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_three_hundred_mutants_of_indexes_are_indexes_or_refused(index: PackIndex, seed: int) -> None:
    fuzz_mutants(index, seed, 10)


@pytest.mark.exhaustive
@given(data=st.binary(max_size=600))
@settings(max_examples=10_000, deadline=None)
def test_ten_thousand_times_any_bytes_are_an_index_or_refused(data: bytes) -> None:
    fuzz_raw(data)


@pytest.mark.exhaustive
@given(index=indexes(), seed=SEEDS)
@settings(max_examples=1_000, deadline=None)
def test_ten_thousand_mutants_of_indexes_are_indexes_or_refused(index: PackIndex, seed: int) -> None:
    fuzz_mutants(index, seed, 10)
