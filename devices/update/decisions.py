"""What follows from what a device knows: the next state, or why there is none. Nothing here reads, writes or waits.

1. A release is taken if it is above the floor, and neither halted, rejected nor given up. The one that stands at the
   floor is taken again only where it is not what runs: its copy on this disk went bad, and is fetched anew.
2. The floor rises only when a release is made permanent: at `confirmed`, or where its content is what runs already.
3. `active` changes only at `confirmed` and `rolled_back`; all else can be dropped at any time.
4. A trial is made permanent only after a start with it.
5. What started too often without a confirmation goes back, and so does a release that was halted meanwhile.
6. A gate that three times did not come to a verdict has given one: rejected.
7. The clock is not believed to be before the time floor. The floor comes from signed times, never from the clock: a
   clock of 1970 does not accept old metadata, and one of 2040 leaves nothing behind.
"""

from __future__ import annotations

from datetime import UTC, datetime

from msgspec.structs import replace

from edge_ilseg.devices.update.release import RolloutEntry, Rollouts, is_chosen
from edge_ilseg.devices.update.state import (
    MAX_REASON_CHARACTERS,
    MAX_REJECTED,
    PHASES_OF_WORK,
    STATE_FORMAT,
    STATE_VERSION,
    AgentState,
    Candidate,
    Installed,
    Phase,
    Rejected,
    Rollback,
    Trial,
)
from edge_ilseg.errors import UpdateError

MAX_GATE_RUNS = 3
SEE_STATUS = "see what is on its way: edge-ilseg device status"
EARLIEST_TIME = datetime(2026, 1, 1, tzinfo=UTC)
"""This program is younger: the time floor where nothing else is known."""


def believed_time(clock: datetime, time_floor: datetime) -> datetime:
    """The time by which metadata are judged (rule 7)."""
    return max(clock, time_floor)


def candidate_of(entry: RolloutEntry, rollouts: Rollouts) -> Candidate:
    """The candidate that an entry of the signed list stands for."""
    return Candidate(entry.release, entry.content_id, entry.bundle_id, datetime.fromisoformat(rollouts.published))


def refusal(state: AgentState, release: int, content_id: str) -> str | None:
    """Why a release is not taken, or `None` (rule 1)."""
    for entry in state.rejected:
        if entry.release == release:
            return f"release {release} was rejected on this device: {entry.reason}"
    if release <= state.given_up:
        return f"releases up to {state.given_up} are given up: more were rejected than the list holds"
    if release < state.release_floor:
        return f"release {release} is below the floor {state.release_floor}"
    if release == state.release_floor and Installed(content_id, release) == state.active:
        return f"release {release} is what runs"
    return None


def choose_release(
    rollouts: Rollouts, state: AgentState, *, device_id: str, group: str, now: datetime
) -> RolloutEntry | None:
    """The highest release that this device takes, or `None` when there is nothing for it (rule 1)."""
    for entry in reversed(rollouts.entries):
        if entry.halted or refusal(state, entry.release, entry.content_id) is not None:
            continue
        if is_chosen(entry.rollout, device_id, group, believed_time(now, state.time_floor)):
            return entry
    return None


def halted_reason(rollouts: Rollouts, state: AgentState) -> str | None:
    """Why the release on its way or on trial must not go on, or `None` (rule 5)."""
    for entry in rollouts.entries:
        if state.candidate is not None and entry.release == state.candidate.release and entry.halted:
            return f"release {entry.release} was halted: {entry.reason or 'no reason is given'}"
    return None


def wanted_content(state: AgentState) -> str:
    """The content that `current` has to name."""
    if state.candidate is not None and state.phase == "trial":
        return state.candidate.content_id
    return state.rollback.good.content_id if state.rollback is not None else state.active.content_id


def kept_contents(state: AgentState) -> frozenset[str]:
    """The contents whose slots stay."""
    kept = {item.content_id for item in (state.active, state.previous, state.factory) if item is not None}
    if state.candidate is not None:
        kept.add(state.candidate.content_id)
    if state.rollback is not None:
        kept |= {state.rollback.good.content_id, state.rollback.bad.content_id}
    return frozenset(kept)


def resorts(state: AgentState) -> tuple[Installed, ...]:
    """What to run when what should run is damaged, best first; the damaged one last."""
    bad = state.rollback.bad if state.rollback is not None else state.active
    good = state.rollback.good if state.rollback is not None else None
    found: dict[str, Installed] = {}
    for item in (good, state.active, state.previous, state.factory):
        if item is not None and item.content_id != bad.content_id:
            found.setdefault(item.content_id, item)
    return (*found.values(), bad)


