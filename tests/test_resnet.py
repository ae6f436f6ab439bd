"""ResNet against a plain reading of the public state dict, and its strides replaced by dilation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from edge_ilseg.models.resnet import VARIANTS, ResNet, state_name

# Parameters of the published networks without their 1000-class `fc` layer.
PARAMETER_COUNTS = {"resnet18": 11_176_512, "resnet50": 23_508_032, "resnet101": 42_500_160}


def public_state(net: ResNet) -> dict[str, Tensor]:
    """The net's state under the public names, written down here once more and independently of `state_name`."""
    state = {}
    for name, tensor in net.state_dict().items():
        name = name.replace("stem.conv.", "conv1.").replace("stem.bn.", "bn1.")
        for stage in range(4):
            name = name.replace(f"stages.{stage}.", f"layer{stage + 1}.", 1) if name.startswith("stages.") else name
        state[name] = tensor
    return state


def batch_norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    return F.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"])


def reference_features(state: dict[str, Tensor], blocks: tuple[int, ...], bottleneck: bool, x: Tensor) -> Tensor:
    """The published network in words of `torch.nn.functional`, from a state dict with the public names."""
    x = F.relu(batch_norm(F.conv2d(x, state["conv1.weight"], stride=2, padding=3), state, "bn1"))
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    strided = 2 if bottleneck else 1  # the convolution that carries the stride
    for layer, count in enumerate(blocks, start=1):
        for block in range(count):
            at = f"layer{layer}.{block}"
            stride = 2 if layer > 1 and block == 0 else 1
            y = x
            for conv in (1, 2, 3) if bottleneck else (1, 2):
                weight = state[f"{at}.conv{conv}.weight"]
                y = F.conv2d(y, weight, stride=stride if conv == strided else 1, padding=weight.shape[2] // 2)
                y = batch_norm(y, state, f"{at}.bn{conv}")
                y = F.relu(y) if f"{at}.conv{conv + 1}.weight" in state else y
            if f"{at}.downsample.0.weight" in state:
                x = F.conv2d(x, state[f"{at}.downsample.0.weight"], stride=stride)
                x = batch_norm(x, state, f"{at}.downsample.1")
            x = F.relu(x + y)
    return x


def randomised(variant: str, output_stride: int) -> ResNet:
    torch.manual_seed(0)
    net = ResNet(variant, output_stride).eval()
    for name, buffer in net.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return net


@pytest.mark.parametrize("variant", ["resnet18", "resnet50", pytest.param("resnet101", marks=pytest.mark.slow)])
def test_features_equal_a_plain_reading_of_the_public_state_dict(variant: str) -> None:
    net = randomised(variant, 32)
    images_NCHW = torch.randn(1, 3, 64, 65)
    with torch.no_grad():
        expected_NCHW = reference_features(public_state(net), *VARIANTS[variant], images_NCHW)
        scale = expected_NCHW.abs().max()
        torch.testing.assert_close(net(images_NCHW) / scale, expected_NCHW / scale, atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", PARAMETER_COUNTS)
def test_parameters_are_as_many_as_the_published_ones(variant: str) -> None:
    with torch.device("meta"):
        net = ResNet(variant, 16)
    assert sum(parameter.numel() for parameter in net.parameters()) == PARAMETER_COUNTS[variant]


@pytest.mark.parametrize("variant", ["resnet18", "resnet50"])
@pytest.mark.parametrize(("output_stride", "step"), [(16, 2), (8, 4)])
def test_dilation_computes_what_the_strides_did(variant: str, output_stride: int, step: int) -> None:
    strided, dilated = randomised(variant, 32), ResNet(variant, output_stride).eval()
    dilated.load_state_dict(strided.state_dict())
    images_NCHW = torch.randn(1, 3, 64, 51)
    with torch.no_grad():
        expected_NCHW, dense_NCHW = strided(images_NCHW), dilated(images_NCHW)
    scale = expected_NCHW.abs().max()
    torch.testing.assert_close(dense_NCHW[:, :, ::step, ::step] / scale, expected_NCHW / scale, atol=1e-5, rtol=0)


def test_public_names_become_ours_and_back() -> None:
    net = ResNet("resnet18", 16)
    assert {state_name("resnet18", name) for name in public_state(net)} == set(net.state_dict())
    assert state_name("resnet18", "layer4.1.bn2.running_var") == "stages.3.1.bn2.running_var"
    assert state_name("resnet18", "fc.weight") == "classifier.fc.weight"
    assert state_name("resnet18", "head.weight") == "head.weight"
