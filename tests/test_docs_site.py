"""The documentation as a site: it builds without a warning, loads nothing from the network, and leaves nothing out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import click
import pytest
from documents import DOCS, ROOT, pages

from edge_ilseg.cli import group

MAX_PICTURE_BYTES = 150_000
LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")


class Loaded(HTMLParser):
    """What a browser loads by itself when it opens a page."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "video", "audio", "embed"):
            self.places.append(values.get("src") or "")
        if tag == "link" and values.get("rel") not in ("canonical", "prev", "next", "alternate"):
            self.places.append(values.get("href") or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


def subcommands(command: click.Command, name: str) -> list[str]:
    """A command and all below it, by the words that a user types."""
    found = [name]
    if isinstance(command, click.Group):
        for word in command.list_commands(click.Context(command)):
            below = command.get_command(click.Context(command), word)
            assert below is not None
            found += subcommands(below, f"{name} {word}")
    return found


@pytest.mark.slow
def test_no_page_loads_anything_from_the_network(site: Path) -> None:
    opened = sorted(site.rglob("*.html"))
    assert len(opened) > len(list(DOCS.rglob("*.md")))
    for path in opened:
        parser = Loaded()
        parser.feed(path.read_text(encoding="utf-8"))
        assert parser.places, path
        away = [place for place in parser.places if re.match(r"(?:https?:)?//", place)]
        assert not away, f"{path.relative_to(site)} loads {', '.join(away)}"
    for path in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import\s+)[\"']?(?:https?:)?//", path.read_text(encoding="utf-8")), path


@pytest.mark.slow
def test_the_reference_has_every_command_with_every_option(site: Path) -> None:
    text = (site / "reference/cli.html").read_text(encoding="utf-8")
    headings = re.findall(r"<h\d id=\"[^\"]*\">(.*?)<a", text)
    assert set(subcommands(group, "edge-ilseg")) <= set(headings)
    for option in ("--max-class-drop", "--halt-above", "--watch-min-frames", "--remote-python"):
        assert option in text, option


@pytest.mark.slow
def test_the_reference_has_the_words_of_the_docstrings(site: Path) -> None:
    text = (site / "reference/python.html").read_text(encoding="utf-8")
    for name in ("Application.frame_done", "read_manifest", "verify_bundle", "export_step"):
        assert re.search(rf'id="edge_ilseg\.[\w.]*{re.escape(name)}"', text), name


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_of_pages_outside_of_the_site_lead_somewhere(name: str) -> None:
    for link in LINK.finditer((ROOT / name).read_text(encoding="utf-8")):
        if not link["target"].startswith(("http://", "https://", "#")):
            assert (ROOT / link["target"].partition("#")[0]).exists(), link["target"]


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_pictures_are_small_and_say_what_they_show(page: Path) -> None:
    for link in LINK.finditer(page.read_text(encoding="utf-8")):
        if link["picture"]:
            assert len(link["text"].split()) >= 4, f"{link['target']}: its text says too little"
            assert (page.parent / link["target"]).stat().st_size <= MAX_PICTURE_BYTES, link["target"]
