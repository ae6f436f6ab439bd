"""What pip has written down of our extras can be read, all of it, and versions are compared by their numbers."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from edge_ilseg.requirements import Requirement, holds, normalized, numbers_of, parse_requirement

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def test_a_requirement_is_read_as_pip_writes_it() -> None:
    found = parse_requirement('backports-zstd>=1.0; python_version < "3.14" and extra == "update"')
    assert found == Requirement(
        "backports-zstd", (), ((">=", "1.0"),), (("python_version", "<", "3.14"), ("extra", "==", "update"))
    )
    assert found.extra == "update"
    assert found.applies_to("3.11.7")
    assert not found.applies_to("3.14.0")
    assert parse_requirement("edge-ilseg[train,export] ; extra == 'all'").extras == ("train", "export")
    assert parse_requirement("tuf (<8,>=7.0)").bounds == (("<", "8"), (">=", "7.0"))
    assert str(parse_requirement("Foo_bar[x] >= 1")) == "foo-bar[x]>=1"


@pytest.mark.parametrize("text", ["", "a~=1.0", "a; os_name == 'nt' or extra == 'b'", "a @ file:x", "a>=1 b"])
def test_what_cannot_be_read_whole_is_an_error_and_not_a_guess(text: str) -> None:
    with pytest.raises(ValueError):
        parse_requirement(text)


def test_all_our_own_requirements_can_be_read() -> None:
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    texts = [*project["dependencies"], *(item for items in project["optional-dependencies"].values() for item in items)]
    assert len([parse_requirement(text) for text in texts]) > 20


@pytest.mark.parametrize(
    ("version", "sign", "bound", "expected"),
    [
        ("2.13.0+cpu", ">=", "2.9", True),
        ("2.9rc1", ">=", "2.9", True),
        ("2.10", "<", "2.9", False),
        ("1.0.0", "==", "1.0", True),
        ("1.0.1", "!=", "1.0", True),
        ("7.9", "<", "8", True),
        ("unknown", ">=", "1", False),
    ],
)
def test_versions_are_compared_by_their_numbers(version: str, sign: str, bound: str, expected: bool) -> None:
    assert holds(version, sign, bound) is expected


def test_a_bound_that_is_broken_is_named() -> None:
    assert parse_requirement("tuf>=7.0,<8").broken_bound("8.1") == "<8"
    assert parse_requirement("tuf>=7.0,<8").broken_bound("7.1") is None


def test_names_are_one_however_they_are_written() -> None:
    assert {normalized(name) for name in ("backports.zstd", "Backports_Zstd", "backports--zstd")} == {"backports-zstd"}
    assert numbers_of("2026.4.1-22982-e21") == (2026, 4, 1)
