"""A benchmark as a picture: a bar a model, drawn with Pillow alone, because a device has no plotting library.

1. A bar ends at the median latency, its whisker at the 95th percentile. The axis is linear and starts from zero:
   lengths compare as the latencies do. Images a second, several side by side, are a number behind it.
2. Colours tell the runtimes apart, for the colour-blind too (Okabe and Ito); the labels say the same in words.
3. A model that failed has a row without a bar.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

from edge_ilseg.bundle import Runtime
from edge_ilseg.devices.bench_report import BenchReport, ModelBench
from edge_ilseg.devices.bench_table import bundle_names, three_digits
from edge_ilseg.devices.drawing import Rgb, TextStyle, draw_text, load_style, shorten, text_width_px
from edge_ilseg.errors import ReportError
from edge_ilseg.files import write_bytes

WIDTH_PX, MARGIN_PX, GAP_PX = 1400, 48, 20
ROW_PX, BAR_PX, CAP_PX = 64, 32, 20
LABEL_SHARE = 0.38
"""Of the picture's width that labels may take; the names of bundles are cut to it."""
TICKS = 6
PAPER: Rgb = (252, 252, 252)
INK: Rgb = (34, 34, 34)
QUIET: Rgb = (105, 105, 105)
GRID: Rgb = (225, 225, 225)
ALARM: Rgb = (180, 30, 30)
BAR_COLORS: dict[Runtime, Rgb] = {"onnxruntime": (86, 160, 211), "openvino": (230, 159, 0)}


class Axis(NamedTuple):
    """Where milliseconds are on the picture."""

    left_px: int
    width_px: int
    step_ms: float
    steps: int

    def at(self, value_ms: float) -> float:
        """The place of a latency, px from the left."""
        return self.left_px + self.width_px * value_ms / (self.step_ms * self.steps)


class Row(NamedTuple):
    """One model in the picture."""

    label: str
    value: str
    model: ModelBench


def write_bench_plot(path: Path, report: BenchReport) -> None:
    """Draw the latencies of a report into a PNG.

    Raises:
        ReportError: every model has failed, so that there is nothing to draw.
        EdgeIlsegError: the disk is full or refuses the write.
    """
    buffer = io.BytesIO()
    draw_bench_plot(report).save(buffer, format="PNG", optimize=True)
    write_bytes(path, buffer.getvalue())


