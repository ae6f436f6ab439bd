"""What a page is made of, as plain data: sections of blocks. How they look is the templates' affair.

Texts are plain: the templates escape them. Cells are texts too, formatted where the block is made, so that a table in
the page, and in a test, is what a person reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import msgspec

if TYPE_CHECKING:
    from markupsafe import Markup

VerdictKind = Literal["passed", "failed", "undecided", "unknown"]
Row = Sequence[str]


class Block(msgspec.Struct, frozen=True):
    """Anything that stands in a section; `kind` is the name of its macro."""

    kind: ClassVar[str]


class Table(Block, frozen=True):
    """Rows of texts; the first cell of a row is its header. Columns from `numeric` on are set to the right."""

    kind: ClassVar[str] = "table"
    caption: str
    head: Row
    rows: Sequence[Row]
    marks: Sequence[str] = ()
    """For each row, nothing or a word of the style sheet: `lost`, `failed`, `total`."""
    numeric: int = 1


class Figure(Block, frozen=True):
    """A chart and what it says."""

    kind: ClassVar[str] = "figure"
    picture: Markup
    caption: str
    is_wide: bool = False
    """Wider than a phone: it is scrolled by itself there."""


class Beside(Block, frozen=True):
    """Blocks side by side where there is room."""

    kind: ClassVar[str] = "beside"
    blocks: Sequence[Block]


class Folded(Block, frozen=True):
    """Blocks that are folded away, open in print."""

    kind: ClassVar[str] = "folded"
    summary: str
    blocks: Sequence[Block]


class Note(Block, frozen=True):
    """A small remark."""

    kind: ClassVar[str] = "note"
    text: str


class Heading(Block, frozen=True):
    """A heading under the section's."""

    kind: ClassVar[str] = "heading"
    text: str
    verdict: VerdictKind | None = None
    """With one, the sign of a verdict stands before the text."""


class Missing(Block, frozen=True):
    """The sentence in the place of something that is not there."""

    kind: ClassVar[str] = "missing"
    text: str


class Facts(Block, frozen=True):
    """Names and values."""

    kind: ClassVar[str] = "facts"
    pairs: Sequence[tuple[str, str]]


class Link(msgspec.Struct, frozen=True):
    """One step of a lineage."""

    name: str
    added: str
    detail: str
    scores: str
    is_subject: bool


class Chain(Block, frozen=True):
    """A lineage, step 0 first."""

    kind: ClassVar[str] = "chain"
    links: Sequence[Link]


class Shot(msgspec.Struct, frozen=True):
    """One small picture."""

    title: str
    uri: str
    alt: str
    width_px: int
    height_px: int


class LegendEntry(msgspec.Struct, frozen=True):
    """A class in a picture; no colour: the background, which is left as it is."""

    color: str | None
    text: str


class Strip(Block, frozen=True):
    """One image as several models see it."""

    kind: ClassVar[str] = "strip"
    title: str
    shots: Sequence[Shot]
    legend: Sequence[LegendEntry]


class Section(msgspec.Struct, frozen=True):
    """A part of the page; `anchor` is its place in the list of contents."""

    anchor: str
    title: str
    lead: str
    blocks: Sequence[Block]


class Tile(msgspec.Struct, frozen=True):
    """A number that is seen first."""

    name: str
    value: str
    aside: str


class Banner(msgspec.Struct, frozen=True):
    """The verdict on top."""

    verdict: VerdictKind
    text: str
    sentence: str
    reasons: Sequence[str]
