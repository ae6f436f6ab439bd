"""What a check of `edge-ilseg doctor` says. The rules are in `edge_ilseg.doctor`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "note", "problem"]
MOST_SIGNS = 400


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis; texts are single lines without signs that move a terminal's cursor."""

    name: str
    status: Status
    found: str
    mend: str | None = None


def ok(name: str, found: str) -> Check:
    """Nothing to do."""
    return Check(name, "ok", one_line(found))


def note(name: str, found: str, mend: str) -> Check:
    """It works; this is worth knowing, or something is left out."""
    return Check(name, "note", one_line(found), one_line(mend))


def problem(name: str, found: str, mend: str) -> Check:
    """Something does not work here."""
    return Check(name, "problem", one_line(found), one_line(mend))


def one_line(text: str) -> str:
    """A single printable line; what packages say when they fail may be long, and is cut in the middle."""
    flat = "".join(sign if sign.isprintable() else " " for sign in re.sub(r"\s+", " ", text)).strip()
    return flat if len(flat) <= MOST_SIGNS else f"{flat[: MOST_SIGNS // 2]} ... {flat[-MOST_SIGNS // 2 :]}"
