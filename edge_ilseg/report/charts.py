"""Charts of a report: plain data in, inline SVG out. Drawn by matplotlib, without a display.

1. A chart says what it shows by place and words first, by colour last; the same numbers stand in a table beside it.
2. The same data gives the same bytes: no date, a fixed salt for identifiers.
3. Names are text, never formulas: a `$` in a class name is a `$`. Letters that the measuring font lacks are
   shown by the reader's own fonts.
4. Charts are `WIDTH_PX` wide, so that their text can be read on a phone; a heat map with many columns is wider, and
   the page lets it be scrolled by itself.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_ilseg.report.svg import INKS, clean_text, tidy

if TYPE_CHECKING:
    from markupsafe import Markup

WIDTH_PX = 460
ROW_PX = 22
TEXT_PX, SMALL_PX = 13, 12
LONGEST_NAME = 26
DOTS_PX = {"before": 34, "after": 40}
WIDEST_PX, LEAST_CELL_PX = 820, 27
LONGEST_COLUMN = 14
BRIGHT_FROM = 0.5
"""Of cividis: from here on black can be read better than white."""
SERIES = tuple(f"data-{place}" for place in range(1, 7))
DASHES = ("-", (0, (5, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)), (0, (1, 1)), (0, (8, 2)))
"""Lines differ in dashes too: told apart in grey."""


class Pair(NamedTuple):
    """A row of a dumbbell chart, in per cent; None: no value."""

    name: str
    before: float | None
    after: float | None
    is_lost: bool = False


class Bar(NamedTuple):
    """A bar from zero: the strong part, and a pale rest after it; `end` is where a whisker ends."""

    name: str
    value: float
    rest: float = 0.0
    end: float | None = None
    text: str = ""
    ink: str = "after"


class Span(NamedTuple):
    """A value with its interval, and the limit that it is held against."""

    name: str
    value: float
    low: float | None
    high: float | None
    limit: float | None
    is_kept: bool


class Curve(NamedTuple):
    """One line of a line chart."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


MINUS = "\u2212"


def signed(value: float) -> str:
    """`+1.2`, or with a real minus sign."""
    return f"{value:+.1f}".replace("-", MINUS)


def short_name(name: str, most: int = LONGEST_NAME) -> str:
    """The name as a chart has room for it."""
    name = clean_text(" ".join(name.split()))
    return name if len(name) <= most else name[: most - 1] + "…"


@contextmanager
def _drawing() -> Iterator[None]:
    """Matplotlib's settings for the while of a drawing (rules 2 and 3)."""
    import matplotlib

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "edge-ilseg",
        "text.parse_math": False,
        "axes.unicode_minus": True,
        "font.size": TEXT_PX * 0.75,  # points of 96 dpi, as the figure is
        "text.color": INKS["ink"],
        "axes.edgecolor": INKS["line"],
        "axes.labelcolor": INKS["quiet"],
        "xtick.color": INKS["line"],
        "ytick.color": INKS["line"],
        "xtick.labelcolor": INKS["quiet"],
        "ytick.labelcolor": INKS["ink"],
        "grid.color": INKS["line"],
        "grid.linewidth": 0.75,
        "axes.linewidth": 0.75,
        "path.simplify": True,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        yield


class _Canvas:
    """One set of axes in a figure of so many pixels; a pixel is 1/72 inch, so that the SVG's unit is one too."""

    def __init__(
        self,
        height_px: float,
        *,
        left_px: float,
        right_px: float,
        top_px: float,
        bottom_px: float,
        width_px: float = WIDTH_PX,
    ) -> None:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(width_px / 72, height_px / 72), dpi=72)
        FigureCanvasSVG(self.figure)
        width, height = width_px - left_px - right_px, height_px - top_px - bottom_px
        self.axes: Any = self.figure.add_axes(
            (left_px / width_px, bottom_px / height_px, width / width_px, height / height_px)
        )
        self.axes.patch.set_visible(False)
        self.figure.patch.set_visible(False)
        self.axes.tick_params(length=0, labelsize=SMALL_PX, pad=4)
        for side in ("top", "right", "left", "bottom"):
            self.axes.spines[side].set_visible(False)

    def names_at_left(self, names: Sequence[str], lost: Sequence[bool] = ()) -> None:
        """One name a row, the first on top."""
        self.axes.set_yticks(range(len(names)), [short_name(name) for name in names], fontsize=TEXT_PX)
        self.axes.set_ylim(len(names) - 0.5, -0.5)
        for label, is_lost in zip(self.axes.get_yticklabels(), lost, strict=False):
            if is_lost:
                label.set_color(INKS["lost"])
                label.set_fontweight("bold")

    def finish(self, prefix: str, alt: str) -> Markup:
        """The page's form of it."""
        buffer = io.StringIO()
        self.figure.savefig(buffer, format="svg", metadata={"Date": None})
        return tidy(buffer.getvalue(), prefix, alt)


