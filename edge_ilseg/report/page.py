"""One HTML file that stands alone: templates, the style sheet inside the page, and a policy that lets nothing else in.

1. Every value is escaped by Jinja2 unless it is `Markup`, and `Markup` is made in two places alone: here, of the style
   sheet, and in `edge_ilseg.report.svg`, of pictures that were parsed and written anew.
2. The page asks nobody for anything: its Content-Security-Policy allows the one style sheet that it carries, by hash,
   and images from `data:` URIs. There is no script and no `style` attribute.
3. A name that the context lacks is an error, never an empty place.
4. The same context gives the same bytes.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from edge_ilseg import __version__
from edge_ilseg.errors import check_extra

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"
STYLE_NAME = "style.css"
GENERATOR = "edge-ilseg"
DASH, MINUS = "\u2013", "\u2212"
MIB = 1 << 20


def render(template_name: str, **context: object) -> str:
    """The page that a template of `templates/` makes of a context.

    A page extends `base.html.j2` and fills its blocks `title` and `content` (and, if it wants, `header`, `footer`).
    `contents`, a sequence of (anchor, title), gives the list of sections at the side; without it there is none.

    Raises:
        MissingPackageError: Jinja2 is not installed.
        jinja2.UndefinedError: the template uses a name that is not in the context (rule 3).
    """
    check_extra("report", ["jinja2"], "a report for people")
    from markupsafe import Markup

    style = read_style()
    frame = {"contents": (), "generator": f"{GENERATOR} {__version__}"}
    own = {"style": Markup(style), "policy": policy(style)}  # rule 1: a file of this package
    return _environment().get_template(template_name).render({**frame, **context, **own})


@functools.cache
def read_style() -> str:
    """The style sheet as the page has it: without comments, and with no line break at its ends."""
    text = (TEMPLATES / STYLE_NAME).read_text(encoding="utf-8")
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


def policy(style: str) -> str:
    """The Content-Security-Policy of rule 2."""
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=percent, points=points, number=number, size=size, short_id=short_id, interval=interval, count=count
    )
    return environment


def percent(share: float | None, digits: int = 1) -> str:
    """A share 0..1 as per cent, without the sign: `59.7`; a dash where there is none."""
    return DASH if share is None else f"{100 * share:.{digits}f}"


def points(value: float | None, digits: int = 1) -> str:
    """Percentage points with their sign: `+1.2`, or with a real minus sign; a dash where there are none."""
    if value is None:
        return DASH
    return f"{round(value, digits) + 0.0:+.{digits}f}".replace("-", MINUS)


def number(value: float | None, digits: int = 3) -> str:
    """A number in so many significant digits, and never fewer than it has before the point; a dash for none."""
    if value is None:
        return DASH
    if value == 0 or abs(value) >= 10 ** (digits - 1):
        return count(round(value)) if abs(value) >= 1 else "0"
    return f"{value:.{digits}g}".replace("-", MINUS)


def count(value: int | None) -> str:
    """A whole number with thin spaces between thousands."""
    return DASH if value is None else f"{value:,}".replace(",", "\u202f").replace("-", MINUS)


def size(byte_count: int | None) -> str:
    """Bytes as a person reads them: `812 B`, `12.3 KiB`, `4.56 MiB`."""
    if byte_count is None:
        return DASH
    if byte_count < 1024:
        return f"{byte_count} B"
    if byte_count < MIB:
        return f"{byte_count / 1024:.3g} KiB" if byte_count < 999.5 * 1024 else f"{byte_count / MIB:.2f} MiB"
    return f"{byte_count / MIB:.3g} MiB" if byte_count < 999.5 * MIB else f"{byte_count / MIB:.0f} MiB"


def interval(low: float | None, high: float | None, digits: int = 1) -> str:
    """`0.4 to 1.9`; a dash where an end is not known."""
    if low is None or high is None:
        return DASH
    return f"{low:.{digits}f} to {high:.{digits}f}".replace("-", MINUS)


def short_id(identifier: str | None) -> str:
    """The first twelve digits of a hash, as everywhere in this project."""
    return DASH if identifier is None else identifier[:12]
