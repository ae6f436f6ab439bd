"""Networks that a device must survive, built from the exact one of `bundles.py`, and slots that hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from bundles import GROWN, HEIGHT_PX, WIDTH_PX, color_network
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edge_ilseg.bundle import read_manifest
from edge_ilseg.devices.limits import Limits
from edge_ilseg.devices.update.release import PackRef, Release, WatchLimits, pack_path

ENDLESS = 1 << 40
"""Iterations: years."""


def make_slot(bundle: Path, *, validation: Path | None = None) -> Path:
    """A slot as the agent stages it, from a bundle that is moved into it."""
    slot = bundle.with_name(f"{bundle.name}-slot")
    slot.mkdir()
    bundle.rename(slot / "bundle")
    if validation is not None:
        validation.rename(slot / "validation")
    return slot


def release_of(slot: Path, limits: Limits | None = None, *, number: int = 1, bundle_id: str | None = None) -> Release:
    """A release that names a slot's bundle."""
    content_id = "c" * 64
    manifest = read_manifest(slot / "bundle")
    return Release(
        format="edge-ilseg-release",
        format_version=1,
        release=number,
        published="2026-01-01T00:00:00+00:00",
        bundle_id=bundle_id or manifest.bundle_id,
        step_index=manifest.step.index,
        step_name=manifest.step.name,
        pack=PackRef(pack_path(content_id), 1000, 100, content_id),
        limits=limits or Limits(),
        watch=WatchLimits(),
    )


def nan_network(names: Sequence[str] = tuple(GROWN)) -> onnx.ModelProto:
    """All logits are not numbers."""
    model = color_network(names)
    (bias,) = (item for item in model.graph.initializer if item.name == "bias")
    bias.CopyFrom(numpy_helper.from_array(np.full(len(names), np.nan, np.float32), "bias"))
    return model


def looping_network(iterations: int, names: Sequence[str] = tuple(GROWN)) -> onnx.ModelProto:
    """Right masks, after so many iterations of a loop over the image."""
    shape = [1, HEIGHT_PX, WIDTH_PX]
    body = helper.make_graph(
        [helper.make_node("Identity", ["goes_on"], ["still"]), helper.make_node("Sin", ["before"], ["after"])],
        "turn",
        [
            helper.make_tensor_value_info("turn_number", TensorProto.INT64, []),
            helper.make_tensor_value_info("goes_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("before", TensorProto.FLOAT, shape),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("after", TensorProto.FLOAT, shape),
        ],
    )
    nodes = [helper.make_node("Loop", ["turns", "yes", "brightest"], ["burden"], body=body)]
    return _burdened(names, nodes, {"turns": np.array(iterations, np.int64), "yes": np.array(True)})


def hungry_network(mib: int, names: Sequence[str] = tuple(GROWN)) -> onnx.ModelProto:
    """Right masks, and an intermediate result of so many MiB, twice."""
    copies = (mib << 20) // (4 * HEIGHT_PX * WIDTH_PX)
    nodes = [
        helper.make_node("Unsqueeze", ["brightest", "first"], ["one"]),
        helper.make_node("Expand", ["one", "many"], ["copies"]),
        helper.make_node("Add", ["copies", "copies"], ["doubled"]),
        helper.make_node("ReduceMax", ["doubled", "first"], ["burden"], keepdims=0),
    ]
    return _burdened(
        names, nodes, {"first": np.array([0]), "many": np.array([copies, 1, HEIGHT_PX, WIDTH_PX], np.int64)}
    )


def _burdened(
    names: Sequence[str], nodes: Sequence[onnx.NodeProto], constants: Mapping[str, NDArray[np.generic]]
) -> onnx.ModelProto:
    """The exact network, whose logits wait for `burden` (from `brightest`, 1 x H x W) and are not changed by it."""
    model = color_network(names)
    graph = model.graph
    position, conv = next((number, node) for number, node in enumerate(graph.node) if node.op_type == "Conv")
    conv.output[0] = "clean"
    added = [
        helper.make_node("ReduceMax", ["float_NHWC", "last"], ["brightest"], keepdims=0),
        *nodes,
        helper.make_node("Abs", ["burden"], ["size"]),
        helper.make_node("Min", ["size", "nothing"], ["none"]),  # always 0, which no optimiser can know
        helper.make_node("Unsqueeze", ["none", "channel_axis"], ["none_NCHW"]),
        helper.make_node("Add", ["clean", "none_NCHW"], ["logits"]),
    ]
    for offset, node in enumerate(added):
        graph.node.insert(position + 1 + offset, node)
    own = {"last": np.array([3]), "nothing": np.array(0, np.float32), "channel_axis": np.array([1])}
    graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value), name) for name, value in {**own, **constants}.items()
    )
    onnx.checker.check_model(model)
    return model
