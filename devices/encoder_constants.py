"""The constants of the encoder in a model's file, hashed on the device: without the onnx package or an XML parser.

1. The hash is that of the export (`edge_ilseg.export.delta.encoder_sha256`): names and bytes of all constants whose
   name begins with `encoder.`, in the order of their names.
2. A file that has none, or that cannot be taken apart, has no hash.

ONNX is protobuf: ModelProto.graph = 7, GraphProto.initializer = 5; of a TensorProto data_type = 2, float_data = 4,
int32_data = 5, int64_data = 7, name = 8, raw_data = 9 (onnx/onnx.proto). The integers are varints, one a value.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from html import unescape
from pathlib import Path

from edge_ilseg.bundle import ModelEntry
from edge_ilseg.errors import BundleError
from edge_ilseg.files import disk_error
from edge_ilseg.tensor_borders import GRAPH, INITIALIZER, fields, varint

ENCODER = "encoder."
NOTHING = hashlib.sha256().hexdigest()
"""What the export's hash of an encoder without a constant is."""
DATA_TYPE, FLOAT_DATA, INT32_DATA, INT64_DATA, NAME, RAW_DATA = 2, 4, 5, 7, 8, 9
VALUE_BYTES = {2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 9: 1, 10: 2, 16: 2}
"""TensorProto.DataType -> bytes of a value, of those that `int32_data` holds."""
CONSTANT = re.compile(r"<layer\b([^<>]*)>\s*<data\b([^<>]*)>")
ATTRIBUTE = re.compile(r'([\w.]+)="([^"]*)"')


def hash_encoder(folder: Path, entry: ModelEntry) -> str | None:
    """The hash of a model's encoder as its files have it.

    Raises:
        BundleError: it is not what the manifest says, or a file cannot be read.
    """
    try:
        found = encoder_sha256(folder, entry.files)
    except OSError as error:
        raise disk_error(error, folder / entry.files[0]) from error
    if entry.encoder_sha256 not in (None, NOTHING, found):
        raise BundleError(
            "the encoder in the model's file is not the one that the manifest speaks of",
            where=folder / entry.files[0],
            found=f"constants with hash {found[:12] if found else 'none'}",
            expected=str(entry.encoder_sha256)[:12],
            hint="export the step again",
        )
    return found


def encoder_sha256(folder: Path, files: Sequence[str]) -> str | None:
    """The hash of rule 1 of a model in a bundle; None: rule 2.

    Args:
        folder: of the bundle.
        files: of the model: an .onnx, or an .xml and its .bin.

    Raises:
        OSError: a file cannot be read.
    """
    first = folder / files[0]
    if first.suffix == ".onnx":
        constants = _onnx_constants(first.read_bytes())
    else:
        constants = _ir_constants(first.read_text("utf-8", errors="replace"), (folder / files[1]).read_bytes())
    if not constants:
        return None
    digest = hashlib.sha256()
    for name, value in sorted(constants.items()):
        digest.update(f"{name}\0{len(value)}\0".encode())
        digest.update(value)
    return digest.hexdigest()


def _onnx_constants(model: bytes) -> dict[str, bytes]:
    constants = {}
    for number, _, start, end in fields(model, 0, len(model)):
        if number != GRAPH:
            continue
        for inner, _, inner_start, inner_end in fields(model, start, end):
            if inner == INITIALIZER:
                name, value = _tensor(model[inner_start:inner_end])
                if name.startswith(ENCODER):
                    constants[name] = value
    return constants


def _tensor(tensor: bytes) -> tuple[str, bytes]:
    """Name and bytes of a TensorProto."""
    parts = {number: tensor[start:end] for number, _, start, end in fields(tensor, 0, len(tensor))}
    name = parts.get(NAME, b"").decode("utf-8", errors="replace")
    for kept in (RAW_DATA, FLOAT_DATA):
        if kept in parts:
            return name, parts[kept]
    if INT64_DATA in parts:
        return name, _unpacked(parts[INT64_DATA], 8)
    return name, _unpacked(parts.get(INT32_DATA, b""), VALUE_BYTES.get(_data_type(tensor), 4))


def _unpacked(packed: bytes, value_bytes: int) -> bytes:
    """The values of packed varints, each in so many bytes, little-endian; a negative one is a varint of 64 bits."""
    values = bytearray()
    position = 0
    while position < len(packed):
        value, position = varint(packed, position)
        if position == 0:
            break
        values += (value & ((1 << (8 * value_bytes)) - 1)).to_bytes(value_bytes, "little")
    return bytes(values)


def _data_type(tensor: bytes) -> int:
    """Field 2, a varint among the length-delimited ones: the only one whose tag is 0x10."""
    position = 0
    while position < len(tensor):
        tag, position = varint(tensor, position)
        kind = tag & 7
        if position == 0 or kind not in (0, 2):
            return 0
        value, position = varint(tensor, position)
        if tag >> 3 == DATA_TYPE and kind == 0:
            return value
        if kind == 2:
            position += value
    return 0


def _ir_constants(xml: str, weights: bytes) -> dict[str, bytes]:
    constants = {}
    for layer, data in CONSTANT.findall(xml):
        found, place = dict(ATTRIBUTE.findall(layer)), dict(ATTRIBUTE.findall(data))
        name = unescape(found.get("name", ""))
        if found.get("type") == "Const" and name.startswith(ENCODER) and {"offset", "size"} <= place.keys():
            start = int(place["offset"])
            constants[name] = weights[start : start + int(place["size"])]
    return constants
