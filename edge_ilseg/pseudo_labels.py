"""How sure a teacher must be of a class before its word is taken for a label (PLOP, arXiv 2011.11390, section 3.3)."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from edge_ilseg.data.step_view import StepView
from edge_ilseg.images import resize_image, resize_mask
from edge_ilseg.losses import entropy
from edge_ilseg.models.normalization import normalize
from edge_ilseg.models.segmentation import SegmentationModel
from edge_ilseg.progress import ProgressCallback
from edge_ilseg.terms import hidden_pixels

SMALLEST_THRESHOLD = 0.001
"""PLOP's: a class of which the teacher is always sure is believed up to here."""
MAX_VALUES = 1 << 24
"""Entropies that are kept for the medians; of more pixels than that, a regular grid is taken."""


@torch.no_grad()
def entropy_thresholds(
    teacher: SegmentationModel, view: StepView, background: int | None, progress: ProgressCallback
) -> Tensor:
    """For each class, the median entropy of the teacher over the hidden pixels that it gives that class.

    Args:
        teacher: in eval mode, on any device.
        view: the step's images; their labels say which pixels are hidden.
        background: channel of the background, or None.
        progress: told the share of images that are done.

    Returns:
        float32 K, on the teacher's device, `SMALLEST_THRESHOLD` at least; that for a class without a pixel.
    """
    spec, device = teacher.spec, next(teacher.parameters()).device
    pixels = len(view) * spec.input_height_px * spec.input_width_px
    grid = max(1, math.ceil(math.sqrt(pixels / MAX_VALUES)))
    values, classes = [], []
    for done, image_id in enumerate(view.image_ids, start=1):
        image_HWC, labels_HW = view.read(image_id)
        image_HWC = resize_image(image_HWC, spec.input_height_px, spec.input_width_px)
        labels_HW = resize_mask(labels_HW, spec.input_height_px, spec.input_width_px)
        logits_1KHW = teacher(normalize(torch.from_numpy(image_HWC)[None].to(device), spec)).logits_NCHW
        hidden_HW = hidden_pixels(torch.from_numpy(labels_HW), background).numpy()[::grid, ::grid]
        values.append(entropy(logits_1KHW)[0, ::grid, ::grid].float().cpu().numpy()[hidden_HW])
        classes.append(logits_1KHW.argmax(dim=1)[0, ::grid, ::grid].cpu().numpy()[hidden_HW])
        progress("entropy of the teacher", done / len(view))
    all_values, all_classes = np.concatenate(values), np.concatenate(classes)
    medians = [
        float(np.median(all_values[all_classes == k])) if (all_classes == k).any() else 0.0
        for k in range(teacher.class_count)
    ]
    return torch.tensor(medians, dtype=torch.float32, device=device).clamp(min=SMALLEST_THRESHOLD)
