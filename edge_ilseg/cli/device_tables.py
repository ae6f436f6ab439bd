"""Tables of `edge-ilseg device status`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from edge_ilseg.devices.update.agent_status import DeviceStatus


def status_tables(status: DeviceStatus) -> Iterator[Table]:
    """What is on the device, what was rejected, and what happened last."""
    yield _models(status)
    if status.state.rejected:
        table = Table(title="not taken again")
        for name in ("release", "when", "reason"):
            table.add_column(name)
        for item in status.state.rejected:
            table.add_row(str(item.release), f"{item.when:%Y-%m-%d %H:%M}", Text(item.reason))
        yield table
    if status.events:
        table = Table(title="what happened last", caption=f"{status.reports_waiting} reports are not delivered")
        for name in ("when", "what", "release", "reason"):
            table.add_column(name)
        for event in status.events:
            release = "" if event.release is None else str(event.release)
            table.add_row(event.when[:16].replace("T", " "), event.kind, release, Text(event.reason or ""))
        yield table


def _models(status: DeviceStatus) -> Table:
    caption = [f"updates from {status.repository}", f"nothing below release {status.release_floor} is taken"]
    seen = status.heartbeat
    if seen is not None:
        caption.append(f"the application has seen {seen.frames} frames of {seen.content_id[:12]}")
    table = Table(title=f"{status.device_id}: {status.phase}", caption=Text("\n".join([*caption, *status.notes])))
    for name in ("", "release", "step", "content", "bundle", ""):
        table.add_column(name)
    for model in status.models:
        where = "in use" if model.is_current else "" if model.is_there else "not on the disk"
        release = str(model.release) if model.release else "came with the device"
        bundle = "" if model.bundle_id is None else model.bundle_id[:12]
        table.add_row(model.role, release, Text(model.step_name or "-"), model.content_id[:12], bundle, where)
    return table
