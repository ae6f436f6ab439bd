"""int8 from ranges: the float ONNX with QuantizeLinear and DequantizeLinear around what runs in int8 (QDQ).

1. The ranges decide: the same graph and the same ranges give the same bytes, with no image in sight.
2. Activations are uint8 per tensor, weights int8 per channel. With `reduce_range` weights use 7 of the 8 bits: the
   sums of products then fit the 16-bit accumulator of CPUs without VNNI or dot-product instructions.
3. What is quantized is decided in `edge_ilseg.calibration.collect`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx

from edge_ilseg.calibration.collect import QUANTIZED_OPS, quantized_nodes, quantized_tensors
from edge_ilseg.calibration.ranges import Ranges, check_ranges
from edge_ilseg.errors import ExportError
from edge_ilseg.export.graph import strip_notes, write_onnx
from edge_ilseg.files import sha256_file


def write_int8_onnx(float_path: Path, int8_path: Path, ranges: Ranges, *, reduce_range: bool = True) -> None:
    """Quantize the float graph at `float_path` by `ranges` and write the QDQ graph to `int8_path`.

    Args:
        float_path: written by `write_float_onnx`; inputs and outputs stay what they are.
        int8_path: where the result goes.
        ranges: of exactly this graph.
        reduce_range: rule 2.

    Raises:
        ExportError: the ranges belong to another graph, one is missing, or one is not a range.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import TensorData, TensorsData, save_tensors_data
    from onnxruntime.quantization.shape_inference import quant_pre_process

    model = onnx.load(float_path)
    _check_ranges_fit(float_path, model, ranges)
    measured = {
        name: TensorData(lowest=np.array([item.lowest], np.float32), highest=np.array([item.highest], np.float32))
        for name, item in ranges.tensors.items()
    }
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
            nodes_to_quantize=list(quantized_nodes(model)),
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        quantized = onnx.load(result)
    strip_notes(quantized)
    write_onnx(int8_path, quantized)


def _check_ranges_fit(float_path: Path, model: onnx.ModelProto, ranges: Ranges) -> None:
    check_ranges(ranges)
    graph_sha256 = sha256_file(float_path)
    if ranges.graph_sha256 != graph_sha256:
        raise ExportError(
            "the ranges belong to another graph",
            where=float_path,
            found=f"ranges of graph {ranges.graph_sha256[:12]}",
            expected=f"ranges of graph {graph_sha256[:12]}",
            hint="calibrate this graph",
        )
    for name in quantized_tensors(model):
        if name not in ranges.tensors:
            raise ExportError("a tensor has no range", where=float_path, found=f"no range for {name!r}")
