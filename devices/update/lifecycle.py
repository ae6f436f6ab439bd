"""From a candidate to a confirmed model or back: each step durable before the next, and repeatable after a power cut.

1. Record before flip: what `current` will name is in the state before the link changes. `recover` does what is missing.
2. A start is counted, durably, before the model on trial is loaded. One that cannot be counted (a full disk) runs the
   model before it instead: inference never waits for the update.
3. Confirming is one replacement of the state: floor, `active` and `previous` rise together.
4. Going back is recorded, done, and recorded as done. It ends on a model that is whole: the one before, else the
   previous, else the factory's, else whatever is; where none is whole, the release at the floor may be fetched again.
5. A damaged state stops neither inference nor updating: its copy takes its place, or what the slots tell does.
6. A device on which nothing is to be done is not written to.
7. Each step is repeatable: done again, it changes nothing. Each names the release that it means.

Every function that changes something holds `Disk.exclusive`; `decisions.py` decides, this module acts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Literal, NamedTuple

from edge_ilseg.devices.update import decisions
from edge_ilseg.devices.update.disk import Disk, disk_errors
from edge_ilseg.devices.update.slots import (
    FETCH_AGAIN,
    bundle_path,
    check_slot,
    collect,
    current_content,
    flip,
    is_whole,
    prepare,
    slot_names,
)
from edge_ilseg.devices.update.state import (
    SET_UP,
    AgentState,
    Candidate,
    Installed,
    read_copies,
    read_state,
    write_state,
)
from edge_ilseg.errors import UpdateError

GateVerdict = Literal["passed", "failed", "no verdict"]


class Recovery(NamedTuple):
    """What a device does, and what had to be mended."""

    state: AgentState
    notes: tuple[str, ...]
    is_whole: bool = True
    """Whether there is a whole model to run. `recover` looks whether it is there, `check_running` reads it."""


class Start(NamedTuple):
    """The model that the application loads now."""

    content_id: str
    release: int
    bundle: str
    """Folder below ROOT."""
    is_on_trial: bool
    starts: int
    """With this model on trial, this one counted."""
    notes: tuple[str, ...]


def install(disk: Disk, content_id: str, *, release: int, time_floor: datetime, now: datetime) -> AgentState:
    """Set a device up with a content that has been staged: from now on it is active, and the factory's.

    Raises:
        UpdateError: its slot is not whole, or the device is set up with another one.
    """
    with _changing(disk):
        known = read_copies(disk)
        if known.state is not None or known.is_newer:
            state = _recover(disk, now).state
            if state.factory.content_id == content_id:
                return state
            raise UpdateError(
                "this device is set up already",
                found=f"factory {state.factory.content_id[:12]}",
                expected=f"factory {content_id[:12]}",
                hint="publish the bundle as a release, or import it",
            )
        check_slot(disk, content_id)
        prepare(disk)
        state = write_state(disk, decisions.first_state(Installed(content_id, release), time_floor))
        flip(disk, content_id)
        return state


def recover(disk: Disk, now: datetime) -> Recovery:
    """Finish what a power cut or a kill has left; the first thing that every command does.

    Raises:
        UpdateError: the device was never set up, the disk refuses to be written, or a later version of this program
            has written the state.
    """
    with _changing(disk):
        return _recover(disk, now)


def check_running(disk: Disk, now: datetime) -> Recovery:
    """`recover`, and read all of the model in use: bit rot makes room for the model before it (rule 4)."""
    with _changing(disk):
        return _check_running(disk, now)


def begin(disk: Disk, candidate: Candidate) -> AgentState:
    """Take a release. One whose content runs already is permanent at once; the same one goes on where it was.

    Raises:
        UpdateError: it must not be taken: see `decisions.refusal`.
    """
    with _changing(disk):
        state = read_state(disk)
        after = decisions.begun(state, candidate)
        is_new = after != state
        if is_new and candidate.content_id == after.active.content_id:
            after = decisions.adopted(after) if is_whole(disk, candidate.content_id, bundle_only=True) else after
        return write_state(disk, after) if is_new else state


def mark_fetching(disk: Disk) -> AgentState:
    """The download has begun."""
    return _move(disk, "fetching")


def mark_staged(disk: Disk) -> AgentState:
    """The slot is there, and was read again: `slots.stage` has returned."""
    return _move(disk, "staged")


def begin_gate(disk: Disk, now: datetime) -> AgentState:
    """Count a run of the gate before it begins: a model that takes the whole device down is counted, too.

    Returns:
        The state. Its phase says what to do: `staged` run the gate; `gated` it was passed before; `checked` the slot is
        damaged, fetch again; `idle` it had all its runs, and is rejected.
    """
    with _changing(disk):
        state = read_state(disk)
        if state.phase != "staged":
            return state
        if not is_whole(disk, decisions.kept_candidate(state).content_id):
            return write_state(disk, decisions.moved(state, "checked"))
        return write_state(disk, decisions.gate_begun(state, now))


def mark_gated(disk: Disk, verdict: GateVerdict, reason: str, now: datetime) -> AgentState:
    """Record what the gate has said. `no verdict`: it crashed, or ran out of time; three times is a verdict."""
    with _changing(disk):
        state = read_state(disk)
        if verdict == "passed":
            return write_state(disk, decisions.moved(state, "gated"))
        if verdict == "failed" or state.gate_runs >= decisions.MAX_GATE_RUNS:
            return write_state(disk, decisions.rejected(state, reason, now))
        return state


def reject(disk: Disk, release: int, reason: str, now: datetime) -> AgentState:
    """Do not take a release that is on its way, now or later."""
    with _changing(disk):
        state = read_state(disk)
        if any(entry.release == release for entry in state.rejected):
            return state
        if decisions.kept_candidate(state).release != release:
            raise UpdateError("this release is not on its way", found=release, hint=decisions.SEE_STATUS)
        return write_state(disk, decisions.rejected(state, reason, now))


def drop(disk: Disk) -> AgentState:
    """Leave what is on its way: halted, or no longer for this device. It may be taken again."""
    with _changing(disk):
        state = read_state(disk)
        after = decisions.dropped(state)
        return write_state(disk, after) if after != state else state


def enter_trial(disk: Disk, *, max_starts: int, now: datetime) -> AgentState:
    """Use the gated candidate, for now (rule 1).

    Returns:
        The state. Its phase is `trial`; `checked` where the slot went bad meanwhile, so that it is fetched again;
        `idle` where the content is what runs, and was only repaired.
    """
    with _changing(disk):
        state = read_state(disk)
        if state.phase == "trial":
            return _recover(disk, now).state
        candidate = decisions.kept_candidate(state)
        after = decisions.on_trial(state, max_starts, now)
        if not is_whole(disk, candidate.content_id, bundle_only=True):
            return write_state(disk, decisions.moved(state, "checked"))
        if candidate.content_id == state.active.content_id:
            return write_state(disk, decisions.adopted(state))
        write_state(disk, after)
        flip(disk, candidate.content_id)
        return after


def count_start(disk: Disk, now: datetime) -> Start:
    """Which model to load. Called by the application right before each load (rule 2).

    Raises:
        UpdateError: there is no whole model on this device.
    """
    try:
        with _changing(disk):
            return _count_start(disk, now)
    except UpdateError as error:
        return _start_without_counting(disk, error)


def confirm(disk: Disk, release: int) -> AgentState:
    """Make the release on trial permanent (rule 3).

    Raises:
        UpdateError: it is not on trial, was never started, or is not what `current` names.
    """
    with _changing(disk):
        state = read_state(disk)
        if state.phase != "trial" and state.active.release == release:
            return state
        after = decisions.confirmed(state)
        if after.active.release != release or current_content(disk) != after.active.content_id:
            raise UpdateError(
                "this release is not on trial", found=after.active.release, expected=release, hint=decisions.SEE_STATUS
            )
        return write_state(disk, after)


def roll_back(disk: Disk, release: int, reason: str, now: datetime) -> Recovery:
    """Leave a release, on trial or permanent, for what was before it, and do not take it again (rule 4).

    One that is not in use changes nothing.

    Raises:
        UpdateError: there is nothing else to run.
    """
    with _changing(disk):
        state, notes, _ = _recover(disk, now)
        if state.phase == "trial" and decisions.kept_candidate(state).release == release:
            return _go_back(disk, decisions.leaving_trial(state, reason), now, notes)
        if state.phase != "trial" and state.active.release == release:
            return _go_back(disk, decisions.leaving_active(state, reason, is_rejected=True), now, notes)
        return Recovery(state, notes)


def collect_garbage(disk: Disk) -> tuple[str, ...]:
    """Remove what the state does not need; see `slots.collect`."""
    state = read_state(disk)
    is_fetched = state.candidate is not None and state.phase in ("checked", "fetching")
    incoming = (state.candidate.content_id,) if state.candidate is not None and is_fetched else ()
    return collect(disk, decisions.kept_contents(state), incoming=incoming)


@contextmanager
def _changing(disk: Disk) -> Iterator[None]:
    with disk_errors("the device's state cannot be read or written"), disk.exclusive():
        yield


def _move(disk: Disk, phase: Literal["fetching", "staged"]) -> AgentState:
    with _changing(disk):
        state = read_state(disk)
        return state if state.phase == phase else write_state(disk, decisions.moved(state, phase))


def _known_state(disk: Disk) -> tuple[AgentState, tuple[str, ...]]:
    """The state by its files or, where both are lost, by the slots (rule 5)."""
    copies = read_copies(disk)
    if copies.is_newer:
        raise UpdateError(
            "the state was written by a later version of this program",
            hint="update edge-ilseg on this device; the model in use goes on running",
        )
    if copies.state is not None:
        if not copies.is_settled:
            write_state(disk, copies.state)
        return copies.state, copies.notes
    whole = tuple(name for name in slot_names(disk) if is_whole(disk, name, bundle_only=True))
    state = decisions.state_of_slots(whole, current_content(disk))
    if state is None:
        raise UpdateError("this device is not set up", found="; ".join(copies.notes), hint=SET_UP)
    lost = f"the floor and the rejected releases are forgotten; {state.active.content_id[:12]} is taken as active"
    return write_state(disk, state), (*copies.notes, lost)


def _recover(disk: Disk, now: datetime) -> Recovery:
    state, notes = _known_state(disk)
    if state.phase == "rollback":
        return _finish_rollback(disk, state, now, notes)
    wanted = decisions.wanted_content(state)
    if current_content(disk) == wanted and disk.kind(bundle_path(wanted)) == "folder":
        return Recovery(state, notes)
    if not is_whole(disk, wanted, bundle_only=True):
        return _leave_damaged(disk, state, now, notes)
    flip(disk, wanted)
    return Recovery(state, (*notes, f"the switch to {wanted[:12]} was completed"))


def _check_running(disk: Disk, now: datetime) -> Recovery:
    recovery = _recover(disk, now)
    wanted = decisions.wanted_content(recovery.state)
    if not recovery.is_whole or is_whole(disk, wanted, bundle_only=True):
        return recovery
    return _leave_damaged(disk, recovery.state, now, recovery.notes)


def _leave_damaged(disk: Disk, state: AgentState, now: datetime, notes: tuple[str, ...]) -> Recovery:
    """The model that should run is damaged on this disk."""
    if state.phase == "trial":
        return _go_back(disk, decisions.leaving_trial(state, "its slot is damaged"), now, notes)
    *others, bad = decisions.resorts(state)
    what = f"the slot {bad.content_id[:12]}, which should run, is damaged"
    if any(is_whole(disk, item.content_id, bundle_only=True) for item in others):
        return _go_back(
            disk, decisions.leaving_active(state, "its slot is damaged", is_rejected=False), now, (*notes, what)
        )
    after = decisions.without_whole_copy(state)
    if after != state:
        write_state(disk, after)
    return Recovery(after, (*notes, what, "there is no whole model on this device"), is_whole=False)


def _go_back(disk: Disk, state: AgentState, now: datetime, notes: tuple[str, ...]) -> Recovery:
    return _finish_rollback(disk, write_state(disk, state), now, notes)


def _finish_rollback(disk: Disk, state: AgentState, now: datetime, notes: tuple[str, ...]) -> Recovery:
    order = decisions.resorts(state)
    runs = next((item for item in order if is_whole(disk, item.content_id, bundle_only=True)), None)
    if runs is not None:
        flip(disk, runs.content_id)  # even if it says so already: a killed process may have left that unsynced
    after = write_state(disk, decisions.rolled_back(state, runs, now))
    reason = state.rollback.reason if state.rollback is not None else ""
    left = f"release {order[-1].release} ({order[-1].content_id[:12]}) was left: {reason}"
    found = f"{runs.content_id[:12]} runs" if runs is not None else "there is no whole model on this device"
    return Recovery(after, (*notes, left, found), is_whole=runs is not None)


def _count_start(disk: Disk, now: datetime) -> Start:
    state, notes, there_is_one = _check_running(disk, now)
    if state.phase == "trial":
        counted = decisions.start_counted(state)
        if counted is not None:
            write_state(disk, counted)
            return _start_of_trial(counted, notes)
        reason = f"not confirmed after {state.trial.starts if state.trial is not None else 0} starts"
        state, notes, there_is_one = _go_back(disk, decisions.leaving_trial(state, reason), now, notes)
    if not there_is_one:
        raise UpdateError("there is no whole model on this device", hint=FETCH_AGAIN)
    return _start_of(state.active, notes)


def _start_of_trial(state: AgentState, notes: tuple[str, ...]) -> Start:
    candidate = decisions.kept_candidate(state)
    starts = state.trial.starts if state.trial is not None else 0
    bundle = bundle_path(candidate.content_id)
    return Start(candidate.content_id, candidate.release, bundle, is_on_trial=True, starts=starts, notes=notes)


def _start_of(installed: Installed, notes: tuple[str, ...]) -> Start:
    bundle = bundle_path(installed.content_id)
    return Start(installed.content_id, installed.release, bundle, is_on_trial=False, starts=0, notes=notes)


def _start_without_counting(disk: Disk, error: UpdateError) -> Start:
    """Rule 2 where the disk cannot be written, or the lock is held: read alone, and choose what is permanent."""
    state = read_copies(disk).state
    if state is not None:
        order = decisions.order_without_counting(state)
    else:
        with disk_errors("the device cannot be read"):
            names = (current_content(disk), *slot_names(disk))
        order = tuple(Installed(name, 0) for name in names if name is not None)
    for item in order:
        if is_whole(disk, item.content_id, bundle_only=True):
            return _start_of(item, (error.one_line(),))
    raise error
