"""A mask that people can look at: the image with the colours of the classes over it, and a legend.

1. The image stands at the top left in its own size, the legend in a strip under it: it hides nothing. The strip is as
   wide as the image, or as its widest entry where the image is narrower.
2. Pixels of the background are the image's own; its square in the legend is empty. A bundle without a background has
   all its pixels coloured.
3. The legend lists the classes that are present, the largest first, with their share of the pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from edge_ilseg.devices.drawing import Rgb, TextStyle, draw_text, load_style, text_width_px
from edge_ilseg.images import Color

PAPER: Rgb = (255, 255, 255)
INK: Rgb = (34, 34, 34)
FRAME: Rgb = (120, 120, 120)
FONT_PX = (12, 40)
"""The smallest and the largest font; between them, a fortieth of the image's width."""


class PaintedClass(NamedTuple):
    """A class as the overlay shows it; without a colour it is the background (rule 2)."""

    name: str
    color: Color | None


def class_shares(mask_HW: NDArray[np.uint8], class_count: int) -> dict[int, float]:
    """Channel -> share of the pixels in 0..1, for the channels that are present, the largest first.

    Args:
        mask_HW: channels, uint8, H x W, all below `class_count`.
        class_count: K.
    """
    counts = np.bincount(mask_HW.reshape(-1), minlength=class_count)
    order = sorted(np.flatnonzero(counts).tolist(), key=lambda channel: (-counts[channel], channel))
    return {channel: float(counts[channel] / mask_HW.size) for channel in order}


def draw_overlay(
    image_HWC: NDArray[np.uint8],
    mask_HW: NDArray[np.uint8],
    classes: Sequence[PaintedClass],
    shares: Mapping[int, float],
    alpha: float,
) -> Image.Image:
    """The image under its mask, and the legend (rules 1 to 3).

    Args:
        image_HWC: uint8, H x W x 3.
        mask_HW: channels, uint8, H x W.
        classes: in channel order.
        shares: from `class_shares`.
        alpha: weight of the class colours in 0..1; the image has the rest.
    """
    blended = _blend(image_HWC, mask_HW, classes, alpha)
    legend = _draw_legend([(classes[channel], share) for channel, share in shares.items()], blended.width)
    canvas = Image.new("RGB", (legend.width, blended.height + legend.height), PAPER)
    canvas.paste(blended, (0, 0))
    canvas.paste(legend, (0, blended.height))
    return canvas


def _blend(
    image_HWC: NDArray[np.uint8], mask_HW: NDArray[np.uint8], classes: Sequence[PaintedClass], alpha: float
) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(image_HWC))
    painted = Image.fromarray(np.ascontiguousarray(mask_HW))
    painted.putpalette([level for item in classes for level in item.color or PAPER])
    blended = Image.blend(image, painted.convert("RGB"), alpha)
    is_background = np.zeros(256, dtype=np.uint8)
    is_background[[channel for channel, item in enumerate(classes) if item.color is None]] = 255
    return Image.composite(image, blended, Image.fromarray(is_background[mask_HW]))


def _draw_legend(entries: Sequence[tuple[PaintedClass, float]], image_width_px: int) -> Image.Image:
    """Rows of squares and names, filled from left to right in columns of one width."""
    style = load_style(min(max(image_width_px // 40, FONT_PX[0]), FONT_PX[1]))
    texts = [f"{item.name} {percent_text(share)}" for item, share in entries]
    square_px, gap_px = style.height_px, max(style.height_px // 2, 4)
    entry_px = square_px + gap_px + max(text_width_px(text, style) for text in texts)
    width_px = max(image_width_px, entry_px + 2 * gap_px)
    step_px = entry_px + 3 * gap_px
    columns = max((width_px - 2 * gap_px - entry_px) // step_px + 1, 1)
    line_px = style.height_px + gap_px
    rows = -(-len(entries) // columns)
    strip = Image.new("RGB", (width_px, rows * line_px + gap_px), PAPER)
    draw = ImageDraw.Draw(strip)
    for position, ((item, _), text) in enumerate(zip(entries, texts, strict=True)):
        left_px = gap_px + position % columns * step_px
        top_px = gap_px + position // columns * line_px
        _draw_entry(draw, left_px, top_px, item.color, text, style)
    return strip


def _draw_entry(
    draw: ImageDraw.ImageDraw, left_px: int, top_px: int, color: Color | None, text: str, style: TextStyle
) -> None:
    side_px = style.height_px
    box = (left_px, top_px, left_px + side_px - 1, top_px + side_px - 1)
    draw.rectangle(box, fill=color or PAPER, outline=FRAME)
    text_left_px = left_px + side_px + max(side_px // 2, 4)
    draw_text(draw, text_left_px, top_px + side_px / 2, text, style, INK)


def percent_text(share: float) -> str:
    """`"12.3 %"`; a share that would read as nothing is `"<0.1 %"`."""
    return "<0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"
