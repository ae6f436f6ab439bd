"""What a step will take: counted where that is possible, and measured on a few real iterations where it is not.

1. The probe is the real loop (`edge_ilseg.train.train`) with the real images, losses and device. It trains the networks
   that it is given, so they are of no use afterwards; it writes nothing.
2. Every random generator is afterwards in the state that it was in before.
3. An image costs more the first time, when it is decoded, than later, while decoded images are kept: both are measured.
4. What is forecast follows from the probe by arithmetic alone (`training_seconds`, `memory_bytes`); nothing is guessed
   but the bytes that describe a layer in an int8 model (`edge_ilseg.update_estimate`).
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from edge_ilseg.cache_forecast import planned_cache_bytes, time_cached
from edge_ilseg.config import TrainConfig
from edge_ilseg.data import open_data
from edge_ilseg.data.loader import DECODED_CACHE_BYTES, TrainingSamples
from edge_ilseg.devices.facts import read_peak_rss_mib
from edge_ilseg.errors import ConfigError
from edge_ilseg.planning import StepPlan
from edge_ilseg.processes import check_batch
from edge_ilseg.progress import ProgressCallback, no_progress
from edge_ilseg.update_estimate import UpdateEstimate, estimate_update
from edge_ilseg.workspace import Workspace

if TYPE_CHECKING:
    from edge_ilseg.models.segmentation import SegmentationModel
    from edge_ilseg.terms import StepFacts

WARM_UP, MEASURED = 2, 5
"""Iterations of the probe: those that do not count, and those that do."""
SCORED_IMAGES = 4
RECORD_BYTES = 4096
"""Of `step.json`, without the ids of the images."""


class Probe(msgspec.Struct, frozen=True):
    """What was measured."""

    device: str
    iteration_s: tuple[float, ...]
    """Of each iteration that counts, without the making of its batch."""
    new_image_s: float
    """To decode an image and to augment it."""
    kept_image_s: float
    """To augment an image that was decoded before."""
    decoded_image_bytes: int
    """An image with its labels."""
    peak_bytes: int | None
    """The process's highest memory so far on a CPU, the highest allocated by torch on a GPU; None: the system does not
    tell."""
    threshold_image_s: float = 0.0
    """For a method with pseudo-labels: to ask the teacher about one image."""
    scored_image_s: float = 0.0
    cached_iteration_s: float | None = None
    """Of an iteration whose features are read back (`edge_ilseg.feature_cache`); None where none will be."""


class Forecast(msgspec.Struct, frozen=True):
    """What a step will do and take."""

    name: str
    images: int
    iterations: int
    batch_size: int
    epochs: float
    devices: int
    workers: int
    trainable_parameters: int
    frozen_parameters: int
    preparing_s: float
    """To hash the images and, with pseudo-labels, to ask the teacher about them."""
    training_s: float
    scoring_s: float
    """Of the new network and of its parent, on the evaluation split."""
    scored_images: int
    memory_bytes: int | None
    """Of one process: the probe's peak, and on a CPU the images that will be kept decoded."""
    step_bytes: int
    """On the disk."""
    cache_bytes: int
    """Features kept on the disk while the step is trained."""
    update: UpdateEstimate
    probe: Probe

    @property
    def total_s(self) -> float:
        """From start to end."""
        return self.preparing_s + self.training_s + self.scoring_s


def forecast_plan(
    workspace: Workspace,
    plan: StepPlan,
    *,
    accelerator: str = "auto",
    devices: int = 1,
    workers: int = 0,
    progress: ProgressCallback = no_progress,
) -> Forecast:
    """Say what `pipeline.run_plan` would take with the same arguments; see `forecast_step`.

    Raises:
        EdgeIlsegError: the extra `train` is missing, or the step could not be trained either.
    """
    from edge_ilseg.step_start import make_models, step_facts

    if plan.is_closed_form:
        raise ConfigError(
            "there is no training to forecast: the head is solved for after one pass over the images",
            where=f"step {plan.name}, method {plan.method.name if plan.method else ''}",
            hint="leave --plan out and train: it takes one pass",
        )
    with untouched_random_state():
        model, teacher, _ = make_models(workspace, plan)
    facts = step_facts(plan, model)
    how: dict[str, Any] = {"accelerator": accelerator, "devices": devices, "workers": workers}
    return forecast_step(plan, model, teacher, facts, **how, progress=progress)


