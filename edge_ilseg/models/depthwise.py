"""Dilated depthwise convolutions on a CPU, where torch's own take many times what their few products need.

1. y(p) = sum over taps t of w(t) x(p + t): one multiplication and addition of the whole map, moved by t, for each tap.
   A tap that lies outside the map from everywhere is left out. The gradient of w(t) is the sum over p of x(p + t) times
   y's, as many images at a time as the cache holds; that of x is the same convolution of y's with the kernel
   turned round.
2. oneDNN, which torch calls, has fast code for the forward pass while the padding is at most `FAST_PADDING_PX`, and
   none for the gradients: `benchmarks/depthwise.py` measures both.
3. Values are torch's up to rounding. Only float32 and float64 on a CPU go this way, and nothing that is being
   compiled or exported: such a graph has the convolution.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FAST_PADDING_PX = 4
"""With more of it oneDNN leaves its vectorised code (AVX2)."""
PRODUCTS_AT_ONCE = 1 << 20
"""Values of a map's products that are in memory at a time (rule 1)."""

Span = tuple[slice, slice]
"""Rows and columns of a map."""


class DepthwiseConv2d(nn.Conv2d):
    """torch's convolution, by taps where rule 1 holds for it."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve N x C x H x W into N x C' x H' x W'."""
        return convolve(input, self, (int(self.padding[0]), int(self.padding[1])))


def convolve(x_NCHW: Tensor, conv: nn.Conv2d, padding: tuple[int, int]) -> Tensor:
    """`conv` with that padding, on every side, in place of its own; by rule 1 where that holds."""
    if _is_dilated_depthwise(conv, padding) and _may_be_replaced(x_NCHW, conv.weight):
        convolved: Tensor = _Dilated.apply(x_NCHW, conv.weight, conv.dilation[0])  # type: ignore[no-untyped-call]
        return convolved
    return F.conv2d(x_NCHW, conv.weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups)


def _is_dilated_depthwise(conv: nn.Conv2d, padding: tuple[int, int]) -> bool:
    """Whether it has one dilation, above 1, a square kernel, keeps the size, and every channel has its own kernel."""
    kernel, dilation = conv.kernel_size[0], conv.dilation[0]
    return (
        dilation > 1
        and conv.in_channels == conv.groups == conv.out_channels
        and conv.bias is None
        and conv.stride == (1, 1)
        and conv.kernel_size == (kernel, kernel)
        and conv.dilation == (dilation, dilation)
        and padding == (dilation * (kernel // 2),) * 2
        and kernel % 2 == 1
    )


def _may_be_replaced(x_NCHW: Tensor, weight_C1KK: Tensor) -> bool:
    return (
        x_NCHW.device.type == "cpu"
        and x_NCHW.dtype in (torch.float32, torch.float64)
        and x_NCHW.dtype == weight_C1KK.dtype
        and x_NCHW.dim() == 4
        and x_NCHW.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


class _Dilated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NCHW: Tensor, weight_C1KK: Tensor, dilation: int) -> Tensor:
        ctx.save_for_backward(x_NCHW, weight_C1KK)
        ctx.dilation = dilation
        return _forward(x_NCHW, weight_C1KK, dilation)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_NCHW: Tensor) -> tuple[Tensor | None, ...]:
        x_NCHW, weight_C1KK = ctx.saved_tensors
        grad_x_NCHW = grad_weight_C1KK = None
        if ctx.needs_input_grad[0]:
            grad_x_NCHW = _forward(grad_NCHW, weight_C1KK.flip(2, 3), ctx.dilation)
        if ctx.needs_input_grad[1]:
            grad_weight_C1KK = _weight_gradient(x_NCHW, weight_C1KK, grad_NCHW, ctx.dilation)
        return grad_x_NCHW, grad_weight_C1KK, None


def _forward(x_NCHW: Tensor, weight_C1KK: Tensor, dilation: int) -> Tensor:
    channels, padding = len(weight_C1KK), dilation * (weight_C1KK.shape[2] // 2)
    if padding <= FAST_PADDING_PX:
        return F.conv2d(x_NCHW, weight_C1KK, padding=padding, dilation=dilation, groups=channels)
    y_NCHW = torch.zeros_like(x_NCHW)
    for row, column, to, source in _taps(x_NCHW, weight_C1KK, dilation):
        y_NCHW[:, :, *to].addcmul_(x_NCHW[:, :, *source], weight_C1KK[:, 0, row, column, None, None])
    return y_NCHW


def _weight_gradient(x_NCHW: Tensor, weight_C1KK: Tensor, grad_NCHW: Tensor, dilation: int) -> Tensor:
    total_C1KK = torch.zeros_like(weight_C1KK)
    images = max(1, PRODUCTS_AT_ONCE // x_NCHW[0].numel())
    parts = zip(torch.split(x_NCHW, images), torch.split(grad_NCHW, images), strict=True)
    for part_NCHW, grad_part_NCHW in parts:
        for row, column, to, source in _taps(x_NCHW, weight_C1KK, dilation):
            products_NCHW = grad_part_NCHW[:, :, *to] * part_NCHW[:, :, *source]
            total_C1KK[:, 0, row, column] += products_NCHW.sum(dim=(0, 2, 3))
    return total_C1KK


def _taps(x_NCHW: Tensor, weight_C1KK: Tensor, dilation: int) -> Iterator[tuple[int, int, Span, Span]]:
    """Row and column of each tap that reaches the map, the part of it that is written, and the part that is read."""
    height_px, width_px = x_NCHW.shape[2:]
    kernel = weight_C1KK.shape[2]
    for row in range(kernel):
        for column in range(kernel):
            down_px, right_px = ((index - kernel // 2) * dilation for index in (row, column))
            if abs(down_px) < height_px and abs(right_px) < width_px:
                rows, columns = _overlap(height_px, down_px), _overlap(width_px, right_px)
                yield row, column, (rows[0], columns[0]), (rows[1], columns[1])


def _overlap(size_px: int, by_px: int) -> Span:
    """Of an axis, the positions from which `by_px` further is still on it, and those further positions."""
    first, end = max(0, -by_px), size_px - max(0, by_px)
    return slice(first, end), slice(first + by_px, end + by_px)
