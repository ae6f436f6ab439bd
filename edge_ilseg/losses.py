"""Loss functions: pure functions of tensors. `edge_ilseg.terms` names them, and a method is a set of weights over them.

Sources: (P) U. Michieli, P. Zanuttigh, "Incremental Learning Techniques for Semantic Segmentation" (arXiv 1907.13372)
and "Knowledge Distillation for Incremental Learning in Semantic Segmentation" (arXiv 1911.03462); (MiB) Cermelli et
al., "Modeling the Background" (arXiv 2002.00718); (PLOP) Douillard et al., "PLOP: Learning without Forgetting for
Continual Semantic Segmentation" (arXiv 2011.11390); (SPKD) Tung & Mori, "Similarity-Preserving Knowledge Distillation"
(arXiv 1907.09682). docs/method.md says where paper and published code differ.

1. A label that is void (255) takes part in no cross-entropy. Distillation needs no label: its mask is a parameter.
2. A mean over no pixel is 0, with a graph, never NaN.
3. Logits are N x C x H x W; channels 0 .. K-1 of the student are the teacher's channels, in the same order.
4. No gradient flows into the teacher.
5. Half precision is widened to float32 first, and stays so under autocast: sums over pixels and squares of features
   leave the range of float16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from edge_ilseg.errors import TrainingError
from edge_ilseg.methods import Mask, OverClasses, Softmax
from edge_ilseg.metrics import VOID
from edge_ilseg.processes import gather_rows, mean_over_processes, process_count

POD_SCALES = (1, 2, 4)
POD_FEATURE_FACTOR, POD_LOGIT_FACTOR = 0.01, 0.0005
"""PLOP's: how many bands an axis is cut into, and the weights of feature maps and of the logits."""


def _wide(tensor: Tensor) -> Tensor:
    """Float32 in place of half precision (rule 5); others as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _without_autocast(tensor: Tensor) -> torch.autocast:
    """For products and sums in the tensor's own precision (rule 5)."""
    return torch.autocast(tensor.device.type, enabled=False)


def masked_mean(values_NHW: Tensor, mask_NHW: Tensor) -> Tensor:
    """Mean of the values where the mask is true; 0 with a graph where it is true nowhere (rule 2).

    In several processes the mean is over the pixels of all of them: each divides its own sum by the mean count, and
    the averaging of the gradients does the rest.
    """
    return (values_NHW * mask_NHW).sum() / mean_count(mask_NHW)


def mean_count(mask_NHW: Tensor) -> Tensor:
    """What a sum over the mask is divided by for `masked_mean`."""
    count = mean_over_processes(mask_NHW.sum().float())
    return count.clamp(min=1 / process_count())


def cross_entropy(logits_NCHW: Tensor, labels_NHW: Tensor, weight_N: Tensor | None = None) -> Tensor:
    """L_CE: cross-entropy over all channels, mean over the pixels that are not void (1907.13372, eq. 1).

    Args:
        logits_NCHW: float, N x C x H x W.
        labels_NHW: int64 channels, `VOID` is left out.
        weight_N: float, one factor for each image; 1 if left out.
    """
    per_pixel_NHW = F.cross_entropy(_wide(logits_NCHW), labels_NHW, ignore_index=VOID, reduction="none")
    if weight_N is not None:
        per_pixel_NHW = per_pixel_NHW * weight_N[:, None, None]
    return masked_mean(per_pixel_NHW, labels_NHW != VOID)


def cross_entropy_unbiased(
    logits_NCHW: Tensor, labels_NHW: Tensor, old_count: int, weight_N: Tensor | None = None
) -> Tensor:
    """Cross-entropy for labels in which old classes are background (MiB, eq. 4-5).

    A pixel labelled with the background, or as published with any other old class, may be any of them: its
    probability is the sum over all old channels. Mean over the pixels that are not void.

    Args:
        logits_NCHW: float, N x C x H x W, C > `old_count`.
        labels_NHW: int64 channels, `VOID` is left out.
        old_count: K, the channels 0 .. K-1 are the background and the old classes.
        weight_N: float, one factor for each image; 1 if left out.
    """
    log_p_NCHW = F.log_softmax(_wide(logits_NCHW), dim=1)
    any_old_NHW = torch.logsumexp(log_p_NCHW[:, :old_count], dim=1)
    own_NHW = F.nll_loss(log_p_NCHW, labels_NHW, ignore_index=VOID, reduction="none")
    per_pixel_NHW = torch.where(labels_NHW < old_count, -any_old_NHW, own_NHW)
    if weight_N is not None:
        per_pixel_NHW = per_pixel_NHW * weight_N[:, None, None]
    return masked_mean(per_pixel_NHW, labels_NHW != VOID)


