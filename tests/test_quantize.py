"""int8 from ranges: the ranges decide, and what must stay in float stays in float."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from fakes import random_images, small_model
from onnx import numpy_helper

from edge_ilseg.calibration.collect import collect_ranges
from edge_ilseg.calibration.ranges import Ranges, TensorRange
from edge_ilseg.errors import ExportError
from edge_ilseg.export.float_onnx import write_float_onnx
from edge_ilseg.export.quantize import write_int8_onnx
from edge_ilseg.export.sessions import load_onnx
from edge_ilseg.files import sha256_file


def calibrate(path: Path) -> Ranges:
    images_NHWC = (image[np.newaxis] for image in random_images(4))
    return collect_ranges(path, images_NHWC, image_ids=list("abcd"), images_sha256="22", step="00-base")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8")
    write_float_onnx(small_model(), folder / "float.onnx")
    write_int8_onnx(folder / "float.onnx", folder / "int8.onnx", calibrate(folder / "float.onnx"))
    return folder


@pytest.fixture(scope="module")
def ranges(folder: Path) -> Ranges:
    return calibrate(folder / "float.onnx")


def constants_of(path: Path) -> dict[str, np.ndarray]:
    return {item.name: numpy_helper.to_array(item) for item in onnx.load(path).graph.initializer}


def test_every_activation_scale_follows_from_its_range(folder: Path, ranges: Ranges) -> None:
    constants = constants_of(folder / "int8.onnx")
    quantizers = [node for node in onnx.load(folder / "int8.onnx").graph.node if node.op_type == "QuantizeLinear"]
    assert len(quantizers) > 15
    for node in quantizers:
        tensor = ranges.tensors[node.input[0]]
        lowest, highest = min(tensor.lowest, 0.0), max(tensor.highest, 0.0)
        scale, zero_point = constants[node.input[1]], constants[node.input[2]]
        assert float(scale) == pytest.approx((highest - lowest) / 255, rel=1e-6)
        assert zero_point.dtype == np.uint8
        assert abs(int(zero_point) + lowest / float(scale)) < 0.501  # rounded, a tie to either side


def test_two_runs_are_the_same_bytes(folder: Path, ranges: Ranges, tmp_path: Path) -> None:
    write_int8_onnx(folder / "float.onnx", tmp_path / "again.onnx", ranges)
    assert (tmp_path / "again.onnx").read_bytes() == (folder / "int8.onnx").read_bytes()


def test_a_wider_range_changes_the_scale_of_its_tensor(folder: Path, ranges: Ranges, tmp_path: Path) -> None:
    name = "encoder.stages.1.0/Clip"
    tensors = {**ranges.tensors, name: TensorRange(0.0, 51.0, "00-base")}
    wider = msgspec.structs.replace(ranges, tensors=tensors)
    write_int8_onnx(folder / "float.onnx", tmp_path / "wider.onnx", wider)
    before, after = constants_of(folder / "int8.onnx"), constants_of(tmp_path / "wider.onnx")
    changed = {key for key in before if key.endswith("Clip_scale") and before[key] != after[key]}
    assert changed == {f"{name}_scale"}
    assert float(after[f"{name}_scale"]) == pytest.approx(0.2)


def test_weights_are_int8_per_channel_and_use_seven_bits_when_the_range_is_reduced(
    folder: Path, ranges: Ranges, tmp_path: Path
) -> None:
    write_int8_onnx(folder / "float.onnx", tmp_path / "full.onnx", ranges, reduce_range=False)
    for path, limit in ((folder / "int8.onnx", 64), (tmp_path / "full.onnx", 127)):
        weights = {name: value for name, value in constants_of(path).items() if name.endswith(".weight_quantized")}
        scales = constants_of(path)
        assert len(weights) == 18
        for name, value in weights.items():
            assert value.dtype == np.int8
            assert int(np.abs(value.astype(int)).max()) == limit
            assert scales[name.replace("_quantized", "_scale")].shape == (len(value),)


def test_nothing_behind_the_classifiers_is_quantized(folder: Path) -> None:
    graph = onnx.load(folder / "int8.onnx").graph
    maker = {name: node for node in graph.node for name in node.output}
    for op_type in ("ArgMax", "Resize", "Cast"):
        for node in graph.node:
            if node.op_type == op_type and node.name != "Cast":
                assert maker[node.input[0]].op_type != "DequantizeLinear", node.name
    readers = [node.op_type for node in graph.node if "decoder.classifiers.0/Concat" in node.input]
    assert readers == ["Resize"]


def test_int8_gives_nearly_the_mask_of_fp32(folder: Path) -> None:
    float_model, int8_model = load_onnx(folder / "float.onnx"), load_onnx(folder / "int8.onnx")
    image_NHWC = random_images(1, seed=9)
    expected, found = float_model(image_NHWC), int8_model(image_NHWC)
    assert not np.array_equal(expected.logits_NCHW, found.logits_NCHW)
    assert (expected.mask_NHW == found.mask_NHW).mean() > 0.9


def test_the_encoder_is_the_same_bytes_when_only_the_head_grows_and_its_ranges_stay(
    folder: Path, ranges: Ranges, tmp_path: Path
) -> None:
    grown = small_model()
    grown.grow(2, "scaled")
    write_float_onnx(grown, tmp_path / "grown.onnx")
    own = calibrate(tmp_path / "grown.onnx")
    carried = msgspec.structs.replace(own, tensors={**own.tensors, **ranges.tensors})
    write_int8_onnx(tmp_path / "grown.onnx", tmp_path / "grown8.onnx", carried)
    parts = []
    for path in (folder / "int8.onnx", tmp_path / "grown8.onnx"):
        parts.append([item for item in onnx.load(path).graph.initializer if item.name.startswith("encoder.")])
    assert len(parts[0]) > 30
    assert parts[0] == parts[1]


def test_ranges_of_another_graph_are_refused(folder: Path, ranges: Ranges, tmp_path: Path) -> None:
    other = msgspec.structs.replace(ranges, graph_sha256="0" * 64)
    with pytest.raises(ExportError, match="another graph"):
        write_int8_onnx(folder / "float.onnx", tmp_path / "int8.onnx", other)
    assert not list(tmp_path.iterdir())


def test_a_tensor_without_a_range_is_named(folder: Path, ranges: Ranges, tmp_path: Path) -> None:
    tensors = {name: item for name, item in ranges.tensors.items() if name != "encoder.stem/Clip"}
    lacking = msgspec.structs.replace(ranges, tensors=tensors, graph_sha256=sha256_file(folder / "float.onnx"))
    with pytest.raises(ExportError, match=r"'encoder\.stem/Clip'"):
        write_int8_onnx(folder / "float.onnx", tmp_path / "int8.onnx", lacking)
