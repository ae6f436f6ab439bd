"""A bundle beside its parent on the device's own images, where nobody has drawn a label.

1. Without labels nothing says which of two masks is right. What can be said: how well the two agree on each old class
   (IoU of their masks), and how many of the parent's old pixels turned into a new class. The first falls and the second
   grows when a model forgets; both also move when it learns, because new objects are no longer taken for old ones.
2. Pixels that the bundle calls new are left out of the agreement: what the parent calls them is no fault of the bundle.
   That nothing is hidden there is what the share of moved pixels is for.
3. What was kept of a single class is told with those pixels, for of one class they may be all; the background excepted.
   An image shows a class where a mask gives it `SHOWN`: over many images every class has stray pixels.
4. Where the parent's model gives logits, agreement is told again over the pixels of which the parent was confident.
5. A bad image is named, left out, and ends nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edge_ilseg.devices.evaluation import check_channels
from edge_ilseg.devices.loaded_bundle import LoadedBundle
from edge_ilseg.devices.runtime import Session
from edge_ilseg.devices.sources import shown_path
from edge_ilseg.devices.stream import stream
from edge_ilseg.devices.unlabelled import Unlabelled, UnlabelledClass
from edge_ilseg.errors import DataError
from edge_ilseg.files import sha256_bytes
from edge_ilseg.images import IMAGE_SUFFIXES, open_image, resize_image, resize_mask
from edge_ilseg.metrics import class_iou, confusion_matrix
from edge_ilseg.progress import ProgressCallback, no_progress

CONFIDENT = 0.9
"""A pixel of which the parent is confident: its softmax gives this share or more to one class."""
SHOWN = 0.001
"""Of an image's pixels (rule 3)."""


def find_images(folder: Path) -> tuple[str, ...]:
    """Names of the images in a folder and below it, relative to it, sorted; hidden files and folders are left out.

    Raises:
        DataError: the folder is missing, or holds no image.
    """
    if not folder.is_dir():
        raise DataError("the folder of images is missing", where=folder, hint="give a folder that is there (--images)")
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )
    if not names:
        endings = ", ".join(IMAGE_SUFFIXES)
        raise DataError(
            "the folder holds no image",
            where=folder,
            expected=f"files that end in {endings}",
            hint="give a folder that holds images (--images)",
        )
    return tuple(names)


def compare_unlabelled(
    loaded: LoadedBundle,
    parent: LoadedBundle,
    folder: Path,
    names: Sequence[str],
    progress: ProgressCallback = no_progress,
) -> Unlabelled:
    """Compare the masks of a bundle and its parent (rules 1 to 5).

    Args:
        loaded: the bundle.
        parent: its parent, with the bundle's old classes as its channels.
        folder: of the images.
        names: from `find_images`.
        progress: told the share of the images that is done.

    Raises:
        BundleError: a model cannot be run, or gives a channel that its manifest does not have.
    """
    count, old_count = len(loaded.manifest.classes), loaded.manifest.old_count
    objects = [
        channel for channel in range(old_count) if loaded.manifest.class_names[channel] != loaded.manifest.background
    ]
    images_of_old, images_2K = 0, np.zeros((2, old_count), dtype=np.int64)  # that the parent, that the bundle shows
    pairs = np.zeros((2, count, count), dtype=np.int64)  # all pixels, confident pixels: rows are the parent's
    bad_images: list[tuple[str, str]] = []
    has_logits = parent.session.class_count is not None
    results = stream(loaded.session, names, lambda name: _read(folder / name, parent.session))
    for done, item in enumerate(results, start=1):
        if item.error is not None:
            bad_images.append((shown_path(Path(item.image_id)), shown_path(Path(item.error.one_line()))))
        elif item.mask_HW is not None and item.extra is not None:
            check_channels(item.mask_HW, count)
            parent_mask_HW = parent.session.mask(item.extra)
            check_channels(parent_mask_HW, old_count)
            mask_HW = resize_mask(item.mask_HW, *parent_mask_HW.shape)
            one = confusion_matrix(parent_mask_HW, mask_HW, count)
            pixels_2K = np.stack([one.sum(axis=1), one.sum(axis=0)])[:, :old_count]
            images_of_old += bool(pixels_2K[0, objects or slice(None)].any())
            images_2K += pixels_2K >= SHOWN * mask_HW.size
            pairs[0] += one
            if has_logits:
                sure_HW = confident_pixels(parent.session.logits(item.extra))
                pairs[1] += confusion_matrix(parent_mask_HW[sure_HW], mask_HW[sure_HW], count)
        progress("comparing unlabelled images", done / len(names))
    confident = pairs[1] if has_logits else None
    background = loaded.manifest.background
    classes = unlabelled_classes(loaded.manifest.class_names, pairs[0], confident, images_2K, background)
    known = [item.agreement for item in classes if item.agreement is not None]
    return Unlabelled(
        folder=str(folder),
        images_asked=len(names),
        images_counted=len(names) - len(bad_images),
        images_of_old=images_of_old,
        image_names_sha256=sha256_bytes(os.fsencode("\n".join(names))),
        bad_images=tuple(bad_images),
        classes=classes,
        agreement=float(np.mean(known)) if known else None,
        moved=moved_share(pairs[0], loaded.manifest.class_names, old_count, background),
    )


