"""What a publisher signs, and a device believes: a list of roll-outs, and one release for each of them.

1. Both are TUF targets: `rollouts.json`, and `releases/<number>.json`, which never changes once it is published.
2. A release names its content by the hash of its pack's index, which covers every byte of the bundle.
3. Release numbers only rise. Going back to older bytes on purpose is a release with a higher number.
4. Only this version's formats are read; unknown fields are refused. Format page: docs/release-format.md.

Nothing here loads numpy: a poll with nothing new stays small.
"""

from __future__ import annotations

import hashlib
import re
from datetime import datetime
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edge_ilseg.devices.limits import Limits
from edge_ilseg.errors import PUBLISH_AGAIN, UpdateError
from edge_ilseg.records import parse_versioned

ROLLOUTS_TARGET = "rollouts.json"
ROLLOUTS_FORMAT = "edge-ilseg-rollouts"
RELEASE_FORMAT = "edge-ilseg-release"
FORMAT_VERSION = 1
MAX_RECORD_BYTES = 4 << 20
MAX_PACK_BYTES = 4 << 30
MAX_INDEX_BYTES = 16 << 20
UPDATE_AGENT = "update edge-ilseg on this device"
TIME_HINT = "write date, time and zone, as 2026-01-31T12:00:00+00:00"

Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Percent = Annotated[float, Meta(ge=0, le=100)]
Number = Annotated[int, Meta(ge=1, le=2**53)]


class Rollout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which devices take a release."""

    id: str
    """Decides, with the device's id, whether a device is among the first: `is_chosen`."""
    percent: Percent = 100.0
    groups: tuple[str, ...] = ()
    """Empty: devices of every group."""
    not_before: str | None = None
    """UTC, ISO 8601."""


class RolloutEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One published release, and how far it has gone."""

    release: Number
    bundle_id: Sha256
    content_id: Sha256
    step_index: int
    step_name: str
    rollout: Rollout
    halted: bool = False
    reason: str | None = None
    """Why it was halted."""

    @property
    def target(self) -> str:
        """Name of the TUF target that holds the release."""
        return release_target(self.release)


class Rollouts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The one target that a device asks for by a fixed name."""

    format: Literal["edge-ilseg-rollouts"]
    format_version: int
    published: str
    """UTC, ISO 8601: the device's clock is never believed to be before it, once a release of it is confirmed."""
    entries: tuple[RolloutEntry, ...]
    """Numbers rise."""


class PackRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the content is. The index stands first in the pack, and lists every chunk by hash."""

    path: str
    """Relative to the repository: `packs/<content id>.pack`."""
    bytes: Annotated[int, Meta(ge=1, le=MAX_PACK_BYTES)]
    index_bytes: Annotated[int, Meta(ge=1, le=MAX_INDEX_BYTES)]
    index_sha256: Sha256


class WatchLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the application must have seen of a model on trial before it is confirmed."""

    min_frames: Annotated[int, Meta(ge=1)] = 100
    min_seconds: Annotated[float, Meta(ge=0)] = 60.0
    """From the first frame of the trial to the last."""
    deadline_s: Annotated[float, Meta(gt=0)] = 86_400.0
    """Not confirmed after so long: rolled back."""
    max_starts: Annotated[int, Meta(ge=1)] = 3
    """Starts of the application with the model on trial, without a confirmation."""
    max_failures: Annotated[int, Meta(ge=0)] = 0
    """Frames on which the application failed."""
    max_constant_pct: Percent = 50.0
    """Share of the masks that are of one class whole."""
    max_old_share_drop_pct: Percent | None = None
    """Percentage points of all pixels that the old classes may lose against the model before."""
    max_latency_p95_ms: Annotated[float, Meta(gt=0)] | None = None


class Release(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One bundle as it is sent out, with the limits that a device must see kept."""

    format: Literal["edge-ilseg-release"]
    format_version: int
    release: Number
    published: str
    bundle_id: Sha256
    step_index: int
    step_name: str
    pack: PackRef
    limits: Limits
    watch: WatchLimits
    note: str = ""

    @property
    def content_id(self) -> str:
        """Names the slot: equal content has equal ids, whatever the release."""
        return self.pack.index_sha256


def release_target(number: int) -> str:
    """Name of the TUF target of a release."""
    return f"releases/{number}.json"


def pack_path(content_id: str) -> str:
    """Where a repository keeps the content of that id."""
    return f"packs/{content_id}.pack"


def is_chosen(rollout: Rollout, device_id: str, group: str, now: datetime) -> bool:
    """Whether a device takes part in a roll-out at the time `now`.

    The same device always gets the same answer: one of the first 10 % is among the first 20 %, too.
    """
    if rollout.groups and group not in rollout.groups:
        return False
    if rollout.not_before is not None and now < datetime.fromisoformat(rollout.not_before):
        return False
    digest = hashlib.sha256(f"{rollout.id}:{device_id}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64 * 100 < rollout.percent


def encode_record(record: Rollouts | Release) -> bytes:
    """As it is signed."""
    return msgspec.json.format(msgspec.json.encode(record), indent=1)


def parse_rollouts(data: bytes, *, where: object = None) -> Rollouts:
    """Turn signed bytes into roll-outs.

    Raises:
        UpdateError: not such a record, of another version, or numbers that do not rise.
    """
    rollouts = parse_versioned(
        data,
        Rollouts,
        format=ROLLOUTS_FORMAT,
        version=FORMAT_VERSION,
        error=UpdateError,
        what="the list of roll-outs",
        where=where,
        hint=UPDATE_AGENT,
    )
    numbers = [entry.release for entry in rollouts.entries]
    if sorted(set(numbers)) != numbers:
        raise UpdateError(
            "the numbers of the releases do not rise", where=where, found=str(numbers)[:200], hint=PUBLISH_AGAIN
        )
    _check_time(rollouts.published, where)
    for entry in rollouts.entries:
        if entry.rollout.not_before is not None:
            _check_time(entry.rollout.not_before, where)
    return rollouts


def parse_release(data: bytes, *, where: object = None) -> Release:
    """Turn signed bytes into a release.

    Raises:
        UpdateError: not such a record, of another version, or with a pack that is not in its place.
    """
    release = parse_versioned(
        data,
        Release,
        format=RELEASE_FORMAT,
        version=FORMAT_VERSION,
        error=UpdateError,
        what="the release",
        where=where,
        hint=UPDATE_AGENT,
    )
    if release.pack.path != pack_path(release.content_id) or release.pack.index_bytes > release.pack.bytes:
        raise UpdateError(
            "the release names a pack that cannot be its own",
            where=where,
            found=release.pack.path,
            expected=pack_path(release.content_id),
            hint=PUBLISH_AGAIN,
        )
    _check_time(release.published, where)
    return release


def _check_time(text: str, where: object) -> None:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise UpdateError("a time is not in ISO 8601", where=where, found=repr(text), hint=TIME_HINT) from error
    if moment.tzinfo is None or not re.match(r"\d{4}-", text):
        raise UpdateError(
            "a time has no time zone",
            where=where,
            found=repr(text),
            expected="as 2026-01-31T12:00:00+00:00",
            hint=TIME_HINT,
        )
