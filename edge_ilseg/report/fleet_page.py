"""The page of a fleet: what runs where, how releases fare, what was refused and why, and who has been silent.

1. Everything comes from the reports, which nobody has signed: the page says so.
2. Charts and tables have room for so many rows (`MOST_BARS`, `MOST_ROWS`); what is left out is counted, never silent.
3. The same reports give the same page.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from statistics import median
from typing import TypeVar

from edge_ilseg.fleet import Collected, DeviceStatus, FleetStatus, fleet_status
from edge_ilseg.report import charts, fleet_numbers
from edge_ilseg.report.blocks import Beside, Block, Figure, Folded, Heading, Missing, Note, Section, Table, Tile
from edge_ilseg.report.fleet_numbers import Clock, Version
from edge_ilseg.report.page import DASH, interval, number, points, render, short_id

TEMPLATE = "report.html.j2"
MOST_BARS, MOST_CURVES, MOST_OPEN, MOST_ROWS, MOST_LISTED = 15, 6, 20, 500, 5
SILENT_DAYS = 7
FACTORY = "factory"

T = TypeVar("T")


def fleet_page(collected: Collected, name: str) -> str:
    """The page of the fleet that sent these reports.

    Args:
        collected: the reports.
        name: of the folder that they are in.

    Raises:
        MissingPackageError: the extra `report` is not installed.
    """
    status = fleet_status(collected)
    clock = fleet_numbers.read_clock(collected.by_device)
    sections = [
        _versions(status),
        _rollout(collected, status, clock),
        _refusals(collected),
        _roll_backs(collected),
        _measured(collected, status),
        _devices(status, clock),
        *([_damaged(status)] if status.damaged_count else []),
    ]
    return render(
        TEMPLATE,
        title=f"{_count(len(status.devices), 'device')}",
        eyebrow=f"edge-ilseg fleet, reports in {name}",
        summary=_summary(status, clock),
        banner=None,
        tiles=_tiles(status, clock),
        sections=sections,
        contents=[(section.anchor, section.title) for section in sections],
    )


def _summary(status: FleetStatus, clock: Clock) -> str:
    when = f"as of {_time(clock.now)} by the devices' clocks" if clock.now else "without a time that can be read"
    wrong = f" {_count(clock.wrong, 'device')} with a clock that is off or no time at all." if clock.wrong else ""
    return (
        f"{_count(status.reports, 'report')}, {when}.{wrong} Reports are not signed: whoever can write into their "
        "folder can make one up."
    )


def _tiles(status: FleetStatus, clock: Clock) -> list[Tile]:
    newest = next((item for item in status.releases if item.confirmed or item.trying), None)
    tiles = [Tile("devices", str(len(status.devices)), f"{len({item.group for item in status.devices})} groups")]
    if newest is not None:
        aside = f"of {newest.chosen} that take release {newest.release}"
        tiles.append(Tile("newest release confirmed", str(newest.confirmed), aside))
    tiles.append(Tile("refused", str(sum(item.refused for item in status.releases)), "by the device's own gate"))
    tiles.append(Tile("rolled back", str(sum(item.rolled_back for item in status.releases)), "after a trial"))
    silent = [item for item in status.devices if (_silent_days(item, clock) or 0.0) >= SILENT_DAYS]
    tiles.append(Tile("silent", str(len(silent)), f"for {SILENT_DAYS} days or more"))
    if status.damaged_count:
        tiles.append(Tile("no reports", str(status.damaged_count), "files that are none"))
    return tiles


def _versions(status: FleetStatus) -> Section:
    found = fleet_numbers.versions_in_use(status.devices)
    blocks: list[Block] = [Missing("No device has sent a report.")]
    if found:
        total = len(status.devices)
        shown, note = _first(found, MOST_BARS, "models")
        bars = [
            charts.Bar(_version(item), item.devices, text=f"{item.devices} ({100 * item.devices / total:.0f} %)")
            for item in shown
        ]
        alt = f"Devices by the model that they run: {_said((_version(item), item.devices) for item in shown)}."
        sizes: Counter[str] = Counter()
        for item in found:
            sizes.update(item.groups)
        groups, note_of_groups = _first([group for group, _ in sizes.most_common()], MOST_LISTED, "groups")
        rows = [
            (
                _version(item), item.step_name, short_id(item.bundle_id), str(item.devices),
                *(str(item.groups.get(group, 0)) for group in groups),
            )
            for item in found[:MOST_ROWS]
        ]  # fmt: skip
        head = ("model", "step", "bundle", "devices", *(group or "no group" for group in groups))
        blocks = [
            Figure(charts.bars(bars, "versions", alt, unit="devices"), "Devices by the model that they run."),
            *note,
            Table("Models in use, and in which groups", head, rows, numeric=3),
            *note_of_groups,
        ]
    return Section(
        "versions", "Models in use", f"What each device said last that it runs; {FACTORY}: what it came with.", blocks
    )


def _rollout(collected: Collected, status: FleetStatus, clock: Clock) -> Section:
    if not status.releases:
        return Section("rollout", "Roll-out", "", [Missing("No report is about a release.")])
    shown, note = _first(status.releases, MOST_BARS, "releases")
    bars = [
        charts.Bar(_release(item.release, item.step_name), item.confirmed, item.chosen - item.confirmed,
                   text=f"{item.confirmed} of {item.chosen}")
        for item in shown
    ]  # fmt: skip
    alt = "Devices that confirmed each release, of those that take it: " + _said(
        (_release(item.release, item.step_name), f"{item.confirmed} of {item.chosen}") for item in shown
    )
    picture = charts.bars(bars, "rollout", f"{alt}.", unit="devices", words=("confirmed", "others that take it"))
    rows, marks = [], []
    for item in status.releases[:MOST_ROWS]:
        counts = (item.chosen, item.trying, item.confirmed, item.rolled_back, item.refused)
        failed = DASH if item.failed_pct is None else f"{item.failed_pct:.1f}"
        rows.append((_release(item.release, item.step_name), short_id(item.bundle_id), *map(str, counts), failed))
        marks.append("failed" if item.failed_pct else "")
    head = ("release", "bundle", "take it", "on trial", "confirmed", "rolled back", "refused", "failed, %")
    blocks: list[Block] = [
        Beside(
            [
                Figure(picture, "Devices that take a release, and those that have confirmed it."),
                *_spread(collected, status, clock),
            ]
        ),
        *note,
        Table("Releases, devices each counted once; failed: of those that have tried it", head, rows, marks, numeric=2),
    ]
    return Section("rollout", "Roll-out", "How far each release has come.", blocks)


def _spread(collected: Collected, status: FleetStatus, clock: Clock) -> list[Block]:
    """Confirmations over time, of the newest releases that have two or more."""
    found = [
        item for item in fleet_numbers.progress(collected.by_device, status.releases, clock) if len(item.days) > 1
    ][:MOST_CURVES]
    if not found:
        return []
    lines = [charts.Curve(_release(item.release, item.step_name), item.days, item.confirmed) for item in found]
    alt = "Devices that confirmed a release, over the days: " + _said(
        (_release(item.release, item.step_name), f"{item.confirmed[-1]} after {item.days[-1]:.1f} days")
        for item in found
    )
    picture = charts.curves(
        lines, "spread", f"{alt}.", x_title="days since the first report", y_title="devices confirmed"
    )
    return [Figure(picture, "Confirmations over time, by the devices' own clocks.")]


def _refusals(collected: Collected) -> Section:
    reasons, lost = fleet_numbers.reasons(collected.by_device), fleet_numbers.lost_classes(collected.by_device)
    if not reasons and not lost:
        return Section("refusals", "Refusals", "", [Missing("No device has refused a release, or gone back.")])
    blocks: list[Block] = []
    if lost:
        shown, note = _first(lost, MOST_BARS, "classes")
        bars = [charts.Bar(item.name, item.devices, text=str(item.devices), ink="lost") for item in shown]
        alt = f"Devices on which a class fell below its limit: {_said((item.name, item.devices) for item in shown)}."
        rows = [
            (item.name, str(item.devices), f"{item.worst_drop_pct:.1f}", ", ".join(map(str, item.releases)) or DASH)
            for item in lost[:MOST_ROWS]
        ]
        blocks += [
            Heading("Forgotten classes"),
            Beside(
                [
                    Figure(
                        charts.bars(bars, "lost", alt, unit="devices"), "Devices on which a class fell below its limit."
                    ),
                    Table("By class", ("class", "devices", "worst drop, points", "releases"), rows),
                ]
            ),
            *note,
        ]
    if reasons:
        why = [
            (
                item.text, item.event, DASH if item.release is None else str(item.release), str(len(item.devices)),
                _listed(item.devices),
            )
            for item in reasons[:MOST_ROWS]
        ]  # fmt: skip
        blocks += [
            Heading("Reasons"),
            Table(
                "By reason; what differs in numbers alone is one",
                ("reason", "event", "release", "devices", "which"),
                why,
                numeric=9,
            ),
        ]
    lead = "Why devices did not keep a release: refused at the gate, rolled back, or given up."
    return Section("refusals", "Refusals", lead, blocks)


def _roll_backs(collected: Collected) -> Section:
    found = fleet_numbers.roll_backs(collected.by_device)
    if not found:
        return Section("rollbacks", "Roll-backs", "", [Missing("No device has gone back to the model before.")])
    shown, note = _first(found, MOST_ROWS, "roll-backs")
    rows = [
        (
            item.device_id,
            item.group or DASH,
            DASH if item.release is None else str(item.release),
            _time(item.when),
            item.reason or DASH,
        )
        for item in shown
    ]
    table = Table("Roll-backs, the latest first", ("device", "group", "release", "when", "reason"), rows, numeric=9)
    return Section("rollbacks", "Roll-backs", "Devices that went back to the model before.", [table, *note])


def _measured(collected: Collected, status: FleetStatus) -> Section:
    """What the gates measured last: latency, memory, and what the old classes lost."""
    found = [item for item in status.devices if item.retention is not None]
    if not found:
        return Section("measured", "Latency and memory", "", [Missing("No gate has reported a measurement.")])
    kinds = fleet_numbers.machines(collected.by_device)
    pictures: list[Block] = []
    for title, unit, prefix, value_of in (
        ("Latency", "ms, 95th percentile", "latency", lambda item: item.retention.latency_p95_ms),
        ("Peak memory", "MiB", "memory", lambda item: item.retention.peak_rss_mib),
    ):
        pictures += _highest(found, value_of, title, unit, prefix)
    rows = []
    for item in sorted(found, key=lambda item: item.device_id)[:MOST_ROWS]:
        numbers = item.retention
        if numbers is None:
            continue
        low, high = numbers.old_miou_drop_interval_pct or (None, None)
        rows.append(
            (
                item.device_id, kinds.get(item.device_id) or DASH,
                number(numbers.latency_p95_ms), number(numbers.peak_rss_mib),
                points(None if numbers.old_miou_drop_pct is None else -numbers.old_miou_drop_pct), interval(low, high),
                number(numbers.new_miou_pct), item.verdict or DASH,
            )
        )  # fmt: skip
    head = ("device", "processor", "p95, ms", "peak, MiB", "old mIoU, points", "drop, 95 %", "new mIoU, %", "verdict")
    table = Table("What each device measured last", head, rows, numeric=2)
    blocks: list[Block] = [Beside(pictures), Folded(f"All {_count(len(found), 'device')} as a table", [table])]
    lead = "Measured on the devices themselves, by the gate, before a model went on trial."
    return Section("measured", "Latency and memory", lead, blocks)


def _highest(
    devices: Sequence[DeviceStatus],
    value_of: Callable[[DeviceStatus], float | None],
    title: str,
    unit: str,
    prefix: str,
) -> list[Block]:
    known = [(item.device_id, value) for item in devices if (value := value_of(item)) is not None]
    known.sort(key=lambda pair: (-pair[1], pair[0]))
    if not known:
        return []
    shown = known[:MOST_BARS]
    middle = median(value for _, value in known)
    bars = [charts.Bar(name, value, text=number(value)) for name, value in shown]
    said = _said((name, number(value)) for name, value in shown)
    alt = f"{title} of {_count(len(known), 'device')} in {unit}, the highest first: {said}."
    caption = (
        f"{title}, the highest first; median {number(middle)}, highest {number(known[0][1])} {unit.split(',')[0]}."
    )
    if len(known) > MOST_BARS:
        caption += f" The first {MOST_BARS} of {len(known)}; the table has them all."
    return [Figure(charts.bars(bars, prefix, alt, unit=unit), caption)]


def _devices(status: FleetStatus, clock: Clock) -> Section:
    if not status.devices:
        return Section("devices", "Devices", "", [Missing("No device has sent a report.")])
    silent = {item.device_id: _silent_days(item, clock) for item in status.devices}
    longest = sorted(status.devices, key=lambda item: (-_or_forever(silent[item.device_id]), item.device_id))
    shown, note = _first(longest, MOST_ROWS, "devices")
    rows, marks = [], []
    for item in shown:
        days, active = silent[item.device_id], item.active
        rows.append(
            (
                item.device_id, item.group or DASH, _time(fleet_numbers.parse_time(item.last_seen)),
                "clock is off" if days is None else f"{days:.1f}\u00a0days",
                active.step_name if active else DASH,
                DASH if active is None or active.release is None else str(active.release),
                item.event if item.release is None else f"{item.event} ({item.release})", item.verdict or DASH,
            )
        )  # fmt: skip
        marks.append("lost" if days is None or days >= SILENT_DAYS else "")
    head = ("device", "group", "last seen", "silent for", "step", "release", "last event", "verdict")

    def table(caption: str, start: int, end: int) -> Table:
        return Table(caption, head, rows[start:end], marks[start:end], numeric=9)

    blocks: list[Block] = [table("Devices, the longest silent first", 0, MOST_OPEN)]
    if left := len(rows) - MOST_OPEN if len(rows) > MOST_OPEN else 0:
        others = table("Devices that were seen later", MOST_OPEN, MOST_ROWS)
        blocks.append(Folded(f"{_count(left, 'device')} more, seen later than these", [others]))
    lead = f"The longest silent first; marked: silent for {SILENT_DAYS} days or more, or with a clock that is off."
    return Section("devices", "Last seen", lead, [*blocks, *note])


def _damaged(status: FleetStatus) -> Section:
    rows = [(item.file, item.reason) for item in status.damaged]
    left = status.damaged_count - len(rows)
    blocks: list[Block] = [Table("Files that are no reports", ("file", "why"), rows, numeric=9)]
    blocks += [Note(f"{left} more are not listed.")] if left else []
    return Section("damaged", "No reports", "Files in the folder that were left out.", blocks)


def _first(items: Sequence[T], most: int, what: str) -> tuple[Sequence[T], list[Block]]:
    """The first of many, and the remark that the others are left out (rule 2)."""
    left = len(items) - most
    return items[:most], [Note(f"The first {most} of {len(items)} {what} are shown.")] if left > 0 else []


def _silent_days(item: DeviceStatus, clock: Clock) -> float | None:
    """Days before the fleet's "now"; None where the clock is off."""
    when = fleet_numbers.parse_time(item.last_seen)
    if when is None or clock.now is None or not clock.is_plausible(when):
        return None
    return max(0.0, (clock.now - when).total_seconds() / 86_400)


def _or_forever(days: float | None) -> float:
    return math.inf if days is None else days


def _version(item: Version) -> str:
    if item.bundle_id is None:
        return item.step_name
    return f"{FACTORY}: {item.step_name}" if item.release is None else _release(item.release, item.step_name)


def _release(release: int, step_name: str | None) -> str:
    return f"{release}: {step_name}" if step_name else str(release)


def _said(pairs: Iterable[tuple[str, object]]) -> str:
    items = [f"{name} {value}" for name, value in pairs]
    return ", ".join(items) or "none"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - MOST_LISTED
    return ", ".join(names[:MOST_LISTED]) + (f" and {more} more" if more > 0 else "")


def _count(count: int, word: str) -> str:
    return f"{count} {word}" + ("" if count == 1 else "s")


def _time(when: datetime | None) -> str:
    return f"{when:%Y-%m-%d %H:%M}\u00a0UTC".replace(" ", "\u00a0") if when else "no time"
