"""What each convolution reads on the calibration images, as moments: enough to round its weights by, and no image.

1. A convolution computes w . x for a patch x of its input: K = channels of a group x kernel height x kernel width
   values, in the order of its weights. The *moments* of all patches x are the mean E[x] and the second moment E[x x^T].
2. Of each image `POSITIONS` output positions count, the same ones in every image, and fewer of a depthwise convolution,
   whose K is small; all where there are no more.
3. Of more than `BLOCK` values, second moments are kept within blocks of whole channels: what two blocks have in common
   is left out, so that memory and time grow with K and not with its square and cube.
4. The patches are cut out inside the graph, one image at a time: no activation is copied out whole or kept.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from edge_ilseg.calibration.collect import open_graph
from edge_ilseg.progress import ProgressCallback, no_progress

POSITIONS, DEPTHWISE_POSITIONS = 64, 16
BLOCK = 1024
TOGETHER = 8
"""Patches of so many images are summed up in one product."""
IMAGE_AXES = 2


class Moments(NamedTuple):
    """Of the patches that one convolution of G groups reads."""

    mean_GK: NDArray[np.float64]
    blocks_GKK: tuple[NDArray[np.float64], ...]
    """Second moments of consecutive parts of K (rule 3)."""


class _Geometry(NamedTuple):
    """How a convolution cuts patches out of its input."""

    groups: int
    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilations: tuple[int, int]
    pads: tuple[int, int, int, int]
    """Before the rows, before the columns, behind the rows, behind the columns."""


def collect_moments(
    float_onnx_path: Path,
    images_NHWC: Iterable[NDArray[np.uint8]],
    nodes: Collection[str],
    *,
    count: int,
    progress: ProgressCallback = no_progress,
) -> dict[str, Moments]:
    """Moments of convolutions of a float graph, by the name of the node.

    Args:
        float_onnx_path: the float graph, input `image` uint8 1 x H x W x 3.
        images_NHWC: uint8, 1 x H x W x 3 each; consumed one at a time.
        nodes: names of the convolutions that are wanted.
        count: how many there are, for the progress.
        progress: told after each image.

    Raises:
        ExportError: an image does not have the model's input size.
        ValueError: there is no image.
    """
    model = onnx.load(float_onnx_path)
    weights = {item.name: item for item in model.graph.initializer}
    wanted = [node for node in model.graph.node if node.op_type == "Conv" and node.name in nodes]
    if not wanted:
        return {}
    geometries = [_geometry(node, weights[node.input[1]]) for node in wanted]
    sums = [_Sum(shape, weights[node.input[1]]) for node, shape in zip(wanted, geometries, strict=True)]
    done = 0
    with tempfile.TemporaryDirectory(prefix="edge-ilseg-moments-") as folder:
        run = open_graph(_with_patches(model, wanted, geometries), Path(folder) / "patches.onnx")
        for done, image_NHWC in enumerate(images_NHWC, start=1):
            for item, values in zip(sums, run(image_NHWC), strict=True):
                item.add(values)
            progress("reading what each layer reads", min(done / count, 1.0))
    if not done:
        raise ValueError("no image")
    return {node.name: item.moments() for node, item in zip(wanted, sums, strict=True)}


class _Sum:
    """Sums over the patches of one convolution, of some images at a time."""

    def __init__(self, geometry: _Geometry, weight: onnx.TensorProto) -> None:
        channels, taps = weight.dims[1], geometry.kernel[0] * geometry.kernel[1]
        self._mean_GK = np.zeros((geometry.groups, channels * taps))
        self._blocks_GKK = [np.zeros((geometry.groups, size, size)) for size in block_sizes(channels, taps)]
        self._waiting: list[NDArray[np.float32]] = []
        self._patches = 0

    def add(self, values: NDArray[np.float32]) -> None:
        self._waiting.append(values.reshape(*self._mean_GK.shape, -1))
        if len(self._waiting) == TOGETHER:
            self._sum_up()

    def _sum_up(self) -> None:
        patch_GKP = np.concatenate(self._waiting, axis=2)
        self._waiting.clear()
        self._patches += patch_GKP.shape[2]
        self._mean_GK += patch_GKP.sum(axis=2, dtype=np.float64)
        start = 0
        for block_GKK in self._blocks_GKK:
            part_GKP = patch_GKP[:, start : start + block_GKK.shape[1]]
            block_GKK += part_GKP @ part_GKP.transpose(0, 2, 1)
            start += block_GKK.shape[1]

    def moments(self) -> Moments:
        """Ends the sums: they become the moments."""
        if self._waiting:
            self._sum_up()
        for array in (self._mean_GK, *self._blocks_GKK):
            array /= self._patches
        return Moments(self._mean_GK, tuple(self._blocks_GKK))


def block_sizes(channels: int, taps: int) -> tuple[int, ...]:
    """Sizes of the parts of K = `channels` x `taps` (rule 3): whole channels, and as equal as can be."""
    parts = -(-channels // max(1, BLOCK // taps))
    return tuple(taps * len(part) for part in np.array_split(np.arange(channels), parts))


def _geometry(node: onnx.NodeProto, weight: onnx.TensorProto) -> _Geometry:
    attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    if attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
        raise ValueError(f"{node.name}: the padding is not written out")
    return _Geometry(
        groups=attributes.get("group", 1),
        kernel=tuple(weight.dims[2:]),
        strides=tuple(attributes.get("strides", (1, 1))),
        dilations=tuple(attributes.get("dilations", (1, 1))),
        pads=tuple(attributes.get("pads", (0, 0, 0, 0))),
    )


def _with_patches(
    model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], geometries: Sequence[_Geometry]
) -> onnx.ModelProto:
    """A graph whose outputs are the patches of each convolution: channels x (kernel positions x output positions)."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    shapes = {
        info.name: [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        for info in (*graph.value_info, *graph.input, *graph.output)
    }
    del graph.output[:]
    for node, geometry in zip(nodes, geometries, strict=True):
        prefix, source = f"patches/{node.name}", node.input[0]
        channels, *size = shapes[source][1:]
        indices, is_inside = _patch_indices(geometry, size, shapes[node.output[0]][IMAGE_AXES:])
        constants: dict[str, NDArray[Any]] = {
            "shape": np.array([channels, size[0] * size[1]], np.int64),
            "indices": indices,
            "is_inside": is_inside.astype(np.float32),
        }
        graph.initializer.extend(
            onnx.numpy_helper.from_array(value, f"{prefix}/{name}") for name, value in constants.items()
        )
        graph.node.extend(
            (
                onnx.helper.make_node("Reshape", [source, f"{prefix}/shape"], [f"{prefix}/flat"]),
                onnx.helper.make_node("Gather", [f"{prefix}/flat", f"{prefix}/indices"], [f"{prefix}/values"], axis=1),
                onnx.helper.make_node("Mul", [f"{prefix}/values", f"{prefix}/is_inside"], [prefix]),
            )
        )
        graph.output.append(onnx.helper.make_tensor_value_info(prefix, onnx.TensorProto.FLOAT, None))
    return result


def _patch_indices(
    geometry: _Geometry, input_size: Sequence[int], output_size: Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Where the patches lie in a flattened channel, and what of them does; the rest is padding, 0.

    Returns:
        Indices and truths for kernel positions x output positions, flattened; an index of padding is any.
    """
    rows, columns = output_size
    count = POSITIONS if geometry.groups == 1 else DEPTHWISE_POSITIONS
    chosen = np.sort(np.random.default_rng(0).permutation(rows * columns)[:count])
    tap_row_T, tap_column_T = (index.reshape(-1, 1) for index in np.indices(geometry.kernel))
    row_TP = chosen // columns * geometry.strides[0] + tap_row_T * geometry.dilations[0] - geometry.pads[0]
    column_TP = chosen % columns * geometry.strides[1] + tap_column_T * geometry.dilations[1] - geometry.pads[1]
    height, width = input_size
    is_inside_TP = (row_TP >= 0) & (row_TP < height) & (column_TP >= 0) & (column_TP < width)
    indices_TP = row_TP.clip(0, height - 1) * width + column_TP.clip(0, width - 1)
    return indices_TP.reshape(-1).astype(np.int64), is_inside_TP.reshape(-1)
