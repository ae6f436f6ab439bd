"""What a bundle and its parent have in common on images without labels: the part of the report. Plain data."""

from __future__ import annotations

import msgspec


class UnlabelledClass(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One old class on images without labels."""

    name: str
    parent_pixels: int
    """Pixels that the parent gives to it."""
    images: int
    """Images of which the parent gives it `edge_ilseg.devices.agreement.SHOWN` or more."""
    bundle_images: int
    """The same of the bundle."""
    agreement: float | None
    """IoU of the two masks, over the pixels that the bundle does not call new; None: neither shows the class."""
    confident_agreement: float | None
    """The same over the pixels of which the parent is confident; None without logits."""
    moved: float | None
    """Share of the parent's pixels that the bundle calls new."""
    kept: float | None
    """IoU of the two masks over all pixels: one that the bundle calls new counts against it. Of the background, where
    new objects were before, the agreement. None: the parent shows no pixel of it."""


class Unlabelled(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A bundle beside its parent on images without labels."""

    folder: str
    images_asked: int
    images_counted: int
    images_of_old: int
    """Those in which the parent shows an old class, the background left out where there are others."""
    image_names_sha256: str
    bad_images: tuple[tuple[str, str], ...]
    """Name and reason."""
    classes: tuple[UnlabelledClass, ...]
    agreement: float | None
    """Mean over the old classes that either mask shows."""
    moved: float | None
    """Of the pixels that the parent gives to an old class, the background left out: the share that became new."""
