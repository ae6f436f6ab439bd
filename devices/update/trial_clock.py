"""How long a release has been on trial, counted in time that this device was awake.

1. Only differences of the monotonic clock are counted, within one start of the machine: a wall clock that jumps, from
   1970 to now or back, neither ends a trial nor prolongs it.
2. After a restart of the machine, what counts is the time since that restart; time in which it was off does not.
3. The count is written whenever it is read (by `device run`, every few minutes), without a sync: what is lost is too
   little, never too much.
4. It belongs to one content, and begins at zero with another; `forget_trial_time` ends it.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta

from edge_ilseg.devices.update.disk import disk_errors
from edge_ilseg.devices.update.state import Sha256
from edge_ilseg.errors import UpdateError
from edge_ilseg.records import parse_versioned

CLOCK_NAME = "trial-clock.json"
CLOCK_FORMAT: Literal["edge-ilseg-trial-clock"] = "edge-ilseg-trial-clock"
CLOCK_VERSION = 1
MAX_CLOCK_BYTES = 4096
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

Seconds = Annotated[float, Meta(ge=0, le=1e10)]


class Moment(NamedTuple):
    """A point in time that no wall clock has a part in."""

    boot: str
    """Names this start of the machine; empty where the system does not tell."""
    awake_s: float
    """Since that start."""


class TrialClock(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What has been counted up to a moment."""

    format: Literal["edge-ilseg-trial-clock"]
    format_version: int
    content_id: Sha256
    boot: Annotated[str, Meta(max_length=64)]
    awake_s: Seconds
    elapsed_s: Seconds


def read_moment() -> Moment:
    """Now."""
    try:
        boot = BOOT_ID.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        boot = ""
    return Moment(boot, time.monotonic())


def advanced(clock: TrialClock | None, content_id: str, now: Moment) -> TrialClock:
    """The clock at the moment `now` (rules 1, 2 and 4)."""
    if clock is None or clock.content_id != content_id:
        return TrialClock(CLOCK_FORMAT, CLOCK_VERSION, content_id, now.boot, now.awake_s, 0.0)
    is_same_start = clock.boot == now.boot and now.awake_s >= clock.awake_s
    passed_s = now.awake_s - clock.awake_s if is_same_start else now.awake_s
    return msgspec.structs.replace(
        clock, boot=now.boot, awake_s=now.awake_s, elapsed_s=min(clock.elapsed_s + passed_s, 1e10)
    )


def trial_seconds(root: Path, content_id: str, now: Moment | None = None) -> float:
    """How long a content has been on trial; the first call for it starts the count (rule 3).

    Raises:
        UpdateError: the disk refuses.
    """
    clock = advanced(_read(root / CLOCK_NAME), content_id, now or read_moment())
    part = root / f".{CLOCK_NAME}.part"
    with disk_errors("the time of the trial cannot be written"):
        part.write_bytes(msgspec.json.encode(clock))
        os.replace(part, root / CLOCK_NAME)
    return clock.elapsed_s


def forget_trial_time(root: Path) -> None:
    """The trial is over, or the next one begins."""
    with disk_errors("the time of the trial cannot be removed"), suppress(FileNotFoundError):
        (root / CLOCK_NAME).unlink()


def _read(path: Path) -> TrialClock | None:
    """The clock that was written; `None`: there is none, or it is damaged, and the count begins again."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CLOCK_BYTES)
        return parse_versioned(
            data,
            TrialClock,
            format=CLOCK_FORMAT,
            version=CLOCK_VERSION,
            error=UpdateError,
            what="the clock of the trial",
            where=path,
            hint="nothing to do: the time of the trial is counted from here on",
        )
    except (OSError, UpdateError):
        return None
