"""DeepLab heads: features to class logits at the features' size, through parallel dilated convolutions (ASPP).

Both heads keep their growing classifiers, and nothing else that grows, in `classifiers`.
State names: `classifiers.<i>.steps.<k>`; DeepLab v3 also `branches.<i>...`, `pooling` and `projection.{conv,bn}`.
With several classifiers the logits are their sum: one for each branch of DeepLab v2; in DeepLab v3 on request a second
one, `classifiers.1`, that reads the encoder's features past the branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edge_ilseg.models.depthwise import DepthwiseConv2d
from edge_ilseg.models.head import GrowingClassifier
from edge_ilseg.models.layers import ConvBatchNorm


class DecoderBody(NamedTuple):
    """What a decoder computes before its classifiers."""

    merged_NCHW: Tensor
    """What the classifiers read."""
    branches: tuple[Tensor, ...]
    """Outputs of the ASPP branches; none where the branches are the classifiers."""
    skip_NCHW: Tensor | None = None
    """What a second classifier of DeepLab v3 reads: the encoder's features."""


class DeepLabV2(nn.Module):
    """The paper's decoder: parallel dilated 3x3 convolutions from features straight to classes, with bias, summed.

    Chen et al., arXiv 1606.00915, as Michieli & Zanuttigh use it. Each branch is a classifier of its own and grows.

    Args:
        in_channels: channels of the features.
        rates: dilation of each branch.
        class_counts: classes of each step.
        reserved: channels for classes of later steps.
    """

    def __init__(self, in_channels: int, rates: Sequence[int], class_counts: Sequence[int], reserved: int = 0) -> None:
        super().__init__()
        self.classifiers = nn.ModuleList(
            GrowingClassifier(in_channels, class_counts, kernel=3, dilation=rate, reserved=reserved) for rate in rates
        )

    def forward(self, features_NCHW: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Logits N x K x h x w, and each branch's share of them, of the same shape."""
        return self.classify(self.body(features_NCHW))

    def body(self, features_NCHW: Tensor) -> DecoderBody:
        """Nothing is before the classifiers."""
        return DecoderBody(features_NCHW, ())

    def classify(self, body: DecoderBody) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`forward` from the body on."""
        branches = tuple(classifier(body.merged_NCHW) for classifier in self.classifiers)
        return _sum(branches), branches


def _sum(shares_NCHW: Sequence[Tensor]) -> Tensor:
    """The shares of several classifiers, added one after another."""
    logits_NCHW = shares_NCHW[0]
    for share_NCHW in shares_NCHW[1:]:
        logits_NCHW = logits_NCHW + share_NCHW
    return logits_NCHW


def _separable(in_channels: int, out_channels: int, rate: int) -> nn.Sequential:
    depthwise = DepthwiseConv2d(
        in_channels, in_channels, 3, padding=rate, dilation=rate, groups=in_channels, bias=False
    )
    pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    return nn.Sequential(ConvBatchNorm(depthwise, "relu"), ConvBatchNorm(pointwise, "relu"))


class ImagePooling(nn.Module):
    """The image's mean feature through a 1x1 convolution, spread over all positions.

    No batch norm, unlike the published head: over N values per channel its statistics would be noise, and undefined
    for a batch of one.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_in", nonlinearity="relu")
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, features_NCHW: Tensor) -> Tensor:
        """Features N x C x h x w to N x C' x h x w."""
        pooled = F.relu(self.conv(F.adaptive_avg_pool2d(features_NCHW, 1)))
        return pooled.expand(-1, -1, features_NCHW.shape[2], features_NCHW.shape[3])


class DeepLabV3(nn.Module):
    """ASPP of DeepLab v3 (Chen et al., arXiv 1706.05587) in separable convolutions, and a growing 1x1 classifier.

    A 1x1 convolution, three dilated depthwise-separable ones and image pooling, merged by a 1x1 projection. There is no
    dropout.

    Args:
        in_channels: channels of the features.
        channels: of each branch and of the projection.
        rates: dilation of each separable branch.
        class_counts: classes of each step.
        reserved: channels for classes of later steps.
        skip: a second 1x1 classifier, on the features themselves.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        rates: Sequence[int],
        class_counts: Sequence[int],
        reserved: int = 0,
        *,
        skip: bool = False,
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList([ConvBatchNorm(nn.Conv2d(in_channels, channels, 1, bias=False), "relu")])
        self.branches.extend(_separable(in_channels, channels, rate) for rate in rates)
        self.pooling = ImagePooling(in_channels, channels)
        merged = channels * (len(self.branches) + 1)
        self.projection = ConvBatchNorm(nn.Conv2d(merged, channels, 1, bias=False), "relu")
        inputs = (channels, in_channels) if skip else (channels,)
        self.classifiers = nn.ModuleList(GrowingClassifier(size, class_counts, reserved=reserved) for size in inputs)

    def forward(self, features_NCHW: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Logits N x K x h x w, and the branches' outputs before they are merged, N x `channels` x h x w each."""
        return self.classify(self.body(features_NCHW))

    def body(self, features_NCHW: Tensor) -> DecoderBody:
        """The branches, and their projection N x `channels` x h x w."""
        branches = (*(branch(features_NCHW) for branch in self.branches), self.pooling(features_NCHW))
        skip_NCHW = features_NCHW if len(self.classifiers) > 1 else None
        return DecoderBody(self.projection(torch.cat(branches, dim=1)), branches, skip_NCHW)

    def classify(self, body: DecoderBody) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`forward` from the body on."""
        inputs = (body.merged_NCHW,) if body.skip_NCHW is None else (body.merged_NCHW, body.skip_NCHW)
        shares = [classifier(x_NCHW) for classifier, x_NCHW in zip(self.classifiers, inputs, strict=True)]
        return _sum(shares), body.branches
