"""The pages in a real browser: they fit, ask nobody, run nothing, and can be used by keyboard and by screen readers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from report_world import HOSTILE, make_workspace, verify

from edge_ilseg.cli import run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

PHONE_PX, DESK_PX = 390, 1280
HEADER = "iteration,loss,kd_output,encoder_rate,decoder_rate,images_per_s,miou_old,miou_new,miou_all"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A step's page with every section filled, and a comparison; one class has a hostile name."""
    folder = tmp_path_factory.mktemp("world")
    workspace = make_workspace(folder, new=HOSTILE)
    rows = [f"{number},{2 / number},{1 / number},0.1,0.01,50,,," for number in range(10, 200, 10)]
    (workspace.step_folder("01-step") / "training.csv").write_text("\n".join([HEADER, *rows]))
    verify(workspace)
    one, two = folder / f"{HOSTILE.replace('/', '_')}.html", folder / "two.html"
    assert run(["report", str(workspace.root), "--out", str(one)]) == 0
    assert run(["report", str(workspace.root), "--compare", "00-base", "01-step", "--out", str(two)]) == 0
    return {"step": one, "comparison": two}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as found:
        browser = found.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: Browser, path: Path, *, width_px: int = DESK_PX, scheme: Any = "light") -> tuple[Page, list[str]]:
    """The page, and everything that it said, asked for or tried to pop up."""
    page = browser.new_context(viewport={"width": width_px, "height": 900}, color_scheme=scheme).new_page()
    heard: list[str] = []
    page.on("console", lambda message: heard.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: heard.append(f"error: {error}"))
    page.on("dialog", lambda dialog: heard.append(f"dialog: {dialog.message}"))
    page.on("request", lambda request: heard.append(f"request: {request.url}"))
    page.goto(path.as_uri())
    return page, [item for item in heard if item != f"request: {path.as_uri()}" and "request: data:" not in item]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width_px", [PHONE_PX, DESK_PX])
@pytest.mark.parametrize("name", ["step", "comparison"])
def test_a_page_fits_and_is_silent(
    browser: Browser, pages: dict[str, Path], name: str, width_px: int, scheme: str
) -> None:
    page, heard = opened(browser, pages[name], width_px=width_px, scheme=scheme)
    assert heard == []
    widths = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert widths[0] <= widths[1] == width_px
    page.context.close()


@pytest.mark.parametrize(("width_px", "scheme"), [(DESK_PX, "light"), (PHONE_PX, "dark")])
@pytest.mark.parametrize("name", ["step", "comparison"])
def test_a_page_has_no_barrier_that_axe_knows(
    browser: Browser, pages: dict[str, Path], name: str, width_px: int, scheme: str
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page, _ = opened(browser, pages[name], width_px=width_px, scheme=scheme)
    page.evaluate("for (const item of document.querySelectorAll('details')) item.open = true")
    found = axe.Axe().run(page).response["violations"]
    assert [(item["id"], item["nodes"][0]["html"][:200]) for item in found] == []
    page.context.close()


def test_a_hostile_class_name_is_shown_and_does_nothing(browser: Browser, pages: dict[str, Path]) -> None:
    page, heard = opened(browser, pages["step"])
    assert heard == []
    assert page.evaluate("document.scripts.length") == 0
    assert HOSTILE in page.inner_text("body")
    texts = page.evaluate("[...document.querySelectorAll('svg text')].map(item => item.textContent)")
    assert any(text.startswith("<script>alert(1)</s") for text in texts)
    alts = page.evaluate("[...document.images].map(item => item.alt)")
    assert any(HOSTILE in alt for alt in alts)
    page.context.close()


def test_every_picture_is_there_and_has_a_text(browser: Browser, pages: dict[str, Path]) -> None:
    page, _ = opened(browser, pages["step"])
    images = page.evaluate("[...document.images].map(item => [item.naturalWidth, item.alt])")
    assert len(images) == 30
    assert all(width > 0 and alt for width, alt in images)
    labels = page.evaluate("[...document.querySelectorAll('figure svg')].map(item => item.ariaLabel)")
    assert len(labels) >= 9
    assert all(labels)
    page.context.close()


def test_landmarks_and_headings_tell_the_structure(browser: Browser, pages: dict[str, Path]) -> None:
    page, _ = opened(browser, pages["step"])
    assert page.evaluate("['header', 'nav', 'main', 'footer'].map(n => document.querySelectorAll(n).length)") == [1] * 4
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(item => +item.tagName[1])")
    assert levels.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels))
    links = page.evaluate("[...document.querySelectorAll('nav a')].map(item => item.hash)")
    assert links == page.evaluate("[...document.querySelectorAll('section')].map(item => '#' + item.id)")
    page.context.close()


def test_everything_can_be_reached_by_keyboard(browser: Browser, pages: dict[str, Path]) -> None:
    page, _ = opened(browser, pages["step"], width_px=PHONE_PX)
    reachable = page.evaluate("document.querySelectorAll('a[href], summary, [tabindex=\"0\"]').length")
    hidden = page.evaluate("document.querySelectorAll('details [tabindex=\"0\"]').length")
    seen = set()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    for _ in range(reachable + 5):
        seen.add(
            page.evaluate(
                "[...document.querySelectorAll('a[href], summary, [tabindex=\"0\"]')].indexOf(document.activeElement)"
            )
        )
        page.keyboard.press("Tab")
    assert len(seen - {-1}) == reachable - hidden
    page.reload()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.context.close()


def test_a_folded_table_opens_by_keyboard(browser: Browser, pages: dict[str, Path]) -> None:
    page, _ = opened(browser, pages["step"])
    page.focus("summary")
    page.keyboard.press("Enter")
    assert page.evaluate("document.querySelector('details').open") is True
    page.context.close()


def test_dark_is_dark_and_print_is_light_with_everything_unfolded(browser: Browser, pages: dict[str, Path]) -> None:
    page, _ = opened(browser, pages["step"], scheme="dark")
    color = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(color) == "rgb(20, 23, 26)"
    hidden_px = page.evaluate("document.querySelector('details table').getBoundingClientRect().height")
    page.emulate_media(media="print")
    assert page.evaluate(color) == "rgb(255, 255, 255)"
    visible = page.evaluate("document.querySelector('details table').checkVisibility({contentVisibilityAuto: true})")
    assert visible is True
    assert hidden_px == 0 or visible
    assert len(page.pdf(format="A4")) > 20_000
    page.context.close()


def test_a_table_can_be_copied_as_columns(browser: Browser, pages: dict[str, Path]) -> None:
    page, _ = opened(browser, pages["step"])
    text = page.evaluate(
        "(() => { const s = getSelection(); s.selectAllChildren(document.querySelector('#classes table'));"
        " return s.toString() })()"
    )
    lines = [line.split("\t") for line in text.strip().splitlines() if "\t" in line]
    assert ["apple", "89.0", "30.0", "\u221259.0", "forgotten"] in lines
    page.context.close()
