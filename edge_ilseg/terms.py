"""The terms that a method weighs, by name: which tensors of teacher and student each loss function gets.

The total is L = L_CE + sum of lambda * L_D over the distillation terms. Everything here is a function of one batch and
of the `Method`; the formulas are in `edge_ilseg.losses`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from edge_ilseg import losses
from edge_ilseg.errors import NotFiniteError
from edge_ilseg.fused_loss import can_fuse, fused_terms
from edge_ilseg.methods import Method
from edge_ilseg.metrics import VOID
from edge_ilseg.models.segmentation import SegmentationOutput
from edge_ilseg.processes import mean_over_processes


@dataclass(frozen=True)
class StepFacts:
    """What the losses know of a step beside the batch."""

    old_count: int
    """K: the channels 0 .. K-1 are the teacher's."""
    background: int | None = None
    """Channel of the background."""
    thresholds_K: Tensor | None = None
    """Entropy below which the teacher is believed, for each old class; with pseudo-labels only."""
    log_frequency_C: Tensor | None = None
    """Logarithm of each channel's share of the step's labelled pixels; with logit adjustment only."""


@dataclass(frozen=True)
class LossInputs:
    """What the terms are computed from, for one batch."""

    student: SegmentationOutput
    teacher: SegmentationOutput
    labels_NHW: Tensor
    method: Method
    facts: StepFacts

    @cached_property
    def student_logits_NCHW(self) -> Tensor:
        """At the image's size."""
        return self.student.logits_NCHW

    @cached_property
    def teacher_logits_NKHW(self) -> Tensor:
        """At the image's size."""
        return self.teacher.logits_NCHW


def _similarity(x: LossInputs) -> Tensor:
    """L''''_D over the layer and with the pooling that the method names."""
    method = x.method
    if method.similarity_layer == "features":
        layers = x.student.features_NCHW, x.teacher.features_NCHW
    elif method.similarity_layer == "logits":
        layers = x.student_logits_NCHW[:, : x.facts.old_count], x.teacher_logits_NKHW
    else:
        pairs = list(zip(x.student.branches, x.teacher.branches, strict=True))
        students = [student[:, : teacher.shape[1]] for student, teacher in pairs]
        teachers = [teacher for _, teacher in pairs]
        joined = method.similarity_pooling != "branches"
        layers = (
            (torch.cat(students, dim=1), torch.cat(teachers, dim=1))
            if joined
            else (torch.stack(students).mean(dim=0), torch.stack(teachers).mean(dim=0))
        )
    return losses.kd_similarity(*layers, spatial_average=method.similarity_pooling == "spatial")


def _background(x: LossInputs) -> int:
    if x.facts.background is None:  # `methods.fit_method` has put another term in its place
        raise ValueError("unbiased distillation without a background class")
    return x.facts.background


DISTILLATION_TERMS: dict[str, Callable[[LossInputs], Tensor]] = {
    "kd_output": lambda x: losses.kd_output(
        x.student_logits_NCHW,
        x.teacher_logits_NKHW,
        x.labels_NHW,
        softmax=x.method.kd_softmax,
        mask=x.method.kd_mask,
        classes=x.method.kd_classes,
        temperature=x.method.kd_temperature,
    ),
    "kd_unbiased": lambda x: losses.kd_unbiased(
        x.student_logits_NCHW, x.teacher_logits_NKHW, _background(x), alpha=x.method.kd_alpha
    ),
    "kd_feature": lambda x: losses.kd_feature(x.student.features_NCHW, x.teacher.features_NCHW),
    "kd_feature_plain": lambda x: losses.kd_feature_plain(x.student.features_NCHW, x.teacher.features_NCHW),
    "kd_dilation": lambda x: losses.kd_dilation(x.student.branches, x.teacher.branches),
    "kd_similarity": _similarity,
    "local_pod": lambda x: losses.local_pod(
        x.student.stages, x.teacher.stages, x.student_logits_NCHW, x.teacher_logits_NKHW, x.facts.background
    ),
}


def needs_teacher(method: Method) -> bool:
    """Whether the teacher has to be run at all."""
    return any(method.losses.values()) or method.pseudo_labels != "none"


