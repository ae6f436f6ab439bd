"""The sections on what a step learned and forgot: lineage, classes, matrix, confusion, training. Pure.

A drop of more than `LOST_POINTS` marks a class as forgotten, in words and in the chart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edge_ilseg.checkpoint import StepRecord
from edge_ilseg.metrics import Metrics, class_iou, retention_confusion
from edge_ilseg.report import charts
from edge_ilseg.report.blocks import (
    Beside,
    Block,
    Chain,
    Figure,
    Folded,
    Link,
    Missing,
    Note,
    Section,
    Table,
    Tile,
)
from edge_ilseg.report.gather import Gathered, StepFacts
from edge_ilseg.report.page import DASH, count, percent, points
from edge_ilseg.report.scoring import Role, Scoring
from edge_ilseg.report.training_curves import Column

LOST_POINTS = 2.0
"""Points of IoU; as many as `verify` allows the mean of the old classes."""
MOST_PAIRS = 12
MOST_NARROW = 11
"""Columns of a heat map that stands beside its table."""


def scores_of(gathered: Gathered, facts: StepFacts) -> Metrics | None:
    """A step's scores on the evaluation split."""
    return facts.record.metrics.get(gathered.split)


def before_and_after(gathered: Gathered) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """IoU of each class, the parent's and the step's, on the same images; empty where they were not scored."""
    record = gathered.step.record
    before = record.parent_metrics.get(gathered.split)
    after = record.metrics.get(gathered.split)
    return (before.iou if before else {}), (after.iou if after else {})


def drop_points(before: float | None, after: float | None) -> float | None:
    """Points that a class lost; negative for a gain."""
    return None if before is None or after is None else 100 * (before - after)


def tiles(gathered: Gathered) -> list[Tile]:
    """The numbers that are seen first."""
    record = gathered.step.record
    after, before = record.metrics.get(gathered.split), record.parent_metrics.get(gathered.split)
    found = []
    if after is not None and record.old_count:
        old_before = before.miou_all if before else None
        drop = drop_points(old_before, after.miou_old)
        aside = f"before {percent(old_before)}, {points(None if drop is None else -drop)} points"
        found += [
            Tile("Old classes, mIoU", percent(after.miou_old), aside if old_before is not None else "before unknown"),
            Tile("New classes, mIoU", percent(after.miou_new), ", ".join(record.new_classes)),
        ]
    worst = most_forgotten(gathered)
    if worst is not None:
        found.append(Tile("Most forgotten", points(-worst[1]), f"{worst[0]}, points of IoU"))
    if after is not None:
        found.append(
            Tile("All classes, mIoU", percent(after.miou_all), f"{count(after.images)} images of {gathered.split}")
        )
    return found


def most_forgotten(gathered: Gathered) -> tuple[str, float] | None:
    """The old class that lost most, and how many points; None where nothing was lost, or nothing is known."""
    record = gathered.step.record
    before, after = before_and_after(gathered)
    drops = {
        name: drop
        for name in record.class_names[: record.old_count]
        if (drop := drop_points(before.get(name), after.get(name))) is not None
    }
    worst = max(drops, key=lambda name: drops[name], default=None)
    return None if worst is None or drops[worst] <= 0 else (worst, drops[worst])


def lineage_section(gathered: Gathered) -> Section:
    """Which steps led here."""
    links, rows = [], []
    for facts in gathered.lineage:
        record, scores = facts.record, scores_of(gathered, facts)
        method = record.method.name if record.method else "from scratch" if record.index == 0 else ""
        added = ", ".join(record.new_classes)
        links.append(
            Link(
                record.name,
                f"{len(record.classes)} classes" if record.index == 0 else f"+ {added}",
                method,
                f"mIoU {percent(scores.miou_all)}" if scores else "not scored",
                facts is gathered.step,
            )
        )
        rows.append(
            (
                record.name, method, added, count(len(record.data.image_ids)), count(record.training.iterations),
                f"{record.training_seconds:.0f}",
                *_means(scores),
            )
        )  # fmt: skip
    head = ("step", "method", "classes added", "images", "iterations", "seconds", "mIoU old", "new", "all")
    blocks: list[Block] = [Chain(links)]
    if "lineage" in gathered.missing:
        blocks.append(Missing(gathered.missing["lineage"]))
    caption = f"Steps, and mIoU in per cent on {gathered.split}; background included" if gathered.split else "Steps"
    blocks.append(Table(caption, head, rows, numeric=3))
    if gathered.others:
        names = ", ".join(
            f"{other.name} (from {other.parent_name})" if other.parent_name else other.name for other in gathered.others
        )
        blocks.append(Note(f"Other steps of this workspace: {names}."))
    return Section("lineage", "Lineage", "", blocks)


def _means(scores: Metrics | None) -> tuple[str, ...]:
    if scores is None:
        return (DASH,) * 3
    return tuple(percent(value) for value in (scores.miou_old, scores.miou_new, scores.miou_all))


