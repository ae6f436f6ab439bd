"""A small plain network for the demo and the tests: seven 3x3 convolutions, quick to train from scratch on a CPU.

Plain convolutions, because on a CPU they are faster to train than depthwise ones of the same accuracy.
State names: `stem.{conv,bn}`, `stages.<stage>.<layer>.{conv,bn}`.
"""

from __future__ import annotations

from torch import nn

from edge_ilseg.models.layers import ConvBatchNorm, StagedEncoder, stage_geometry

STEM_CHANNELS = 24
STAGE_CHANNELS = (32, 64, 96)


def _conv_bn(in_channels: int, out_channels: int, stride: int, dilation: int) -> ConvBatchNorm:
    conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=dilation, dilation=dilation, bias=False)
    return ConvBatchNorm(conv, "relu6")


class Tiny(StagedEncoder):
    """Stem and three stages of two 3x3 convolutions with batch norm and ReLU6.

    Args:
        output_stride: 8 (meant for segmentation) or 16 (the strides as they are).
    """

    def __init__(self, output_stride: int) -> None:
        super().__init__()
        self.stem = _conv_bn(3, STEM_CHANNELS, 2, 1)
        self.stages = nn.ModuleList()
        in_channels = STEM_CHANNELS
        geometry = stage_geometry(2, (2, 2, 2), output_stride)
        for channels, (stride, first_dilation, dilation) in zip(STAGE_CHANNELS, geometry, strict=True):
            first = _conv_bn(in_channels, channels, stride, first_dilation)
            self.stages.append(nn.Sequential(first, _conv_bn(channels, channels, 1, dilation)))
            in_channels = channels
        self.out_channels = in_channels
