"""The page of a fleet: its numbers by hand, hostile names, and how it looks in a real browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet_world import BUNDLES, DEVICES, HOSTILE_CLASS, HOSTILE_REASON, STEPS, write_fleet

from edge_ilseg.cli import run
from edge_ilseg.devices.update.reporting import ActiveModel, DeviceReport
from edge_ilseg.fleet import Collected, fleet_status, read_reports
from edge_ilseg.report import fleet_page as page_module
from edge_ilseg.report.fleet_numbers import (
    lost_classes,
    parse_time,
    progress,
    read_clock,
    reasons,
    roll_backs,
    versions_in_use,
)
from edge_ilseg.report.fleet_page import fleet_page

CHROMIUM = Path("/usr/bin/chromium")


def report(device: str, event: str, **others: Any) -> DeviceReport:
    fields: dict[str, Any] = {
        "device_id": device,
        "group": "lab",
        "created": "2026-06-01T00:00:00+00:00",
        "event": event,
        "release": 1,
        "bundle_id": BUNDLES[1],
        "step_name": STEPS[1],
    }
    return DeviceReport(**{**fields, **others})


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_fleet(tmp_path_factory.mktemp("fleet") / "reports")
    (folder / "broken.json").write_bytes(b"{")
    return folder


@pytest.fixture(scope="module")
def collected(fleet: Path) -> Collected:
    return read_reports(fleet)


@pytest.fixture(scope="module")
def page(collected: Collected) -> str:
    return fleet_page(collected, "reports")


def test_the_models_in_use_are_counted_by_device_and_group(collected: Collected) -> None:
    newest, factory = versions_in_use(fleet_status(collected).devices)
    assert (newest.release, newest.step_name, newest.devices) == (3, STEPS[3], DEVICES * 9 // 10)
    assert (factory.release, factory.devices) == (None, DEVICES // 10)
    assert sum(newest.groups.values()) == newest.devices
    (unknown,) = versions_in_use(fleet_status(Collected({"a": (report("a", "failed"),)}, (), 0)).devices)
    assert (unknown.bundle_id, unknown.step_name) == (None, "not told")


def test_wrong_clocks_are_left_out_and_counted(collected: Collected) -> None:
    clock = read_clock(collected.by_device)
    assert clock.wrong == 2  # of 1970 and of 2150
    assert clock.now is not None
    assert (clock.now.year, clock.start) == (2026, parse_time("2026-06-01T06:00:00+00:00"))
    assert read_clock({}).now is None
    assert parse_time("0001-01-01T00:00:00+14:00") is None
    assert parse_time("not a time") is None


def test_confirmations_spread_over_days_and_a_device_counts_once(collected: Collected) -> None:
    found = progress(collected.by_device, fleet_status(collected).releases, read_clock(collected.by_device))
    assert [item.release for item in found] == [3, 2, 1]
    first = found[-1]
    assert first.days[0] == pytest.approx(0.2)
    assert first.confirmed == tuple(range(1, DEVICES * 9 // 10 - 1))  # without the two wrong clocks
    assert list(first.days) == sorted(first.days)
    twice = {"a": (report("a", "confirmed"), report("a", "confirmed", sequence=2))}
    (once,) = progress(twice, fleet_status(Collected(twice, (), 0)).releases, read_clock(twice))
    assert once.confirmed == (1,)


def test_reasons_that_differ_in_numbers_alone_are_one(collected: Collected) -> None:
    found = reasons(collected.by_device)
    assert [(item.event, len(item.devices)) for item in found] == [("gate refused", 6), ("rolled back", 6)]
    assert "tree" in found[0].text
    assert [item.text for item in reasons({"a": (report("a", "rejected"),)})] == ["no reason was given"]


def test_lost_classes_and_roll_backs_are_found(collected: Collected) -> None:
    lost = {item.name: item for item in lost_classes(collected.by_device)}
    assert (lost["tree"].devices, lost["tree"].worst_drop_pct, lost["tree"].releases) == (6, 11.6, (2,))
    assert HOSTILE_CLASS in lost
    back = roll_backs(collected.by_device)
    assert [item.device_id for item in back[-2:]] == ["camera-027", "camera-007"]
    assert {item.reason for item in back} == {HOSTILE_REASON}


def test_the_same_reports_give_the_same_page(collected: Collected, page: str) -> None:
    assert fleet_page(collected, "reports") == page


def test_hostile_names_are_text_everywhere(page: str) -> None:
    lowered = page.lower()
    assert "<script" not in lowered
    assert "<img" not in lowered
    assert "<b>quay" not in lowered
    assert "&lt;script&gt;alert" in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page


def test_the_page_has_a_table_for_every_chart(page: str) -> None:
    for caption in (
        "Models in use, and in which groups",
        "Releases, devices each counted once",
        "By class",
        "By reason",
    ):
        assert caption in page
    assert len(re.findall(r'<svg[^>]* role="img"[^>]* aria-label="[^"]{20,}"', page)) == 6
    for cells in ("54 (90 %)", "48 of 54", "22.2", "11.6", "no reports"):
        assert cells in page


def test_what_there_is_no_room_for_is_counted(collected: Collected, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MOST_ROWS", "MOST_BARS"):
        monkeypatch.setattr(page_module, name, 1)
    monkeypatch.setattr(page_module, "MOST_LISTED", 2)
    cut = fleet_page(collected, "reports")
    for text in (
        "1 of 60 devices",
        "1 of 3 releases",
        "1 of 2 classes",
        "1 of 6 roll-backs",
        "2 of 3 groups",
        "4 more",
    ):
        assert text in cut


def test_an_empty_fleet_has_a_page_of_sentences() -> None:
    empty = fleet_page(Collected({}, (), 0), "reports")
    for text in (
        "0 devices",
        "No device has sent a report.",
        "No device has refused a release",
        "No gate has reported",
    ):
        assert text in empty
    assert "<svg" not in empty


def test_devices_that_have_told_little_are_on_the_page() -> None:
    reports = {"a": (report("a", "failed", release=None, bundle_id=None, step_name=None),)}
    little = fleet_page(Collected(reports, (), 0), "reports")
    assert "not told" in little
    active = report("b", "confirmed", active=ActiveModel(BUNDLES[1], STEPS[1], 1))
    assert "1: 01-boat" in fleet_page(Collected({"b": (active,)}, (), 0), "reports")


def test_the_command_writes_the_page_and_replaces_nothing_else(
    fleet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "fleet.html"
    assert run(["fleet", "report", str(fleet), "--out", str(out)]) == 0
    assert "report: " in capsys.readouterr().out
    assert run(["fleet", "report", str(fleet), "--out", str(out)]) == 0
    assert out.stat().st_size < 1 << 20
    (tmp_path / "mine.html").write_text("mine")
    assert run(["fleet", "report", str(fleet), "--out", str(tmp_path / "mine.html")]) == 3
    assert "no report of this program" in capsys.readouterr().err
    assert run(["fleet", "report", str(tmp_path / "none"), "--out", str(tmp_path / "a.html")]) == 3
    assert "the folder of reports is missing" in capsys.readouterr().err


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip(f"there is no {CHROMIUM}: this test looks at the page in a real browser (Debian: chromium)")
    sync_api = pytest.importorskip("playwright.sync_api", reason="the package playwright drives the browser")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize(("width_px", "scheme"), [(1280, "light"), (390, "dark")])
def test_a_browser_shows_the_page_quietly(browser: Any, page: str, tmp_path: Path, width_px: int, scheme: str) -> None:
    (tmp_path / "fleet.html").write_text(page, encoding="utf-8")
    context = browser.new_context(viewport={"width": width_px, "height": 900}, color_scheme=scheme, offline=True)
    said: list[str] = []
    asked: list[str] = []
    view = context.new_page()
    view.on("console", lambda message: said.append(message.text))
    view.on("pageerror", lambda error: said.append(str(error)))
    view.on("dialog", lambda dialog: (said.append("dialog"), dialog.dismiss()))
    view.on("request", lambda request: asked.append(request.url))
    view.goto((tmp_path / "fleet.html").as_uri())
    assert said == []
    assert [url.split("/")[-1] for url in asked] == ["fleet.html"]
    assert view.evaluate("document.documentElement.scrollWidth") <= width_px
    assert view.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 26)"
    )
    assert view.locator("h1").inner_text() == f"{DEVICES} devices"
    assert view.locator("main section").count() == 7
    assert view.locator("script, iframe, object, link").count() == 0
    view.locator("summary").first.click()
    assert view.locator("details").first.get_attribute("open") is not None
    assert view.locator("details table").first.is_visible()
    context.close()


def test_the_page_is_accessible(browser: Any, page: str, tmp_path: Path) -> None:
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="the package axe-playwright-python judges"
    )
    bare = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)  # axe is a script
    (tmp_path / "fleet.html").write_text(bare, encoding="utf-8")
    for scheme in ("light", "dark"):
        context = browser.new_context(color_scheme=scheme)
        view = context.new_page()
        view.goto((tmp_path / "fleet.html").as_uri())
        found = axe.Axe().run(view)
        assert found.violations_count == 0, found.generate_report()
        context.close()
