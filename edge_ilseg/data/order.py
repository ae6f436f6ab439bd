"""Which image, and which view of it, each sample of a run shows. No torch here.

1. Epoch e has its own permutation of the images: every image is seen once before any is seen twice.
2. View number v is what sample v of the run shows. Without repetition each sample shows a view of its own. With `views`
   views of each image, the first `views` epochs do so too, and make them; a later epoch shows those of epoch modulo
   `views`, in its own order: a view is a function of (seed, image, epoch mod views).
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray


@functools.lru_cache(maxsize=4)
def epoch_order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of the images in an epoch (rule 1)."""
    return np.random.default_rng([seed, 0, epoch]).permutation(count)


def sample_views(sample_count: int, image_count: int, seed: int, views: int) -> NDArray[np.int64]:
    """The number of the view that each sample of the run shows (rule 2)."""
    numbers = np.arange(sample_count, dtype=np.int64)
    for start in range(views * image_count, sample_count, image_count):
        epoch = start // image_count
        made_in = epoch % views
        position_of_image = np.argsort(epoch_order(image_count, seed, made_in))
        shown = made_in * image_count + position_of_image[epoch_order(image_count, seed, epoch)]
        numbers[start : start + image_count] = shown[: sample_count - start]
    return numbers