def _left_px(names: Sequence[str]) -> float:
    longest = max((len(short_name(name)) for name in names), default=0)
    return min(24 + 7.0 * longest, 0.45 * WIDTH_PX)


def dumbbells(pairs: Sequence[Pair], prefix: str, alt: str, *, words: tuple[str, str] = ("before", "after")) -> Markup:
    """Before and after of each class on a scale from 0 to 100: a ring, a disc, and a line between them."""
    with _drawing():
        names = [pair.name for pair in pairs]
        canvas = _Canvas(len(pairs) * ROW_PX + 56, left_px=_left_px(names), right_px=44, top_px=28, bottom_px=28)
        axes = canvas.axes
        canvas.names_at_left(names, [pair.is_lost for pair in pairs])
        axes.set_xlim(0, 100)
        axes.set_xticks(range(0, 101, 20))
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        for row, pair in enumerate(pairs):
            ink = INKS["lost"] if pair.is_lost else INKS["after"]
            if pair.before is not None and pair.after is not None:
                axes.plot([pair.before, pair.after], [row, row], color=ink, linewidth=2.5, solid_capstyle="butt")
            if pair.before is not None:
                _dot(axes, pair.before, row, "before", INKS["before"])
            if pair.after is not None:
                _dot(axes, pair.after, row, "after", ink)
            text = f"{pair.after:.0f}" if pair.after is not None else ""
            axes.annotate(
                text, (1, row), xycoords=("axes fraction", "data"), xytext=(34, 0), textcoords="offset points",
                ha="right", va="center", fontsize=SMALL_PX, color=ink if pair.is_lost else INKS["ink"],
            )  # fmt: skip
        _key(axes, [(words[0], "before", INKS["before"]), (words[1], "after", INKS["after"])])
        return canvas.finish(prefix, alt)


def _dot(axes: Any, x: float, y: float, kind: str, color: str) -> None:
    face = INKS["paper"] if kind == "before" else color
    axes.scatter([x], [y], s=DOTS_PX[kind], facecolors=face, edgecolors=color, linewidths=1.8, zorder=3, clip_on=False)


def _key(axes: Any, entries: Sequence[tuple[str, str, str]]) -> None:
    """Above the axes, from the left: a mark and its word."""
    from matplotlib.transforms import ScaledTranslation

    left = 4.0
    for text, kind, color in entries:
        face = INKS["paper"] if kind == "before" else color
        place = axes.transAxes + ScaledTranslation(left / 72, 14 / 72, axes.figure.dpi_scale_trans)
        axes.scatter(
            [0], [1], s=DOTS_PX.get(kind, 36), facecolors=face, edgecolors=color, linewidths=1.8, transform=place,
            clip_on=False, marker="s" if kind == "square" else "o",
        )  # fmt: skip
        axes.annotate(
            text, (0, 1), xycoords="axes fraction", xytext=(left + 9, 14), textcoords="offset points",
            va="center", fontsize=SMALL_PX, color=INKS["quiet"],
        )  # fmt: skip
        left += 26 + 7 * len(text)


class HeatStyle(NamedTuple):
    """How a heat map is annotated."""

    row_title: str = ""
    column_title: str = ""
    rule_after: int = 0
    """A line after that many rows, and columns where there are as many: between old and new; 0: none."""
    least_number: float = 0.0
    """Shares below it get no number."""


