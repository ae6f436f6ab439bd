"""The learning rate over a run, and how many iterations a budget of minutes has room for. Knows no torch.

1. Polynomial decay over the iterations that really run: `end + (peak - end) * (1 - s) ** power`, s = i / n the share of
   the schedule that is done.
2. A budget (`--max-minutes`) shortens n and not the schedule's end: the speed is measured in a few first iterations,
   those are undone, and the run begins anew with the n that fits. That is why: such a step is a run of n iterations and
   nothing else, its record says n, and that many iterations without a budget give the same weights. A schedule by the
   clock would end in time as well, and nobody could repeat it.
3. A machine that becomes slower afterwards has fewer iterations left than planned: what is left of the schedule is then
   spread over those that still fit. It ends at its end and in time; the record says how many iterations ran, and
   `training.csv` at which rates. Such a step cannot be repeated to the bit.
4. A minute is a minute of training: evaluation, which follows, is not counted.
"""

from __future__ import annotations

import math
from typing import Annotated

import msgspec
from msgspec import Meta

from edge_ilseg.config import TrainConfig

CHECKPOINT_SECONDS = 30.0
"""Between two checkpoints, unless told otherwise (`edge_ilseg.training_state`)."""
PROBE_ITERATIONS = 8
WARM_UP_ITERATIONS = 2
"""Of the probe, left out of account: the first ones are slower."""
PROBE_SHARE = 0.2
"""Of the budget that a probe may take."""
RESERVE = 0.05
"""Of what is left of a budget, not planned for."""
CHECK_EVERY = 10
"""Iterations between two looks at what is left of a budget."""


class Schedule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far the schedule is at each iteration: a straight line to 1, from (0, 0) unless it was bent (rule 3)."""

    iterations: Annotated[int, Meta(ge=1)]
    bent_at: Annotated[int, Meta(ge=0)] = 0
    bent_share: Annotated[float, Meta(ge=0, le=1)] = 0.0

    def share(self, iteration: int) -> float:
        """How much of the schedule is done before `iteration`."""
        rest = (iteration - self.bent_at) / (self.iterations - self.bent_at)
        return self.bent_share + (1 - self.bent_share) * rest

    def bent(self, iteration: int, iterations: int) -> Schedule:
        """The same up to `iteration`, and at its end after `iterations` (rule 3)."""
        return Schedule(iterations, iteration, self.share(iteration))


def scheduled_rate(peak: float, settings: TrainConfig, share: float) -> float:
    """The learning rate of a parameter group when `share` of the schedule is done (rule 1)."""
    end = min(settings.learning_rate_end, peak)
    remaining: float = (1 - share) ** settings.schedule_power
    return end + (peak - end) * remaining


def iterations_that_fit(seconds_left: float, seconds_per_iteration: float, wanted: int) -> int:
    """How many of `wanted` iterations have room, one at least (rule 2)."""
    if seconds_per_iteration <= 0:
        return wanted
    return max(1, min(wanted, math.floor((1 - RESERVE) * seconds_left / seconds_per_iteration)))


def in_time(schedule: Schedule, iteration: int, seconds_left: float, seconds_per_iteration: float) -> Schedule:
    """The schedule from `iteration` on, which is to be run next: as it is while it fits, else bent (rule 3)."""
    remaining = schedule.iterations - iteration
    if remaining * seconds_per_iteration <= seconds_left:
        return schedule
    return schedule.bent(iteration, iteration + iterations_that_fit(seconds_left, seconds_per_iteration, remaining))