def forecast_step(
    plan: StepPlan,
    model: SegmentationModel,
    teacher: SegmentationModel | None,
    facts: StepFacts,
    *,
    accelerator: str = "auto",
    devices: int = 1,
    workers: int = 0,
    progress: ProgressCallback = no_progress,
) -> Forecast:
    """Probe a planned step and say what all of it will take.

    With several devices one of them is probed, with its part of the batch; what they say to each other is left out.

    Args:
        plan: what to do.
        model: the network of the step, its classifier grown; it is of no use afterwards (rule 1).
        teacher: the parent's network; None at step 0.
        facts: what the losses know of the step.
        accelerator: Lightning Fabric's name of the device.
        devices: processes that will train, one on each device.
        workers: processes that will decode and augment.
        progress: told what is done.

    Raises:
        EdgeIlsegError: the step could not be trained either: a loss is not finite, no such device, no data.
    """
    check_batch(plan.settings.batch_size, devices)
    with untouched_random_state():
        probe = probe_training(plan, model, teacher, facts, accelerator=accelerator, devices=devices, progress=progress)
        scored_images, scored_image_s = _probe_scoring(plan, model.to(probe.device))
    probe = msgspec.structs.replace(probe, scored_image_s=scored_image_s)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    everything = sum(parameter.numel() for parameter in model.parameters())
    return Forecast(
        name=plan.name,
        images=len(plan.view),
        iterations=plan.settings.iterations,
        batch_size=plan.settings.batch_size,
        epochs=plan.settings.iterations * plan.settings.batch_size / len(plan.view),
        devices=devices,
        workers=workers,
        trainable_parameters=trainable,
        frozen_parameters=everything - trainable,
        preparing_s=len(plan.view) * (probe.new_image_s + probe.threshold_image_s),
        training_s=training_seconds(probe, plan.settings, len(plan.view), devices=devices, workers=workers),
        scoring_s=scored_images * scored_image_s * (1 if teacher is None else 2),
        scored_images=scored_images,
        memory_bytes=memory_bytes(probe, len(plan.view)),
        step_bytes=_step_bytes(plan, model),
        cache_bytes=planned_cache_bytes(plan, model, teacher),
        update=estimate_update(model, is_first=plan.parent is None),
        probe=probe,
    )


def training_seconds(
    probe: Probe, settings: TrainConfig, image_count: int, *, devices: int = 1, workers: int = 0
) -> float:
    """What all iterations take in one of the processes (rule 4).

    Worker processes make batches while the network computes: the slower of the two decides. With cached features that
    holds for the iterations that fill the cache; the others read from it.
    """
    filling, reading_s = settings.iterations, 0.0
    if probe.cached_iteration_s is not None:
        filling = min(filling, math.ceil(settings.augment_views * image_count / settings.batch_size))
        reading_s = (settings.iterations - filling) * probe.cached_iteration_s
    computing_s = filling * median(probe.iteration_s)
    samples = filling * settings.batch_size // devices
    new = min(samples, image_count)
    kept_share = min(1.0, DECODED_CACHE_BYTES / max(1, image_count * probe.decoded_image_bytes))
    later_s = kept_share * probe.kept_image_s + (1 - kept_share) * probe.new_image_s
    making_s = new * probe.new_image_s + (samples - new) * later_s
    return reading_s + (max(computing_s, making_s / workers) if workers else computing_s + making_s)


def memory_bytes(probe: Probe, image_count: int) -> int | None:
    """The highest memory of one process: on a GPU what the probe allocated there, on a CPU with all decoded images."""
    if probe.peak_bytes is None or probe.device.startswith("cuda"):
        return probe.peak_bytes
    return probe.peak_bytes + min(DECODED_CACHE_BYTES, image_count * probe.decoded_image_bytes)


@contextmanager
def untouched_random_state() -> Iterator[None]:
    """Leave Python's, numpy's and torch's generators, and the seeds that Fabric puts into the environment (rule 2)."""
    python, legacy = random.getstate(), np.random.get_state()
    names = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")
    seeds = {name: os.environ.get(name) for name in names}
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
        for name, value in seeds.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