PLAIN = HeatStyle()


def heat_map(
    row_names: Sequence[str],
    column_names: Sequence[str],
    shares_RC: NDArray[np.float64],
    prefix: str,
    alt: str,
    style: HeatStyle = PLAIN,
) -> Markup:
    """Shares as a table of coloured cells, cividis from dark (0) to light (1); `nan`: an empty cell.

    Args:
        row_names: R names, from the top.
        column_names: C names.
        shares_RC: float64, R x C, 0..1.
        prefix: of identifiers.
        alt: what it shows.
        style: titles and lines.
    """
    rows, columns = shares_RC.shape
    with _drawing():
        left_px = _left_px(row_names) + (16 if style.row_title else 0)
        width_px = min(max(WIDTH_PX, left_px + LEAST_CELL_PX * columns), WIDEST_PX)
        cell_px = (width_px - left_px - 8) / max(columns, 1)
        names = [short_name(name, LONGEST_COLUMN) for name in column_names]
        is_turned = any(len(name) * 7 > cell_px for name in names)
        head_px = 12 + 7 * max(map(len, names)) if is_turned else 24
        top_px = head_px + (18 if style.column_title else 0)
        canvas = _Canvas(
            rows * ROW_PX + top_px + 8, width_px=width_px, left_px=left_px, right_px=8, top_px=top_px, bottom_px=8
        )
        axes = canvas.axes
        canvas.names_at_left(row_names)
        axes.set_xlim(-0.5, columns - 0.5)
        axes.xaxis.tick_top()
        axes.xaxis.set_label_position("top")
        axes.set_xticks(range(columns), names, rotation=90 if is_turned else 0)
        axes.set_ylabel(style.row_title, fontsize=SMALL_PX)
        axes.set_xlabel(style.column_title, fontsize=SMALL_PX)
        _cells(axes, shares_RC, style.least_number if cell_px >= LEAST_CELL_PX - 2 else 2.0)
        if style.rule_after:
            axes.axhline(style.rule_after - 0.5, color=INKS["ink"], linewidth=1.5)
            if columns == rows:
                axes.axvline(style.rule_after - 0.5, color=INKS["ink"], linewidth=1.5)
        return canvas.finish(prefix, alt)


def _cells(axes: Any, shares_RC: NDArray[np.float64], least_number: float) -> None:
    import matplotlib
    from matplotlib.patches import Rectangle

    colors = matplotlib.colormaps["cividis"]
    for row, column in np.ndindex(*shares_RC.shape):
        share = float(shares_RC[row, column])
        if math.isnan(share):
            continue
        face = matplotlib.colors.to_hex(colors(share))
        cell = Rectangle((column - 0.48, row - 0.47), 0.96, 0.94, facecolor=face, lw=0)
        axes.add_artist(cell)  # as add_patch, without the limits of the data, which are set already
        if share >= least_number:
            ink = INKS["black" if share > BRIGHT_FROM else "white"]
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=SMALL_PX, color=ink)


def bars(items: Sequence[Bar], prefix: str, alt: str, *, unit: str, words: tuple[str, str] | None = None) -> Markup:
    """Horizontal bars on a linear axis from zero; lengths compare as the values do."""
    with _drawing():
        highest = max((max(bar.value + bar.rest, bar.end or 0.0) for bar in items), default=0.0) or 1.0
        names = [bar.name for bar in items]
        texts = [short_name(bar.text, LONGEST_COLUMN) for bar in items]
        longest = max(map(len, texts), default=0)
        top_px = 28 if words else 8
        canvas = _Canvas(
            len(items) * (ROW_PX + 5) + top_px + 40,
            left_px=_left_px(names), right_px=20 + 7 * longest, top_px=top_px, bottom_px=40,
        )  # fmt: skip
        axes = canvas.axes
        canvas.names_at_left(names)
        axes.set_xlim(0, highest)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel(unit, fontsize=SMALL_PX)
        for row, bar in enumerate(items):
            axes.barh(row, bar.value, height=0.6, color=INKS[bar.ink])
            if bar.rest:
                axes.barh(row, bar.rest, left=bar.value, height=0.6, color=INKS["line"])
            if bar.end is not None:
                axes.plot([bar.value, bar.end], [row, row], color=INKS["ink"], linewidth=1.25)
                axes.plot([bar.end, bar.end], [row - 0.2, row + 0.2], color=INKS["ink"], linewidth=1.25, clip_on=False)
            axes.annotate(
                texts[row], (1, row), xycoords=("axes fraction", "data"), xytext=(8, 0), textcoords="offset points",
                va="center", fontsize=SMALL_PX,
            )  # fmt: skip
        if words:
            _key(axes, [(words[0], "square", INKS[items[0].ink]), (words[1], "square", INKS["line"])])
        return canvas.finish(prefix, alt)


