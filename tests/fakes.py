"""Small things that behave like the real ones, for tests of calibration and export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from edge_ilseg.calibration.collect import collect_extremes
from edge_ilseg.calibration.merge import Measured
from edge_ilseg.models.segmentation import SegmentationModel, build_model
from edge_ilseg.models.spec import Backbone, Head, ModelSpec

HEIGHT_PX, WIDTH_PX = 48, 64


def small_model(
    class_counts: tuple[int, ...] = (3, 1), *, backbone: Backbone = "tiny", head: Head = "deeplab_v3", seed: int = 0
) -> SegmentationModel:
    """An untrained network in eval mode whose batch norms have seen images and whose logits are spread out."""
    spec = ModelSpec(
        backbone=backbone, head=head, decoder_channels=16, input_height_px=HEIGHT_PX, input_width_px=WIDTH_PX
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model(spec, class_counts)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bn.weight"):
                    parameter.uniform_(0.7, 1.3)
                elif name.endswith("bn.bias"):
                    parameter.normal_(0.0, 0.2)
                elif "classifiers" in name:
                    parameter.normal_(0.0, 1.0)
            model.train()
            for _ in range(12):
                model((torch.rand(4, 3, HEIGHT_PX, WIDTH_PX) - 0.5) * 2.0)
    return model.eval()


def random_images(
    count: int, *, seed: int = 0, height_px: int = HEIGHT_PX, width_px: int = WIDTH_PX
) -> NDArray[np.uint8]:
    """Coarse random patches with fine noise, uint8, N x H x W x 3."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 226, (count, height_px // 8, width_px // 8, 3)).repeat(8, axis=1).repeat(8, axis=2)
    return (coarse + rng.integers(0, 30, coarse.shape)).astype(np.uint8)


def measure(float_path: Path, images_NHWC: NDArray[np.uint8], *, step: str = "00-base") -> Measured:
    """What calibration finds out about a float ONNX on images that are called "0", "1" and so on."""
    return collect_extremes(
        float_path,
        (image_HWC[np.newaxis] for image_HWC in images_NHWC),
        image_ids=[str(number) for number in range(len(images_NHWC))],
        images_sha256="22",
        step=step,
    )


def with_constant(model: onnx.ModelProto, name: str, change: Callable[[NDArray[Any]], NDArray[Any]]) -> onnx.ModelProto:
    """A copy of an ONNX graph in which one constant is `change` of what it was: a layer that was trained again."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    (constant,) = (item for item in result.graph.initializer if item.name == name)
    constant.CopyFrom(onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(constant).copy()), name))
    return result


def with_names(model: onnx.ModelProto, rename: Callable[[str], str]) -> onnx.ModelProto:
    """A copy of an ONNX graph with other names of nodes, constants and tensors, its inputs and outputs excepted."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    kept = {"", *(item.name for item in (*graph.input, *graph.output))}
    for node in graph.node:
        node.name = rename(node.name)
        for names in (node.input, node.output):
            names[:] = [name if name in kept else rename(name) for name in names]
    for item in (*graph.initializer, *graph.value_info):
        item.name = item.name if item.name in kept else rename(item.name)
    return result