def kd_output(
    student_logits_NCHW: Tensor,
    teacher_logits_NKHW: Tensor,
    labels_NHW: Tensor,
    *,
    softmax: Softmax = "all",
    mask: Mask = "old_pixels",
    classes: OverClasses = "sum",
    temperature: float = 1.0,
) -> Tensor:
    """L'_D, distillation of the output layer: -sum over old c of p_teacher[c] * log p_student[c] (1907.13372, eq. 3).

    Args:
        student_logits_NCHW: float, C >= K channels.
        teacher_logits_NKHW: float, the K old channels.
        labels_NHW: int64 channels.
        softmax: over which of the student's channels its softmax runs: `all`, as the authors' code does, or `old`.
        mask: the pixels that the mean is over. `old_pixels`: labelled with an old class or background, as in the
            authors' code. `not_new`: all but those labelled with a new class, void ones too; for data in which the old
            classes' pixels are void. `all`: every pixel, as MiB and its successors do.
        classes: over the old classes, the `sum` of the formula, or the `mean` of MiB and its successors.
        temperature: T: both softmaxes are of z / T, and the term is multiplied by T^2 (Hinton et al., arXiv
            1503.02531, section 2); 1 in the paper.
    """
    old_count = teacher_logits_NKHW.shape[1]
    considered = student_logits_NCHW if softmax == "all" else student_logits_NCHW[:, :old_count]
    log_student_NKHW = F.log_softmax(_over_temperature(considered, temperature), dim=1)[:, :old_count]
    teacher_NKHW = F.softmax(_over_temperature(teacher_logits_NKHW.detach(), temperature), dim=1)
    # The mask goes to the teacher, which has no gradient: the student's side is read once and not written out again.
    mask_NHW = distilled_pixels(labels_NHW, old_count, mask)
    teacher_NKP = (teacher_NKHW * mask_NHW[:, None]).flatten(2)
    with _without_autocast(teacher_NKP):
        agreement: Tensor = torch.linalg.vecdot(teacher_NKP, log_student_NKHW.flatten(2)).sum()
    factor = temperature**2 / (1 if classes == "sum" else old_count)
    return -agreement * factor / mean_count(mask_NHW)


def _over_temperature(logits_NCHW: Tensor, temperature: float) -> Tensor:
    return _wide(logits_NCHW) if temperature == 1 else _wide(logits_NCHW) / temperature


def distilled_pixels(labels_NHW: Tensor, old_count: int, mask: Mask) -> Tensor:
    """Where distillation of the output counts, bool N x H x W; `kd_output` says what the masks are."""
    is_void = labels_NHW == VOID
    if mask == "old_pixels":
        return ~is_void & (labels_NHW < old_count)
    return is_void | (labels_NHW < old_count) if mask == "not_new" else torch.ones_like(is_void)


def kd_unbiased(
    student_logits_NCHW: Tensor, teacher_logits_NKHW: Tensor, background: int, *, alpha: float = 1.0
) -> Tensor:
    """Distillation that knows that the teacher saw new classes as background (MiB, eq. 6-7).

    The teacher's background is compared with the student's background and new classes together. Mean over the old
    channels and over all pixels.

    Args:
        student_logits_NCHW: float, C > K channels.
        teacher_logits_NKHW: float, the K old channels, background among them.
        background: channel of the background.
        alpha: factor of the teacher's logits, which sharpens it above 1; the published default is 1.
    """
    old_count = teacher_logits_NKHW.shape[1]
    log_p_NCHW = F.log_softmax(_wide(student_logits_NCHW), dim=1)
    rest = [background, *range(old_count, student_logits_NCHW.shape[1])]
    log_rest_NHW = torch.logsumexp(log_p_NCHW[:, rest], dim=1)
    log_student = [log_rest_NHW if c == background else log_p_NCHW[:, c] for c in range(old_count)]
    teacher_NKHW = F.softmax(alpha * _wide(teacher_logits_NKHW.detach()), dim=1)
    return -(teacher_NKHW * torch.stack(log_student, dim=1)).mean()