class TimedSamples(Dataset[tuple[Tensor, Tensor]]):
    """Samples that note when each was asked for and how long it took to make, by any clock in seconds."""

    def __init__(
        self, samples: Dataset[tuple[Tensor, Tensor]], count: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.samples, self.count, self.clock = samples, count, clock
        self.asked: list[float] = []
        self.seconds: list[float] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        """Sample k, timed."""
        self.asked.append(self.clock())
        sample = self.samples[k]
        self.seconds.append(self.clock() - self.asked[-1])
        return sample

    def iteration_seconds(self, batch_size: int, ended: float) -> tuple[float, ...]:
        """How long each iteration took without the making of its batch; `ended` is the end of the last one."""
        starts = [*self.asked[::batch_size], ended]
        making = [sum(self.seconds[k : k + batch_size]) for k in range(0, len(self.seconds), batch_size)]
        return tuple(after - start - made for start, after, made in zip(starts, starts[1:], making, strict=False))


def probe_training(
    plan: StepPlan,
    model: SegmentationModel,
    teacher: SegmentationModel | None,
    facts: StepFacts,
    *,
    accelerator: str = "auto",
    devices: int = 1,
    progress: ProgressCallback = no_progress,
) -> Probe:
    """Run the first iterations of a step (rule 1) and measure them."""
    from edge_ilseg.pseudo_labels import entropy_thresholds
    from edge_ilseg.train import train

    batch_size = plan.settings.batch_size // devices
    settings = msgspec.structs.replace(
        plan.settings, iterations=WARM_UP + MEASURED, batch_size=batch_size, augment_views=0
    )
    samples = TimedSamples(TrainingSamples(plan.view, model.spec, settings), settings.iterations * batch_size)
    few = msgspec.structs.replace(plan.view, image_ids=plan.view.image_ids[:SCORED_IMAGES])
    marks: dict[str, float] = {"thresholds_s": 0.0}

    def find_thresholds(asked: SegmentationModel) -> Tensor:
        started = time.perf_counter()
        thresholds_K = entropy_thresholds(asked, few, plan.background_channel, no_progress)
        marks["thresholds_s"] = time.perf_counter() - started
        return thresholds_K

    def note_end(_text: str, share: float) -> None:
        marks["ended"] = time.perf_counter()
        progress("probing", share)

    has_pseudo_labels = plan.method is not None and plan.method.pseudo_labels != "none"
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    run = train(
        model,
        DataLoader(samples, batch_size=batch_size, shuffle=False),
        settings,
        teacher=teacher,
        method=plan.method,
        facts=facts,
        find_thresholds=find_thresholds if has_pseudo_labels else None,
        accelerator=accelerator,
        progress=note_end,
    )
    iteration_s = samples.iteration_seconds(batch_size, marks["ended"])
    peak_bytes = _peak_bytes(run.accelerator)
    new_image_s = median(samples.seconds[: len(plan.view)])
    image_HWC, labels_HW = plan.view.read(plan.view.image_ids[0])
    return Probe(
        device=run.accelerator,
        iteration_s=iteration_s[WARM_UP:],
        new_image_s=new_image_s,
        kept_image_s=min(new_image_s, _time_again(samples)),
        decoded_image_bytes=image_HWC.nbytes + labels_HW.nbytes,
        peak_bytes=peak_bytes,
        threshold_image_s=marks["thresholds_s"] / len(few),
        cached_iteration_s=time_cached(plan, model, teacher, facts, batch_size, WARM_UP + MEASURED, accelerator),
    )


def _time_again(samples: TimedSamples) -> float:
    """Median time to make a sample whose image was decoded before (rule 3)."""
    count = len(samples)
    for k in range(count):
        samples[k]
    return median(samples.seconds[-count:])


def _peak_bytes(device: str) -> int | None:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    peak_mib = read_peak_rss_mib() if device == "cpu" else None
    return None if peak_mib is None else round(peak_mib * (1 << 20))


def _probe_scoring(plan: StepPlan, model: SegmentationModel) -> tuple[int, float]:
    """Images of the evaluation split, and the time to score one of them; nothing without such a split."""
    from edge_ilseg.evaluate import evaluate_model

    if not plan.data.eval_split:
        return 0, 0.0
    dataset = open_data(plan.data)
    ids = dataset.ids(plan.data.eval_split)

    def score(image_ids: tuple[str, ...]) -> float:
        started = time.perf_counter()
        evaluate_model(
            model,
            dataset,
            image_ids,
            plan.class_names,
            old_count=plan.old_count,
            background=plan.background,
            geometry=plan.settings.geometry,
        )
        return time.perf_counter() - started

    score(ids[:1])  # the first one finds its kernels
    timed = ids[1 : 1 + SCORED_IMAGES] or ids[:1]
    return len(ids), score(timed) / len(timed)


def _step_bytes(plan: StepPlan, model: SegmentationModel) -> int:
    """The weights as they will be written, the record, and the statistics where the step leaves some."""
    from safetensors.torch import save

    from edge_ilseg.analytic_step import statistics_size

    weights = save({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()})
    ids = msgspec.json.format(msgspec.json.encode(plan.view.image_ids), indent=3)
    keeps_trunk = plan.method is None or plan.method.freeze == "all_but_head"
    statistics = statistics_size(plan, model) if keeps_trunk else 0
    return len(weights) + len(ids) + RECORD_BYTES + statistics
