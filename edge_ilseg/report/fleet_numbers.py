"""What a page about a fleet shows, counted from its reports. Pure: no clock, no file.

1. A device counts once in every number.
2. Devices' clocks may be wrong. Times are used to draw and to say who has been silent, never to order; those more than
   a year from the middle one of the fleet are left out, and counted.
3. "Now" is the latest time that is left: the same reports give the same page.
4. Reasons that differ in their numbers alone are one reason.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from statistics import median

import msgspec

from edge_ilseg.devices.update.reporting import DeviceReport
from edge_ilseg.fleet import DeviceStatus, ReleaseStatus

Reports = Mapping[str, Sequence[DeviceReport]]
REFUSALS = ("gate refused", "gate crashed", "not judged", "rolled back", "rejected")
"""Events whose reason is counted."""
WRONG_CLOCK = timedelta(days=366)
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")


class Version(msgspec.Struct, frozen=True):
    """A model in use, and by how many devices."""

    release: int | None
    """None: it came with the device."""
    bundle_id: str | None
    """None: the device has not said what it runs."""
    step_name: str
    devices: int
    groups: dict[str, int]


class Progress(msgspec.Struct, frozen=True):
    """How a release spread: after so many days of the fleet so many devices had confirmed it."""

    release: int
    step_name: str
    days: tuple[float, ...]
    confirmed: tuple[int, ...]


class Reason(msgspec.Struct, frozen=True):
    """Why devices did not keep a release."""

    event: str
    release: int | None
    text: str
    """Of the first device."""
    devices: tuple[str, ...]


class LostClass(msgspec.Struct, frozen=True):
    """A class that fell below its limit on some devices."""

    name: str
    devices: int
    worst_drop_pct: float
    releases: tuple[int, ...]


class RollBack(msgspec.Struct, frozen=True):
    """One device that went back."""

    device_id: str
    group: str
    release: int | None
    when: datetime | None
    reason: str


class Clock(msgspec.Struct, frozen=True):
    """What the fleet's clocks say (rules 2 and 3)."""

    now: datetime | None
    start: datetime | None
    wrong: int
    """Devices whose newest time was left out."""

    def is_plausible(self, when: datetime | None) -> bool:
        """Whether a time is one of the fleet's."""
        return when is not None and self.now is not None and abs(self.now - when) <= 2 * WRONG_CLOCK


def parse_time(text: str) -> datetime | None:
    """A report's `created` as UTC; None where it is no time, or UTC's year there is before 1 or after 9999."""
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def read_clock(by_device: Reports) -> Clock:
    """Rules 2 and 3."""
    newest = [parse_time(reports[-1].created) for reports in by_device.values() if reports]
    known = [when.timestamp() for when in newest if when is not None]
    if not known:
        return Clock(None, None, len(newest))
    middle = median(known)
    kept = [second for second in known if abs(second - middle) <= WRONG_CLOCK.total_seconds()]
    now = datetime.fromtimestamp(max(kept), UTC)
    clock = Clock(now, None, len(newest) - len(kept))
    times = (parse_time(report.created) for reports in by_device.values() for report in reports)
    start = min((when for when in times if when is not None and clock.is_plausible(when) and when <= now), default=now)
    return msgspec.structs.replace(clock, start=start)


def versions_in_use(devices: Iterable[DeviceStatus]) -> tuple[Version, ...]:
    """Which models run, the most frequent first."""
    found: dict[tuple[int | None, str | None, str], Counter[str]] = defaultdict(Counter)
    for item in devices:
        active = item.active
        key = (active.release, active.bundle_id, active.step_name) if active else (None, None, "not told")
        found[key][item.group] += 1
    counted = [Version(*key, devices=groups.total(), groups=dict(groups)) for key, groups in found.items()]
    return tuple(sorted(counted, key=lambda item: (-item.devices, -(item.release or 0), item.step_name)))


def progress(by_device: Reports, releases: Iterable[ReleaseStatus], clock: Clock) -> tuple[Progress, ...]:
    """How each release was confirmed, device by device, in days since the fleet's first report."""
    firsts: dict[tuple[int, str | None], list[float]] = defaultdict(list)
    for reports in by_device.values():
        seen: set[tuple[int, str | None]] = set()
        for report in reports:
            when = parse_time(report.created)
            key = (report.release or 0, report.bundle_id)
            if report.event != "confirmed" or key in seen or when is None or not clock.is_plausible(when):
                continue
            seen.add(key)
            firsts[key].append(max(0.0, (when - (clock.start or when)).total_seconds() / 86_400))
    found = []
    for item in releases:
        days = tuple(sorted(firsts[item.release, item.bundle_id]))
        if days:
            found.append(Progress(item.release, item.step_name or "", days, tuple(range(1, len(days) + 1))))
    return tuple(found)


def reasons(by_device: Reports) -> tuple[Reason, ...]:
    """Why devices did not keep a release, the most frequent reason first (rules 1 and 4)."""
    devices: dict[tuple[int | None, str], dict[str, None]] = defaultdict(dict)
    first: dict[tuple[int | None, str], tuple[str, str]] = {}
    for device_id, reports in by_device.items():
        for report in reports:
            if report.event in REFUSALS:
                text = report.reason or report.verdict or "no reason was given"
                key = (report.release, NUMBER.sub("#", text))
                devices[key][device_id] = None
                first.setdefault(key, (report.event, text))
    found = [Reason(first[key][0], key[0], first[key][1], tuple(ids)) for key, ids in devices.items()]
    return tuple(sorted(found, key=lambda item: (-len(item.devices), -(item.release or 0), item.text)))


def lost_classes(by_device: Reports) -> tuple[LostClass, ...]:
    """Classes that fell below their limit, by the number of devices."""
    devices: dict[str, set[str]] = defaultdict(set)
    worst: dict[str, float] = {}
    releases: dict[str, set[int]] = defaultdict(set)
    for device_id, reports in by_device.items():
        for report in reports:
            for item in report.forgotten:
                devices[item.name].add(device_id)
                worst[item.name] = max(worst.get(item.name, item.drop_pct), item.drop_pct)
                if report.release is not None:
                    releases[item.name].add(report.release)
    found = [LostClass(name, len(ids), worst[name], tuple(sorted(releases[name]))) for name, ids in devices.items()]
    return tuple(sorted(found, key=lambda item: (-item.devices, -item.worst_drop_pct, item.name)))


def roll_backs(by_device: Reports) -> tuple[RollBack, ...]:
    """Every device that went back from a release, the latest first; times that are none come last."""
    found = [
        RollBack(report.device_id, report.group, report.release, parse_time(report.created), report.reason or "")
        for reports in by_device.values()
        for report in reports
        if report.event == "rolled back"
    ]
    never = datetime.min.replace(tzinfo=UTC)
    return tuple(sorted(found, key=lambda item: (item.when or never, item.device_id), reverse=True))


def machines(by_device: Reports) -> dict[str, str]:
    """What each device is, in a word: its processor, else its instruction set."""
    found = {}
    for device_id, reports in by_device.items():
        told = next((report.machine for report in reversed(reports) if report.machine is not None), None)
        found[device_id] = (told.processor or told.machine or "") if told else ""
    return found
