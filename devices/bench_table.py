"""A benchmark on one screen: a row a model, then what has to be known to read it. Makes renderables; prints nothing."""

from __future__ import annotations

from pathlib import PurePath

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edge_ilseg.devices.bench_report import BenchReport, ModelBench, Settings
from edge_ilseg.devices.facts import DeviceFacts

BUSY_SHARE = 0.5
"""A load of more than so many of the cores before the first model ran is worth a warning."""
ODD_AGREEMENT = 0.99
"""A mask that agrees with the export's in less than this is worth one too; the verdict is `verify`'s."""
COLUMNS = (
    "median\nms",
    "p90\nms",
    "p95\nms",
    "rounds\ndiffer %",
    "frames\nper s",
    "side by\nside /s",
    "CPU ms\nper frame",
    "cold\nstart ms",
    "first\nframe ms",
    "peak\nMiB",
    "files\nMiB",
)


def bench_table(report: BenchReport) -> RenderableType:
    """The whole report for a terminal. Values from outside (names, paths) are shown as they are, never as markup."""
    parts: list[RenderableType] = []
    if len(set(bundle_names(report))) == 1:
        facts = report.models[0].bundle
        parts.append(Text(f"bundle {facts.folder} (step {facts.step_name})"))
    parts += [_rows(report), Text(_setting_text(report.settings), style="dim")]
    parts.append(Text(_device_text(report.device_before, report.device_after), style="dim"))
    parts += [Text(note, style="yellow") for note in _notes(report)]
    for model in report.models:
        if model.error:
            parts.append(Text(f"failed: {_name(model)}: {model.error}", "bold red"))
        if model.side_by_side_error:
            parts.append(Text(f"not side by side: {_name(model)}: {model.side_by_side_error}", "bold red"))
    return Group(*parts)


def bundle_names(report: BenchReport) -> tuple[str, ...]:
    """What to call the bundle of each model: the folder's name, or its path where two folders have one name."""
    folders = [model.bundle.folder for model in report.models]
    by_name: dict[str, set[str]] = {}
    for folder in folders:
        by_name.setdefault(PurePath(folder).name, set()).add(folder)
    return tuple(PurePath(item).name if len(by_name[PurePath(item).name]) == 1 else item for item in folders)


def _rows(report: BenchReport) -> Table:
    names = bundle_names(report)
    has_several = len(set(names)) > 1
    table = Table()
    for column in ("bundle", "model") if has_several else ("model",):
        table.add_column(column, overflow="fold")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    before = ""
    for model, name in zip(report.models, names, strict=True):
        if before and name != before:
            table.add_section()
        heading = [Text("" if name == before else name)] if has_several else []
        table.add_row(*heading, model.label, *_cells(model))
        before = name
    return table


def _cells(model: ModelBench) -> tuple[str | Text, ...]:
    size = f"{model.model_bytes / (1 << 20):.2f}"
    found = model.summary
    if found is None:
        return (Text("failed", style="bold red"), *[""] * (len(COLUMNS) - 2), size)
    return (
        three_digits(found.latency_median_ms),
        three_digits(found.latency_p90_ms),
        three_digits(found.latency_p95_ms),
        f"{found.latency_spread_pct:.0f}",
        f"{found.frames_per_s:.1f}",
        "-" if found.side_by_side_per_s is None else f"{found.side_by_side_per_s:.1f} ({model.concurrent_runs})",
        three_digits(found.cpu_ms_per_frame),
        f"{found.cold_start_ms:.0f}",
        three_digits(found.first_frame_ms),
        "-" if model.peak_rss_mib is None else f"{model.peak_rss_mib:.0f}",
        size,
    )


def three_digits(value: float) -> str:
    """A number with three digits that mean something and no exponent: `0.123`, `1.23`, `12.3`, `1234`."""
    decimals = next((count for count, limit in ((3, 1.0), (2, 10.0), (1, 100.0)) if value < limit), 0)
    return f"{value:.{decimals}f}"


def _setting_text(settings: Settings) -> str:
    return (
        f"rounds x runs: {settings.rounds} x {settings.runs}, {settings.warm_up_runs} more to warm up in each; medians "
        f"over rounds; threads: {settings.threads or 'as the runtime chooses'}; one golden image at the model's size; "
        "cold start: from nothing to the first mask; side by side: so many images (in brackets) at the same time, as "
        "verify and predict run them"
    )


def _device_text(before: DeviceFacts, after: DeviceFacts) -> str:
    text = f"device {before.processor or 'unknown processor'}, {before.cores or '?'} cores"
    if before.governor:
        text += f", {before.governor}"
    return f"{text}; load {_load(before)} before, {_load(after)} after"


def _load(facts: DeviceFacts) -> str:
    return "unknown" if facts.load_average is None else f"{facts.load_average[0]:.2f}"


def _notes(report: BenchReport) -> list[str]:
    before = report.device_before
    notes = []
    if before.load_average and before.cores and before.load_average[0] > BUSY_SHARE * before.cores:
        notes.append("the device was busy before the first model ran: compare the models, do not quote the numbers")
    for model in report.models:
        if model.golden_agreement is not None and model.golden_agreement < ODD_AGREEMENT:
            share = f"{100 * model.golden_agreement:.1f} % of the pixels"
            notes.append(f"{_name(model)} agrees with the export in {share} only: verify it first")
    notes += [f"left out: {item.folder} {item.runtime} {item.precision}: {item.reason}" for item in report.skipped]
    return notes


def _name(model: ModelBench) -> str:
    return f"{model.bundle.folder} {model.label}"
