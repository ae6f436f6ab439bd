"""What the extras of an installed package ask for, as far as pip has written it down: names and bounds of versions.

1. A requirement is read whole or not at all: an operator or a marker that is not known here is a `ValueError`.
2. Only the numbers of a version are compared (`2.9` of `2.9.1rc1+cpu`); what stands behind them decides nothing.
3. Names are compared as pip compares them: `Foo.bar`, `foo-bar` and `foo_bar` are one.

A device has no `packaging`, so this is the small part of it that our own extras need.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)\s*(?:\[([^\]]*)\])?\s*\(?([^;()]*)\)?\s*(?:;\s*(.*))?")
BOUND = re.compile(r"(>=|<=|==|!=|>|<)\s*([0-9][^\s]*)")
MARKER = re.compile(r"(python_version|extra)\s*(>=|<=|==|!=|>|<)\s*[\"']([^\"']*)[\"']")
COMPARE: Mapping[str, Callable[[tuple[int, ...], tuple[int, ...]], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}


class Requirement(NamedTuple):
    """One requirement."""

    name: str
    """As `normalized` gives it."""
    extras: tuple[str, ...]
    bounds: tuple[tuple[str, str], ...]
    """Operator and version."""
    markers: tuple[tuple[str, str, str], ...]
    """`python_version` or `extra`, operator, value; all of them must hold."""

    @property
    def extra(self) -> str | None:
        """The extra that it belongs to; None: it is always needed."""
        return next((value for name, sign, value in self.markers if (name, sign) == ("extra", "==")), None)

    def applies_to(self, python: str) -> bool:
        """Whether a Python of this version needs it."""
        return all(holds(python, sign, value) for name, sign, value in self.markers if name == "python_version")

    def broken_bound(self, version: str) -> str | None:
        """The first bound that a version breaks, such as `>=2.9`."""
        return next((sign + bound for sign, bound in self.bounds if not holds(version, sign, bound)), None)

    def __str__(self) -> str:
        extras = f"[{','.join(self.extras)}]" if self.extras else ""
        return self.name + extras + ",".join(sign + version for sign, version in self.bounds)


def parse_requirement(text: str) -> Requirement:
    """One line of `Requires-Dist`.

    Raises:
        ValueError: it cannot be read whole (rule 1).
    """
    match = REQUIREMENT.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"this requirement cannot be read: {text!r}")
    name, extras, bounds, markers = match.groups(default="")
    return Requirement(
        normalized(name),
        tuple(item.strip() for item in extras.split(",") if item.strip()),
        tuple(_whole(BOUND, part, text) for part in bounds.split(",") if part.strip()),  # type: ignore[misc]
        tuple(_whole(MARKER, part, text) for part in markers.split(" and ") if part.strip()),  # type: ignore[misc]
    )


def normalized(name: str) -> str:
    """Rule 3."""
    return re.sub(r"[-_.]+", "-", name).lower()


def numbers_of(version: str) -> tuple[int, ...]:
    """`"2.9.1rc1+cpu"` to `(2, 9, 1)`, without zeros at the end (rule 2)."""
    match = re.match(r"v?\d+(?:\.\d+)*", version)
    numbers = [int(part) for part in match[0].lstrip("v").split(".")] if match else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def holds(version: str, sign: str, bound: str) -> bool:
    """Whether `version sign bound` is true, by rule 2."""
    return COMPARE[sign](numbers_of(version), numbers_of(bound))


def _whole(pattern: re.Pattern[str], part: str, text: str) -> tuple[str, ...]:
    match = pattern.fullmatch(part.strip())
    if match is None:
        raise ValueError(f"this requirement cannot be read: {text!r}, at {part.strip()!r}")
    return match.groups()
