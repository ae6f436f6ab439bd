"""What a network is, in data: enough to build it again. No torch here."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edge_ilseg.errors import ConfigError

Backbone = Literal[
    "efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2", "resnet18", "resnet50", "resnet101", "tiny"
]
Head = Literal["deeplab_v2", "deeplab_v3"]
Freeze = str
"""`none`, `stem`, `stages:<n>`, `encoder` (E_F of the paper) or `all_but_head`."""


class ModelSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A backbone, a head and the input they are made for."""

    backbone: Backbone = "efficientnet_lite0"
    head: Head = "deeplab_v3"
    output_stride: Literal[8, 16] = 16
    decoder_channels: int = 128
    input_height_px: int = 112
    input_width_px: int = 160
    preallocated_classes: Annotated[int, Meta(ge=0)] = 0
    """Channels that step 0 makes for the classes of all later steps, as the published code does; 0: the head grows."""
    aspp_rates: tuple[int, ...] | None = None
    """Dilations of the head's 3x3 convolutions, in feature pixels; None: by the rule of `aspp_rates`."""
    skip_classifier: bool = False
    """DeepLab v3 alone: a second classifier on the encoder's features, summed with the first; see docs/adr/0012."""


NORMALIZATION: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    # backbone family: mean and standard deviation that the public weights were trained with, in grey levels 0..255
    "efficientnet_lite": ((127.0, 127.0, 127.0), (128.0, 128.0, 128.0)),
    "resnet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "tiny": ((127.0, 127.0, 127.0), (128.0, 128.0, 128.0)),
}


def normalization(backbone: str) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation (grey levels, RGB) that `backbone` expects: `(x - mean) / std`."""
    family = backbone.rstrip("0123456789")
    return NORMALIZATION[family]


ASPP_REACH_PX: dict[Head, tuple[tuple[int, ...], int]] = {
    # published dilations times the published output stride, in image pixels, and the side of the images they were
    # published for: DeepLab v3 6, 12, 18 at stride 16 (12, 24, 36 at 8) on 513 px; the paper's DeepLab v2 6, 12, 18, 24
    # at stride 8 on 321 px.
    "deeplab_v2": ((48, 96, 144, 192), 321),
    "deeplab_v3": ((96, 192, 288), 513),
}


def aspp_rates(spec: ModelSpec) -> tuple[int, ...]:
    """Dilations of the head's parallel 3x3 convolutions, in feature pixels: the spec's own, or by rule.

    The rule keeps the reach of the published rates as a share of the image: rate = reach / output stride * min(1, side
    / published side), where side = sqrt(height * width), rounded half up, at least 1 and strictly increasing. Without
    it, at 160 x 112 and stride 16, a rate of 12 would reach past the 10 x 7 feature map from every position, and the
    3x3 convolution would be a 1x1 one. The rule is part of the checkpoint format: stored models depend on it.

    Raises:
        ConfigError: the spec's own rates are not as many as the head has branches, or not positive.
    """
    reaches, published_side_px = ASPP_REACH_PX[spec.head]
    if spec.aspp_rates is not None:
        if len(spec.aspp_rates) != len(reaches) or min(spec.aspp_rates) < 1:
            raise ConfigError(
                "these dilations do not fit the head",
                where="aspp_rates",
                found=list(spec.aspp_rates),
                expected=f"{len(reaches)} positive integers for {spec.head}",
                hint="give as many rates, or leave aspp_rates out",
            )
        return spec.aspp_rates
    scale = min(1.0, math.sqrt(spec.input_height_px * spec.input_width_px) / published_side_px)
    rates: list[int] = []
    for reach in reaches:
        rates.append(max(math.floor(reach / spec.output_stride * scale + 0.5), rates[-1] + 1 if rates else 1))
    return tuple(rates)