def classes_section(gathered: Gathered) -> Section:
    """IoU of each class before and after, the forgotten ones marked."""
    record = gathered.step.record
    before, after = before_and_after(gathered)
    title = "Classes, before and after" if record.old_count else "Classes"
    if not after:
        text = "The step was scored on no images: its workspace has no evaluation split"
        return Section("classes", title, "", [Missing(f"{text}, or had none when it was trained.")])
    rows: list[tuple[str, ...]] = []
    marks, pairs = [], []
    for item in record.classes:
        is_new = item.step == record.index and record.old_count > 0
        drop = None if is_new else drop_points(before.get(item.name), after.get(item.name))
        is_lost = drop is not None and drop > LOST_POINTS
        word = "new" if is_new else "forgotten" if is_lost else ""
        one, two = (None if is_new else before.get(item.name)), after.get(item.name)
        rows.append((item.name, percent(one), percent(two), points(None if drop is None else -drop), word))
        marks.append("lost" if is_lost else "")
        pairs.append(charts.Pair(item.name, hundred(one), hundred(two), is_lost))
    lost = [row[0] for row, mark in zip(rows, marks, strict=True) if mark]
    lead = _classes_lead(record, lost, any(value is not None for value in before.values()))
    alt = f"IoU of {len(pairs)} classes before and after. Forgotten: {', '.join(lost) or 'none'}."
    caption = f"IoU in per cent on {gathered.split}. Ring: the parent; disc: this step."
    head: tuple[str, ...] = ("class", "before", "after", "change", "remark")
    if not record.old_count:
        head, rows = ("class", "IoU"), [(row[0], row[2]) for row in rows]
        caption = f"IoU in per cent on {gathered.split}."
    table = Table(f"IoU in per cent on {gathered.split}", head, rows, marks)
    return Section("classes", title, lead, [Beside([Figure(charts.dumbbells(pairs, "classes", alt), caption), table])])


def hundred(share: float | None) -> float | None:
    """A share in per cent."""
    return None if share is None else 100 * share


def _classes_lead(record: StepRecord, lost: Sequence[str], is_compared: bool) -> str:
    if not record.old_count:
        return "The base: every class is learned here, and nothing was there to forget."
    if not is_compared:
        return "The parent was not scored on the same images, so nothing is known of what was forgotten."
    if not lost:
        return f"No old class lost more than {LOST_POINTS:g} points."
    some = f"{len(lost)} old class{'es' if len(lost) > 1 else ''} lost more than {LOST_POINTS:g} points"
    return f"{some}: {', '.join(lost)}."


def matrix_section(gathered: Gathered) -> Section | None:
    """Classes against steps; None for a single step, where the classes' section says it all."""
    if len(gathered.lineage) < 2:
        return None
    names = gathered.step.record.class_names
    steps = [facts.record.name for facts in gathered.lineage]
    shares_RC = np.full((len(names), len(steps)), np.nan)
    for column, facts in enumerate(gathered.lineage):
        scores = scores_of(gathered, facts)
        for row, name in enumerate(names):
            value = scores.iou.get(name) if scores else None
            shares_RC[row, column] = np.nan if value is None else value
    if np.isnan(shares_RC).all():
        return Section("matrix", "Classes over the steps", "", [Missing("None of the steps was scored.")])
    alt = f"IoU of {len(names)} classes after each of {len(steps)} steps, as a heat map; the table has the numbers."
    picture = charts.heat_map(names, steps, shares_RC, "matrix", alt)
    rows = [(name, *(percent(_known(value)) for value in row)) for name, row in zip(names, shares_RC, strict=True)]
    table = Table(f"IoU in per cent on {gathered.split}, after each step", ("class", *steps), rows)
    caption = f"IoU in per cent on {gathered.split}: dark is 0, light is 100. Empty: the class was not there yet."
    figure = Figure(picture, caption, is_wide=len(steps) > MOST_NARROW)
    lead = "Read a row from left to right: what became of a class after it was taught."
    return Section("matrix", "Classes over the steps", lead, _beside(figure, table))


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def confusion_section(
    gathered: Gathered, confusions: Mapping[Role, NDArray[np.int64]], source: str, sentences: Sequence[str]
) -> Section:
    """Where pixels of old classes went, and new ones. `source` says which models on which images."""
    title = "Confusion of old with new"
    record = gathered.step.record
    role: Role = "after" if "after" in confusions else "int8"
    if role not in confusions or not confusions[role].sum():
        text = " ".join(sentences) or "No images were looked at."
        return Section("confusion", title, "", [Missing(text)])
    counts, names = confusions[role], record.class_names
    totals = counts.sum(axis=1, keepdims=True)
    shares_KK = np.divide(counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)
    alt = f"Confusion matrix of {len(names)} classes; the tables have the largest confusions."
    picture = charts.heat_map(
        names, names, shares_KK, "confusion", alt,
        charts.HeatStyle("truth", "predicted", record.old_count, 0.005),
    )  # fmt: skip
    caption = f"Per cent of a true class's pixels that were given to each class; {source}."
    flow = _flow_table(record, counts, confusions.get("before"))
    blocks: list[Block] = [
        *_beside(Figure(picture, caption, is_wide=len(names) > MOST_NARROW), flow),
        Folded(
            "All pixel counts", [Table("Pixels; rows are the truth", ("truth", *names), _count_rows(names, counts))]
        ),
    ]
    moved = counts[: record.old_count, record.old_count :].sum() / max(int(counts[: record.old_count].sum()), 1)
    missed = counts[record.old_count :, : record.old_count].sum() / max(int(counts[record.old_count :].sum()), 1)
    lead = (
        f"{percent(moved)} % of the old classes' pixels became a new class; {percent(missed)} % of the new classes' "
        "pixels were given to an old one."
        if record.old_count
        else ""
    )
    return Section("confusion", title if record.old_count else "Confusion", lead, blocks)


