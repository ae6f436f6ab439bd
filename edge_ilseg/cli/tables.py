"""Tables of scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
from rich.console import Console
from rich.table import Table

from edge_ilseg.metrics import Metrics


def percent(value: float | None) -> str:
    """A share 0..1 as per cent with one decimal, or a dash."""
    return "-" if value is None else f"{100 * value:.1f}"


def print_table(table: Table) -> None:
    """To standard output, as wide as it needs to be when that is no terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table)


def class_table(metrics: Metrics, new_classes: Sequence[str], title: str) -> Table:
    """IoU of each class and the means, in per cent."""
    table = Table(title=title, caption="IoU in per cent; void left out; masks compared at the labels' full size")
    table.add_column("class")
    table.add_column("", justify="left")
    table.add_column("IoU", justify="right")
    for name, iou in metrics.iou.items():
        table.add_row(name, "new" if name in new_classes else "", percent(iou))
    table.add_section()
    for label, value in summary_rows(metrics):
        table.add_row(label, "", percent(value))
    return table


def summary_rows(metrics: Metrics) -> tuple[tuple[str, float | None], ...]:
    """The means with the names under which the literature knows them."""
    return (
        ("mIoU old", metrics.miou_old),
        ("mIoU old, without background", metrics.miou_old_without_background),
        ("mIoU new", metrics.miou_new),
        ("mIoU all", metrics.miou_all),
        ("mIoU all, without background", metrics.miou_all_without_background),
        ("mPA (overall pixel accuracy)", metrics.mpa),
        ("mCA (mean class accuracy)", metrics.mca),
        ("hIoU (harmonic mean of old and new)", metrics.hiou),
    )


def as_before(parent: Metrics) -> Metrics:
    """A parent's scores in the words of its child: every class that it knows is an old one, and none is new."""
    return msgspec.structs.replace(
        parent, miou_old=parent.miou_all, miou_old_without_background=parent.miou_all_without_background, miou_new=None
    )


def comparison_table(title: str, rows: Mapping[str, Metrics], *, caption: str | None = None) -> Table:
    """One row a model: mIoU old / new / all, mPA, mCA, in per cent."""
    table = Table(title=title, caption=caption)
    table.add_column("")
    for column in ("old", "new", "all", "mPA", "mCA"):
        table.add_column(column, justify="right")
    for name, metrics in rows.items():
        values = (metrics.miou_old, metrics.miou_new, metrics.miou_all, metrics.mpa, metrics.mca)
        table.add_row(name, *(percent(value) for value in values))
    return table
