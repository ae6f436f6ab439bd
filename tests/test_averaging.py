"""Weights between the teacher's and the student's."""

from __future__ import annotations

import copy

import pytest
import torch

from edge_ilseg.averaging import average_with
from edge_ilseg.models.freezing import encoder_sha256
from edge_ilseg.models.segmentation import SegmentationModel, build_model
from edge_ilseg.models.spec import ModelSpec

SPEC = ModelSpec(backbone="tiny", decoder_channels=8, input_height_px=32, input_width_px=32)


def pair() -> tuple[SegmentationModel, SegmentationModel]:
    torch.manual_seed(0)
    teacher = build_model(SPEC, (3,))
    student = copy.deepcopy(teacher)
    student.grow(2)
    with torch.no_grad():
        for parameter in student.decoder.parameters():
            parameter.add_(1.0)
    return teacher, student


def test_each_weight_moves_its_share_of_the_way_and_new_classes_stay() -> None:
    teacher, student = pair()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    average_with(teacher, student, 0.25)
    for name, tensor in teacher.decoder.named_parameters():
        torch.testing.assert_close(student.get_parameter(f"decoder.{name}"), tensor + 0.25, msg=name)
    for leaf in ("weight", "bias"):
        name = f"decoder.classifiers.0.steps.1.{leaf}"
        assert torch.equal(student.state_dict()[name], before[name])


@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
def test_what_is_equal_in_both_stays_to_the_bit(share: float) -> None:
    teacher, student = pair()
    average_with(teacher, student, share)
    assert encoder_sha256(student) == encoder_sha256(teacher)


def test_a_share_of_one_changes_nothing() -> None:
    teacher, student = pair()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    average_with(teacher, student, 1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