def loss_terms(
    output: SegmentationOutput,
    seen: SegmentationOutput | None,
    labels_NHW: Tensor,
    method: Method | None,
    facts: StepFacts | None,
) -> dict[str, Tensor]:
    """Cross-entropy and the method's weighted distillation terms, from what the student and the teacher gave."""
    if method is None or facts is None:
        if can_fuse(output, None):
            return {"cross_entropy": fused_terms(output, labels_NHW).cross_entropy}
        return {"cross_entropy": losses.cross_entropy(output.logits_NCHW, labels_NHW)}
    x = None if seen is None else LossInputs(output, seen, labels_NHW, method, facts)
    known: dict[str, Tensor] = {}
    if can_fuse(output, method):
        weight = method.losses.get("kd_output", 0.0)
        in_mean = method.kd_classes == "mean"
        first, known["kd_output"] = fused_terms(
            output,
            labels_NHW,
            seen if weight else None,
            weight=weight,
            mask=method.kd_mask,
            mean_over_classes=in_mean,
        )
    else:
        logits_NCHW = output.logits_NCHW if x is None else x.student_logits_NCHW
        teacher_logits_NKHW = x.teacher_logits_NKHW if x is not None and method.pseudo_labels != "none" else None
        first = classification_term(logits_NCHW, labels_NHW, method, facts, teacher_logits_NKHW)
    return {"cross_entropy": first} | ({} if x is None else distillation_terms(x, known))


def distillation_terms(inputs: LossInputs, known: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Each weighted term lambda * L_D, by name; the weights were checked when the method was resolved.

    Args:
        inputs: of the batch.
        known: terms that have been computed already, weighted.
    """
    known = known or {}
    return {
        name: known[name] if name in known else weight * DISTILLATION_TERMS[name](inputs)
        for name, weight in inputs.method.losses.items()
        if weight
    }


def classification_term(
    logits_NCHW: Tensor, labels_NHW: Tensor, method: Method, facts: StepFacts, teacher_logits_NKHW: Tensor | None
) -> Tensor:
    """L_CE of a step: plain or unbiased, on the given labels or on those that a sure teacher completes.

    With logit adjustment (Menon et al., arXiv 2007.07314, eq. 10) it is taken of z + tau * log(frequency): what is left
    for z to learn is the evidence for a class and not how often the step's images show it.
    """
    weight_N = None
    if method.logit_adjustment and facts.log_frequency_C is not None:
        shift_C = method.logit_adjustment * facts.log_frequency_C.to(logits_NCHW.device)
        logits_NCHW = logits_NCHW + shift_C[:, None, None]
    if method.pseudo_labels == "entropy" and facts.thresholds_K is not None and teacher_logits_NKHW is not None:
        hidden_NHW = hidden_pixels(labels_NHW, facts.background)
        labels_NHW, weight_N = losses.pseudo_labels(labels_NHW, hidden_NHW, teacher_logits_NKHW, facts.thresholds_K)
    if method.cross_entropy == "unbiased":
        return losses.cross_entropy_unbiased(logits_NCHW, labels_NHW, facts.old_count, weight_N)
    return losses.cross_entropy(logits_NCHW, labels_NHW, weight_N)


def hidden_pixels(labels_NHW: Tensor, background: int | None) -> Tensor:
    """Where a setup that hides old classes puts them: under the background, or under void where there is none."""
    return labels_NHW == (VOID if background is None else background)


def copy_values(terms: Mapping[str, Tensor]) -> Callable[[], dict[str, float]]:
    """Begin to copy the terms to the host; the result waits for them, and for nothing that is queued afterwards.

    That is the one time that an iteration waits for a GPU: by then the backward pass is queued behind.
    """
    stacked = mean_over_processes(torch.stack([value.detach() for value in terms.values()])).to(
        "cpu", non_blocking=True
    )
    copied: Any = torch.cuda.Event() if next(iter(terms.values())).is_cuda else None  # type: ignore[no-untyped-call]
    if copied is not None:
        copied.record()

    def values() -> dict[str, float]:
        if copied is not None:
            copied.synchronize()
        return dict(zip(terms, stacked.tolist(), strict=True))

    return values


def check_finite(values: Mapping[str, float], iteration: int) -> None:
    """Stop before the optimiser sees a loss that is not finite.

    Raises:
        NotFiniteError: names the term, the iteration and what to change.
    """
    for name, value in values.items():
        if not math.isfinite(value):
            raise NotFiniteError(
                "the loss is not finite; the weights were not changed by this iteration and no step was written",
                where=f"term {name}, iteration {iteration}",
                found=f"{value}",
                expected="a finite number",
                hint="lower --learning-rate"
                + (f", or the weight of this term (--loss {name}=...)" if name != "cross_entropy" else ""),
            )