def spans(items: Sequence[Span], prefix: str, alt: str, *, unit: str) -> Markup:
    """Values with their intervals, and a mark where the limit is; left of zero nothing was lost."""
    with _drawing():
        known = [
            value
            for span in items
            for value in (span.value, span.low, span.high, span.limit)
            if value is not None and math.isfinite(value)
        ]
        low, high = min([0.0, *known]), max([0.0, *known])
        margin = 0.06 * (high - low or 1.0)
        names = [span.name for span in items]
        canvas = _Canvas(len(items) * (ROW_PX + 3) + 68, left_px=_left_px(names), right_px=64, top_px=28, bottom_px=40)
        axes = canvas.axes
        canvas.names_at_left(names, [not span.is_kept for span in items])
        axes.set_xlim(low - margin, high + margin)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.axvline(0, color=INKS["quiet"], linewidth=1)
        axes.locator_params(axis="x", nbins=6)
        axes.set_xlabel(unit, fontsize=SMALL_PX)
        for row, span in enumerate(items):
            ink = INKS["after" if span.is_kept else "lost"]
            if span.low is not None and span.high is not None:
                axes.plot([span.low, span.high], [row, row], color=ink, linewidth=2.5, solid_capstyle="butt")
            _dot(axes, span.value, row, "after", ink)
            if span.limit is not None:
                axes.plot([span.limit] * 2, [row - 0.42, row + 0.42], color=INKS["ink"], linewidth=2)
            axes.annotate(
                signed(span.value), (1, row), xycoords=("axes fraction", "data"),
                xytext=(56, 0), textcoords="offset points", ha="right", va="center", fontsize=SMALL_PX,
            )  # fmt: skip
        words = [("drop, with its 95 % interval", "after", INKS["after"])]
        if any(span.limit is not None for span in items):
            words.append(("limit", "square", INKS["ink"]))
        _key(axes, words)
        return canvas.finish(prefix, alt)


def curves(lines: Sequence[Curve], prefix: str, alt: str, *, x_title: str, y_title: str, log: bool = False) -> Markup:
    """Lines over one axis; each has its own dashes, and its name in the key."""
    with _drawing():
        rows = -(-len(lines) // 2)
        canvas = _Canvas(200 + 17 * rows, left_px=52, right_px=12, top_px=12 + 17 * rows, bottom_px=38)
        axes = canvas.axes
        for place, line in enumerate(lines):
            ink, dash = INKS[SERIES[place % len(SERIES)]], DASHES[place % len(DASHES)]
            axes.plot(line.x, line.y, color=ink, linestyle=dash, linewidth=1.75, label=short_name(line.name, 30))
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter(lambda _value, _: "")
        else:
            axes.set_ylim(bottom=min(0.0, *(min(line.y) for line in lines)))
        axes.grid(axis="y")
        axes.tick_params(axis="y", labelcolor=INKS["quiet"])
        axes.locator_params(axis="x", nbins=6)
        axes.set_xlabel(x_title, fontsize=SMALL_PX)
        axes.set_ylabel(y_title, fontsize=SMALL_PX)
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, frameon=False, fontsize=SMALL_PX, borderaxespad=0.3,
            handlelength=2.4, columnspacing=1.5, labelspacing=0.25,
        )  # fmt: skip
        return canvas.finish(prefix, alt)
