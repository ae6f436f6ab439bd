"""The int8 ranges as data: `ranges.json`. Statistics of activations, never images.

1. Every range is finite and `lowest <= highest`; the values are float32, written so that they are read back exactly.
2. `graph_sha256` names the float graph that the ranges belong to; they fit no other.
3. `TensorRange.step` names the step whose images the range was taken from.
4. Only this version's format is read; unknown fields are refused. Format page: docs/bundle-format.md.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import msgspec

from edge_ilseg.errors import BundleError, ExportError
from edge_ilseg.files import write_bytes
from edge_ilseg.records import parse_versioned

FORMAT = "edge-ilseg-ranges"
FORMAT_VERSION = 1
MAX_RANGES_BYTES = 16 << 20


class TensorRange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The values that one activation tensor takes."""

    lowest: float
    highest: float
    step: str


class Ranges(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One range for every quantized activation tensor of a float ONNX, in the order of its graph."""

    format: Literal["edge-ilseg-ranges"]
    format_version: int
    method: Literal["minmax"]
    image_ids: tuple[str, ...]
    images_sha256: str
    graph_sha256: str
    tensors: dict[str, TensorRange]


def check_ranges(ranges: Ranges, *, where: object = None) -> None:
    """Check rule 1.

    Raises:
        ExportError: a range is not finite or upside down, or there is none; the error names the tensor.
    """
    if not ranges.tensors:
        raise ExportError("the ranges name no tensor", where=where)
    for name, tensor in ranges.tensors.items():
        if not (math.isfinite(tensor.lowest) and math.isfinite(tensor.highest)):
            what = "a range is not finite: the network overflows on a calibration image"
        elif tensor.lowest > tensor.highest:
            what = "a range is upside down"
        else:
            continue
        raise ExportError(
            what,
            where=where,
            found=f"tensor {name!r}: lowest {tensor.lowest}, highest {tensor.highest}",
            expected="two finite numbers, lowest <= highest",
            hint="calibrate again; if that gives the same, look at the weights that feed this tensor",
        )


def write_ranges(path: Path, ranges: Ranges) -> None:
    """Write `ranges` to `path`.

    Raises:
        ExportError: a range breaks rule 1; nothing is written.
    """
    check_ranges(ranges, where=path)
    write_bytes(path, msgspec.json.format(msgspec.json.encode(ranges), indent=1) + b"\n")


def read_ranges(path: Path) -> Ranges:
    """Read and check a `ranges.json`.

    Raises:
        BundleError: the file is missing, not JSON, of another format or version, or has a wrong field.
        ExportError: a range breaks rule 1.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise BundleError("the ranges are missing", where=path) from error
    if len(data) > MAX_RANGES_BYTES:
        raise BundleError("the ranges are too large", where=path, found=f"{len(data)} bytes")
    ranges = parse_versioned(
        data,
        Ranges,
        format=FORMAT,
        version=FORMAT_VERSION,
        error=BundleError,
        what="the file of ranges",
        where=path,
        hint="restore the file from a copy, or calibrate again with this version",
    )
    check_ranges(ranges, where=path)
    return ranges
