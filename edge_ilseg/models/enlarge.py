"""Bilinear enlargement of logits in training, with a backward pass that a CPU does in a fraction of the time.

1. The forward pass is torch's, to the bit. Enlarging is linear along each axis, so its gradient is two small matrix
   products; torch's own backward pass visits every pixel of every channel one by one.
2. Only float32 on a CPU goes this way, and only where a gradient is asked for: an exported graph has no use for it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


def enlarge(x_NCHW: Tensor, height_px: int, width_px: int) -> Tensor:
    """N x C x h x w to N x C x `height_px` x `width_px`; pixel centres, not corners, are aligned."""
    if x_NCHW.requires_grad and x_NCHW.device.type == "cpu" and x_NCHW.dtype == torch.float32:
        enlarged: Tensor = _Enlarge.apply(x_NCHW, height_px, width_px)  # type: ignore[no-untyped-call]
        return enlarged
    return _interpolate(x_NCHW, height_px, width_px)


def _interpolate(x_NCHW: Tensor, height_px: int, width_px: int) -> Tensor:
    return F.interpolate(x_NCHW, size=(height_px, width_px), mode="bilinear", align_corners=False)


class Axes(NamedTuple):
    """The two matrices that enlarge an image, one for each axis."""

    rows_Hh: Tensor
    columns_Ww: Tensor

    @classmethod
    def between(cls, small: Sequence[int], large: Sequence[int], dtype: torch.dtype) -> Axes:
        """From a height and width to another."""
        rows, columns = (_weights(size, enlarged).to(dtype) for size, enlarged in zip(small, large, strict=True))
        return cls(rows, columns)

    def enlarge(self, small_Chw: Tensor) -> Tensor:
        """[N x] C x h x w to C x H x W; the same as `enlarge` up to rounding."""
        return self.rows_Hh @ (small_Chw.contiguous() @ self.columns_Ww.T)

    def gather(self, large_CHW: Tensor) -> Tensor:
        """The way back, which takes a gradient of what was enlarged to that of what it was enlarged from."""
        return (self.rows_Hh.T @ large_CHW) @ self.columns_Ww  # rows first: the products are wide, not narrow


@functools.lru_cache(maxsize=8)
def _weights(size: int, enlarged: int) -> Tensor:
    """The matrix, `enlarged` x `size`, float64, that enlarges a column."""
    with torch.inference_mode(False), torch.no_grad():
        rows = F.interpolate(
            torch.eye(size, dtype=torch.float64)[None], size=enlarged, mode="linear", align_corners=False
        )
        return rows[0].T.contiguous()


class _Enlarge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NCHW: Tensor, height_px: int, width_px: int) -> Tensor:
        ctx.size = x_NCHW.shape[2:]
        return _interpolate(x_NCHW, height_px, width_px)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_NCHW: Tensor) -> tuple[Tensor, None, None]:
        axes = Axes.between(ctx.size, grad_NCHW.shape[2:], grad_NCHW.dtype)
        return axes.gather(grad_NCHW.contiguous()), None, None
