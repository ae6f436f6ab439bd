"""ResNet-18, 50 and 101 (He et al., arXiv 1512.03385), with the stride of a bottleneck in its 3x3 convolution ("v1.5").

That is the form of the widely shared ImageNet weights, whose state dict (`conv1`, `bn1`, `layer1.0.conv1`, ...,
`fc`) loads through `state_name`. State names here: `stem.{conv,bn}`, `stages.<stage>.<block>.{conv1,bn1,...}`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from edge_ilseg.models.layers import BatchNorm2d, ConvBatchNorm, StagedEncoder, StageGeometry, stage_geometry

STAGE_CHANNELS = (64, 128, 256, 512)
STAGE_STRIDES = (1, 2, 2, 2)


class Depth(NamedTuple):
    """Blocks per stage, and whether they are bottlenecks."""

    blocks: tuple[int, int, int, int]
    bottleneck: bool


VARIANTS: dict[str, Depth] = {
    "resnet18": Depth((2, 2, 2, 2), False),
    "resnet50": Depth((3, 4, 6, 3), True),
    "resnet101": Depth((3, 4, 23, 3), True),
}


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    padding = kernel // 2 * dilation
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, dilation, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_in", nonlinearity="relu")
    return conv


class Stem(ConvBatchNorm):
    """7x7 convolution and 3x3 max pooling, stride 4 together."""

    def __init__(self) -> None:
        super().__init__(_conv(3, 64, 7, stride=2), "relu")

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Images N x 3 x H x W to N x 64 x ceil(H / 4) x ceil(W / 4)."""
        return F.max_pool2d(super().forward(images_NCHW), 3, stride=2, padding=1)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    return nn.Sequential(_conv(in_channels, out_channels, 1, stride), BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut; `geometry.first_dilation` is that of the strided one."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, geometry: StageGeometry) -> None:
        super().__init__()
        stride, first_dilation, dilation = geometry
        self.conv1 = _conv(in_channels, channels, 3, stride, first_dilation)
        self.bn1 = BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels, 3, 1, dilation)
        self.bn2 = BatchNorm2d(channels)
        self.downsample = _shortcut(in_channels, channels, stride) if in_channels != channels else nn.Identity()

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Residual plus shortcut, then ReLU."""
        y_NCHW = F.relu(self.bn1(self.conv1(x_NCHW)))
        return F.relu(self.bn2(self.conv2(y_NCHW)) + self.downsample(x_NCHW))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a shortcut."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, geometry: StageGeometry) -> None:
        super().__init__()
        stride, first_dilation, _ = geometry
        out_channels = channels * self.expansion
        self.conv1 = _conv(in_channels, channels, 1)
        self.bn1 = BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels, 3, stride, first_dilation)
        self.bn2 = BatchNorm2d(channels)
        self.conv3 = _conv(channels, out_channels, 1)
        self.bn3 = BatchNorm2d(out_channels)
        self.downsample = _shortcut(in_channels, out_channels, stride) if in_channels != out_channels else nn.Identity()

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Residual plus shortcut, then ReLU."""
        y_NCHW = F.relu(self.bn1(self.conv1(x_NCHW)))
        y_NCHW = F.relu(self.bn2(self.conv2(y_NCHW)))
        return F.relu(self.bn3(self.conv3(y_NCHW)) + self.downsample(x_NCHW))


class ResNet(StagedEncoder):
    """Encoder of a ResNet: everything before the pooling.

    Args:
        variant: a key of `VARIANTS`.
        output_stride: 8 or 16 for segmentation, 32 for the classification network.
    """

    def __init__(self, variant: str, output_stride: int) -> None:
        super().__init__()
        depth = VARIANTS[variant]
        block = Bottleneck if depth.bottleneck else BasicBlock
        self.stem = Stem()
        self.stages = nn.ModuleList()
        in_channels = 64
        geometry = stage_geometry(4, STAGE_STRIDES, output_stride)
        for channels, blocks, first in zip(STAGE_CHANNELS, depth.blocks, geometry, strict=True):
            rest = StageGeometry(1, first.dilation, first.dilation)
            stage = nn.Sequential()
            for index in range(blocks):
                stage.append(block(in_channels, channels, rest if index else first))
                in_channels = channels * block.expansion
            self.stages.append(stage)
        self.out_channels = in_channels


def state_name(variant: str, public_name: str) -> str:  # noqa: ARG001  (one signature for every family)
    """Our name of a tensor in the public state dict: `layer1.0.conv1.weight` -> `stages.0.0.conv1.weight`.

    A name that is not of that form comes back as it is; `fc` becomes `classifier.fc`.
    """
    match = re.fullmatch(r"layer([1-4])\.(.+)", public_name)
    if match is not None:
        return f"stages.{int(match[1]) - 1}.{match[2]}"
    layer, _, leaf = public_name.partition(".")
    top = {"conv1": "stem.conv", "bn1": "stem.bn", "fc": "classifier.fc"}
    return f"{top[layer]}.{leaf}" if layer in top else public_name
