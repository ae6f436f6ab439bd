"""Ranges: measured from a float ONNX, written, read back, refused when they are no ranges."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
from fakes import random_images, small_model

from edge_ilseg.calibration.collect import collect_ranges, quantized_tensors
from edge_ilseg.calibration.ranges import Ranges, TensorRange, read_ranges, write_ranges
from edge_ilseg.errors import BundleError, ExportError
from edge_ilseg.export.float_onnx import write_float_onnx
from edge_ilseg.files import sha256_file

RANGES = Ranges(
    format="edge-ilseg-ranges",
    format_version=1,
    method="minmax",
    image_ids=("a", "b"),
    images_sha256="00",
    graph_sha256="11",
    tensors={"stem/Clip": TensorRange(0.0, float(np.float32(5.1)), "00-base"), "Div": TensorRange(-1.0, 1.0, "01")},
)


@pytest.fixture(scope="module")
def float_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float") / "float.onnx"
    write_float_onnx(small_model(), path)
    return path


def collect(path: Path, images_NHWC: np.ndarray) -> Ranges:
    ids = [str(i) for i in range(len(images_NHWC))]
    return collect_ranges(
        path, (image[np.newaxis] for image in images_NHWC), image_ids=ids, images_sha256="22", step="01-boat"
    )


def test_ranges_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    write_ranges(tmp_path / "ranges.json", RANGES)
    assert read_ranges(tmp_path / "ranges.json") == RANGES
    assert list(read_ranges(tmp_path / "ranges.json").tensors) == list(RANGES.tensors)


@pytest.mark.parametrize(("lowest", "highest"), [(float("nan"), 1.0), (0.0, float("inf")), (2.0, 1.0)])
def test_what_is_no_range_is_not_written_and_the_error_names_the_tensor(
    tmp_path: Path, lowest: float, highest: float
) -> None:
    broken = msgspec.structs.replace(RANGES, tensors={"stem/Conv": TensorRange(lowest, highest, "01")})
    with pytest.raises(ExportError, match="'stem/Conv'"):
        write_ranges(tmp_path / "ranges.json", broken)
    assert not list(tmp_path.iterdir())


def test_a_range_that_was_turned_upside_down_in_the_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    write_ranges(path, RANGES)
    path.write_text(path.read_text().replace('"lowest": -1.0', '"lowest": 7.0'))
    with pytest.raises(ExportError, match="'Div'"):
        read_ranges(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"format_version": 1', '"format_version": 2'),
        ('"method": "minmax"', '"method": "minmax", "colour": 3'),
        ('"highest": 1.0', '"highest": null'),
        ("{", ""),
    ],
)
def test_a_file_of_another_format_or_with_a_wrong_field_is_refused(tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "ranges.json"
    write_ranges(path, RANGES)
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(BundleError):
        read_ranges(path)


def test_missing_ranges_are_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"nowhere\.json"):
        read_ranges(tmp_path / "nowhere.json")


def test_measured_ranges_are_the_extremes_over_all_images(float_path: Path) -> None:
    images_NHWC = random_images(3)
    ranges = collect(float_path, images_NHWC)
    model = onnx.load(float_path)
    names = quantized_tensors(model)
    assert tuple(ranges.tensors) == names
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    values = [session.run(list(names), {"image": image[np.newaxis]}) for image in images_NHWC]
    for position, name in enumerate(names):
        lowest = min(float(value[position].min()) for value in values)
        highest = max(float(value[position].max()) for value in values)
        measured = ranges.tensors[name]
        assert (measured.lowest, measured.highest) == pytest.approx((lowest, highest), rel=1e-5, abs=1e-6)
        assert measured.step == "01-boat"
    assert ranges.graph_sha256 == sha256_file(float_path)


def test_nothing_behind_the_last_convolution_has_a_range(float_path: Path) -> None:
    names = quantized_tensors(onnx.load(float_path))
    assert "decoder.classifiers.0.steps.1/Conv" in names
    assert not {"decoder.classifiers.0/Concat", "logits", "mask", "image"} & set(names)
    assert not any("Resize" in name for name in names)


def test_constant_images_give_ranges_too(float_path: Path) -> None:
    ranges = collect(float_path, np.full((2, 48, 64, 3), 127, dtype=np.uint8))
    assert ranges.tensors["Div"] == TensorRange(0.0, 0.0, "01-boat")


def test_an_activation_that_overflows_is_named(tmp_path: Path) -> None:
    model = small_model()
    model.encoder.stages[0][0].bn.bias.data.fill_(3e38)
    model.encoder.stages[0][0].activation = None
    model.encoder.stages[0][1].conv.weight.data.fill_(1e3)
    write_float_onnx(model, tmp_path / "float.onnx")
    with pytest.raises(ExportError, match=r"'encoder\.stages\.0\.1\.conv/Conv'"):
        collect(tmp_path / "float.onnx", random_images(1))


def test_no_image_is_an_error(float_path: Path) -> None:
    with pytest.raises(ExportError, match="no image to calibrate on"):
        collect(float_path, random_images(0))


def test_calibration_knows_no_torch() -> None:
    code = (
        "import sys, edge_ilseg.calibration.collect, edge_ilseg.calibration.sample\n"
        "import onnxruntime.quantization.calibrate\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
