"""Dilated depthwise convolutions: torch's values and gradients, a plain loop, and what an exported graph has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edge_ilseg.models import depthwise
from edge_ilseg.models.deeplab import DeepLabV3
from edge_ilseg.models.depthwise import DepthwiseConv2d, convolve
from edge_ilseg.models.efficientnet_lite import EfficientNetLite
from edge_ilseg.models.layers import Conv2dSame

CHANNELS = 6
GEOMETRIES = [(3, 2, 7, 10), (3, 5, 7, 10), (5, 2, 7, 10), (5, 3, 9, 4), (3, 9, 7, 10), (3, 4, 1, 1), (7, 2, 5, 5)]
"""Kernel, dilation, height and width: by oneDNN and by taps; with taps that lie outside from everywhere."""


def make_conv(kernel: int, dilation: int) -> DepthwiseConv2d:
    torch.manual_seed(0)
    padding = dilation * (kernel // 2)
    return DepthwiseConv2d(
        CHANNELS, CHANNELS, kernel, padding=padding, dilation=dilation, groups=CHANNELS, bias=False
    ).double()


def by_torch(x_NCHW: Tensor, conv: nn.Conv2d) -> Tensor:
    return F.conv2d(x_NCHW, conv.weight, None, 1, conv.padding, conv.dilation, CHANNELS)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("kernel", "dilation", "height_px", "width_px"), GEOMETRIES)
def test_values_and_gradients_are_those_of_torch(
    kernel: int, dilation: int, height_px: int, width_px: int, memory_format: torch.memory_format
) -> None:
    conv = make_conv(kernel, dilation)
    x_NCHW = torch.randn(2, CHANNELS, height_px, width_px, dtype=torch.float64).contiguous(memory_format=memory_format)
    x_NCHW.requires_grad_(True)
    found, wanted = conv(x_NCHW), by_torch(x_NCHW, conv)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert found.is_contiguous(memory_format=memory_format)
    weights = torch.randn_like(wanted)
    for own, other in zip(
        torch.autograd.grad(found, (x_NCHW, conv.weight), weights),
        torch.autograd.grad(wanted, (x_NCHW, conv.weight), weights),
        strict=True,
    ):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("at_once", [1, CHANNELS * 70 * 2])
def test_the_gradient_is_the_same_however_many_images_are_taken_at_a_time(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    conv, x_NCHW = make_conv(3, 2), torch.randn(5, CHANNELS, 7, 10, dtype=torch.float64)
    (wanted,) = torch.autograd.grad(by_torch(x_NCHW, conv).square().sum(), conv.weight)
    monkeypatch.setattr(depthwise, "PRODUCTS_AT_ONCE", at_once)
    (found,) = torch.autograd.grad(conv(x_NCHW).square().sum(), conv.weight)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_values_are_those_of_a_loop_over_positions_and_taps() -> None:
    conv = make_conv(3, 5)
    x_NCHW = torch.randn(1, CHANNELS, 6, 7, dtype=torch.float64)
    found, weight_C1KK = conv(x_NCHW), conv.weight.detach()
    for c in range(CHANNELS):
        for i in range(6):
            for j in range(7):
                total = 0.0
                for row in range(3):
                    for column in range(3):
                        y, x = i + 5 * (row - 1), j + 5 * (column - 1)
                        if 0 <= y < 6 and 0 <= x < 7:
                            total += float(weight_C1KK[c, 0, row, column] * x_NCHW[0, c, y, x])
                assert found[0, c, i, j].item() == pytest.approx(total, abs=1e-12)


@pytest.mark.parametrize(("kernel", "dilation"), [(3, 2), (3, 5)])
def test_gradients_are_those_of_finite_differences(kernel: int, dilation: int) -> None:
    conv = make_conv(kernel, dilation)
    x_NCHW = torch.randn(1, CHANNELS, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(conv, {"weight": w}, x), (x_NCHW, conv.weight)
    )


def test_a_frozen_kernel_and_a_frozen_input_have_no_gradient() -> None:
    conv, x_NCHW = make_conv(3, 5), torch.randn(1, CHANNELS, 4, 6, dtype=torch.float64)
    conv(x_NCHW).sum().backward()
    assert conv.weight.grad is not None
    conv.requires_grad_(False)
    assert not conv(x_NCHW).requires_grad
    seen = x_NCHW.requires_grad_(True)
    conv(seen).sum().backward()
    assert seen.grad is not None


class _Refuse:
    @staticmethod
    def apply(*_: object) -> Tensor:
        raise AssertionError("replaced")


@pytest.mark.parametrize(
    "conv",
    [
        DepthwiseConv2d(4, 4, 3, padding=1, groups=4, bias=False),
        DepthwiseConv2d(4, 4, 3, padding=2, dilation=2, groups=2, bias=False),
        DepthwiseConv2d(4, 8, 3, padding=2, dilation=2, groups=4, bias=False),
        DepthwiseConv2d(4, 4, 3, padding=2, dilation=2, groups=4, bias=True),
        DepthwiseConv2d(4, 4, 3, padding=1, dilation=2, groups=4, bias=False),
        Conv2dSame(4, 4, 3, 2, dilation=2, groups=4, bias=False),
    ],
)
def test_every_other_convolution_is_left_to_torch(conv: nn.Conv2d, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depthwise, "_Dilated", _Refuse)
    conv(torch.zeros(1, 4, 9, 9))


def deeplab() -> nn.Module:
    """Its first branch is a 1x1 convolution; the next is the first of the separable ones."""
    return DeepLabV3(4, 4, (2, 3, 5), (2,)).branches[1]


def lite() -> nn.Module:
    """The last stage of EfficientNet-Lite0, dilated at output stride 16."""
    return EfficientNetLite("efficientnet_lite0", 16).stages[-1]


@pytest.mark.parametrize(
    ("module", "channels"),
    [(make_conv(3, 5).float(), CHANNELS), (deeplab(), 4), (lite(), 192)],
    ids=["the convolution", "DeepLab v3", "EfficientNet-Lite"],
)
def test_dilated_depthwise_convolutions_of_the_networks_go_by_taps(
    module: nn.Module, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(depthwise, "_Dilated", _Refuse)
    with pytest.raises(AssertionError, match="replaced"):
        module(torch.zeros(2, channels, 6, 8))


def test_what_torch_refuses_or_takes_as_it_is_is_left_to_torch() -> None:
    conv = make_conv(3, 2).float()
    assert conv(torch.zeros(0, CHANNELS, 4, 4)).shape == (0, CHANNELS, 4, 4)
    assert conv(torch.zeros(CHANNELS, 4, 4)).shape == (CHANNELS, 4, 4)
    with pytest.raises(RuntimeError, match="expected scalar type"):
        conv(torch.zeros(1, CHANNELS, 4, 4, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_left_to_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depthwise, "_Dilated", _Refuse)
    conv = make_conv(3, 2).float()
    with torch.autocast("cpu", dtype=dtype):
        assert conv(torch.zeros(1, CHANNELS, 4, 4)).dtype == dtype
    assert convolve(torch.zeros(1, CHANNELS, 4, 4, dtype=dtype), conv.to(dtype), (2, 2)).dtype == dtype


def test_an_exported_graph_has_the_convolution() -> None:
    program = torch.export.export(make_conv(3, 5).float(), (torch.zeros(1, CHANNELS, 4, 4),))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert names == ["aten.conv2d.default"]
