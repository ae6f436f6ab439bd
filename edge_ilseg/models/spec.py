"""What a network is, in data: enough to build it again. No torch here."""

from __future__ import annotations

from typing import Literal

import msgspec

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
