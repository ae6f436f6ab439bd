"""A model file taken apart: its constants by name, and whatever describes one layer each."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import onnx


class Pieces(NamedTuple):
    """A model file, or an IR's two, taken apart."""

    constants: dict[str, bytes]
    others: Counter[bytes]
    """Whatever describes one layer, and how often it is there."""


def take_apart(paths: Sequence[Path]) -> Pieces:
    """The pieces of a model: of an ONNX file, or of an IR's .xml and .bin."""
    return _onnx_pieces(paths[0]) if paths[0].suffix == ".onnx" else _ir_pieces(*paths)


def read_constants(paths: Sequence[Path]) -> dict[str, bytes]:
    """The bytes of every constant of a model, by name: of an ONNX file, or of an IR's .xml and .bin."""
    return take_apart(paths).constants


def _onnx_pieces(path: Path) -> Pieces:
    model = onnx.load(path)
    constants = {item.name: onnx.numpy_helper.to_array(item).tobytes() for item in model.graph.initializer}
    others: list[bytes] = []
    for item in model.graph.initializer:
        bare = onnx.TensorProto(name=item.name, data_type=item.data_type, dims=item.dims)
        others.append(bare.SerializeToString(deterministic=True))
    graph = model.graph
    for piece in (*graph.node, *graph.value_info, *graph.input, *graph.output, *model.metadata_props):
        others.append(piece.SerializeToString(deterministic=True))
    return Pieces(constants, Counter(others))


def _ir_pieces(xml_path: Path, bin_path: Path) -> Pieces:
    xml, weights = xml_path.read_bytes(), bin_path.read_bytes()
    constants = {}
    for layer in ElementTree.fromstring(xml).iter("layer"):  # written by OpenVINO a moment ago, or by hash
        data = layer.find("data")
        if layer.get("type") == "Const" and data is not None:
            start = int(data.get("offset", 0))
            constants[str(layer.get("name"))] = weights[start : start + int(data.get("size", 0))]
    return Pieces(constants, Counter(xml.splitlines(keepends=True)))
