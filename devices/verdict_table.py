"""A verification on one screen: checks, what is in the way, classes. Makes rich renderables; prints nothing.

1. On a console of 100 columns or more it takes 50 lines at most, whatever the number of classes: of the classes those
   that lost most are shown and the others counted. All of them are in the JSON.
2. A check takes one line; what did not pass is told in full below, the gravest first, as far as there is room.
3. Values from outside (names, paths) are shown as they are, never as markup.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from edge_ilseg.devices.class_scores import mean_iou
from edge_ilseg.devices.unlabelled import Unlabelled, UnlabelledClass
from edge_ilseg.devices.verify_report import GRAVITY, Check, ClassScore, Scores, VerifyReport
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
CONVENTION = "IoU in per cent, void left out; old classes over old pixels, new ones and `all` over every pixel"
MORE = "--json or --out"
NOTE_LINES = 7
"""Of all notes together (rule 2)."""


class Rows(NamedTuple):
    """How many classes are shown at most (rule 1): old and new ones of labelled images, and those of the others."""

    old: int
    new: int
    unlabelled: int


ALONE, TOGETHER = Rows(8, 5, 12), Rows(4, 3, 4)


class Notes:
    """What was found of the checks that did not pass, within `NOTE_LINES` lines of the console."""

    def __init__(self, checks: Sequence[Check]) -> None:
        found = [check for check in checks if check.exit_code]
        self._checks = sorted(found, key=lambda check: -GRAVITY.index(check.exit_code))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        left = NOTE_LINES
        for place, check in enumerate(self._checks):
            text = Text(f"{check.name}: ", VERDICT_STYLE[check.verdict]).append(check.detail, "default")
            lines = text.wrap(console, options.max_width)
            rest = len(self._checks) - place - 1
            if len(lines) > left - bool(rest):
                yield from lines[: left - 1]
                yield Text(f"and {rest} more: {MORE}" if rest else f"and more: {MORE}", style="dim")
                return
            yield from lines
            left -= len(lines)


def verdict_table(report: VerifyReport) -> RenderableType:
    """The whole report for a terminal (rules 1 to 3)."""
    parts: list[RenderableType] = [_subject(report), _checks(report.checks), Notes(report.checks)]
    rows = ALONE if report.scores is None or report.unlabelled is None else TOGETHER
    if report.scores:
        parts += [_classes(report.scores, rows), Text(CONVENTION, style="dim", no_wrap=True, overflow="ellipsis")]
    if report.unlabelled:
        parts.append(_unlabelled(report.unlabelled, rows))
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


def _table() -> Table:
    return Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)


def _checks(checks: tuple[Check, ...]) -> Group:
    """One line a check; the detail alone gives way on a narrow console, which no table of rich promises."""
    rows = [
        (
            check.name,
            check.verdict,
            _number(check.value, check.unit),
            _number(check.limit, check.unit).removesuffix(check.unit).rstrip()
            if check.value is not None
            else _number(check.limit, check.unit),
            _one_line(check.detail),
        )
        for check in checks
    ]
    head = ("check", "verdict", "value", "limit", "detail")
    width = [max(len(row[column]) for row in (head, *rows)) for column in range(4)]
    found = (_line(row, width, VERDICT_STYLE[row[1]]) for row in rows)
    return Group(_line(head, width, "bold"), Rule(style="default"), *found)


def _line(row: Sequence[str], width: Sequence[int], style: str) -> Text:
    name, verdict, value, limit, detail = row
    line = Text(f"{name:<{width[0]}}  ", no_wrap=True, overflow="ellipsis", end="\n")
    line.append(f"{verdict:<{width[1]}}", style)
    return line.append(f"  {value:>{width[2]}}  {limit:>{width[3]}}  {detail}")


def _classes(scores: Scores, rows: Rows) -> Table:
    old = sorted((item for item in scores.classes if item.is_old), key=_forgotten_first)
    table = _table()
    table.add_column("class", no_wrap=True, overflow="ellipsis")
    table.add_column("", no_wrap=True)
    for column in ("before", "here", "change"):
        table.add_column(column, justify="right", no_wrap=True)
    for item in old[: rows.old]:
        table.add_row(Text(item.name), "old", _percent(item.parent_iou), _percent(item.iou), _change(item.drop_pct))
    if old:
        before, here = scores.parent_miou_old, scores.miou_old
        drop_pct = None if before is None or here is None else 100 * (before - here)
        table.add_row("mIoU", "old", _percent(before), _percent(here), _change(drop_pct))
    new = [item for item in scores.classes if not item.is_old]
    weakest = sorted(new, key=lambda item: 2.0 if item.iou is None else item.iou)[: rows.new]
    for item in new:
        if item in weakest:
            table.add_row(Text(item.name), "new", "", _percent(item.iou), "")
    table.add_row("mIoU", "new", "", _percent(mean_iou([item.iou for item in new])), "")
    table.add_row("mIoU", "all", "", _percent(scores.metrics.miou_all), "")
    hidden = len(old[rows.old :]) + len(new[rows.new :])
    if hidden:
        table.caption, table.caption_justify = f"and {hidden} more: {MORE}", "left"
    return table


def _unlabelled(found: Unlabelled, rows: Rows) -> Table:
    """Each old class on images without labels, the one of which least was kept first."""
    table = _table()
    table.add_column("class, without labels", no_wrap=True, overflow="ellipsis")
    for column in ("parent's pixels", "agreement", "where confident", "moved", "kept"):
        table.add_column(column, justify="right", no_wrap=True)
    for item in sorted(found.classes, key=_least_kept_first)[: rows.unlabelled]:
        shares = (item.agreement, item.confident_agreement, item.moved, item.kept)
        table.add_row(Text(item.name), str(item.parent_pixels), *(_percent(share) for share in shares))
    hidden = len(found.classes[rows.unlabelled :])
    if hidden:
        table.caption, table.caption_justify = f"and {hidden} more: {MORE}", "left"
    return table


def _outcome(report: VerifyReport) -> Text:
    code = report.exit_code
    style = VERDICT_STYLE["too few images" if code == EXIT_UNDECIDED else "failed" if code else "passed"]
    text = Text(OUTCOME[report.exit_code], style=style, no_wrap=True, overflow="ellipsis")
    if not report.is_retention_checked:
        unchecked = f": {_one_line(report.check('old mIoU drop').detail)}"
    elif report.scores and report.scores.unmeasured_old:
        unchecked = f" for: {', '.join(report.scores.unmeasured_old)} (in none of the images)"
    else:
        return text
    return text.append(f"\nretention was NOT checked{unchecked}", VERDICT_STYLE["not checked"])


def _forgotten_first(item: ClassScore) -> float:
    return float("inf") if item.drop_pct is None else -item.drop_pct


def _least_kept_first(item: UnlabelledClass) -> tuple[float, float]:
    return (2.0 if item.kept is None else item.kept, 2.0 if item.agreement is None else item.agreement)


def _number(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:.{DECIMALS.get(unit, 2)}f} {unit}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _change(drop_pct: float | None) -> Text:
    if drop_pct is None:
        return Text("-")
    change = round(-drop_pct, 1) + 0.0  # never "-0.0"
    return Text(f"{change:+.1f}" if change else "0.0", style="red" if change < 0 else "")
