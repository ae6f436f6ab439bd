"""A fleet, by the reports that its devices sent: how each device stands, and how each release fares. Nothing is kept.

1. Every plain file `*.json` of the folder, and below it, is a report. One that is none, or is damaged, is named and
   counted, and ends nothing: anybody may have put it there.
2. The numbers of a device's reports order them, never a clock. The same report twice is one report; two that differ
   under one number are a sign that two devices have one id: the second is counted as damaged.
3. For a release, a device counts once: as what its newest report about that release says.
4. A device has tried a release when its gate has given a verdict. Devices whose trial goes on count as such: refusals
   come first and confirmations late, and a share of those that have ended would halt every release.
5. Too many refusals and roll-backs, among enough devices that have tried it, halt a release.
6. A release is its number and its bundle: a report about another repository's release of that number does not count.
"""

from __future__ import annotations

import os
import stat
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from edge_ilseg.devices.update.release import RolloutEntry
from edge_ilseg.devices.update.reporting import (
    MAX_REPORT_BYTES,
    ActiveModel,
    DeviceReport,
    ForgottenClass,
    RetentionNumbers,
    parse_device_report,
)
from edge_ilseg.errors import DataError, UpdateError

STATUS_FORMAT: Literal["edge-ilseg-fleet-status"] = "edge-ilseg-fleet-status"
STATUS_VERSION = 1
DEFAULT_MIN_DEVICES = 3
SHOWN_DAMAGED = 100

Outcome = Literal["chosen", "trying", "confirmed", "rolled back", "refused"]
OUTCOMES: dict[str, Outcome] = {
    "checked": "chosen",
    "fetched": "chosen",
    "staged": "chosen",
    "gate passed": "trying",
    "activated": "trying",
    "confirmed": "confirmed",
    "rolled back": "rolled back",
    "gate refused": "refused",
    "rejected": "refused",
}
"""What an event about a release makes of the device (rules 3 and 4); other events change nothing."""
TRIED: tuple[Outcome, ...] = ("trying", "confirmed", "rolled back", "refused")


class Damaged(msgspec.Struct, frozen=True):
    """A file that is no report, and why."""

    file: str
    reason: str


class Collected(NamedTuple):
    """All that lies in a folder of reports."""

    by_device: dict[str, tuple[DeviceReport, ...]]
    """In the order of their numbers."""
    damaged: tuple[Damaged, ...]
    """The first of them."""
    damaged_count: int


class DeviceStatus(msgspec.Struct, frozen=True):
    """How a device stands."""

    device_id: str
    group: str
    last_seen: str
    """By its own clock."""
    event: str
    """Of its newest report."""
    release: int | None
    """That event is about."""
    active: ActiveModel | None
    verdict: str | None
    """The newest one of its gate, with reason, forgotten classes and numbers."""
    reason: str | None
    forgotten: tuple[ForgottenClass, ...]
    retention: RetentionNumbers | None
    reports: int


class ReleaseStatus(msgspec.Struct, frozen=True):
    """How a release fares: devices, each counted once."""

    release: int
    bundle_id: str | None
    step_name: str | None
    chosen: int
    """Devices that take it, whatever came of it."""
    trying: int
    confirmed: int
    rolled_back: int
    refused: int
    forgotten: dict[str, int]
    """Class -> devices on which it broke a limit, the most frequent first."""

    @property
    def tried(self) -> int:
        """Rule 4."""
        return self.trying + self.confirmed + self.rolled_back + self.refused

    @property
    def failed_pct(self) -> float | None:
        """Share of those that tried it on which it failed."""
        return 100 * (self.rolled_back + self.refused) / self.tried if self.tried else None


class FleetStatus(msgspec.Struct, frozen=True):
    """A fleet by its reports."""

    format: Literal["edge-ilseg-fleet-status"]
    format_version: int
    reports: int
    devices: tuple[DeviceStatus, ...]
    releases: tuple[ReleaseStatus, ...]
    damaged: tuple[Damaged, ...]
    damaged_count: int
    halted: tuple[int, ...] = ()
    """Releases that were halted just now."""


def read_fleet(folder: Path) -> FleetStatus:
    """The status of the fleet whose reports lie in a folder (rules 1 to 4).

    Raises:
        DataError: there is no such folder.
    """
    return fleet_status(read_reports(folder))


def fleet_status(collected: Collected) -> FleetStatus:
    """The status of the fleet that sent these (rules 2 to 4)."""
    newest = [status_of(reports) for reports in collected.by_device.values()]
    return FleetStatus(
        format=STATUS_FORMAT,
        format_version=STATUS_VERSION,
        reports=sum(len(reports) for reports in collected.by_device.values()),
        devices=tuple(sorted(newest, key=lambda item: item.device_id)),
        releases=release_statuses(collected.by_device.values()),
        damaged=collected.damaged,
        damaged_count=collected.damaged_count,
    )


