"""EfficientNet-Lite0, 1 and 2: inverted residuals with ReLU6 and without squeeze-and-excitation, made for int8.

Tan & Le, "EfficientNet" (arXiv 1905.11946), and the Lite variants of its authors' code: stem and classifier keep their
width, the first and the last stage their depth. The public weights were trained with TensorFlow's padding and a batch
norm epsilon of 1e-3; both are reproduced. Stochastic depth is left out: it serves training from scratch on ImageNet.

State names: `stem.{conv,bn}`, `stages.<stage>.<block>.{expand,depthwise,project}.{conv,bn}`, `classifier.{conv,fc}`.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from edge_ilseg.models.layers import Activation, Conv2dSame, ConvBatchNorm, StagedEncoder, stage_geometry

STEM_CHANNELS = 32
CLASSIFIER_CHANNELS = 1280
BN_EPS = 1e-3
BN_MOMENTUM = 0.01


class Scaling(NamedTuple):
    """How a variant differs from Lite0."""

    width: float
    depth: float


VARIANTS: dict[str, Scaling] = {
    "efficientnet_lite0": Scaling(1.0, 1.0),
    "efficientnet_lite1": Scaling(1.0, 1.1),
    "efficientnet_lite2": Scaling(1.1, 1.2),
}


class StageTable(NamedTuple):
    """One row of the paper's table 1."""

    kernel: int
    stride: int
    expansion: int
    channels: int
    blocks: int


STAGES = (
    StageTable(3, 1, 1, 16, 1),
    StageTable(3, 2, 6, 24, 2),
    StageTable(5, 2, 6, 40, 2),
    StageTable(3, 2, 6, 80, 3),
    StageTable(5, 1, 6, 112, 3),
    StageTable(5, 2, 6, 192, 4),
    StageTable(3, 1, 6, 320, 1),
)


def scaled_channels(channels: int, width: float) -> int:
    """`channels * width`, rounded to a multiple of 8 and never down by more than 10 %."""
    wanted = channels * width
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * wanted else rounded


def _conv_bn(
    in_channels: int,
    out_channels: int,
    kernel: int,
    activation: Activation | None,
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
) -> ConvBatchNorm:
    conv = Conv2dSame(in_channels, out_channels, kernel, stride, dilation=dilation, groups=groups, bias=False)
    return ConvBatchNorm(conv, activation, eps=BN_EPS, momentum=BN_MOMENTUM)


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise convolution, linear 1x1 projection; a shortcut where shapes allow it."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel: int,
        expansion: int,
        stride: int,
        dilation: int,
        skip: bool,
    ) -> None:
        super().__init__()
        inner = in_channels * expansion
        self.expand = _conv_bn(in_channels, inner, 1, "relu6") if expansion != 1 else nn.Identity()
        self.depthwise = _conv_bn(inner, inner, kernel, "relu6", stride=stride, dilation=dilation, groups=inner)
        self.project = _conv_bn(inner, out_channels, 1, None)
        self.skip = skip

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Transform, and add the input where the block has a shortcut."""
        y_NCHW: Tensor = self.project(self.depthwise(self.expand(x_NCHW)))
        return x_NCHW + y_NCHW if self.skip else y_NCHW


class Classifier(nn.Module):
    """The ImageNet classifier on top of the encoder; used to prove the encoder equal to the published network."""

    def __init__(self, in_channels: int, class_count: int) -> None:
        super().__init__()
        self.conv = _conv_bn(in_channels, CLASSIFIER_CHANNELS, 1, "relu6")
        self.fc = nn.Linear(CLASSIFIER_CHANNELS, class_count)

    def forward(self, features_NCHW: Tensor) -> Tensor:
        """Features N x C x H x W to logits N x K."""
        pooled: Tensor = F.adaptive_avg_pool2d(self.conv(features_NCHW), 1)
        logits_NK: Tensor = self.fc(pooled.flatten(1))
        return logits_NK


class EfficientNetLite(StagedEncoder):
    """Encoder of an EfficientNet-Lite; `class_count` adds the classifier of the classification network.

    Args:
        variant: a key of `VARIANTS`.
        output_stride: 8 or 16 for segmentation, 32 for the classification network.
        class_count: classes of `classifier`; None leaves it out.
    """

    def __init__(self, variant: str, output_stride: int, class_count: int | None = None) -> None:
        super().__init__()
        width, depth = VARIANTS[variant]
        self.stem = _conv_bn(3, STEM_CHANNELS, 3, "relu6", stride=2)
        self.stages = nn.ModuleList()
        channels = STEM_CHANNELS
        geometry = stage_geometry(2, [row.stride for row in STAGES], output_stride)
        for index, (row, (stride, first_dilation, dilation)) in enumerate(zip(STAGES, geometry, strict=True)):
            fixed = index in (0, len(STAGES) - 1)
            out_channels = scaled_channels(row.channels, width)
            blocks = []
            for block in range(row.blocks if fixed else math.ceil(row.blocks * depth)):
                blocks.append(
                    InvertedResidual(
                        channels,
                        out_channels,
                        kernel=row.kernel,
                        expansion=row.expansion,
                        stride=stride if block == 0 else 1,
                        dilation=first_dilation if block == 0 else dilation,
                        skip=block > 0,
                    )
                )
                channels = out_channels
            self.stages.append(nn.Sequential(*blocks))
        self.out_channels = channels
        self.classifier = Classifier(channels, class_count) if class_count is not None else None

    def classify(self, images_NCHW: Tensor) -> Tensor:
        """Normalised images to ImageNet logits N x K.

        Raises:
            ValueError: built without a classifier.
        """
        if self.classifier is None:
            raise ValueError("this EfficientNetLite was built without a classifier")
        logits_NK: Tensor = self.classifier(self.forward(images_NCHW))
        return logits_NK


_PUBLIC_LAYERS = {"_expand_conv": "expand.conv", "_depthwise_conv": "depthwise.conv", "_project_conv": "project.conv"}
_PUBLIC_TOP = {
    "_conv_stem": "stem.conv",
    "_bn0": "stem.bn",
    "_conv_head": "classifier.conv.conv",
    "_bn1": "classifier.conv.bn",
    "_fc": "classifier.fc",
}


def state_name(variant: str, public_name: str) -> str:
    """Our name of a tensor in the public state dict: `_blocks.3._bn0.weight` -> `stages.2.0.expand.bn.weight`.

    A name that is not of that form comes back as it is.
    """
    match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", public_name)
    if match is None:
        layer, _, leaf = public_name.partition(".")
        return f"{_PUBLIC_TOP[layer]}.{leaf}" if layer in _PUBLIC_TOP else public_name
    block, layer, leaf = int(match[1]), match[2], match[3]
    depth = VARIANTS[variant].depth
    stage = 0
    for stage, row in enumerate(STAGES):
        blocks = row.blocks if stage in (0, len(STAGES) - 1) else math.ceil(row.blocks * depth)
        if block < blocks:
            break
        block -= blocks
    # The public names count batch norms where the block has no expansion, too: `_bn1` is always the depthwise one.
    names = {**_PUBLIC_LAYERS, "_bn0": "expand.bn", "_bn1": "depthwise.bn", "_bn2": "project.bn"}
    return f"stages.{stage}.{block}.{names[layer]}.{leaf}" if layer in names else public_name
