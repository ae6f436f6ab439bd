"""Score a torch model: as the device would, or as the literature does.

1. `stretch`: the whole image through the device's resizer to the model's input size, and the mask brought to the
   label's size. This is the score of what is deployed (docs/adr/0002).
2. `native`: the whole image in its own size, and nothing is resized.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from edge_ilseg.config import Geometry
from edge_ilseg.data.dataset import Dataset
from edge_ilseg.images import resize_image, resize_mask
from edge_ilseg.metrics import Metrics, confusion_matrix, score
from edge_ilseg.models.normalization import normalize
from edge_ilseg.models.segmentation import SegmentationModel
from edge_ilseg.progress import ProgressCallback, no_progress
from edge_ilseg.scenario import evaluation_lookup


@torch.inference_mode()
def predict_mask(
    model: SegmentationModel, image_HWC: NDArray[np.uint8], geometry: Geometry = "stretch"
) -> NDArray[np.uint8]:
    """The channel of every pixel, uint8: at the model's input size with `stretch`, at the image's with `native`."""
    spec = model.spec
    resized_HWC = image_HWC
    if geometry == "stretch":
        resized_HWC = resize_image(image_HWC, spec.input_height_px, spec.input_width_px)
    device = next(model.parameters()).device
    logits_NCHW = model(normalize(torch.from_numpy(resized_HWC)[None].to(device), spec)).logits_NCHW
    mask_HW: NDArray[np.uint8] = logits_NCHW[0].argmax(dim=0).to(torch.uint8).cpu().numpy()
    return mask_HW


def evaluate_model(
    model: SegmentationModel,
    dataset: Dataset,
    image_ids: Sequence[str],
    classes: Sequence[str],
    *,
    old_count: int,
    background: str | None,
    geometry: Geometry = "stretch",
    progress: ProgressCallback = no_progress,
) -> Metrics:
    """Score `model` on labelled images; classes that it does not know count as background, or as void.

    Args:
        model: on any device; it is put into eval mode.
        dataset: where images and labels are read from.
        image_ids: which images.
        classes: class names in channel order.
        old_count: how many of the first channels are old classes.
        background: name of the background class, if any.
        geometry: rules 1 and 2.
    """
    model.eval()
    lookup = evaluation_lookup(dataset.info.classes, dataset.info.background, classes)
    confusion = np.zeros((len(classes), len(classes)), dtype=np.int64)
    for done, image_id in enumerate(image_ids, start=1):
        mask_HW = predict_mask(model, dataset.read_image(image_id), geometry)
        labels_HW = lookup[dataset.read_labels(image_id)]
        confusion += confusion_matrix(labels_HW, resize_mask(mask_HW, *labels_HW.shape), len(classes))
        progress("scoring", done / len(image_ids))
    return score(confusion, classes, old_count=old_count, background=background, images=len(image_ids))
