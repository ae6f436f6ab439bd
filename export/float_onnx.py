"""A torch model as one ONNX file: bytes of an image in, classes of its pixels out.

1. Input `image`: uint8, 1 x H x W x 3, RGB, static. Cast, layout and normalisation are inside the graph.
2. Outputs `logits`: float32, 1 x C x H x W, and `mask`: uint8, 1 x H x W, the channel with the highest logit.
3. Batch norms are folded into the convolutions before them.
4. The same weights give the same bytes, and names that a person can read (`edge_ilseg.export.graph`).
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import torch
from torch import nn

from edge_ilseg.errors import ExportError
from edge_ilseg.export.graph import EXPORTER_HINT, fold_padding, name_by_module, opset_of, strip_notes, write_onnx
from edge_ilseg.models.normalization import normalize
from edge_ilseg.models.segmentation import SegmentationModel

OPSET = 18
OUTPUTS = ("logits", "mask")
MAX_CHANNELS = 255  # a mask is uint8 and 255 is void


class DeployedModel(nn.Module):
    """The model with what the device must not do by itself around it."""

    def __init__(self, model: SegmentationModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, image_NHWC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 N x H x W x 3 -> logits float32 N x C x H x W and mask uint8 N x H x W."""
        logits_NCHW = self.model(normalize(image_NHWC, self.model.spec)).logits_NCHW
        return logits_NCHW, logits_NCHW.argmax(dim=1).to(torch.uint8)


def deployed_model(model: SegmentationModel) -> DeployedModel:
    """A copy of `model` on the CPU, in eval mode, wrapped for export; `model` itself stays as it is.

    Raises:
        ExportError: a weight or a statistic is not finite; the error names the tensor.
    """
    check_finite(model)
    return DeployedModel(copy.deepcopy(model).cpu()).eval().requires_grad_(False)


def check_finite(model: nn.Module) -> None:
    """Raise `ExportError` naming the first tensor of `model` that holds NaN or infinity."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise ExportError(
                "the model holds values that are not finite",
                where=f"tensor {name!r}",
                found=f"{bad} of {tensor.numel()} values are NaN or infinite",
                hint="train the step again, with a smaller learning rate",
            )


def write_float_onnx(model: SegmentationModel, path: Path) -> None:
    """Write `model` as ONNX (rules 1 to 4), fp32, without external data.

    Raises:
        ExportError: a weight is not finite, the model has too many classes for a uint8 mask, the exporter wrote
            another opset than was asked for, left a batch norm, or made a graph that is not valid.
    """
    deployed = deployed_model(model)
    spec = model.spec
    image_NHWC = torch.zeros(1, spec.input_height_px, spec.input_width_px, 3, dtype=torch.uint8)
    with torch.no_grad():
        channels = deployed(image_NHWC)[0].shape[1]
    if channels > MAX_CHANNELS:
        raise ExportError(
            "the model has more classes than a uint8 mask can hold",
            found=channels,
            expected="<= 255",
            hint="leave classes out of the plan, or merge some",
        )
    with _quiet_exporter():
        program = torch.onnx.export(
            deployed,
            (image_NHWC,),
            dynamo=True,
            opset_version=OPSET,
            external_data=False,
            input_names=["image"],
            output_names=list(OUTPUTS),
            verbose=False,
        )
    if program is None:
        raise ExportError(
            "torch.onnx gave no program",
            found=f"torch {torch.__version__}",
            expected="torch >= 2.9",
            hint=EXPORTER_HINT,
        )
    graph = program.model_proto
    check_float_graph(graph)
    fold_padding(graph)
    name_by_module(graph, wrapper="model.", parameters=deployed.state_dict().keys())
    strip_notes(graph)
    write_onnx(path, graph)


def check_float_graph(model: onnx.ModelProto) -> None:
    """Raise `ExportError` unless the opset is the one asked for and every batch norm is folded (rule 3)."""
    if opset_of(model) != OPSET:
        raise ExportError(
            "torch.onnx wrote another opset than was asked for",
            found=opset_of(model),
            expected=OPSET,
            hint=EXPORTER_HINT,
        )
    left = [node.name for node in model.graph.node if node.op_type == "BatchNormalization"]
    if left:
        raise ExportError(
            "a batch norm was not folded into a convolution",
            found=f"{len(left)} left, the first is {left[0]!r}",
            expected="each batch norm right behind a convolution, and onnxscript >= 0.5",
            hint=EXPORTER_HINT,
        )


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep back what the exporter says of itself: torchvision is not needed, and one of its own calls is deprecated."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            yield
    finally:
        registration.setLevel(level)
