"""What a device knows of its models: one small record, which alone decides what runs and what may be taken.

1. Any bytes give an `AgentState` that makes sense, or an `UpdateError`: impossible states cannot be built at all.
2. `state.json` is the authority. It is replaced whole: after a power cut it holds the old state or the new.
3. `state.copy.json` holds the same bytes and is written right after. It is read only where `state.json` is damaged or
   gone (a bad sector, a slip of a hand), so that one damaged file loses neither the release floor nor the list of
   rejected releases.
4. The release floor and the time floor never fall, and a rejected release stays rejected: where the list is full, all
   releases up to the lowest one on it are given up before it is dropped.

Format page: docs/reliability.md. Nothing here loads numpy.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta

from edge_ilseg.devices.update.disk import Disk, repeat_on_eio, replace_file
from edge_ilseg.errors import UpdateError
from edge_ilseg.records import parse_versioned

STATE_NAME = "state.json"
COPY_NAME = "state.copy.json"
STATE_FORMAT: Literal["edge-ilseg-agent-state"] = "edge-ilseg-agent-state"
STATE_VERSION = 1
MAX_STATE_BYTES = 64 << 10
SET_UP = "edge-ilseg device init BUNDLE sets a device up"
MENDED = "any command of `edge-ilseg device` puts its copy in its place, and says so"
MAX_REJECTED = 64
MAX_REASON_CHARACTERS = 200

# The length, because `$` also stands before a line end.
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$", max_length=64)]
Number = Annotated[int, Meta(ge=0, le=2**53)]
Count = Annotated[int, Meta(ge=0, le=2**31)]
Time = Annotated[datetime, Meta(tz=True)]
Reason = Annotated[str, Meta(max_length=MAX_REASON_CHARACTERS)]
Phase = Literal["idle", "checked", "fetching", "staged", "gated", "trial", "rollback"]
PHASES_OF_WORK: tuple[Phase, ...] = ("checked", "fetching", "staged", "gated")
"""A candidate is on its way, and nothing of it is in use."""


class Installed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A content that has been made permanent."""

    content_id: Sha256
    release: Number
    """That brought it here; 0: it came with the device, or it is not known."""


class Candidate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The release that is being taken."""

    release: Annotated[int, Meta(ge=1, le=2**53)]
    content_id: Sha256
    bundle_id: Sha256
    published: Time
    """When the list of roll-outs that names it was signed: the time floor, once it is confirmed."""


class Trial(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The candidate is in use, and not yet permanent."""

    starts: Count
    """Of the application with the candidate, each counted before the load."""
    max_starts: Annotated[int, Meta(ge=1, le=2**31)]
    since: Time


