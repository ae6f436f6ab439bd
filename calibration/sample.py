"""Which images the int8 ranges are taken from: a seeded choice among the step's own images."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_ilseg.errors import ExportError


@dataclass(frozen=True)
class CalibrationImages:
    """Images to calibrate on, in a fixed order; read one at a time."""

    ids: tuple[str, ...]
    images_sha256: str
    """Hash of the image set, as the step records it."""
    read: Callable[[str], NDArray[np.uint8]]
    """Image id -> the image, uint8, H x W x 3, RGB, at its own size."""
    at_hand: tuple[str, ...] = ()
    """All images of the step, those to calibrate on among them: what int8 is compared with fp32 on."""


def choose_images(
    presence: Mapping[str, frozenset[str]], new_classes: Sequence[str], count: int, seed: int
) -> tuple[str, ...]:
    """Choose `count` images at random, each new class at least once; all of them where there are not more.

    One image is drawn for each new class that no drawn image shows yet, the rarest class first, so that at most
    `len(new_classes)` images are not plain random draws. More images than `count` are taken if the classes need them.

    Args:
        presence: image id -> names of the classes in it; the order of the mapping does not matter.
        new_classes: classes of this step; each must be in an image.
        count: how many images, at least 1.
        seed: the same arguments and seed give the same images in the same order.

    Returns:
        Image ids, sorted.

    Raises:
        ExportError: `count` is below 1, there is no image, or a new class is in none.
    """
    if count < 1:
        raise ExportError(
            "calibration needs at least one image", found=f"{count} images asked for", hint="raise --calibration-images"
        )
    if not presence:
        raise ExportError("there is no image to calibrate on", hint="export with --precision fp32, or add images")
    showing = {name: sorted(key for key, names in presence.items() if name in names) for name in new_classes}
    for name, image_ids in showing.items():
        if not image_ids:
            raise ExportError(
                "no calibration image shows a class of this step",
                found=f"class {name!r} in 0 of {len(presence)} images",
                hint="calibrate on images that show every new class: the ranges of its features are taken from them",
            )
    rng = random.Random(seed)
    chosen: set[str] = set()
    for name in sorted(showing, key=lambda name: (len(showing[name]), name)):
        if chosen.isdisjoint(showing[name]):
            chosen.add(rng.choice(showing[name]))
    rest = sorted(presence.keys() - chosen)
    chosen.update(rng.sample(rest, min(max(count - len(chosen), 0), len(rest))))
    return tuple(sorted(chosen))
