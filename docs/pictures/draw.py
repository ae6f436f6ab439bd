"""Draws forgetting.png: generated scenes, their truth, and the int8 masks of the three models that `make demo` leaves.

    python docs/pictures/draw.py demo-workspace docs/pictures/forgetting.png

The masks are those that `edge-ilseg predict` writes; nothing is chosen by how well it looks but the scenes, which show
a star beside something old: the first `SCENES` of the test split of which that is true.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from edge_ilseg.data.shapes import CLASSES, Shapes
from edge_ilseg.images import default_colors

SCENES, SIDE, GAP, TOP = 4, 128, 6, 22
COLUMNS = (("scene", None), ("truth", None), ("before", "00-base"), ("fine-tuned", "01-fine-tuned"),
           ("distilled", "01-distilled"))  # fmt: skip
LEAST_PIXELS = 500
INK, PAPER = (30, 34, 40), (255, 255, 255)


def scenes() -> list[str]:
    """Scenes of the test split that show a star and one or two other kinds, all of them large enough to be seen."""
    data, star, found = Shapes(test=600), CLASSES.index("star"), []
    for image_id in data.ids("test"):
        counts = np.bincount(data.read_labels(image_id).ravel(), minlength=len(CLASSES))
        shown = np.flatnonzero(counts[1:]) + 1
        if star in shown and 2 <= len(shown) <= 3 and counts[shown].min() >= LEAST_PIXELS:
            found.append(image_id)
    return found[:SCENES]


def draw(workspace: Path, out: Path) -> None:
    """Write the picture."""
    data, ids = Shapes(test=600), scenes()
    colors = [(236, 236, 232), *default_colors(len(CLASSES))[1:]]
    font = ImageFont.load_default(14)
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "scenes"
        photos.mkdir()
        for image_id in ids:
            Image.fromarray(data.read_image(image_id)).save(photos / f"{image_id}.png")
        for _, bundle in COLUMNS:
            if bundle is not None:
                command = [sys.executable, "-m", "edge_ilseg", "predict", workspace / "bundles" / bundle, photos]
                subprocess.run([*command, "--out", Path(folder) / bundle, "--no-overlay"], check=True, stdout=2)
        legend = 26
        size = (len(COLUMNS) * (SIDE + GAP) - GAP, TOP + len(ids) * (SIDE + GAP) + legend)
        picture = Image.new("RGB", size, PAPER)
        pen = ImageDraw.Draw(picture)
        for column, (title, bundle) in enumerate(COLUMNS):
            x = column * (SIDE + GAP)
            pen.text((x + SIDE / 2, TOP / 2), title, INK, font, anchor="mm")
            for row, image_id in enumerate(ids):
                if title == "scene":
                    tile = Image.open(photos / f"{image_id}.png")
                else:
                    labels_HW = data.read_labels(image_id)
                    if bundle is not None:
                        labels_HW = in_class_order(Path(folder) / bundle, image_id, workspace / "bundles" / bundle)
                    tile = Image.fromarray(np.array(colors, dtype=np.uint8)[labels_HW])
                picture.paste(tile.resize((SIDE, SIDE), Image.Resampling.NEAREST), (x, TOP + row * (SIDE + GAP)))
        x, y = 2, size[1] - legend / 2 + 2
        for name, color in zip(CLASSES[1:], colors[1:], strict=True):
            pen.rectangle((x, y - 6, x + 12, y + 6), color)
            pen.text((x + 17, y), name, INK, font, anchor="lm")
            x += 17 + pen.textlength(name, font) + 14
        picture.quantize(192, dither=Image.Dither.NONE).save(out, optimize=True)


def in_class_order(results: Path, image_id: str, bundle: Path) -> np.ndarray:
    """A mask of channels as one of label ids."""
    from edge_ilseg.bundle import read_manifest

    labels = np.array([CLASSES.index(entry.name) for entry in read_manifest(bundle).classes], dtype=np.uint8)
    return labels[np.asarray(Image.open(results / "masks" / f"{image_id}.png"))]


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
