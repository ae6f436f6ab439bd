"""Layers that the networks are made of.

1. A batch norm that is `held` stays in eval mode whoever calls `train()`, on it or on any module around it: its
   statistics cannot change.
2. Where a stride is taken out to keep the output stride small, the convolutions behind it are dilated instead and the
   weights stay as they are: at the positions that both nets share, they compute the same.
3. A batch norm in training takes its statistics over the whole batch, whatever number of processes shares it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edge_ilseg.models.depthwise import convolve
from edge_ilseg.processes import gather_rows, process_count

Activation = Literal["relu", "relu6"]


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation that can be held in eval mode (rule 1)."""

    held: bool = False

    def forward(self, input: Tensor) -> Tensor:
        """Normalise N x C x H x W; in training by the statistics of the whole batch (rule 3)."""
        if self.training and process_count() > 1:
            return self._forward_together(input)
        return super().forward(input)

    def _forward_together(self, x_NCHW: Tensor) -> Tensor:
        """By mean and variance over all processes; as many values in each."""
        count = x_NCHW.numel() // x_NCHW.shape[1] * process_count()
        own_var_C, own_mean_C = torch.var_mean(x_NCHW.float(), dim=(0, 2, 3), correction=0)
        mean_PC, var_PC = gather_rows(torch.stack((own_mean_C, own_var_C))[None]).unbind(dim=1)
        mean_C = mean_PC.mean(dim=0)
        var_C = (var_PC + (mean_PC - mean_C).square()).mean(dim=0)
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                share = 0.1 if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean_C, share)
                self.running_var.lerp_(var_C * (count / max(count - 1, 1)), share)
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(1)
        scale_C = torch.rsqrt(var_C + self.eps) * self.weight
        shift_C = self.bias - mean_C * scale_C
        return x_NCHW * scale_C[:, None, None].to(x_NCHW) + shift_C[:, None, None].to(x_NCHW)

    def train(self, mode: bool = True) -> Self:
        """Enter training mode unless held."""
        return super().train(mode and not self.held)


def same_padding(size_px: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """Zeros before and after one axis so that a convolution gives ceil(size / stride) values, as in TensorFlow."""
    reach = (kernel - 1) * dilation + 1
    total = max((-(-size_px // stride) - 1) * stride + reach - size_px, 0)
    return total // 2, total - total // 2


class Conv2dSame(nn.Conv2d):
    """Convolution with TensorFlow's "same" padding, which depends on the size of the input.

    For a fixed input size the padding is constant: it goes into the convolution where it is symmetric (every stride
    of 1, and odd sizes at stride 2) and becomes one Pad with constants where it is not (even sizes at stride 2).
    """

    def forward(self, input: Tensor) -> Tensor:
        """Convolve N x C x H x W into N x C' x ceil(H / stride) x ceil(W / stride)."""
        height, width = input.shape[2:]
        top, bottom = same_padding(height, self.kernel_size[0], self.stride[0], self.dilation[0])
        left, right = same_padding(width, self.kernel_size[1], self.stride[1], self.dilation[1])
        padding = (top, left)
        if padding != (bottom, right):
            input = F.pad(input, (left, right, top, bottom))
            padding = (0, 0)
        return convolve(input, self, padding)


class ConvBatchNorm(nn.Module):
    """A convolution without bias, batch norm, and an activation or none."""

    def __init__(
        self, conv: nn.Conv2d, activation: Activation | None, *, eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        super().__init__()
        self.conv = conv
        self.bn = BatchNorm2d(conv.out_channels, eps=eps, momentum=momentum)
        self.activation = activation
        nn.init.kaiming_normal_(conv.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Convolve, normalise, activate."""
        x_NCHW = self.bn(self.conv(x_NCHW))  # nobody else has it, so the activation may write over it
        if self.activation == "relu":
            return F.relu(x_NCHW, inplace=True)
        return F.relu6(x_NCHW, inplace=True) if self.activation == "relu6" else x_NCHW


class StageGeometry(NamedTuple):
    """How one stage of a backbone is strided and dilated."""

    stride: int
    """Of the stage's first block."""
    first_dilation: int
    """Of the convolution that carries the stride: it still reads the grid of the stage before."""
    dilation: int
    """Of every convolution behind it."""


def stage_geometry(stem_stride: int, strides: Sequence[int], output_stride: int) -> list[StageGeometry]:
    """Replace strides by dilation so that the last stage has `output_stride` (rule 2).

    Args:
        stem_stride: stride of all that lies before the stages.
        strides: the stages' strides in the classification network.
        output_stride: wanted input size / feature size; a power of two.
    """
    geometry = []
    reached, dilation = stem_stride, 1
    for stride in strides:
        first_dilation = dilation
        if reached * stride > output_stride:
            dilation *= stride
            stride = 1
        reached *= stride
        geometry.append(StageGeometry(stride, first_dilation, dilation))
    return geometry


class StagedEncoder(nn.Module):
    """What every encoder is: a stem, and stages one behind another; the output of the last one are the features."""

    stem: nn.Module
    stages: nn.ModuleList
    out_channels: int

    def stage_outputs(self, images_NCHW: Tensor) -> tuple[Tensor, ...]:
        """Normalised images N x 3 x H x W to the output of each stage."""
        return self.run_stages(self.stem(images_NCHW), 0, len(self.stages))

    def run_stages(self, x_NCHW: Tensor, first: int, end: int) -> tuple[Tensor, ...]:
        """The outputs of stages `first` .. `end - 1`, from the output of the module before `first`."""
        outputs = []
        for stage in self.stages[first:end]:
            x_NCHW = stage(x_NCHW)
            outputs.append(x_NCHW)
        return tuple(outputs)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Normalised images N x 3 x H x W to features N x `out_channels` x ceil(H / s) x ceil(W / s)."""
        return self.stage_outputs(images_NCHW)[-1]
