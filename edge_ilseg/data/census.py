"""What a data set holds and what each step of a plan would see of it. Returns structs; the command line prints them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_ilseg.data.dataset import Dataset, DatasetInfo
from edge_ilseg.data.step_view import count_pixels, presence
from edge_ilseg.metrics import VOID
from edge_ilseg.progress import ProgressCallback, no_progress
from edge_ilseg.scenario import Setup, label_lookup, later_classes, select_images


class ClassCount(msgspec.Struct, frozen=True):
    """Where a class is: images with at least one pixel of it, and pixels."""

    images: int
    pixels: int


class SplitCount(msgspec.Struct, frozen=True):
    """One split."""

    name: str
    images: int
    pixels: int
    """labelled pixels, void left out"""
    classes: dict[str, ClassCount]


class StepCount(msgspec.Struct, frozen=True):
    """What one step would see."""

    index: int
    new: tuple[str, ...]
    images: int
    visible: dict[str, ClassCount]
    """classes that keep their label in the step's images"""
    hidden: dict[str, ClassCount]
    """classes in the step's images whose pixels become background, or void where there is none"""
    without_image: tuple[str, ...]
    """new classes that no image of the step shows: training would refuse"""


class Inspection(msgspec.Struct, frozen=True):
    """The whole report."""

    info: DatasetInfo
    splits: tuple[SplitCount, ...]
    setup: Setup | None
    train_split: str | None
    steps: tuple[StepCount, ...]


def inspect_dataset(
    dataset: Dataset,
    *,
    splits: Sequence[str] | None = None,
    plan: Sequence[Sequence[str]] = (),
    setup: Setup = "sequential",
    train_split: str = "train",
    seed: int = 0,
    progress: ProgressCallback = no_progress,
) -> Inspection:
    """Count images and pixels of each class in each split, and what each step of `plan` would see.

    Every mask of the splits is read, so a damaged one comes to light here.

    Args:
        splits: those to count; None for all that the data set names.
        plan: classes of each step, as `scenario.parse_scenario` gives them; empty for none.
        setup, train_split, seed: what the steps select from; `"train+val"` joins splits. Not used without a plan.
        progress: told the share of the masks that is read.

    Raises:
        DataError: an unknown or empty split, or a mask that cannot be used.
        ClassNameError: the plan names an unknown class, or one twice.
    """
    info = dataset.info
    names = info.splits if splits is None else tuple(splits)
    ids_of = {name: dataset.ids(name) for name in names}
    train_ids = dataset.ids(train_split) if plan else ()
    all_ids = tuple(dict.fromkeys(image_id for ids in (*ids_of.values(), train_ids) for image_id in ids))
    row_of = {image_id: row for row, image_id in enumerate(all_ids)}
    pixels_NK = count_pixels(dataset, all_ids, progress)

    def rows(ids: Sequence[str]) -> NDArray[np.int64]:
        return pixels_NK[[row_of[image_id] for image_id in ids]]

    return Inspection(
        info=info,
        splits=tuple(_count_split(name, info, rows(ids_of[name])) for name in names),
        setup=setup if plan else None,
        train_split=train_split if plan else None,
        steps=tuple(
            count_step(info, train_ids, rows(train_ids), plan, index, setup=setup, seed=seed)
            for index in range(len(plan))
        ),
    )


def count_step(
    info: DatasetInfo,
    image_ids: Sequence[str],
    pixels_NK: NDArray[np.int64],
    plan: Sequence[Sequence[str]],
    index: int,
    *,
    setup: Setup,
    seed: int = 0,
) -> StepCount:
    """What step `index` of `plan` would see of the images, from their counted pixels alone.

    Raises:
        ConfigError: unknown setup.
        ClassNameError: the plan names an unknown class, or one twice.
    """
    old = tuple(name for step in plan[:index] for name in step)
    new = tuple(plan[index])
    lookup = label_lookup(setup, info.classes, info.background, old=old, new=new)
    selected = set(
        select_images(
            setup,
            presence(info, image_ids, pixels_NK),
            new=new,
            old=old,
            later=later_classes(info.classes, old=old, new=new),
            seed=seed,
        )
    )
    counts = _count_classes(info, pixels_NK[[image_id in selected for image_id in image_ids]])
    channel_of = {name: channel for channel, name in enumerate((*old, *new))}
    visible = {name for label, name in enumerate(info.classes) if int(lookup[label]) == channel_of.get(name, VOID + 1)}
    return StepCount(
        index=index,
        new=new,
        images=len(selected),
        visible={name: count for name, count in counts.items() if name in visible},
        hidden={name: count for name, count in counts.items() if name not in visible and count.images},
        without_image=tuple(name for name in new if name != info.background and not counts[name].images),
    )


def _count_split(name: str, info: DatasetInfo, pixels_NK: NDArray[np.int64]) -> SplitCount:
    return SplitCount(
        name=name, images=len(pixels_NK), pixels=int(pixels_NK.sum()), classes=_count_classes(info, pixels_NK)
    )


def _count_classes(info: DatasetInfo, pixels_NK: NDArray[np.int64]) -> dict[str, ClassCount]:
    images, pixels = (pixels_NK > 0).sum(axis=0), pixels_NK.sum(axis=0)
    return {name: ClassCount(int(images[k]), int(pixels[k])) for k, name in enumerate(info.classes)}