def draw_bench_plot(report: BenchReport) -> Image.Image:
    """The picture (rules 1 to 3); as high as it has models.

    Raises:
        ReportError: every model has failed, so that there is nothing to draw.
    """
    highest_ms = max((_highest_ms(model) for model in report.models), default=0.0)
    if highest_ms <= 0:
        raise ReportError(
            "there is no latency to draw",
            found="no model that could be measured",
            hint="see why each model failed: the field error in the report",
        )
    title, text, small = load_style(34), load_style(24), load_style(20)
    rows = _rows(report, text)
    label_px = max(text_width_px(row.label, text) for row in rows)
    value_px = max(text_width_px(row.value, text) for row in rows)
    step_ms, steps = nice_steps(highest_ms)
    left_px = MARGIN_PX + label_px + GAP_PX
    axis = Axis(left_px, WIDTH_PX - MARGIN_PX - value_px - GAP_PX - left_px, step_ms, steps)
    subtitles = _subtitles(report)
    top_px = MARGIN_PX + title.height_px + GAP_PX + len(subtitles) * (small.height_px + GAP_PX // 2) + GAP_PX
    bottom_px = top_px + len(rows) * ROW_PX
    axis_text_px = bottom_px + GAP_PX // 2 + 2 * small.height_px + GAP_PX
    image = Image.new("RGB", (WIDTH_PX, axis_text_px + small.height_px // 2 + MARGIN_PX), PAPER)
    draw = ImageDraw.Draw(image)
    draw_text(draw, MARGIN_PX, MARGIN_PX + title.height_px / 2, "Latency of one frame", title, INK)
    line_px = float(MARGIN_PX + title.height_px + GAP_PX + small.height_px / 2)
    for subtitle in subtitles:
        draw_text(draw, MARGIN_PX, line_px, shorten(subtitle, small, WIDTH_PX - 2 * MARGIN_PX), small, QUIET)
        line_px += small.height_px + GAP_PX // 2
    _draw_axis(draw, axis, top_px, bottom_px, axis_text_px, small)
    for position, row in enumerate(rows):
        _draw_row(draw, axis, row, top_px + (position + 0.5) * ROW_PX, text)
    draw.line((axis.left_px, top_px, axis.left_px, bottom_px), fill=QUIET, width=2)
    return image


def nice_steps(highest: float) -> tuple[float, int]:
    """Step of an axis from 0 (1, 2 or 5 times a power of ten) and how many reach `highest`: at most `TICKS`.

    Args:
        highest: the highest value, above 0.
    """
    magnitude = 10.0 ** math.floor(math.log10(highest / TICKS))
    for factor in (1, 2, 5, 10):
        steps = max(math.ceil(highest / (factor * magnitude) - 1e-9), 1)
        if steps <= TICKS:
            return factor * magnitude, steps
    raise AssertionError("ten times a step that is too short by less than ten is long enough")


def _rows(report: BenchReport, style: TextStyle) -> list[Row]:
    names = bundle_names(report)
    rows = []
    for model, name in zip(report.models, names, strict=True):
        label = model.label
        if len(set(names)) > 1:
            left_px = round(LABEL_SHARE * WIDTH_PX) - text_width_px(f": {label}", style)
            label = f"{shorten(name, style, left_px)}: {label}"
        found = model.summary
        value = "failed"
        if found:
            value = f"{three_digits(found.latency_median_ms)} (p95 {three_digits(found.latency_p95_ms)}); "
            value += "-" if found.side_by_side_per_s is None else f"{three_digits(found.side_by_side_per_s)}/s"
        rows.append(Row(label, value, model))
    return rows


def _subtitles(report: BenchReport) -> list[str]:
    device, settings, model = report.device_before, report.settings, report.models[0]
    size = f"{model.input_width_px} x {model.input_height_px} px"
    sizes = {(item.input_width_px, item.input_height_px) for item in report.models}
    names = sorted(set(bundle_names(report)))
    load = "unknown" if device.load_average is None else f"{device.load_average[0]:.2f}"
    return [
        f"{names[0] if len(names) == 1 else f'{len(names)} bundles'}, "
        f"input {size if len(sizes) == 1 else 'of several sizes'}, "
        f"threads: {settings.threads or 'as the runtime chooses'}; "
        f"rounds x runs: {settings.rounds} x {settings.runs}, medians over rounds",
        f"{device.processor or 'unknown processor'}, {device.cores or '?'} cores, load {load} before it began",
    ]


def _draw_axis(
    draw: ImageDraw.ImageDraw, axis: Axis, top_px: float, bottom_px: float, text_px: float, style: TextStyle
) -> None:
    for step in range(axis.steps + 1):
        value_ms = step * axis.step_ms
        at_px, label = axis.at(value_ms), f"{value_ms:g}"
        draw.line((at_px, top_px, at_px, bottom_px + 6), fill=GRID, width=2)
        label_middle_px = bottom_px + GAP_PX // 2 + style.height_px / 2
        draw_text(draw, at_px - text_width_px(label, style) / 2, label_middle_px, label, style, QUIET)
    text = "ms for one frame (bar: median, whisker: p95); /s: images side by side"
    draw_text(draw, axis.left_px, text_px, shorten(text, style, WIDTH_PX - MARGIN_PX - axis.left_px), style, QUIET)


def _draw_row(draw: ImageDraw.ImageDraw, axis: Axis, row: Row, middle_px: float, style: TextStyle) -> None:
    draw_text(draw, axis.left_px - GAP_PX - text_width_px(row.label, style), middle_px, row.label, style, INK)
    found = row.model.summary
    if found is None:
        draw_text(draw, axis.left_px + GAP_PX // 2, middle_px, row.value, style, ALARM)
        return
    end_px, whisker_px = axis.at(found.latency_median_ms), axis.at(found.latency_p95_ms)
    bar = (axis.left_px, middle_px - BAR_PX / 2, end_px, middle_px + BAR_PX / 2)
    draw.rectangle(bar, fill=BAR_COLORS[row.model.runtime])
    draw.line((end_px, middle_px, whisker_px, middle_px), fill=INK, width=3)
    draw.line((whisker_px, middle_px - CAP_PX / 2, whisker_px, middle_px + CAP_PX / 2), fill=INK, width=3)
    value_px = max(end_px, whisker_px) + GAP_PX // 2
    behind = (value_px, middle_px - ROW_PX / 3, value_px + text_width_px(row.value, style), middle_px + ROW_PX / 3)
    draw.rectangle(behind, fill=PAPER)  # no line of the grid runs through a number
    draw_text(draw, value_px, middle_px, row.value, style, INK)


def _highest_ms(model: ModelBench) -> float:
    return 0.0 if model.summary is None else max(model.summary.latency_median_ms, model.summary.latency_p95_ms)
