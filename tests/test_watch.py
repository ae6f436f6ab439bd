"""A trial is confirmed, undone or watched on, rule by rule."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_ilseg.devices.update.heartbeat import ClassPixels, Heartbeat
from edge_ilseg.devices.update.release import WatchLimits
from edge_ilseg.devices.update.state import Trial
from edge_ilseg.devices.update.trial_clock import (
    CLOCK_NAME,
    Moment,
    TrialClock,
    advanced,
    forget_trial_time,
    read_moment,
    trial_seconds,
)
from edge_ilseg.devices.update.watch import TrialVerdict, judge_trial

TIME = datetime(2026, 6, 1, 12, tzinfo=UTC)
OLD, NEW = "a" * 64, "b" * 64
LIMITS = WatchLimits(min_frames=100, min_seconds=60, deadline_s=1000, max_starts=3)
CLASSES = {"sky": 500, "apple": 300, "grass": 100, "boat": 100}


def seen(content_id: str = NEW, classes: dict[str, int] = CLASSES, **changes: Any) -> Heartbeat:
    found = Heartbeat(
        format="edge-ilseg-heartbeat",
        format_version=1,
        content_id=content_id,
        bundle_id="d" * 64,
        pid=17,
        processes=1,
        started=TIME,
        updated=TIME,
        first_frame=TIME,
        last_frame=TIME,
        watched_s=60.0,
        frames=100,
        failures=0,
        last_failure=None,
        constant_masks=0,
        latency_frames=100,
        latency_p50_ms=10.0,
        latency_p95_ms=20.0,
        latency_max_ms=30.0,
        background="sky",
        classes=tuple(ClassPixels(name, pixels) for name, pixels in classes.items()),
    )
    return msgspec.structs.replace(found, **changes)


def judge(
    heartbeat: Heartbeat | None = None,
    baseline: Heartbeat | None = None,
    *,
    starts: int = 1,
    elapsed_s: float = 100.0,
    **limits: Any,
) -> TrialVerdict:
    return judge_trial(
        heartbeat,
        baseline,
        msgspec.structs.replace(LIMITS, **limits),
        Trial(starts, 3, TIME),
        content_id=NEW,
        old_classes=("sky", "apple", "grass"),
        elapsed_s=elapsed_s,
    )


def test_a_model_that_has_done_enough_is_confirmed_with_its_numbers() -> None:
    verdict = judge(seen(), seen(OLD))
    assert verdict.decision == "confirm"
    assert verdict.reason == "100 frames, and no limit was broken"
    numbers = verdict.numbers
    assert (numbers.frames, numbers.watched_s, numbers.failures, numbers.starts) == (100, 60.0, 0, 1)
    assert (numbers.old_share_pct, numbers.baseline_old_share_pct, numbers.latency_p95_ms) == (40.0, 40.0, 20.0)
    assert (numbers.constant_pct, numbers.elapsed_s) == (0.0, 100.0)


@pytest.mark.parametrize("heartbeat", [None, seen(OLD, frames=10_000), seen(OLD, failures=50)])
def test_rule_1_what_another_model_did_is_neither_for_nor_against(heartbeat: Heartbeat | None) -> None:
    verdict = judge(heartbeat)
    assert (verdict.decision, verdict.numbers.frames) == ("wait", 0)
    assert verdict.reason == "0 of 100 frames over 0 of 60 s so far"


def test_rule_2_failures_end_the_trial_at_once_and_are_quoted() -> None:
    verdict = judge(seen(frames=1, latency_frames=1, failures=1, last_failure="out of range"))
    assert verdict.decision == "roll back"
    assert verdict.reason == "the application failed 1 times (limit 0), the last: out of range"
    assert judge(seen(failures=2), max_failures=2).decision == "confirm"
    assert judge(seen(failures=3), max_failures=2).decision == "roll back"


def test_rule_3_starts_beyond_the_limit_end_the_trial_and_one_at_least_must_be_counted() -> None:
    assert judge(seen(), starts=4).reason == "not confirmed after 4 starts (limit 3)"
    assert judge(seen(), starts=3).decision == "confirm"
    verdict = judge(seen(), starts=0)
    assert (verdict.decision, verdict.reason) == ("wait", "no start of the application was counted yet")
    assert judge(seen(), starts=0, elapsed_s=1000).decision == "roll back"


@pytest.mark.parametrize("few", [{"frames": 99, "latency_frames": 99}, {"watched_s": 59.9}])
def test_rule_4_nothing_that_needs_many_frames_is_judged_by_a_few(few: dict[str, Any]) -> None:
    bad = seen(**few, constant_masks=99, latency_p95_ms=30.0, classes={"sky": 1})
    assert judge(bad, seen(OLD), max_latency_p95_ms=1, max_old_share_drop_pct=1).decision == "wait"
    assert judge(seen(**few)).decision == "wait"


def test_rule_5_masks_of_one_class_end_the_trial_unless_the_scene_is_so() -> None:
    empty = seen(constant_masks=90)
    verdict = judge(empty)
    assert verdict.decision == "roll back"
    assert verdict.reason == "90.0 % of the masks are of one class whole (limit 50 %)"
    assert judge(empty, seen(OLD, constant_masks=5)).decision == "roll back"
    assert judge(empty, seen(OLD, constant_masks=85)).decision == "confirm"
    assert judge(seen(constant_masks=50)).decision == "confirm"
    assert judge(seen(constant_masks=51)).decision == "roll back"


def test_rule_6_old_classes_must_not_vanish_from_the_masks() -> None:
    """Background is no old class here: what is forgotten turns into it."""
    without_apples = seen(classes={"sky": 800, "apple": 0, "grass": 100, "boat": 100})
    assert judge(without_apples, seen(OLD)).decision == "confirm"  # no limit is signed
    verdict = judge(without_apples, seen(OLD), max_old_share_drop_pct=20)
    assert verdict.decision == "roll back"
    assert verdict.reason == "the old classes fell from 40.0 to 10.0 % of all pixels (limit: a fall of 20 points)"
    assert judge(without_apples, seen(OLD), max_old_share_drop_pct=30).decision == "confirm"
    assert judge(seen(), seen(OLD, {"sky": 990, "apple": 10}), max_old_share_drop_pct=1).decision == "confirm"


def test_rule_6_without_a_baseline_there_is_nothing_to_compare_with() -> None:
    gone = seen(classes={"sky": 1000})
    few = seen(OLD, frames=99, latency_frames=99)
    for baseline in (None, few, seen(NEW)):  # a heartbeat of the model on trial is no baseline
        verdict = judge(gone, baseline, max_old_share_drop_pct=1)
        assert (verdict.decision, verdict.numbers.baseline_old_share_pct) == ("confirm", None)


def test_rule_7_a_slow_model_goes_back() -> None:
    assert judge(seen(), max_latency_p95_ms=20.0).decision == "confirm"
    verdict = judge(seen(), max_latency_p95_ms=19.9)
    assert (verdict.decision, verdict.reason) == (
        "roll back",
        "the latency is 20.0 ms in 95 % of the frames (limit 19.9 ms)",
    )


def test_rule_9_the_deadline_ends_a_trial_that_nothing_has_ended() -> None:
    assert judge(None, starts=0, elapsed_s=999.9).decision == "wait"
    never = judge(None, starts=0, elapsed_s=1000.0)
    assert (never.decision, never.reason) == ("roll back", "no application has run it within 0.278 hours")
    few = judge(seen(frames=99, latency_frames=99), elapsed_s=1000.0)
    assert (few.decision, few.reason) == ("roll back", "99 of 100 frames over 60 of 60 s within 0.278 hours")
    assert judge(seen(), elapsed_s=5000.0).decision == "confirm"  # it has seen enough, whenever that was


@pytest.mark.parametrize("year", [1970, 2040])
def test_rule_10_wall_clock_times_decide_nothing(year: int) -> None:
    """A clock that starts in 1970 and is set later, or one that is decades ahead."""
    jump = datetime(year, 1, 1, tzinfo=UTC)
    few = {"frames": 5, "latency_frames": 5, "watched_s": 2.0}
    for heartbeat in (seen(started=jump, first_frame=jump, **few), seen(updated=jump, last_frame=jump, **few)):
        assert judge(heartbeat).decision == "wait"


def test_the_trial_lasts_while_the_device_is_awake() -> None:
    clock = advanced(None, NEW, Moment("first", 500.0))
    assert clock.elapsed_s == 0.0
    clock = advanced(clock, NEW, Moment("first", 530.0))
    clock = advanced(clock, NEW, Moment("first", 560.0))
    assert clock.elapsed_s == 60.0
    clock = advanced(clock, NEW, Moment("second", 700.0))  # restarted; it may have been off for days
    assert clock.elapsed_s == 760.0
    clock = advanced(clock, NEW, Moment("second", 710.0))
    assert clock.elapsed_s == 770.0


def test_a_restart_is_seen_where_the_system_does_not_name_its_starts() -> None:
    clock = advanced(None, NEW, Moment("", 500.0))
    assert advanced(clock, NEW, Moment("", 20.0)).elapsed_s == 20.0


def test_another_content_begins_its_own_trial() -> None:
    clock = advanced(advanced(None, OLD, Moment("x", 0.0)), OLD, Moment("x", 900.0))
    assert advanced(clock, NEW, Moment("x", 901.0)).elapsed_s == 0.0


def test_the_time_of_a_trial_is_kept_between_runs_of_the_agent(tmp_path: Path) -> None:
    assert trial_seconds(tmp_path, NEW, Moment("x", 10.0)) == 0.0
    assert trial_seconds(tmp_path, NEW, Moment("x", 15.0)) == 5.0
    assert trial_seconds(tmp_path, NEW, Moment("x", 25.0)) == 15.0
    assert os.listdir(tmp_path) == [CLOCK_NAME]
    forget_trial_time(tmp_path)
    forget_trial_time(tmp_path)
    assert trial_seconds(tmp_path, NEW, Moment("x", 95.0)) == 0.0


@pytest.mark.parametrize("damage", [b"", b"{}", b"\0" * 100, b'{"elapsed_s": 1e300}', b"[" * 100_000])
def test_a_damaged_clock_begins_anew_and_never_ends_a_trial(damage: bytes, tmp_path: Path) -> None:
    (tmp_path / CLOCK_NAME).write_bytes(damage)
    assert trial_seconds(tmp_path, NEW, Moment("x", 1e9)) == 0.0
    assert json.loads((tmp_path / CLOCK_NAME).read_bytes())["content_id"] == NEW


def test_a_clock_that_claims_more_than_can_be_is_damaged(tmp_path: Path) -> None:
    clock = TrialClock("edge-ilseg-trial-clock", 1, NEW, "x", 5.0, 5.0)
    table = json.loads(msgspec.json.encode(clock))
    (tmp_path / CLOCK_NAME).write_text(json.dumps({**table, "elapsed_s": -4.0}))
    assert trial_seconds(tmp_path, NEW, Moment("x", 6.0)) == 0.0


def test_moments_of_this_machine_rise() -> None:
    one, two = read_moment(), read_moment()
    assert one.boot == two.boot
    assert two.awake_s >= one.awake_s
