"""Joint augmentation of an image and its labels, in numpy and Pillow.

1. Image and labels go through the same geometry; only the filter differs (bilinear, nearest pixel centre).
2. At scale 1 an image is what the device will see: stretched to the size of the net, by the same resizer. With
   `native` it is the image in its own size, as in the literature, and a crop of the size of the net is taken from it.
3. Outside the image there is the fill colour in the image and void in the labels.
4. Every draw comes from the generator given, in a fixed order: the same generator state, the same result.
"""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_ilseg.errors import ConfigError
from edge_ilseg.images import Color, resize_image, resize_mask
from edge_ilseg.metrics import VOID


class Augmentation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is varied: the scale (uniform between the two, rule 2 says of what) and left and right."""

    scale_min: float = 0.5
    scale_max: float = 1.5
    flip: bool = True
    native: bool = False


def check_augmentation(augmentation: Augmentation) -> None:
    """Check the range of scales.

    Raises:
        ConfigError: it is empty or leaves 0.05 to 20.
    """
    if not 0.05 <= augmentation.scale_min <= augmentation.scale_max <= 20:
        raise ConfigError(
            "the range of scales of the augmentation cannot be used",
            found=f"{augmentation.scale_min} to {augmentation.scale_max}",
            expected="0.05 <= scale_min <= scale_max <= 20",
            hint="set both within these bounds: --set scale_min=0.5 --set scale_max=1.5",
        )


def augment(
    image_HWC: NDArray[np.uint8],
    labels_HW: NDArray[np.uint8],
    augmentation: Augmentation,
    height_px: int,
    width_px: int,
    fill: Color,
    rng: np.random.Generator,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Resize by a random scale (rule 2), crop or pad to the net's size at a random offset, perhaps flip.

    Args:
        image_HWC: uint8, H x W x 3, of any size.
        labels_HW: uint8, H x W, label ids or channels; 255 is void.
        fill: colour around an image that is smaller than the crop, the mean colour of the normalisation as a rule.

    Returns:
        uint8 height_px x width_px x 3 and uint8 height_px x width_px, both new and contiguous.

    Raises:
        ValueError: image and labels differ in size.
    """
    if image_HWC.shape[:2] != labels_HW.shape:
        raise ValueError(f"image {image_HWC.shape[:2]} and labels {labels_HW.shape} differ in size")
    scale = rng.uniform(augmentation.scale_min, augmentation.scale_max)
    at_y, at_x = rng.random(2)
    mirrored = augmentation.flip and rng.random() < 0.5
    unit_height, unit_width = labels_HW.shape if augmentation.native else (height_px, width_px)
    scaled_height, scaled_width = max(1, round(unit_height * scale)), max(1, round(unit_width * scale))
    source_y, target_y = _overlap(scaled_height, height_px, at_y)
    source_x, target_x = _overlap(scaled_width, width_px, at_x)
    image_out = np.full((height_px, width_px, 3), fill, dtype=np.uint8)
    labels_out = np.full((height_px, width_px), VOID, dtype=np.uint8)
    image_out[target_y, target_x] = resize_image(image_HWC, scaled_height, scaled_width)[source_y, source_x]
    labels_out[target_y, target_x] = resize_mask(labels_HW, scaled_height, scaled_width)[source_y, source_x]
    if mirrored:
        return np.ascontiguousarray(image_out[:, ::-1]), np.ascontiguousarray(labels_out[:, ::-1])
    return image_out, labels_out


def _overlap(scaled_px: int, target_px: int, at: float) -> tuple[slice, slice]:
    """Along one axis: which pixels of the scaled image go to which of the result; `at` in 0..1 is the offset."""
    common = min(scaled_px, target_px)
    source = int(at * (scaled_px - common + 1))
    target = int(at * (target_px - common + 1))
    return slice(source, source + common), slice(target, target + common)
