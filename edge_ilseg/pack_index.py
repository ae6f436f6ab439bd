"""The index of a pack: which files it holds, of which chunks they are made, and where those are stored.

1. Any bytes give an index or an `UpdateError`, nothing else; nothing is allocated that the bytes at hand do not hold.
2. There is one way to write an index down: what is read and written again is the same bytes. Numbers are in their
   shortest form, files in the order of their names, chunks in the order of their first use, each of them used.
3. What is stored lies back to back from the end of the index to the end of the pack, so that no offset can lie.
4. A name is `bundle/...` or `validation/...`, and stays there on any file system: see `check_name`. No name is there
   twice, also not in another case, and none is a folder of another.
5. A chunk has 1 byte to 256 KiB, and is never stored in more than it has; all files together have at most
   `MAX_PACK_BYTES`.

Format page: docs/pack-format.md.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator

import msgspec

from edge_ilseg.chunks import MAX_CHUNK_BYTES
from edge_ilseg.codecs import CODEC_NAMES, DIFFERENCE_NAMES, MIN_PREFIX_BYTES, RAW, ZSTD_FROM_BASE
from edge_ilseg.devices.update.release import MAX_INDEX_BYTES, MAX_PACK_BYTES, UPDATE_AGENT
from edge_ilseg.errors import PackError, UpdateError

MAGIC = b"EILPACK"
FORMAT_VERSION = 1
HASH_BYTES = 32
FOLDERS = ("bundle", "validation")
MAX_NAME_BYTES, MAX_PART_BYTES, MAX_PARTS = 1024, 255, 32
MIN_CHUNK_ENTRY_BYTES = MIN_DIFFERENCE_ENTRY_BYTES = HASH_BYTES + 3
MIN_FILE_ENTRY_BYTES = len("bundle/x") + 2
MAX_VARINT_BYTES = 5
EMPTY_SHA256 = hashlib.sha256(b"").digest()
PLAIN_NAMES = "rename the file, and publish it again"
Digest = bytes
"""Of SHA-256."""


class PackChunk(msgspec.Struct, frozen=True, gc=False):
    """A piece of one file or of several, and where it is stored."""

    sha256: bytes
    length: int
    offset: int
    """In the pack."""
    stored_bytes: int
    codec: int


class PackDifference(msgspec.Struct, frozen=True, gc=False):
    """Another way to get a chunk: from a chunk that some device has (`edge_ilseg.codecs`, rule 4)."""

    chunk: int
    """Number in `PackIndex.chunks`."""
    base_sha256: bytes
    base_length: int
    offset: int
    stored_bytes: int
    codec: int


class PackFile(msgspec.Struct, frozen=True, gc=False):
    """One file, made of chunks."""

    path: str
    bytes: int
    sha256: Digest
    chunks: tuple[int, ...]
    """Numbers in `PackIndex.chunks`, in the order of the file."""


class PackIndex(msgspec.Struct, frozen=True):
    """The table of contents of a pack."""

    files: tuple[PackFile, ...]
    chunks: tuple[PackChunk, ...]
    differences: tuple[PackDifference, ...]


def encode_index(index: PackIndex) -> bytes:
    """Write an index down; offsets follow from the order (rule 3) and are not looked at."""
    out = bytearray(MAGIC + bytes([FORMAT_VERSION]))
    out += b"".join(map(_varint, (len(index.chunks), len(index.differences), len(index.files))))
    for chunk in index.chunks:
        out += chunk.sha256 + _varint(chunk.length) + _varint(chunk.codec) + _varint(chunk.stored_bytes)
    for item in index.differences:
        out += item.base_sha256 + _varint(item.chunk) + _varint(item.codec)
        out += _varint(item.base_length) if item.codec == ZSTD_FROM_BASE else b""
        out += _varint(item.stored_bytes)
    following = 0
    for file in index.files:
        name = file.path.encode()
        out += _varint(len(name)) + name + _varint(len(file.chunks))
        for number in file.chunks:
            out += _varint(following - number if number < following else 0)
            following = max(following, number + 1)
        out += file.sha256 if len(file.chunks) > 1 else b""
    return bytes(out)


def parse_index(data: bytes, *, pack_bytes: int, where: object = None) -> PackIndex:
    """Turn the first bytes of a pack of `pack_bytes` bytes into its index (rules 1 to 5).

    Raises:
        UpdateError: of another version, or not such an index.
    """
    try:
        return _parse(data, pack_bytes)
    except UpdateError as error:
        raise PackError(
            error.what, where=where, found=error.found, expected=error.expected, hint=error.hint
        ) from error.__cause__


class _Reader:
    """Takes values from the front of bytes, and refuses when they end."""

    def __init__(self, data: bytes) -> None:
        self._data, self._position = data, 0

    @property
    def bytes_left(self) -> int:
        return len(self._data) - self._position

    def take(self, count: int, what: str) -> bytes:
        if count > self.bytes_left:
            raise PackError(
                "the index of the pack ends early", found=f"{self.bytes_left} bytes", expected=f"{count} bytes: {what}"
            )
        self._position += count
        return self._data[self._position - count : self._position]

    def number(self, what: str, least: int, most: int) -> int:
        """A number of 7 bits a byte, the lowest first, in its shortest form."""
        value = 0
        for place in range(MAX_VARINT_BYTES):
            byte = self.take(1, what)[0]
            value |= (byte & 0x7F) << (7 * place)
            if byte < 0x80:
                if byte == 0 and place > 0:
                    break
                if not least <= value <= most:
                    raise PackError(f"{what} is out of range", found=value, expected=f"{least} to {most}")
                return value
        raise PackError(f"{what} is not written as a number in its shortest form")

    def count(self, what: str, entry_bytes: int) -> int:
        """How many entries follow somewhere: no more than the bytes left can hold."""
        return self.number(f"the number of {what}", 0, self.bytes_left // entry_bytes)


def _parse(data: bytes, pack_bytes: int) -> PackIndex:
    if len(data) > MAX_INDEX_BYTES or not len(data) <= pack_bytes <= MAX_PACK_BYTES:
        raise PackError(
            "the pack, or its index, has a size that cannot be",
            found=f"index {len(data)} bytes, pack {pack_bytes} bytes",
            expected=f"at most {MAX_INDEX_BYTES} and {MAX_PACK_BYTES} bytes",
        )
    reader = _Reader(data)
    _check_head(reader.take(len(MAGIC) + 1, "name and version of the format"))
    chunk_count = reader.count("chunks", MIN_CHUNK_ENTRY_BYTES)
    difference_count = reader.count("differences", MIN_DIFFERENCE_ENTRY_BYTES)
    file_count = reader.count("files", MIN_FILE_ENTRY_BYTES)
    chunks, offset = _read_chunks(reader, chunk_count, len(data))
    differences, offset = _read_differences(reader, difference_count, chunks, offset)
    if offset != pack_bytes:
        raise PackError("the chunks do not fill the pack", found=f"{offset} bytes", expected=f"{pack_bytes} bytes")
    files = _read_files(reader, file_count, chunks)
    if reader.bytes_left:
        raise PackError("there are bytes behind the end of the index", found=f"{reader.bytes_left} bytes")
    return PackIndex(files, chunks, differences)


def _check_head(head: bytes) -> None:
    if head[:-1] != MAGIC:
        raise PackError("this is not the index of a pack", found=repr(head[:-1]), expected=repr(MAGIC))
    if head[-1] != FORMAT_VERSION:
        raise UpdateError(
            "the pack has a format that this version does not read",
            found=f"version {head[-1]}",
            expected=f"version {FORMAT_VERSION}",
            hint=UPDATE_AGENT,
        )


def _read_chunks(reader: _Reader, count: int, offset: int) -> tuple[tuple[PackChunk, ...], int]:
    """The chunks, and where the bytes of the last of them end."""
    chunks: dict[bytes, PackChunk] = {}
    for _ in range(count):
        sha256 = reader.take(HASH_BYTES, "the hash of a chunk")
        length = reader.number("the length of a chunk", 1, MAX_CHUNK_BYTES)
        codec = reader.number("the codec of a chunk", 0, len(CODEC_NAMES) - 1)
        stored_bytes = _read_stored_bytes(reader, codec, length)
        if sha256 in chunks:
            raise PackError("a chunk is in the index twice", found=f"sha256 {sha256.hex()[:12]}")
        chunks[sha256] = PackChunk(sha256, length, offset, stored_bytes, codec)
        offset += stored_bytes
    return tuple(chunks.values()), offset


def _read_differences(
    reader: _Reader, count: int, chunks: tuple[PackChunk, ...], offset: int
) -> tuple[tuple[PackDifference, ...], int]:
    differences: list[PackDifference] = []
    last = (-1, b"")
    for _ in range(count):
        base_sha256 = reader.take(HASH_BYTES, "the hash of a base")
        number = reader.number("the chunk of a difference", 0, len(chunks) - 1)
        base_length = length = chunks[number].length
        codec = reader.number("the codec of a difference", 0, len(DIFFERENCE_NAMES) - 1)
        if codec == ZSTD_FROM_BASE:
            base_length = reader.number("the length of a base", MIN_PREFIX_BYTES, MAX_CHUNK_BYTES)
        stored_bytes = _read_stored_bytes(reader, codec, length)
        if (number, base_sha256) <= last or base_sha256 == chunks[number].sha256:
            raise PackError(
                "a difference is not in its place, or there twice, or from the chunk itself", found=f"chunk {number}"
            )
        last = (number, base_sha256)
        differences.append(PackDifference(number, base_sha256, base_length, offset, stored_bytes, codec))
        offset += stored_bytes
    return tuple(differences), offset


def _read_stored_bytes(reader: _Reader, codec: int, length: int) -> int:
    """Rule 5."""
    least, most = (length, length) if codec == RAW else (1, length - 1)
    return reader.number("the stored size of a chunk", least, most)


def _read_files(reader: _Reader, count: int, chunks: tuple[PackChunk, ...]) -> tuple[PackFile, ...]:
    files: list[PackFile] = []
    following = total_bytes = 0
    last = b""
    for _ in range(count):
        name = reader.take(reader.number("the length of a name", 1, MAX_NAME_BYTES), "a name")
        path = check_name(name)
        if name <= last:
            raise PackError("the names in the index are not in order, or there twice", found=repr(path))
        last = name
        numbers = []
        for _ in range(reader.count("chunks of a file", 1)):
            back = reader.number("a chunk of a file", 0, following)
            numbers.append(following - back)
            following += back == 0
        if following > len(chunks):
            raise PackError("a file is made of chunks that are not in the index", where=path)
        length_bytes = sum(chunks[number].length for number in numbers)
        total_bytes += length_bytes
        if total_bytes > MAX_PACK_BYTES:
            raise PackError("the files of the pack are too large", expected=f"at most {MAX_PACK_BYTES} bytes")
        files.append(PackFile(path, length_bytes, _read_file_hash(reader, numbers, chunks), tuple(numbers)))
    if following != len(chunks):
        raise PackError("a chunk of the index is in no file", found=f"{len(chunks)} chunks, {following} used")
    _check_together([file.path for file in files])
    return tuple(files)


def _read_file_hash(reader: _Reader, numbers: list[int], chunks: tuple[PackChunk, ...]) -> bytes:
    """Written down only where it does not follow from the chunks."""
    if len(numbers) > 1:
        return reader.take(HASH_BYTES, "the hash of a file")
    return chunks[numbers[0]].sha256 if numbers else EMPTY_SHA256


def check_name(name: bytes) -> str:
    """The name as text, if it stays in its folder on any file system (rule 4).

    Raises:
        UpdateError: it is no UTF-8 in the form NFC, too long, absolute, has an empty part, `.`, `..`, a backslash, a
            colon, a control character, a part that ends in a dot or a space, or begins with none of `FOLDERS`.
    """
    try:
        text = name.decode()
    except UnicodeDecodeError as error:
        raise UpdateError("a name in the pack is not UTF-8", found=repr(name[:200]), hint=PLAIN_NAMES) from error
    parts = text.split("/")
    if (
        parts[0] not in FOLDERS
        or not 2 <= len(parts) <= MAX_PARTS
        or len(name) > MAX_NAME_BYTES
        or any(part == "" or part[-1] in ". " or len(part.encode()) > MAX_PART_BYTES for part in parts)
        or any(letter in "\\:" or unicodedata.category(letter) == "Cc" for letter in text)
        or not unicodedata.is_normalized("NFC", text)
    ):
        raise UpdateError(
            "a name in the pack leaves its folder, or would on some file system",
            found=repr(text[:200]),
            expected=f"a plain relative name below {' or '.join(FOLDERS)}",
            hint=PLAIN_NAMES,
        )
    return text


def _check_together(paths: list[str]) -> None:
    """Rule 4 for names beside each other: a file system may know no case."""
    files = {path.casefold() for path in paths}
    if len(files) < len(paths):
        raise UpdateError("two names in the pack differ in case alone", hint=PLAIN_NAMES)
    for path in files:
        for folder in _folders(path):
            if folder in files:
                raise PackError("a name in the pack is a file and a folder", found=repr(folder))


def _folders(path: str) -> Iterator[str]:
    end = path.find("/")
    while end >= 0:
        yield path[:end]
        end = path.find("/", end + 1)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
