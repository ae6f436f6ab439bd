"""Cross-entropy and L'_D together, from logits that have not been enlarged: what a step on a CPU learns from.

1. Values and gradients are those of `losses.cross_entropy` and `losses.kd_output` (with the softmax over all channels
   and without temperature) of the enlarged logits, up to rounding.
2. Both terms read one softmax, an image at a time: what is as large as the image stays in the processor's cache, and
   nothing of the size of the batch is ever written.
3. The gradient of both is known in closed form and taken while the softmax is at hand: p - 1 at the label for
   cross-entropy, p - q at the old channels for L'_D, q being the teacher's softmax. Enlarging is linear, and so is the
   way back (`models.enlarge`).
4. `can_fuse` says where it holds; everything else goes through `losses`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from edge_ilseg.losses import distilled_pixels, mean_count
from edge_ilseg.methods import Mask, Method
from edge_ilseg.metrics import VOID
from edge_ilseg.models.enlarge import Axes
from edge_ilseg.models.segmentation import SegmentationOutput


class FusedTerms(NamedTuple):
    """The two terms, scalars with gradients into the student's coarse logits."""

    cross_entropy: Tensor
    kd_output: Tensor
    """0 without a teacher; not weighted."""


def can_fuse(output: SegmentationOutput, method: Method | None) -> bool:
    """Whether cross-entropy and, if the method has it, L'_D of this output may be computed here (rule 4)."""
    coarse_NCHW = output.coarse_NCHW
    if coarse_NCHW.device.type != "cpu" or coarse_NCHW.dtype not in (torch.float32, torch.float64):
        return False
    return method is None or (
        method.cross_entropy == "plain"
        and method.pseudo_labels == "none"
        and not method.logit_adjustment
        and method.kd_softmax == "all"
        and method.kd_temperature == 1
    )


def fused_terms(
    student: SegmentationOutput,
    labels_NHW: Tensor,
    teacher: SegmentationOutput | None = None,
    *,
    mask: Mask = "old_pixels",
    mean_over_classes: bool = False,
) -> FusedTerms:
    """L_CE (1907.13372, eq. 1) and L'_D (eq. 3) of one batch.

    Args:
        student: C channels.
        labels_NHW: int64 channels at the image's size, `VOID` is left out of cross-entropy.
        teacher: K <= C channels; None: cross-entropy alone.
        mask: as of `losses.kd_output`.
        mean_over_classes: divide L'_D by K, as its `classes="mean"`.
    """
    is_known_NHW = labels_NHW != VOID
    known_NHW = is_known_NHW.to(student.coarse_NCHW.dtype) / mean_count(is_known_NHW)
    distilled_NHW = teacher_NKHW = None
    if teacher is not None:
        teacher_NKHW = teacher.coarse_NCHW.detach()
        old_count = teacher_NKHW.shape[1]
        is_distilled_NHW = distilled_pixels(labels_NHW, old_count, mask)
        divisor = mean_count(is_distilled_NHW) * (old_count if mean_over_classes else 1)
        distilled_NHW = is_distilled_NHW.to(known_NHW.dtype) / divisor
    channels_NHW = labels_NHW.where(is_known_NHW, 0)
    terms = _Fused.apply(student.coarse_NCHW, teacher_NKHW, channels_NHW, known_NHW, distilled_NHW)  # type: ignore[no-untyped-call]
    return FusedTerms(*terms)


class _Fused(torch.autograd.Function):
    """The terms of a batch. `known_NHW` and `distilled_NHW` are what a pixel counts in each of them."""

    @staticmethod
    def forward(
        ctx: Any,
        coarse_NChw: Tensor,
        teacher_NKhw: Tensor | None,
        channels_NHW: Tensor,
        known_NHW: Tensor,
        distilled_NHW: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        axes = Axes.between(coarse_NChw.shape[2:], channels_NHW.shape[1:], coarse_NChw.dtype)
        totals = coarse_NChw.new_zeros(2)
        gradients_TNChw = coarse_NChw.new_zeros(2, *(coarse_NChw.shape if ctx.needs_input_grad[0] else (0,)))
        for n, coarse_Chw in enumerate(coarse_NChw):
            z_CHW = axes.enlarge(coarse_Chw)
            z_CHW -= z_CHW.amax(dim=0)
            own_HW = z_CHW.gather(0, channels_NHW[n, None])[0]
            q_KHW = agreement_HW = None
            if teacher_NKhw is not None:
                q_KHW = axes.enlarge(teacher_NKhw[n])
                _softmax_(q_KHW.sub_(q_KHW.amax(dim=0)))
                agreement_HW = torch.linalg.vecdot(q_KHW, z_CHW[: len(q_KHW)], dim=0)
            log_sum_HW = _softmax_(z_CHW)
            p_CHW = z_CHW
            totals[0] += ((log_sum_HW - own_HW) * known_NHW[n]).sum()
            if q_KHW is not None and agreement_HW is not None and distilled_NHW is not None:
                totals[1] += ((log_sum_HW - agreement_HW) * distilled_NHW[n]).sum()
                if ctx.needs_input_grad[0]:
                    gradient_CHW = p_CHW * distilled_NHW[n]
                    gradient_CHW[: len(q_KHW)] -= q_KHW.mul_(distilled_NHW[n])
                    gradients_TNChw[1, n] = axes.gather(gradient_CHW)
            if ctx.needs_input_grad[0]:
                gradient_CHW = p_CHW.mul_(known_NHW[n]).scatter_add_(0, channels_NHW[n, None], -known_NHW[n, None])
                gradients_TNChw[0, n] = axes.gather(gradient_CHW)
        ctx.save_for_backward(gradients_TNChw)
        return totals[0], totals[1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_cross_entropy: Tensor, grad_kd_output: Tensor) -> tuple[Tensor | None, ...]:
        (gradients_TNChw,) = ctx.saved_tensors
        return grad_cross_entropy * gradients_TNChw[0] + grad_kd_output * gradients_TNChw[1], None, None, None, None


def _softmax_(z_CHW: Tensor) -> Tensor:
    """Turn logits whose largest is 0 into their softmax over the channels, in place; the logarithm of its divisor."""
    total_HW = z_CHW.exp_().sum(dim=0)
    z_CHW /= total_HW
    return total_HW.log()
