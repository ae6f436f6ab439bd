"""The int8 ranges as data: `ranges.json`. Statistics of activations, never images.

1. Every range is finite and `lowest <= highest`; the values are float32, written so that they are read back exactly.
2. `graph_sha256` names the float graph that the ranges belong to; they fit no other.
3. Each range says where it comes from: the steps whose images it covers, whether it was measured, carried from the
   parent or merged with the parent's, and the hash of everything that its tensor depends on.
4. `channels` is the tensor's passport (`edge_ilseg.calibration.passport`); it warns, and decides nothing.
5. Only this version's format is read; unknown fields are refused. Format page: docs/bundle-format.md.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import msgspec

from edge_ilseg.errors import BundleError, ExportError
from edge_ilseg.files import write_bytes
from edge_ilseg.int8_record import RangesMethod, RangesPolicy
from edge_ilseg.records import parse_versioned

FORMAT = "edge-ilseg-ranges"
FORMAT_VERSION = 2
MAX_RANGES_BYTES = 16 << 20
CALIBRATE_AGAIN = "restore the file from a copy, or calibrate again with this version"

Origin = Literal["measured", "carried", "merged"]


class TensorRange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The values that one activation tensor takes."""

    lowest: float
    highest: float
    steps: tuple[str, ...]
    """Names of the steps whose images the range covers, the earliest first."""
    origin: Origin
    """`carried`: the parent's, verbatim; `merged`: the envelope of the parent's and the measured one."""
    subgraph_sha256: str
    channels: bytes
    """Lowest, then highest level of each channel, one byte each."""


class Ranges(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One range for every quantized activation tensor of a float ONNX, in the order of its graph."""

    format: Literal["edge-ilseg-ranges"]
    format_version: int
    method: RangesMethod
    policy: RangesPolicy
    step: str
    image_ids: tuple[str, ...]
    images_sha256: str
    graph_sha256: str
    parent_graph_sha256: str | None
    """Of the parent's ranges that these were made with; None: without any."""
    tensors: dict[str, TensorRange]

    def count(self, origin: Origin) -> int:
        """How many tensors have this origin."""
        return sum(item.origin == origin for item in self.tensors.values())


def check_ranges(ranges: Ranges, *, where: object = None) -> None:
    """Check rule 1.

    Raises:
        ExportError: a range is not finite or upside down, or there is none; the error names the tensor.
    """
    if not ranges.tensors:
        raise ExportError("the ranges name no tensor", where=where, hint=CALIBRATE_AGAIN)
    for name, tensor in ranges.tensors.items():
        check_range(name, tensor.lowest, tensor.highest, where=where)


def check_range(name: str, lowest: float, highest: float, *, where: object = None) -> None:
    """Check rule 1 for one tensor.

    Raises:
        ExportError: names the tensor.
    """
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        what = "a range is not finite: the network overflows on a calibration image"
    elif lowest > highest:
        what = "a range is upside down"
    else:
        return
    raise ExportError(
        what,
        where=where,
        found=f"tensor {name!r}: lowest {lowest}, highest {highest}",
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
        BundleError: the file is missing, not JSON, of another format or version, or has a wrong field or passport.
        ExportError: a range breaks rule 1.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise BundleError("the ranges are missing", where=path, hint=CALIBRATE_AGAIN) from error
    if len(data) > MAX_RANGES_BYTES:
        raise BundleError("the ranges are too large", where=path, found=f"{len(data)} bytes", hint=CALIBRATE_AGAIN)
    ranges = parse_versioned(
        data,
        Ranges,
        format=FORMAT,
        version=FORMAT_VERSION,
        error=BundleError,
        what="the file of ranges",
        where=path,
        hint=CALIBRATE_AGAIN,
    )
    check_ranges(ranges, where=path)
    for name, tensor in ranges.tensors.items():
        if not tensor.channels or len(tensor.channels) % 2:
            raise BundleError(
                "the passport of a tensor cannot be read",
                where=path,
                found=f"tensor {name!r}: {len(tensor.channels)} levels",
                expected="two for each channel",
                hint="restore the file from a copy",
            )
    return ranges
