"""What a runtime really computes in int8, read back from the runtime: a QDQ graph is a wish, not a fact.

1. The answer is that of this machine: a runtime chooses kernels by the processor.
2. Convolutions are named as in the float ONNX, whatever the runtime has made of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

import onnx

from edge_ilseg.bundle import Runtime
from edge_ilseg.devices.runtime import OPENVINO_SETTINGS, openvino_core
from edge_ilseg.errors import ExportError
from edge_ilseg.export.sessions import CONVOLUTIONS, INTEGER_PRECISIONS, ORT_LOG_FATAL

INTEGER_CONVOLUTION = "QLinearConv"
QUANTIZED_SUFFIX, DEQUANTIZED_SUFFIX = "_quantized", "_DequantizeLinear_Output"
"""What onnxruntime's quantizer appends to the name of a weight."""


def executed_convolutions(path: Path, runtime: Runtime) -> dict[str, str]:
    """Element type in which each convolution is computed: `{"encoder.stem.conv/Conv": "u8"}`, `f32` for float.

    Args:
        path: what the runtime opens; for OpenVINO the `.xml`.
        runtime: which one.
    """
    return (_in_openvino if runtime == "openvino" else _in_onnxruntime)(path)


def check_int8_runs(executed: Mapping[str, str], int8_layers: Collection[str], path: Path) -> None:
    """Raise `ExportError` unless every convolution that is quantized is computed in int8.

    Args:
        executed: from `executed_convolutions`.
        int8_layers: names of the quantized convolutions.
        path: for the error.
    """
    lost = [name for name in int8_layers if executed.get(name) not in INTEGER_PRECISIONS]
    if lost:
        raise ExportError(
            "the runtime does not compute every quantized convolution in int8 on this machine",
            where=path,
            found=f"{len(lost)} of {len(int8_layers)} in another element type, {lost[0]!r} in {executed.get(lost[0])}",
            expected=" or ".join(sorted(INTEGER_PRECISIONS)),
            hint="keep these layers in float (--keep-float), or export on a machine whose processor has int8 kernels",
        )


def _in_openvino(path: Path) -> dict[str, str]:
    compiled = openvino_core().compile_model(str(path), "CPU", OPENVINO_SETTINGS)
    found = {}
    for layer in compiled.get_runtime_model().get_ordered_ops():
        info = dict(layer.get_rt_info())
        if info["layerType"].astype(str) not in CONVOLUTIONS:
            continue
        origins = info["originalLayersNames"].astype(str).split(",")
        name = min((item for item in origins if "/Conv" in item), key=len, default=layer.get_friendly_name())
        found[_plain(name)] = info["runtimePrecision"].astype(str)
    return dict(sorted(found.items()))


def _plain(name: str) -> str:
    """Without what the OpenVINO converter appends to the node's name."""
    return name.removesuffix("/WithoutBiases")


def _in_onnxruntime(path: Path) -> dict[str, str]:
    """The graph after onnxruntime's own optimizations: an int8 convolution is a `QLinearConv` there."""
    import onnxruntime

    with tempfile.TemporaryDirectory(prefix="edge-ilseg-executed-") as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = ORT_LOG_FATAL
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        optimized = onnx.load(options.optimized_model_filepath)
    integer_weights = {node.input[3] for node in optimized.graph.node if node.op_type == INTEGER_CONVOLUTION}
    found = {}
    for node in onnx.load(path).graph.node:
        if node.op_type == "Conv":
            stored = node.input[1].removesuffix(DEQUANTIZED_SUFFIX) + QUANTIZED_SUFFIX
            found[node.name] = "u8" if stored in integer_weights else "f32"
    return dict(sorted(found.items()))
