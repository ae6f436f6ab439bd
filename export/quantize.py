"""int8 from ranges: the float ONNX with QuantizeLinear and DequantizeLinear around what runs in int8 (QDQ).

1. Ranges and rounding decide: the same graph with the same of both gives the same bytes, with no image in sight.
2. Activations are uint8 per tensor, weights int8 per channel. With `reduce_range` weights use 7 of the 8 bits: the
   sums of two products then fit the 16 bits in which CPUs without VNNI or dot-product instructions add them. A
   depthwise convolution has no second product there, and keeps all 8.
3. What is quantized is decided in `edge_ilseg.calibration.collect`, less the layers that are to stay in float.
4. `write_weights_only` needs no range: weights are stored in int8 and multiplied out before they are used, so that the
   file is a quarter of the size, and the arithmetic, and the time it takes, is that of float.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from edge_ilseg.calibration.collect import QUANTIZED_OPS, fused_outputs, quantized_nodes, quantized_tensors
from edge_ilseg.calibration.ranges import Ranges, check_ranges
from edge_ilseg.errors import ExportError, choice_hint
from edge_ilseg.export.graph import strip_notes, write_onnx
from edge_ilseg.export.rounding import Rounding, round_weights
from edge_ilseg.files import sha256_file

FIRST, LAST = "first", "last"
INT8_HIGHEST = 127
ALL_BITS = {"symmetric": True, "reduce_range": False}
CALIBRATE_AGAIN = "calibrate this graph"


def find_float_layers(model: onnx.ModelProto, names: Sequence[str]) -> tuple[str, ...]:
    """Names of the nodes that are to stay in float, in graph order.

    Args:
        model: a float graph.
        names: `first` (the first convolution), `last` (the convolutions that no other follows), the name of a node
            (`encoder.stem.conv/Conv`), or of a module, for all nodes in it (`encoder.stages.0`).

    Raises:
        ExportError: a name fits no node that would be quantized.
    """
    nodes = quantized_nodes(model)
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    feeding = {name for node in convolutions for name in _all_before(model, node)}
    special = {
        FIRST: [node.name for node in convolutions[:1]],
        LAST: [node.name for node in convolutions if node.name not in feeding],
    }
    chosen: set[str] = set()
    for name in names:
        found = special.get(name) or [
            item for item in nodes if item == name or item.startswith((f"{name}.", f"{name}/"))
        ]
        if not found:
            raise ExportError(
                "there is no such layer to keep in float",
                found=repr(name),
                expected=f"{FIRST}, {LAST}, or a node or module of the graph, as {nodes[0]!r}",
                hint=choice_hint(name, (FIRST, LAST, *_modules(nodes))),
            )
        chosen.update(found)
    return tuple(name for name in nodes if name in chosen)


def _modules(nodes: Sequence[str]) -> tuple[str, ...]:
    """The nodes, and every module that one of them is in."""
    found = dict.fromkeys(nodes)
    for node in nodes:
        parts = node.partition("/")[0].split(".")
        found |= dict.fromkeys(".".join(parts[:count]) for count in range(1, len(parts) + 1))
    return tuple(found)


def _all_before(model: onnx.ModelProto, node: onnx.NodeProto) -> set[str]:
    """Names of the nodes that `node` depends on, itself excepted."""
    makers = {output: item for item in model.graph.node for output in item.output}
    waiting, found = list(node.input), set()
    while waiting:
        maker = makers.get(waiting.pop())
        if maker is not None and maker.name not in found:
            found.add(maker.name)
            waiting += maker.input
    return found


def write_int8_onnx(
    float_path: Path,
    int8_path: Path,
    ranges: Ranges,
    *,
    reduce_range: bool = True,
    float_layers: Collection[str] = (),
    rounding: Rounding | None = None,
) -> None:
    """Quantize the float graph at `float_path` by `ranges` and write the QDQ graph to `int8_path`.

    Args:
        float_path: written by `write_float_onnx`; inputs and outputs stay what they are.
        int8_path: where the result goes.
        ranges: of exactly this graph.
        reduce_range: rule 2.
        float_layers: names of nodes that stay in float.
        rounding: which way weights are rounded; None: each to its nearest level.

    Raises:
        ExportError: the ranges belong to another graph, one is missing, one is not a range, or nothing is left to
            quantize.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import TensorData, TensorsData, save_tensors_data
    from onnxruntime.quantization.shape_inference import quant_pre_process

    model = onnx.load(float_path)
    nodes = quantized_nodes(model, float_layers)
    if not nodes:
        raise ExportError(
            "every layer is to stay in float",
            where=float_path,
            found=f"{len(float_layers)} layers kept in float",
            expected="at least one layer in int8",
            hint="keep fewer layers in float, or export fp32",
        )
    _check_ranges_fit(float_path, model, ranges)
    measured = {
        name: TensorData(lowest=np.array([item.lowest], np.float32), highest=np.array([item.highest], np.float32))
        for name, item in ranges.tensors.items()
    }
    # onnxruntime asks for the range between a convolution and its activation, too, before it makes the two one.
    measured |= {inner: measured[outer] for inner, outer in fused_outputs(model).items() if outer in measured}
    wide = () if not reduce_range else depthwise_weights(model)
    with tempfile.TemporaryDirectory(prefix="edge-ilseg-quantize-") as folder:
        prepared, cache, result = (Path(folder) / name for name in ("float.onnx", "cache.json", "int8.onnx"))
        # Shapes and the "prepared" mark only: the exporter has optimised the graph, and names must not change.
        quant_pre_process(model, prepared, skip_optimization=True, skip_symbolic_shape=True)
        save_tensors_data(TensorsData(CalibrationMethod.MinMax, measured), cache)
        quantize_static(
            prepared,
            result,
            calibration_data_reader=None,
            calibration_cache_path=cache,
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTIZED_OPS),
            nodes_to_quantize=list(nodes),
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={"TensorQuantOverrides": {name: [{"axis": 0, **ALL_BITS}] for name in wide}},
        )
        quantized = onnx.load(result)
    if rounding is not None:
        round_weights(quantized, model, ranges, rounding)
    strip_notes(quantized)
    write_onnx(int8_path, quantized)