def order_without_counting(state: AgentState) -> tuple[Installed, ...]:
    """What to run when a start cannot be counted, best first: never what is on trial."""
    return resorts(state) if state.rollback is not None else (state.active, *resorts(state)[:-1])


def first_state(installed: Installed, time_floor: datetime) -> AgentState:
    """The state of a device that has just been set up."""
    return AgentState(
        STATE_FORMAT,
        STATE_VERSION,
        phase="idle",
        active=installed,
        previous=None,
        factory=installed,
        release_floor=installed.release,
        time_floor=max(time_floor, EARLIEST_TIME),
    )


def state_of_slots(contents: tuple[str, ...], current: str | None) -> AgentState | None:
    """What is known where both copies of the state are lost: the whole slots, and which of them is in use.

    The floor and the list of rejected releases start anew. The signed metadata, which have floors of their own, still
    refuse old lists of roll-outs.
    """
    if not contents:
        return None
    active = current if current in contents else contents[0]
    others = [Installed(content, 0) for content in contents if content != active]
    state = first_state(Installed(active, 0), EARLIEST_TIME)
    return replace(state, previous=others[0], factory=others[-1]) if others else state


def begun(state: AgentState, candidate: Candidate) -> AgentState:
    """`candidate` is taken; another one that was on its way is dropped. The same one goes on where it was.

    Raises:
        UpdateError: it must not be taken (rule 1), or another one is on trial.
    """
    if state.candidate is not None and (state.candidate.release, state.candidate.content_id) == (
        candidate.release,
        candidate.content_id,
    ):
        return state
    if state.phase not in ("idle", *PHASES_OF_WORK):
        raise _wrong_phase(state, "a release cannot be taken now", ("idle", *PHASES_OF_WORK))
    why = refusal(state, candidate.release, candidate.content_id)
    if why is not None:
        raise UpdateError("the release is not taken", found=why, hint="publish it anew, with a higher number")
    return replace(state, phase="checked", candidate=candidate, gate_runs=0)


def adopted(state: AgentState) -> AgentState:
    """The candidate's content is what runs already: nothing is left to do but to remember its number (rule 2)."""
    candidate = _candidate(state, PHASES_OF_WORK)
    if candidate.content_id != state.active.content_id:
        raise UpdateError(
            "only what runs already is adopted",
            found=candidate.content_id,
            hint="edge-ilseg device run goes on with it",
        )
    return _permanent(state, candidate, state.previous)


def moved(state: AgentState, phase: Phase) -> AgentState:
    """The candidate on its way is now in `phase`, one of those of work."""
    _candidate(state, PHASES_OF_WORK)
    return replace(state, phase=phase, gate_runs=state.gate_runs if phase == "staged" else 0)


def dropped(state: AgentState) -> AgentState:
    """No candidate is on its way. It is not rejected, and may be taken again."""
    if state.phase not in ("idle", *PHASES_OF_WORK):
        raise _wrong_phase(state, "nothing can be dropped now", PHASES_OF_WORK)
    return replace(state, phase="idle", candidate=None, gate_runs=0)


def gate_begun(state: AgentState, now: datetime) -> AgentState:
    """One more run of the gate, or the candidate is rejected (rule 6)."""
    _candidate(state, ("staged",))
    if state.gate_runs >= MAX_GATE_RUNS:
        return rejected(state, f"the gate ended {state.gate_runs} times without a verdict", now)
    return replace(state, gate_runs=state.gate_runs + 1)


def rejected(state: AgentState, reason: str, now: datetime) -> AgentState:
    """The candidate is not taken, now or later."""
    candidate = _candidate(state, PHASES_OF_WORK)
    return _with_rejected(dropped(state), Installed(candidate.content_id, candidate.release), reason, now)


def on_trial(state: AgentState, max_starts: int, now: datetime) -> AgentState:
    """The candidate is in use from now on, and not yet permanent."""
    _candidate(state, ("gated",))
    return replace(state, phase="trial", trial=Trial(0, max_starts, believed_time(now, state.time_floor)))


def start_counted(state: AgentState) -> AgentState | None:
    """One more start with the candidate on trial; `None` if it had all that it may have (rule 5)."""
    if state.trial is None:
        raise _wrong_phase(state, "nothing is on trial", ("trial",))
    if state.trial.starts >= state.trial.max_starts:
        return None
    return replace(state, trial=replace(state.trial, starts=state.trial.starts + 1))


