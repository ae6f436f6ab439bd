"""Ranges of activations: run images through the float ONNX and note the lowest and highest value of each tensor.

1. Which tensors are quantized is decided here, once (`quantized_nodes`); `edge_ilseg.export.quantize` asks the same
   function, so there is a range for each of them and none for any other.
2. Ranges are per tensor, never per channel: a channel that is silent on the new images must not get a tiny range.
3. What lies behind the last convolution (sums and joins of logits, their upsampling, the argmax) stays in float.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from edge_ilseg.calibration.ranges import FORMAT_VERSION, Ranges, TensorRange, check_ranges
from edge_ilseg.errors import ExportError
from edge_ilseg.files import sha256_file
from edge_ilseg.progress import ProgressCallback, no_progress

QUANTIZED_OPS = ("Conv", "Clip", "Relu", "Add", "Concat", "MaxPool", "AveragePool", "GlobalAveragePool", "Pad")
"""What runs in int8. Resize is not here: upsampled in int8, the edges of the mask move."""


def quantized_nodes(model: onnx.ModelProto) -> tuple[str, ...]:
    """Names of the nodes that run in int8, in graph order: `QUANTIZED_OPS` that a convolution is fed by, or is one."""
    feeds_conv: set[str] = set()
    chosen: list[str] = []
    for node in reversed(model.graph.node):
        if node.op_type == "Conv" or not feeds_conv.isdisjoint(node.output):
            feeds_conv.update(node.input)
            if node.op_type in QUANTIZED_OPS:
                chosen.append(node.name)
    return tuple(reversed(chosen))


def quantized_tensors(model: onnx.ModelProto) -> tuple[str, ...]:
    """Names of the activation tensors (float, not weights) at the inputs and outputs of `quantized_nodes`, in order."""
    nodes = set(quantized_nodes(model))
    constants = {item.name for item in model.graph.initializer}
    names = [name for node in model.graph.node if node.name in nodes for name in (*node.input, *node.output)]
    return tuple(dict.fromkeys(name for name in names if name and name not in constants))


def collect_ranges(
    float_onnx_path: Path,
    images_NHWC: Iterable[NDArray[np.uint8]],
    *,
    image_ids: Sequence[str],
    images_sha256: str,
    step: str,
    progress: ProgressCallback = no_progress,
) -> Ranges:
    """Measure the range of every quantized tensor, min-max over all images.

    Args:
        float_onnx_path: the float graph, input `image` uint8 1 x H x W x 3.
        images_NHWC: one uint8 array, 1 x H x W x 3, for each of `image_ids`; consumed one at a time.
        image_ids: recorded in the result.
        images_sha256: hash of the image set, recorded in the result.
        step: name of the step that the images belong to, recorded with each range.
        progress: told after each image.

    Raises:
        ExportError: there is no image, or a tensor's values are not finite.
    """
    from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator

    if not image_ids:
        raise ExportError("there is no image to calibrate on", hint="export with --precision fp32, or add images")
    with tempfile.TemporaryDirectory(prefix="edge-ilseg-calibration-") as folder:
        calibrator = create_calibrator(
            float_onnx_path,
            list(QUANTIZED_OPS),
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"per_channel": False, "symmetric": False},
        )
        calibrator.collect_data(_ImageReader(images_NHWC, len(image_ids), progress))
        measured = calibrator.compute_data()
    tensors = {
        name: TensorRange(float(np.min(measured[name].lowest)), float(np.max(measured[name].highest)), step)
        for name in quantized_tensors(onnx.load(float_onnx_path))
    }
    ranges = Ranges(
        "edge-ilseg-ranges",
        FORMAT_VERSION,
        "minmax",
        tuple(image_ids),
        images_sha256,
        sha256_file(float_onnx_path),
        tensors,
    )
    check_ranges(ranges, where=float_onnx_path)
    return ranges


class _ImageReader:
    """onnxruntime's form of an iterator: the next input, or None at the end."""

    def __init__(self, images_NHWC: Iterable[NDArray[np.uint8]], count: int, progress: ProgressCallback) -> None:
        self._images: Iterator[NDArray[np.uint8]] = iter(images_NHWC)
        self._count = count
        self._progress = progress
        self._done = 0

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        image_NHWC = next(self._images, None)
        if image_NHWC is None:
            return None
        self._done += 1
        self._progress("calibrating", min(self._done / self._count, 1.0))
        return {"image": image_NHWC}
