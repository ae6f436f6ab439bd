"""Signal to quantization noise, against figures worked out in numpy."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from bundles import grown_model
from fakes import random_images
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edge_ilseg.calibration.collect import collect_extremes, quantized_tensors
from edge_ilseg.calibration.merge import make_ranges
from edge_ilseg.export.float_onnx import write_float_onnx
from edge_ilseg.export.quantize import write_int8_onnx
from edge_ilseg.export.sqnr import decibel, measure_sqnr, quantized_pairs, worst
from edge_ilseg.int8_record import SqnrRow

WEIGHT = np.array([[0.5, -0.25, 0.125], [1.0, 0.5, -2.0]], dtype=np.float32)
SCALE, ZERO_POINT = 3.0, 40
"""Of the hand-made graph's one tensor: it clips, and rounds."""


def hand_made(path: Path, *, quantized: bool) -> Path:
    """A 1 x 1 convolution of an image, and in the int8 graph its output quantized and restored."""
    nodes = [
        helper.make_node("Cast", ["image"], ["float_NHWC"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float_NHWC"], ["float_NCHW"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["float_NCHW", "weight"], ["features"], name="features"),
    ]
    constants = {"weight": WEIGHT[:, :, None, None]}
    if quantized:
        constants["scale"], constants["zero"] = np.float32(SCALE), np.uint8(ZERO_POINT)  # type: ignore[assignment]
        nodes.append(helper.make_node("QuantizeLinear", ["features", "scale", "zero"], ["levels"]))
        nodes.append(helper.make_node("DequantizeLinear", ["levels", "scale", "zero"], ["restored"]))
    graph = helper.make_graph(
        nodes,
        "hand_made",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [1, 6, 8, 3])],
        [helper.make_tensor_value_info("restored" if quantized else "features", TensorProto.FLOAT, [1, 2, 6, 8])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def test_sqnr_of_a_tensor_that_is_rounded_and_clipped_is_that_of_numpy(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 1, 6, 8, 3)).astype(np.uint8)
    exact = np.stack([image[0].astype(np.float64) @ WEIGHT.T.astype(np.float64) for image in images])
    levels = np.clip(np.rint(exact / SCALE) + ZERO_POINT, 0, 255)
    assert (levels == 0).any()
    restored = (levels - ZERO_POINT) * SCALE
    expected = 10 * np.log10(np.square(exact).sum() / np.square(exact - restored).sum())
    float_path = hand_made(tmp_path / "float.onnx", quantized=False)
    int8_path = hand_made(tmp_path / "int8.onnx", quantized=True)
    (row,) = measure_sqnr(float_path, int8_path, images)
    assert row.tensor == "features"
    assert row.sqnr_db == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float graph and the int8 graph of it."""
    folder = tmp_path_factory.mktemp("sqnr")
    write_float_onnx(grown_model(), folder / "float.onnx")
    images_NHWC = (image[np.newaxis] for image in random_images(3))
    measured = collect_extremes(
        folder / "float.onnx", images_NHWC, image_ids=list("abc"), images_sha256="22", step="00-base"
    )
    write_int8_onnx(folder / "float.onnx", folder / "int8.onnx", make_ranges(measured, "carry", None))
    return folder


def values(path: Path, tensors: list[str], images_NHWC: NDArray[np.uint8]) -> list[NDArray[np.float64]]:
    """Each tensor on all images, one above another, from a graph that onnxruntime leaves as it is."""
    model = onnx.load(path)
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = [session.run(tensors, {"image": image[np.newaxis]}) for image in images_NHWC]
    return [np.stack([item[position] for item in found]).astype(np.float64) for position in range(len(tensors))]


def test_sqnr_of_every_tensor_of_a_network_is_that_of_numpy(folder: Path) -> None:
    images_NHWC = random_images(4, seed=5)
    rows = measure_sqnr(folder / "float.onnx", folder / "int8.onnx", (image[np.newaxis] for image in images_NHWC))
    pairs = quantized_pairs(onnx.load(folder / "float.onnx"), onnx.load(folder / "int8.onnx"))
    assert [row.tensor for row in rows] == list(pairs)
    exact = values(folder / "float.onnx", list(pairs), images_NHWC)
    found = values(folder / "int8.onnx", list(pairs.values()), images_NHWC)
    for row, a, b in zip(rows, exact, found, strict=True):
        assert row.sqnr_db is not None
        assert row.sqnr_db == pytest.approx(10 * np.log10(np.square(a).sum() / np.square(a - b).sum()), abs=1e-3)
        assert 10 < row.sqnr_db < 60, row.tensor


def test_the_tensors_are_the_quantized_activations_in_graph_order_and_no_weight(folder: Path) -> None:
    float_model, int8_model = onnx.load(folder / "float.onnx"), onnx.load(folder / "int8.onnx")
    pairs = quantized_pairs(float_model, int8_model)
    made = [name for node in int8_model.graph.node for name in node.output]
    assert list(pairs.values()) == sorted(pairs.values(), key=made.index)
    assert set(pairs) <= set(quantized_tensors(float_model))
    quantizers = {node.input[0] for node in int8_model.graph.node if node.op_type == "QuantizeLinear"}
    assert set(pairs) == quantizers
    assert "encoder.stages.2.1/Clip" in pairs


def test_a_float_graph_against_itself_has_nothing_to_measure(folder: Path) -> None:
    assert measure_sqnr(folder / "float.onnx", folder / "float.onnx", []) == ()


def test_without_an_image_no_tensor_has_a_figure(folder: Path) -> None:
    rows = measure_sqnr(folder / "float.onnx", folder / "int8.onnx", [])
    assert len(rows) > 20
    assert {row.sqnr_db for row in rows} == {None}


def test_decibels_by_hand() -> None:
    assert decibel(100.0, 1.0) == pytest.approx(20.0)
    assert decibel(1.0, 1.0) == 0.0
    assert decibel(2.0, 1.0) == pytest.approx(10 * math.log10(2))
    assert decibel(1.0, 10.0) == pytest.approx(-10.0)
    assert decibel(0.0, 1.0) == pytest.approx(-110.0)
    assert decibel(1.0, 0.0) is None


def test_the_worst_come_first_and_what_has_no_noise_is_never_among_them() -> None:
    rows = [SqnrRow("a", 30.0), SqnrRow("b", None), SqnrRow("c", -5.0), SqnrRow("e", 12.0), SqnrRow("d", 12.0)]
    assert [row.tensor for row in worst(rows, 3)] == ["c", "d", "e"]
    assert [row.tensor for row in worst(rows, 99)] == ["c", "d", "e", "a"]
    assert worst(rows, 0) == ()
