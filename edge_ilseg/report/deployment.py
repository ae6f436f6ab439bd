"""The sections on what goes out: verdicts, int8, devices, updates, provenance. Pure: data in, blocks out."""

from __future__ import annotations

from collections.abc import Sequence

from edge_ilseg.bundle import Manifest, ParityRow
from edge_ilseg.devices.bench_report import Summary, percentile
from edge_ilseg.devices.verify_report import Check, VerifyReport
from edge_ilseg.errors import EXIT_UNDECIDED
from edge_ilseg.models.spec import ModelSpec
from edge_ilseg.report import charts
from edge_ilseg.report.blocks import (
    Beside,
    Block,
    Facts,
    Figure,
    Folded,
    Heading,
    Missing,
    Note,
    Section,
    Table,
    Tile,
)
from edge_ilseg.report.gather import Gathered, Verification
from edge_ilseg.report.judgement import KINDS, TEXTS, counted, device_name
from edge_ilseg.report.learning import hundred
from edge_ilseg.report.page import DASH, count, interval, number, percent, points, size


def verdicts_section(gathered: Gathered) -> Section:
    """Every verification with every check, its interval and its limit."""
    items = gathered.verifications
    blocks: list[Block] = []
    if not items:
        blocks.append(Missing("No verification report of this step was found."))
    valid = counted(gathered)
    for place, item in enumerate(items):
        blocks += _verification(item, place, is_counted=item in valid)
    if gathered.passed_over:
        count_text = "1 report" if gathered.passed_over == 1 else f"{gathered.passed_over} reports"
        blocks.append(Note(f"{count_text} in this workspace: damaged, or about other steps."))
    lead = "A drop passes when its whole 95 % interval over images is within the limit." if items else ""
    return Section("verdicts", "Verdicts", lead, blocks)


def _verification(item: Verification, place: int, *, is_counted: bool) -> list[Block]:
    report = item.report
    blocks: list[Block] = [Heading(f"{TEXTS[report.exit_code][0]}: {device_name(report)}", KINDS[report.exit_code])]
    if not is_counted:
        blocks.append(Note(f"{item.name} is about another bundle of this step, and does not count."))
    rows = [check_row(check) for check in report.checks if check.verdict != "not checked"]
    marks = [check_mark(check) for check in report.checks if check.verdict != "not checked"]
    head = ("check", "verdict", "value", "95 % interval", "limit")
    table = Table(f"Checks of {item.name}", head, rows, marks, numeric=2)
    picture = _drops(report, place)
    blocks.append(Beside([picture, table]) if picture is not None else table)
    skipped = [check for check in report.checks if check.verdict == "not checked"]
    if skipped:
        table = Table("Not checked", ("check", "why"), [(check.name, check.detail) for check in skipped], numeric=9)
        blocks.append(Folded(f"{len(skipped)} not checked", [table]))
    return blocks


def check_mark(check: Check) -> str:
    """The style sheet's word for a check that is in the way."""
    return ("undecided" if check.exit_code == EXIT_UNDECIDED else "failed") if check.exit_code else ""


def check_row(check: Check) -> tuple[str, ...]:
    """One check of a report as texts."""
    name = check.name if check.value is None or not check.unit else f"{check.name}, {check.unit}"
    return (name, check.verdict, number(check.value), interval(check.low, check.high), number(check.limit))


def _drops(report: VerifyReport, place: int) -> Figure | None:
    """Drops of the old classes with their intervals against the limits."""
    if report.scores is None or report.parent is None:
        return None
    mean, single = report.check("old mIoU drop"), report.check("old class drop")
    spans = []
    if mean.value is not None:
        is_kept = mean.verdict == "passed"
        spans.append(charts.Span("mean of old classes", mean.value, mean.low, mean.high, mean.limit, is_kept))
    for item in report.scores.classes:
        if item.is_old and item.drop_pct is not None:
            is_kept = single.limit is None or item.drop_pct <= single.limit
            limit = single.limit
            spans.append(charts.Span(item.name, item.drop_pct, item.drop_low_pct, item.drop_high_pct, limit, is_kept))
    if not spans:
        return None
    worst = max(spans, key=lambda span: span.value)
    alt = f"Drop of {len(spans)} scores with 95 % intervals; the largest is {worst.name}, {worst.value:.1f} points."
    picture = charts.spans(spans, f"drops-{place}", alt, unit="points of IoU lost")
    return Figure(picture, "Points of IoU lost against the parent. A bar that crosses its limit decides nothing.")


def int8_section(gathered: Gathered) -> Section:
    """fp32 against int8, simulated and real."""
    title, bundle = "fp32 against int8", gathered.step.bundle
    if bundle is None:
        return Section("int8", title, "", [Missing(str(gathered.step.bundle_problem))])
    blocks: list[Block] = []
    if bundle.parity:
        rows = [_parity_row(row, bundle.parity[0]) for row in bundle.parity]
        head = ("form of the model", "same pixels, %", "mIoU old", "new", "old, points", "size", "ms")
        table = Table("The chain of the export, each compared with the first", head, rows)
        figure = _parity_figure(bundle)
        blocks += [figure, table] if figure else [table]
    if bundle.int8 is not None:
        blocks += _int8_attempts(bundle)
    by_class = _classes_by_model(bundle)
    if by_class is not None:
        blocks.append(Folded("Each class in each model", [by_class]))
    lead = "Simulated: int8 computed in float as scales and zero points say. Real: the runtime's integer kernels."
    return Section(
        "int8", title, lead if blocks else "", blocks or [Missing("The bundle has no record of its export.")]
    )


