"""Where tensors lie in a model file: the places at which cutting it keeps an unchanged tensor one unchanged piece.

1. A border is a hint. It decides how much of an old file is found again, never what a file holds: bytes that are no
   such file, or a damaged one, give fewer borders or none, and no error.
2. Work and memory are bounded by the file: one pass, nothing recursive, at most `MAX_BORDERS` borders.
3. Neither the onnx package nor an XML parser is needed, so that a device cuts its own files as the publisher did.

ONNX is protobuf: ModelProto.graph = 7, GraphProto.initializer = 5 with the packed numbers or raw bytes of a tensor
(onnx/onnx.proto). An OpenVINO IR names offset and size in its .bin in the `<data>` of every Const layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Protocol

MAX_BORDERS = 1 << 20
VARINT, FIXED_64, BYTES, FIXED_32 = 0, 1, 2, 5
"""Wire types; groups (3 and 4) are not in ONNX."""
GRAPH, INITIALIZER = 7, 5
PAYLOADS = frozenset({4, 5, 7, 9, 10, 11})
"""TensorProto: float_data, int32_data, int64_data, raw_data, double_data, uint64_data."""
MAX_HEADER_BYTES = 20
"""Of a field: tag and length, a varint each."""
PIECE_BYTES = 1 << 20
DATA_TAG = re.compile(rb"<data\b[^<>]*>")
"""Stops at the next tag, so that a text of broken tags is still read once."""
OFFSET, SIZE = re.compile(rb'\boffset="(\d{1,19})"'), re.compile(rb'\bsize="(\d{1,19})"')

Span = tuple[int, int]
"""Begin and end, as a slice has them."""


class Sliceable(Protocol):
    """Bytes that need not lie in memory: `bytes`, or a file."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> bytes: ...


def onnx_borders(data: Sliceable) -> tuple[int, ...]:
    """Offsets at which the numbers of an initializer begin or end, or a node or another entry of the graph begins."""
    borders: set[int] = set()
    for entry in _graph_entries(data):
        borders.update(entry)
        if len(borders) > MAX_BORDERS:
            return ()
    return tuple(sorted(borders))


def onnx_tensors(data: Sliceable) -> tuple[Span, ...]:
    """Where the numbers of each initializer lie, in the order of the file."""
    return tuple((entry[2], entry[3]) for entry in _graph_entries(data) if len(entry) == 4)


def ir_borders(xml: bytes, bin_bytes: int) -> tuple[int, ...]:
    """Offsets in a .bin of `bin_bytes` bytes at which a constant of the network in `xml` begins or ends."""
    return tuple(sorted({border for span in ir_tensors(xml, bin_bytes) for border in span}))


def ir_tensors(xml: bytes, bin_bytes: int) -> tuple[Span, ...]:
    """Where the constants of the network in `xml` lie in its .bin; equal ones that share a place are named once."""
    spans: set[Span] = set()
    for tag in DATA_TAG.finditer(xml):
        offset, size = OFFSET.search(tag[0]), SIZE.search(tag[0])
        if offset and size and 0 < int(size[1]) <= bin_bytes - int(offset[1]):
            spans.add((int(offset[1]), int(offset[1]) + int(size[1])))
        if len(spans) > MAX_BORDERS // 2:
            return ()
    return tuple(sorted(spans))


def line_borders(data: Sliceable) -> tuple[int, ...]:
    """Offsets at which a line of a text begins."""
    borders = [0]
    for start in range(0, len(data), PIECE_BYTES):
        piece = data[start : start + PIECE_BYTES]
        end = piece.find(b"\n")
        while end >= 0:
            borders.append(start + end + 1)
            if len(borders) > MAX_BORDERS:
                return ()
            end = piece.find(b"\n", end + 1)
    return tuple(borders)


def _graph_entries(data: Sliceable) -> Iterator[tuple[int, ...]]:
    """Begin and end of each entry of the graph; of an initializer those of its numbers, too."""
    for number, begin, start, end in fields(data, 0, len(data)):
        yield begin, end
        if number != GRAPH:
            continue
        for inner, inner_begin, inner_start, inner_end in fields(data, start, end):
            payload: tuple[int, ...] = ()
            if inner == INITIALIZER:
                parts = [(a, b) for part, _, a, b in fields(data, inner_start, inner_end) if part in PAYLOADS and a < b]
                payload = max(parts, key=lambda span: span[1] - span[0], default=())
            yield (inner_begin, inner_end, *payload)


def fields(data: Sliceable, begin: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Number, begin, start of the content and end of each length-delimited field; stops where bytes are no field."""
    while begin < end:
        header = data[begin : min(begin + MAX_HEADER_BYTES, end)]
        tag, used = varint(header, 0)
        kind = tag & 7
        if kind == BYTES:
            length, used = varint(header, used)
        elif kind == VARINT:
            _, used = varint(header, used)
            length = 0
        else:
            length = {FIXED_64: 8, FIXED_32: 4}.get(kind, -1)
        start = begin + used
        if used == 0 or length < 0 or length > end - start:
            return
        if kind == BYTES:
            yield tag >> 3, begin, start, start + length
        begin = start + length


def varint(data: bytes, position: int) -> tuple[int, int]:
    """A number of 7 bits a byte, and the position after it; the position is 0 where there is none."""
    value = 0
    for count in range(10):
        if position + count >= len(data):
            break
        byte = data[position + count]
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            return value, position + count + 1
    return 0, 0
