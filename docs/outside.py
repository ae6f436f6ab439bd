"""Lets pages that lie beside docs/ be pages of the site: a page `<!-- from FILE -->` is that file of the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = re.compile(r"<!-- from (\S+) -->\s*")
BESIDE = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs with the text of each page."""
    named = PAGE.fullmatch(markdown)
    if named is None:
        return markdown
    text = (ROOT / named[1]).read_text(encoding="utf-8").replace("](docs/", "](")
    for name, page in BESIDE.items():
        text = text.replace(f"]({name}", f"]({page}")
    return text