def _parity_row(row: ParityRow, first: ParityRow) -> tuple[str, ...]:
    change = None if None in (row.miou_old, first.miou_old) else 100 * ((row.miou_old or 0) - (first.miou_old or 0))
    latency = DASH if row.latency_ms is None else f"{row.latency_ms:.1f}"
    return (
        row.stage, percent(row.agreement, 2), percent(row.miou_old), percent(row.miou_new),
        points(change, 2), size(row.model_bytes), latency,
    )  # fmt: skip


def _parity_figure(bundle: Manifest) -> Figure | None:
    pairs = [
        charts.Pair(row.stage, hundred(row.miou_new), hundred(row.miou_old))
        for row in bundle.parity
        if row.miou_old is not None or row.miou_new is not None
    ]
    if not pairs:
        return None
    alt = f"mIoU of old and new classes in {len(pairs)} forms of the model; the table has the numbers."
    picture = charts.dumbbells(pairs, "parity", alt, words=("new classes", "old classes"))
    return Figure(picture, "mIoU in per cent in each form of the model. The number at the right is the old classes'.")


def _int8_attempts(bundle: Manifest) -> list[Block]:
    record = bundle.int8
    if record is None:
        return []
    rows = [
        (attempt.attempt, row.runtime, row.images, count(row.count), points(-row.drop_points, 2),
         f"{row.worst_class} {points(-row.worst_class_drop_points)}", attempt.verdict)
        for attempt in record.attempts
        for row in attempt.rows
    ]  # fmt: skip
    if not rows:
        return []
    head = ("ranges", "runtime", "images", "how many", "points", "worst class", "verdict")
    table = Table("What int8 costs against fp32, by the ranges that were tried", head, rows, numeric=3)
    text = f"Asked for: {record.asked}; taken: {record.taken}."
    return [Folded("Ways to int8 that were tried", [Note(text), table])]


def _classes_by_model(bundle: Manifest) -> Table | None:
    models = [entry for entry in bundle.models if entry.expected is not None]
    if not models:
        return None
    rows = [
        (name, *(percent(entry.expected.iou.get(name) if entry.expected else None) for entry in models))
        for name in bundle.class_names
    ]
    head = ("class", *(f"{entry.runtime} {entry.precision}" for entry in models))
    return Table(f"IoU in per cent on {bundle.expected_data}", head, rows)


def devices_section(gathered: Gathered) -> Section:
    """Latency and memory, by device."""
    bars, rows = [], []
    ids = {facts.record.id: facts.record.name for facts in gathered.lineage}
    for item in gathered.benchmarks:
        device = item.report.device_before.processor or item.report.device_before.machine or item.name
        for model in item.report.models:
            step = ids.get(model.bundle.step_id or "")
            if step is None:
                continue
            found = model.summary
            is_subject = model.bundle.step_id == gathered.step.record.id
            name = f"{model.label}{'' if is_subject else f', {step}'}"
            if found is not None:
                text = f"{found.latency_median_ms:.1f} ms"
                ink = "after" if is_subject else "before"
                bars.append(charts.Bar(name, found.latency_median_ms, end=found.latency_p95_ms, text=text, ink=ink))
            rows.append(
                (
                    device, model.label, step,
                    *_figures(found),
                    number(model.peak_rss_mib), size(model.model_bytes), "bench",
                )
            )  # fmt: skip
    for verification in gathered.verifications:
        rows += _verified_device(verification, gathered.step.record.name)
    if not rows:
        text = "Nothing was measured: edge-ilseg bench BUNDLE --out reports/bench.json measures latency and memory."
        return Section("devices", "Latency and memory", "", [Missing(text)])
    head = (
        "device",
        "model",
        "step",
        "median, ms",
        "p95, ms",
        "cold start, ms",
        "frames/s",
        "peak, MiB",
        "size",
        "from",
    )
    table = Table("One frame at the model's input size, on each device", head, rows, numeric=3)
    blocks: list[Block] = [table]
    if bars:
        alt = f"Median latency of {len(bars)} models with a whisker to the 95th percentile; the table has the numbers."
        picture = charts.bars(bars, "latency", alt, unit="latency of one frame, ms")
        blocks = [Figure(picture, "Bar: median; whisker: 95th percentile. Linear, from zero."), table]
    return Section("devices", "Latency and memory", "", blocks)


def _figures(summary: Summary | None) -> tuple[str, ...]:
    """Median, 95th percentile, cold start, frames a second."""
    if summary is None:
        return (DASH,) * 4
    found = (summary.latency_median_ms, summary.latency_p95_ms, summary.cold_start_ms, summary.frames_per_s)
    return tuple(number(value) for value in found)


