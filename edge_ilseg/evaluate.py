"""Score a torch model: as the device would, or as the literature does.

1. `stretch`: the whole image through the device's resizer to the model's input size, and the mask brought to the
   label's size. This is the score of what is deployed (docs/adr/0002).
2. `native`: the whole image in its own size, and nothing is resized.
3. Float32 throughout: tensor cores that round their inputs are left out, so that a GPU's scores are a CPU's but for the
   order of sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from edge_ilseg.allocator import keep_freed_memory
from edge_ilseg.config import Geometry
from edge_ilseg.data.dataset import Dataset
from edge_ilseg.images import resize_image, resize_mask
from edge_ilseg.metrics import Metrics, confusion_matrix, score
from edge_ilseg.models.normalization import normalize
from edge_ilseg.models.segmentation import SegmentationModel
from edge_ilseg.progress import ProgressCallback, no_progress
from edge_ilseg.scenario import evaluation_lookup

GPU_BATCH = 32
"""Images of one size that go through a GPU at once."""
CPU_BATCH = 8
"""The same on a CPU: on one thread torch takes its slow convolutions for a batch of one, twice the time an image."""


@torch.inference_mode()
def predict_masks(
    model: SegmentationModel, images: Iterable[NDArray[np.uint8]], geometry: Geometry = "stretch"
) -> Iterator[NDArray[np.uint8]]:
    """The channel of every pixel of each image, uint8, in the order of the images.

    Args:
        model: on any device.
        images: uint8 H x W x 3, RGB, of any size.
        geometry: `stretch` gives masks of the model's input size, `native` of the image's.
    """
    spec = model.spec
    device = next(model.parameters()).device
    size = CPU_BATCH if device.type == "cpu" else GPU_BATCH
    if device.type == "cpu":
        keep_freed_memory()
    source = iter(images)
    while batch := list(islice(source, size if geometry == "stretch" else 1)):
        if geometry == "stretch":
            batch = [resize_image(image_HWC, spec.input_height_px, spec.input_width_px) for image_HWC in batch]
        images_NHWC = torch.from_numpy(np.stack(batch)).to(device)
        with torch.backends.cudnn.flags(
            enabled=torch.backends.cudnn.enabled, deterministic=torch.backends.cudnn.deterministic, allow_tf32=False
        ):
            logits_NCHW = model(normalize(images_NHWC, spec)).logits_NCHW
        yield from logits_NCHW.argmax(dim=1).to(torch.uint8).cpu().numpy()


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
    masks = predict_masks(model, (dataset.read_image(image_id) for image_id in image_ids), geometry)
    for done, (image_id, mask_HW) in enumerate(zip(image_ids, masks, strict=True), start=1):
        labels_HW = lookup[dataset.read_labels(image_id)]
        confusion += confusion_matrix(labels_HW, resize_mask(mask_HW, *labels_HW.shape), len(classes))
        progress("scoring", done / len(image_ids))
    return score(confusion, classes, old_count=old_count, background=background, images=len(image_ids))
