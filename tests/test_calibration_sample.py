"""Which images the ranges are taken from."""

from __future__ import annotations

import pytest

from edge_ilseg.calibration.sample import choose_images
from edge_ilseg.errors import ExportError

PRESENCE = {f"image-{i:02}": frozenset({"grass"} | ({"boat"} if i == 7 else set())) for i in range(30)}


def test_every_new_class_is_in_the_sample_even_if_only_one_image_shows_it() -> None:
    for seed in range(20):
        assert "image-07" in choose_images(PRESENCE, ["grass", "boat"], 3, seed)


def test_the_same_seed_gives_the_same_images_whatever_the_order_of_the_mapping() -> None:
    chosen = choose_images(PRESENCE, ["boat"], 5, seed=4)
    assert chosen == choose_images(dict(reversed(PRESENCE.items())), ["boat"], 5, seed=4)
    assert chosen == tuple(sorted(set(chosen)))
    assert len(chosen) == 5


def test_another_seed_gives_other_images() -> None:
    assert len({choose_images(PRESENCE, ["boat"], 5, seed) for seed in range(10)}) > 5


def test_more_images_than_asked_for_are_taken_when_the_classes_need_them() -> None:
    presence = {name: frozenset({name}) for name in ("boat", "cat", "dog")}
    assert choose_images(presence, ["boat", "cat", "dog"], 1, seed=0) == ("boat", "cat", "dog")


def test_all_images_are_taken_when_there_are_fewer_than_asked_for() -> None:
    assert choose_images(PRESENCE, ["boat"], 999, seed=0) == tuple(sorted(PRESENCE))


def test_a_new_class_without_an_image_is_an_error_that_names_it() -> None:
    with pytest.raises(ExportError, match="'cat' in 0 of 30 images"):
        choose_images(PRESENCE, ["boat", "cat"], 5, seed=0)


def test_no_images_and_no_count_are_errors() -> None:
    with pytest.raises(ExportError, match="no image to calibrate on"):
        choose_images({}, [], 5, seed=0)
    with pytest.raises(ExportError, match="at least one image"):
        choose_images(PRESENCE, ["boat"], 0, seed=0)
