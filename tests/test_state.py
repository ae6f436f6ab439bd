"""The device's state: strict on reading, replaced whole, and with a copy."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from crash_disk import CrashDisk
from msgspec.structs import replace

from edge_ilseg.devices.update import decisions
from edge_ilseg.devices.update.state import (
    COPY_NAME,
    MAX_REJECTED,
    STATE_NAME,
    AgentState,
    Candidate,
    Installed,
    Rejected,
    Rollback,
    Trial,
    encode_state,
    parse_state,
    read_copies,
    read_state,
    write_state,
)
from edge_ilseg.errors import UpdateError

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
OLD, NEW = Installed("a" * 64, 1), Installed("b" * 64, 2)
CANDIDATE = Candidate(2, "b" * 64, "c" * 64, NOW)
IDLE = replace(decisions.first_state(OLD, NOW), previous=Installed("d" * 64, 0))
TRIAL = replace(IDLE, phase="trial", candidate=CANDIDATE, trial=Trial(1, 3, NOW))
ROLLBACK = replace(IDLE, phase="rollback", rollback=Rollback(NEW, OLD, "empty masks", is_rejected=True))
FULL = replace(
    IDLE, rejected=tuple(Rejected(number, "b" * 64, "x" * 200, NOW) for number in range(2, 2 + MAX_REJECTED))
)


@pytest.mark.parametrize("state", [IDLE, TRIAL, ROLLBACK, FULL], ids=["idle", "trial", "rollback", "full"])
def test_a_state_is_read_as_it_was_written(state: AgentState) -> None:
    disk = CrashDisk()
    write_state(disk, state)
    assert read_state(disk) == state
    assert read_copies(disk) == (state, True, (), False)


def test_a_state_is_small_and_can_be_read_by_a_person() -> None:
    assert len(encode_state(TRIAL)) < 1024
    assert len(encode_state(FULL)) < 32 << 10
    assert b'\n "phase": "trial",\n' in encode_state(TRIAL)


def without(name: str) -> bytes:
    fields = msgspec.json.decode(encode_state(IDLE))
    del fields[name]
    return msgspec.json.encode(fields)


def changed(state: AgentState = IDLE, **fields: Any) -> bytes:
    return msgspec.json.encode({**msgspec.json.decode(encode_state(state)), **fields})


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "not JSON"),
        (b"\0" * 700, "not JSON"),
        (b"[" * 100_000, "more than"),
        (b"[" * 60_000, "not JSON"),
        (b"[]", "not JSON"),
        (b"{}", "does not read"),
        (encode_state(IDLE)[:-20], "not JSON"),
        (encode_state(IDLE) + b"x", "not JSON"),
        (changed(format="edge-ilseg-bundle"), "does not read"),
        (changed(format_version=2), "does not read"),
        (without("release_floor"), "release_floor"),
        (changed(unknown=1), "unknown"),
        (changed(phase="asleep"), "asleep"),
        (changed(release_floor=-1), "release_floor"),
        (changed(release_floor=1.5), "release_floor"),
        (changed(release_floor=2**60), "release_floor"),
        (changed(time_floor="2026-06-01T12:00:00"), "time_floor"),
        (changed(time_floor="yesterday"), "time_floor"),
        (changed(active={"content_id": "a" * 63, "release": 0}), "content_id"),
        (changed(active={"content_id": "a" * 64 + "\n", "release": 0}), "content_id"),
        (changed(active={"content_id": "../../etc", "release": 0}), "content_id"),
        (changed(active=None), "active"),
        (changed(phase="trial"), "does not fit"),
        (changed(phase="rollback"), "does not fit"),
        (changed(phase="staged"), "does not fit"),
        (changed(TRIAL, phase="idle"), "does not fit"),
        (changed(TRIAL, phase="gated"), "does not fit"),
        (changed(TRIAL, candidate=None), "does not fit"),
        (changed(ROLLBACK, phase="idle"), "does not fit"),
        (changed(TRIAL, gate_runs=1), "gate"),
        (changed(release_floor=0), "above the floor"),
        (changed(TRIAL, release_floor=3), "below the floor"),
        (changed(FULL, rejected=msgspec.json.decode(encode_state(FULL))["rejected"] * 2), "rejected"),
    ],
)
def test_what_makes_no_sense_is_refused(data: bytes, found: str) -> None:
    with pytest.raises(UpdateError) as caught:
        parse_state(data, where=STATE_NAME)
    assert found in str(caught.value)
    assert caught.value.where == STATE_NAME


def test_any_bytes_are_a_state_or_refused() -> None:
    """Ten thousand mutants; what is still a state can be written again."""
    draw = random.Random(0)
    accepted = 0
    for _ in range(10_000):
        data = bytearray(encode_state(draw.choice([IDLE, TRIAL, ROLLBACK])))
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(len(data))
            match draw.randrange(4):
                case 0:
                    data[place] = draw.randrange(256)
                case 1:
                    del data[place : place + draw.randint(1, 40)]
                case 2:
                    data[place:place] = draw.randbytes(draw.randint(1, 5))
                case _:
                    data[place:] = bytes(len(data) - place)
        try:
            state = parse_state(bytes(data))
        except UpdateError:
            continue
        accepted += 1
        assert parse_state(encode_state(state)) == state
    assert 0 < accepted < 5000


def test_an_impossible_state_cannot_be_built() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        replace(TRIAL, phase="idle")


@pytest.mark.parametrize(
    "damage", [b"", b"\0" * 800, encode_state(IDLE)[:300], None], ids=["empty", "zeros", "torn", "gone"]
)
def test_a_damaged_state_is_replaced_by_its_copy_with_all_that_it_knows(damage: bytes | None) -> None:
    disk = CrashDisk()
    write_state(disk, TRIAL)
    disk.unlink(STATE_NAME)
    if damage is not None:
        with disk.create(STATE_NAME) as file:
            file.append(damage)
    copies = read_copies(disk)
    assert (copies.state, copies.is_settled, copies.is_newer) == (TRIAL, False, False)
    assert STATE_NAME in copies.notes[0]
    assert "its copy has taken its place" in copies.notes[0]
    with pytest.raises(UpdateError):
        read_state(disk)


def test_a_damaged_copy_changes_nothing_but_is_written_anew() -> None:
    disk = CrashDisk()
    write_state(disk, TRIAL)
    disk.overwrite(COPY_NAME, b"")
    assert read_copies(disk) == (TRIAL, False, (), False)


def test_where_both_are_damaged_both_are_told() -> None:
    disk = CrashDisk()
    write_state(disk, TRIAL)
    disk.overwrite(STATE_NAME, b"")
    disk.overwrite(COPY_NAME, b"{}")
    copies = read_copies(disk)
    assert copies.state is None
    assert [name in note for name, note in zip((STATE_NAME, COPY_NAME), copies.notes, strict=True)] == [True, True]


@pytest.mark.parametrize("names", [(STATE_NAME,), (STATE_NAME, COPY_NAME)])
def test_a_state_of_a_later_version_is_not_taken_for_a_damaged_one(names: tuple[str, ...]) -> None:
    disk = CrashDisk()
    write_state(disk, TRIAL)
    for name in names:
        disk.overwrite(name, changed(TRIAL, format_version=2))
    assert read_copies(disk).is_newer


def test_the_state_is_written_before_its_copy() -> None:
    """Else a cut between the two would leave a copy that is ahead."""
    disk = CrashDisk()
    operations: list[str] = []
    disk.before = operations.append
    write_state(disk, IDLE)
    renames = [operation.split()[2] for operation in operations if operation.startswith("rename")]
    assert renames == [STATE_NAME, COPY_NAME]
