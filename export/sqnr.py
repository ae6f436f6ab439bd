"""Signal to quantization noise: how far each activation of the int8 graph is from that of the float graph.

SQNR of a tensor = 10 log10( sum x^2 / sum (x - x8)^2 ) dB, over all images, where x is the float tensor and x8 the same
tensor of the simulated int8 graph: what all layers up to there have lost.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from edge_ilseg.calibration.collect import ACTIVATIONS, quantized_nodes
from edge_ilseg.export.sessions import ORT_LOG_FATAL
from edge_ilseg.int8_record import SqnrRow

LEAST_SIGNAL = 1e-11
"""Of the noise: a silent tensor that int8 makes loud has a figure, too, and comes first."""


def measure_sqnr(float_path: Path, int8_path: Path, images_NHWC: Iterable[NDArray[np.uint8]]) -> tuple[SqnrRow, ...]:
    """SQNR of every quantized activation, in the order of the int8 graph.

    Args:
        float_path: the float graph.
        int8_path: the QDQ graph made from it.
        images_NHWC: uint8, 1 x H x W x 3 each; consumed one at a time, and no activation is kept.
    """
    float_model, int8_model = onnx.load(float_path), onnx.load(int8_path)
    pairs = quantized_pairs(float_model, int8_model)
    signal = np.zeros(len(pairs))
    noise = np.zeros(len(pairs))
    with tempfile.TemporaryDirectory(prefix="edge-ilseg-sqnr-") as folder:
        run_float = _open(float_model, list(pairs), Path(folder) / "float.onnx", simulated=False)
        run_int8 = _open(int8_model, list(pairs.values()), Path(folder) / "int8.onnx", simulated=True)
        for image_NHWC in images_NHWC:
            for number, (exact, found) in enumerate(zip(run_float(image_NHWC), run_int8(image_NHWC), strict=True)):
                signal[number] += float(np.square(exact, dtype=np.float64).sum())
                noise[number] += float(np.square(exact.astype(np.float64) - found).sum())
    return tuple(SqnrRow(name, decibel(*values)) for name, *values in zip(pairs, signal, noise, strict=True))


def decibel(signal: float, noise: float) -> float | None:
    """10 log10(signal / noise); None without noise, and below -100 where there is noise alone."""
    return 10 * math.log10(max(signal, LEAST_SIGNAL * noise) / noise) if noise > 0 else None


def worst(rows: Sequence[SqnrRow], count: int) -> tuple[SqnrRow, ...]:
    """The `count` tensors of the lowest SQNR, the lowest first."""
    known = [row for row in rows if row.sqnr_db is not None]
    return tuple(sorted(known, key=lambda row: (row.sqnr_db, row.tensor))[:count])


def layers_of_worst_signal(model: onnx.ModelProto, rows: Sequence[SqnrRow], share: float) -> tuple[str, ...]:
    """The nodes that make the tensors of the lowest SQNR, each activation with the convolution before it.

    Args:
        model: the float graph.
        rows: SQNR of its tensors.
        share: of the quantized nodes, in 0..1; at least one.
    """
    nodes = quantized_nodes(model)
    makers = {output: node for node in model.graph.node for output in node.output}
    wanted = max(1, round(share * len(nodes)))
    chosen: set[str] = set()
    for row in worst(rows, len(rows)):
        if len(chosen) >= wanted:
            break
        maker = makers[row.tensor]
        chosen.add(maker.name)
        before = makers.get(maker.input[0])
        if maker.op_type in ACTIVATIONS and before is not None and before.op_type == "Conv":
            chosen.add(before.name)
    return tuple(name for name in nodes if name in chosen)


def quantized_pairs(float_model: onnx.ModelProto, int8_model: onnx.ModelProto) -> dict[str, str]:
    """Float tensor -> the same tensor of the int8 graph after its QuantizeLinear and DequantizeLinear."""
    known = {name for node in float_model.graph.node for name in node.output}
    levels = {node.output[0]: node.input[0] for node in int8_model.graph.node if node.op_type == "QuantizeLinear"}
    return {
        levels[node.input[0]]: node.output[0]
        for node in int8_model.graph.node
        if node.op_type == "DequantizeLinear" and levels.get(node.input[0]) in known
    }


def _open(
    model: onnx.ModelProto, outputs: Sequence[str], path: Path, *, simulated: bool
) -> Callable[[NDArray[np.uint8]], list[NDArray[np.float32]]]:
    import onnxruntime

    del model.graph.output[:]
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs
    )
    onnx.save(model, path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ORT_LOG_FATAL
    if simulated:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(image_NHWC: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        values: list[NDArray[np.float32]] = session.run(list(outputs), {"image": image_NHWC})
        return values

    return run
