"""Decide what becomes of a release on trial, by what the application has seen of it. Pure: no file, no clock.

1. Only a heartbeat of the content on trial counts; one of another content is none at all.
2. Failures beyond the limit end the trial at once: the application could not use the model.
3. So do starts beyond the limit. A trial without a counted start is never confirmed.
4. Shares and latencies are judged once `min_frames` frames were seen, over at least `min_seconds`.
5. Masks of one class whole end it, beyond the limit, unless the model before gave about as many: then it is the scene.
6. The old classes (the background left out) must not lose more of all pixels than the limit against the model before.
   Without a heartbeat of that one, or with too few frames of it, this is not judged.
7. The 95th percentile of the latency must keep to its limit.
8. What breaks none of these, and has seen enough, is confirmed.
9. What is not confirmed by the deadline goes back; a model that no application ever ran, too.
10. Time is what the monotonic clock says (`trial_clock.py`, `Heartbeat.watched_s`): a jump of the wall clock decides
    nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import msgspec

from edge_ilseg.devices.update.heartbeat import Heartbeat
from edge_ilseg.devices.update.release import WatchLimits
from edge_ilseg.devices.update.state import Trial

CONSTANT_MARGIN_PCT = 10.0
"""So many more masks of one class whole than the model before gave are still the scene (rule 5)."""

Decision = Literal["confirm", "roll back", "wait"]


class TrialNumbers(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a decision rests on."""

    starts: int
    elapsed_s: float
    """That the device was awake since the trial began."""
    frames: int = 0
    watched_s: float = 0.0
    failures: int = 0
    constant_pct: float | None = None
    baseline_constant_pct: float | None = None
    old_share_pct: float | None = None
    baseline_old_share_pct: float | None = None
    latency_p95_ms: float | None = None


class TrialVerdict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What becomes of a release on trial, and why, in one sentence."""

    decision: Decision
    reason: str
    numbers: TrialNumbers


def judge_trial(
    heartbeat: Heartbeat | None,
    baseline: Heartbeat | None,
    limits: WatchLimits,
    trial: Trial,
    *,
    content_id: str,
    old_classes: Collection[str],
    elapsed_s: float,
) -> TrialVerdict:
    """Judge a trial (rules 1 to 10).

    Args:
        heartbeat: the application's, of whatever content.
        baseline: what was kept of the model before.
        limits: as signed.
        trial: how often the model was started.
        content_id: what is on trial.
        old_classes: classes that the model before knew.
        elapsed_s: how long the trial has lasted: `trial_clock.trial_seconds`.
    """
    seen = heartbeat if heartbeat is not None and heartbeat.content_id == content_id else None
    before = baseline if baseline is not None and baseline.content_id != content_id else None
    if before is not None and before.frames < limits.min_frames:
        before = None
    numbers = _numbers(seen, before, trial, frozenset(old_classes), elapsed_s)
    reason = _at_once(numbers, limits, seen)
    if reason is not None:
        return TrialVerdict("roll back", reason, numbers)
    has_enough = numbers.frames >= limits.min_frames and numbers.watched_s >= limits.min_seconds
    if has_enough:
        reason = _broken(numbers, limits)
        if reason is not None:
            return TrialVerdict("roll back", reason, numbers)
        if trial.starts > 0:
            return TrialVerdict("confirm", f"{numbers.frames} frames, and no limit was broken", numbers)
    if elapsed_s >= limits.deadline_s:
        return TrialVerdict("roll back", _too_late(numbers, limits, has_enough), numbers)
    return TrialVerdict("wait", _waiting(numbers, limits, has_enough), numbers)


def _numbers(
    seen: Heartbeat | None, before: Heartbeat | None, trial: Trial, old: frozenset[str], elapsed_s: float
) -> TrialNumbers:
    numbers = TrialNumbers(starts=trial.starts, elapsed_s=elapsed_s)
    if before is not None:
        numbers = msgspec.structs.replace(
            numbers, baseline_constant_pct=before.constant_pct, baseline_old_share_pct=before.share_pct(old)
        )
    if seen is None:
        return numbers
    return msgspec.structs.replace(
        numbers,
        frames=seen.frames,
        watched_s=seen.watched_s,
        failures=seen.failures,
        constant_pct=seen.constant_pct,
        old_share_pct=seen.share_pct(old),
        latency_p95_ms=seen.latency_p95_ms,
    )


def _at_once(numbers: TrialNumbers, limits: WatchLimits, seen: Heartbeat | None) -> str | None:
    """Why the trial ends, whatever else was seen (rules 2 and 3)."""
    if numbers.failures > limits.max_failures:
        last = f", the last: {seen.last_failure}" if seen is not None and seen.last_failure else ""
        return f"the application failed {numbers.failures} times (limit {limits.max_failures}){last}"
    if numbers.starts > limits.max_starts:
        return f"not confirmed after {numbers.starts} starts (limit {limits.max_starts})"
    return None


def _broken(numbers: TrialNumbers, limits: WatchLimits) -> str | None:
    """Which limit on what was seen is broken (rules 5 to 7)."""
    constant, usual = numbers.constant_pct or 0.0, numbers.baseline_constant_pct
    if constant > limits.max_constant_pct and (usual is None or constant > usual + CONSTANT_MARGIN_PCT):
        shown = "" if usual is None else f", {usual:.1f} % with the model before"
        return f"{constant:.1f} % of the masks are of one class whole (limit {limits.max_constant_pct:g} %{shown})"
    share, before, most = numbers.old_share_pct, numbers.baseline_old_share_pct, limits.max_old_share_drop_pct
    if most is not None and share is not None and before is not None and before - share > most:
        return (
            f"the old classes fell from {before:.1f} to {share:.1f} % of all pixels (limit: a fall of {most:g} points)"
        )
    latency_ms, limit_ms = numbers.latency_p95_ms, limits.max_latency_p95_ms
    if limit_ms is not None and latency_ms is not None and latency_ms > limit_ms:
        return f"the latency is {latency_ms:.1f} ms in 95 % of the frames (limit {limit_ms:g} ms)"
    return None


def _too_late(numbers: TrialNumbers, limits: WatchLimits, has_enough: bool) -> str:
    hours = f"within {limits.deadline_s / 3600:.3g} hours"
    if has_enough:
        return f"no start of the application was counted {hours}"
    if numbers.starts == 0 and numbers.frames == 0:
        return f"no application has run it {hours}"
    return f"{_seen(numbers, limits)} {hours}"


def _waiting(numbers: TrialNumbers, limits: WatchLimits, has_enough: bool) -> str:
    return "no start of the application was counted yet" if has_enough else f"{_seen(numbers, limits)} so far"


def _seen(numbers: TrialNumbers, limits: WatchLimits) -> str:
    frames = f"{numbers.frames} of {limits.min_frames} frames"
    return f"{frames} over {numbers.watched_s:.0f} of {limits.min_seconds:g} s"
