"""Several devices beside each other: one row a device. Makes rich renderables; prints nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edge_ilseg.devices.remote import Outcome
from edge_ilseg.devices.verdict_table import VERDICT_STYLE
from edge_ilseg.devices.verify_report import GRAVITY, CheckName, VerifyReport, encode_report
from edge_ilseg.errors import EXIT_PASSED, EXIT_UNDECIDED

COLUMNS: dict[str, CheckName] = {
    "old drop\npoints": "old mIoU drop",
    "new mIoU\n%": "new mIoU",
    "latency\np95 ms": "latency p95",
}
"""Title -> the check whose value it shows."""


def gravest(codes: Iterable[int]) -> int:
    """The exit code of several devices: that of the one where most is wrong."""
    return max(codes, key=GRAVITY.index)


def device_table(outcomes: Sequence[Outcome]) -> RenderableType:
    """One row a device, and below what is wrong. What comes from a device is shown as it is, never as markup."""
    table = Table()
    table.add_column("device", overflow="fold")
    table.add_column("processor", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    for column in (*COLUMNS, "exit\ncode"):
        table.add_column(column, justify="right", no_wrap=True)
    below: list[RenderableType] = []
    for outcome in outcomes:
        verdict, report = _verdict(outcome), outcome.report
        style = VERDICT_STYLE.get(verdict, VERDICT_STYLE["failed"])
        table.add_row(
            Text(str(outcome.device)),
            Text(report.device.processor or "unknown" if report else "-"),
            Text(verdict, style=style),
            *(_value(report, name) for name in COLUMNS.values()),
            str(outcome.exit_code),
        )
        below += [Text(f"{outcome.device}: {reason}") for reason in _reasons(outcome)]
    return Group(table, *below)


def encode_outcomes(outcomes: Sequence[Outcome]) -> bytes:
    """Every device with its report, or with the reason why there is none, as JSON."""
    devices = [
        {
            "device": str(outcome.device),
            "exit_code": outcome.exit_code,
            "error": None if outcome.error is None else str(outcome.error),
            "report": None if outcome.report is None else msgspec.Raw(encode_report(outcome.report)),
        }
        for outcome in outcomes
    ]
    body = {
        "format": "edge-ilseg-device-reports",
        "format_version": 1,
        "exit_code": gravest(outcome.exit_code for outcome in outcomes),
        "devices": devices,
    }
    return msgspec.json.format(msgspec.json.encode(body), indent=2)


def _verdict(outcome: Outcome) -> str:
    if outcome.report is None:
        return "no verdict"
    return {EXIT_PASSED: "passed", EXIT_UNDECIDED: "too few images"}.get(outcome.exit_code, "failed")


def _value(report: VerifyReport | None, name: CheckName) -> str:
    value = report.check(name).value if report else None
    return "-" if value is None else f"{value:.2f}"


def _reasons(outcome: Outcome) -> list[str]:
    if outcome.report is None:
        return [outcome.error.one_line()] if outcome.error else []
    return [f"{check.name}: {check.detail}" for check in outcome.report.checks if check.exit_code]
