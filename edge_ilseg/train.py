"""Training of step 0 and of every later step; the iterations themselves are in `edge_ilseg.training_loop`.

1. The teacher is the parent's model: frozen, in eval mode, on the same augmented crop as the student.
2. What the method freezes has no gradient, is not in the optimiser, and keeps its batch norm statistics to the bit.
3. What is frozen is the teacher's: it runs once for both, without gradients (`edge_ilseg.trunk`).
4. Several processes share each batch; the first one goes on with the result, the others end (`WorkerDone`).
5. A killed run goes on from its checkpoint (`edge_ilseg.training_state`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from edge_ilseg.allocator import give_back_memory, keep_freed_memory
from edge_ilseg.config import TrainConfig
from edge_ilseg.errors import TrainingError
from edge_ilseg.feature_cache import FeatureCache, open_cache
from edge_ilseg.methods import Method
from edge_ilseg.models.segmentation import SegmentationModel
from edge_ilseg.processes import check_batch, process_layout
from edge_ilseg.progress import ProgressCallback
from edge_ilseg.schedule import Schedule
from edge_ilseg.terms import StepFacts, needs_teacher
from edge_ilseg.training_log import TrainingLog
from edge_ilseg.training_loop import Course, Loop, fit_schedule, run_iterations
from edge_ilseg.training_state import StateKeeper
from edge_ilseg.trunk import check_trunk_is_shared
from edge_ilseg.tuning import FIXED, FORMATS, Tuning, threads_of


class WorkerDone(Exception):
    """Raised at the end of training in every process but the first (rule 4)."""


@dataclass(frozen=True)
class TrainingRun:
    """What a run leaves beside the weights: how long it took, on what, and the loss terms of its last iterations."""

    seconds: float
    accelerator: str
    final_terms: dict[str, float]
    iterations: int
    """How many there were in all; fewer than asked for when a budget of time has room for fewer."""


def make_optimizer(model: SegmentationModel, settings: TrainConfig) -> torch.optim.SGD:
    """SGD over the parameters that are not frozen; weight decay on convolution weights alone (see `TrainConfig`)."""
    groups = []
    for name, part, rate in (
        ("encoder", model.encoder, settings.learning_rate),
        ("decoder", model.decoder, settings.learning_rate * settings.decoder_rate_factor),
    ):
        trainable = [parameter for parameter in part.parameters() if parameter.requires_grad]
        for decayed in (True, False):
            parameters = [parameter for parameter in trainable if (parameter.ndim == 4) == decayed]
            if parameters:
                decay = settings.weight_decay if decayed else 0.0
                group = {"params": parameters, "lr": rate, "peak_lr": rate, "weight_decay": decay}
                groups.append({"part": name, **group})
    if not groups:
        raise TrainingError("everything is frozen: there is nothing to train", hint="freeze less")
    return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum)


def train(
    model: SegmentationModel,
    batches: Iterable[tuple[Tensor, Tensor]],
    settings: TrainConfig,
    *,
    teacher: SegmentationModel | None = None,
    method: Method | None = None,
    facts: StepFacts | None = None,
    find_thresholds: Callable[[SegmentationModel], Tensor] | None = None,
    accelerator: str = "auto",
    devices: int = 1,
    keeper: StateKeeper | None = None,
    log: TrainingLog | None = None,
    tuning: Tuning = FIXED,
    max_minutes: float | None = None,
    progress: ProgressCallback,
) -> TrainingRun:
    """Train `model` in place; on CPU it is left there, wherever it was trained.

    Args:
        model: the network of this step, its classifier grown already.
        batches: (images uint8 N x H x W x 3, labels int64 N x H x W in channels, 255 void), `iterations` of them, or
            those from the keeper's first iteration on. With `max_minutes` they are asked for twice.
        settings: optimiser, schedule and batch norm mode.
        teacher: the parent's network; needed when the method has a distillation term.
        method: freezing and loss weights; `None` at step 0.
        facts: what the method's losses know of the step; needed with a method.
        find_thresholds: called once with the teacher on its device, for a method with pseudo-labels.
        accelerator: Lightning Fabric's name of the device: `auto`, `cpu`, `cuda`.
        devices: processes, one on each device; Fabric starts the same command in the others, unless torchrun has
            (`edge_ilseg.processes.process_layout`). Each batch is divided among all.
        keeper: has the checkpoint to go on from, and writes the next ones.
        log: gets the rows of `training.csv`.
        tuning: memory format and threads (`edge_ilseg.tuning`).
        max_minutes: of training, at most; where not all iterations fit, fewer are run (`edge_ilseg.schedule`).
        progress: told the share of iterations done and the loss.

    Raises:
        TrainingError: a loss is not finite, everything is frozen, or the batch cannot be divided.
        EdgeIlsegError: the disk is full; the checkpoint before is as it was.
        WorkerDone: in every process but the first, at the end.
    """
    if method is not None and facts is None:
        raise ValueError("a method's losses need the facts of the step")
    fabric = _make_fabric(accelerator, devices, settings)
    _check_same_start(fabric, keeper)
    tuning = fabric.broadcast(tuning)
    found = keeper.found if keeper else None
    if found is not None and facts is not None:
        facts = replace(facts, thresholds_K=found.thresholds_K)
    loop = _make_loop(fabric, model, settings, teacher, method, facts, find_thresholds, tuning)
    cache = _open_cache(loop, batches, keeper)
    loader: Any = cache or batches
    if isinstance(loader, torch.utils.data.DataLoader):
        loader = fabric.setup_dataloaders(loader)
    started = time.perf_counter() - (found.header.seconds if found else 0.0)
    deadline = None if max_minutes is None else started + 60 * max_minutes
    schedule = Schedule(settings.iterations)
    if found is not None:
        loop.restore(found)
        schedule = found.header.schedule
        if log is not None:
            log.restore(found.header.log)
    elif max_minutes is not None:
        with threads_of(tuning):
            schedule = fit_schedule(loop, loader, 60 * max_minutes)
    first = keeper.first_iteration if keeper else 0
    watched = fabric.global_rank == 0
    course = Course(schedule, first, started, deadline, keeper if watched else None, log if watched else None, progress)
    with threads_of(tuning):
        values = run_iterations(loop, loader, course)
    if cache is not None:
        cache.close()
    fabric.barrier()
    if fabric.global_rank:
        raise WorkerDone
    model.cpu().eval()
    give_back_memory()
    return TrainingRun(
        seconds=time.perf_counter() - started,
        accelerator=str(fabric.device),
        final_terms=values,
        iterations=course.schedule.iterations,
    )


def _make_loop(
    fabric: Fabric,
    model: SegmentationModel,
    settings: TrainConfig,
    teacher: SegmentationModel | None,
    method: Method | None,
    facts: StepFacts | None,
    find_thresholds: Callable[[SegmentationModel], Tensor] | None,
    tuning: Tuning,
) -> Loop:
    """Freeze, wrap and move to the device; measure how sure the teacher must be, where that is not known yet."""
    if fabric.device.type == "cpu":
        keep_freed_memory()
    fabric.seed_everything(settings.seed, verbose=False)
    model.set_frozen(method.freeze if method else "none")
    model.set_batch_norm(settings.batch_norm)
    model.train()
    optimizer = make_optimizer(model, settings)
    student, stepper = fabric.setup(model, optimizer)
    student.mark_forward_method("tail")
    if method is None or not needs_teacher(method):
        teacher = None
    if teacher is not None:
        fabric.to_device(teacher.requires_grad_(False).eval())
        check_trunk_is_shared(model, teacher)
    if facts is not None and facts.thresholds_K is not None:
        facts = replace(facts, thresholds_K=fabric.to_device(facts.thresholds_K))
    elif teacher is not None and facts is not None and find_thresholds is not None:
        facts = replace(facts, thresholds_K=find_thresholds(teacher))
    return Loop(fabric, model, student, optimizer, stepper, settings, teacher, method, facts, tuning)


def _open_cache(loop: Loop, batches: Any, keeper: StateKeeper | None) -> FeatureCache | None:
    """What takes the place of the loader where views are shown again (`edge_ilseg.feature_cache`)."""
    if loop.method is None or not loop.settings.augment_views:
        return None
    return open_cache(
        batches,
        loop.teacher or loop.model,
        loop.method,
        has_teacher=loop.teacher is not None,
        autocast=loop.fabric.autocast,
        folder=keeper.folder if keeper else None,
        first=keeper.first_iteration if keeper else 0,
        process=(loop.fabric.global_rank, loop.fabric.world_size),
        memory_format=FORMATS[loop.tuning.memory_format],
    )


def _check_same_start(fabric: Fabric, keeper: StateKeeper | None) -> None:
    """Check that all processes have found the same checkpoint, or none.

    Raises:
        TrainingError: another iteration than the first process's.
    """
    own = keeper.first_iteration if keeper else 0
    first = fabric.broadcast(own)
    if own != first:
        raise TrainingError(
            "the processes do not go on from the same iteration",
            found=f"iteration {own} in process {fabric.global_rank}",
            expected=f"iteration {first}, as in the first process",
            hint="put the workspace where all machines see it, or delete the checkpoint: the hidden folder beside the "
            "step, its name ends in .training",
        )


def training_device(accelerator: str, settings: TrainConfig) -> torch.device:
    """The device that `train` would take in one process.

    Raises:
        TrainingError: this machine has no such device.
    """
    return _make_fabric(accelerator, 1, settings).device


def _make_fabric(accelerator: str, devices: int, settings: TrainConfig) -> Fabric:
    """Lightning Fabric with its processes started.

    Raises:
        TrainingError: this machine has no such devices, or the batch cannot be divided among them.
    """
    layout = process_layout(devices)
    check_batch(settings.batch_size, layout.processes)
    try:
        fabric = Fabric(
            accelerator=accelerator,
            devices=layout.devices,
            num_nodes=layout.nodes,
            strategy="ddp" if layout.processes > 1 else "auto",
            precision=settings.precision,
        )
        fabric.launch()
        return fabric
    except (MisconfigurationException, RuntimeError, ValueError) as error:
        raise TrainingError(
            "this machine cannot train like that",
            found=str(error),
            expected="an accelerator that is there",
            hint="--accelerator auto takes a GPU where there is one, and the CPU otherwise",
        ) from error
