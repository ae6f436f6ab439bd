"""SVG for the inside of a page: what matplotlib writes, parsed and written anew.

1. Only elements and attributes of a list get through; comments, metadata, scripts, links and `style` go. What is left
   is written by an XML writer, so that no text can become markup.
2. Colours are words. `INKS` gives each word a colour for matplotlib; in the page it becomes a class, which the style
   sheet fills in for light, dark and print. A colour that is no such word stays as it is.
3. Identifiers get the chart's prefix, so that two charts in one page do not meet; those that nothing refers to go.
4. A picture has one text for those who do not see it: `role="img"` and `aria-label`.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from markupsafe import Markup

SVG = "{http://www.w3.org/2000/svg}"
XLINK_HREF = "{http://www.w3.org/1999/xlink}href"
ELEMENTS: Final = frozenset({"svg", "g", "path", "rect", "circle", "text", "tspan", "defs", "clipPath", "use"})
ATTRIBUTES: Final = frozenset(
    {
        *("viewBox", "d", "x", "y", "x1", "y1", "x2", "y2", "cx", "cy", "r", "width", "height", "transform"),
        *("clip-path", "id", "href", "points"),
    }
)
STYLES: Final = frozenset(
    {
        *("fill", "stroke", "stroke-width", "stroke-dasharray", "stroke-dashoffset", "opacity", "fill-opacity"),
        *("stroke-opacity", "font-size", "font-weight", "text-anchor", "clip-path"),
    }
)
INKS: Final[dict[str, str]] = {
    name: f"#0101{number:02x}"
    for number, name in enumerate(
        (
            *("ink", "quiet", "paper", "line", "before", "after", "int8", "lost", "gained", "black", "white"),
            *(f"data-{place}" for place in range(1, 7)),
        ),
        start=1,
    )
}
"""Word of the style sheet -> the colour that stands for it while matplotlib draws."""
_WORDS: Final = {color: word for word, color in INKS.items()}
_NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
_REFERENCE = re.compile(r"#([\w.-]+)")
_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def clean_text(text: str) -> str:
    """The text without the characters that XML cannot hold."""
    return _FORBIDDEN.sub("\ufffd", text)


def tidy(data: str, prefix: str, alt: str) -> Markup:
    """A chart of matplotlib's for the page (rules 1 to 4).

    Args:
        data: the SVG document.
        prefix: of its identifiers; letters, digits and dashes.
        alt: what it shows, in a sentence.
    """
    from markupsafe import Markup

    root = ElementTree.fromstring(re.sub(r"<!DOCTYPE[^>]*>", "", data))  # written by matplotlib in this process
    used = {
        match
        for element in root.iter()
        for value in element.attrib.values()
        for match in _REFERENCE.findall(value)
        if value.startswith(("#", "url(#")) or "url(#" in value
    }
    kept = _copy(root, prefix, used)
    if kept is None:
        raise ValueError(f"not an SVG: {root.tag}")
    width, height = (float(value) for value in kept.attrib["viewBox"].split()[2:])
    kept.attrib.update(width=f"{width:.0f}", height=f"{height:.0f}", role="img")
    kept.attrib["aria-label"] = clean_text(alt)
    return Markup(ElementTree.tostring(kept, encoding="unicode"))  # rule 1 of page.py: written by an XML writer


def _copy(element: ElementTree.Element, prefix: str, used: set[str]) -> ElementTree.Element | None:
    """The element with what rule 1 lets through; None where nothing is left."""
    tag = element.tag.removeprefix(SVG) if isinstance(element.tag, str) else ""
    if tag not in ELEMENTS:
        return None
    kept = ElementTree.Element(tag)
    given = {("href" if key == XLINK_HREF else key): value for key, value in element.attrib.items()}
    style = dict(_declarations(given.pop("style", "")))
    classes: list[str] = []
    for key, value in {**given, **style}.items():
        if key in ("fill", "stroke") and value in _WORDS:
            classes.append(f"{key[0]}-{_WORDS[value]}")
        elif key == "id":
            if value in used:
                kept.attrib["id"] = f"{prefix}-{value}"
        elif key in ATTRIBUTES or key in STYLES:
            kept.attrib[key] = _shorten(key, value, prefix)
    if classes:
        kept.attrib["class"] = " ".join(classes)
    if tag in ("text", "tspan"):
        kept.text = element.text
    for child in element:
        copied = _copy(child, prefix, used)
        if copied is not None:
            kept.append(copied)
    is_empty = not len(kept) and not kept.text
    return None if is_empty and tag in ("g", "defs", "text", "tspan") else kept


def _declarations(style: str) -> list[tuple[str, str]]:
    """`"fill: none; font: 12px 'DejaVu Sans'"` to pairs; of a font the size alone is kept, and that it is bold."""
    pairs = []
    for item in style.split(";"):
        key, _, value = (part.strip() for part in item.partition(":"))
        if key == "font":
            size = re.search(r"([\d.]+)px", value)
            pairs += [("font-size", size.group(1))] if size else []
            pairs += [("font-weight", "600")] if "bold" in value or re.match(r"[67]00", value) else []
        elif key == "font-size":
            pairs.append((key, value.removesuffix("px")))
        elif key:
            pairs.append((key, value))
    return pairs


def _shorten(key: str, value: str, prefix: str) -> str:
    """Two decimals are a hundredth of a pixel; references get the prefix (rule 3)."""
    if key == "href" or "url(#" in value:
        return _REFERENCE.sub(lambda match: f"#{prefix}-{match.group(1)}", value)
    if key in ("opacity", "fill-opacity", "stroke-opacity"):
        return value
    shorter = _NUMBER.sub(lambda match: f"{float(match.group()):.2f}".rstrip("0").rstrip("."), value)
    return " ".join(shorter.split())
