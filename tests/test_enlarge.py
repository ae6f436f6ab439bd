"""Logits are enlarged as torch does it; only the way to their gradient is another."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from edge_ilseg.models.enlarge import enlarge


@pytest.mark.parametrize(
    ("small", "large"), [((7, 10), (112, 160)), ((3, 2), (33, 17)), ((4, 4), (4, 4)), ((1, 5), (9, 5))]
)
def test_values_have_torchs_bits_and_gradients_are_torchs(small: tuple[int, int], large: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x_NCHW = torch.randn(2, 21, *small, requires_grad=True)
    weights_NCHW = torch.randn(2, 21, *large)
    wanted = F.interpolate(x_NCHW, size=large, mode="bilinear", align_corners=False)
    found = enlarge(x_NCHW, *large)
    assert torch.equal(found, wanted)
    (wanted_gradient,) = torch.autograd.grad((wanted * weights_NCHW).sum(), x_NCHW)
    (gradient,) = torch.autograd.grad((found * weights_NCHW).sum(), x_NCHW)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-5, atol=1e-4)


def test_other_types_go_torchs_way() -> None:
    x_NCHW = torch.randn(1, 2, 3, 3, dtype=torch.bfloat16, requires_grad=True)
    enlarged = enlarge(x_NCHW, 6, 6)
    assert enlarged.dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad(enlarged.sum(), x_NCHW)
    assert gradient.float().sum().item() == pytest.approx(72, rel=0.02)
