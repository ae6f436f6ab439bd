"""One contract for every backbone and head (rules of edge_ilseg/models/segmentation.py)."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import math
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from edge_ilseg.errors import ConfigError
from edge_ilseg.models.freezing import encoder_sha256
from edge_ilseg.models.head import GrowInit
from edge_ilseg.models.normalization import normalize
from edge_ilseg.models.segmentation import BACKBONES, HEADS, SegmentationModel, build_model
from edge_ilseg.models.spec import Backbone, Head, ModelSpec, aspp_rates

QUICK: tuple[Backbone, ...] = ("tiny", "efficientnet_lite0", "resnet18")
PAIRS = [
    pytest.param(backbone, head, marks=() if backbone in QUICK else pytest.mark.slow)
    for backbone, head in itertools.product(BACKBONES, HEADS)
]
every_pair = pytest.mark.parametrize(("backbone", "head"), PAIRS)


def model(
    backbone: Backbone, head: Head, output_stride: int = 8, counts: tuple[int, ...] = (3, 2)
) -> SegmentationModel:
    torch.manual_seed(0)
    spec = ModelSpec(
        backbone=backbone,
        head=head,
        output_stride=16 if output_stride == 16 else 8,
        decoder_channels=16,
        input_height_px=48,
        input_width_px=64,
    )
    return build_model(spec, counts)


@every_pair
@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize(("height_px", "width_px"), [(48, 64), (33, 51)])
def test_logits_have_the_images_size_and_features_the_output_stride(
    backbone: Backbone, head: Head, output_stride: int, height_px: int, width_px: int
) -> None:
    net = model(backbone, head, output_stride).eval()
    with torch.no_grad():
        out = net(torch.randn(2, 3, height_px, width_px))
    assert out.logits_NCHW.shape == (2, 5, height_px, width_px)
    height, width = math.ceil(height_px / output_stride), math.ceil(width_px / output_stride)
    assert out.features_NCHW.shape == (2, net.encoder.out_channels, height, width)
    channels = 5 if head == "deeplab_v2" else 16
    assert len(out.branches) == (4 if head == "deeplab_v2" else 5)
    assert all(branch.shape == (2, channels, height, width) for branch in out.branches)


@every_pair
def test_every_parameter_gets_a_gradient(backbone: Backbone, head: Head) -> None:
    net = model(backbone, head).train()
    weights = torch.randn(2, 5, 48, 64)
    (net(torch.randn(2, 3, 48, 64)).logits_NCHW * weights).sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@every_pair
@pytest.mark.parametrize("init", ["default", "scaled"])
def test_growing_leaves_the_old_logits_bit_identical(backbone: Backbone, head: Head, init: GrowInit) -> None:
    net = model(backbone, head).eval()
    with torch.no_grad():
        features_NCHW = net.encode(torch.randn(1, 3, 48, 64))[-1]
        before_NCHW, _ = net.decoder(features_NCHW)
        enlarged_before_NCHW = net.decode(features_NCHW, 48, 64).logits_NCHW
        net.grow(4, init)
        after_NCHW, _ = net.decoder(features_NCHW)
        enlarged_after_NCHW = net.decode(features_NCHW, 48, 64).logits_NCHW
    assert (net.class_counts, net.class_count) == ((3, 2, 4), 9)
    assert torch.equal(after_NCHW[:, :5], before_NCHW)
    one_rounding = float(before_NCHW.abs().max()) * 2**-22
    torch.testing.assert_close(enlarged_after_NCHW[:, :5], enlarged_before_NCHW, atol=one_rounding, rtol=0)


@pytest.mark.parametrize("head", HEADS)
def test_background_init_shares_out_the_probability_of_background(head: Head) -> None:
    net = model("tiny", head).eval()
    with torch.no_grad():
        features_NCHW = net.encode(torch.randn(1, 3, 48, 64))[-1]
        before_NCHW, _ = net.decoder(features_NCHW)
        net.grow(3, "background", background_channel=0)
        after_NCHW, _ = net.decoder(features_NCHW)
    assert torch.equal(after_NCHW[:, 1:5], before_NCHW[:, 1:5])
    for channel in (0, 5, 6, 7):
        torch.testing.assert_close(after_NCHW[:, channel], before_NCHW[:, 0] - math.log(4), atol=1e-5, rtol=0)


@every_pair
def test_the_state_survives_safetensors(backbone: Backbone, head: Head, tmp_path: Path) -> None:
    net = model(backbone, head).train()
    net(torch.randn(2, 3, 48, 64))  # batch norm statistics that are not the initial ones
    net.grow(2)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    torch.manual_seed(1)
    again = build_model(net.spec, net.class_counts)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    images_NCHW = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        assert torch.equal(again.eval()(images_NCHW).logits_NCHW, net.eval()(images_NCHW).logits_NCHW)
    assert encoder_sha256(again) == encoder_sha256(net)


@every_pair
def test_a_frozen_encoder_is_bit_identical_after_training(backbone: Backbone, head: Head) -> None:
    net = model(backbone, head)
    net.set_frozen("encoder")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    net.train()
    before = encoder_sha256(net)
    decoder = copy.deepcopy(net.decoder.state_dict())
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.randn(2, 3, 48, 64)).logits_NCHW.square().mean().backward()
        optimizer.step()
    assert encoder_sha256(net) == before
    changed = [name for name, tensor in net.decoder.state_dict().items() if not torch.equal(tensor, decoder[name])]
    assert changed == list(decoder)


@pytest.mark.parametrize(
    ("backbone", "head"),
    [
        pytest.param(backbone, head, marks=() if backbone == "tiny" else pytest.mark.slow)
        for backbone, head in itertools.product(BACKBONES, HEADS)
    ],
)
def test_onnxruntime_computes_the_same_logits_of_the_exported_graph(
    backbone: Backbone, head: Head, tmp_path: Path
) -> None:
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)} (they come with the extra export)")
    import onnxruntime

    from edge_ilseg.export.float_onnx import write_float_onnx

    net = model(backbone, head, output_stride=16).train()
    with torch.no_grad():
        net(torch.randn(4, 3, 48, 64))
    image_NHWC = torch.randint(0, 256, (1, 48, 64, 3), dtype=torch.uint8)
    with torch.no_grad():
        expected_NCHW = net.eval()(normalize(image_NHWC, net.spec)).logits_NCHW.numpy()
    write_float_onnx(net, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    logits_NCHW, mask_NHW = session.run(["logits", "mask"], {"image": image_NHWC.numpy()})
    scale = max(1.0, float(np.abs(expected_NCHW).max()))
    assert logits_NCHW.shape == expected_NCHW.shape
    np.testing.assert_allclose(logits_NCHW / scale, expected_NCHW / scale, atol=1e-4, rtol=0)
    np.testing.assert_array_equal(mask_NHW, logits_NCHW.argmax(axis=1))


@pytest.mark.parametrize("head", HEADS)
def test_a_batch_of_one_trains(head: Head) -> None:
    net = model("tiny", head).train()
    net(torch.randn(1, 3, 48, 64)).logits_NCHW.mean().backward()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning_fabric_can_wrap_the_network(precision: str) -> None:
    fabric_module = pytest.importorskip("lightning_fabric")
    net = model("tiny", "deeplab_v3").train()
    fabric = fabric_module.Fabric(accelerator="cpu", devices=1, precision=precision)
    wrapped = fabric.setup(net)
    out = wrapped(torch.randn(2, 3, 48, 64))
    assert out.logits_NCHW.dtype == torch.float32
    fabric.backward(out.logits_NCHW.mean() + out.branches[0].mean())


def test_every_backbone_and_head_of_the_spec_is_there() -> None:
    assert set(BACKBONES) == set(get_args(Backbone))
    assert set(HEADS) == set(get_args(Head))


def test_state_names_are_those_of_the_format() -> None:
    v2, v3 = model("tiny", "deeplab_v2"), model("tiny", "deeplab_v3")
    assert {name.rpartition(".")[0] for name in v2.state_dict() if name.startswith("decoder.")} == {
        f"decoder.classifiers.{branch}.steps.{step}" for branch in range(4) for step in range(2)
    }
    assert {name.rpartition(".")[0] for name in v3.state_dict() if "bn" not in name} == {
        "encoder.stem.conv",
        *(f"encoder.stages.{stage}.{layer}.conv" for stage in range(3) for layer in range(2)),
        "decoder.branches.0.conv",
        *(f"decoder.branches.{branch}.{layer}.conv" for branch in (1, 2, 3) for layer in (0, 1)),
        "decoder.pooling.conv",
        "decoder.projection.conv",
        "decoder.classifiers.0.steps.0",
        "decoder.classifiers.0.steps.1",
    }


def test_every_batch_norm_can_be_held() -> None:
    for backbone, head in itertools.product(QUICK, HEADS):
        net = model(backbone, head)
        net.set_batch_norm("eval")
        net.train()
        norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        assert norms
        assert not any(norm.training for norm in norms)


@pytest.mark.parametrize("counts", [(), (3, 0)])
def test_a_step_without_classes_is_refused(counts: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="at least one class"):
        build_model(ModelSpec(backbone="tiny"), counts)


@pytest.mark.parametrize(
    ("head", "output_stride", "height_px", "width_px", "rates"),
    [
        ("deeplab_v2", 8, 321, 321, (6, 12, 18, 24)),  # the paper's
        ("deeplab_v3", 16, 513, 513, (6, 12, 18)),  # DeepLab v3's
        ("deeplab_v3", 8, 513, 513, (12, 24, 36)),
        ("deeplab_v3", 16, 1024, 2048, (6, 12, 18)),  # never more than published
        ("deeplab_v3", 16, 112, 160, (2, 3, 5)),
        ("deeplab_v3", 8, 112, 160, (3, 6, 9)),
        ("deeplab_v2", 16, 112, 160, (1, 3, 4, 5)),
        ("deeplab_v3", 16, 32, 32, (1, 2, 3)),  # increasing however small
    ],
)
def test_dilations_keep_their_share_of_the_image(
    head: Head, output_stride: int, height_px: int, width_px: int, rates: tuple[int, ...]
) -> None:
    spec = ModelSpec(
        head=head,
        output_stride=16 if output_stride == 16 else 8,
        input_height_px=height_px,
        input_width_px=width_px,
    )
    assert aspp_rates(spec) == rates


def test_the_specs_own_dilations_win_and_are_checked() -> None:
    assert aspp_rates(ModelSpec(aspp_rates=(1, 2, 9))) == (1, 2, 9)
    for rates in ((1, 2), (1, 2, 0), (1, 2, 3, 4)):
        with pytest.raises(ConfigError, match="do not fit the head"):
            build_model(ModelSpec(backbone="tiny", aspp_rates=rates), (2,))
