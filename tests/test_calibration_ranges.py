"""Ranges: measured from a float ONNX, written, read back, refused when they are no ranges."""

from __future__ import annotations

import base64
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
from fakes import HEIGHT_PX, WIDTH_PX, measure, random_images, small_model, with_constant
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edge_ilseg.calibration.collect import collect_extremes, quantized_nodes, quantized_tensors, with_extremes
from edge_ilseg.calibration.merge import make_ranges
from edge_ilseg.calibration.passport import read_levels
from edge_ilseg.calibration.ranges import FORMAT_VERSION, Ranges, TensorRange, read_ranges, write_ranges
from edge_ilseg.calibration.subgraph import subgraph_hashes
from edge_ilseg.errors import BundleError, ExportError
from edge_ilseg.export.float_onnx import write_float_onnx
from edge_ilseg.files import sha256_file

CLIP = TensorRange(0.0, float(np.float32(5.1)), ("00-base", "01-boat"), "merged", "ab", b"\x00\x07\xff\x80")
DIV = TensorRange(-1.0, 1.0, ("00-base",), "carried", "cd", b"\x00\xff")
RANGES = Ranges(
    format="edge-ilseg-ranges",
    format_version=FORMAT_VERSION,
    method="minmax",
    policy="carry",
    step="01-boat",
    image_ids=("a", "b"),
    images_sha256="00",
    graph_sha256="11",
    parent_graph_sha256="22",
    tensors={"stem/Clip": CLIP, "Div": DIV},
)


@pytest.fixture(scope="module")
def float_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float") / "float.onnx"
    write_float_onnx(small_model(), path)
    return path


def activations(path: Path, names: tuple[str, ...], images_NHWC: NDArray[np.uint8]) -> list[dict[str, NDArray[Any]]]:
    """Every tensor of `names` for each image, copied out of onnxruntime."""
    model = onnx.load(path)
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [
        dict(zip(names, session.run(list(names), {"image": image_HWC[np.newaxis]}), strict=True))
        for image_HWC in images_NHWC
    ]


def test_ranges_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    write_ranges(tmp_path / "ranges.json", RANGES)
    assert read_ranges(tmp_path / "ranges.json") == RANGES
    assert list(read_ranges(tmp_path / "ranges.json").tensors) == list(RANGES.tensors)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
@settings(max_examples=50, deadline=None)
def test_any_float32_is_read_back_exactly(value: float) -> None:
    tensors = {"t": msgspec.structs.replace(DIV, lowest=value, highest=value)}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "ranges.json"
        write_ranges(path, msgspec.structs.replace(RANGES, tensors=tensors))
        found = read_ranges(path).tensors["t"]
    assert np.float32(found.lowest).tobytes() == np.float32(found.highest).tobytes() == np.float32(value).tobytes()


@pytest.mark.parametrize(("lowest", "highest"), [(float("nan"), 1.0), (0.0, float("inf")), (2.0, 1.0)])
def test_what_is_no_range_is_not_written_and_the_error_names_the_tensor(
    tmp_path: Path, lowest: float, highest: float
) -> None:
    item = msgspec.structs.replace(CLIP, lowest=lowest, highest=highest)
    with pytest.raises(ExportError, match="'stem/Conv'"):
        write_ranges(tmp_path / "ranges.json", msgspec.structs.replace(RANGES, tensors={"stem/Conv": item}))
    assert not list(tmp_path.iterdir())


def test_ranges_without_a_tensor_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no tensor"):
        write_ranges(tmp_path / "ranges.json", msgspec.structs.replace(RANGES, tensors={}))


