"""From a candidate to a confirmed model or back, on a disk in memory; with real processes at the end.

What a power cut does to each step: `test_crash_explorer.py`.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from crash_disk import CrashDisk, changed
from crash_life import FACTORY, MAX_STARTS, NOW, A, Agent, B, C, Content
from msgspec.structs import replace

from edge_ilseg.devices.update import decisions, lifecycle
from edge_ilseg.devices.update.disk import Disk, RealDisk
from edge_ilseg.devices.update.slots import bundle_path, check_slot, current_content, flip, slot_names, slot_path, stage
from edge_ilseg.devices.update.state import (
    COPY_NAME,
    STATE_NAME,
    Candidate,
    Installed,
    encode_state,
    read_state,
    write_state,
)
from edge_ilseg.errors import UpdateError

LATER = datetime(2026, 6, 20, tzinfo=UTC)


def candidate(release: int, content: Content) -> Candidate:
    return Candidate(release, content.content_id, "b" * 64, LATER)


def put(disk: Disk, content: Content) -> None:
    stage(disk, content.content_id, content.index, content.chunks.__getitem__)


def to_gate(disk: Disk, release: int, content: Content) -> None:
    lifecycle.begin(disk, candidate(release, content))
    lifecycle.mark_fetching(disk)
    put(disk, content)
    lifecycle.mark_staged(disk)


def to_trial(disk: Disk, release: int, content: Content) -> None:
    to_gate(disk, release, content)
    lifecycle.begin_gate(disk, NOW)
    lifecycle.mark_gated(disk, "passed", "", NOW)
    lifecycle.enter_trial(disk, max_starts=MAX_STARTS, now=NOW)


def to_confirmed(disk: Disk, release: int, content: Content) -> None:
    to_trial(disk, release, content)
    lifecycle.count_start(disk, NOW)
    lifecycle.confirm(disk, release)


def rot(disk: CrashDisk, content: Content) -> CrashDisk:
    """The disk with one bit turned in a model."""
    path = f"{bundle_path(content.content_id)}/models/model.bin"
    return CrashDisk(changed(disk.kept(), path, lambda data: bytes([data[0] ^ 1]) + data[1:]))


@pytest.fixture
def disk() -> CrashDisk:
    """A device that has just been set up."""
    disk = CrashDisk()
    Agent(disk).set_up()
    return disk


def test_a_new_device_runs_what_it_came_with(disk: CrashDisk) -> None:
    state = read_state(disk)
    assert state.active == state.factory == Installed(FACTORY.content_id, 0)
    start = lifecycle.count_start(disk, NOW)
    assert start == (FACTORY.content_id, 0, bundle_path(FACTORY.content_id), False, 0, ())
    assert current_content(disk) == FACTORY.content_id


def test_a_device_is_set_up_once(disk: CrashDisk) -> None:
    before = disk.kept()
    Agent(disk).set_up()
    assert disk.kept() == before
    put(disk, A)
    with pytest.raises(UpdateError, match="set up already"):
        lifecycle.install(disk, A.content_id, release=1, time_floor=NOW, now=NOW)


def test_a_device_is_not_set_up_with_a_slot_that_is_not_whole() -> None:
    with pytest.raises(UpdateError, match="no slot"):
        lifecycle.install(CrashDisk(), A.content_id, release=0, time_floor=NOW, now=NOW)


def test_a_device_that_was_never_set_up_is_told_so() -> None:
    for call in (lifecycle.recover, lifecycle.check_running, lifecycle.count_start):
        with pytest.raises(UpdateError, match="not set up"):
            call(CrashDisk(), NOW)


def test_a_release_is_taken_tried_and_confirmed(disk: CrashDisk) -> None:
    to_trial(disk, 1, A)
    assert current_content(disk) == A.content_id
    start = lifecycle.count_start(disk, NOW)
    assert (start.content_id, start.release, start.is_on_trial, start.starts) == (A.content_id, 1, True, 1)
    state = lifecycle.confirm(disk, 1)
    assert (state.active, state.previous) == (Installed(A.content_id, 1), Installed(FACTORY.content_id, 0))
    assert (state.release_floor, state.time_floor) == (1, LATER)
    assert not lifecycle.count_start(disk, NOW).is_on_trial


def test_a_device_on_which_nothing_is_to_be_done_is_not_written_to(disk: CrashDisk) -> None:
    to_confirmed(disk, 1, A)
    operations: list[str] = []
    disk.before = operations.append
    lifecycle.recover(disk, NOW)
    lifecycle.check_running(disk, NOW)
    lifecycle.count_start(disk, NOW)
    lifecycle.confirm(disk, 1)
    lifecycle.drop(disk)
    lifecycle.roll_back(disk, 9, "not in use", NOW)
    lifecycle.collect_garbage(disk)
    assert operations == []


@pytest.mark.parametrize("phase", ["checked", "fetching", "staged", "gated"])
def test_each_step_done_again_changes_nothing(phase: str, disk: CrashDisk) -> None:
    to_gate(disk, 1, A)
    state = decisions.moved(read_state(disk), phase)  # type: ignore[arg-type]
    write_state(disk, state)
    again: dict[str, Callable[[], object]] = {
        "checked": lambda: lifecycle.begin(disk, candidate(1, A)),
        "fetching": lambda: lifecycle.mark_fetching(disk),
        "staged": lambda: lifecycle.mark_staged(disk),
        "gated": lambda: lifecycle.begin_gate(disk, NOW),
    }
    operations: list[str] = []
    disk.before = operations.append
    again[phase]()
    assert lifecycle.begin(disk, candidate(1, A)) == read_state(disk) == state
    assert operations == []


def test_a_trial_entered_again_stays_as_it_is(disk: CrashDisk) -> None:
    to_trial(disk, 1, A)
    lifecycle.count_start(disk, NOW)
    before = disk.kept()
    assert lifecycle.enter_trial(disk, max_starts=9, now=NOW).trial == read_state(disk).trial
    assert disk.kept() == before


def test_a_release_that_is_never_confirmed_is_left_after_its_starts(disk: CrashDisk) -> None:
    to_trial(disk, 1, A)
    starts = [lifecycle.count_start(disk, NOW) for _ in range(MAX_STARTS + 2)]
    assert [start.is_on_trial for start in starts] == [True] * MAX_STARTS + [False, False]
    assert "not confirmed after 2 starts" in " ".join(starts[MAX_STARTS].notes)
    state = read_state(disk)
    assert (state.active.content_id, state.rejected[0].release) == (FACTORY.content_id, 1)
    with pytest.raises(UpdateError, match="not taken"):
        lifecycle.begin(disk, candidate(1, A))


def test_a_trial_that_goes_wrong_is_left_once(disk: CrashDisk) -> None:
    to_confirmed(disk, 1, A)
    to_trial(disk, 2, B)
    recovery = lifecycle.roll_back(disk, 2, "empty masks", NOW)
    assert recovery.state.active == Installed(A.content_id, 1)
    assert "release 2" in recovery.notes[0]
    assert "empty masks" in recovery.notes[0]
    assert current_content(disk) == A.content_id
    again = lifecycle.roll_back(disk, 2, "empty masks", NOW)
    assert again == (recovery.state, (), True)


def test_an_operator_leaves_a_permanent_release(disk: CrashDisk) -> None:
    to_confirmed(disk, 1, A)
    to_confirmed(disk, 2, B)
    state = lifecycle.roll_back(disk, 2, "a complaint", NOW).state
    assert (state.active, state.release_floor) == (Installed(A.content_id, 1), 2)
    assert current_content(disk) == A.content_id
    with pytest.raises(UpdateError, match="rejected on this device: a complaint"):
        lifecycle.begin(disk, candidate(2, B))


def test_with_one_model_alone_there_is_no_way_back(disk: CrashDisk) -> None:
    with pytest.raises(UpdateError, match="no other model"):
        lifecycle.roll_back(disk, 0, "x", NOW)
    assert lifecycle.count_start(disk, NOW).content_id == FACTORY.content_id


def test_another_release_than_the_one_on_trial_is_not_confirmed(disk: CrashDisk) -> None:
    to_trial(disk, 1, A)
    lifecycle.count_start(disk, NOW)
    with pytest.raises(UpdateError, match="not on trial"):
        lifecycle.confirm(disk, 2)
    flip(disk, FACTORY.content_id)
    with pytest.raises(UpdateError, match="not on trial"):
        lifecycle.confirm(disk, 1)


@pytest.mark.parametrize("verdict", ["failed", "no verdict"])
def test_what_the_gate_refuses_is_rejected(verdict: lifecycle.GateVerdict, disk: CrashDisk) -> None:
    to_gate(disk, 1, A)
    for _ in range(1 if verdict == "failed" else decisions.MAX_GATE_RUNS):
        assert lifecycle.begin_gate(disk, NOW).phase == "staged"
        state = lifecycle.mark_gated(disk, verdict, "forgets boats", NOW)
    assert (state.phase, state.rejected[0].reason) == ("idle", "forgets boats")
    assert current_content(disk) == FACTORY.content_id


def test_a_gate_that_takes_the_device_down_each_time_rejects_its_release(disk: CrashDisk) -> None:
    """Each run is counted before it begins, so that the cut in it need not be survived by anything."""
    to_gate(disk, 1, A)
    runs = 0
    while lifecycle.begin_gate(disk, NOW).phase == "staged":
        runs += 1
        disk = CrashDisk(next(iter(disk.images())))  # the power goes
        lifecycle.recover(disk, NOW)
    assert runs == decisions.MAX_GATE_RUNS
    assert "without a verdict" in read_state(disk).rejected[0].reason


def test_a_release_on_its_way_is_dropped_or_rejected(disk: CrashDisk) -> None:
    to_gate(disk, 1, A)
    assert lifecycle.drop(disk).phase == "idle"
    assert lifecycle.begin(disk, candidate(1, A)).phase == "checked"
    assert lifecycle.reject(disk, 1, "by hand", NOW).rejected[0].reason == "by hand"
    assert lifecycle.reject(disk, 1, "again", NOW).rejected[0].reason == "by hand"
    lifecycle.begin(disk, candidate(2, A))
    with pytest.raises(UpdateError, match="not on its way"):
        lifecycle.reject(disk, 3, "x", NOW)


def test_a_release_whose_content_runs_already_is_permanent_at_once(disk: CrashDisk) -> None:
    state = lifecycle.begin(disk, candidate(1, FACTORY))
    assert (state.phase, state.active, state.release_floor) == ("idle", Installed(FACTORY.content_id, 1), 1)


def test_a_slot_that_goes_bad_on_its_way_is_fetched_again(disk: CrashDisk) -> None:
    to_gate(disk, 1, A)
    bad = rot(disk, A)
    assert lifecycle.begin_gate(bad, NOW).phase == "checked"
    lifecycle.begin_gate(disk, NOW)
    lifecycle.mark_gated(disk, "passed", "", NOW)
    bad = rot(disk, A)
    assert lifecycle.enter_trial(bad, max_starts=1, now=NOW).phase == "checked"
    assert current_content(bad) == FACTORY.content_id
    to_gate(bad, 1, A)
    check_slot(bad, A.content_id)


def test_a_model_on_trial_that_goes_bad_is_left(disk: CrashDisk) -> None:
    to_trial(disk, 1, A)
    disk = rot(disk, A)
    start = lifecycle.count_start(disk, NOW)
    assert (start.content_id, start.is_on_trial) == (FACTORY.content_id, False)
    assert "damaged" in start.notes[0]
    assert read_state(disk).rejected[0].release == 1


def test_bit_rot_in_the_model_in_use_falls_back_and_the_release_is_fetched_again(disk: CrashDisk) -> None:
    to_confirmed(disk, 1, A)
    to_confirmed(disk, 2, B)
    disk = rot(disk, B)
    recovery = lifecycle.check_running(disk, NOW)
    assert recovery.state.active == Installed(A.content_id, 1)
    assert any("damaged" in note for note in recovery.notes)
    assert recovery.state.release_floor == 2
    to_confirmed(disk, 2, B)
    state = read_state(disk)
    assert (state.active, state.previous) == (Installed(B.content_id, 2), Installed(A.content_id, 1))
    check_slot(disk, B.content_id)


def test_bit_rot_in_two_models_falls_back_to_the_factory(disk: CrashDisk) -> None:
    to_confirmed(disk, 1, A)
    to_confirmed(disk, 2, B)
    disk = rot(rot(disk, B), A)
    assert lifecycle.count_start(disk, NOW).content_id == FACTORY.content_id
    assert current_content(disk) == FACTORY.content_id


def test_where_every_model_is_damaged_the_last_release_can_be_fetched_again(disk: CrashDisk) -> None:
    to_confirmed(disk, 1, A)
    disk = rot(rot(disk, A), FACTORY)
    with pytest.raises(UpdateError, match="no whole model"):
        lifecycle.count_start(disk, NOW)
    assert not lifecycle.check_running(disk, NOW).is_whole
    operations: list[str] = []
    disk.before = operations.append
    lifecycle.check_running(disk, NOW)
    assert operations == []  # not again at each start
    to_gate(disk, 1, A)
    lifecycle.begin_gate(disk, NOW)
    lifecycle.mark_gated(disk, "passed", "", NOW)
    state = lifecycle.enter_trial(disk, max_starts=1, now=NOW)
    assert (state.phase, state.active) == ("idle", Installed(A.content_id, 1))
    assert lifecycle.count_start(disk, NOW).content_id == A.content_id


def test_a_trial_with_nothing_whole_to_go_back_to_goes_on_running_what_is_whole(disk: CrashDisk) -> None:
    to_trial(disk, 1, A)
    disk = rot(disk, FACTORY)
    state = lifecycle.roll_back(disk, 1, "empty masks", NOW).state
    assert (state.active, state.release_floor, state.rejected[0].release) == (Installed(A.content_id, 0), 0, 1)
    assert lifecycle.count_start(disk, NOW).content_id == A.content_id


def test_slots_that_nothing_needs_are_removed(disk: CrashDisk) -> None:
    to_confirmed(disk, 1, A)
    to_confirmed(disk, 2, B)
    lifecycle.begin(disk, candidate(3, C))
    for name in (f"{A.content_id}.part", f"{C.content_id}.part"):
        with disk.create(f"incoming/{name}"):
            pass
    lifecycle.collect_garbage(disk)
    assert disk.names("incoming") == (f"{C.content_id}.part",)
    to_confirmed(disk, 3, C)
    lifecycle.collect_garbage(disk)
    assert set(slot_names(disk)) == {item.content_id for item in (C, B, FACTORY)}
    assert disk.names("incoming") == ()


def damaged(disk: CrashDisk, *names: str) -> CrashDisk:
    for name in names:
        disk.overwrite(name, b"\0" * 700)
    return disk


def test_a_damaged_state_loses_neither_the_floor_nor_the_rejected_releases_nor_the_trial(disk: CrashDisk) -> None:
    to_confirmed(disk, 1, A)
    to_gate(disk, 2, B)
    lifecycle.reject(disk, 2, "by hand", NOW)
    to_trial(disk, 3, C)
    lifecycle.count_start(disk, NOW)
    before = read_state(disk)
    recovery = lifecycle.recover(damaged(disk, STATE_NAME), NOW)
    assert recovery.state == before == read_state(disk)
    assert "its copy has taken its place" in recovery.notes[0]
    assert lifecycle.recover(disk, NOW).notes == ()


def test_a_damaged_state_does_not_stop_the_application(disk: CrashDisk) -> None:
    to_confirmed(disk, 1, A)
    start = lifecycle.count_start(damaged(disk, STATE_NAME, COPY_NAME), NOW)
    assert start.content_id == A.content_id
    assert any("forgotten" in note for note in start.notes)
    state = read_state(disk)
    assert (state.active, state.factory.content_id) == (Installed(A.content_id, 0), FACTORY.content_id)
    assert set(slot_names(disk)) == {A.content_id, FACTORY.content_id}


def test_where_the_state_and_the_link_are_lost_a_whole_slot_is_found(disk: CrashDisk) -> None:
    disk.unlink("current")
    assert lifecycle.count_start(damaged(disk, STATE_NAME, COPY_NAME), NOW).content_id == FACTORY.content_id
    assert current_content(disk) == FACTORY.content_id


def test_a_lost_link_is_made_again(disk: CrashDisk) -> None:
    disk.unlink("current")
    assert "was completed" in lifecycle.recover(disk, NOW).notes[0]
    assert current_content(disk) == FACTORY.content_id


def test_the_state_of_a_later_version_is_left_as_it_is_and_the_model_runs(disk: CrashDisk) -> None:
    to_confirmed(disk, 1, A)
    newer = encode_state(read_state(disk)).replace(b'"format_version": 1', b'"format_version": 2')
    for name in (STATE_NAME, COPY_NAME):
        disk.overwrite(name, newer)
    before = disk.kept()
    with pytest.raises(UpdateError, match="a later version"):
        lifecycle.recover(disk, NOW)
    assert lifecycle.count_start(disk, NOW).content_id == A.content_id
    assert disk.kept() == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_a_start_that_cannot_be_counted_runs_the_permanent_model(code: int, disk: CrashDisk) -> None:
    to_confirmed(disk, 1, A)
    to_trial(disk, 2, B)

    def refuse(operation: str) -> None:
        raise OSError(code, os.strerror(code), operation)

    disk.before = refuse
    start = lifecycle.count_start(disk, NOW)
    assert (start.content_id, start.is_on_trial) == (A.content_id, False)
    assert os.strerror(code) in start.notes[0]
    disk.before = None
    assert lifecycle.count_start(disk, NOW).is_on_trial


def test_a_clock_of_1970_can_be_lived_with(disk: CrashDisk) -> None:
    early = datetime(1970, 1, 1, tzinfo=UTC)
    to_gate(disk, 1, A)
    lifecycle.begin_gate(disk, early)
    lifecycle.mark_gated(disk, "passed", "", early)
    state = lifecycle.enter_trial(disk, max_starts=1, now=early)
    assert state.trial is not None
    assert state.trial.since == state.time_floor
    assert lifecycle.roll_back(disk, 1, "x", early).state.rejected[0].when == state.time_floor


def test_a_slot_that_somebody_deleted_is_noticed_without_reading_all_of_it(disk: CrashDisk) -> None:
    to_confirmed(disk, 1, A)
    disk.rename(slot_path(A.content_id), slot_path(B.content_id))
    assert lifecycle.recover(disk, NOW).state.active.content_id == FACTORY.content_id


START = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from edge_ilseg.devices.update import lifecycle
from edge_ilseg.devices.update.disk import RealDisk
print(lifecycle.count_start(RealDisk(Path(sys.argv[1])), datetime.now(UTC)).is_on_trial)
"""


