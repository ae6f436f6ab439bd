"""Class names as people type them."""

from __future__ import annotations

import pytest

from edge_ilseg.classes import check_spelling, resolve_classes
from edge_ilseg.data.voc import ALIASES, CLASSES
from edge_ilseg.errors import ClassNameError


def test_an_alias_a_case_and_a_blank_find_the_class_in_the_order_asked_for() -> None:
    names = ["tv", "Potted Plant", "MOTORCYCLE", "dining-table", "boat"]
    assert resolve_classes(names, CLASSES, ALIASES) == ("tvmonitor", "pottedplant", "motorbike", "diningtable", "boat")


def test_an_unknown_class_is_told_with_the_nearest_name_and_the_list() -> None:
    with pytest.raises(ClassNameError) as caught:
        resolve_classes(["aeroplan"], CLASSES, ALIASES)
    text = str(caught.value)
    assert "unknown class 'aeroplan'" in text
    assert "did you mean 'aeroplane'?" in text
    assert "background, aeroplane, bicycle" in text


def test_a_class_named_twice_is_refused_even_through_an_alias() -> None:
    with pytest.raises(ClassNameError, match=r"'tvmonitor' is named twice") as caught:
        resolve_classes(["tvmonitor", "tv"], CLASSES, ALIASES)
    assert "'tvmonitor' and 'tv'" in str(caught.value)


def test_a_class_s_own_name_wins_over_an_alias() -> None:
    assert resolve_classes(["monitor"], ("tvmonitor", "Monitor"), {"monitor": "tvmonitor"}) == ("Monitor",)


def test_an_alias_of_a_class_that_the_data_set_lacks_is_unknown() -> None:
    with pytest.raises(ClassNameError, match="unknown class 'tv'"):
        resolve_classes(["tv"], ("boat", "car"), {"tv": "tvmonitor"})


def test_a_name_that_fits_two_classes_is_refused_unless_it_is_spelt_exactly() -> None:
    classes = ("park bench", "parkbench")
    assert resolve_classes(["parkbench"], classes, {}) == ("parkbench",)
    with pytest.raises(ClassNameError, match="more than one class"):
        resolve_classes(["Park-Bench"], classes, {})


@pytest.mark.parametrize("name", ["Boat", "BOAT", "bo at", "bo-at"])
def test_a_known_class_in_another_spelling_is_refused_with_both_spellings(name: str) -> None:
    with pytest.raises(ClassNameError, match=rf"'{name}' is a class of the model(?s:.*)rename '{name}' to 'boat'"):
        check_spelling(("sky", name), ("sea", "boat"))


def test_the_same_spelling_and_another_class_pass() -> None:
    check_spelling(("sky", "boat", "boats"), ("sea", "boat"))
    check_spelling(("park bench",), ("parkbench", "park bench"))
