"""Borders of tensors: what the onnx package and OpenVINO find in the same files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from bundles import export_grown
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from edge_ilseg import tensor_borders
from edge_ilseg.chunks import FileBytes
from edge_ilseg.devices.runtime import import_openvino, openvino_core
from edge_ilseg.tensor_borders import (
    ir_borders,
    ir_tensors,
    line_borders,
    onnx_borders,
    onnx_tensors,
)

RAW_DATA = 9
LISTS = {"float_data": 4, "int32_data": 5, "int64_data": 7, "double_data": 10, "uint64_data": 11}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of a real int8 bundle."""
    folder = tmp_path_factory.mktemp("exported") / "bundle"
    export_grown(folder, targets=("onnx", "openvino"))
    return folder / "models"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph of small convolutions as an export lays them out, in both forms."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "onnx").mkdir()
    (folder / "openvino").mkdir()
    rng = np.random.default_rng(0)
    nodes, constants, last = [], [], "image"
    for layer in range(30):
        weight = rng.normal(size=(8, 8, 3, 3)).astype(np.float32)
        constants += [onnx.numpy_helper.from_array(weight, f"layer.{layer}.weight")]
        constants += [onnx.helper.make_tensor(f"layer.{layer}.bias", TensorProto.FLOAT, [8], rng.normal(size=8))]
        names = [last, f"layer.{layer}.weight", f"layer.{layer}.bias"]
        last = f"layer.{layer}"
        nodes.append(onnx.helper.make_node("Conv", names, [last], f"convolution.{layer}", pads=[1, 1, 1, 1]))
    shape = [1, 8, 16, 16]
    inputs = [onnx.helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)]
    outputs = [onnx.helper.make_tensor_value_info(last, TensorProto.FLOAT, shape)]
    graph = onnx.helper.make_graph(nodes, "convolutions", inputs, outputs, constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, folder / "onnx/model.int8.onnx")
    openvino = import_openvino()
    converted = openvino.convert_model(folder / "onnx/model.int8.onnx")
    openvino.save_model(converted, folder / "openvino/model.int8.xml", compress_to_fp16=False)
    return folder


@pytest.fixture(scope="module")
def onnx_path(models: Path) -> Path:
    return models / "onnx/model.int8.onnx"


def filled_field(tensor: TensorProto) -> int:
    """The number of the field that holds a tensor's numbers."""
    return next((number for name, number in LISTS.items() if getattr(tensor, name)), RAW_DATA)


def as_field(number: int, payload: bytes) -> TensorProto:
    """A tensor that has nothing but this field."""
    length, size = bytearray(), len(payload)
    while size >= 0x80:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    return TensorProto.FromString(bytes([number << 3 | 2]) + bytes([*length, size]) + payload)


def check_onnx(path: Path) -> None:
    data = path.read_bytes()
    initializers = [item for item in onnx.load(path).graph.initializer if np.prod(item.dims) > 0]
    spans = onnx_tensors(data)
    assert len(spans) == len(initializers) > 50
    for (start, end), tensor in zip(spans, initializers, strict=True):
        field = as_field(filled_field(tensor), data[start:end])
        assert field.raw_data == tensor.raw_data
        for name in LISTS:
            assert list(getattr(field, name)) == list(getattr(tensor, name)), tensor.name


def check_ir(xml: Path) -> None:
    binary = xml.with_suffix(".bin").read_bytes()
    operations = openvino_core().read_model(xml).get_ops()
    expected = {op.data.tobytes() for op in operations if op.get_type_name() == "Constant" and op.data.size}
    spans = ir_tensors(xml.read_bytes(), len(binary))
    assert {binary[start:end] for start, end in spans} == expected
    assert len(expected) > 30
    assert ir_borders(xml.read_bytes(), len(binary)) == tuple(sorted({border for span in spans for border in span}))


def test_the_numbers_of_every_initializer_lie_where_the_onnx_package_finds_them(onnx_path: Path) -> None:
    check_onnx(onnx_path)


def test_every_constant_of_an_ir_lies_where_openvino_finds_it(models: Path) -> None:
    check_ir(models / "openvino/model.int8.xml")


@pytest.mark.slow
def test_the_tensors_of_an_exported_bundle_lie_where_onnx_and_openvino_find_them(exported: Path) -> None:
    check_onnx(exported / "onnx/model.int8.onnx")
    check_ir(exported / "openvino/model.int8.xml")


@pytest.mark.slow
def test_nearly_all_of_an_exported_ir_is_in_the_onnx_too(exported: Path) -> None:
    """Why tensors stand alone: a pack holds the two forms of a model once."""
    data = (exported / "onnx/model.int8.onnx").read_bytes()
    xml = exported / "openvino/model.int8.xml"
    binary = xml.with_suffix(".bin").read_bytes()
    known = {data[start:end] for start, end in onnx_tensors(data)}
    spans = [span for span in ir_tensors(xml.read_bytes(), len(binary)) if binary[slice(*span)] in known]
    assert sum(end - start for start, end in spans) > 0.9 * len(binary)