class Rollback(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`good` takes the place of `bad`."""

    bad: Installed
    good: Installed
    reason: Reason
    is_rejected: bool
    """Whether the release of `bad` is never taken again: not where only its copy on this disk is damaged."""


class Rejected(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A release that is not taken again."""

    release: Number
    content_id: Sha256
    reason: Reason
    when: Time


class AgentState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What runs, what is on its way, and what is not to be taken."""

    format: Literal["edge-ilseg-agent-state"]
    format_version: int
    phase: Phase
    active: Installed
    """The last one made permanent. In `trial`, the one to go back to."""
    previous: Installed | None
    """Permanent before `active`; its slot stays until the next confirmation."""
    factory: Installed
    release_floor: Number
    """The highest release that was ever confirmed here: nothing below it is taken."""
    time_floor: Time
    """The clock is not believed to be before it."""
    candidate: Candidate | None = None
    """In the phases of work and in `trial`."""
    trial: Trial | None = None
    rollback: Rollback | None = None
    gate_runs: Count = 0
    """Runs of the gate on this candidate that were begun, and did not end with a verdict."""
    given_up: Number = 0
    """Releases up to this number are not taken (rule 4)."""
    rejected: Annotated[tuple[Rejected, ...], Meta(max_length=MAX_REJECTED)] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot be (rule 1)."""
        has = (self.candidate is not None, self.trial is not None, self.rollback is not None)
        expected = {"idle": (False, False, False), "trial": (True, True, False), "rollback": (False, False, True)}
        if has != expected.get(self.phase, (True, False, False)):
            raise ValueError(f"the phase {self.phase!r} does not fit the candidate, the trial or the roll-back")
        if self.phase not in PHASES_OF_WORK and self.gate_runs:
            raise ValueError(f"the phase {self.phase!r} has runs of the gate")
        if self.release_floor < self.active.release:
            raise ValueError(f"the active release {self.active.release} is above the floor {self.release_floor}")
        if self.candidate is not None and self.candidate.release < self.release_floor:
            raise ValueError(f"the candidate {self.candidate.release} is below the floor {self.release_floor}")


class Copies(NamedTuple):
    """What the two files say."""

    state: AgentState | None
    is_settled: bool
    """Both files hold this state."""
    notes: tuple[str, ...]
    """What is wrong with them, in sentences."""
    is_newer: bool
    """One was written by a later version of this program: it is not damaged, and must not be replaced."""


def encode_state(state: AgentState) -> bytes:
    """As it is written."""
    return msgspec.json.format(msgspec.json.encode(state), indent=1) + b"\n"


def parse_state(data: bytes, *, where: object = None) -> AgentState:
    """Turn the bytes of a `state.json` into a state (rule 1).

    Raises:
        UpdateError: not such a record, of another version, or one that contradicts itself.
    """
    if len(data) > MAX_STATE_BYTES:
        raise UpdateError(
            "the device's state is damaged", where=where, found=f"more than {MAX_STATE_BYTES} bytes", hint=MENDED
        )
    return parse_versioned(
        data,
        AgentState,
        format=STATE_FORMAT,
        version=STATE_VERSION,
        error=UpdateError,
        what="the device's state",
        where=where,
        hint=MENDED,
    )


def read_state(disk: Disk) -> AgentState:
    """The state by `state.json` alone.

    Raises:
        UpdateError: it is not there, cannot be read, or is damaged.
    """
    data = _read(disk, STATE_NAME)
    if isinstance(data, str):
        raise UpdateError(data, hint=SET_UP)
    return parse_state(data, where=STATE_NAME)


def write_state(disk: Disk, state: AgentState) -> AgentState:
    """Replace `state.json`, then its copy (rules 2 and 3). Durable when it returns."""
    data = encode_state(state)
    replace_file(disk, STATE_NAME, data)
    replace_file(disk, COPY_NAME, data)
    return state


def read_copies(disk: Disk) -> Copies:
    """The state by `state.json` or, where that is damaged or gone, by its copy. Writes nothing, and never raises."""
    notes: list[str] = []
    is_newer = False
    data = {name: _read(disk, name) for name in (STATE_NAME, COPY_NAME)}
    for name, found in data.items():
        if isinstance(found, str):
            notes.append(found)
            continue
        try:
            state = parse_state(found, where=name)
        except UpdateError as error:
            is_newer |= _version(found) > STATE_VERSION
            notes.append(error.one_line())
            continue
        if name == STATE_NAME:
            return Copies(state, data[COPY_NAME] == found, (), is_newer=False)
        return Copies(state, False, (f"{notes[0]}; its copy has taken its place",), is_newer)
    return Copies(None, False, tuple(notes), is_newer)


def _version(data: bytes) -> int:
    """The version that a state says it has; 0 where it does not look like one."""
    try:
        head = msgspec.json.decode(data, type=dict[str, object])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return 0
    version = head.get("format_version")
    return version if head.get("format") == STATE_FORMAT and isinstance(version, int) else 0


def _read(disk: Disk, name: str) -> bytes | str:
    """The bytes of a file of ROOT, or what is wrong."""
    try:
        return repeat_on_eio(lambda: disk.read(name, MAX_STATE_BYTES + 1))
    except FileNotFoundError:
        return f"there is no {name}"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror or error}"
