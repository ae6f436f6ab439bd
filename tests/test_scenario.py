"""The plan of classes: which images a step may see, and what their labels say in it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_ilseg.data import open_dataset
from edge_ilseg.data.dataset import Dataset
from edge_ilseg.data.msrc import Msrc
from edge_ilseg.data.step_view import class_pixels, count_pixels, presence
from edge_ilseg.errors import ClassNameError, ConfigError
from edge_ilseg.scenario import (
    SETUPS,
    Setup,
    check_every_class_has_an_image,
    evaluation_lookup,
    label_lookup,
    later_classes,
    order_classes,
    owning_class,
    parse_scenario,
    select_images,
)

Counted = tuple[Dataset, tuple[str, ...], NDArray[np.int64]]
BY_FREQUENCY = (
    "grass", "road", "building", "sky", "tree", "water", "book", "bicycle", "car", "flower", "cow", "body", "sheep",
    "sign", "cat", "chair", "face", "dog", "aeroplane", "bird", "boat",
)  # fmt: skip
SHOWN = {
    "a": frozenset({"cat"}),
    "b": frozenset({"cat", "dog"}),
    "c": frozenset({"dog"}),
    "d": frozenset({"dog", "boat"}),
    "e": frozenset({"cat", "boat"}),
    "f": frozenset[str](),
}


def step_images(
    shown: dict[str, frozenset[str]], plan: tuple[tuple[str, ...], ...], index: int, setup: Setup, seed: int = 0
) -> tuple[str, ...]:
    return select_images(
        setup,
        shown,
        new=plan[index],
        old=[name for step in plan[:index] for name in step],
        later=[name for step in plan[index + 1 :] for name in step],
        seed=seed,
    )


def images_per_step(shown: dict[str, frozenset[str]], plan: tuple[tuple[str, ...], ...], setup: Setup) -> list[int]:
    return [len(step_images(shown, plan, index, setup)) for index in range(len(plan))]


# --- images ---


def test_sequential_and_disjoint_take_images_with_a_new_class_and_no_later_one() -> None:
    for setup in ("sequential", "disjoint"):
        assert select_images(setup, SHOWN, new=["dog"], old=["cat"], later=["boat"]) == ("b", "c")
        assert select_images(setup, SHOWN, new=["cat"], old=[], later=["dog", "boat"]) == ("a",)


def test_overlapped_takes_every_image_with_a_new_class() -> None:
    assert select_images("overlapped", SHOWN, new=["dog"], old=["cat"], later=["boat"]) == ("b", "c", "d")


def test_partitioned_puts_each_image_that_shows_a_class_into_exactly_one_step() -> None:
    shown = {f"{k}": frozenset({"cat", "dog", "boat"}) for k in range(60)}
    plan = (("background", "cat"), ("dog",), ("boat",))
    parts = [set(step_images(shown, plan, index, "partitioned")) for index in range(3)]
    assert set.union(*parts) == set(shown)
    assert sum(map(len, parts)) == len(shown)
    assert min(map(len, parts)) > 5


def test_partitioned_gives_an_image_to_the_same_class_whatever_the_plan_but_not_whatever_the_seed() -> None:
    shown = {f"{k}": frozenset({"cat", "dog", "boat"}) for k in range(60)}
    apart = step_images(shown, (("cat",), ("dog",), ("boat",)), 1, "partitioned")
    joined = step_images(shown, (("boat",), ("dog", "cat")), 1, "partitioned")
    assert set(apart) == {image_id for image_id in joined if owning_class(image_id, shown[image_id], 0) == "dog"}
    assert apart != step_images(shown, (("cat",), ("dog",), ("boat",)), 1, "partitioned", seed=1)


def test_the_owner_of_an_image_is_a_fixed_fact() -> None:
    owners = [owning_class(f"{k}", frozenset({"cat", "dog", "boat"}), 7) for k in range(6)]
    assert owners == ["cat", "dog", "cat", "boat", "cat", "cat"]
    assert owning_class("f", frozenset(), 0) is None


@pytest.mark.parametrize("setup", ["sequential", "disjoint", "partitioned"])
def test_no_image_is_used_in_two_steps(setup: Setup) -> None:
    plan = (("boat",), ("cat",), ("dog",))
    used = [image_id for index in range(3) for image_id in step_images(SHOWN, plan, index, setup)]
    assert len(used) == len(set(used))


def test_an_image_without_a_class_is_in_no_step() -> None:
    for setup in SETUPS:
        assert "f" not in select_images(setup, SHOWN, new=["cat", "dog", "boat"], old=[], later=[])  # type: ignore[arg-type]


def test_a_class_in_two_places_of_the_plan_is_refused() -> None:
    with pytest.raises(ClassNameError, match="'cat' is in the plan twice"):
        select_images("sequential", SHOWN, new=["cat"], old=["cat"], later=["dog", "boat"])


def test_an_image_with_a_class_outside_the_plan_is_a_defect_of_the_caller() -> None:
    with pytest.raises(ValueError, match="neither new nor old nor later"):
        select_images("sequential", SHOWN, new=["cat"], old=[], later=["dog"])


def test_a_misspelt_setup_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'overlapped'"):
        select_images("overlaped", SHOWN, new=["cat"], old=[], later=["dog", "boat"])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="did you mean 'disjoint'"):
        label_lookup("disjont", ("cat",), None, old=(), new=("cat",))  # type: ignore[arg-type]


# --- labels ---

WITH_BACKGROUND = ("cat", "background", "dog", "boat", "car")


def test_sequential_labels_keep_the_old_classes_and_hide_the_later_ones_in_the_background() -> None:
    lookup = label_lookup("sequential", WITH_BACKGROUND, "background", old=("background", "dog"), new=("cat",))
    assert lookup.dtype == np.uint8
    assert lookup.shape == (256,)
    assert lookup[:5].tolist() == [2, 0, 1, 0, 0]


@pytest.mark.parametrize("setup", ["disjoint", "overlapped", "partitioned"])
def test_the_other_setups_hide_the_old_classes_but_not_the_background(setup: Setup) -> None:
    lookup = label_lookup(setup, WITH_BACKGROUND, "background", old=("dog", "background"), new=("cat",))
    assert lookup[:5].tolist() == [2, 1, 1, 1, 1]


@pytest.mark.parametrize("setup", SETUPS)
def test_without_a_background_hidden_pixels_become_void(setup: Setup) -> None:
    lookup = label_lookup(setup, ("cat", "dog", "boat"), None, old=("dog",), new=("boat",))
    assert lookup[:3].tolist() == [255, 0 if setup == "sequential" else 255, 1]


@pytest.mark.parametrize("setup", SETUPS)
def test_void_stays_void_and_so_does_every_value_that_is_no_label_id(setup: Setup) -> None:
    lookup = label_lookup(setup, WITH_BACKGROUND, "background", old=("background",), new=("cat", "dog"))
    assert (lookup[5:] == 255).all()


def test_channels_never_move_from_step_to_step() -> None:
    steps = (("background", "dog"), ("cat",), ("car", "boat"))
    channels: dict[str, int] = {}
    for index in range(3):
        old = tuple(name for step in steps[:index] for name in step)
        lookup = label_lookup("sequential", WITH_BACKGROUND, "background", old=old, new=steps[index])
        for name, channel in channels.items():
            assert lookup[WITH_BACKGROUND.index(name)] == channel
        channels |= {name: int(lookup[WITH_BACKGROUND.index(name)]) for name in steps[index]}
    assert channels == {"background": 0, "dog": 1, "cat": 2, "car": 3, "boat": 4}


def test_evaluation_shows_every_known_class_and_hides_the_rest() -> None:
    known = ("background", "boat", "cat")
    assert evaluation_lookup(WITH_BACKGROUND, "background", known)[:5].tolist() == [2, 0, 0, 1, 0]
    assert evaluation_lookup(("cat", "dog"), None, ("dog",))[:3].tolist() == [255, 0, 255]


def test_old_classes_may_be_missing_from_the_data_set_of_new_images() -> None:
    lookup = label_lookup("sequential", ("background", "tv"), "background", old=("background", "cat"), new=("tv",))
    assert lookup[:3].tolist() == [0, 2, 255]
    assert evaluation_lookup(("background", "tv"), "background", ("background", "cat", "tv"))[:2].tolist() == [0, 2]


def test_a_data_set_without_any_known_class_cannot_be_evaluated_on() -> None:
    with pytest.raises(ClassNameError, match="none of the classes that the model knows"):
        evaluation_lookup(("background", "tv"), "background", ("background", "cat"))


def test_a_plan_without_the_background_of_the_data_set_is_refused() -> None:
    with pytest.raises(ClassNameError, match="'background' is in no step"):
        label_lookup("sequential", WITH_BACKGROUND, "background", old=(), new=("cat",))


def test_an_unknown_new_class_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ClassNameError, match="did you mean 'boat'"):
        label_lookup("sequential", WITH_BACKGROUND, "background", old=("background",), new=("boot",))


# --- every class has an image ---


def test_all_classes_without_an_image_are_named_with_the_setup_and_a_hint() -> None:
    shown = {"a": frozenset({"cat", "boat"}), "b": frozenset({"dog", "boat"}), "c": frozenset({"car"})}
    selected = select_images("sequential", shown, new=["cat", "dog", "car"], old=[], later=["boat"])
    with pytest.raises(ClassNameError) as caught:
        check_every_class_has_an_image(
            "sequential", shown, selected, new=["cat", "dog", "car"], later=["boat"], background=None
        )
    text = str(caught.value)
    assert "2 classes would be learned without a single image: cat, dog" in text
    assert "setup 'sequential'" in text
    assert "cat: in 1 image of the split, together with classes of later steps (boat in 1)" in text
    assert "later step" in text


def test_a_class_without_any_image_in_the_split_gets_the_advice_to_add_images() -> None:
    with pytest.raises(ClassNameError, match=r"(?s)tv: in no image of the split.*add labelled images"):
        check_every_class_has_an_image("sequential", SHOWN, (), new=["tv"], later=[], background=None)


def test_the_background_needs_no_image_of_its_own() -> None:
    check_every_class_has_an_image(
        "sequential", SHOWN, ("a",), new=["background", "cat"], later=["dog"], background="background"
    )


# --- orders and scenarios ---


def test_orders_put_the_background_first() -> None:
    classes, pixels = ("cat", "Boat", "background", "dog"), {"cat": 5, "dog": 9, "Boat": 5, "background": 1}
    assert order_classes("listed", {}, classes, "background") == ("background", "cat", "Boat", "dog")
    assert order_classes("alphabetical", {}, classes, "background") == ("background", "Boat", "cat", "dog")
    assert order_classes("frequency", pixels, classes, "background") == ("background", "dog", "cat", "Boat")
    assert order_classes("alphabetical", {}, ("dog", "cat"), None) == ("cat", "dog")


def test_a_random_order_depends_on_the_seed_alone() -> None:
    classes = tuple("abcdefgh")
    orders = {order_classes("random", {}, classes, None, seed=seed) for seed in range(5)}
    assert len(orders) == 5
    assert all(sorted(order) == list(classes) for order in orders)
    assert order_classes("random", {}, classes[::-1], None, seed=3) == order_classes(
        "random", {}, classes, None, seed=3
    )


def test_an_unknown_order_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'frequency'"):
        order_classes("frequncy", {}, ("cat",), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("19+1", [20, 1]),
        ("16+4", [17, 4]),
        ("15+1x5", [16, 1, 1, 1, 1, 1]),
        ("10+10", [11, 10]),
        ("10+5+5", [11, 5, 5]),
        ("10+1x10", [11] + [1] * 10),
        ("10 + 5x2", [11, 5, 5]),
        ("20", [21]),
    ],
)
def test_a_scenario_deals_out_the_classes_and_does_not_count_the_background(text: str, sizes: list[int]) -> None:
    classes = ("background", *(f"c{k}" for k in range(20)))
    plan = parse_scenario(text, classes, "background")
    assert [len(step) for step in plan] == sizes
    assert tuple(name for step in plan for name in step) == classes


def test_a_scenario_puts_the_background_into_step_0_wherever_it_is_listed() -> None:
    assert parse_scenario("1+1", ("cat", "dog", "background"), "background") == (("background", "cat"), ("dog",))
    assert parse_scenario("1+1", ("cat", "dog"), None) == (("cat",), ("dog",))


@pytest.mark.parametrize("text", ["", "16+", "16-5", "a+b", "0+21", "16+5x", "x5", "1.5+2"])
def test_a_scenario_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        parse_scenario(text, BY_FREQUENCY, None)


def test_a_scenario_whose_sum_does_not_fit_says_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"(?s)16 \+ 4 = 20 classes.*21 classes"):
        parse_scenario("16+4", BY_FREQUENCY, None)
    with pytest.raises(ConfigError, match="2 classes, not counting 'background'"):
        parse_scenario("2+1", ("background", "cat", "dog"), "background")


# --- golden numbers: MSRC-v2, train + val, 335 images ---


@pytest.fixture(scope="module")
def msrc(msrc_root: Path) -> Counted:
    dataset = Msrc(msrc_root)
    ids = dataset.ids("train+val")
    return dataset, ids, count_pixels(dataset, ids)


@pytest.mark.msrc
def test_the_frequency_order_of_msrc_is_the_published_one(msrc: Counted) -> None:
    dataset, _, pixels_NK = msrc
    pixels = class_pixels(dataset.info, pixels_NK)
    assert order_classes("frequency", pixels, dataset.info.classes, dataset.info.background) == BY_FREQUENCY


@pytest.mark.msrc
@pytest.mark.parametrize(
    ("scenario", "counts"),
    [
        ("20+1", [317, 18]),
        ("16+5", [230, 105]),
        ("16+1x5", [230, 32, 17, 17, 21, 18]),
        ("11+10", [158, 177]),
    ],
)
def test_msrc_by_frequency_has_the_known_number_of_images_a_step(
    msrc: Counted, scenario: str, counts: list[int]
) -> None:
    dataset, ids, pixels_NK = msrc
    shown = presence(dataset.info, ids, pixels_NK)
    plan = parse_scenario(scenario, BY_FREQUENCY, None)
    assert images_per_step(shown, plan, "sequential") == counts
    assert images_per_step(shown, plan, "disjoint") == counts
    for index, new in enumerate(plan):
        selected = step_images(shown, plan, index, "sequential")
        later = [name for step in plan[index + 1 :] for name in step]
        check_every_class_has_an_image("sequential", shown, selected, new=new, later=later, background=None)


@pytest.mark.msrc
@pytest.mark.parametrize(
    ("order", "counts", "missing"),
    [("listed", [177, 158], ("face", "car")), ("alphabetical", [157, 178], ("aeroplane", "boat"))],
)
def test_msrc_in_another_order_leaves_classes_of_step_0_without_an_image(
    msrc: Counted, order: str, counts: list[int], missing: tuple[str, str]
) -> None:
    dataset, ids, pixels_NK = msrc
    shown = presence(dataset.info, ids, pixels_NK)
    plan = parse_scenario("16+5", order_classes(order, {}, dataset.info.classes, None), None)  # type: ignore[arg-type]
    assert images_per_step(shown, plan, "sequential") == counts
    selected = step_images(shown, plan, 0, "sequential")
    later = later_classes(dataset.info.classes, old=(), new=plan[0])
    assert later == tuple(name for name in dataset.info.classes if name in plan[1])
    with pytest.raises(ClassNameError) as caught:
        check_every_class_has_an_image("sequential", shown, selected, new=plan[0], later=later, background=None)
    assert f"2 classes would be learned without a single image: {', '.join(missing)}" in str(caught.value)
    assert f"{counts[0]} of 335 images" in str(caught.value)


@pytest.mark.msrc
def test_msrc_partitioned_uses_every_image_once(msrc: Counted) -> None:
    dataset, ids, pixels_NK = msrc
    shown = presence(dataset.info, ids, pixels_NK)
    plan = parse_scenario("16+1x5", BY_FREQUENCY, None)
    assert sum(images_per_step(shown, plan, "partitioned")) == sum(1 for names in shown.values() if names) == 335


# --- golden numbers: VOC 2012 with the augmented masks, 10,582 images ---

VOC_SEQUENTIAL = {
    "19+1": [10034, 548],
    "15+5": [8437, 2145],
    "15+1x5": [8437, 378, 299, 420, 500, 548],
    "10+10": [3706, 6876],
    "10+5+5": [3706, 4731, 2145],
}
VOC_OVERLAPPED = {
    "19+1": [10410, 548],
    "15+5": [9568, 2145],
    "15+1x5": [9568, 487, 299, 491, 500, 548],
}


@pytest.mark.slow
@pytest.mark.skipif("VOC_ROOT" not in os.environ, reason="set VOC_ROOT to a VOCdevkit with SegmentationClassAug")
def test_voc_has_the_known_number_of_images_a_step() -> None:
    dataset = open_dataset("voc", Path(os.environ["VOC_ROOT"]))
    ids = dataset.ids("train")
    shown = presence(dataset.info, ids, count_pixels(dataset, ids))
    assert len(shown) == 10582
    for scenario, counts in VOC_SEQUENTIAL.items():
        plan = parse_scenario(scenario, dataset.info.classes, "background")
        assert images_per_step(shown, plan, "sequential") == counts
        assert images_per_step(shown, plan, "disjoint") == counts
    for scenario, counts in VOC_OVERLAPPED.items():
        plan = parse_scenario(scenario, dataset.info.classes, "background")
        assert images_per_step(shown, plan, "overlapped") == counts