def depthwise_weights(model: onnx.ModelProto) -> tuple[str, ...]:
    """Names of the weights of convolutions whose groups have one input and one output channel each."""
    shapes = {item.name: tuple(item.dims) for item in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type == "Conv"]
    groups = {
        node.input[1]: next((int(item.i) for item in node.attribute if item.name == "group"), 1) for node in nodes
    }
    return tuple(name for name, count in groups.items() if count > 1 and shapes[name][:2] == (count, 1))


def write_weights_only(float_path: Path, int8_path: Path, *, float_layers: Collection[str] = ()) -> None:
    """Store the weights of the convolutions in int8, one scale a channel, and leave the rest as it is (rule 4).

    Args:
        float_path: written by `write_float_onnx`.
        int8_path: where the result goes.
        float_layers: names of nodes whose weights stay in float.
    """
    model = onnx.load(float_path)
    graph = model.graph
    nodes = set(quantized_nodes(model, float_layers))
    names = {node.input[1] for node in graph.node if node.op_type == "Conv" and node.name in nodes}
    constants: list[onnx.TensorProto] = []
    multiplied_out: list[onnx.NodeProto] = []
    for item in graph.initializer:
        if item.name not in names:
            constants.append(item)
            continue
        levels, scales = quantize_weights(onnx.numpy_helper.to_array(item))
        constants.append(onnx.numpy_helper.from_array(levels, f"{item.name}_quantized"))
        constants.append(onnx.numpy_helper.from_array(scales, f"{item.name}_scale"))
        multiplied_out.append(
            onnx.helper.make_node(
                "DequantizeLinear",
                [f"{item.name}_quantized", f"{item.name}_scale"],
                [item.name],
                name=f"{item.name}_DequantizeLinear",
                axis=0,
            )
        )
    all_nodes = [*multiplied_out, *(node for node in graph.node)]
    rebuilt = onnx.helper.make_graph(
        all_nodes, graph.name, graph.input, graph.output, constants, value_info=graph.value_info
    )
    model.graph.CopyFrom(rebuilt)
    write_onnx(int8_path, model)


def quantize_weights(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Levels -127 to 127 and one scale for each output channel: scale_o = max |w_o| / 127.

    Args:
        weight: float32, output channels first.

    Returns:
        int8 of the same shape, and float32 scales, one an output channel. A channel of zeros has
        scale 1, and so has one so small that float32 has no such scale.
    """
    highest_O = np.abs(weight).reshape(len(weight), -1).max(axis=1)
    scales_O = (highest_O / np.float32(INT8_HIGHEST)).astype(np.float32)
    scales_O = np.where(scales_O > 0, scales_O, np.float32(1.0))
    levels: NDArray[Any] = np.rint(weight / scales_O.reshape(-1, *(1,) * (weight.ndim - 1)))
    return levels.clip(-INT8_HIGHEST, INT8_HIGHEST).astype(np.int8), scales_O


def _check_ranges_fit(float_path: Path, model: onnx.ModelProto, ranges: Ranges) -> None:
    check_ranges(ranges)
    graph_sha256 = sha256_file(float_path)
    if ranges.graph_sha256 != graph_sha256:
        raise ExportError(
            "the ranges belong to another graph",
            where=float_path,
            found=f"ranges of graph {ranges.graph_sha256[:12]}",
            expected=f"ranges of graph {graph_sha256[:12]}",
            hint=CALIBRATE_AGAIN,
        )
    for name in quantized_tensors(model):
        if name not in ranges.tensors:
            raise ExportError(
                "a tensor has no range", where=float_path, found=f"no range for {name!r}", hint=CALIBRATE_AGAIN
            )