def test_a_tensor_in_each_form_of_the_format_is_found() -> None:
    forms = {
        "raw": onnx.numpy_helper.from_array(np.arange(300, dtype=np.int8), "raw"),
        "float_data": onnx.helper.make_tensor("f", TensorProto.FLOAT, [3], [1.5, 2.5, -1.0]),
        "int32_data": onnx.helper.make_tensor("i", TensorProto.INT32, [3], [1, 300, -1]),
        "int64_data": onnx.helper.make_tensor("l", TensorProto.INT64, [2], [7, 1 << 40]),
        "double_data": onnx.helper.make_tensor("d", TensorProto.DOUBLE, [2], [0.5, 8.0]),
        "uint64_data": onnx.helper.make_tensor("u", TensorProto.UINT64, [1], [1 << 63]),
    }
    graph = onnx.helper.make_graph([], "forms", [], [], list(forms.values()))
    data = onnx.helper.make_model(graph).SerializeToString()
    spans = onnx_tensors(data)
    assert len(spans) == len(forms)
    for (start, end), tensor in zip(spans, forms.values(), strict=True):
        number = filled_field(tensor)
        (field,) = (value for descriptor, value in tensor.ListFields() if descriptor.number == number)
        ((_, found),) = as_field(number, data[start:end]).ListFields()
        assert found == field, tensor.name


def test_every_node_and_every_end_of_a_tensor_is_a_border(onnx_path: Path) -> None:
    data = onnx_path.read_bytes()
    borders = onnx_borders(data)
    assert set(borders) >= {border for span in onnx_tensors(data) for border in span}
    assert borders == tuple(sorted(set(borders)))
    for node in onnx.load(onnx_path).graph.node:
        content = node.SerializeToString()
        starts = [border for border in borders if content in data[border : border + len(content) + 6]]
        assert starts, node.name


def test_offset_and_size_are_found_in_any_order_of_attributes_and_only_inside_the_bin() -> None:
    xml = b"""<data size="4" shape="1" offset="8"/> <data offset="0" size="8" element_type="f32" />
    <data offset="12" size="5"/> <data offset="16" size="0"/> <data offset="99999999999999999999" size="1"/>
    <data offset="-4" size="4"/> <data shape="4"/> <database offset="1" size="2"/> <edge offset="2" size="2"/>"""
    assert ir_tensors(xml, 16) == ((0, 8), (8, 12))


def test_a_file_has_the_borders_of_its_bytes(onnx_path: Path) -> None:
    descriptor = os.open(onnx_path, os.O_RDONLY)
    try:
        data = FileBytes(descriptor)
        assert onnx_borders(data) == onnx_borders(onnx_path.read_bytes())
        assert line_borders(data) == line_borders(onnx_path.read_bytes())
    finally:
        os.close(descriptor)


def test_a_line_begins_behind_each_end_of_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert line_borders(b"ab\n\ncd") == (0, 3, 4)
    monkeypatch.setattr(tensor_borders, "PIECE_BYTES", 2)
    assert line_borders(b"ab\n\ncd\n") == (0, 3, 4, 7)


def test_more_borders_than_the_limit_are_no_borders(monkeypatch: pytest.MonkeyPatch, onnx_path: Path) -> None:
    monkeypatch.setattr(tensor_borders, "MAX_BORDERS", 100)
    assert onnx_borders(onnx_path.read_bytes()) == ()
    assert line_borders(b"\n" * 101) == ()
    assert ir_tensors(b"".join(b'<data offset="%d" size="1"/>' % place for place in range(51)), 100) == ()


def test_a_damaged_model_has_the_borders_before_the_damage(onnx_path: Path) -> None:
    data = onnx_path.read_bytes()
    whole = onnx_borders(data)
    middle = onnx_tensors(data)[40][1]
    group = bytes([3])  # a wire type that ONNX has not
    damaged = onnx_borders(data[:middle] + group * (len(data) - middle))
    assert set(damaged) <= set(whole)
    assert {border for border in whole if border <= middle} <= set(damaged)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x3a",
        b"\x3a\xff",
        b"\x3a\x7f",
        b"\xff" * 40,
        b"\x3a\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01",
        b"\x0b",
    ],
)
def test_what_is_no_model_has_no_borders(data: bytes) -> None:
    assert onnx_borders(data) == ()
    assert onnx_tensors(data) == ()


@given(data=st.binary(max_size=400))
@settings(max_examples=400, deadline=None)
def test_any_bytes_give_borders_inside_them_and_no_error(data: bytes) -> None:
    graph = b"\x3a" + bytes([min(len(data), 127)]) + data  # so that the inside of a graph is reached, too
    tensor = b"\x2a" + bytes([min(len(data), 127)]) + data
    for item in (data, graph, b"\x3a" + bytes([min(len(tensor), 127)]) + tensor):
        borders = onnx_borders(item)
        assert borders == tuple(sorted(set(borders)))
        assert all(0 <= border <= len(item) for border in borders)
        assert all(0 <= start < end <= len(item) for start, end in onnx_tensors(item))
        assert all(0 <= start < end <= 50 for start, end in ir_tensors(b"<data " + item + b'offset="1" size="2">', 50))
        assert all(0 <= border <= len(item) for border in line_borders(item))


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_truncated_or_flipped_model_gives_borders_inside_it_and_no_error(
    data: st.DataObject, onnx_path: Path
) -> None:
    whole = onnx_path.read_bytes()[:20_000]
    end = data.draw(st.integers(0, len(whole)))
    changed = bytearray(whole[:end])
    for place in data.draw(st.lists(st.integers(0, max(end - 1, 0)), max_size=4)):
        if changed:
            changed[place] = data.draw(st.integers(0, 255))
    assert all(0 <= border <= end for border in onnx_borders(bytes(changed)))
