"""Loss terms: pure functions of tensors. A method is a set of weights over them (`edge_ilseg.methods`), not a class.

Source: U. Michieli, P. Zanuttigh, "Incremental Learning Techniques for Semantic Segmentation" (arXiv 1907.13372) and
"Knowledge Distillation for Incremental Learning in Semantic Segmentation" (arXiv 1911.03462); docs/method.md says where
paper and published code differ. The total is L = L_CE + sum of lambda * L_D over the distillation terms.

1. Void (255) takes part in no term.
2. A mean over no pixel is 0, with a graph, never NaN.
3. Logits are N x C x H x W; channels 0 .. K-1 of the student are the teacher's channels, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from edge_ilseg.errors import TrainingError
from edge_ilseg.metrics import VOID

PixelMask = Literal["old_pixels", "all"]
SoftmaxOver = Literal["all", "old"]


def masked_mean(values_NHW: Tensor, mask_NHW: Tensor) -> Tensor:
    """Mean of the values where the mask is true; 0 with a graph where it is true nowhere (rule 2).

    In several processes the mean is over the pixels of all of them: each divides its own sum by the mean count, and
    the averaging of the gradients does the rest.
    """
    count = _mean_over_processes(mask_NHW.sum().float())
    smallest = 1 / _process_count()
    return (values_NHW * mask_NHW).sum() / count.clamp(min=smallest)


def _process_count() -> int:
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if is_distributed else 1


def _mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a number that has no gradient over all processes; the number itself where there is one."""
    if _process_count() == 1:
        return value
    total = value.clone()
    torch.distributed.all_reduce(total)
    return total / _process_count()


def cross_entropy(logits_NCHW: Tensor, labels_NHW: Tensor) -> Tensor:
    """L_CE: cross-entropy over all channels, mean over the pixels that are not void (1907.13372, eq. 1).

    Args:
        logits_NCHW: float, N x C x H x W.
        labels_NHW: int64 channels, `VOID` is left out.
    """
    per_pixel_NHW = F.cross_entropy(logits_NCHW, labels_NHW, ignore_index=VOID, reduction="none")
    return masked_mean(per_pixel_NHW, labels_NHW != VOID)


def kd_output(
    student_logits_NCHW: Tensor,
    teacher_logits_NKHW: Tensor,
    labels_NHW: Tensor,
    *,
    softmax: SoftmaxOver = "all",
    mask: PixelMask = "old_pixels",
) -> Tensor:
    """L'_D, distillation of the output layer: -sum over old c of p_teacher[c] * log p_student[c] (1907.13372, eq. 3).

    Args:
        student_logits_NCHW: float, C >= K channels.
        teacher_logits_NKHW: float, the K old channels; no gradient flows into it.
        labels_NHW: int64 channels.
        softmax: over which of the student's channels its softmax runs: `all`, as the authors' code does, or `old`.
        mask: `old_pixels` takes the mean over the pixels labelled with an old class or background, as the authors'
            code does; `all` over every pixel that is not void.
    """
    old_count = teacher_logits_NKHW.shape[1]
    considered = student_logits_NCHW if softmax == "all" else student_logits_NCHW[:, :old_count]
    log_student_NKHW = F.log_softmax(considered, dim=1)[:, :old_count]
    teacher_NKHW = F.softmax(teacher_logits_NKHW.detach(), dim=1)
    per_pixel_NHW = -(teacher_NKHW * log_student_NKHW).sum(dim=1)
    counted_NHW = labels_NHW != VOID
    if mask == "old_pixels":
        counted_NHW = counted_NHW & (labels_NHW < old_count)
    return masked_mean(per_pixel_NHW, counted_NHW)


def kd_feature_plain(student_features_NCHW: Tensor, teacher_features_NCHW: Tensor) -> Tensor:
    """L''_D as published: mean squared error over all elements of the encoder's output (1907.13372, eq. 4)."""
    return F.mse_loss(student_features_NCHW, teacher_features_NCHW.detach())


def kd_feature(student_features_NCHW: Tensor, teacher_features_NCHW: Tensor) -> Tensor:
    """L''_D made free of scale: the squared error divided by the teacher's mean square.

    Ours, and the default: the plain error grows with the square of the features' scale, which differs between backbones
    by orders of magnitude, so that one lambda cannot serve them all.
    """
    energy = _mean_over_processes(teacher_features_NCHW.detach().square().mean())
    return kd_feature_plain(student_features_NCHW, teacher_features_NCHW) / energy.clamp(
        min=torch.finfo(energy.dtype).tiny
    )


@dataclass(frozen=True)
class LossInputs:
    """What the terms are computed from, for one batch."""

    student_logits_NCHW: Tensor
    teacher_logits_NKHW: Tensor
    student_features_NCHW: Tensor
    teacher_features_NCHW: Tensor
    labels_NHW: Tensor
    softmax: SoftmaxOver = "all"
    mask: PixelMask = "old_pixels"


DISTILLATION_TERMS: dict[str, Callable[[LossInputs], Tensor]] = {
    "kd_output": lambda x: kd_output(
        x.student_logits_NCHW, x.teacher_logits_NKHW, x.labels_NHW, softmax=x.softmax, mask=x.mask
    ),
    "kd_feature": lambda x: kd_feature(x.student_features_NCHW, x.teacher_features_NCHW),
    "kd_feature_plain": lambda x: kd_feature_plain(x.student_features_NCHW, x.teacher_features_NCHW),
}


def distillation_loss(inputs: LossInputs, weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Each weighted term lambda * L_D, by name; `weights` come from a method and are checked there."""
    return {name: weight * DISTILLATION_TERMS[name](inputs) for name, weight in weights.items() if weight}


def check_finite(terms: Mapping[str, Tensor], iteration: int) -> None:
    """Stop before the optimiser sees a loss that is not finite.

    Raises:
        TrainingError: names the term, the iteration and what to change.
    """
    for name, value in terms.items():
        if not torch.isfinite(value):
            raise TrainingError(
                "the loss is not finite; the weights were not changed by this iteration and no step was written",
                where=f"term {name}, iteration {iteration}",
                found=f"{value.item()}",
                expected="a finite number",
                hint="lower --learning-rate"
                + (f", or the weight of this term (--loss {name}=...)" if name != "cross_entropy" else ""),
            )
