"""A made-up fleet: sixty devices, three releases, refusals, roll-backs, wrong clocks and hostile names."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from edge_ilseg.devices.update.reporting import (
    ActiveModel,
    DeviceReport,
    ForgottenClass,
    MachineInShort,
    RetentionNumbers,
    encode_report,
)

START = datetime(2026, 6, 1, 6, 0, tzinfo=UTC)
BUNDLES = {release: f"{release}" * 64 for release in range(4)}
STEPS = {0: "00-base", 1: "01-boat", 2: "02-tv", 3: '03-<script>alert("x")</script>'}
HOSTILE_CLASS = "<img src=x onerror=alert(1)>"
HOSTILE_REASON = "</td></table><script>alert('reason')</script> & \"quotes\""
DEVICES = 60


def write_fleet(folder: Path, devices: int = DEVICES) -> Path:
    """Write the reports of the fleet.

    Of ten devices six confirm every release, one refuses release 2 (it forgot a class), one rolls release 2 back, one
    still tries release 3, and one never gets beyond the factory's model. Device 7 has a clock of 1970,
    device 17 one of 2150.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for place in range(devices):
        for number, item in enumerate(_life(place), start=1):
            (folder / f"{item.device_id}-{number}.json").write_bytes(encode_report(item))
    return folder


def _life(place: int) -> list[DeviceReport]:
    device = f"camera-{place:03}"
    kind = place % 10
    reports: list[DeviceReport] = []
    active = ActiveModel(BUNDLES[0], STEPS[0], None)

    def tell(event: str, release: int, days: float, **others: object) -> None:
        created = (START + timedelta(days=days)).isoformat()
        if place == 7:
            created = "1970-01-01T00:10:00+00:00"
        if place == 17:
            created = "2150-01-01T00:00:00+00:00"
        numbers = RetentionNumbers(
            old_miou_drop_pct=0.2 * kind - 0.5,
            old_miou_drop_interval_pct=(0.2 * kind - 1.5, 0.2 * kind + 0.5),
            new_miou_pct=40.0 + kind,
            latency_p95_ms=30.0 + 3 * place % 70,
            peak_rss_mib=150.0 + place,
        )
        fields = {
            "device_id": device,
            "group": ("harbour", "lab", "<b>quay</b>")[place % 3],
            "sequence": len(reports) + 1,
            "created": created,
            "event": event,
            "release": release,
            "bundle_id": BUNDLES[release],
            "step_name": STEPS[release],
            "active": active,
            "retention": numbers if event.startswith("gate") else None,
            "machine": MachineInShort(machine="aarch64", processor="Cortex-A76 & co", cores=4),
        }
        reports.append(DeviceReport(**{**fields, **others}))  # type: ignore[arg-type]

    for release in (1, 2, 3):
        days = 14.0 * (release - 1) + 0.1 * place
        tell("checked", release, days)
        if kind == 9:
            return reports
        if release == 2 and kind in (6, 7):
            if kind == 6:
                lost = (ForgottenClass(HOSTILE_CLASS, 31.5), ForgottenClass("tree", 6.0 + place / 10))
                reason = f"'tree' lost {6 + place / 10:.1f} points of IoU (limit 5.0)"
                tell("gate refused", release, days + 0.02, verdict="refused", forgotten=lost, reason=reason)
                tell("rejected", release, days + 0.03, reason=reason)
                continue
            tell("gate passed", release, days + 0.02, verdict="passed")
            tell("rolled back", release, days + 0.5, reason=HOSTILE_REASON)
            continue
        tell("gate passed", release, days + 0.02, verdict="passed")
        active = ActiveModel(BUNDLES[release], STEPS[release], release)
        tell("activated", release, days + 0.03)
        if not (release == 3 and kind == 8):
            tell("confirmed", release, days + 0.2)
    return reports
