"""What a device does next, by what it knows: no disk, no network, no clock."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from msgspec.structs import replace

from edge_ilseg.devices.update import decisions
from edge_ilseg.devices.update.release import Rollout, RolloutEntry, Rollouts
from edge_ilseg.devices.update.state import MAX_REASON_CHARACTERS, MAX_REJECTED, AgentState, Candidate, Installed
from edge_ilseg.errors import UpdateError

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
LATER = NOW + timedelta(days=9)
FACTORY, ONE, TWO = Installed("f" * 64, 0), Installed("1" * 64, 1), Installed("2" * 64, 2)
NEXT = Candidate(3, "3" * 64, "b" * 64, LATER)
START = decisions.first_state(FACTORY, NOW)
IDLE = replace(START, active=TWO, previous=ONE, release_floor=2)


def entry(release: int, content: str = "", **fields: Any) -> RolloutEntry:
    rollout = fields.pop("rollout", Rollout("r"))
    return RolloutEntry(release, "b" * 64, (content or str(release)) * 64, release, "step", rollout, **fields)


def published(*entries: RolloutEntry) -> Rollouts:
    return Rollouts("edge-ilseg-rollouts", 1, LATER.isoformat(), entries)


def chosen(state: AgentState, *entries: RolloutEntry, now: datetime = NOW) -> int | None:
    found = decisions.choose_release(published(*entries), state, device_id="d", group="lab", now=now)
    return None if found is None else found.release


def at(phase: str, state: AgentState = IDLE, *, starts: int = 0) -> AgentState:
    """A state in which release 3 has come as far as `phase`."""
    state = decisions.begun(state, NEXT)
    for name in ("fetching", "staged"):
        state = decisions.moved(state, name) if phase != "checked" and state.phase != phase else state  # type: ignore[arg-type]
    if phase in ("gated", "trial"):
        state = decisions.moved(state, "gated")
    if phase == "trial":
        state = decisions.on_trial(state, 2, NOW)
    for _ in range(starts):
        state = decisions.start_counted(state) or pytest.fail("too many starts")
    assert state.phase == phase
    return state


def test_the_highest_release_that_is_for_this_device_is_taken() -> None:
    assert chosen(IDLE) is None
    assert chosen(IDLE, entry(1), entry(2)) is None
    assert chosen(IDLE, entry(2), entry(3), entry(4)) == 4
    assert chosen(IDLE, entry(3), entry(4, halted=True)) == 3
    assert chosen(IDLE, entry(3), entry(4, rollout=Rollout("r", groups=("field",)))) == 3
    assert chosen(IDLE, entry(3), entry(4, rollout=Rollout("r", percent=0))) == 3


def test_a_release_that_is_not_yet_due_waits_by_the_believed_time() -> None:
    due = entry(3, rollout=Rollout("r", not_before=LATER.isoformat()))
    assert chosen(IDLE, due) is None
    assert chosen(IDLE, due, now=LATER) == 3
    assert chosen(replace(IDLE, time_floor=LATER), due, now=datetime(1970, 1, 1, tzinfo=UTC)) == 3


def test_nothing_below_the_floor_is_taken_whatever_it_brings() -> None:
    assert decisions.refusal(IDLE, 1, "9" * 64) == "release 1 is below the floor 2"
    assert decisions.refusal(IDLE, 2, TWO.content_id) == "release 2 is what runs"
    assert decisions.refusal(IDLE, 3, TWO.content_id) is None


def test_older_bytes_come_back_under_a_higher_number() -> None:
    assert chosen(IDLE, entry(2), entry(3, content="1")) == 3


def test_the_release_at_the_floor_is_fetched_again_where_its_copy_went_bad() -> None:
    fallen_back = replace(IDLE, active=ONE, previous=None)
    assert chosen(fallen_back, entry(1), entry(2)) == 2
    assert chosen(decisions.without_whole_copy(IDLE), entry(1), entry(2)) == 2
    assert chosen(fallen_back, entry(1)) is None


def test_a_rejected_release_is_not_taken_again_but_its_content_may_come_under_another_number() -> None:
    state = decisions.rejected(at("staged"), "too slow", NOW)
    assert chosen(state, entry(2), entry(3)) is None
    assert chosen(state, entry(2), entry(3), entry(4, content="3")) == 4
    assert "too slow" in str(decisions.refusal(state, 3, "3" * 64))
    with pytest.raises(UpdateError, match="the release is not taken"):
        decisions.begun(state, NEXT)


def test_a_full_list_of_rejected_releases_still_lets_none_of_them_in() -> None:
    """In any order, and three times as many as it holds."""
    draw = random.Random(0)
    numbers = draw.sample(range(3, 1000), 3 * MAX_REJECTED)
    state = IDLE
    for number in numbers:
        candidate = replace(NEXT, release=number)
        if decisions.refusal(state, number, NEXT.content_id) is None:
            state = decisions.rejected(decisions.begun(state, candidate), "bad", NOW)
    assert len(state.rejected) == MAX_REJECTED
    assert all(decisions.refusal(state, number, "9" * 64) for number in numbers)
    assert decisions.refusal(state, 1000, "9" * 64) is None
    assert state.release_floor == 2


def test_what_lies_below_the_floor_leaves_the_list() -> None:
    state = decisions.rejected(at("staged"), "bad", NOW)
    after = decisions.begun(state, replace(NEXT, release=4, content_id="4" * 64))
    after = decisions.moved(decisions.moved(after, "staged"), "gated")
    after = decisions.start_counted(decisions.on_trial(after, 1, NOW)) or pytest.fail("no start")
    assert [item.release for item in decisions.confirmed(after).rejected] == []
    assert decisions.refusal(decisions.confirmed(after), 3, "3" * 64) is not None


def test_the_same_candidate_goes_on_where_it_was_and_another_one_takes_its_place() -> None:
    for phase in ("checked", "fetching", "staged", "gated", "trial"):
        assert decisions.begun(at(phase), replace(NEXT, published=NOW)) == at(phase)
    other = replace(NEXT, release=4, content_id="4" * 64)
    after = decisions.begun(decisions.gate_begun(at("staged"), NOW), other)
    assert (after.phase, after.candidate, after.gate_runs) == ("checked", other, 0)
    with pytest.raises(UpdateError, match="cannot be taken now"):
        decisions.begun(at("trial"), other)


def test_a_release_whose_content_runs_already_only_raises_the_floors() -> None:
    state = decisions.begun(IDLE, replace(NEXT, content_id=TWO.content_id))
    after = decisions.adopted(state)
    assert (after.active, after.previous, after.release_floor) == (Installed(TWO.content_id, 3), ONE, 3)
    assert (after.phase, after.candidate, after.time_floor) == ("idle", None, LATER)
    with pytest.raises(UpdateError, match="only what runs already"):
        decisions.adopted(at("checked"))


def test_a_confirmation_raises_all_at_once_and_keeps_what_ran_before() -> None:
    after = decisions.confirmed(at("trial", starts=1))
    assert (after.active, after.previous, after.factory) == (Installed("3" * 64, 3), TWO, FACTORY)
    assert (after.release_floor, after.time_floor) == (3, LATER)
    assert (after.phase, after.candidate, after.trial) == ("idle", None, None)


def test_nothing_but_a_confirmation_moves_the_floors_or_the_active_model() -> None:
    steps: list[Callable[[], AgentState | None]] = [
        lambda: at("checked"),
        lambda: at("gated"),
        lambda: at("trial"),
        lambda: decisions.start_counted(at("trial")),
        lambda: decisions.gate_begun(at("staged"), NOW),
        lambda: decisions.rejected(at("staged"), "x", NOW),
        lambda: decisions.dropped(at("gated")),
        lambda: decisions.leaving_trial(at("trial"), "x"),
        lambda: decisions.rolled_back(decisions.leaving_trial(at("trial"), "x"), TWO, NOW),
    ]
    for step in steps:
        after = step()
        assert after is not None
        assert (after.active, after.release_floor, after.time_floor) == (TWO, 2, NOW)


def test_a_model_that_was_never_started_is_not_confirmed() -> None:
    with pytest.raises(UpdateError, match="was never started"):
        decisions.confirmed(at("trial"))


def test_starts_are_counted_up_to_the_limit() -> None:
    assert decisions.start_counted(at("trial", starts=1)) == at("trial", starts=2)
    assert decisions.start_counted(at("trial", starts=2)) is None


def test_a_gate_that_never_ends_rejects_its_release_at_the_fourth_run() -> None:
    state = at("staged")
    for _ in range(decisions.MAX_GATE_RUNS):
        state = decisions.gate_begun(state, NOW)
        assert state.phase == "staged"
    after = decisions.gate_begun(state, NOW)
    assert (after.phase, [item.release for item in after.rejected], after.gate_runs) == ("idle", [3], 0)
    assert "3 times without a verdict" in after.rejected[0].reason


def test_going_back_ends_on_the_model_before_with_the_reason_kept() -> None:
    leaving = decisions.leaving_trial(at("trial", starts=1), "empty masks")
    assert decisions.wanted_content(leaving) == TWO.content_id
    after = decisions.rolled_back(leaving, TWO, NOW)
    assert (after.phase, after.active, after.previous) == ("idle", TWO, ONE)
    assert [(item.release, item.reason) for item in after.rejected] == [(3, "empty masks")]


def test_a_permanent_release_can_be_left_and_is_not_taken_again_though_it_is_at_the_floor() -> None:
    after = decisions.rolled_back(decisions.leaving_active(IDLE, "a complaint", is_rejected=True), ONE, NOW)
    assert (after.active, after.previous, after.release_floor) == (ONE, None, 2)
    assert chosen(after, entry(1), entry(2)) is None


def test_a_copy_that_went_bad_is_left_without_blaming_the_release() -> None:
    after = decisions.rolled_back(decisions.leaving_active(IDLE, "bit rot", is_rejected=False), ONE, NOW)
    assert (after.active, after.rejected) == (ONE, ())
    assert chosen(after, entry(1), entry(2)) == 2


def test_work_in_progress_is_dropped_when_the_permanent_model_is_left() -> None:
    assert decisions.leaving_active(at("gated"), "bit rot", is_rejected=False).candidate is None


def test_with_one_model_alone_there_is_no_way_back() -> None:
    with pytest.raises(UpdateError, match="no other model"):
        decisions.leaving_active(START, "x", is_rejected=True)


def test_the_order_in_which_models_are_fallen_back_to() -> None:
    assert decisions.resorts(IDLE) == (ONE, FACTORY, TWO)
    assert decisions.resorts(decisions.leaving_trial(at("trial"), "x"))[:3] == (TWO, ONE, FACTORY)
    assert decisions.resorts(replace(IDLE, factory=ONE)) == (ONE, TWO)
    assert decisions.order_without_counting(at("trial")) == (TWO, ONE, FACTORY)
    assert decisions.order_without_counting(IDLE) == (TWO, ONE, FACTORY)
    leaving = decisions.leaving_active(IDLE, "x", is_rejected=True)
    assert decisions.order_without_counting(leaving) == (ONE, FACTORY, TWO)


def test_an_unconfirmed_model_that_is_the_last_whole_one_runs_without_counting_as_confirmed() -> None:
    leaving = decisions.leaving_trial(at("trial"), "x")
    after = decisions.rolled_back(leaving, Installed(NEXT.content_id, 3), NOW)
    assert (after.active, after.release_floor) == (Installed(NEXT.content_id, 0), 2)
    assert chosen(after, entry(2), entry(3)) == 2


def test_where_nothing_is_whole_the_release_at_the_floor_may_be_fetched_again() -> None:
    after = decisions.rolled_back(decisions.leaving_trial(at("trial"), "x"), None, NOW)
    assert after.active == Installed(TWO.content_id, 0)
    assert chosen(after, entry(2), entry(3)) == 2


def test_slots_that_a_state_needs_are_kept() -> None:
    assert decisions.kept_contents(IDLE) == {TWO.content_id, ONE.content_id, FACTORY.content_id}
    assert decisions.kept_contents(at("fetching")) == decisions.kept_contents(IDLE) | {NEXT.content_id}
    assert NEXT.content_id in decisions.kept_contents(decisions.leaving_trial(at("trial"), "x"))


def test_current_names_the_candidate_during_the_trial_alone() -> None:
    for phase in ("checked", "fetching", "staged", "gated"):
        assert decisions.wanted_content(at(phase)) == TWO.content_id
    assert decisions.wanted_content(at("trial")) == NEXT.content_id


def test_a_halted_release_does_not_go_on() -> None:
    rollouts = published(entry(2), entry(3, halted=True, reason="forgets boats"))
    for phase in ("checked", "gated", "trial"):
        assert decisions.halted_reason(rollouts, at(phase)) == "release 3 was halted: forgets boats"
    assert decisions.halted_reason(published(entry(2, halted=True), entry(3)), at("trial")) is None
    assert decisions.halted_reason(rollouts, IDLE) is None


def test_the_clock_is_not_believed_before_the_floor_and_never_moves_it() -> None:
    assert decisions.believed_time(datetime(1970, 1, 1, tzinfo=UTC), NOW) == NOW
    future = datetime(2040, 1, 1, tzinfo=UTC)
    assert decisions.believed_time(future, NOW) == future
    state = decisions.on_trial(at("gated"), 1, future)
    state = decisions.confirmed(decisions.start_counted(state) or pytest.fail("no start"))
    assert state.time_floor == LATER
    assert decisions.first_state(FACTORY, datetime(1970, 1, 1, tzinfo=UTC)).time_floor == decisions.EARLIEST_TIME


def test_a_time_floor_does_not_fall_with_an_older_list() -> None:
    state = replace(at("trial", starts=1), time_floor=LATER + timedelta(days=1))
    assert decisions.confirmed(state).time_floor == LATER + timedelta(days=1)


def test_a_state_of_slots_alone_keeps_what_is_in_use() -> None:
    names = ("1" * 64, "2" * 64, "3" * 64)
    state = decisions.state_of_slots(names, "2" * 64)
    assert state is not None
    assert (state.active.content_id, state.phase) == ("2" * 64, "idle")
    assert decisions.kept_contents(state) == set(names)
    alone = decisions.state_of_slots(names[:1], None)
    assert alone is not None
    assert (alone.active, alone.factory, alone.previous) == (Installed("1" * 64, 0), Installed("1" * 64, 0), None)
    assert decisions.state_of_slots((), "2" * 64) is None


def test_a_long_reason_is_cut() -> None:
    state = decisions.rejected(at("staged"), "x" * 1000, NOW)
    assert len(state.rejected[0].reason) == MAX_REASON_CHARACTERS
    assert state.rejected[0].reason.endswith("...")


@pytest.mark.parametrize(
    "step",
    [
        lambda state: decisions.gate_begun(state, NOW),
        lambda state: decisions.on_trial(state, 1, NOW),
        decisions.start_counted,
        decisions.confirmed,
        lambda state: decisions.leaving_trial(state, "x"),
        lambda state: decisions.rolled_back(state, ONE, NOW),
        lambda state: decisions.rejected(state, "x", NOW),
        lambda state: decisions.moved(state, "staged"),
        decisions.adopted,
        decisions.kept_candidate,
    ],
)
def test_no_step_is_taken_from_a_phase_that_it_does_not_follow(step: Callable[[AgentState], object]) -> None:
    with pytest.raises(UpdateError, match="phase idle") as caught:
        step(IDLE)
    assert str(caught.value.expected).startswith("phase ")
    with pytest.raises(UpdateError, match="phase trial"):
        decisions.dropped(at("trial"))


def test_the_candidate_of_an_entry_brings_the_time_of_the_list() -> None:
    rollouts = published(entry(3))
    assert decisions.candidate_of(rollouts.entries[0], rollouts) == NEXT
