"""Run images through the float ONNX and note the lowest and highest value of each channel of each tensor.

1. Which tensors are quantized is decided here, once (`quantized_nodes`); `edge_ilseg.export.quantize` asks the same
   function, so there is a range for each of them and none for any other.
2. Ranges are per tensor, never per channel: a channel that is silent on the new images must not get a tiny range. The
   channels' extremes are kept beside them, to warn (`edge_ilseg.calibration.passport`).
3. What lies behind the last convolution (sums and joins of logits, their upsampling, the argmax) stays in float.
4. The extremes are found inside the graph, one image at a time: no activation is copied out or kept.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from edge_ilseg.calibration.merge import Measured
from edge_ilseg.calibration.passport import Extremes
from edge_ilseg.calibration.subgraph import subgraph_hashes
from edge_ilseg.errors import ExportError
from edge_ilseg.files import sha256_file
from edge_ilseg.progress import ProgressCallback, no_progress

QUANTIZED_OPS = ("Conv", "Clip", "Relu", "Add", "Concat", "MaxPool", "AveragePool", "GlobalAveragePool", "Pad")
"""What runs in int8. Resize is not here: upsampled in int8, the edges of the mask move."""
ACTIVATIONS = ("Clip", "Relu")
ORT_LOG_FATAL = 4
CHANNEL_AXIS, IMAGE_RANK = 1, 4
SPATIAL_AXES = (0, 2, 3)


def quantized_nodes(model: onnx.ModelProto, float_layers: Collection[str] = ()) -> tuple[str, ...]:
    """Names of the nodes that run in int8, in graph order: `QUANTIZED_OPS` that a convolution is fed by, or is one.

    Args:
        model: a float graph.
        float_layers: names of nodes that stay in float.
    """
    feeds_conv = _tensors_that_feed_a_convolution(model)
    return tuple(
        node.name
        for node in model.graph.node
        if (node.op_type == "Conv" or not feeds_conv.isdisjoint(node.output))
        and node.op_type in QUANTIZED_OPS
        and node.name not in float_layers
    )


def _tensors_that_feed_a_convolution(model: onnx.ModelProto) -> set[str]:
    found: set[str] = set()
    for node in reversed(model.graph.node):
        if node.op_type == "Conv" or not found.isdisjoint(node.output):
            found.update(node.input)
    return found


def quantized_tensors(model: onnx.ModelProto) -> tuple[str, ...]:
    """Names of the activation tensors (float, not weights) at the inputs and outputs of `quantized_nodes`, in order.

    What a convolution gives to a Clip or Relu alone is not among them: the two are one operation in int8, and only the
    result of the second is ever a tensor.
    """
    nodes = set(quantized_nodes(model))
    constants = {item.name for item in model.graph.initializer}
    inner = fused_outputs(model)
    names = [name for node in model.graph.node if node.name in nodes for name in (*node.input, *node.output)]
    return tuple(dict.fromkeys(name for name in names if name and name not in constants and name not in inner))


def fused_outputs(model: onnx.ModelProto) -> dict[str, str]:
    """Output of a convolution that a Clip or Relu alone reads -> output of that Clip or Relu."""
    readers: dict[str, list[onnx.NodeProto]] = {item.name: [] for item in model.graph.output}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {item.name for item in model.graph.output}
    found = {}
    for node in model.graph.node:
        behind = readers.get(node.output[0], [])
        if (
            node.op_type == "Conv"
            and len(behind) == 1
            and behind[0].op_type in ACTIVATIONS
            and not outputs & {node.output[0]}
        ):
            found[node.output[0]] = behind[0].output[0]
    return found


def collect_extremes(
    float_onnx_path: Path,
    images_NHWC: Iterable[NDArray[np.uint8]],
    *,
    image_ids: Sequence[str],
    images_sha256: str,
    step: str,
    progress: ProgressCallback = no_progress,
) -> Measured:
    """Measure the extremes of every quantized tensor over all images.

    Args:
        float_onnx_path: the float graph, input `image` uint8 1 x H x W x 3.
        images_NHWC: one uint8 array, 1 x H x W x 3, for each of `image_ids`; consumed one at a time.
        image_ids: recorded in the result.
        images_sha256: hash of the image set, recorded in the result.
        step: name of the step that the images belong to, recorded with each range.
        progress: told after each image.

    Raises:
        ExportError: there is no image, or one does not have the model's input size.
        ValueError: there are more ids than images, or fewer.
    """
    if not image_ids:
        raise ExportError("there is no image to calibrate on", hint="export with --precision fp32, or add images")
    model = onnx.load(float_onnx_path)
    names = quantized_tensors(model)
    found: dict[str, Extremes] = {}
    sums: dict[str, NDArray[np.float64]] = {name: np.zeros(2) for name in names}
    done = 0
    with tempfile.TemporaryDirectory(prefix="edge-ilseg-calibration-") as folder:
        run = open_graph(with_extremes(model, names), Path(folder) / "extremes.onnx")
        for done, image_NHWC in enumerate(images_NHWC, start=1):
            values = [np.atleast_1d(value.reshape(-1)) for value in run(image_NHWC)]
            for name, lowest_C, highest_C in zip(names, values[::2], values[1::2], strict=True):
                extremes = Extremes(lowest_C, highest_C)
                found[name] = found[name].merge(extremes) if name in found else extremes
                sums[name] += (extremes.lowest, extremes.highest)
            progress("calibrating", min(done / len(image_ids), 1.0))
    if done != len(image_ids):
        raise ValueError(f"{done} images for {len(image_ids)} ids")
    hashes = subgraph_hashes(model)
    inner = _tensors_that_feed_a_convolution(model)
    return Measured(
        step=step,
        image_ids=tuple(image_ids),
        images_sha256=images_sha256,
        graph_sha256=sha256_file(float_onnx_path),
        extremes={name: found[name] for name in names},
        mean_extremes={
            name: (float(sums[name][0] / done), float(sums[name][1] / done))
            if name in inner
            else (found[name].lowest, found[name].highest)
            for name in names
        },
        subgraphs={name: hashes[name] for name in names},
    )


def with_extremes(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """A graph whose outputs are, for each tensor of `names`, the lowest and then the highest value of each channel."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    ranks = {info.name: len(info.type.tensor_type.shape.dim) for info in (*graph.value_info, *graph.output)}
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(SPATIAL_AXES, np.int64), "extremes/axes"))
    del graph.output[:]
    for name in names:
        # Without a channel axis the tensor is one channel: no axes means all of them.
        axes = ["extremes/axes"] if ranks[name] == IMAGE_RANK else []
        for operation in ("ReduceMin", "ReduceMax"):
            output = f"extremes/{operation}/{name}"
            graph.node.append(onnx.helper.make_node(operation, [name, *axes], [output], keepdims=0))
            graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None))
    return result


def open_graph(model: onnx.ModelProto, path: Path) -> Callable[[NDArray[np.uint8]], list[NDArray[np.float32]]]:
    """Gives all outputs of a graph for one image, in onnxruntime; refuses an image of another size."""
    import onnxruntime

    onnx.save(model, path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ORT_LOG_FATAL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(image_NHWC: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        declared = session.get_inputs()[0]
        if list(image_NHWC.shape) != declared.shape or image_NHWC.dtype != np.uint8:
            raise ExportError(
                "a calibration image does not have the model's input size",
                found=f"{image_NHWC.dtype} {' x '.join(map(str, image_NHWC.shape))}",
                expected=f"uint8 {' x '.join(map(str, declared.shape))}",
                hint="resize images with edge_ilseg.images.resize_image",
            )
        outputs: list[NDArray[np.float32]] = session.run(None, {declared.name: image_NHWC})
        return outputs

    return run
