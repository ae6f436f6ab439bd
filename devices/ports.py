"""Inputs and outputs of a model, as a runtime tells them, held against what every model of a bundle has.

A model has one input `image` (uint8, 1 x H x W x 3, static) and the outputs that its entry lists: `mask` (uint8,
1 x H x W) and, on request, `logits` (float32, 1 x K x H x W).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from edge_ilseg.bundle import ModelEntry
from edge_ilseg.errors import BundleError

INPUT_NAME = "image"
OUTPUT_LAYOUT = {"mask": ("uint8", 3), "logits": ("float32", 4)}
"""Element type and number of axes of each output."""

Shape = tuple[int | None, ...]


class Port(msgspec.Struct, frozen=True):
    """One input or output as the model declares it; `None` is a size that is not static."""

    dtype: str
    shape: Shape

    def __str__(self) -> str:
        return f"{self.dtype} {' x '.join('?' if size is None else str(size) for size in self.shape)}"


def check_input(inputs: Mapping[str, Port], path: Path) -> tuple[int, int]:
    """Height and width of the one input, in pixels; raises `BundleError` for another input."""
    match inputs:
        case {"image": Port(dtype="uint8", shape=(1, int(height_px), int(width_px), 3))} if len(inputs) == 1:
            return height_px, width_px
    raise BundleError(
        "the model's input is not an image",
        where=path,
        found=", ".join(f"{name}: {port}" for name, port in inputs.items()) or "no input",
        expected=f"{INPUT_NAME}: uint8 1 x height x width x 3",
        hint="export the bundle again",
    )


def check_outputs(outputs: Mapping[str, Port], entry: ModelEntry, height_px: int, width_px: int, path: Path) -> None:
    """Raise `BundleError` unless the outputs are those of the entry, at the size of the input."""
    for name in dict.fromkeys(("mask", *entry.outputs)):
        port = outputs.get(name)
        found = None if port is None else (port.dtype, port.shape[:1], port.shape[-2:], len(port.shape))
        dtype, axes = OUTPUT_LAYOUT[name]
        if found != (dtype, (1,), (height_px, width_px), axes):
            raise BundleError(
                "the model does not have the outputs that the manifest declares",
                where=path,
                found=", ".join(f"{item}: {port}" for item, port in outputs.items()),
                expected=f"{name}: {dtype} 1 x {'K x ' if name == 'logits' else ''}{height_px} x {width_px}",
                hint="export the bundle again",
            )


def onnxruntime_port(port: Any) -> Port:
    """An `onnxruntime.NodeArg` as a port."""
    names = {"tensor(uint8)": "uint8", "tensor(float)": "float32"}
    return Port(
        dtype=names.get(port.type, port.type),
        shape=tuple(size if isinstance(size, int) else None for size in port.shape),
    )


def openvino_ports(ports: list[Any], known: tuple[str, ...]) -> dict[str, Port]:
    """Ports by name. A port may carry several names: the one we look for counts."""
    found = {}
    for port in ports:
        names = sorted(port.get_names()) or ["(no name)"]
        name = next((item for item in known if item in names), names[0])
        shape = tuple(size.get_length() if size.is_static else None for size in port.get_partial_shape())
        kind = port.get_element_type().get_type_name()
        found[name] = Port(dtype={"u8": "uint8", "f32": "float32"}.get(kind, kind), shape=shape)
    return found