def test_a_range_that_was_turned_upside_down_in_the_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    write_ranges(path, RANGES)
    path.write_text(path.read_text().replace('"lowest": -1.0', '"lowest": 7.0'))
    with pytest.raises(ExportError, match="'Div'"):
        read_ranges(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"format_version": 2', '"format_version": 3'),
        ('"method": "minmax"', '"method": "minmax", "colour": 3'),
        ('"method": "minmax"', '"method": "entropy"'),
        ('"policy": "carry"', '"policy": "mixed"'),
        ('"origin": "merged"', '"origin": "guessed"'),
        ('"highest": 1.0', '"highest": null'),
        ('"step": "01-boat",', ""),
        (base64.b64encode(DIV.channels).decode(), "no base64"),
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


@pytest.mark.parametrize("data", [b"", b"\x00\x01\x02"])
def test_a_passport_that_is_not_two_levels_a_channel_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "ranges.json"
    write_ranges(path, RANGES)
    path.write_text(path.read_text().replace(base64.b64encode(DIV.channels).decode(), base64.b64encode(data).decode()))
    with pytest.raises(BundleError, match="'Div'"):
        read_ranges(path)


def test_the_format_of_the_version_before_is_named_as_one(tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    path.write_text(
        '{"format": "edge-ilseg-ranges", "format_version": 1, "method": "minmax", "image_ids": ["a"],'
        ' "images_sha256": "00", "graph_sha256": "11",'
        ' "tensors": {"Div": {"lowest": -1.0, "highest": 1.0, "step": "00-base"}}}'
    )
    with pytest.raises(BundleError, match=r"does not read\n.*ranges\.json\n.*version 1\n.*version 2\n.*calibrate"):
        read_ranges(path)


def test_missing_ranges_are_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"nowhere\.json"):
        read_ranges(tmp_path / "nowhere.json")


def test_ranges_count_their_tensors_by_origin() -> None:
    assert [RANGES.count(origin) for origin in ("carried", "merged", "measured")] == [1, 1, 0]


def test_the_extremes_of_each_channel_are_those_of_the_activations_themselves(float_path: Path) -> None:
    images_NHWC = random_images(3)
    measured = measure(float_path, images_NHWC, step="01-boat")
    names = quantized_tensors(onnx.load(float_path))
    assert tuple(measured.extremes) == tuple(measured.subgraphs) == tuple(measured.mean_extremes) == names
    values = activations(float_path, names, images_NHWC)
    logits = [name for name in names if name.startswith("decoder.classifiers")]
    assert logits
    for name in names:
        count = values[0][name].shape[1]
        assert len(measured.extremes[name].lowest_C) == count
        lowest = [min(float(value[name][0, channel].min()) for value in values) for channel in range(count)]
        highest = [max(float(value[name][0, channel].max()) for value in values) for channel in range(count)]
        np.testing.assert_allclose(measured.extremes[name].lowest_C, lowest, rtol=1e-5, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(measured.extremes[name].highest_C, highest, rtol=1e-5, atol=1e-6, err_msg=name)
        mean = [sum(float(edge(value[name])) for value in values) / 3 for edge in (np.min, np.max)]
        if name in logits:  # clipped logits tie
            mean = [min(lowest), max(highest)]
        assert measured.mean_extremes[name] == pytest.approx(mean, rel=1e-5, abs=1e-6)
    assert measured.graph_sha256 == sha256_file(float_path)
    assert (measured.step, measured.image_ids, measured.images_sha256) == ("01-boat", ("0", "1", "2"), "22")


def test_with_each_tensor_goes_the_hash_of_what_it_depends_on(float_path: Path) -> None:
    hashes = subgraph_hashes(onnx.load(float_path))
    measured = measure(float_path, random_images(1))
    assert measured.subgraphs == {name: hashes[name] for name in measured.extremes}


def test_a_tensor_that_is_no_image_counts_as_one_channel() -> None:
    shapes = {"flat": [3], "rows": [2, 3], "image": [1, 2, 2, 2]}
    graph = helper.make_graph(
        [helper.make_node("Neg", [name], [f"-{name}"]) for name in shapes],
        "shapes",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        [helper.make_tensor_value_info(f"-{name}", TensorProto.FLOAT, shape) for name, shape in shapes.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    extended = with_extremes(model, ["-image", "-rows", "-flat"])
    session = onnxruntime.InferenceSession(extended.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {name: np.arange(np.prod(shape), dtype=np.float32).reshape(shape) for name, shape in shapes.items()}
    found = [value.reshape(-1).tolist() for value in session.run(None, feeds)]
    assert found == [[-3.0, -7.0], [0.0, -4.0], [-5.0], [0.0], [-2.0], [0.0]]


def test_nothing_behind_the_last_convolution_has_a_range(float_path: Path) -> None:
    names = quantized_tensors(onnx.load(float_path))
    assert "decoder.classifiers.0.steps.1/Conv" in names
    assert not {"decoder.classifiers.0/Concat", "logits", "mask", "image"} & set(names)
    assert not any("Resize" in name for name in names)


def test_layers_that_stay_in_float_are_taken_out_and_no_other(float_path: Path) -> None:
    model = onnx.load(float_path)
    nodes = quantized_nodes(model)
    kept = ("encoder.stem/Clip", "decoder.branches.0.conv/Conv")
    assert quantized_nodes(model, kept) == tuple(name for name in nodes if name not in kept)
    assert quantized_nodes(model, nodes) == ()


@pytest.mark.parametrize("value", [0, 127, 255])
def test_constant_images_give_ranges_too(float_path: Path, value: int) -> None:
    ranges = make_ranges(
        measure(float_path, np.full((2, HEIGHT_PX, WIDTH_PX, 3), value, dtype=np.uint8)), "carry", None
    )
    div = ranges.tensors["Div"]
    assert (div.lowest, div.highest, div.channels) == ((value - 127) / 128, (value - 127) / 128, bytes(6))
    assert (read_levels(div.channels, div.lowest, div.highest).highest_C == div.highest).all()


def test_an_activation_that_overflows_is_named(float_path: Path, tmp_path: Path) -> None:
    model = with_constant(onnx.load(float_path), "decoder.classifiers.0.steps.0.weight", lambda value: value * 0 + 3e38)
    onnx.save(model, tmp_path / "float.onnx")
    with pytest.raises(ExportError, match=r"overflows(.|\n)*'decoder\.classifiers\.0\.steps\.0/Conv'"):
        make_ranges(measure(tmp_path / "float.onnx", random_images(1)), "carry", None)


def test_a_weight_that_is_nan_is_named_by_the_first_tensor_that_it_spoils(float_path: Path, tmp_path: Path) -> None:
    def spoil(value: NDArray[np.float32]) -> NDArray[np.float32]:
        value[3] = np.nan
        return value

    onnx.save(
        with_constant(onnx.load(float_path), "encoder.stages.1.0.conv.bias", spoil),
        tmp_path / "float.onnx",
    )
    with pytest.raises(ExportError, match=r"'encoder\.stages\.1\.0/Clip': lowest nan"):
        make_ranges(measure(tmp_path / "float.onnx", random_images(2)), "carry", None)


def test_no_image_is_an_error(float_path: Path) -> None:
    with pytest.raises(ExportError, match="no image to calibrate on"):
        measure(float_path, random_images(0))


@pytest.mark.parametrize("given_ids", [("a",), ("a", "b", "c", "d")])
def test_as_many_images_as_ids_are_needed(float_path: Path, given_ids: tuple[str, ...]) -> None:
    images = (image_HWC[np.newaxis] for image_HWC in random_images(0 if len(given_ids) == 1 else 3))
    with pytest.raises((ExportError, ValueError), match="image"):
        collect_extremes(float_path, images, image_ids=given_ids, images_sha256="22", step="00-base")


@pytest.mark.parametrize(
    ("images_NHWC", "found"),
    [
        (random_images(1, height_px=64), r"uint8 1 x 64 x 64 x 3"),
        (random_images(1)[..., :1], r"uint8 1 x 48 x 64 x 1"),
        (random_images(1).transpose(0, 2, 1, 3), r"uint8 1 x 64 x 48 x 3"),
        (random_images(1).astype(np.float32), r"float32 1 x 48 x 64 x 3"),
    ],
)
def test_an_image_of_another_size_or_type_is_refused(
    float_path: Path, images_NHWC: NDArray[np.uint8], found: str
) -> None:
    with pytest.raises(ExportError, match=rf"found: +{found}\n +expected: uint8 1 x 48 x 64 x 3\n.*resize_image"):
        measure(float_path, images_NHWC)


def test_images_are_taken_one_at_a_time_and_progress_is_told(float_path: Path) -> None:
    told: list[float] = []
    taken: list[int] = []

    def images() -> Any:
        for number, image_HWC in enumerate(random_images(4)):
            assert len(told) == number
            taken.append(number)
            yield image_HWC[np.newaxis]

    collect_extremes(
        float_path,
        images(),
        image_ids=list("abcd"),
        images_sha256="22",
        step="00-base",
        progress=lambda _, share: told.append(share),
    )
    assert told == [0.25, 0.5, 0.75, 1.0]
    assert taken == [0, 1, 2, 3]


def test_two_calibrations_write_the_same_bytes(float_path: Path, tmp_path: Path) -> None:
    for name in ("one.json", "two.json"):
        write_ranges(tmp_path / name, make_ranges(measure(float_path, random_images(3)), "carry", None))
    data = (tmp_path / "one.json").read_bytes()
    assert data == (tmp_path / "two.json").read_bytes()
    assert len(data) > 2000


def test_the_order_of_the_images_changes_no_range(float_path: Path) -> None:
    images_NHWC = random_images(3)
    one, two = (make_ranges(measure(float_path, images), "carry", None) for images in (images_NHWC, images_NHWC[::-1]))
    assert one == two


def test_calibration_knows_no_torch() -> None:
    code = (
        "import sys\n"
        "from edge_ilseg.calibration import collect, merge, moments, passport, ranges, sample, subgraph\n"
        "sys.exit(bool({'torch', 'edge_ilseg.checkpoint'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
