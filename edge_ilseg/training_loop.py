"""The iterations of a step, one and many: forward, loss, backward, optimiser; logged, checkpointed, and in time.

1. A loss that is not finite stops the run before the optimiser has seen it.
2. An iteration waits for a GPU once: for its loss terms, when its backward pass is queued already.
3. Between two iterations everything that the rest depends on is in `Loop.state`, and there alone.
4. All processes agree on how many iterations there are: the first one measures, and tells the others.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from edge_ilseg.config import TrainConfig
from edge_ilseg.feature_cache import CachedViews, forward_cached
from edge_ilseg.methods import Method
from edge_ilseg.models.normalization import normalize
from edge_ilseg.models.segmentation import SegmentationModel
from edge_ilseg.progress import ProgressCallback
from edge_ilseg.schedule import (
    CHECK_EVERY,
    PROBE_ITERATIONS,
    PROBE_SHARE,
    WARM_UP_ITERATIONS,
    Schedule,
    in_time,
    iterations_that_fit,
    scheduled_rate,
)
from edge_ilseg.terms import StepFacts, check_finite, copy_values, loss_terms
from edge_ilseg.training_log import TrainingLog
from edge_ilseg.training_state import (
    StateKeeper,
    TrainingState,
    capture_tensors,
    new_header,
    restore_tensors,
)
from edge_ilseg.trunk import forward_pair
from edge_ilseg.tuning import Tuning


@dataclass(frozen=True)
class Loop:
    """All that an iteration works with, on its device."""

    fabric: Fabric
    model: SegmentationModel
    student: Any
    """The model as Fabric has wrapped it."""
    optimizer: torch.optim.SGD
    stepper: Any
    """The optimiser as Fabric has wrapped it."""
    settings: TrainConfig
    teacher: SegmentationModel | None
    method: Method | None
    facts: StepFacts | None
    tuning: Tuning

    def rates(self, share: float) -> dict[str, float]:
        """The learning rates when `share` of the schedule is done, by their columns in `training.csv`."""
        groups = self.optimizer.param_groups
        return {f"{group['part']}_rate": scheduled_rate(group["peak_lr"], self.settings, share) for group in groups}

    def learn(self, shown: Tensor | CachedViews, labels_NHW: Tensor, iteration: int, share: float) -> dict[str, float]:
        """One iteration on one batch, when `share` of the schedule is done; its loss terms.

        Raises:
            NotFiniteError: a term is not finite; the optimiser has not seen it.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = scheduled_rate(group["peak_lr"], self.settings, share)
        self.stepper.zero_grad(set_to_none=True)
        with self.fabric.autocast():
            if isinstance(shown, CachedViews):
                pair = forward_cached(self.student, self.teacher, shown)
            else:
                pair = forward_pair(self.student, self.teacher, self.tuning.arrange(normalize(shown, self.model.spec)))
            terms = loss_terms(*pair, labels_NHW, self.method, self.facts)
        terms_on_host = copy_values(terms)
        self.fabric.backward(torch.stack(list(terms.values())).sum())
        values = terms_on_host()
        check_finite(values, iteration)
        self.stepper.step()
        return values

    def state(self, iteration: int, schedule: Schedule, seconds: float, log: str) -> TrainingState:
        """All that the iterations from `iteration` on depend on (rule 3)."""
        precision = self.fabric.strategy.precision.state_dict()
        thresholds_K = self.facts.thresholds_K if self.facts else None
        return TrainingState(
            new_header(iteration, schedule, seconds, precision, log, self.tuning),
            capture_tensors(self.model, self.optimizer, thresholds_K),
        )

    def restore(self, state: TrainingState) -> None:
        """Go back to such a state."""
        restore_tensors(self.model, self.optimizer, state.tensors)
        if state.header.precision:
            self.fabric.strategy.precision.load_state_dict(dict(state.header.precision))


@dataclass
class Course:
    """Where a run begins, where it ends, and who hears of it."""

    schedule: Schedule
    first: int
    """Iterations done already."""
    started: float
    """When training began by `time.perf_counter`, as if no process had been killed."""
    deadline: float | None
    """When it has to end."""
    keeper: StateKeeper | None
    log: TrainingLog | None
    progress: ProgressCallback


def run_iterations(loop: Loop, loader: Iterable[tuple[Tensor, Tensor]], course: Course) -> dict[str, float]:
    """Run all iterations that are left, and return the loss terms of the last one.

    Raises:
        NotFiniteError: see `Loop.learn`.
        EdgeIlsegError: the disk is full; the checkpoint before is as it was.
    """
    settings, log, keeper = loop.settings, course.log, course.keeper
    values: dict[str, float] = {}
    row_at, row_time = course.first, time.perf_counter()
    look_at, look_time = course.first, row_time
    for iteration, batch in enumerate(loader, start=course.first):
        share = course.schedule.share(iteration)
        values = loop.learn(*batch, iteration, share)
        done, now = iteration + 1, time.perf_counter()
        if course.deadline is not None and done - look_at == CHECK_EVERY and done < course.schedule.iterations:
            pace = (now - look_time) / CHECK_EVERY
            bent = in_time(course.schedule, done, course.deadline - now, pace)
            course.schedule = loop.fabric.broadcast(bent)
            look_at, look_time = done, now
        is_last = done == course.schedule.iterations
        if log is not None:
            images_per_s = (done - row_at) * settings.batch_size / max(now - row_time, 1e-9)
            if log.note(done, values, loop.rates(share), images_per_s, last=is_last):
                row_at, row_time = done, now
        if iteration % 10 == 0 or is_last:
            course.progress(f"training, loss {sum(values.values()):.3f}", done / course.schedule.iterations)
        if is_last:
            break
        if keeper is not None and keeper.is_due():
            text = log.text() if log is not None else ""
            keeper.write(loop.state(done, course.schedule, now - course.started, text))
    return values


def fit_schedule(loop: Loop, loader: Iterable[tuple[Tensor, Tensor]], seconds: float) -> Schedule:
    """Measure a few iterations, undo them, and decide how many fit (rule 2 of `edge_ilseg.schedule`)."""
    whole = Schedule(loop.settings.iterations)
    before = loop.state(0, whole, 0.0, "")
    started = time.perf_counter()
    ends = [started]
    for iteration, batch in enumerate(loader):
        loop.learn(*batch, iteration, whole.share(iteration))
        ends.append(time.perf_counter())
        enough = len(ends) > min(PROBE_ITERATIONS, whole.iterations) or ends[-1] - started > PROBE_SHARE * seconds
        if loop.fabric.broadcast(enough):
            break
    loop.restore(before)
    took = [after - start for start, after in pairwise(ends)]
    pace = mean(took[WARM_UP_ITERATIONS:] or took[-1:])
    left = seconds - (time.perf_counter() - started)
    return Schedule(loop.fabric.broadcast(iterations_that_fit(left, pace, whole.iterations)))