def _read(path: Path, parent: Session) -> tuple[Image.Image, NDArray[np.uint8]]:
    """The image, and the image at the size that the parent takes."""
    image = open_image(path)
    return image, resize_image(image, parent.input_height_px, parent.input_width_px)


def confident_pixels(logits_CHW: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Where the softmax of the logits gives one class `CONFIDENT` or more: 1 / sum_c exp(l_c - max l) >= share."""
    shifted_CHW = logits_CHW - logits_CHW.max(axis=0)
    confident_HW: NDArray[np.bool_] = 1.0 / np.exp(shifted_CHW).sum(axis=0) >= CONFIDENT
    return confident_HW


def unlabelled_classes(
    names: Sequence[str],
    pairs: NDArray[np.int64],
    confident: NDArray[np.int64] | None,
    images_2K: NDArray[np.int64],
    background: str | None,
) -> tuple[UnlabelledClass, ...]:
    """What is to be said of each old class.

    Args:
        names: of the bundle's classes, in channel order; the old ones come first.
        pairs: int64, all classes x all classes: pixels by the parent's channel (row) and the bundle's.
        confident: the same over the pixels of which the parent is confident; None without logits.
        images_2K: int64, 2 x K: in how many images the parent shows each old class, and the bundle.
        background: its name, where there is one.
    """
    old_count = images_2K.shape[1]
    agreement = class_iou(pairs[:old_count, :old_count])
    sure = None if confident is None else class_iou(confident[:old_count, :old_count])
    found = []
    for channel, name in enumerate(names[:old_count]):
        pixels = int(pairs[channel].sum())
        moved = int(pairs[channel, old_count:].sum()) / pixels if pixels else None
        agreed, kept = _known(agreement[channel]), None
        if name == background and pixels:
            kept = agreed or 0.0
        elif pixels:
            hit = int(pairs[channel, channel])
            kept = hit / (pixels + int(pairs[:old_count, channel].sum()) - hit)
        found.append(
            UnlabelledClass(
                name=name,
                parent_pixels=pixels,
                images=int(images_2K[0, channel]),
                bundle_images=int(images_2K[1, channel]),
                agreement=agreed,
                confident_agreement=None if sure is None else _known(sure[channel]),
                moved=moved,
                kept=kept,
            )
        )
    return tuple(found)


def moved_share(pairs: NDArray[np.int64], names: Sequence[str], old_count: int, background: str | None) -> float | None:
    """Of the pixels that the parent gives to an old class, the background left out: the share that became new."""
    rows = [channel for channel in range(old_count) if names[channel] != background]
    pixels = int(pairs[rows].sum())
    return int(pairs[rows, old_count:].sum()) / pixels if pixels else None


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