def test_applications_that_start_at_the_same_time_are_all_counted(tmp_path: Path) -> None:
    disk = RealDisk(tmp_path)
    Agent(disk).set_up()
    to_trial(disk, 1, A)
    state = read_state(disk)
    write_state(disk, replace(state, trial=replace(state.trial, max_starts=4)))
    command = [sys.executable, "-c", START, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    answers = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert sorted(answers) == ["False"] * 2 + ["True"] * 4
    assert read_state(disk).rejected[0].release == 1


def test_a_start_waits_for_no_lock_that_is_held_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline alone is shortened: a holder that hangs cannot be had faster."""
    monkeypatch.setattr("edge_ilseg.devices.update.disk.STATE_DEADLINE_S", 0.1)
    disk = RealDisk(tmp_path)
    Agent(disk).set_up()
    to_trial(disk, 1, A)
    with disk.exclusive():
        start = lifecycle.count_start(disk, NOW)
    assert (start.content_id, start.is_on_trial) == (FACTORY.content_id, False)
    assert "held by process" in start.notes[0]


def test_no_module_that_a_poll_needs_loads_numpy() -> None:
    names = ("disk", "lock", "state", "slots", "decisions", "lifecycle")
    program = f"""
import importlib, sys
sys.modules["numpy"] = None
for name in {names}: importlib.import_module("edge_ilseg.devices.update." + name)
from crash_life import SCRIPT, Agent
from crash_disk import CrashDisk
disk = CrashDisk()
for step in SCRIPT[:5]: step.do(Agent(disk))
"""
    folder = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
