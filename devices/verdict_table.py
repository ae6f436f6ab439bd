"""A verification on one screen: the checks first, then the classes. Makes rich renderables; prints nothing."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edge_ilseg.devices.class_scores import mean_iou
from edge_ilseg.devices.verify_report import Check, ClassScore, Scores, VerifyReport
from edge_ilseg.errors import EXIT_ARTEFACT, EXIT_PARITY, EXIT_PASSED, EXIT_RETENTION, EXIT_UNDECIDED

VERDICT_STYLE = {"passed": "green", "failed": "bold red", "too few images": "bold yellow", "not checked": "yellow"}
OUTCOME = {
    EXIT_PASSED: "passed",
    EXIT_RETENTION: "failed: the model forgot too much, or breaks another limit",
    EXIT_UNDECIDED: "undecided: the images are too few to tell whether the model forgot too much",
    EXIT_PARITY: "failed: the model does not compute here what it computed at the export",
    EXIT_ARTEFACT: "failed: the bundle, the images or this device cannot be used as they are",
}
DECIMALS = {"of pixels": 4, "bad": 0}
CONVENTION = (
    "IoU in per cent, void left out, masks compared at the labels' full size; "
    "old classes over the pixels that truly are of an old class, new ones and `all` over every pixel"
)


def verdict_table(report: VerifyReport) -> RenderableType:
    """The whole report for a terminal. Values from outside (names, paths) are shown as they are, never as markup."""
    parts: list[RenderableType] = [_subject(report), _checks(report.checks)]
    if report.scores:
        parts += [_classes(report.scores), Text(CONVENTION, style="dim")]
    parts.append(_outcome(report))
    return Group(*parts)


def _subject(report: VerifyReport) -> Text:
    lines = [f"bundle {report.bundle.folder}"]
    if report.bundle.step_name is not None:
        lines[0] += f" (step {report.bundle.step_name})"
    if report.parent:
        lines.append(f"parent {report.parent.folder} (step {report.parent.step_name})")
    device = report.device
    lines.append(
        f"device {device.processor or 'unknown processor'}, {device.cores or '?'} cores"
        f"{', ' + ' '.join(device.int8_flags) if device.int8_flags else ''}"
        f"{f', load {device.load_average[0]:.2f}' if device.load_average else ''}"
        f"{f', {device.governor}' if device.governor else ''}"
    )
    return Text("\n".join(lines))


def _checks(checks: tuple[Check, ...]) -> Table:
    table = Table()
    table.add_column("check", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("limit", justify="right", no_wrap=True)
    table.add_column("detail", overflow="fold")
    for check in checks:
        verdict = Text(check.verdict, style=VERDICT_STYLE[check.verdict])
        limit = _number(check.limit, check.unit)
        table.add_row(check.name, verdict, _number(check.value, check.unit), limit, Text(check.detail))
    return table


def _classes(scores: Scores) -> Table:
    old = sorted((item for item in scores.classes if item.is_old), key=_forgotten_first)
    table = Table()
    table.add_column("class")
    table.add_column("", no_wrap=True)
    for column in ("before", "here", "change"):
        table.add_column(column, justify="right", no_wrap=True)
    for item in old:
        table.add_row(Text(item.name), "old", _percent(item.parent_iou), _percent(item.iou), _change(item.drop_pct))
    if old:
        before, here = scores.parent_miou_old, scores.miou_old
        drop_pct = None if before is None or here is None else 100 * (before - here)
        table.add_section()
        table.add_row("mIoU", "old", _percent(before), _percent(here), _change(drop_pct), end_section=True)
    new = [item for item in scores.classes if not item.is_old]
    for item in new:
        table.add_row(Text(item.name), "new", "", _percent(item.iou), "")
    table.add_section()
    table.add_row("mIoU", "new", "", _percent(mean_iou([item.iou for item in new])), "")
    table.add_row("mIoU", "all", "", _percent(scores.metrics.miou_all), "")
    return table


def _outcome(report: VerifyReport) -> Text:
    code = report.exit_code
    style = VERDICT_STYLE["too few images" if code == EXIT_UNDECIDED else "failed" if code else "passed"]
    text = Text(OUTCOME[report.exit_code], style=style)
    if not report.is_retention_checked:
        unchecked = f": {report.check('old mIoU drop').detail}"
    elif report.scores and report.scores.unmeasured_old:
        unchecked = f" for: {', '.join(report.scores.unmeasured_old)} (in none of the images)"
    else:
        return text
    return text.append(f"\nretention was NOT checked{unchecked}", VERDICT_STYLE["not checked"])


def _forgotten_first(item: ClassScore) -> float:
    return float("inf") if item.drop_pct is None else -item.drop_pct


def _number(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:.{DECIMALS.get(unit, 2)}f} {unit}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _change(drop_pct: float | None) -> Text:
    if drop_pct is None:
        return Text("-")
    change = round(-drop_pct, 1) + 0.0  # never "-0.0"
    return Text(f"{change:+.1f}" if change else "0.0", style="red" if change < 0 else "")
