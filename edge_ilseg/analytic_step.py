"""An analytic step, and the statistics that other steps leave for one.

1. Statistics are exact or not there: at step 0 they are sums over all its images; after a later step they are its
   parent's and its own, where its trunk is its parent's to the bit and its parent has some; otherwise there are none.
2. An analytic step adds its own sums to its parent's and solves for the whole head, the old classes' rows as well.
3. No step fails for want of statistics but an analytic one: what cannot be collected is said, and left out.
4. Unasked, no more than `MOST_BYTES` are left beside a step; a command (`collect_again`) collects any amount.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from edge_ilseg.analytic import collect_statistics, feature_count, fit_head, has_closed_form, install_head
from edge_ilseg.checkpoint import StepRecord, load_model
from edge_ilseg.config import DataConfig
from edge_ilseg.data import open_data
from edge_ilseg.errors import EdgeIlsegError, TrainingError, WorkspaceError
from edge_ilseg.feature_statistics import (
    COLLECT_HINT,
    STATISTICS_NAME,
    FeatureStatistics,
    merge,
    packed_count,
    read_header,
    read_statistics,
    statistics_bytes,
)
from edge_ilseg.files import write_bytes
from edge_ilseg.models.freezing import trunk_sha256
from edge_ilseg.models.segmentation import SegmentationModel, build_model
from edge_ilseg.models.spec import ModelSpec
from edge_ilseg.planning import StepPlan
from edge_ilseg.progress import ProgressCallback, no_progress
from edge_ilseg.step_images import step_view_again
from edge_ilseg.train import TrainingRun, training_device
from edge_ilseg.workspace import Workspace

MOST_BYTES = 256 << 20


@dataclass(frozen=True)
class AnalyticRun(TrainingRun):
    """What solving for a head leaves, beside the head."""

    statistics: FeatureStatistics


def check_one_process(plan: StepPlan, devices: int) -> None:
    """Refuse processes that would only wait.

    Raises:
        TrainingError: several devices for a head in closed form.
    """
    if devices > 1 and plan.is_closed_form:
        raise TrainingError(
            "a head in closed form is solved for in one process, in seconds",
            where="--devices",
            found=devices,
            expected=1,
            hint="leave --devices out",
        )


def fit_step(
    workspace: Workspace, plan: StepPlan, model: SegmentationModel, accelerator: str, progress: ProgressCallback
) -> AnalyticRun:
    """Solve for the head of a planned step (rule 2).

    Args:
        workspace: has the parent's statistics.
        plan: of a method in closed form.
        model: with the second classifier, grown already; its head is put in. It is left on the CPU.
        accelerator: Lightning Fabric's name of the device.
        progress: told the share of images that are done.

    Raises:
        WorkspaceError: the parent's statistics are gone, damaged or of another network.
        TrainingError: a class has no pixel, or there is no such device.
    """
    if plan.parent is None or plan.method is None:
        raise ValueError("an analytic step has a parent and a method")
    folder = workspace.step_folder(plan.parent.name)
    parent = read_statistics(folder)
    if parent is None:
        raise WorkspaceError(
            f"the statistics of step {plan.parent.name} are gone",
            where=folder,
            expected=STATISTICS_NAME,
            hint="collect them again " + COLLECT_HINT,
        )
    device = training_device(accelerator, plan.settings)
    started = time.perf_counter()
    statistics = merge(parent, _collect(plan, model.to(device), progress))
    install_head(model.cpu(), *fit_head(statistics, plan.method.ridge, plan.method.balance))
    seconds = time.perf_counter() - started
    return AnalyticRun(seconds, accelerator=str(device), final_terms={}, iterations=0, statistics=statistics)


def statistics_size(plan: StepPlan, model: SegmentationModel) -> int:
    """Bytes of the sums that a step leaves unasked, where it can leave any (rule 4); 0 where it does not."""
    if not plan.settings.statistics or not has_closed_form(model):
        return 0
    size_bytes = _sums_bytes(model, len(plan.classes))
    return size_bytes if size_bytes <= MOST_BYTES else 0


def sums_bytes(spec: ModelSpec, classes: int) -> int:
    """Bytes of the sums of so many classes, of a network that is not built: for a plan."""
    with torch.device("meta"):
        model = build_model(spec, (classes,))
    return _sums_bytes(model, classes)


def _sums_bytes(model: SegmentationModel, classes: int) -> int:
    return 8 * classes * packed_count(feature_count(model))


def kept_statistics(
    workspace: Workspace,
    plan: StepPlan,
    model: SegmentationModel,
    run: TrainingRun,
    say: Callable[[str], None],
    progress: ProgressCallback,
) -> bytes:
    """What `statistics.safetensors` of a step will hold; nothing where it can have none (rules 1, 3 and 4).

    Args:
        workspace: has the parent's.
        plan: of the step.
        model: as it will be written; it is left on the CPU.
        run: how it was trained.
        say: told why there are none, where they could be expected.
        progress: told the share of images that are done.
    """
    if isinstance(run, AnalyticRun):
        return statistics_bytes(run.statistics) if plan.settings.statistics else b""
    if not statistics_size(plan, model):
        return b""
    try:
        parent = None
        if plan.parent is not None:
            folder = workspace.step_folder(plan.parent.name)
            header = read_header(folder)
            if header is None or header.trunk_sha256 != trunk_sha256(model):
                return b""
            parent = read_statistics(folder)
        own = _collect(plan, model.to(run.accelerator), progress)
        return statistics_bytes(own if parent is None else merge(parent, own))
    except EdgeIlsegError as error:
        say(f"no statistics are left for a later analytic step: {error.one_line()}")
        return b""
    finally:
        model.cpu()


def collect_again(
    workspace: Workspace,
    record: StepRecord,
    *,
    data: DataConfig | None = None,
    accelerator: str = "auto",
    progress: ProgressCallback = no_progress,
) -> FeatureStatistics:
    """Collect the statistics of a step that has none, from its own images, and write them beside its weights.

    Args:
        workspace: where the step is.
        record: the step; a later one than step 0 needs the statistics of its parent.
        data: where its images are, if not in the workspace's data set.
        accelerator: Lightning Fabric's name of the device.
        progress: told the share of images that are done.

    Raises:
        WorkspaceError: there are some already, or the parent has none, or has other features.
        DataError: an image that the step learned from is gone, or is another one.
        ConfigError: the head has no closed form.
        EdgeIlsegError: the disk is full.
    """
    folder = workspace.step_folder(record.name)
    if read_header(folder) is not None:
        raise WorkspaceError(
            f"step {record.name} has statistics already",
            where=folder / STATISTICS_NAME,
            hint="delete the file to collect them anew",
        )
    parent_record = workspace.parent_of(record)
    parent = read_statistics(workspace.step_folder(parent_record.name)) if parent_record is not None else None
    if parent_record is not None and parent is None:
        raise WorkspaceError(
            "the parent has no statistics that those of the step's own images could be added to",
            where=workspace.step_folder(parent_record.name),
            expected=STATISTICS_NAME,
            hint=f"first: edge-ilseg statistics --step {parent_record.name}",
        )
    model = load_model(folder, record).to(training_device(accelerator, record.training))
    statistics = collect_statistics(
        model,
        step_view_again(record, open_data(data or workspace.config.data)),
        record.class_names,
        flip=record.training.flip,
        geometry=record.training.geometry,
        hidden_channel=hidden_channel(
            record.data.setup,
            record.old_count,
            record.class_names.index(record.background) if record.background else None,
        ),
        progress=progress,
    )
    if parent is not None:
        statistics = merge(parent, statistics)
    write_bytes(folder / STATISTICS_NAME, statistics_bytes(statistics))
    return statistics


def hidden_channel(setup: str, old_count: int, background: int | None) -> int | None:
    """The channel under which a step's new images hide pixels of old classes; None where they hide none."""
    return background if setup != "sequential" and old_count else None


def _collect(plan: StepPlan, model: SegmentationModel, progress: ProgressCallback) -> FeatureStatistics:
    return collect_statistics(
        model,
        plan.view,
        plan.class_names,
        flip=plan.settings.flip,
        geometry=plan.settings.geometry,
        hidden_channel=hidden_channel(plan.data.setup, plan.old_count, plan.background_channel),
        progress=progress,
    )
