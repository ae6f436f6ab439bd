"""What a user is told."""

from __future__ import annotations

import pickle
import sys

import pytest

from edge_ilseg import errors
from edge_ilseg.errors import EdgeIlsegError, MissingPackageError, ParityError, check_extra, did_you_mean

FULL = {"where": "mask.png", "found": "value 9", "expected": "0 to 3", "hint": "correct the mask"}


def test_an_error_says_what_where_found_expected_and_what_to_do() -> None:
    lines = str(EdgeIlsegError("a mask has an unknown value", **FULL)).splitlines()
    assert lines[0] == "a mask has an unknown value"
    assert [line.strip().split(":", 1)[0] for line in lines[1:]] == ["where", "found", "expected", "do"]
    assert [line.split(":", 1)[1].strip() for line in lines[1:]] == list(FULL.values())


def test_an_error_leaves_out_what_is_not_known_and_keeps_what_is_zero() -> None:
    assert str(EdgeIlsegError("wrong")) == "wrong"
    assert str(EdgeIlsegError("wrong", found=0)) == "wrong\n  found:    0"


def test_an_error_fits_into_one_line_of_a_report() -> None:
    line = EdgeIlsegError("a mask has an unknown value", **FULL).one_line()
    assert line == ("a mask has an unknown value; at mask.png; found value 9; expected 0 to 3; do: correct the mask")
    assert EdgeIlsegError("wrong").one_line() == "wrong"


def test_an_error_survives_the_way_back_from_another_process() -> None:
    error = EdgeIlsegError("a mask has an unknown value", **FULL)
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - what multiprocessing does
    assert str(again) == str(error)


def test_only_parity_has_an_exit_code_of_its_own() -> None:
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, EdgeIlsegError):
            assert kind.exit_code == (2 if kind is ParityError else 3), name


def test_a_missing_package_names_the_extra_that_brings_it() -> None:
    with pytest.raises(MissingPackageError) as raised:
        check_extra("train", ["sys", "no_such_package_1", "no_such_package_2"], "training")
    assert raised.value.what == "training needs a package that is not installed"
    assert raised.value.found == "no module named no_such_package_1, no_such_package_2"
    assert raised.value.hint == "pip install 'edge-ilseg[train]'"


def test_a_module_inside_a_missing_package_is_missing() -> None:
    with pytest.raises(MissingPackageError, match="not installed"):
        check_extra("export", ["no_such_package.quantization"], "int8")


def test_a_blocked_module_counts_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "json", None)
    with pytest.raises(MissingPackageError):
        check_extra("export", ["json"], "int8")


def test_installed_packages_are_no_error_and_are_not_imported() -> None:
    loaded = set(sys.modules)
    check_extra("train", ["xmlrpc"], "training")
    assert "xmlrpc" not in set(sys.modules) - loaded


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("baot", "did you mean 'boat'?"),
        ("BOAT", "did you mean 'boat'?"),
        ("TVmonitr", "did you mean 'tvMonitor'?"),
        ("zebra", None),
        ("", None),
    ],
)
def test_a_near_miss_is_pointed_out_in_the_known_spelling(name: str, hint: str | None) -> None:
    assert did_you_mean(name, ["boat", "tvMonitor", "road"]) == hint
