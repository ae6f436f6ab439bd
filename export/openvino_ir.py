"""OpenVINO IR from ONNX: fp32, fp16 (weights stored in half precision), and int8 from the QDQ graph.

1. The input stays what it is in the ONNX: `image`, uint8, 1 x H x W x 3.
2. The same ONNX gives the same bytes. OpenVINO numbers the layers that it adds by a counter of the process; they are
   renamed after the layer they feed.
3. The runtime reads the ONNX and its own passes tidy it up: `openvino.convert_model` gives the same layers in more
   than ten times the time, and reports each use to its makers.
4. `rt_info["model_info"]` is what OpenVINO's Model API reads, `rt_info["edge_ilseg"]` is ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from edge_ilseg.bundle import Precision
from edge_ilseg.devices.runtime import import_openvino, openvino_core
from edge_ilseg.errors import ExportError
from edge_ilseg.files import sync_file

NUMBERED = re.compile(r"[A-Za-z]+_\d+")


def model_api_info(classes: Sequence[str]) -> dict[str, str]:
    """What OpenVINO's Model API has to know of a segmentation model; a label cannot hold a space there."""
    return {
        "model_type": "segmentation",
        "labels": " ".join(name.replace(" ", "_") for name in classes),
        "resize_type": "standard",
        "reverse_input_channels": "False",
        "return_soft_prediction": "False",
    }


def write_ir(onnx_path: Path, xml_path: Path, precision: Precision, info: Mapping[str, Mapping[str, str]]) -> None:
    """Convert an ONNX file to `xml_path` and, beside it, a `.bin` of the same name.

    Args:
        onnx_path: float for fp32 and fp16, the QDQ graph for int8.
        xml_path: ends in `.xml`.
        precision: fp32 and int8 store weights as they are, fp16 in half precision.
        info: sections of `rt_info`, each a mapping of keys to texts.

    Raises:
        ExportError: OpenVINO cannot convert the graph.
    """
    ov = import_openvino()
    # The module that convert_model and NNCF use; OpenVINO has no public name for it.
    from openvino._offline_transformations import apply_moc_transformations

    try:
        model = openvino_core().read_model(str(onnx_path))
    except RuntimeError as error:
        raise ExportError(
            "OpenVINO cannot convert the graph",
            where=onnx_path,
            found=" ".join(str(error).split())[:300],
            hint="install the version of openvino that constraints.txt names, or export --target onnx alone",
        ) from error
    apply_moc_transformations(model, cf=False)
    _name_added_layers(model, _names_of(onnx.load(onnx_path, load_external_data=False)))
    model.set_friendly_name("edge_ilseg")
    model.inputs[0].get_node().set_layout(ov.Layout("NHWC"))
    for section, entries in info.items():
        for key, value in entries.items():
            model.set_rt_info(value, [section, key])
    ov.save_model(model, str(xml_path), compress_to_fp16=precision == "fp16")
    sync_file(xml_path)
    sync_file(xml_path.with_suffix(".bin"))


def _names_of(model: onnx.ModelProto) -> frozenset[str]:
    graph = model.graph
    names = {item.name for item in (*graph.node, *graph.initializer, *graph.input, *graph.output)}
    return frozenset(names.union(*(node.output for node in graph.node)))


def _name_added_layers(model: Any, onnx_names: frozenset[str]) -> None:
    """Rule 2: from the results back, a numbered layer becomes `<layer that it feeds>/<input there>`."""
    layers = model.get_ordered_ops()
    order = {layer.get_name(): number for number, layer in enumerate(layers)}
    for layer in reversed(layers):
        name = layer.get_friendly_name()
        if name in onnx_names or not NUMBERED.fullmatch(name):
            continue
        readers = [reader for output in layer.outputs() for reader in output.get_target_inputs()]
        if not readers:
            continue
        first = min(readers, key=lambda reader: (order[reader.get_node().get_name()], reader.get_index()))
        layer.set_friendly_name(f"{first.get_node().get_friendly_name()}/{first.get_index()}")
