"""Weights that are fitted to what a layer reads, against the textbook form in plain loops and cases by hand."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from fakes import measure, random_images, small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import numpy_helper

from edge_ilseg.calibration.collect import quantized_nodes
from edge_ilseg.calibration.merge import make_ranges
from edge_ilseg.calibration.moments import Moments, collect_moments
from edge_ilseg.calibration.ranges import Ranges
from edge_ilseg.export.float_onnx import write_float_onnx
from edge_ilseg.export.openvino_ir import write_ir
from edge_ilseg.export.pieces import read_constants
from edge_ilseg.export.quantize import write_int8_onnx
from edge_ilseg.export.rounding import COLUMNS, DAMPING, Rounding, fit_levels
from edge_ilseg.export.sessions import Predict, load_onnx

IMAGES = random_images(6)
OTHERS = random_images(8, seed=77)


def second_moment(size: int, seed: int, *, samples: int = 200) -> NDArray[np.float64]:
    """Of values that have much in common, as activations do."""
    random = np.random.default_rng(seed)
    values = np.maximum(random.normal(size=(samples, 3)) @ random.normal(size=(3, size)) + 0.3, 0)
    values += 0.1 * random.normal(size=values.shape)
    return values.T @ values / samples


def surgeon(row: NDArray[np.float64], second_KK: NDArray[np.float64], highest: int) -> NDArray[np.float64]:
    """Optimal brain surgeon, value after value: after each, the inverse of what is left is made anew."""
    order = sorted(range(len(row)), key=lambda k: -second_KK[k, k])
    damped = second_KK + DAMPING * np.mean(np.diag(second_KK)) * np.eye(len(row))
    left, levels = row.copy(), np.zeros(len(row))
    for position, k in enumerate(order):
        rest = order[position:]
        inverse = np.linalg.inv(damped[np.ix_(rest, rest)])
        levels[k] = min(max(np.rint(left[k]), -highest), highest)
        error = left[k] - levels[k]
        for number, other in enumerate(rest[1:], start=1):
            left[other] -= error * inverse[number, 0] / inverse[0, 0]
    return levels


@pytest.mark.parametrize("size", [1, 2, 5, 12, COLUMNS + 7])
def test_levels_are_those_of_the_optimal_brain_surgeon_in_plain_loops(size: int) -> None:
    random = np.random.default_rng(size)
    seconds = np.stack([second_moment(size, seed) for seed in (1, 2)])
    ratio_GOK = random.normal(scale=20, size=(2, 7, size))
    found = fit_levels(ratio_GOK, seconds, 64)
    for group in range(2):
        for row in range(7):
            assert found[group, row].tolist() == surgeon(ratio_GOK[group, row], seconds[group], 64).tolist()


def test_two_weights_that_read_nearly_the_same_make_up_for_each_other() -> None:
    # The first, 0.4, goes to 0; the second, too, by itself. Together they lack 0.8 of nearly one value: it is 1.
    second_KK = np.array([[1.0, 0.9], [0.9, 1.0]])
    assert fit_levels(np.array([[[0.4, 0.4]]]), second_KK[np.newaxis], 64).tolist() == [[[0.0, 1.0]]]
    # left of the second: 0.4 + 0.4 * 0.9 / (1 + 0.01) = 0.756
    assert fit_levels(np.array([[[0.4, 0.1]]]), second_KK[np.newaxis], 64).tolist() == [[[0.0, 0.0]]]  # 0.456
    assert fit_levels(np.array([[[0.4, 0.15]]]), second_KK[np.newaxis], 64).tolist() == [[[0.0, 1.0]]]  # 0.506


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_values_that_have_nothing_in_common_are_rounded_to_the_nearest_level(seed: int) -> None:
    random = np.random.default_rng(seed)
    ratio_GOK = random.normal(scale=30, size=(2, 3, 5))
    diagonal = np.stack([np.diag(random.uniform(0, 3, 5)) for _ in range(2)])
    assert np.array_equal(fit_levels(ratio_GOK, diagonal, 64), np.rint(ratio_GOK).clip(-64, 64))


def test_what_is_silent_is_rounded_to_the_nearest_level_and_makes_up_for_nothing() -> None:
    second_KK = second_moment(6, 3)
    second_KK[2, :] = second_KK[:, 2] = 0.0
    ratio_GOK = np.random.default_rng(0).normal(scale=20, size=(1, 50, 6))
    found = fit_levels(ratio_GOK, second_KK[np.newaxis], 64)
    assert np.array_equal(found[..., 2], np.rint(ratio_GOK[..., 2]).clip(-64, 64))
    assert not np.array_equal(found, np.rint(ratio_GOK).clip(-64, 64))
    silent = np.zeros((1, 6, 6))
    assert np.array_equal(fit_levels(ratio_GOK, silent, 64), np.rint(ratio_GOK).clip(-64, 64))


def test_the_error_of_the_outputs_is_a_fraction_of_that_of_the_nearest_levels() -> None:
    second_KK = second_moment(40, 9)
    ratio_GOK = np.random.default_rng(1).normal(scale=20, size=(1, 100, 40))

    def error(levels_GOK: NDArray[np.float64]) -> float:
        lost_OK = (ratio_GOK - levels_GOK)[0]
        return float(np.einsum("ok,kl,ol->", lost_OK, second_KK, lost_OK))

    fitted = fit_levels(ratio_GOK, second_KK[np.newaxis], 1000)
    assert error(fitted) < 0.25 * error(np.rint(ratio_GOK))
    assert np.array_equal(fitted, np.rint(fitted))
    assert np.abs(fit_levels(3 * ratio_GOK, second_KK[np.newaxis], 64)).max() == 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rounding")
    write_float_onnx(small_model(), folder / "float.onnx")
    return folder


@pytest.fixture(scope="module")
def ranges(folder: Path) -> Ranges:
    return make_ranges(measure(folder / "float.onnx", IMAGES), "carry", None)


@pytest.fixture(scope="module")
def moments(folder: Path) -> dict[str, Moments]:
    nodes = quantized_nodes(onnx.load(folder / "float.onnx"))
    return collect_moments(folder / "float.onnx", IMAGES[:, np.newaxis], nodes, count=len(IMAGES))


@pytest.fixture(scope="module")
def nearest_path(folder: Path, ranges: Ranges) -> Path:
    write_int8_onnx(folder / "float.onnx", folder / "nearest.onnx", ranges)
    return folder / "nearest.onnx"


@pytest.fixture(scope="module")
def fitted_path(folder: Path, ranges: Ranges, moments: dict[str, Moments]) -> Path:
    write_int8_onnx(folder / "float.onnx", folder / "fitted.onnx", ranges, rounding=Rounding(lambda _: moments, {}))
    return folder / "fitted.onnx"


def arrays(path: Path) -> dict[str, NDArray[np.generic]]:
    return {item.name: numpy_helper.to_array(item) for item in onnx.load(path).graph.initializer}


def error_on_others(expected: Predict, found: Predict) -> float:
    """Mean square of what the logits differ by, on images that nothing was fitted to."""
    pairs = [(expected(image[np.newaxis]), found(image[np.newaxis])) for image in OTHERS]
    return float(np.mean([np.square(one.logits_NCHW - two.logits_NCHW).mean() for one, two in pairs]))


def test_a_fitted_graph_is_nearer_to_the_float_graph_on_images_it_has_not_seen(
    folder: Path, nearest_path: Path, fitted_path: Path
) -> None:
    exact = load_onnx(folder / "float.onnx")
    fitted, nearest = (error_on_others(exact, load_onnx(path, simulated=True)) for path in (fitted_path, nearest_path))
    assert fitted < 0.8 * nearest


def test_levels_and_biases_alone_differ_from_those_of_the_nearest_levels(nearest_path: Path, fitted_path: Path) -> None:
    nearest, fitted = arrays(nearest_path), arrays(fitted_path)
    changed = {name for name in nearest if not np.array_equal(nearest[name], fitted[name])}
    assert nearest.keys() == fitted.keys()
    assert {name.rpartition(".")[2] for name in changed} == {"weight_quantized", "bias_quantized"}
    for name in changed:
        assert nearest[name].dtype == fitted[name].dtype
        if name.endswith("weight_quantized"):
            assert np.abs(fitted[name].astype(int)).max() <= (127 if fitted[name].shape[1] == 1 else 64)
    assert len(onnx.load(nearest_path).graph.node) == len(onnx.load(fitted_path).graph.node)


def test_a_layer_of_many_values_is_fitted_block_by_block(
    folder: Path, ranges: Ranges, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_ilseg.calibration.moments.BLOCK", 20)
    name = "decoder.projection.conv"
    moments = collect_moments(folder / "float.onnx", IMAGES[:, np.newaxis], [f"{name}/Conv"], count=len(IMAGES))
    blocks = moments[f"{name}/Conv"].blocks_GKK
    assert len(blocks) > 2
    write_int8_onnx(folder / "float.onnx", folder / "blocks.onnx", ranges, rounding=Rounding(lambda _: moments, {}))
    found, weight = arrays(folder / "blocks.onnx"), arrays(folder / "float.onnx")[f"{name}.weight"]
    ratio_OK = weight.reshape(len(weight), -1) / found[f"{name}.weight_scale"].astype(np.float64)[:, np.newaxis]
    start = 0
    for block_GKK in blocks:
        part = slice(start, start + block_GKK.shape[1])
        expected_GOK = fit_levels(ratio_OK[np.newaxis, :, part], block_GKK, 64)
        levels_OK = found[f"{name}.weight_quantized"].reshape(len(weight), -1)
        assert np.array_equal(levels_OK[:, part], expected_GOK[0])
        start = part.stop
    assert start == ratio_OK.shape[1]


def test_each_bias_takes_what_the_weights_lose_on_average(
    folder: Path, nearest_path: Path, fitted_path: Path, moments: dict[str, Moments]
) -> None:
    floats, nearest, fitted = arrays(folder / "float.onnx"), arrays(nearest_path), arrays(fitted_path)
    nodes = onnx.load(folder / "float.onnx").graph.node
    convolutions = [node for node in nodes if node.op_type == "Conv" and len(node.input) > 2]
    assert len(convolutions) > 10
    for node in convolutions:
        weight, scale = floats[node.input[1]], fitted[f"{node.input[1]}_scale"]
        levels, step = fitted[f"{node.input[1]}_quantized"], fitted[f"{node.input[2]}_quantized_scale"]
        moved = fitted[f"{node.input[2]}_quantized"] - nearest[f"{node.input[2]}_quantized"]
        mean_GK = moments[node.name].mean_GK
        for channel in range(len(weight)):
            lost, mean_K = 0.0, mean_GK[channel * len(mean_GK) // len(weight)]
            for value, level, mean in zip(weight[channel].ravel(), levels[channel].ravel(), mean_K, strict=True):
                lost += (float(value) - float(scale[channel]) * int(level)) * float(mean)
            assert abs(moved[channel] * float(step[channel]) - lost) <= 0.5001 * float(step[channel])


@pytest.fixture(scope="module")
def carried(ranges: Ranges) -> Ranges:
    """As of a child whose encoder is frozen."""
    tensors = {
        name: msgspec.structs.replace(item, origin="carried") if name.startswith("encoder.") else item
        for name, item in ranges.tensors.items()
    }
    return msgspec.structs.replace(ranges, tensors=tensors)


@pytest.fixture(scope="module")
def other_moments(folder: Path) -> dict[str, Moments]:
    """On other, darker images."""
    nodes = quantized_nodes(onnx.load(folder / "float.onnx"))
    return collect_moments(folder / "float.onnx", OTHERS[:, np.newaxis] // 2, nodes, count=len(OTHERS))


def constants_of_child(
    folder: Path, ranges: Ranges, moments: dict[str, Moments], parent: dict[str, bytes], **settings: bool
) -> tuple[dict[str, bytes], list[str]]:
    """Constants of the int8 graph, and the nodes whose moments were asked for."""
    asked: list[str] = []

    def give(nodes: Collection[str]) -> dict[str, Moments]:
        asked.extend(nodes)
        return moments

    path = folder / "child.onnx"
    hashes = {item.subgraph_sha256 for item in ranges.tensors.values() if item.origin == "carried"}
    rounding = Rounding(give, parent, hashes)
    write_int8_onnx(folder / "float.onnx", path, ranges, rounding=rounding, **settings)
    return read_constants([path]), asked


def of_encoder(constants: dict[str, bytes]) -> dict[str, bytes]:
    return {name: value for name, value in constants.items() if name.startswith("encoder.")}


@pytest.mark.parametrize("form", ["onnx", "ir"])
def test_a_layer_that_is_carried_takes_the_parents_levels_and_bias_verbatim(
    folder: Path, carried: Ranges, fitted_path: Path, other_moments: dict[str, Moments], form: str
) -> None:
    parent = read_constants([fitted_path])
    given = parent
    if form == "ir":
        write_ir(fitted_path, folder / "fitted.xml", "int8", {})
        given = read_constants([folder / "fitted.xml", folder / "fitted.bin"])
    alone, asked_alone = constants_of_child(folder, carried, other_moments, {})
    child, asked = constants_of_child(folder, carried, other_moments, given)
    assert of_encoder(child) == of_encoder(parent)
    assert of_encoder(alone) != of_encoder(parent)
    assert [name for name in asked_alone if not name.startswith("encoder.")] == asked
    decoder = child.keys() - of_encoder(child).keys()
    assert {name: child[name] for name in decoder} == {name: alone[name] for name in decoder}
    assert {name: child[name] for name in decoder} != {name: parent[name] for name in decoder}


def test_where_a_frozen_layers_range_has_moved_its_levels_stay_and_its_bias_is_written_in_the_new_scale(
    folder: Path, carried: Ranges, fitted_path: Path, other_moments: dict[str, Moments]
) -> None:
    parent = read_constants([fitted_path])
    wider = {
        name: msgspec.structs.replace(item, lowest=1.7 * item.lowest, highest=1.7 * item.highest)
        for name, item in carried.tensors.items()
    }
    union = msgspec.structs.replace(carried, policy="union", tensors=wider)
    child, asked = constants_of_child(folder, union, other_moments, parent)
    assert not [name for name in asked if name.startswith("encoder.")]
    names = [name.removesuffix("_quantized") for name in of_encoder(child) if name.endswith(".weight_quantized")]
    moved = 0
    for name in names:
        assert child[f"{name}_quantized"] == parent[f"{name}_quantized"]
        bias = f"{name.removesuffix('weight')}bias_quantized"
        (now_O, now_scale_O), (before_O, before_scale_O) = (
            (np.frombuffer(item[bias], np.int32), np.frombuffer(item[f"{bias}_scale"], np.float32))
            for item in (child, parent)
        )
        values_O = before_O.astype(np.float64) * before_scale_O
        assert (np.abs(now_O.astype(np.float64) * now_scale_O - values_O) <= 0.5001 * now_scale_O).all()
        moved += not np.array_equal(now_scale_O, before_scale_O)
    assert moved == len(names) > 4
    alone, _ = constants_of_child(folder, msgspec.structs.replace(union, policy="new-only"), other_moments, parent)
    assert of_encoder(alone) != of_encoder(child)


def test_what_the_parent_has_with_other_scales_or_not_at_all_is_fitted(
    folder: Path, ranges: Ranges, carried: Ranges, other_moments: dict[str, Moments], fitted_path: Path
) -> None:
    alone, asked_alone = constants_of_child(folder, carried, other_moments, {})
    wide, _ = constants_of_child(folder, ranges, other_moments, {}, reduce_range=False)
    child, asked = constants_of_child(folder, carried, other_moments, wide)
    is_depthwise = {name: "branches" in name and ".0.conv" in name for name in asked_alone}
    assert [name for name in asked if not is_depthwise[name]] == [
        name for name in asked_alone if not is_depthwise[name]
    ]
    assert child == alone
    name = "encoder.stages.1.0.conv"
    lacking = {key: value for key, value in read_constants([fitted_path]).items() if not key.startswith(name)}
    child, asked = constants_of_child(folder, carried, other_moments, lacking)
    assert [item for item in asked if item.startswith("encoder.")] == [f"{name}/Conv"]
    assert child[f"{name}.weight_quantized"] == alone[f"{name}.weight_quantized"]


def test_without_moments_and_a_parent_all_is_as_the_quantizer_left_it(
    folder: Path, ranges: Ranges, nearest_path: Path, tmp_path: Path
) -> None:
    write_int8_onnx(folder / "float.onnx", tmp_path / "none.onnx", ranges, rounding=Rounding(lambda _: {}, {}))
    assert (tmp_path / "none.onnx").read_bytes() == nearest_path.read_bytes()
