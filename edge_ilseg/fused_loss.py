"""Cross-entropy and L'_D together, from logits that have not been enlarged: what a step on a CPU learns from.

1. Values and gradients are those of `losses.cross_entropy` and `losses.kd_output` (with the softmax over all channels
   and without temperature) of the enlarged logits, up to rounding.
2. Both terms read one softmax, an image at a time: what is as large as the image stays in the processor's cache, and
   nothing of the size of the batch is ever written.
3. The gradient is known in closed form and taken while the softmax p is at hand: p - 1 at the label for cross-entropy,
   p - q at the old channels for L'_D, q being the teacher's softmax. Enlarging is linear, and so is the way back
   (`models.enlarge`): the gradient of the sum goes that way once. With a teacher, whoever asks for one term's gradient
   alone gets it from a second pass.
4. Before it is enlarged, each position's largest logit is taken off. That moves all channels of a pixel by the same,
   so its softmax stays, and none of its logits is above 0. Where all of them could lie so far below that their
   exponentials vanish, between positions that are sure of different classes, the largest is taken off again afterwards.
5. `can_fuse` says where it holds; everything else goes through `losses`.
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

LOWEST = -80.0
"""The exponential of a logit above it is a normal number in float32."""


class FusedTerms(NamedTuple):
    """The two terms, scalars with gradients into the student's coarse logits."""

    cross_entropy: Tensor
    kd_output: Tensor
    """Weighted; 0 without a teacher."""


def can_fuse(output: SegmentationOutput, method: Method | None) -> bool:
    """Whether cross-entropy and, if the method has it, L'_D of this output may be computed here (rule 5)."""
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
    weight: float = 1.0,
    mask: Mask = "old_pixels",
    mean_over_classes: bool = False,
) -> FusedTerms:
    """L_CE (1907.13372, eq. 1) and lambda * L'_D (eq. 3) of one batch.

    Args:
        student: C channels.
        labels_NHW: int64 channels at the image's size, `VOID` is left out of cross-entropy.
        teacher: K <= C channels; None: cross-entropy alone.
        weight: lambda.
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
        distilled_NHW = is_distilled_NHW.to(known_NHW.dtype) * weight / divisor
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
        gradient_NChw = torch.empty_like(coarse_NChw) if ctx.needs_input_grad[0] else None
        batch = coarse_NChw, teacher_NKhw, channels_NHW, known_NHW, distilled_NHW
        totals = _sum_up(*batch, gradient_NChw)
        ctx.save_for_backward(gradient_NChw, *(() if teacher_NKhw is None else batch))
        return totals[0], totals[1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_cross_entropy: Tensor, grad_kd_output: Tensor) -> tuple[Tensor | None, ...]:
        gradient_NChw, *batch = ctx.saved_tensors
        if not batch or torch.equal(grad_cross_entropy, grad_kd_output):
            return grad_cross_entropy * gradient_NChw, None, None, None, None
        coarse_NChw, teacher_NKhw, channels_NHW, known_NHW, distilled_NHW = batch
        known_NHW, distilled_NHW = grad_cross_entropy * known_NHW, grad_kd_output * distilled_NHW
        gradient_NChw = torch.empty_like(coarse_NChw)
        _sum_up(coarse_NChw, teacher_NKhw, channels_NHW, known_NHW, distilled_NHW, gradient_NChw)
        return gradient_NChw, None, None, None, None


def _sum_up(
    coarse_NChw: Tensor,
    teacher_NKhw: Tensor | None,
    channels_NHW: Tensor,
    known_NHW: Tensor,
    distilled_NHW: Tensor | None,
    gradient_NChw: Tensor | None,
) -> Tensor:
    """The two sums over all pixels; the gradient of both together is written into `gradient_NChw`, if it is given."""
    axes = Axes.between(coarse_NChw.shape[2:], channels_NHW.shape[1:], coarse_NChw.dtype)
    totals = coarse_NChw.new_zeros(2)
    for n in range(len(coarse_NChw)):
        p_CHW, own_1HW = _enlarge(axes, coarse_NChw[n]), channels_NHW[n, None]
        z_own_HW = p_CHW.gather(0, own_1HW)[0]
        q_KHW = q_sum_HW = agreement_HW = None
        if teacher_NKhw is not None:
            q_KHW = _enlarge(axes, teacher_NKhw[n]).exp_()
            q_sum_HW = q_KHW.sum(dim=0)
            agreement_HW = torch.linalg.vecdot(q_KHW, p_CHW[: len(q_KHW)], dim=0) / q_sum_HW
        p_sum_HW = p_CHW.exp_().sum(dim=0)
        log_sum_HW = p_sum_HW.log()
        counts_HW = known_NHW[n]
        totals[0] += ((log_sum_HW - z_own_HW) * counts_HW).sum()
        if agreement_HW is not None and distilled_NHW is not None:
            totals[1] += ((log_sum_HW - agreement_HW) * distilled_NHW[n]).sum()
            counts_HW = counts_HW + distilled_NHW[n]
        if gradient_NChw is None:
            continue
        p_CHW *= counts_HW / p_sum_HW
        p_CHW.scatter_add_(0, own_1HW, -known_NHW[n, None])
        if q_KHW is not None and q_sum_HW is not None and distilled_NHW is not None:
            p_CHW[: len(q_KHW)].addcmul_(q_KHW, distilled_NHW[n] / q_sum_HW, value=-1)
        gradient_NChw[n] = axes.gather(p_CHW)
    return totals


def _enlarge(axes: Axes, coarse_Chw: Tensor) -> Tensor:
    """C x H x W: logits whose softmax is that of the enlarged ones, none above 0 (rule 4)."""
    below_Chw = coarse_Chw - coarse_Chw.amax(dim=0)
    z_CHW = axes.enlarge(below_Chw)
    if below_Chw.min() < LOWEST:
        z_CHW -= z_CHW.amax(dim=0)
    return z_CHW