def _verified_device(item: Verification, step: str) -> list[tuple[str, ...]]:
    report = item.report
    if report.model is None or not report.latencies_ms:
        return []
    middle, high = percentile(report.latencies_ms, 50), percentile(report.latencies_ms, 95)
    device = report.device.processor or report.device.machine or item.name
    model = f"{report.model.runtime} {report.model.precision}"
    memory, size_text = number(report.peak_rss_mib), size(report.model.model_bytes)
    return [(device, model, step, number(middle), number(high), DASH, DASH, memory, size_text, "verify")]


def tiles(gathered: Gathered) -> list[Tile]:
    """The numbers of the int8 model that are seen first."""
    bundle = gathered.step.bundle
    delta = bundle.int8.delta[0] if bundle is not None and bundle.int8 is not None and bundle.int8.delta else None
    if delta is None:
        return []
    return [Tile("Update, int8", size(delta.changed_bytes), f"new of {size(delta.total_bytes)}, {delta.runtime}")]


def updates_section(gathered: Gathered) -> Section:
    """How many bytes of each step's int8 model a device with the step before does not have yet."""
    bars, rows = [], []
    for facts in gathered.lineage:
        for row in facts.bundle.int8.delta if facts.bundle is not None and facts.bundle.int8 is not None else ():
            name = f"{facts.record.name}, {row.runtime}"
            rest = row.total_bytes - row.changed_bytes
            bars.append(charts.Bar(name, row.changed_bytes / 1024, rest / 1024, text=size(row.changed_bytes)))
            rows.append(
                (facts.record.name, row.runtime, size(row.total_bytes), size(row.changed_bytes),
                 percent(row.changed_bytes / row.total_bytes if row.total_bytes else None),
                 size(row.encoder_changed_bytes))
            )  # fmt: skip
    title = "Bytes of an update"
    if not rows:
        text = "No bundle of this lineage records what is new against its parent's."
        return Section("updates", title, "", [Missing(text)])
    head = ("step", "runtime", "model", "new", "new, %", "encoder's")
    table = Table("int8 models, uncompressed", head, rows, numeric=2)
    alt = f"New bytes against all bytes of {len(bars)} int8 models; the table has the numbers."
    picture = charts.bars(bars, "updates", alt, unit="KiB", words=("new", "as in the parent's"))
    return Section(
        "updates", title, "", [Beside([Figure(picture, "Bytes that a device with the parent's bundle lacks."), table])]
    )


def provenance_section(gathered: Gathered) -> Section:
    """Where all this comes from."""
    record, bundle = gathered.step.record, gathered.step.bundle
    options = ", ".join(f"{key}={value}" for key, value in record.data.options.items())
    data = (
        f"{record.data.kind}{f' ({options})' if options else ''}, {record.data.train_split}, setup {record.data.setup}"
    )
    pairs = [
        ("workspace", gathered.workspace),
        ("step", f"{record.name}, made {record.created}"),
        ("step id", record.id),
        ("parent id", record.parent_id or DASH),
        ("weights", f"{size(record.weights_bytes)}, sha256 {record.weights_sha256}"),
        ("encoder", f"sha256 {record.encoder_sha256}"),
        ("data", data),
        ("images", f"{count(len(record.data.image_ids))}, sha256 {record.data.images_sha256}"),
        ("network", _network(record.model)),
        ("first weights", record.initial_weights),
        ("method", _method(gathered)),
        ("trained on", f"{record.accelerator}, {record.training_seconds:.0f} s"),
    ]  # fmt: skip
    if bundle is not None:
        pairs += [("bundle id", bundle.bundle_id), ("exported", bundle.created)]
    packages = sorted({**record.packages, **(bundle.versions if bundle else {})}.items())
    settings = [(name, str(value)) for name, value in _settings(record.training)]
    blocks: list[Block] = [
        Facts(pairs),
        Folded("Settings of the training", [Facts(settings)]),
        Folded("Packages", [Facts([(name, str(value)) for name, value in packages])]),
        Folded(f"The {count(len(record.data.image_ids))} images", [Note(", ".join(record.data.image_ids))]),
    ]
    if bundle is not None:
        files = [(name, size(entry.bytes), entry.sha256) for name, entry in bundle.files.items()]
        blocks.append(Folded("Files of the bundle", [Table("Files", ("file", "size", "sha256"), files, numeric=9)]))
    return Section("provenance", "Provenance", "", blocks)


def _network(model: ModelSpec) -> str:
    size_text = f"{model.input_width_px} \u00d7 {model.input_height_px} px"
    return f"{model.backbone}, {model.head}, {size_text}, output stride {model.output_stride}"


def _method(gathered: Gathered) -> str:
    method = gathered.step.record.method
    if method is None:
        return "training from scratch"
    losses = ", ".join(f"{name} {weight:g}" for name, weight in method.losses.items())
    return f"{method.name}; frozen: {method.freeze}; weights of losses: {losses or 'none'}"


def _settings(training: object) -> Sequence[tuple[str, object]]:
    import msgspec

    return list(msgspec.to_builtins(training).items())
