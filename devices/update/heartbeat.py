"""What an application has seen of the model that it runs: one small file beside the slots, which the agent judges.

1. The application replaces `heartbeat.json` by rename, at most once a second, and without a sync: what a power cut
   takes is a few seconds of counts, and no frame ever waits for the disk.
2. Counts are those of one content. They go on when the application starts again, and begin anew with another content.
3. Time that decides anything is measured by the monotonic clock of one process (`watched_s`); wall-clock times are for
   people.
4. The file is written by another program, maybe by another user: any bytes give a `Heartbeat` that makes sense, or an
   `UpdateError`, and nothing but a plain file of at most 64 KiB is ever read.
5. When a release goes on trial, the heartbeat of the model before it is kept: the new one is compared with it.

Format page: docs/heartbeat-format.md. Nothing here loads numpy.
"""

from __future__ import annotations

import math
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edge_ilseg.devices.update.disk import disk_errors
from edge_ilseg.devices.update.state import Count, Sha256, Time
from edge_ilseg.devices.update.trial_clock import forget_trial_time
from edge_ilseg.errors import UpdateError
from edge_ilseg.records import parse_versioned

HEARTBEAT_NAME = "heartbeat.json"
BASELINE_NAME = "baseline.json"
HEARTBEAT_FORMAT: Literal["edge-ilseg-heartbeat"] = "edge-ilseg-heartbeat"
HEARTBEAT_VERSION = 1
MAX_HEARTBEAT_BYTES = 64 << 10
SAME_VERSION = "the application and the agent need the same version of edge-ilseg"
MAX_ERROR_CHARACTERS = 300

Total = Annotated[int, Meta(ge=0, le=2**53)]
Milliseconds = Annotated[float, Meta(ge=0, le=1e9)]
Text = Annotated[str, Meta(max_length=256)]


