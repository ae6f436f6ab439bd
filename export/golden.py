"""Golden images and masks: what the shipped models gave when they were made, so that a device can compare.

The images are scenes of the generated data set `shapes` at the model's input size: they need nobody's data, and are
the same for the same size and seed. They test the arithmetic, not the accuracy.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_ilseg.bundle import ModelEntry
from edge_ilseg.data.shapes import Shapes
from edge_ilseg.devices.runtime import load_session
from edge_ilseg.files import write_bytes

GOLDEN_IMAGES = "golden/images.npy"


def golden_masks_name(runtime: str, precision: str) -> str:
    """Where a model's golden masks lie in the bundle."""
    return f"golden/{runtime}-{precision}.npy"


def golden_scenes(count: int, height_px: int, width_px: int, seed: int) -> NDArray[np.uint8]:
    """`count` generated scenes, uint8, N x H x W x 3.

    Raises:
        ConfigError: the size is outside of what the generator draws.
    """
    scenes = Shapes(seed=seed, train=0, val=0, test=count, height_px=height_px, width_px=width_px)
    return np.stack([scenes.read_image(image_id) for image_id in scenes.ids("test")])


def predict_masks(folder: Path, entry: ModelEntry, images_NHWC: Iterable[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """What the model of a bundle gives for images at its input size, uint8, N x H x W, run as on a device."""
    session = load_session(folder, entry)
    return np.stack([session.mask(image_HWC) for image_HWC in images_NHWC])


def write_npy(path: Path, array: NDArray[np.uint8]) -> None:
    """Write an array as `.npy`, never pickled."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, buffer.getvalue())
