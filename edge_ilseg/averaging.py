"""Weights between those of the teacher and those that a step has learned.

Source: Wortsman et al., "Robust fine-tuning of zero-shot models" (arXiv 2109.01903), eq. 1.
"""

from __future__ import annotations

import torch

from edge_ilseg.models.segmentation import SegmentationModel


@torch.no_grad()
def average_with(teacher: SegmentationModel, model: SegmentationModel, new_share: float) -> None:
    """Replace each weight and statistic of `model` by `new_share` * its own + (1 - `new_share`) * the teacher's.

    What the teacher does not have (the classifiers of the new classes) stays as it is, and so does, to the bit, what
    is equal in both (a frozen encoder).

    Args:
        teacher: the parent's network, on the same device.
        model: changed in place.
        new_share: 0..1; 1 changes nothing.
    """
    if new_share == 1.0:
        return
    old = teacher.state_dict()
    for name, tensor in model.state_dict().items():
        if name not in old or not tensor.is_floating_point() or tensor.shape != old[name].shape:
            continue
        before = old[name].to(tensor.device)
        if not torch.equal(before, tensor):
            tensor.copy_(new_share * tensor + (1 - new_share) * before)
