"""Charts: clean SVG that is the same each time, in the words of the style sheet, whatever the classes are called."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest
from report_world import HOSTILE

from edge_ilseg.report import charts, svg

NASTY = (HOSTILE, "$x^$", "a & b", "日本", "\x00\ud800bell\x07", "  ", "l" * 90)


def every_chart(names: tuple[str, ...] = NASTY) -> dict[str, str]:
    shares = np.linspace(0, 1, len(names) ** 2).reshape(len(names), -1)
    shares[0, 0] = np.nan
    return {
        "dumbbells": charts.dumbbells([charts.Pair(name, 50, 20, True) for name in names], "p", HOSTILE),
        "heat_map": charts.heat_map(names, names, shares, "p", HOSTILE, charts.HeatStyle("truth", "given", 2)),
        "bars": charts.bars([charts.Bar(name, 1, 2, 1.5, name) for name in names], "p", HOSTILE, unit="ms"),
        "spans": charts.spans([charts.Span(name, 1, 0, 3, 2, False) for name in names], "p", HOSTILE, unit="points"),
        "curves": charts.curves(
            [charts.Curve(name, (1, 2, 3), (3, 2, 1)) for name in names],
            *("p", HOSTILE), x_title="i", y_title="l", log=True,
        ),
    }  # fmt: skip


@pytest.fixture(scope="module")
def drawn() -> dict[str, str]:
    return every_chart()


def test_a_chart_is_well_formed_and_has_only_what_is_allowed(drawn: dict[str, str]) -> None:
    for name, text in drawn.items():
        root = ElementTree.fromstring(text)
        assert {element.tag for element in root.iter()} <= svg.ELEMENTS, name
        allowed = svg.ATTRIBUTES | svg.STYLES | {"class", "role", "aria-label"}
        assert {key for element in root.iter() for key in element.attrib} <= allowed, name


def test_a_hostile_class_name_stays_a_text(drawn: dict[str, str]) -> None:
    for name, text in drawn.items():
        assert "<script" not in text, name
        assert ElementTree.fromstring(text).attrib["aria-label"] == HOSTILE
        assert any((item.text or "").startswith("<script>alert(1)</s") for item in ElementTree.fromstring(text).iter())


def test_a_dollar_is_a_dollar(drawn: dict[str, str]) -> None:
    assert all("$x^$" in text for text in drawn.values())


def test_the_same_data_gives_the_same_bytes(drawn: dict[str, str]) -> None:
    assert every_chart() == drawn


def test_colours_are_words_of_the_style_sheet(drawn: dict[str, str]) -> None:
    from edge_ilseg.report.page import read_style

    style = read_style()
    for text in drawn.values():
        assert "#0101" not in text
        for word in set(re.findall(r'class="([^"]*)"', text)):
            assert all(f".{item} " in style for item in word.split()), word
    assert 'class="f-lost"' in drawn["dumbbells"]


def test_two_charts_of_one_page_share_no_identifier() -> None:
    pairs = [charts.Pair("a", 1, 2), charts.Pair("b", 3, 4)]
    first, second = (charts.dumbbells(pairs, prefix, "x") for prefix in ("one", "two"))
    ids = [set(re.findall(r' id="([^"]*)"', text)) for text in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]
    assert set(re.findall(r'(?:href="#|url\(#)([^")]*)', first)) == ids[0]


def test_a_class_without_a_value_has_a_row_and_no_mark() -> None:
    with_value = charts.dumbbells([charts.Pair("a", 10, 20)], "p", "x")
    without = charts.dumbbells([charts.Pair("a", None, None)], "p", "x")
    assert ">a<" in without
    assert len(without) < len(with_value)


def test_an_empty_cell_is_empty_and_others_have_their_number() -> None:
    text = charts.heat_map(["a", "b"], ["x"], np.array([[np.nan], [0.421]]), "p", "x")
    assert text.count(">42<") == 1
    assert "nan" not in text
    cell = matplotlib.colors.to_hex(matplotlib.colormaps["cividis"](0.421))
    assert text.count(f'fill="{cell}"') == 1


def test_a_wide_heat_map_grows_and_a_small_one_fits_a_phone() -> None:
    widths = [
        float(ElementTree.fromstring(charts.heat_map(names, names, np.eye(len(names)), "p", "x")).attrib["width"])
        for names in (["a"] * 4, ["a"] * 24)
    ]
    assert widths[0] == charts.WIDTH_PX < widths[1] <= charts.WIDEST_PX


def test_a_word_that_is_no_colour_stays_as_it_is() -> None:
    data = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><path d="M 0.123456 0" style="fill: #ff0000"/></svg>'
    )
    assert svg.tidy(data, "p", "x") == (
        '<svg viewBox="0 0 9 9" width="9" height="9" role="img" aria-label="x">'
        '<path d="M 0.12 0" fill="#ff0000" /></svg>'
    )


def test_what_could_act_does_not_get_through() -> None:
    data = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9" onload="x()"><script>x()</script>'
        '<foreignObject/><a href="x"><text>y</text></a><g onclick="x()"><text style="font: 12px f">t</text></g></svg>'
    )
    text = svg.tidy(data, "p", "x")
    assert '<g><text font-size="12">t</text></g></svg>' in text
    assert not re.search("script|onload|onclick|foreign|<a", text)