def read_reports(folder: Path) -> Collected:
    """All reports of a folder (rules 1 and 2).

    Raises:
        DataError: there is no such folder.
    """
    if not folder.is_dir():
        raise DataError("the folder of reports is missing", where=folder, hint="give the folder that reports go to")
    found: dict[str, dict[int, DeviceReport]] = defaultdict(dict)
    damaged: list[Damaged] = []
    count = 0
    for path in _files(folder):
        try:
            report = parse_device_report(_read_plain_file(path), where=path.name)
            known = found[report.device_id].setdefault(report.sequence, report)
            if known != report:
                raise UpdateError(
                    "another report of this device has the same number",
                    found=report.sequence,
                    hint="give each device an id of its own: edge-ilseg device init --device-id",
                )
        except (UpdateError, OSError) as error:
            count += 1
            if count <= SHOWN_DAMAGED:
                reason = error.one_line() if isinstance(error, UpdateError) else error.strerror or str(error)
                damaged.append(Damaged(_printable(str(path.relative_to(folder))), _printable(reason)[:300]))
    by_device = {
        device: tuple(reports[number] for number in sorted(reports)) for device, reports in found.items() if reports
    }
    return Collected(by_device, tuple(damaged), count)


def status_of(reports: Sequence[DeviceReport]) -> DeviceStatus:
    """How the device stands that sent these, in the order of their numbers."""
    newest = reports[-1]
    judged = next((item for item in reversed(reports) if item.verdict is not None), None)
    return DeviceStatus(
        device_id=newest.device_id,
        group=newest.group,
        last_seen=newest.created,
        event=newest.event,
        release=newest.release,
        active=next((item.active for item in reversed(reports) if item.active is not None), None),
        verdict=judged.verdict if judged else None,
        reason=judged.reason if judged else newest.reason,
        forgotten=judged.forgotten if judged else (),
        retention=judged.retention if judged else None,
        reports=len(reports),
    )


def release_statuses(devices: Iterable[Sequence[DeviceReport]]) -> tuple[ReleaseStatus, ...]:
    """How each release fares, the highest number first (rules 3, 4 and 6)."""
    outcomes: dict[tuple[int, str | None], Counter[Outcome]] = defaultdict(Counter)
    forgotten: dict[tuple[int, str | None], Counter[str]] = defaultdict(Counter)
    names: dict[tuple[int, str | None], str | None] = {}
    for reports in devices:
        latest: dict[tuple[int, str | None], Outcome] = {}
        lost: dict[tuple[int, str | None], set[str]] = defaultdict(set)
        for report in reports:
            outcome = OUTCOMES.get(report.event)
            if report.release is None or outcome is None:
                continue
            key = (report.release, report.bundle_id)
            latest[key] = outcome
            names[key] = report.step_name or names.get(key)
            lost[key] |= {item.name for item in report.forgotten}
        for key, outcome in latest.items():
            outcomes[key][outcome] += 1
            forgotten[key].update(lost[key])
    return tuple(
        ReleaseStatus(
            release=key[0],
            bundle_id=key[1],
            step_name=names[key],
            chosen=sum(counts.values()),
            trying=counts["trying"],
            confirmed=counts["confirmed"],
            rolled_back=counts["rolled back"],
            refused=counts["refused"],
            forgotten=dict(forgotten[key].most_common()),
        )
        for key, counts in sorted(outcomes.items(), key=lambda item: (-item[0][0], item[0][1] or ""))
    )


def to_halt(
    releases: Iterable[ReleaseStatus], entries: Iterable[RolloutEntry], above_pct: float, min_devices: int
) -> dict[int, str]:
    """Releases that are to be halted, each with its reason (rules 5 and 6).

    Args:
        releases: how they fare.
        entries: what is published.
        above_pct: a larger share of the devices that tried it.
        min_devices: that must have tried it.
    """
    published = {(entry.release, entry.bundle_id) for entry in entries if not entry.halted}
    found = {}
    for item in releases:
        share_pct = item.failed_pct
        is_known = (item.release, item.bundle_id) in published
        if not is_known or share_pct is None or item.tried < min_devices or share_pct <= above_pct:
            continue
        reason = f"{share_pct:.1f} % of {item.tried} devices refused it or went back (limit {above_pct:g} %)"
        worst = [f"{name} on {count}" for name, count in item.forgotten.items()][:3]
        found[item.release] = f"{reason}; forgotten: {', '.join(worst)}" if worst else reason
    return found


def _files(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(place) / name for name in sorted(names) if name.endswith(".json") and name[0] != ".")


def _read_plain_file(path: Path) -> bytes:
    """At most one byte more than a report may have; a link, a pipe or a device is refused."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UpdateError("this is no plain file", hint="put the report itself there")
        return file.read(MAX_REPORT_BYTES + 1)


def _printable(text: str) -> str:
    return "".join(sign if sign.isprintable() else "?" for sign in text)
