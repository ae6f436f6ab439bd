"""How a chunk is stored, by the number of its codec: packed by itself, or as a difference from another chunk, its base.

1. Nothing is unpacked to more than its stated length plus one byte, whatever the packed bytes say; the working memory
   of each codec has a fixed limit, too.
2. Packed bytes that end early, go on behind their end, or give another length are refused.
3. 0 is raw, 1 zlib, 2 lzma (raw LZMA2, dictionary of 256 KiB), 3 zstd (one frame, window of at most 256 KiB). Python
   brings the first three; zstd needs `edge-ilseg[update]` before Python 3.14.
4. A difference packed by codec 0 to 3 is `new - base` modulo 256, byte by byte, for a base of the same length: int8
   weights whose scale moved change everywhere by little. One of codec 4 is a zstd frame that goes on from the base.
5. A wrong base gives wrong bytes and no error. Whoever checks the hashes of base and result has checked the difference.
"""

from __future__ import annotations

import lzma
import sys
import zlib
from collections.abc import Callable
from types import ModuleType
from typing import Protocol

from edge_ilseg.errors import PackError, UpdateError

RAW, ZLIB, LZMA, ZSTD, ZSTD_FROM_BASE = range(5)
CODEC_NAMES = ("raw", "zlib", "lzma", "zstd")
DIFFERENCE_NAMES = (*CODEC_NAMES, "zstd from base")
MIN_PREFIX_BYTES = 8
"""Of a base, for codec 4: zstd goes on from nothing shorter."""
WINDOW_LOG, PREFIX_WINDOW_LOG = 18, 19
"""256 KiB, the longest chunk; and the same behind a base."""
ZSTD_LEVEL = 19
LITERAL_CONTEXTS = ((0, 0), (3, 2), (4, 0))
"""`lc` and `pb` of LZMA that are tried: for bytes whose neighbours tell nothing (weights), its defaults, for texts."""


