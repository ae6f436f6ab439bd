"""Moments of what a convolution reads, against patches cut out in plain loops and against real outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fakes import random_images, small_model
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edge_ilseg.calibration.collect import open_graph, quantized_nodes
from edge_ilseg.calibration.moments import BLOCK, Moments, block_sizes, collect_moments
from edge_ilseg.errors import ExportError
from edge_ilseg.export.float_onnx import write_float_onnx

HEIGHT_PX, WIDTH_PX, CHANNELS = 7, 9, 6
RANDOM = np.random.default_rng(5)
IMAGES = RANDOM.integers(0, 256, (3, 1, HEIGHT_PX, WIDTH_PX, CHANNELS)).astype(np.uint8)
SHAPES: dict[str, dict[str, Any]] = {
    "1x1": {"kernel": (1, 1)},
    "3x3, uneven padding": {"kernel": (3, 3), "pads": (1, 0, 2, 1)},
    "3x3, stride 2": {"kernel": (3, 3), "pads": (1, 1, 1, 1), "strides": (2, 2)},
    "2x3, dilated": {"kernel": (2, 3), "pads": (1, 2, 1, 2), "dilations": (2, 2)},
    "depthwise": {"kernel": (3, 3), "pads": (1, 1, 1, 1), "strides": (3, 2), "group": CHANNELS},
    "two groups": {"kernel": (3, 2), "group": 2, "strides": (2, 1)},
}


def one_convolution(path: Path, *, kernel: tuple[int, int], group: int = 1, **attributes: Any) -> onnx.ModelProto:
    """An image, as float channels first, through one convolution."""
    weight = RANDOM.normal(size=(2 * group, CHANNELS // group, *kernel)).astype(np.float32)
    bias = RANDOM.normal(size=2 * group).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["image"], ["float_NHWC"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float_NHWC"], ["features"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["features", "weight", "bias"], ["out"], name="conv", group=group, **attributes),
    ]
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [1, HEIGHT_PX, WIDTH_PX, CHANNELS])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    onnx.save(model, path)
    return model


def patches(
    image_HWC: NDArray[np.uint8],
    *,
    kernel: tuple[int, int],
    pads: tuple[int, int, int, int] = (0, 0, 0, 0),
    strides: tuple[int, int] = (1, 1),
    dilations: tuple[int, int] = (1, 1),
    group: int = 1,
) -> NDArray[np.float64]:
    """Every patch that a convolution reads, one value after another: groups x positions x K."""
    height, width, channels = image_HWC.shape
    reach = [dilation * (size - 1) + 1 for dilation, size in zip(dilations, kernel, strict=True)]
    rows = range(-pads[0], height + pads[2] - reach[0] + 1, strides[0])
    columns = range(-pads[1], width + pads[3] - reach[1] + 1, strides[1])
    found = []
    for number in range(group):
        of_group = []
        for top in rows:
            for left in columns:
                values = []
                for channel in range(number * channels // group, (number + 1) * channels // group):
                    for row in range(kernel[0]):
                        for column in range(kernel[1]):
                            y, x = top + row * dilations[0], left + column * dilations[1]
                            is_inside = 0 <= y < height and 0 <= x < width
                            values.append(float(image_HWC[y, x, channel]) if is_inside else 0.0)
                of_group.append(values)
        found.append(of_group)
    return np.array(found)


@pytest.fixture
def every_position(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_ilseg.calibration.moments.POSITIONS", 10_000)
    monkeypatch.setattr("edge_ilseg.calibration.moments.DEPTHWISE_POSITIONS", 10_000)


def moments_of(path: Path) -> Moments:
    return collect_moments(path, IMAGES, ["conv"], count=len(IMAGES))["conv"]


@pytest.mark.parametrize("shape", sorted(SHAPES))
@pytest.mark.usefixtures("every_position")
def test_moments_are_those_of_patches_cut_out_in_plain_loops(shape: str, tmp_path: Path) -> None:
    one_convolution(tmp_path / "float.onnx", **SHAPES[shape])
    found = moments_of(tmp_path / "float.onnx")
    all_GPK = np.concatenate([patches(image[0], **SHAPES[shape]) for image in IMAGES], axis=1)
    (block_GKK,) = found.blocks_GKK
    np.testing.assert_allclose(found.mean_GK, all_GPK.mean(axis=1), rtol=1e-6)
    expected_GKK = np.stack([patch_PK.T @ patch_PK / len(patch_PK) for patch_PK in all_GPK])
    np.testing.assert_allclose(block_GKK, expected_GKK, rtol=1e-6)


@pytest.mark.parametrize("shape", sorted(SHAPES))
@pytest.mark.usefixtures("every_position")
def test_mean_and_variance_of_the_outputs_follow_from_the_moments(shape: str, tmp_path: Path) -> None:
    model = one_convolution(tmp_path / "float.onnx", **SHAPES[shape])
    run = open_graph(model, tmp_path / "run.onnx")
    weight, bias = (numpy_helper.to_array(item) for item in model.graph.initializer)
    outputs_OP = np.concatenate([run(image)[0][0].reshape(len(weight), -1) for image in IMAGES], axis=1)
    found = moments_of(tmp_path / "float.onnx")
    weight_GOK = weight.astype(np.float64).reshape(len(found.mean_GK), -1, found.mean_GK.shape[1])
    mean_O = np.einsum("gok,gk->go", weight_GOK, found.mean_GK).reshape(-1)
    second_O = np.einsum("gok,gkl,gol->go", weight_GOK, found.blocks_GKK[0], weight_GOK).reshape(-1)
    without_bias_OP = outputs_OP.astype(np.float64) - bias[:, np.newaxis]
    np.testing.assert_allclose(mean_O, without_bias_OP.mean(axis=1), rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(second_O, np.square(without_bias_OP).mean(axis=1), rtol=1e-4)


def test_of_a_large_map_the_same_few_positions_count_in_every_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_float_onnx(small_model(), tmp_path / "float.onnx")
    name = quantized_nodes(onnx.load(tmp_path / "float.onnx"))[0]
    one, two = random_images(2)[:, np.newaxis]
    first, second, both = (
        collect_moments(tmp_path / "float.onnx", chosen, [name], count=2)[name] for chosen in ([one], [two], [one, two])
    )
    np.testing.assert_allclose(both.mean_GK, (first.mean_GK + second.mean_GK) / 2, rtol=1e-12)
    np.testing.assert_allclose(both.blocks_GKK[0], (first.blocks_GKK[0] + second.blocks_GKK[0]) / 2, rtol=1e-12)
    (whole,) = moments_at(tmp_path, [one], name, monkeypatch, positions=10_000)
    few = moments_at(tmp_path, [one], name, monkeypatch, positions=5)
    assert not np.allclose(whole, first.blocks_GKK[0], rtol=1e-3)
    assert np.linalg.matrix_rank(first.blocks_GKK[0][0]) == 27  # of 64 patches of 27 values
    assert np.linalg.matrix_rank(few[0][0], tol=1e-6) == 5


def moments_at(
    folder: Path, images: list[NDArray[np.uint8]], name: str, monkeypatch: pytest.MonkeyPatch, *, positions: int
) -> tuple[NDArray[np.float64], ...]:
    monkeypatch.setattr("edge_ilseg.calibration.moments.POSITIONS", positions)
    return collect_moments(folder / "float.onnx", images, [name], count=len(images))[name].blocks_GKK


@pytest.mark.parametrize(
    ("channels", "taps", "expected"),
    [
        (3, 9, (27,)),
        (1024, 1, (1024,)),
        (1152, 1, (576, 576)),
        (512, 9, (927, 927, 918, 918, 918)),
        (2, 2000, (2000,) * 2),
    ],
)
def test_many_values_are_cut_into_blocks_of_whole_channels(channels: int, taps: int, expected: tuple[int, ...]) -> None:
    sizes = block_sizes(channels, taps)
    assert sizes == expected
    assert sum(sizes) == channels * taps
    assert all(size % taps == 0 and size <= max(BLOCK, taps) for size in sizes)


@pytest.mark.usefixtures("every_position")
def test_blocks_are_the_diagonal_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_convolution(tmp_path / "float.onnx", **SHAPES["3x3, stride 2"])
    (whole_GKK,) = moments_of(tmp_path / "float.onnx").blocks_GKK
    monkeypatch.setattr("edge_ilseg.calibration.moments.BLOCK", 20)
    found = moments_of(tmp_path / "float.onnx")
    assert [block.shape[1] for block in found.blocks_GKK] == [18, 18, 18]
    for number, block_GKK in enumerate(found.blocks_GKK):
        part = slice(18 * number, 18 * (number + 1))
        np.testing.assert_allclose(block_GKK, whole_GKK[:, part, part], rtol=1e-12)


def test_no_image_another_size_and_no_layer(tmp_path: Path) -> None:
    one_convolution(tmp_path / "float.onnx", kernel=(1, 1))
    with pytest.raises(ValueError, match="no image"):
        collect_moments(tmp_path / "float.onnx", [], ["conv"], count=1)
    with pytest.raises(ExportError, match="the model's input size"):
        collect_moments(tmp_path / "float.onnx", [IMAGES[0][:, 1:]], ["conv"], count=1)
    assert collect_moments(tmp_path / "float.onnx", IMAGES, [], count=3) == {}


def test_padding_that_is_not_written_out_is_refused(tmp_path: Path) -> None:
    one_convolution(tmp_path / "float.onnx", kernel=(3, 3), auto_pad="SAME_UPPER")
    with pytest.raises(ValueError, match="conv: the padding is not written out"):
        moments_of(tmp_path / "float.onnx")