def kd_feature_plain(student_features_NCHW: Tensor, teacher_features_NCHW: Tensor) -> Tensor:
    """L''_D as published: mean squared error over all elements of the encoder's output (1907.13372, eq. 4)."""
    return F.mse_loss(_wide(student_features_NCHW), _wide(teacher_features_NCHW.detach()))


def kd_feature(student_features_NCHW: Tensor, teacher_features_NCHW: Tensor) -> Tensor:
    """L''_D made free of scale: the squared error divided by the teacher's mean square.

    Ours, and the default: the plain error grows with the square of the features' scale, which differs between backbones
    by orders of magnitude, so that one lambda cannot serve them all.
    """
    energy = mean_over_processes(_wide(teacher_features_NCHW.detach()).square().mean())
    return kd_feature_plain(student_features_NCHW, teacher_features_NCHW) / energy.clamp(
        min=torch.finfo(energy.dtype).tiny
    )


def kd_dilation(student_branches: Sequence[Tensor], teacher_branches: Sequence[Tensor]) -> Tensor:
    """L'''_D: mean over the ASPP branches i of the mean square of d_i(student) - d_i(teacher) (1911.03462).

    The branches are compared before they are merged. Where they are logits of classes (DeepLab v2), the student's have
    new channels that the teacher's lack: only the old ones count. The element mean is our reading of the formula.

    Args:
        student_branches: float, N x C_i x h x w each.
        teacher_branches: as many, N x K_i x h x w with K_i <= C_i.
    """
    errors = [
        F.mse_loss(_wide(student[:, : teacher.shape[1]]), _wide(teacher.detach()))
        for student, teacher in zip(student_branches, teacher_branches, strict=True)
    ]
    return torch.stack(errors).mean()


def kd_similarity(student_NCHW: Tensor, teacher_NCHW: Tensor, *, spatial_average: bool = False) -> Tensor:
    """L''''_D: similarities of the images of a batch to each other are kept (SPKD, eq. 1-4; 1911.03462).

    Q is N x (C h w), or N x C with `spatial_average`; G = Q Q^T with each row divided by its L2 norm; the loss is
    ||G_teacher - G_student||_F^2 / N^2. N are the images of the whole batch, those of other processes among them.

    Args:
        student_NCHW: float, a layer of the decoder.
        teacher_NCHW: the same layer of the teacher; only N must be the same.
        spatial_average: average over h and w first.

    Raises:
        TrainingError: there is one image alone, which is similar to itself whatever it is.
    """
    count = student_NCHW.shape[0] * process_count()
    if count < 2:
        raise TrainingError(
            "similarity distillation compares the images of a batch with each other",
            where="term kd_similarity",
            found=f"a batch of {count}",
            expected="2 at least",
            hint="raise the batch size",
        )
    student_NN, teacher_NN = (
        _similarities(gather_rows(x_NCHW.mean(dim=(2, 3)) if spatial_average else x_NCHW.flatten(1)))
        for x_NCHW in (_wide(student_NCHW), _wide(teacher_NCHW.detach()))
    )
    return (teacher_NN - student_NN).square().sum() / count**2


def _similarities(rows_ND: Tensor) -> Tensor:
    """Row-normalised Gram matrix; an epsilon keeps a row of zeros at zero."""
    with _without_autocast(rows_ND):
        return F.normalize(rows_ND @ rows_ND.T, dim=1)


