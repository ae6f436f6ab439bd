"""The training loop of step 0 and of every later step, readable from top to bottom.

1. The teacher is the parent's model: frozen, in eval mode, on the same augmented crop as the student.
2. What the method freezes has no gradient, is not in the optimiser, and keeps its batch norm statistics to the bit.
3. A loss that is not finite stops the run before the optimiser has seen it.
4. With a frozen encoder, teacher and student have the same features: they are computed once.
5. Several processes share each batch; the first one goes on with the result, the others end (`WorkerDone`).
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

from edge_ilseg.config import TrainConfig
from edge_ilseg.errors import TrainingError
from edge_ilseg.losses import cross_entropy
from edge_ilseg.methods import Method
from edge_ilseg.models.freezing import is_encoder_frozen
from edge_ilseg.models.normalization import normalize
from edge_ilseg.models.segmentation import SegmentationModel
from edge_ilseg.progress import ProgressCallback
from edge_ilseg.terms import (
    LossInputs,
    StepFacts,
    check_finite,
    classification_term,
    distillation_terms,
    needs_teacher,
)


class WorkerDone(Exception):
    """Raised at the end of training in every process but the first (rule 5)."""


@dataclass(frozen=True)
class TrainingRun:
    """What a run leaves beside the weights: how long it took, on what, and the loss terms of its last iterations."""

    seconds: float
    accelerator: str
    final_terms: dict[str, float]


def make_optimizer(model: SegmentationModel, settings: TrainConfig) -> torch.optim.SGD:
    """SGD over the parameters that are not frozen; weight decay on convolution weights alone (see `TrainConfig`)."""
    groups = []
    for part, rate in (
        (model.encoder, settings.learning_rate),
        (model.decoder, settings.learning_rate * settings.decoder_rate_factor),
    ):
        trainable = [parameter for parameter in part.parameters() if parameter.requires_grad]
        for decayed in (True, False):
            parameters = [parameter for parameter in trainable if (parameter.ndim == 4) == decayed]
            if parameters:
                decay = settings.weight_decay if decayed else 0.0
                groups.append({"params": parameters, "lr": rate, "peak_lr": rate, "weight_decay": decay})
    if not groups:
        raise TrainingError("everything is frozen: there is nothing to train", hint="freeze less")
    return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum)


def scheduled_rate(peak: float, settings: TrainConfig, iteration: int) -> float:
    """Polynomial decay over the iterations that really run: `end + (peak - end) * (1 - i / n) ** power`."""
    end = min(settings.learning_rate_end, peak)
    remaining: float = (1 - iteration / settings.iterations) ** settings.schedule_power
    return end + (peak - end) * remaining


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
    progress: ProgressCallback,
) -> TrainingRun:
    """Train `model` in place; on CPU it is left there, wherever it was trained.

    Args:
        model: the network of this step, its classifier grown already.
        batches: (images uint8 N x H x W x 3, labels int64 N x H x W in channels, 255 void), `iterations` of them.
        settings: optimiser, schedule and batch norm mode.
        teacher: the parent's network; needed when the method has a distillation term.
        method: freezing and loss weights; `None` at step 0.
        facts: what the method's losses know of the step; needed with a method.
        find_thresholds: called once with the teacher on its device, for a method with pseudo-labels.
        accelerator: Lightning Fabric's name of the device: `auto`, `cpu`, `cuda`.
        devices: processes, one on each device; Fabric starts the same command in the others. Each batch is divided
            among them.
        progress: told the share of iterations done and the loss.

    Raises:
        TrainingError: a loss is not finite, everything is frozen, or the batch cannot be divided.
        WorkerDone: in every process but the first, at the end.
    """
    if method is not None and facts is None:
        raise ValueError("a method's losses need the facts of the step")
    fabric = _make_fabric(accelerator, devices, settings)
    fabric.seed_everything(settings.seed, verbose=False)
    model.set_frozen(method.freeze if method else "none")
    model.set_batch_norm(settings.batch_norm)
    model.train()
    optimizer = make_optimizer(model, settings)
    student, optimizer = fabric.setup(model, optimizer)
    student.mark_forward_method("decode")
    if method is None or not needs_teacher(method):
        teacher = None
    if teacher is not None:
        fabric.to_device(teacher.requires_grad_(False).eval())
    if teacher is not None and facts is not None and find_thresholds is not None:
        facts = replace(facts, thresholds_K=find_thresholds(teacher))
    features_are_shared = method is not None and is_encoder_frozen(method.freeze, model.spec.backbone)
    loader = fabric.setup_dataloaders(batches) if isinstance(batches, torch.utils.data.DataLoader) else batches

    terms: dict[str, Tensor] = {}
    started = time.perf_counter()
    for iteration, (images_NHWC, labels_NHW) in enumerate(loader):
        for group in optimizer.param_groups:
            group["lr"] = scheduled_rate(group["peak_lr"], settings, iteration)
        images_NCHW = normalize(images_NHWC, model.spec)
        with fabric.autocast():
            terms = _loss_terms(student, teacher, method, facts, images_NCHW, labels_NHW, features_are_shared)
        check_finite(terms, iteration)
        loss = torch.stack(list(terms.values())).sum()
        optimizer.zero_grad(set_to_none=True)
        fabric.backward(loss)
        optimizer.step()
        if iteration % 10 == 0 or iteration + 1 == settings.iterations:
            progress(f"training, loss {loss.item():.3f}", (iteration + 1) / settings.iterations)
    fabric.barrier()
    if fabric.global_rank:
        raise WorkerDone
    model.cpu().eval()
    return TrainingRun(
        seconds=time.perf_counter() - started,
        accelerator=str(fabric.device),
        final_terms={name: value.item() for name, value in terms.items()},
    )


def _make_fabric(accelerator: str, devices: int, settings: TrainConfig) -> Fabric:
    """Lightning Fabric with its processes started.

    Raises:
        TrainingError: this machine has no such devices, or the batch cannot be divided among them.
    """
    if settings.batch_size % devices:
        raise TrainingError(
            "the batch cannot be divided among the devices",
            found=f"batch_size {settings.batch_size}, {devices} devices",
            expected="a multiple",
        )
    try:
        fabric = Fabric(
            accelerator=accelerator,
            devices=devices,
            strategy="ddp" if devices > 1 else "auto",
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


def _loss_terms(
    student: Any,
    teacher: SegmentationModel | None,
    method: Method | None,
    facts: StepFacts | None,
    images_NCHW: Tensor,
    labels_NHW: Tensor,
    features_are_shared: bool,
) -> dict[str, Tensor]:
    """Cross-entropy and the method's weighted distillation terms for one batch."""
    height_px, width_px = images_NCHW.shape[2:]
    if method is None or facts is None:
        return {"cross_entropy": cross_entropy(student(images_NCHW).logits_NCHW, labels_NHW)}
    if teacher is None:
        logits_NCHW = student(images_NCHW).logits_NCHW
        return {"cross_entropy": classification_term(logits_NCHW, labels_NHW, method, facts, None)}
    with torch.no_grad():
        seen = teacher(images_NCHW)
    if features_are_shared:
        output = student.decode(seen.features_NCHW, height_px, width_px, seen.stages)
    else:
        output = student(images_NCHW)
    term = classification_term(output.logits_NCHW, labels_NHW, method, facts, seen.logits_NCHW)
    return {"cross_entropy": term} | distillation_terms(LossInputs(output, seen, labels_NHW, method, facts))
