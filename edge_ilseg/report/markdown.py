"""Markdown and its YAML header from texts that nobody has checked: a class may be named anything.

1. A text is shown letter for letter, in one line, and means nothing to Markdown, HTML or a table; signs that cannot be
   printed become spaces.
2. A YAML text is a double-quoted scalar in printable ASCII: it says the same to every parser, and cannot end early.

Plain Python: a device has no Jinja2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

SPECIAL = re.compile(r"[\\`*_\[\]#!|~$@]|:(?=//)|(?<=www)\.")
"""What Markdown, or one of its dialects, would take for more than itself: links without brackets, too."""
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
YAML_ESCAPES = {'"': '\\"', "\\": "\\\\"}

Yaml = str | int | float | Sequence["Yaml"] | Mapping[str, "Yaml"]


def text(value: str) -> str:
    """A text inside a line or a cell (rule 1)."""
    flat = "".join(sign if sign.isprintable() else " " for sign in value)
    escaped = SPECIAL.sub(lambda match: "\\" + match[0], re.sub(r"\s+", " ", flat).strip())
    return "".join(ENTITIES.get(sign, sign) for sign in escaped) or "(empty)"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """Lines of a table, with an empty one after it; the first `left` columns to the left, the others to the right.

    Cells are Markdown already: names go through `text`.
    """
    if not rows:
        return []
    marks = ["---" if place < left else "---:" for place in range(len(header))]
    return ["", *(f"| {' | '.join(row)} |" for row in (header, marks, *rows)), ""]


def yaml_text(value: str) -> str:
    """Rule 2."""
    return '"' + "".join(_yaml_sign(sign) for sign in value) + '"'


def yaml_lines(value: Mapping[str, Yaml] | Sequence[Yaml], indent: int = 0) -> list[str]:
    """A mapping or a list in block style. Keys are ours and are written as they are."""
    lines = []
    pad = " " * indent
    items = value.items() if isinstance(value, Mapping) else [("-", item) for item in value]
    for key, item in items:
        start = f"{pad}-" if key == "-" else f"{pad}{key}:"
        if isinstance(item, str):
            lines.append(f"{start} {yaml_text(item)}")
        elif isinstance(item, (int, float)):
            lines.append(f"{start} {item}")
        elif key == "-":
            inner = yaml_lines(item, indent + 2)
            lines += [f"{start} {inner[0].lstrip()}", *inner[1:]]
        else:
            lines += [start, *yaml_lines(item, indent + 2)]
    return lines


def _yaml_sign(sign: str) -> str:
    code = ord(sign)
    if sign in YAML_ESCAPES:
        return YAML_ESCAPES[sign]
    if 0x20 <= code < 0x7F:
        return sign
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
