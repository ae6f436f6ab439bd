"""Two side by side: two steps (of one workspace or two), or two verification reports. Pure: data in, sections out.

1. A value that both have alike is told once; what differs stands side by side.
2. Only classes that both know are compared; the others are listed with the one value that there is.
3. Scores of different splits, or of different images, are shown and called what they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from edge_ilseg.devices.bench_report import percentile
from edge_ilseg.devices.verify_report import Check
from edge_ilseg.report import charts
from edge_ilseg.report.blocks import Beside, Block, Figure, Missing, Note, Section, Table, Tile
from edge_ilseg.report.deployment import check_row
from edge_ilseg.report.gather import Gathered, Verification
from edge_ilseg.report.judgement import TEXTS, device_name, judge
from edge_ilseg.report.learning import before_and_after, drop_points, hundred
from edge_ilseg.report.page import DASH, count, number, percent, points, size


class Named(msgspec.Struct, frozen=True):
    """One of the two, and what the page calls it."""

    name: str
    value: Gathered | Verification


def step_sections(one: Named, two: Named) -> list[Section]:
    """Two steps."""
    a, b = one.value, two.value
    if not isinstance(a, Gathered) or not isinstance(b, Gathered):
        raise TypeError("step_sections compares steps")
    names = (one.name, two.name)
    return [
        _step_scores(names, a, b),
        _step_classes(names, a, b),
        _step_verdicts(names, a, b),
        _differences(names, _step_facts(a), _step_facts(b)),
    ]


def report_sections(one: Named, two: Named) -> list[Section]:
    """Two verifications, as of one bundle on two devices."""
    a, b = one.value, two.value
    if not isinstance(a, Verification) or not isinstance(b, Verification):
        raise TypeError("report_sections compares verification reports")
    names = (one.name, two.name)
    return [
        _checks(names, a, b),
        _report_classes(names, a, b),
        _latency(names, a, b),
        _differences(names, _report_facts(a), _report_facts(b)),
    ]


def _step_scores(names: tuple[str, str], a: Gathered, b: Gathered) -> Section:
    cells = [_score_cells(item) for item in (a, b)]
    rows = [(label, cells[0][label], cells[1][label]) for label in cells[0]]
    blocks: list[Block] = [Table("Scores in per cent, background included", ("what", *names), rows)]
    if a.split != b.split:
        blocks.append(Note(f"Scored on different splits: {a.split or 'none'} and {b.split or 'none'}."))
    return Section("scores", "Scores", "", blocks)


def _score_cells(item: Gathered) -> dict[str, str]:
    record = item.step.record
    scores, before = record.metrics.get(item.split), record.parent_metrics.get(item.split)
    delta = item.step.bundle.int8.delta if item.step.bundle and item.step.bundle.int8 else ()
    return {
        "verdict": judge(item).text,
        "method": record.method.name if record.method else DASH,
        "classes added": ", ".join(record.new_classes),
        "old classes before": percent(before.miou_all if before else None),
        "old classes after": percent(scores.miou_old if scores else None),
        "new classes": percent(scores.miou_new if scores else None),
        "all classes": percent(scores.miou_all if scores else None),
        "pixel accuracy": percent(scores.mpa if scores else None),
        "images scored": count(scores.images if scores else None),
        "images learned from": count(len(record.data.image_ids)),
        "iterations": count(record.training.iterations),
        "seconds of training": f"{record.training_seconds:.0f}",
        "weights": size(record.weights_bytes),
        "bytes of an int8 update": ", ".join(f"{row.runtime} {size(row.changed_bytes)}" for row in delta) or DASH,
    }


def _step_classes(names: tuple[str, str], a: Gathered, b: Gathered) -> Section:
    (before_a, after_a), (before_b, after_b) = before_and_after(a), before_and_after(b)
    if not after_a or not after_b:
        return Section("classes", "Classes", "", [Missing("One of the two was scored on no images.")])
    classes = list(dict.fromkeys([*after_a, *after_b]))
    section = _class_table(names, classes, after_a, after_b, "IoU in per cent")
    rows = []
    for name in classes:
        lost = [
            drop_points(before.get(name), after.get(name)) if name not in new else None
            for before, after, new in (
                (before_a, after_a, a.step.record.new_classes), (before_b, after_b, b.step.record.new_classes),
            )
        ]  # fmt: skip
        if any(value is not None for value in lost):
            rows.append((name, *(points(None if value is None else -value) for value in lost)))
    blocks = [*section.blocks]
    if rows:
        blocks.append(Table("Change against the parent, points of IoU", ("old class", *names), rows))
    return msgspec.structs.replace(section, blocks=blocks)


def _class_table(
    names: tuple[str, str],
    classes: Sequence[str],
    one: Mapping[str, float | None],
    two: Mapping[str, float | None],
    what: str,
) -> Section:
    pairs, rows = [], []
    for name in classes:
        first, second = one.get(name), two.get(name)
        pairs.append(charts.Pair(name, hundred(first), hundred(second)))
        drop = drop_points(first, second)
        rows.append((name, percent(first), percent(second), points(None if drop is None else -drop)))
    alt = f"{what} of {len(classes)} classes: {names[0]} and {names[1]}; the table has the numbers."
    picture = charts.dumbbells(pairs, "classes", alt, words=names)
    figure = Figure(picture, f"{what}. Ring: {names[0]}; disc: {names[1]}.")
    return Section("classes", "Classes", "", [Beside([figure, Table(what, ("class", *names, "difference"), rows)])])


def _step_verdicts(names: tuple[str, str], a: Gathered, b: Gathered) -> Section:
    items = [(name, item) for name, one in zip(names, (a, b), strict=True) for item in one.verifications]
    if not items:
        text = "No verification report of either step was found."
        return Section("verdicts", "Verdicts", "", [Missing(text)])
    rows = []
    for place, first in enumerate(items[0][1].report.checks):
        checks = [item.report.checks[place] for _, item in items]
        if any(check.verdict != "not checked" for check in checks):
            name = check_row(first)[0] if first.value is not None else first.name
            rows.append((name, *map(_check_cell, checks)))
    head = ("check", *(f"{name}: {device_name(item.report)}" for name, item in items))
    lead = "Value, 95 % interval in brackets, and verdict."
    return Section("verdicts", "Verdicts", lead, [Table("Checks", head, rows)])


def _check_cell(check: Check) -> str:
    _, verdict, value, between, _ = check_row(check)
    if check.value is None:
        return verdict
    return f"{value}{f' ({between})' if check.low is not None else ''}, {verdict}"


def step_tiles(one: Named, two: Named) -> list[Tile]:
    """The two verdicts."""
    return [
        Tile(item.name, banner.text, banner.reasons[0] if banner.verdict != "unknown" and banner.reasons else "")
        for item in (one, two)
        if isinstance(item.value, Gathered) and (banner := judge(item.value))
    ]


def _step_facts(item: Gathered) -> dict[str, str]:
    record = item.step.record
    training = msgspec.to_builtins(record.training)
    method = msgspec.to_builtins(record.method) if record.method else {}
    return {
        "workspace": item.workspace,
        "step": record.name,
        "step id": record.id,
        "parent": f"{record.parent_name} ({record.parent_id})" if record.parent_id else DASH,
        "images": f"{len(record.data.image_ids)}, sha256 {record.data.images_sha256}",
        "setup": record.data.setup,
        "encoder": record.encoder_sha256,
        "network": str(msgspec.to_builtins(record.model)),
        "accelerator": record.accelerator,
        **{f"training: {key}": str(value) for key, value in training.items()},
        **{f"method: {key}": str(value) for key, value in method.items()},
        **{f"package: {key}": value for key, value in record.packages.items()},
    }


def _differences(names: tuple[str, str], one: Mapping[str, str], two: Mapping[str, str]) -> Section:
    """Rule 1."""
    keys = list(dict.fromkeys([*one, *two]))
    differing = [(key, one.get(key, DASH), two.get(key, DASH)) for key in keys if one.get(key) != two.get(key)]
    alike = [(key, one[key]) for key in keys if key in one and one.get(key) == two.get(key)]
    blocks: list[Block] = []
    if differing:
        blocks.append(Table("What differs", ("what", *names), differing, numeric=9))
    else:
        blocks.append(Missing("The two do not differ."))
    if alike:
        blocks.append(Table("What both have alike", ("what", "both"), alike, numeric=9))
    return Section("provenance", "Provenance", "", blocks)


def _checks(names: tuple[str, str], a: Verification, b: Verification) -> Section:
    rows, marks = [], []
    for one, two in zip(a.report.checks, b.report.checks, strict=True):
        if one.verdict == two.verdict == "not checked":
            continue
        cells = [check_row(check) for check in (one, two)]
        rows.append(
            (
                one.name,
                cells[0][1],
                cells[1][1],
                cells[0][2],
                cells[1][2],
                cells[0][4],
                cells[1][4],
            )
        )
        marks.append("failed" if one.exit_code or two.exit_code else "")
    short = ("1", "2")
    head = (
        "check",
        *(f"verdict {s}" for s in short),
        *(f"value {s}" for s in short),
        *(f"limit {s}" for s in short),
    )
    lead = "; ".join(f"{name}: {TEXTS[item.report.exit_code][0]}" for name, item in zip(names, (a, b), strict=True))
    caption = f"1: {names[0]}; 2: {names[1]}"
    return Section("verdicts", "Verdicts", f"{lead}.", [Table(caption, head, rows, marks, numeric=3)])


def _report_classes(names: tuple[str, str], a: Verification, b: Verification) -> Section:
    if a.report.scores is None or b.report.scores is None:
        return Section("classes", "Classes", "", [Missing("One of the two saw no labelled images.")])
    one, two = (
        {item.name: item.iou for item in report.scores.classes} for report in (a.report, b.report) if report.scores
    )
    section = _class_table(names, list(dict.fromkeys([*one, *two])), one, two, "IoU in per cent on the device")
    if a.report.scores.image_ids_sha256 != b.report.scores.image_ids_sha256:
        note = Note("The two devices saw different images: a difference of scores says little.")
        return msgspec.structs.replace(section, blocks=[*section.blocks, note])
    return section


def _latency(names: tuple[str, str], a: Verification, b: Verification) -> Section:
    bars, rows = [], []
    for place, (name, item) in enumerate(zip(names, (a, b), strict=True)):
        if not item.report.latencies_ms:
            continue
        middle, high = (percentile(item.report.latencies_ms, share) for share in (50, 95))
        bars.append(charts.Bar(name, middle, end=high, text=f"{middle:.1f} ms", ink=("before", "after")[place]))
        rows.append((name, number(middle), number(high), number(item.report.peak_rss_mib)))
    if not bars:
        return Section("devices", "Latency and memory", "", [Missing("Neither report has a latency.")])
    alt = "Median latency of the two, with a whisker to the 95th percentile; the table has the numbers."
    picture = charts.bars(bars, "latency", alt, unit="latency of one golden image, ms")
    table = Table("Latency and memory", ("device", "median, ms", "p95, ms", "peak, MiB"), rows)
    blocks = [Beside([Figure(picture, "Bar: median; whisker: 95th percentile."), table])]
    return Section("devices", "Latency and memory", "", blocks)


def _report_facts(item: Verification) -> dict[str, str]:
    report = item.report
    device = {f"device: {key}": str(value) for key, value in msgspec.to_builtins(report.device).items()}
    model = (
        {f"model: {key}": str(value) for key, value in msgspec.to_builtins(report.model).items()}
        if report.model
        else {}
    )
    return {
        "created": report.created,
        "bundle": str(report.bundle.bundle_id),
        "step": str(report.bundle.step_name),
        "parent": str(report.parent.bundle_id if report.parent else None),
        **{key: value for key, value in (*model.items(), *device.items()) if value not in ("None", "{}")},
    }