class ClassPixels(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One class, in the order of the channels, and the pixels that were counted as it."""

    name: Text
    pixels: Total


class Heartbeat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was seen of one content."""

    format: Literal["edge-ilseg-heartbeat"]
    format_version: int
    content_id: Sha256
    bundle_id: Sha256
    pid: Annotated[int, Meta(ge=0, le=2**31)]
    processes: Count
    """Starts of the application that are counted in here (rule 2)."""
    started: Time
    """Of the process `pid`."""
    updated: Time
    first_frame: Time | None
    last_frame: Time | None
    watched_s: Annotated[float, Meta(ge=0, le=1e10)]
    """From the first frame to the last, of each process, summed (rule 3)."""
    frames: Total
    """That got a mask."""
    failures: Total
    last_failure: Annotated[str, Meta(max_length=MAX_ERROR_CHARACTERS)] | None
    constant_masks: Total
    """Of one class whole."""
    latency_frames: Count
    """The last so many frames, which the latencies are of."""
    latency_p50_ms: Milliseconds | None
    latency_p95_ms: Milliseconds | None
    latency_max_ms: Milliseconds | None
    background: Text | None
    classes: Annotated[tuple[ClassPixels, ...], Meta(max_length=255)]

    def __post_init__(self) -> None:
        """Refuse what cannot be (rule 4)."""
        if self.constant_masks > self.frames or self.latency_frames > self.frames:
            raise ValueError("more masks are constant, or timed, than there are frames")
        latencies = (self.latency_p50_ms, self.latency_p95_ms, self.latency_max_ms)
        if any((item is None) != (self.latency_frames == 0) for item in latencies):
            raise ValueError("latencies do not fit the number of frames that they are of")
        known = [item for item in latencies if item is not None]
        if known != sorted(known):
            raise ValueError("the latencies do not rise")
        if len({item.name for item in self.classes}) != len(self.classes):
            raise ValueError("a class is there twice")

    @property
    def constant_pct(self) -> float | None:
        """Share of the masks that are of one class whole."""
        return 100 * self.constant_masks / self.frames if self.frames else None

    def share_pct(self, names: frozenset[str]) -> float | None:
        """Share of all pixels that are of these classes, the background left out; `None` where nothing was counted."""
        total = sum(item.pixels for item in self.classes)
        found = sum(item.pixels for item in self.classes if item.name in names and item.name != self.background)
        return 100 * found / total if total else None


def encode_heartbeat(heartbeat: Heartbeat) -> bytes:
    """As it is written."""
    return msgspec.json.format(msgspec.json.encode(heartbeat), indent=1) + b"\n"


def parse_heartbeat(data: bytes, *, where: object = None) -> Heartbeat:
    """Turn the bytes of a `heartbeat.json` into a heartbeat (rule 4).

    Raises:
        UpdateError: not such a record, of another version, or one that contradicts itself.
    """
    if len(data) > MAX_HEARTBEAT_BYTES:
        raise UpdateError(
            "the heartbeat is too large",
            where=where,
            expected=f"at most {MAX_HEARTBEAT_BYTES} bytes",
            hint=SAME_VERSION,
        )
    return parse_versioned(
        data,
        Heartbeat,
        format=HEARTBEAT_FORMAT,
        version=HEARTBEAT_VERSION,
        error=UpdateError,
        what="the heartbeat",
        where=where,
        hint=SAME_VERSION,
    )


def read_heartbeat(root: Path) -> Heartbeat | None:
    """The heartbeat below `root`; `None`: there is none, or nothing that can be believed."""
    return _read(root / HEARTBEAT_NAME)


def read_baseline(root: Path) -> Heartbeat | None:
    """What was kept of the model before the one on trial (rule 5)."""
    return _read(root / BASELINE_NAME)


def keep_baseline(root: Path, content_id: str) -> None:
    """Keep the heartbeat of the active content, right before a release goes on trial (rule 5).

    No heartbeat is left after it, and the time of the trial begins at zero: what the model is judged by is seen in this
    trial. A second call keeps the baseline that tells more.

    Raises:
        UpdateError: the disk refuses.
    """
    found, kept = read_heartbeat(root), read_baseline(root)
    forget_trial_time(root)
    with disk_errors("the heartbeat cannot be kept"):
        if kept is not None and kept.content_id != content_id:
            kept = None
        if found is not None and found.content_id == content_id and (kept is None or found.frames >= kept.frames):
            os.replace(root / HEARTBEAT_NAME, root / BASELINE_NAME)
            return
        _remove(root / HEARTBEAT_NAME)
        if kept is None:
            _remove(root / BASELINE_NAME)


def write_heartbeat(root: Path, heartbeat: Heartbeat) -> None:
    """Replace `heartbeat.json` (rule 1).

    Raises:
        OSError: the disk refuses; the file is the old one.
    """
    part = root / f".{HEARTBEAT_NAME}.part"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    descriptor = os.open(part, flags, 0o644)
    try:
        data = memoryview(encode_heartbeat(heartbeat))
        while data:
            data = data[os.write(descriptor, data) :]
    finally:
        os.close(descriptor)
    os.replace(part, root / HEARTBEAT_NAME)


def short_error(error: BaseException | str) -> str:
    """An error in one line, as a heartbeat holds it."""
    text = error if isinstance(error, str) else str(error) or type(error).__name__
    line = " ".join(text.split()).encode("utf-8", "replace").decode()
    return line if len(line) <= MAX_ERROR_CHARACTERS else line[: MAX_ERROR_CHARACTERS - 3] + "..."


def percentile(values: list[float], percent: float) -> float:
    """By nearest rank: the smallest value that so many per cent of the values keep to."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def _read(path: Path) -> Heartbeat | None:
    try:
        return parse_heartbeat(_read_plain_file(path), where=path)
    except (OSError, UpdateError):
        return None


def _read_plain_file(path: Path) -> bytes:
    """At most so many bytes as a heartbeat may have, and one more; a link, a pipe or a device is refused (rule 4)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UpdateError(
                "the heartbeat is no plain file", where=path, hint="remove it: the application writes it again"
            )
        return file.read(MAX_HEARTBEAT_BYTES + 1)


def _remove(path: Path) -> None:
    with suppress(FileNotFoundError):
        path.unlink()
