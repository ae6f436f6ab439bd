"""A small data set in VOC's layout, for tests that run the paper's experiments."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from edge_ilseg.data.voc import CLASSES
from edge_ilseg.images import default_colors, write_mask_png


def write_voc(root: Path) -> Path:
    """VOC's layout with `SegmentationClassAug`: two images a class for training, one for val, one colour a class."""
    for name in ("JPEGImages", "SegmentationClass", "SegmentationClassAug", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    colors = default_colors(21)
    lists: dict[str, list[str]] = {"train": [], "val": [], "train_aug": []}
    for label in range(1, len(CLASSES)):
        for number in range(3):
            image_id = f"{label:02}_{number}"
            labels_HW = np.zeros((37, 50), np.uint8)
            labels_HW[8:30, 10 : 30 + number] = label
            image_HWC = np.asarray(colors, np.uint8)[labels_HW] + rng.integers(0, 40, (37, 50, 3), np.uint8)
            Image.fromarray(image_HWC).save(root / "JPEGImages" / f"{image_id}.jpg")
            folder = "SegmentationClass" if number != 1 else "SegmentationClassAug"
            write_mask_png(root / folder / f"{image_id}.png", labels_HW, colors)
            for name in ("val",) if number == 2 else ("train", "train_aug") if number == 0 else ("train_aug",):
                lists[name].append(image_id)
    for name, ids in lists.items():
        (root / "ImageSets" / "Segmentation" / f"{name}.txt").write_text("\n".join(ids) + "\n")
    return root
