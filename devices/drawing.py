"""Text in pictures: Pillow's own font, so that no file of the machine is needed.

1. The font holds ASCII and nothing else. Other letters lose their accent (`café`: `cafe`) or become `?`; reports keep
   the names as they are.
2. Where Pillow was built without FreeType, its one small bitmap font is used, whatever the size asked for.
"""

from __future__ import annotations

import functools
import unicodedata
from typing import NamedTuple

from PIL import ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Rgb = tuple[int, int, int]


class TextStyle(NamedTuple):
    """A font and its height from the top of the tallest letter to the bottom of the lowest, px."""

    font: Font
    height_px: int


@functools.lru_cache(maxsize=16)
def load_style(size_px: int) -> TextStyle:
    """The default font in a size (rule 2)."""
    font: Font
    try:
        font = ImageFont.load_default(size_px)
    except ImportError:  # Pillow's way to say that it has no FreeType
        font = ImageFont.load_default()
    _, top, _, bottom = font.getbbox("Ag|")
    return TextStyle(font, round(bottom - top))


def plain_text(text: str) -> str:
    """`text` in letters that the font has (rule 1)."""
    letters = (char for char in unicodedata.normalize("NFKD", text) if not unicodedata.combining(char))
    return "".join(char if " " <= char <= "~" else "?" for char in letters)


def text_width_px(text: str, style: TextStyle) -> int:
    """How wide `draw_text` makes a text."""
    return round(style.font.getlength(plain_text(text)))


def shorten(text: str, style: TextStyle, most_px: int) -> str:
    """The text, or its beginning with `...`, so that it is at most `most_px` wide."""
    if text_width_px(text, style) <= most_px:
        return text
    while text and text_width_px(text + "...", style) > most_px:
        text = text[:-1]
    return text + "..."


def draw_text(
    draw: ImageDraw.ImageDraw, left_px: float, middle_px: float, text: str, style: TextStyle, color: Rgb
) -> None:
    """Write a text from `left_px` on, its letters centred on the height `middle_px`."""
    _, top, _, bottom = style.font.getbbox("Ag|")
    draw.text((left_px, middle_px - (top + bottom) / 2), plain_text(text), fill=color, font=style.font)