def _beside(figure: Figure, table: Table) -> list[Block]:
    return [figure, table] if figure.is_wide else [Beside([figure, table])]


def _count_rows(names: Sequence[str], counts: NDArray[np.int64]) -> list[tuple[str, ...]]:
    return [(name, *(str(int(value)) for value in row)) for name, row in zip(names, counts, strict=True)]


def _flow_table(record: StepRecord, counts: NDArray[np.int64], before: NDArray[np.int64] | None) -> Table:
    """The largest confusions off the diagonal, and what they were before."""
    names = record.class_names
    off = counts.astype(np.float64).copy()
    np.fill_diagonal(off, 0)
    order = [(int(place) // len(names), int(place) % len(names)) for place in np.argsort(-off.ravel(), kind="stable")]
    rows = []
    for truth, given in order[:MOST_PAIRS]:
        if not off[truth, given]:
            break
        share = counts[truth, given] / counts[truth].sum()
        earlier = (
            DASH if before is None or not before[truth].sum() else percent(before[truth, given] / before[truth].sum())
        )
        if truth >= record.old_count > 0 or given >= record.old_count > 0:
            earlier = DASH  # the parent knows no new class
        rows.append((names[truth], names[given], percent(share), earlier))
    return Table(
        "The largest confusions, per cent of the true class", ("truth", "given to", "after", "before"), rows, numeric=2
    )


def retention_drop(confusions: Mapping[Role, NDArray[np.int64]], old_count: int) -> float | None:
    """Points of mIoU that the old classes lost, over the pixels whose truth is old; None without both matrices."""
    if "before" not in confusions or "after" not in confusions or not old_count:
        return None
    before, after = (
        class_iou(retention_confusion(confusions[role], old_count))[:old_count] for role in ("before", "after")
    )
    known = ~np.isnan(before) & ~np.isnan(after)
    return float(100 * (before[known] - after[known]).mean()) if known.any() else None


def scoring_source(scoring: Scoring, role: Role) -> str:
    """`"onnxruntime fp32 on 256 images of msrc test"`."""
    return f"{scoring.labels[role]} on {count(len(scoring.images))} images of {scoring.dataset} {scoring.split}"


def training_section(gathered: Gathered) -> Section:
    """Losses, learning rates and speed over the iterations."""
    title, curves = "Training", gathered.step.curves
    if curves is None:
        text = f"Step {gathered.step.record.name} has no training.csv that can be read: its training left no curves."
        return Section("training", title, "", [Missing(text)])
    groups = (
        ("loss", "Loss terms", "loss", curves.losses, True),
        ("rate", "Learning rates", "learning rate", curves.rates, True),
        ("speed", "Speed", "images a second", curves.speed, False),
    )
    figures: list[Block] = []
    for anchor, name, y_title, found, log in groups:
        columns = [column for column in found if len(column.values) > 1]
        if columns:
            figures.append(_curves(anchor, name, y_title, columns, log))
    if not figures:
        return Section("training", title, "", [Missing("The training log has too few lines for a curve.")])
    last = [(column.name, f"{column.values[0]:.4g}", f"{column.values[-1]:.4g}") for column in curves.columns]
    table = Folded("First and last values", [Table("Training log", ("quantity", "first", "last"), last)])
    return Section("training", title, f"{count(curves.rows)} lines of training.csv.", [Beside(figures), table])


def _curves(anchor: str, name: str, y_title: str, columns: Sequence[Column], log: bool) -> Figure:
    log = log and all(value > 0 for column in columns for value in column.values)
    lines = [charts.Curve(column.name, column.iterations, column.values) for column in columns]
    alt = f"{name} over {columns[0].iterations[-1]:.0f} iterations: {', '.join(column.name for column in columns)}."
    picture = charts.curves(lines, f"curves-{anchor}", alt, x_title="iteration", y_title=y_title, log=log)
    return Figure(picture, f"{name}{', logarithmic' if log else ''}.")
