"""What is frozen runs once for teacher and student, and changes no bit (rules of edge_ilseg/trunk.py)."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from edge_ilseg.models.freezing import ENCODER_STAGES, frozen_modules
from edge_ilseg.models.segmentation import SegmentationModel, SegmentationOutput, build_model
from edge_ilseg.models.spec import Backbone, Head, ModelSpec
from edge_ilseg.trunk import check_trunk_is_shared, forward_pair, trunk_cut

BACKBONES: tuple[Backbone, ...] = ("tiny", "efficientnet_lite0", "resnet18")
HEADS: tuple[Head, ...] = ("deeplab_v2", "deeplab_v3")
CUTS = [
    (backbone, head, freeze)
    for backbone in BACKBONES
    for head in HEADS
    for freeze in (
        "none",
        "stem",
        *(f"stages:{n + 1}" for n in range(ENCODER_STAGES[backbone])),
        "encoder",
        "all_but_head",
    )
]
IMAGES = torch.randn(2, 3, 17, 24, generator=torch.Generator().manual_seed(2))


@functools.cache
def make_teacher(backbone: Backbone, head: Head) -> SegmentationModel:
    torch.manual_seed(0)
    spec = ModelSpec(backbone=backbone, head=head, decoder_channels=8, input_height_px=17, input_width_px=24)
    return build_model(spec, (3,))


def make_pair(backbone: Backbone, head: Head, freeze: str) -> tuple[SegmentationModel, SegmentationModel]:
    """A student one step after its teacher, as `train` prepares them."""
    teacher = copy.deepcopy(make_teacher(backbone, head))
    student = copy.deepcopy(teacher)
    student.grow(1)
    student.set_frozen(freeze)
    student.set_batch_norm("train")
    return student.train(), teacher.requires_grad_(False).eval()


def wrapped(student: SegmentationModel) -> Any:
    module = Fabric(accelerator="cpu", devices=1).setup_module(student)
    module.mark_forward_method("tail")
    return module


def tensors(output: SegmentationOutput) -> list[Tensor]:
    return [output.logits_NCHW, output.features_NCHW, *output.branches, *output.stages]


def learn(output: SegmentationOutput, seen: SegmentationOutput) -> None:
    """Gradients of a loss that looks at everything."""
    near = [(own[:, : other.shape[1]] - other).square().mean() for own, other in zip(tensors(output), tensors(seen))]  # noqa: B905
    (output.logits_NCHW.logsumexp(dim=1).mean() + torch.stack(near).sum()).backward()


@pytest.mark.parametrize(("backbone", "head", "freeze"), CUTS)
def test_a_shared_trunk_gives_the_bits_of_two_whole_networks(backbone: Backbone, head: Head, freeze: str) -> None:
    student, teacher = make_pair(backbone, head, freeze)
    whole = copy.deepcopy(student)
    output, seen = forward_pair(wrapped(student), teacher, IMAGES)
    assert seen is not None
    with torch.no_grad():
        whole_seen = teacher(IMAGES)
    whole_output = whole(IMAGES)
    for found, expected in ((output, whole_output), (seen, whole_seen)):
        assert len(found.stages) == ENCODER_STAGES[backbone]
        for own, other in zip(tensors(found), tensors(expected), strict=True):
            assert torch.equal(own, other)
    learn(output, seen)
    learn(whole_output, whole_seen)
    expected_gradients = dict(whole.named_parameters())
    for name, parameter in student.named_parameters():
        gradient = expected_gradients[name].grad
        assert (parameter.grad is None) == (gradient is None), name
        assert parameter.grad is None or gradient is None or torch.equal(parameter.grad, gradient), name
    for name, tensor in student.state_dict().items():  # statistics of batch norms in the tail
        assert torch.equal(tensor, whole.state_dict()[name]), name


class Calls:
    """How often modules run, and how."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.count = 0
        for module in modules:
            module.register_forward_hook(self._note)

    def _note(self, module: nn.Module, inputs: Any, output: Any) -> None:
        del inputs, output
        self.count += 1
        assert not torch.is_grad_enabled()
        assert not module.training


@pytest.mark.parametrize("freeze", ["stem", "stages:2", "encoder", "all_but_head"])
@pytest.mark.parametrize("with_teacher", [True, False])
def test_what_is_frozen_runs_once_without_gradients_in_eval_mode(freeze: str, with_teacher: bool) -> None:
    student, teacher = make_pair("tiny", "deeplab_v3", freeze)
    leaves = [
        [leaf for module in frozen_modules(net, freeze) for leaf in module.modules() if isinstance(leaf, nn.Conv2d)]
        for net in (student, teacher)
    ]
    own, others = Calls(list(leaves[0])), Calls(list(leaves[1]))
    _, seen = forward_pair(wrapped(student), teacher if with_teacher else None, IMAGES)
    assert (seen is not None) == with_teacher
    assert own.count == len(leaves[0])
    assert others.count == 0


def test_under_all_but_head_the_classifiers_alone_run_twice() -> None:
    student, teacher = make_pair("tiny", "deeplab_v3", "all_but_head")
    counts = dict.fromkeys(("student", "teacher"), 0)

    def count(name: str) -> None:
        counts[name] += 1

    for name, net in (("student", student), ("teacher", teacher)):
        for leaf in net.modules():
            if isinstance(leaf, nn.Conv2d):
                leaf.register_forward_hook(lambda *_, name=name: count(name))
    forward_pair(wrapped(student), teacher, IMAGES)
    every = sum(isinstance(leaf, nn.Conv2d) for leaf in student.modules())
    assert counts == {"student": every, "teacher": 1}


def test_where_nothing_is_frozen_there_is_no_trunk() -> None:
    student, _ = make_pair("tiny", "deeplab_v3", "none")
    assert trunk_cut(student) is None


@pytest.mark.parametrize(("freeze", "refused"), [("stem", False), ("stages:1", True), ("encoder", True)])
def test_a_teacher_with_other_bits_in_the_trunk_is_refused(freeze: str, refused: bool) -> None:
    student, teacher = make_pair("tiny", "deeplab_v3", freeze)
    teacher.encoder.stages[0][0].bn.running_mean[0] += 1e-3
    if refused:
        with pytest.raises(ValueError, match="running_mean"):
            check_trunk_is_shared(student, teacher)
    else:
        check_trunk_is_shared(student, teacher)
