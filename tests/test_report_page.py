"""The frame of every page: everything is escaped, nothing comes from elsewhere, and numbers read as they should."""

from __future__ import annotations

import base64
import hashlib
import re

import jinja2
import pytest
from report_world import HOSTILE

from edge_ilseg.report import page
from edge_ilseg.report.blocks import Facts, Heading, Note, Section, Table, Tile

CONTEXT = {"title": "t", "eyebrow": "e", "summary": "s", "banner": None, "tiles": (), "sections": ()}


def test_every_text_of_a_page_is_escaped_wherever_it_stands() -> None:
    blocks = [
        Table(HOSTILE, (HOSTILE, "n"), [(HOSTILE, HOSTILE)]),
        Facts([(HOSTILE, HOSTILE)]),
        Note(HOSTILE),
        Heading(HOSTILE, "passed"),
    ]
    context = {
        **CONTEXT,
        "title": HOSTILE,
        "summary": HOSTILE,
        "tiles": [Tile(HOSTILE, HOSTILE, '"><img src=x>')],
        "sections": [Section("a", HOSTILE, HOSTILE, blocks)],
        "contents": [('"><script>', HOSTILE)],
    }
    html = page.render("report.html.j2", **context)
    assert "<script" not in html
    assert "<img" not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 12


def test_the_policy_lets_in_the_pages_own_style_and_nothing_else() -> None:
    html = page.render("report.html.j2", **CONTEXT)
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    found = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
    assert style is not None
    assert found is not None
    digest = base64.b64encode(hashlib.sha256(style.group(1).encode()).digest()).decode()
    policy = found.group(1).replace("&#39;", "'")
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    )
    assert " style=" not in html
    assert not re.search(r"https?://", html)


def test_a_name_that_is_missing_from_the_context_is_an_error() -> None:
    context = {name: value for name, value in CONTEXT.items() if name != "tiles"}
    with pytest.raises(jinja2.UndefinedError, match="tiles"):
        page.render("report.html.j2", **context)


def test_a_caller_cannot_put_another_style_sheet_into_the_page() -> None:
    html = page.render("report.html.j2", **CONTEXT, style="</style><script>", policy="default-src *")
    assert "default-src *" not in html
    assert "<script" not in html


def test_the_same_context_gives_the_same_bytes() -> None:
    assert page.render("report.html.j2", **CONTEXT) == page.render("report.html.j2", **CONTEXT)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (page.percent(0.59666), "59.7"),
        (page.percent(None), page.DASH),
        (page.points(1.25), "+1.2"),
        (page.points(-3.4), f"{page.MINUS}3.4"),
        (page.points(-0.0001), "+0.0"),
        (page.points(None), page.DASH),
        (page.number(0.098612), "0.0986"),
        (page.number(12.34), "12.3"),
        (page.number(1234.5), "1\u202f234"),
        (page.number(0.0), "0"),
        (page.number(-0.5), f"{page.MINUS}0.5"),
        (page.number(-2.0), f"{page.MINUS}2"),
        (page.number(None), page.DASH),
        (page.count(1234567), "1\u202f234\u202f567"),
        (page.size(0), "0 B"),
        (page.size(1023), "1023 B"),
        (page.size(9000), "8.79 KiB"),
        (page.size(1024 * 1024 - 1), "1.00 MiB"),
        (page.size(5 << 20), "5 MiB"),
        (page.size(None), page.DASH),
        (page.interval(-0.25, 1.94), f"{page.MINUS}0.2 to 1.9"),
        (page.interval(None, 1.0), page.DASH),
        (page.short_id("0123456789abcdef"), "0123456789ab"),
    ],
)
def test_numbers_read_as_they_should(text: str, expected: str) -> None:
    assert text == expected
