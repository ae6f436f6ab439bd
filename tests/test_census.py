"""What a data set holds, and what each step would see of it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_ilseg.data.census import ClassCount, count_step, inspect_dataset
from edge_ilseg.data.dataset import DatasetInfo
from edge_ilseg.data.msrc import Msrc
from edge_ilseg.data.shapes import CLASSES, Shapes
from edge_ilseg.errors import ClassNameError, DataError
from edge_ilseg.scenario import order_classes, parse_scenario

SHAPES = Shapes(train=20, val=5, test=0, height_px=40, width_px=40)
INFO = DatasetInfo(
    kind="x", classes=("background", "cat", "dog"), background="background", colors=(), aliases={}, splits=()
)
IDS = ("a", "b", "c")
PIXELS_NK = np.array([[5, 4, 0], [6, 2, 1], [7, 0, 3]], dtype=np.int64)
PLAN = (("background", "cat"), ("dog",))


def test_every_split_is_counted_by_class() -> None:
    report = inspect_dataset(SHAPES)
    assert [(split.name, split.images, split.pixels) for split in report.splits] == [
        ("train", 20, 20 * 1600),
        ("val", 5, 5 * 1600),
    ]
    star = CLASSES.index("star")
    masks = [SHAPES.read_labels(image_id) == star for image_id in SHAPES.ids("train")]
    assert report.splits[0].classes["star"] == ClassCount(
        images=sum(bool(mask.any()) for mask in masks), pixels=int(sum(mask.sum() for mask in masks))
    )
    assert report.steps == ()
    assert report.setup is None


def test_a_step_shows_what_is_visible_and_what_is_hidden_in_its_own_images() -> None:
    step = count_step(INFO, IDS, PIXELS_NK, PLAN, 1, setup="disjoint")
    assert step.images == 2
    assert step.visible == {"background": ClassCount(2, 13), "dog": ClassCount(2, 4)}
    assert step.hidden == {"cat": ClassCount(1, 2)}
    assert step.without_image == ()
    step = count_step(INFO, IDS, PIXELS_NK, PLAN, 1, setup="sequential")
    assert step.visible["cat"] == ClassCount(1, 2)
    assert step.hidden == {}
    step = count_step(INFO, IDS, PIXELS_NK, PLAN, 0, setup="overlapped")
    assert (step.images, step.hidden) == (2, {"dog": ClassCount(1, 1)})


def test_a_class_without_an_image_is_reported_not_raised() -> None:
    pixels_NK = np.array([[5, 4, 1], [6, 2, 1], [7, 0, 3]], dtype=np.int64)
    step = count_step(INFO, IDS, pixels_NK, PLAN, 0, setup="sequential")
    assert step.images == 0
    assert step.without_image == ("cat",)


def test_a_plan_is_inspected_on_the_split_it_would_train_on() -> None:
    plan = parse_scenario("6+2", CLASSES, "background")
    report = inspect_dataset(SHAPES, splits=("val",), plan=plan, setup="overlapped", train_split="train+val")
    assert [split.name for split in report.splits] == ["val"]
    assert (report.setup, report.train_split) == ("overlapped", "train+val")
    assert [step.new for step in report.steps] == list(plan)
    assert sum(step.images for step in report.steps) >= 25


def test_progress_is_told_once_for_each_mask_even_if_splits_share_images() -> None:
    told: list[tuple[str, float]] = []
    inspect_dataset(SHAPES, plan=(CLASSES,), train_split="train+val", progress=lambda *state: told.append(state))
    assert told == [("counting labels", done / 25) for done in range(1, 26)]


def test_the_report_survives_json() -> None:
    report = inspect_dataset(SHAPES, plan=parse_scenario("6+2", CLASSES, "background"))
    decoded = msgspec.json.decode(msgspec.json.encode(report))
    assert decoded["info"]["kind"] == "shapes"
    assert decoded["steps"][1]["new"] == list(CLASSES[-2:])
    assert decoded["splits"][0]["classes"]["disk"]["images"] == report.splits[0].classes["disk"].images


def test_an_unknown_split_or_class_is_refused() -> None:
    with pytest.raises(DataError, match="unknown split 'tset'"):
        inspect_dataset(SHAPES, splits=("tset",))
    with pytest.raises(ClassNameError, match="did you mean 'star'"):
        inspect_dataset(SHAPES, plan=((*CLASSES[:-1], "starr"),))


@pytest.mark.msrc
def test_msrc_in_the_listed_order_shows_face_and_car_without_an_image(msrc_root: Path) -> None:
    dataset = Msrc(msrc_root)
    plan = parse_scenario("16+5", order_classes("listed", {}, dataset.info.classes, None), None)
    report = inspect_dataset(dataset, splits=("train", "val"), plan=plan, train_split="train+val")
    assert [split.images for split in report.splits] == [276, 59]
    assert [step.images for step in report.steps] == [177, 158]
    assert report.steps[0].without_image == ("face", "car")
    assert report.steps[1].without_image == ()
