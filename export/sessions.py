"""A model in each of its forms, as one function from an image to logits and mask. For the parity chain only.

1. *Real* is what a device runs; floating-point layers in float32, as in `edge_ilseg.devices.runtime`.
2. *Simulated* int8 computes in float32 what the scales and zero points say: it shows what quantization costs, and real
   minus simulated shows what the integer kernels of this machine cost.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from edge_ilseg.devices.layers import count_precisions, openvino_layers
from edge_ilseg.devices.runtime import OPENVINO_SETTINGS, openvino_core
from edge_ilseg.errors import MissingPackageError
from edge_ilseg.export.float_onnx import DeployedModel

ORT_LOG_FATAL = 4
CONVOLUTIONS = ("Convolution", "GroupConvolution")
"""OpenVINO's names of layer types."""
INTEGER_PRECISIONS = frozenset({"u8", "i8"})


class Outputs(NamedTuple):
    """What one form of the model gives for one image."""

    logits_NCHW: NDArray[np.float32]
    mask_NHW: NDArray[np.uint8]


Predict = Callable[[NDArray[np.uint8]], Outputs]
"""Image, uint8, 1 x H x W x 3, at the input size -> outputs."""


def load_torch(model: DeployedModel) -> Predict:
    """The torch model itself."""

    @torch.inference_mode()
    def predict(image_NHWC: NDArray[np.uint8]) -> Outputs:
        logits_NCHW, mask_NHW = model(torch.from_numpy(image_NHWC))
        return Outputs(logits_NCHW.numpy(), mask_NHW.numpy())

    return predict


def load_onnx(path: Path, *, simulated: bool = False) -> Predict:
    """An ONNX file with both outputs in onnxruntime; simulated means: without graph optimizations."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = ORT_LOG_FATAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # several runtimes take turns here
    if simulated:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def predict(image_NHWC: NDArray[np.uint8]) -> Outputs:
        logits_NCHW, mask_NHW = session.run(["logits", "mask"], {"image": image_NHWC})
        return Outputs(logits_NCHW, mask_NHW)

    return predict


def load_openvino(path: Path, *, simulated: bool = False) -> Predict:
    """An IR with both outputs in OpenVINO; simulated means: without its low-precision transformations.

    Raises:
        MissingPackageError: this OpenVINO does not know the undocumented switch that simulation needs.
    """
    settings: dict[str, Any] = dict(OPENVINO_SETTINGS)
    if simulated:
        settings["LP_TRANSFORMS_MODE"] = False
    core = openvino_core()
    model = core.read_model(path)
    try:
        compiled = core.compile_model(model, "CPU", settings)
    except RuntimeError as error:
        if not simulated:
            raise
        raise _no_simulation(str(error).splitlines()[0]) from error
    if simulated and not INTEGER_PRECISIONS.isdisjoint(count_precisions(openvino_layers(compiled), CONVOLUTIONS)):
        raise _no_simulation("convolutions still run in int8")
    request = compiled.create_infer_request()

    def predict(image_NHWC: NDArray[np.uint8]) -> Outputs:
        request.infer({"image": image_NHWC})
        return Outputs(request.get_tensor("logits").data.copy(), request.get_tensor("mask").data.copy())

    return predict


def _no_simulation(found: str) -> MissingPackageError:
    return MissingPackageError(
        "this OpenVINO cannot simulate int8",
        found=found,
        hint="nothing to do: the row is left out, and the real int8 row still counts",
    )