def local_pod(
    student_maps: Sequence[Tensor],
    teacher_maps: Sequence[Tensor],
    student_logits_NCHW: Tensor,
    teacher_logits_NKHW: Tensor,
    background: int | None,
) -> Tensor:
    """Local pooled outputs distillation (PLOP, eq. 3-6), on maps of any height and width.

    For each map, the L2 distance of the two `pod_embedding`s, mean over the images; 0.01 times it for a feature map
    and 0.0005 for the logits, whose new channels are added to the background first. The sum is divided by the number
    of maps and multiplied by sqrt(C / (C - K)).

    Args:
        student_maps: feature maps, float, N x D_i x h_i x w_i.
        teacher_maps: as many, of the same shapes.
        student_logits_NCHW: C channels.
        teacher_logits_NKHW: the K < C old channels.
        background: its channel; None where there is none: the new channels are left out then.
    """
    channels, old_count = student_logits_NCHW.shape[1], teacher_logits_NKHW.shape[1]
    logits_NCHW = _wide(student_logits_NCHW)
    seen_as_old = [logits_NCHW[:, c] for c in range(old_count)]
    if background is not None:
        seen_as_old[background] = seen_as_old[background] + logits_NCHW[:, old_count:].sum(dim=1)
    total = POD_LOGIT_FACTOR * _pod_distance(torch.stack(seen_as_old, dim=1), teacher_logits_NKHW)
    for student, teacher in zip(student_maps, teacher_maps, strict=True):
        total = total + POD_FEATURE_FACTOR * _pod_distance(student, teacher)
    return total * math.sqrt(channels / (channels - old_count)) / (len(student_maps) + 1)


def _pod_distance(student_NDHW: Tensor, teacher_NDHW: Tensor) -> Tensor:
    difference = pod_embedding(student_NDHW) - pod_embedding(teacher_NDHW.detach())
    distance_N: Tensor = torch.linalg.vector_norm(difference, dim=1)
    return distance_N.mean()


def pod_embedding(map_NDHW: Tensor) -> Tensor:
    """Means of the squared map over bands of columns and of rows, at each of `POD_SCALES`; N x E.

    At scale s each row is averaged over s bands of columns and each column over s bands of rows. Where s does not
    divide the size, bands are those of adaptive average pooling, which cover the whole map; the published code takes
    the width for the height, and leaves the rest of a division out.
    """
    squared = _wide(map_NDHW).square()
    height, width = map_NDHW.shape[2:]
    pooled = []
    for scale in POD_SCALES:
        pooled.append(F.adaptive_avg_pool2d(squared, (height, scale)).flatten(1))
        pooled.append(F.adaptive_avg_pool2d(squared, (scale, width)).flatten(1))
    return torch.cat(pooled, dim=1)


def entropy(logits_NKHW: Tensor) -> Tensor:
    """Entropy of the softmax at each pixel, summed over the classes and divided by log K: 0..1 (PLOP, eq. 8)."""
    log_p_NKHW = F.log_softmax(_wide(logits_NKHW), dim=1)
    return -(log_p_NKHW.exp() * log_p_NKHW).sum(dim=1) / math.log(max(logits_NKHW.shape[1], 2))


def pseudo_labels(
    labels_NHW: Tensor, hidden_NHW: Tensor, teacher_logits_NKHW: Tensor, thresholds_K: Tensor
) -> tuple[Tensor, Tensor]:
    """Labels for hidden pixels from a teacher that is sure (PLOP, eq. 7-9).

    A hidden pixel gets the teacher's class where the entropy is below that class's threshold, and becomes void where
    it is not. An image's factor is the share of its hidden pixels that got a label; 1 for an image without any, where
    the published code has 0.

    Args:
        labels_NHW: int64 channels.
        hidden_NHW: bool, pixels whose label the setup hides.
        teacher_logits_NKHW: float.
        thresholds_K: float, for each old class, 0..1.

    Returns:
        Labels int64 N x H x W, and the factor of each image's cross-entropy, float N.
    """
    teacher_NHW = teacher_logits_NKHW.argmax(dim=1)
    sure_NHW = hidden_NHW & (entropy(teacher_logits_NKHW) < thresholds_K[teacher_NHW])
    labels_NHW = torch.where(hidden_NHW, torch.where(sure_NHW, teacher_NHW, VOID), labels_NHW)
    hidden_N, sure_N = hidden_NHW.sum(dim=(1, 2)), sure_NHW.sum(dim=(1, 2))
    factor_N = torch.where(hidden_N > 0, sure_N / hidden_N.clamp(min=1), 1.0)
    return labels_NHW, factor_N
