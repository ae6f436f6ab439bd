"""The trunk: what a step freezes is the parent's, so teacher and student have it in common.

1. With a frozen prefix (`stem`, `stages:n`, `encoder`, `all_but_head`) it runs once for each batch, in eval mode and
   without gradients; from there on the tails run, one for each network. Under `all_but_head` the decoder's body is
   part of it.
2. In float32 the outputs, and so the weights that are learned, are those of two whole networks to the bit.
3. A method without a teacher runs its trunk like that, too.
4. Every output is there all the same: a loss that looks at a stage of the trunk gets it.
5. The two trunks are compared once, before training: networks that differ in what is frozen are refused.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from edge_ilseg.models.freezing import frozen_modules, parse_freeze
from edge_ilseg.models.segmentation import SegmentationModel, SegmentationOutput


class TrunkCut(NamedTuple):
    """Where a trunk ends."""

    stages: int
    """Stages of the encoder behind its stem."""
    with_body: bool
    """Whether the decoder's body follows."""


def trunk_cut(model: SegmentationModel) -> TrunkCut | None:
    """The end of all that `model` has frozen; None where nothing is."""
    cut = parse_freeze(model.freeze)
    match cut.name:
        case "none":
            return None
        case "stem" | "stages":
            return TrunkCut(cut.stages, with_body=False)
    return TrunkCut(len(model.encoder.stages), with_body=cut.name == "all_but_head")


def check_trunk_is_shared(student: SegmentationModel, teacher: SegmentationModel) -> None:
    """Raise `ValueError` unless the teacher has the bits that the student has frozen (rule 5)."""
    pairs = zip(frozen_modules(student, student.freeze), frozen_modules(teacher, student.freeze), strict=True)
    for own, other in pairs:
        state = other.state_dict()
        differing = [name for name, tensor in own.state_dict().items() if not torch.equal(tensor, state[name])]
        if differing:
            raise ValueError(f"what is frozen is not the teacher's: {differing[0]} of {type(own).__name__} differs")


def forward_pair(
    student: Any, teacher: SegmentationModel | None, images_NCHW: Tensor
) -> tuple[SegmentationOutput, SegmentationOutput | None]:
    """The outputs of the student and, where there is one, of the teacher, for one batch (rules 1 to 4).

    Args:
        student: as Fabric has wrapped it, `tail` marked as a forward method.
        teacher: in eval mode, on the same device; its trunk is the student's.
        images_NCHW: normalised.
    """
    model: SegmentationModel = student.module
    cut = trunk_cut(model)
    if cut is None:
        with torch.no_grad():
            seen = teacher(images_NCHW) if teacher is not None else None
        return student(images_NCHW), seen
    with torch.no_grad():
        trunk = model.trunk(images_NCHW, cut.stages, with_body=cut.with_body)
        seen = teacher.tail(trunk) if teacher is not None else None
    return student.tail(trunk), seen
