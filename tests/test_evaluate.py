"""Scores of a torch model: at the deployed size, or of whole images in their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fakes import HEIGHT_PX, WIDTH_PX, random_images, small_model

from edge_ilseg.config import Geometry
from edge_ilseg.evaluate import CPU_BATCH, predict_masks
from edge_ilseg.images import resize_image
from edge_ilseg.models.normalization import normalize


@pytest.mark.parametrize(
    ("geometry", "shape"), [("stretch", (HEIGHT_PX, WIDTH_PX)), ("native", (2 * HEIGHT_PX, 2 * WIDTH_PX))]
)
def test_a_mask_is_that_of_the_deployed_size_or_of_the_whole_image(geometry: Geometry, shape: tuple[int, int]) -> None:
    model = small_model(seed=3)
    image_HWC = random_images(1, height_px=2 * HEIGHT_PX, width_px=2 * WIDTH_PX)[0]
    (mask_HW,) = predict_masks(model, [image_HWC], geometry)
    assert mask_HW.shape == shape
    seen_HWC = resize_image(image_HWC, *shape)
    with torch.inference_mode():
        logits_NCHW = model(normalize(torch.from_numpy(np.ascontiguousarray(seen_HWC))[None], model.spec)).logits_NCHW
    assert np.array_equal(mask_HW, logits_NCHW[0].argmax(dim=0).numpy())
    assert len(np.unique(mask_HW)) > 1


def test_images_of_any_sizes_go_through_together_and_come_back_in_their_order() -> None:
    model = small_model(seed=3)
    count = 2 * CPU_BATCH + 1
    images = [random_images(1, height_px=HEIGHT_PX + k % 3, width_px=WIDTH_PX)[0] // (1 + k % 5) for k in range(count)]
    together = list(predict_masks(model, images))
    alone = [next(predict_masks(model, [image_HWC])) for image_HWC in images]
    assert len(together) == count
    assert all(np.mean(one_HW == other_HW) > 0.999 for one_HW, other_HW in zip(together, alone, strict=True))
    assert any(not np.array_equal(together[0], mask_HW) for mask_HW in together[1:])