def confirmed(state: AgentState) -> AgentState:
    """The candidate is permanent, and the floors rise (rules 2 to 4)."""
    candidate = _candidate(state, ("trial",))
    if state.trial is None or state.trial.starts == 0:
        raise UpdateError(
            "the model on trial was never started",
            expected="at least one start of the application",
            hint="start the application, and let it see images",
        )
    return _permanent(state, candidate, state.active)


def leaving_trial(state: AgentState, reason: str) -> AgentState:
    """The candidate on trial makes room for what ran before, and is not tried again."""
    candidate = _candidate(state, ("trial",))
    return _leaving(state, Installed(candidate.content_id, candidate.release), state.active, reason, is_rejected=True)


def leaving_active(state: AgentState, reason: str, *, is_rejected: bool) -> AgentState:
    """What is permanent makes room for what was before it, and work in progress is dropped.

    Raises:
        UpdateError: there is nothing else to run.
    """
    good = resorts(state)[0]
    if good.content_id == state.active.content_id:
        raise UpdateError(
            "there is no other model to go back to",
            found=f"only {good.content_id}",
            hint="publish a release that this device can go to: edge-ilseg publish add",
        )
    return _leaving(dropped(state), state.active, good, reason, is_rejected=is_rejected)


def rolled_back(state: AgentState, runs: Installed | None, now: datetime) -> AgentState:
    """The roll-back is complete: `runs` is what `current` names, or `None` where every copy here is damaged."""
    rollback = state.rollback
    if rollback is None:
        raise _wrong_phase(state, "nothing is being rolled back", ("rollback",))
    if runs is None or runs.release > state.release_floor:  # or the other ones are damaged, and it is still the new one
        runs = Installed((runs or rollback.good).content_id, 0)
    is_previous = state.previous is not None and state.previous.content_id == runs.content_id
    after = replace(state, phase="idle", rollback=None, active=runs, previous=None if is_previous else state.previous)
    return _with_rejected(after, rollback.bad, rollback.reason, now) if rollback.is_rejected else after


def without_whole_copy(state: AgentState) -> AgentState:
    """Every copy on this disk is damaged: the release at the floor may be fetched again (rule 1)."""
    return replace(state, active=Installed(state.active.content_id, 0))


def short(reason: str) -> str:
    """A reason as the state holds it."""
    return reason if len(reason) <= MAX_REASON_CHARACTERS else reason[: MAX_REASON_CHARACTERS - 3] + "..."


def _permanent(state: AgentState, candidate: Candidate, previous: Installed | None) -> AgentState:
    floor = max(state.release_floor, candidate.release)
    return replace(
        state,
        phase="idle",
        active=Installed(candidate.content_id, candidate.release),
        previous=previous,
        release_floor=floor,
        time_floor=max(state.time_floor, candidate.published),
        candidate=None,
        trial=None,
        gate_runs=0,
        rejected=tuple(entry for entry in state.rejected if entry.release >= floor),
    )


def _leaving(state: AgentState, bad: Installed, good: Installed, reason: str, *, is_rejected: bool) -> AgentState:
    rollback = Rollback(bad, good, short(reason), is_rejected)
    return replace(state, phase="rollback", candidate=None, trial=None, rollback=rollback)


def _with_rejected(state: AgentState, bad: Installed, reason: str, now: datetime) -> AgentState:
    """The list with one more, sorted by number. What is dropped from a full one is given up, with all below it."""
    if bad.release == 0:
        return state  # it came with the device: no release brings it
    entry = Rejected(bad.release, bad.content_id, short(reason), believed_time(now, state.time_floor))
    others = [item for item in state.rejected if item.release != bad.release and item.release >= state.release_floor]
    entries = sorted((*others, entry), key=lambda item: item.release)
    given_up = state.given_up
    if len(entries) > MAX_REJECTED:
        given_up = max(given_up, entries[-MAX_REJECTED - 1].release)
    return replace(state, rejected=tuple(entries[-MAX_REJECTED:]), given_up=given_up)


def kept_candidate(state: AgentState) -> Candidate:
    """The candidate on its way or on trial.

    Raises:
        UpdateError: there is none.
    """
    return _candidate(state, (*PHASES_OF_WORK, "trial"))


def _candidate(state: AgentState, phases: tuple[Phase, ...]) -> Candidate:
    if state.candidate is None or state.phase not in phases:
        raise _wrong_phase(state, "this cannot be done now", phases)
    return state.candidate


def _wrong_phase(state: AgentState, what: str, expected: tuple[Phase, ...]) -> UpdateError:
    return UpdateError(
        what,
        where="state.json",
        found=f"phase {state.phase}",
        expected=" or ".join(f"phase {item}" for item in expected),
        hint=SEE_STATUS,
    )
