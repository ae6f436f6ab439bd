"""Score a step and its parent on the images that the step is judged by."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_ilseg.checkpoint import StepRecord
from edge_ilseg.config import Geometry
from edge_ilseg.data.dataset import Dataset
from edge_ilseg.errors import DataError, EdgeIlsegError
from edge_ilseg.metrics import Metrics
from edge_ilseg.planning import StepPlan
from edge_ilseg.progress import ProgressCallback

if TYPE_CHECKING:
    from edge_ilseg.models.segmentation import SegmentationModel


def score_plan(
    plan: StepPlan,
    model: SegmentationModel,
    teacher: SegmentationModel | None,
    parent_scores: dict[str, Metrics],
    device: str,
    progress: ProgressCallback,
) -> tuple[dict[str, Metrics], dict[str, Metrics], EdgeIlsegError | None]:
    """Score the new model and its parent, unless `parent_scores` has it, on the evaluation split.

    An error must not cost the trained model.
    """
    split, dataset, geometry = plan.data.eval_split, plan.view.dataset, plan.settings.geometry
    metrics: dict[str, Metrics] = {}
    parent_metrics: dict[str, Metrics] = {}
    try:
        if split:
            metrics[split] = score_step(model.to(device), plan, dataset, split, geometry, progress)
        if split and teacher is not None and plan.parent is not None and _shows_old_classes(plan):
            known = parent_scores.get(split)
            parent_metrics[split] = known or score_step(
                teacher.to(device), plan.parent, dataset, split, geometry, progress
            )
    except EdgeIlsegError as error:
        return {}, {}, error
    return metrics, parent_metrics, None


def _shows_old_classes(plan: StepPlan) -> bool:
    """Whether the images have a class that the parent knows: new ones from another place may be labelled alone."""
    old = set(plan.class_names[: plan.old_count]) - {plan.background}
    return not old.isdisjoint(plan.view.dataset.info.classes)


def score_step(
    model: SegmentationModel,
    step: StepPlan | StepRecord,
    dataset: Dataset,
    split: str,
    geometry: Geometry,
    progress: ProgressCallback,
) -> Metrics:
    """Score a step's network on a split of a data set."""
    from edge_ilseg.evaluate import evaluate_model

    return evaluate_model(
        model,
        dataset,
        dataset.ids(split),
        step.class_names,
        old_count=step.old_count,
        background=step.background,
        geometry=geometry,
        progress=progress,
    )


def unscored_error(plan: StepPlan, error: EdgeIlsegError) -> DataError:
    return DataError(
        f"step {plan.name} was trained and written, and could not be scored: {error.what}",
        where=error.where,
        found=error.found,
        hint="mend the data, then: edge-ilseg evaluate",
    )
