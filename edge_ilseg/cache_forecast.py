"""What cached features will save and take: the part of a forecast (`edge_ilseg.forecast`) that is about them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec

from edge_ilseg.data.loader import training_batches
from edge_ilseg.feature_cache import cache_bytes, view_shape
from edge_ilseg.feature_views import are_views_reused, needs_logits_alone
from edge_ilseg.planning import StepPlan
from edge_ilseg.terms import needs_teacher

if TYPE_CHECKING:
    from edge_ilseg.models.segmentation import SegmentationModel
    from edge_ilseg.terms import StepFacts


def time_cached(
    plan: StepPlan,
    model: SegmentationModel,
    teacher: SegmentationModel | None,
    facts: StepFacts,
    batch_size: int,
    iterations: int,
    accelerator: str,
) -> float | None:
    """Mean seconds of an iteration from the cache: the first batch again and again, behind one that fills it.

    Args:
        plan: what to do.
        model, teacher: trained by it.
        facts: what the losses know of the step.
        batch_size: of this process.
        iterations: that are timed.
        accelerator: Lightning Fabric's name of the device.

    Returns:
        None where the step keeps no features.
    """
    from edge_ilseg.train import train

    if not are_views_reused(plan.settings, len(plan.view)):
        return None
    view = msgspec.structs.replace(plan.view, image_ids=plan.view.image_ids[:batch_size])
    settings = msgspec.structs.replace(plan.settings, iterations=1 + iterations, batch_size=len(view), augment_views=1)
    ends: list[float] = []

    def note(_text: str, _share: float) -> None:  # after the first iteration and after the last one
        ends.append(time.perf_counter())

    how: dict[str, Any] = {"teacher": teacher, "method": plan.method, "facts": facts, "accelerator": accelerator}
    train(model, training_batches(view, model.spec, settings), settings, **how, progress=note)
    return (ends[-1] - ends[0]) / iterations


def planned_cache_bytes(plan: StepPlan, model: SegmentationModel, teacher: SegmentationModel | None) -> int:
    """What the step's feature cache will take on the disk; 0 where it has none."""
    if plan.method is None:
        return 0
    with_teacher = teacher is not None and needs_teacher(plan.method) and needs_logits_alone(plan.method)
    with_body = plan.method.freeze == "all_but_head"
    shape = view_shape(teacher or model, with_body=with_body, with_teacher=with_teacher)
    return cache_bytes(plan.settings, len(plan.view), shape)
