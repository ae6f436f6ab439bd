"""The stages, one under another: plan -> step -> scores -> bundle. Each is a function from files to files.

`edge_ilseg.planning` decides what a step does, `run_plan` trains and writes it, `evaluate_step` scores it,
`export_step` makes its bundle, and `edge_ilseg.devices.verification` judges that on the device.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_ilseg.bundle import ClassEntry, StepEntry
from edge_ilseg.checkpoint import FORMAT, FORMAT_VERSION, DataRecord, StepRecord, load_model, write_step
from edge_ilseg.config import DataConfig
from edge_ilseg.data import open_data
from edge_ilseg.data.dataset import Dataset
from edge_ilseg.data.step_view import count_pixels, image_set_sha256, presence
from edge_ilseg.errors import NotFiniteError, check_extra
from edge_ilseg.metrics import Metrics
from edge_ilseg.models.freezing import is_encoder_frozen
from edge_ilseg.models.spec import ModelSpec
from edge_ilseg.planning import StepPlan
from edge_ilseg.progress import ProgressCallback, no_progress
from edge_ilseg.scenario import evaluation_lookup
from edge_ilseg.schedule import CHECKPOINT_SECONDS
from edge_ilseg.step_images import check_step_images
from edge_ilseg.step_scores import score_plan, score_step, unscored_error
from edge_ilseg.training_log import TrainingLog, check_tensorboard
from edge_ilseg.workspace import Workspace

if TYPE_CHECKING:
    from edge_ilseg.bundle import Manifest
    from edge_ilseg.calibration.sample import CalibrationImages
    from edge_ilseg.export.parent import ParentBundle
    from edge_ilseg.export.request import ExportRequest
    from edge_ilseg.models.segmentation import SegmentationModel
    from edge_ilseg.train import TrainingRun
    from edge_ilseg.training_state import StateKeeper

TRAINING_MODULES = ("torch", "lightning_fabric", "safetensors")
EXPORT_MODULES = ("torch", "onnx", "onnxruntime", "onnxscript", "openvino", "safetensors")
RECORDED_PACKAGES = ("edge-ilseg", "lightning-fabric", "msgspec", "numpy", "pillow", "safetensors", "torch")


def run_plan(
    workspace: Workspace,
    plan: StepPlan,
    *,
    accelerator: str = "auto",
    devices: int = 1,
    workers: int = 0,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    max_minutes: float | None = None,
    tuning: str = "usual",
    tensorboard: Path | None = None,
    parent_is_scored: bool = False,
    say: Callable[[str], None] = lambda _: None,
    progress: ProgressCallback = no_progress,
) -> StepRecord:
    """Train a planned step, score it on the evaluation split, and write it.

    A run that was killed goes on from its last checkpoint when it is called again with the same plan and arguments
    (`edge_ilseg.training_state`).

    Args:
        workspace: where the parent is, and the step is written.
        plan: what to do.
        accelerator: Lightning Fabric's name of the device: `auto`, `cpu`, `cuda`.
        devices: processes to train in, one on each device; the first one scores and writes.
        workers: processes that decode and augment.
        checkpoint_seconds: between two checkpoints: how much work a kill may cost.
        max_minutes: of training, at most; where not all iterations fit, fewer are run (`edge_ilseg.schedule`).
        tuning: memory format and threads, as `edge_ilseg.tuning.parse_tuning` reads them.
        tensorboard: folder in which TensorBoard's files get a folder of the step's name.
        parent_is_scored: the scores in the parent's record are of the images that the step is scored on, as they are
            now: they are taken, and the parent is not scored again.
        say: told in a sentence when training goes on from a checkpoint or starts anew beside one.
        progress: told what is done.

    Raises:
        EdgeIlsegError: the extra `train` is missing, a loss is not finite, or the disk is full. No step is written
            then, and those that were there are as they were.
    """
    check_extra("train", TRAINING_MODULES, "training")
    if tensorboard is not None:
        check_tensorboard()
    from edge_ilseg.analytic_step import check_one_process, fit_step, kept_statistics
    from edge_ilseg.averaging import average_with
    from edge_ilseg.step_start import choose_tuning, make_models
    from edge_ilseg.training_state import StateKeeper, plan_key, training_folder

    check_one_process(plan, devices)
    model, teacher, weights_sha256 = make_models(workspace, plan)
    record = _blank_record(workspace, plan, model.spec, weights_sha256)
    folder = workspace.step_folder(plan.name)
    where: dict[str, Any] = {"accelerator": accelerator, "devices": devices}
    how: dict[str, Any] = {**where, "max_minutes": max_minutes}
    key = plan_key(record, **how, tuning=tuning)
    keeper = StateKeeper(training_folder(folder), key, seconds=checkpoint_seconds, say=say)
    log = TrainingLog(tensorboard / plan.name if tensorboard is not None else None)
    run: TrainingRun
    try:
        if plan.is_closed_form:
            run = fit_step(workspace, plan, model, accelerator, progress)
        else:
            chosen = (
                keeper.found.header.tuning if keeper.found else choose_tuning(plan, model, tuning, **where, say=say)
            )
            run = _train(plan, model, teacher, workers, keeper=keeper, log=log, tuning=chosen, progress=progress, **how)
    except NotFiniteError:
        keeper.remove()
        raise
    if teacher is not None and plan.method is not None:
        average_with(teacher, model, plan.method.new_share)
    statistics = kept_statistics(workspace, plan, model, run, say, progress)
    scored = plan.parent.metrics if plan.parent is not None and parent_is_scored else {}
    metrics, parent_metrics, unscored = score_plan(plan, model, teacher, scored, run.accelerator, progress)
    if scores := metrics.get(plan.data.eval_split):
        log.score(scores.miou_old, scores.miou_new, scores.miou_all)
    log.close()
    record = _with_run(record, run)
    record = msgspec.structs.replace(record, metrics=metrics, parent_metrics=parent_metrics)
    record = write_step(folder, record, model, log=log.text(), statistics=statistics)
    keeper.remove()
    if unscored:
        raise unscored_error(plan, unscored) from unscored
    return record


def _with_run(record: StepRecord, run: TrainingRun) -> StepRecord:
    """The record with what is known once training has ended."""
    return msgspec.structs.replace(
        record,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        training=msgspec.structs.replace(record.training, iterations=run.iterations),
        accelerator=run.accelerator,
        training_seconds=run.seconds,
    )


def _train(
    plan: StepPlan,
    model: SegmentationModel,
    teacher: SegmentationModel | None,
    workers: int,
    *,
    keeper: StateKeeper,
    devices: int,
    progress: ProgressCallback,
    **how: Any,
) -> TrainingRun:
    """Train the model of a plan on the plan's batches, from the keeper's iteration on."""
    from edge_ilseg.data.loader import training_batches
    from edge_ilseg.processes import process_layout
    from edge_ilseg.step_start import step_facts, threshold_finder
    from edge_ilseg.train import train

    first, processes = keeper.first_iteration, process_layout(devices).processes
    batches = training_batches(
        plan.view, model.spec, plan.settings, first_iteration=first, workers=workers, devices=processes
    )
    return train(
        model,
        batches,
        plan.settings,
        teacher=teacher,
        method=plan.method,
        facts=step_facts(plan, model),
        find_thresholds=threshold_finder(plan, progress),
        keeper=keeper,
        devices=devices,
        progress=progress,
        **how,
    )


def _blank_record(workspace: Workspace, plan: StepPlan, spec: ModelSpec, weights_sha256: str | None) -> StepRecord:
    """What is known of a step before it is trained; hashes, scores and times are filled in afterwards."""
    return StepRecord(
        format=FORMAT,
        format_version=FORMAT_VERSION,
        id="",
        index=plan.index,
        name=plan.name,
        created="",
        parent_id=plan.parent.id if plan.parent else None,
        parent_name=plan.parent.name if plan.parent else None,
        classes=plan.classes,
        background=plan.background,
        method=plan.method,
        model=spec,
        initial_weights=plan.parent.id if plan.parent else Path(workspace.config.weights).name,
        initial_weights_sha256=weights_sha256,
        training=plan.settings,
        data=_data_record(plan),
        packages={name: metadata.version(name) for name in RECORDED_PACKAGES} | {"python": platform.python_version()},
        accelerator="",
        training_seconds=0.0,
        weights_sha256="",
        weights_bytes=0,
        encoder_sha256="",
        metrics={},
        parent_metrics={},
    )


def _data_record(plan: StepPlan) -> DataRecord:
    return DataRecord(
        kind=plan.data.kind,
        options=plan.data.options,
        from_workspace=plan.from_workspace,
        train_split=plan.data.train_split,
        setup=plan.data.setup,
        partition_seed=plan.data.partition_seed,
        image_ids=plan.view.image_ids,
        images_sha256=image_set_sha256(plan.view.image_ids, plan.view.dataset),
    )


def evaluate_step(
    workspace: Workspace,
    record: StepRecord,
    *,
    split: str | None = None,
    data: DataConfig | None = None,
    progress: ProgressCallback = no_progress,
) -> Metrics:
    """Score a step on `split` of the workspace's data set, or of another one.

    Raises:
        EdgeIlsegError: the extra `train` is missing, the step is damaged, or there is no data.
    """
    check_extra("train", TRAINING_MODULES, "evaluation of a step")
    model = load_model(workspace.step_folder(record.name), record)
    data = data or workspace.config.data
    return score_step(model, record, open_data(data), split or data.eval_split, record.training.geometry, progress)


def export_step(
    workspace: Workspace,
    record: StepRecord,
    request: ExportRequest,
    out: Path,
    *,
    calibration_count: int = 96,
    parent: Path | None = None,
    data: DataConfig | None = None,
    evaluation_data: DataConfig | None = None,
    replace: bool = False,
    progress: ProgressCallback = no_progress,
) -> Manifest:
    """Make the bundle of a step: int8 calibrated on the step's own images, scored on the evaluation split.

    Args:
        workspace: where the step is.
        record: the step.
        request: targets, precisions and how.
        out: folder of the bundle.
        calibration_count: how many of the step's images the int8 ranges are taken from, at most.
        parent: folder of the parent step's bundle; None looks in the workspace, under the parent's name.
        data: where the images that the step learned from are, if not in the workspace's data set.
        evaluation_data: labelled images to score the models on, if not those of the workspace.
        replace: put the new bundle in the place of one that is there.
        progress: told what is done.

    Raises:
        EdgeIlsegError: the extra `export` is missing, the step or its images are damaged or gone, a form of the model
            does not compute what it should, or the disk is full. No bundle is written then.
    """
    check_extra("export", EXPORT_MODULES, "export")
    from edge_ilseg.export.package import export_bundle

    scored = evaluation_data or workspace.config.data
    dataset = open_data(scored)
    lookup = evaluation_lookup(dataset.info.classes, dataset.info.background, record.class_names)
    needs_calibration = "int8" in request.precisions and request.ranges != "weights-only"
    learned_from = open_data(data or workspace.config.data) if needs_calibration else dataset

    def evaluation() -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
        for image_id in dataset.ids(scored.eval_split):
            yield dataset.read_image(image_id), lookup[dataset.read_labels(image_id)]

    entry = StepEntry(
        index=record.index,
        name=record.name,
        id=record.id,
        parent_id=record.parent_id,
        method=record.method.name if record.method else "base",
        encoder_sha256=record.encoder_sha256,
        encoder_frozen=record.method is not None and is_encoder_frozen(record.method.freeze, record.model.backbone),
    )
    return export_bundle(
        load_model(workspace.step_folder(record.name), record),
        out,
        request=request,
        step=entry,
        parent=_parent_bundle(workspace, record, entry, parent) if parent or "int8" in request.precisions else None,
        classes=tuple(ClassEntry(item.name, item.step, item.color) for item in record.classes),
        background=record.background,
        calibration=_calibration_images(record, learned_from, calibration_count, progress)
        if needs_calibration
        else None,
        evaluation=evaluation if scored.eval_split else None,
        evaluation_name=f"{scored.kind}:{scored.eval_split}" if scored.eval_split else None,
        progress=progress,
        replace=replace,
    )


def _parent_bundle(
    workspace: Workspace, record: StepRecord, step: StepEntry, folder: Path | None
) -> ParentBundle | None:
    """The bundle that was named, else the one that `export` made of the parent step, if it is there."""
    from edge_ilseg.export.parent import load_parent

    if folder is None and record.parent_name is not None:
        usual = workspace.bundle_folder(record.parent_name)
        folder = usual if usual.exists() else None
    return load_parent(folder, step) if folder is not None else None


def _calibration_images(
    record: StepRecord, dataset: Dataset, count: int, progress: ProgressCallback
) -> CalibrationImages:
    """A seeded choice among the images that the step learned from, each of its new classes among them.

    Raises:
        DataError: an image that the step learned from is not in the data set, or is another one.
    """
    from edge_ilseg.calibration.sample import CalibrationImages, choose_images

    check_step_images(record, dataset)
    ids = record.data.image_ids
    pixels_NK = count_pixels(dataset, ids, progress)
    shown = presence(dataset.info, ids, pixels_NK)
    new = [name for name in record.new_classes if name != record.background]
    chosen = choose_images(shown, new, count, record.training.seed)
    return CalibrationImages(chosen, image_set_sha256(chosen, dataset), dataset.read_image, at_hand=tuple(ids))