class _Reader(Protocol):
    """What the decompressors of all codecs have."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


def compress_smallest(data: bytes) -> tuple[int, bytes]:
    """Codec and packed bytes, the smallest of all codecs; of equally small ones that of the lowest number."""
    packed = [(RAW, data), (ZLIB, zlib.compress(data, 9)), (ZSTD, _zstd().compress(data, ZSTD_LEVEL))]
    for lc, pb in LITERAL_CONTEXTS:
        packed.append((LZMA, lzma.compress(data, lzma.FORMAT_RAW, filters=[_lzma_filter(lc, pb)])))
    return min(packed, key=lambda item: (len(item[1]), item[0]))


def decompress(codec: int, data: bytes, length: int) -> bytes:
    """Unpack `data` to exactly `length` bytes (rules 1 and 2).

    Raises:
        UpdateError: it is damaged, of another length, of an unknown codec, or of one that is missing here.
    """
    if codec == RAW:
        return _checked(data, length, RAW, len(data))
    if codec == ZLIB:
        return _unpack(zlib.decompressobj(), zlib.error, ZLIB, data, length)
    if codec == LZMA:
        reader = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[_lzma_filter()])
        return _unpack(reader, lzma.LZMAError, LZMA, data, length)
    if codec == ZSTD:
        zstd = _zstd()
        options = {zstd.DecompressionParameter.window_log_max: WINDOW_LOG}
        return _unpack(zstd.ZstdDecompressor(options=options), zstd.ZstdError, ZSTD, data, length)
    raise UpdateError(
        "a chunk is packed in a way that this version does not know",
        found=f"codec {codec}",
        expected=", ".join(f"{number} {name}" for number, name in enumerate(CODEC_NAMES)),
        hint="update edge-ilseg on this device",
    )


def difference_smallest(new: bytes, base: bytes) -> tuple[int, bytes] | None:
    """Codec and packed bytes of the smallest difference that makes `new` of `base` (rule 4), if there can be one."""
    found = []
    if len(new) == len(base):
        found.append(compress_smallest(subtract(new, base)))
    if len(base) >= MIN_PREFIX_BYTES:
        zstd = _zstd()
        parameter = zstd.CompressionParameter
        options = {parameter.compression_level: ZSTD_LEVEL, parameter.window_log: PREFIX_WINDOW_LOG}
        prefix = zstd.ZstdDict(base, is_raw=True).as_prefix
        found.append((ZSTD_FROM_BASE, zstd.compress(new, options=options, zstd_dict=prefix)))
    return min(found, key=lambda item: (len(item[1]), item[0]), default=None)


def apply_difference(codec: int, data: bytes, base: bytes, length: int) -> bytes:
    """Make exactly `length` bytes of a packed difference and its base (rules 1, 2 and 5).

    Raises:
        UpdateError: as `decompress`, or the base has a length that cannot be.
    """
    if codec != ZSTD_FROM_BASE:
        return add(decompress(codec, data, length), base)
    if len(base) < MIN_PREFIX_BYTES:
        raise PackError("the base of a difference is too short", found=f"{len(base)} bytes")
    zstd = _zstd()
    options = {zstd.DecompressionParameter.window_log_max: PREFIX_WINDOW_LOG}
    reader = zstd.ZstdDecompressor(zstd_dict=zstd.ZstdDict(base, is_raw=True).as_prefix, options=options)
    return _unpack(reader, zstd.ZstdError, ZSTD_FROM_BASE, data, length)


def subtract(new: bytes, base: bytes) -> bytes:
    """`new - base` modulo 256, byte by byte.

    Raises:
        UpdateError: they have different lengths.
    """
    return _bytewise(new, base, lambda a, b, high: ((a | high) - (b & ~high)) ^ ((a ^ b ^ high) & high))


def add(difference: bytes, base: bytes) -> bytes:
    """`base + difference` modulo 256, byte by byte: what `subtract` was given.

    Raises:
        UpdateError: they have different lengths.
    """
    return _bytewise(difference, base, lambda a, b, high: ((a & ~high) + (b & ~high)) ^ ((a ^ b) & high))


def _bytewise(first: bytes, second: bytes, operation: Callable[[int, int, int], int]) -> bytes:
    """One operation on two long numbers whose bytes do not carry into each other: as fast as numpy, without it."""
    length = len(first)
    if length != len(second):
        raise PackError("a difference and its base have different lengths", found=f"{length} and {len(second)} bytes")
    high = int.from_bytes(b"\x80" * length, "little")
    result = operation(int.from_bytes(first, "little"), int.from_bytes(second, "little"), high)
    return result.to_bytes(length, "little")


def _unpack(reader: _Reader, error: type[Exception], codec: int, data: bytes, length: int) -> bytes:
    try:
        result = reader.decompress(data, length + 1)
    except error as cause:
        raise PackError(f"a chunk cannot be unpacked by {DIFFERENCE_NAMES[codec]}", found=str(cause)) from cause
    if len(result) <= length and (not reader.eof or reader.unused_data):
        raise PackError(
            f"a chunk packed by {DIFFERENCE_NAMES[codec]} does not end where it should",
            found="bytes behind the end" if reader.eof else "no end",
        )
    return _checked(result, length, codec, len(data))


def _checked(result: bytes, length: int, codec: int, packed_bytes: int) -> bytes:
    if len(result) != length:
        more = "more than " if len(result) > length else ""
        raise PackError(
            "a chunk has another length than the index says",
            found=f"{more}{min(len(result), length)} bytes, of {packed_bytes} bytes of {DIFFERENCE_NAMES[codec]}",
            expected=f"{length} bytes",
        )
    return result


def _lzma_filter(lc: int = 3, pb: int = 2) -> dict[str, int]:
    """`lc` and `pb` are written in the stream; a reader needs the size of the dictionary alone."""
    return {"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 1 << WINDOW_LOG, "lc": lc, "lp": 0, "pb": pb}


def _zstd() -> ModuleType:
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError as error:
        raise UpdateError(
            "a chunk is packed by zstd, and there is no zstd here",
            found=str(error),
            hint="pip install 'edge-ilseg[update]'",
        ) from error
    return zstd
