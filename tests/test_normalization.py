"""Normalisation: the formula, by hand."""

from __future__ import annotations

import pytest
import torch

from edge_ilseg.models.normalization import normalize
from edge_ilseg.models.spec import Backbone, ModelSpec


@pytest.mark.parametrize(
    ("backbone", "expected"),
    [
        ("tiny", [-127 / 128, 1.0, 0.0]),
        ("efficientnet_lite1", [-127 / 128, 1.0, 0.0]),
        ("resnet50", [-123.675 / 58.395, (255 - 116.28) / 57.12, (127 - 103.53) / 57.375]),
    ],
)
def test_grey_levels_become_what_the_backbone_expects(backbone: Backbone, expected: list[float]) -> None:
    images_NHWC = torch.tensor([0, 255, 127], dtype=torch.uint8).expand(2, 4, 5, 3)
    pixels_NCHW = normalize(images_NHWC, ModelSpec(backbone=backbone))
    assert (pixels_NCHW.dtype, pixels_NCHW.shape) == (torch.float32, (2, 3, 4, 5))
    torch.testing.assert_close(pixels_NCHW[1, :, 3, 2], torch.tensor(expected))


def test_the_result_stays_on_the_images_device_and_in_float32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert normalize(torch.zeros(1, 2, 2, 3, dtype=torch.uint8), ModelSpec()).dtype == torch.float32
    on_meta = torch.zeros(1, 2, 2, 3, dtype=torch.uint8, device="meta")
    assert normalize(on_meta, ModelSpec()).device.type == "meta"
