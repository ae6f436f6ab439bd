"""Freezing: cut points, and the proof that what is frozen does not move."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from edge_ilseg.errors import ConfigError
from edge_ilseg.models.freezing import (
    ENCODER_STAGES,
    CutPoint,
    encoder_sha256,
    frozen_modules,
    is_encoder_frozen,
    parse_freeze,
)
from edge_ilseg.models.segmentation import BACKBONES, SegmentationModel, build_model
from edge_ilseg.models.spec import Head, ModelSpec


def model(head: Head = "deeplab_v3") -> SegmentationModel:
    torch.manual_seed(0)
    spec = ModelSpec(backbone="tiny", head=head, output_stride=8, decoder_channels=16)
    return build_model(spec, (3,))


def train_a_little(net: SegmentationModel) -> None:
    """Three SGD steps with momentum and weight decay over *all* parameters, in train mode."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    net.train()
    for _ in range(3):
        optimizer.zero_grad(set_to_none=True)
        net(torch.randn(2, 3, 48, 64)).logits_NCHW.square().mean().backward()
        optimizer.step()


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("head", ["deeplab_v2", "deeplab_v3"])
@pytest.mark.parametrize(
    ("freeze", "prefixes"),
    [
        ("none", ()),
        ("stem", ("encoder.stem.",)),
        ("stages:2", ("encoder.stem.", "encoder.stages.0.", "encoder.stages.1.")),
        ("encoder", ("encoder.",)),
        ("all_but_head", ("encoder.", "decoder.branches.", "decoder.pooling.", "decoder.projection.")),
    ],
)
def test_exactly_what_is_frozen_stays_bit_identical(head: Head, freeze: str, prefixes: tuple[str, ...]) -> None:
    net = model(head)
    net.set_frozen(freeze)
    before = state(net)
    train_a_little(net)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith(prefixes), name


def test_momentum_gathered_before_freezing_moves_nothing() -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    images_NCHW = torch.randn(2, 3, 48, 64)
    net(images_NCHW).logits_NCHW.square().mean().backward()
    optimizer.step()
    net.set_frozen("encoder")
    before = encoder_sha256(net)
    net(images_NCHW).logits_NCHW.square().mean().backward()
    optimizer.step()
    assert encoder_sha256(net) == before


def test_frozen_batch_norm_stays_in_eval_mode_whoever_calls_train() -> None:
    net = model()
    net.set_frozen("encoder")
    before = encoder_sha256(net)
    net.train()
    assert not net.encoder.training
    assert net.decoder.training
    net.encoder.train()
    for module in net.modules():
        module.train()
    net(torch.randn(2, 3, 48, 64))
    assert encoder_sha256(net) == before


def test_batch_norm_eval_keeps_every_statistic_and_trains_the_weights() -> None:
    net = model()
    net.set_batch_norm("eval")
    before = state(net)
    train_a_little(net)
    for name, tensor in net.state_dict().items():
        held = name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        assert torch.equal(tensor, before[name]) == held, name


def test_thawing_gives_everything_back() -> None:
    net = model()
    net.set_frozen("all_but_head")
    net.set_batch_norm("eval")
    net.set_frozen("none")
    net.set_batch_norm("train")
    net.train()
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert all(module.training for module in net.modules())


def test_new_classes_of_a_frozen_network_are_trained() -> None:
    net = model()
    net.set_frozen("all_but_head")
    net.grow(2)
    trained = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    assert trained == [f"decoder.classifiers.0.steps.{step}.{leaf}" for step in (0, 1) for leaf in ("weight", "bias")]


def test_cut_points_are_parsed() -> None:
    assert parse_freeze("encoder") == CutPoint("encoder")
    assert parse_freeze("stages:12") == CutPoint("stages", 12)


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("encodr", "did you mean 'encoder'?"),
        ("stages", "as in 'stages:2'"),
        ("stages:0", "as in 'stages:2'"),
        ("stages:-1", "as in 'stages:2'"),
        ("", "stages:<n>"),
        ("stages:1\n", "as in 'stages:2'"),
    ],
)
def test_an_unknown_cut_point_is_refused_with_advice(text: str, advice: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_freeze(text)
    assert advice in str(caught.value)


def test_more_stages_than_there_are_is_refused_and_changes_nothing() -> None:
    net = model()
    net.set_frozen("stem")
    with pytest.raises(ConfigError, match="fewer stages") as caught:
        net.set_frozen("stages:4")
    assert "stages:3" in str(caught.value)
    assert net.freeze == "stem"
    assert frozen_modules(net, "stem") == [net.encoder.stem]


@pytest.mark.parametrize(
    "name", ["stem.conv.weight", "stages.2.1.bn.running_mean", "stages.0.0.bn.num_batches_tracked"]
)
def test_the_encoder_hash_sees_every_tensor(name: str) -> None:
    net = model()
    before = encoder_sha256(net)
    net.grow(2)
    assert encoder_sha256(net) == before
    tensor = net.encoder.state_dict()[name].view(-1)
    tensor[0] += 1
    assert encoder_sha256(net) != before


def test_the_stages_that_are_listed_are_those_that_are_built() -> None:
    with torch.device("meta"):
        built = {name: len(build(16).stages) for name, build in BACKBONES.items()}
    assert built == ENCODER_STAGES


@pytest.mark.parametrize("freeze", ["none", "stem", *(f"stages:{n}" for n in (1, 2, 3)), "encoder", "all_but_head"])
def test_an_encoder_counts_as_frozen_when_nothing_of_it_is_left_to_train(freeze: str) -> None:
    net = model()
    net.set_frozen(freeze)
    left = [parameter for parameter in net.encoder.parameters() if parameter.requires_grad]
    assert is_encoder_frozen(freeze, "tiny") == (not left)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_freezing_every_stage_freezes_the_encoder_and_one_less_does_not(backbone: str) -> None:
    count = ENCODER_STAGES[backbone]
    assert is_encoder_frozen(f"stages:{count}", backbone)
    assert not is_encoder_frozen(f"stages:{count - 1}", backbone)
    with torch.device("meta"):
        encoder = BACKBONES[backbone](16)  # type: ignore[index]
    assert {name.split(".")[0] for name, _ in encoder.named_parameters()} == {"stem", "stages"}


def test_an_unknown_cut_point_freezes_nothing_but_raises() -> None:
    with pytest.raises(ConfigError, match="unknown cut point"):
        is_encoder_frozen("encodr", "tiny")


def test_cut_points_are_checked_without_torch() -> None:
    program = "import sys; sys.modules['torch'] = None; import edge_ilseg.models.freezing, edge_ilseg.models.spec"
    subprocess.run([sys.executable, "-c", program], check=True)
