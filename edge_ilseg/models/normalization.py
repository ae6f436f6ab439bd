"""From the bytes of an image to what a network takes; the same for training, evaluation and the exported graph."""

from __future__ import annotations

import torch
from torch import Tensor

from edge_ilseg.models.spec import ModelSpec, normalization


def normalize(images_NHWC: Tensor, spec: ModelSpec) -> Tensor:
    """uint8 N x H x W x 3 (RGB) to float32 N x 3 x H x W, `(x - mean) / std` as the backbone's weights expect.

    The result is on the device of `images_NHWC`.
    """
    pixels_NCHW = images_NHWC.to(torch.float32).permute(0, 3, 1, 2)
    mean, std = (
        torch.tensor(levels, dtype=torch.float32, device=images_NHWC.device).reshape(1, 3, 1, 1)
        for levels in normalization(spec.backbone)
    )
    return (pixels_NCHW - mean) / std
