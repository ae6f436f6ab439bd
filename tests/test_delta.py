"""How much of an int8 model is new: nothing of a frozen encoder, and whatever else has changed."""

from __future__ import annotations

import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from bundles import BASE_COUNT, export_grown, grown_model, step_entry
from fakes import random_images
from numpy.typing import NDArray

from edge_ilseg.bundle import Runtime, read_manifest
from edge_ilseg.calibration.ranges import read_ranges
from edge_ilseg.devices.runtime import openvino_core
from edge_ilseg.errors import ExportError
from edge_ilseg.export.delta import check_delta, last_carried_encoder_tensor, measure_delta
from edge_ilseg.export.parent import ParentBundle, load_parent
from edge_ilseg.int8_record import DeltaRow
from edge_ilseg.models.segmentation import SegmentationModel

RUNTIMES: tuple[Runtime, ...] = ("onnxruntime", "openvino")
BOTH = ("onnx", "openvino")
ADDED = (2, 1)
"""Classes of steps 1 and 2."""
FEATURES = "encoder.stages.2.1/Clip"
"""The last tensor of the encoder."""
WEIGHT = "encoder.stages.1.0.conv.weight_quantized"


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Bundles of three steps, each with the one before as its parent; only classifiers are new."""
    root = tmp_path_factory.mktemp("delta")
    folders = [root / str(index) for index in range(3)]
    for index, folder in enumerate(folders):
        export_grown(folder, *ADDED[:index], parent=folders[index - 1] if index else None, targets=BOTH)
    return folders


def parent_of(chain: list[Path], index: int) -> ParentBundle:
    return load_parent(chain[index - 1], step_entry(index))


def measure(folder: Path, runtime: Runtime, parent: ParentBundle, tensor: str | None = FEATURES) -> DeltaRow:
    row = measure_delta(
        folder, read_manifest(folder).model(runtime, "int8"), parent, random_images(2, seed=8), encoder_tensor=tensor
    )
    assert row is not None
    return row


def onnx_features(folder: Path, images_NHWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Levels of the last encoder tensor, by a session over that part of the graph alone."""
    model = onnx.load(folder / "models/onnx/model.int8.onnx")
    (levels,) = (node.output[0] for node in model.graph.node if node.input[:1] == [FEATURES])
    model.graph.value_info.append(onnx.helper.make_tensor_value_info(levels, onnx.TensorProto.UINT8, None))
    part = onnx.utils.Extractor(model).extract_model(["image"], [levels])
    session = onnxruntime.InferenceSession(part.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"image": image[np.newaxis]})[0] for image in images_NHWC])


def openvino_features(folder: Path, images_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Values of the last encoder tensor as the decoder gets them."""
    core = openvino_core()
    model = core.read_model(folder / "models/openvino/model.int8.xml")
    model.add_outputs([f"{FEATURES}_DequantizeLinear_Output"])
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.concatenate([compiled({"image": image[np.newaxis]})[compiled.outputs[-1]] for image in images_NHWC])


@pytest.mark.parametrize("index", [1, 2])
def test_under_a_frozen_encoder_no_byte_of_it_changes_and_its_output_is_the_same(chain: list[Path], index: int) -> None:
    record = read_manifest(chain[index]).int8
    assert record is not None
    assert (record.taken, [row.runtime for row in record.delta]) == ("carry", list(RUNTIMES))
    for row in record.delta:
        assert (row.encoder_changed_bytes, row.encoder_output_identical) == (0, True)
        assert row.encoder_bytes > 200_000
    images_NHWC = random_images(5, seed=9)
    for features in (onnx_features, openvino_features):
        one, two = (features(folder, images_NHWC) for folder in (chain[index - 1], chain[index]))
        assert one.dtype == two.dtype
        assert len(np.unique(one)) > 30
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("index", [1, 2])
def test_ranges_are_carried_over_every_step_and_say_whose_they_are(chain: list[Path], index: int) -> None:
    base, ranges = (read_ranges(folder / "ranges.json") for folder in (chain[0], chain[index]))
    assert {item.origin for item in base.tensors.values()} == {"measured"}
    for name, item in base.tensors.items():
        assert ranges.tensors[name] == msgspec.structs.replace(item, origin="carried")
        assert item.steps == ("00-step",)
    added = {name: item for name, item in ranges.tensors.items() if name not in base.tensors}
    assert {name: (item.origin, item.steps) for name, item in added.items()} == {
        f"decoder.classifiers.0.steps.{step}/Conv": ("measured" if step == index else "carried", (f"{step:02}-step",))
        for step in range(1, index + 1)
    }
    assert ranges.parent_graph_sha256 == read_ranges(chain[index - 1] / "ranges.json").graph_sha256
    record = read_manifest(chain[index]).int8
    assert record is not None
    assert (record.carried, record.merged, record.measured) == (len(base.tensors) + index - 1, 0, 1)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_what_is_new_is_the_new_classifier_and_little_else(runtime: Runtime, chain: list[Path]) -> None:
    row = measure(chain[1], runtime, parent_of(chain, 1))
    weights = ADDED[0] * grown_model().classifiers[0].in_channels
    scales_and_biases = ADDED[0] * (4 + 4)
    assert weights + scales_and_biases < row.changed_bytes < 0.05 * row.total_bytes
    files = read_manifest(chain[1]).model(runtime, "int8").files
    assert row.total_bytes == sum((chain[1] / name).stat().st_size for name in files)


def test_the_constants_that_are_new_are_counted_to_the_byte(chain: list[Path]) -> None:
    old, new = (onnx.load(folder / "models/onnx/model.int8.onnx").graph for folder in chain[:2])
    known = {item.name: onnx.numpy_helper.to_array(item).tobytes() for item in old.initializer}
    constants = {item.name: onnx.numpy_helper.to_array(item).tobytes() for item in new.initializer}
    changed = sum(len(value) for name, value in constants.items() if known.get(name) != value)
    headers = [onnx.TensorProto(name=item.name, data_type=item.data_type, dims=item.dims) for item in new.initializer]
    known_headers = [onnx.TensorProto(name=i.name, data_type=i.data_type, dims=i.dims) for i in old.initializer]
    changed += sum(item.ByteSize() for item in headers if item not in known_headers)
    for field in ("node", "value_info", "input", "output"):
        before = list(getattr(old, field))
        changed += sum(item.ByteSize() for item in getattr(new, field) if item not in before)
    metadata = {
        item.key: item.ByteSize() for item in onnx.load(chain[1] / "models/onnx/model.int8.onnx").metadata_props
    }
    changed += sum(size for key, size in metadata.items() if key != "edge_ilseg.version")
    assert measure(chain[1], "onnxruntime", parent_of(chain, 1)).changed_bytes == changed


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_against_itself_nothing_of_a_bundle_is_new(runtime: Runtime, chain: list[Path]) -> None:
    own = ParentBundle(chain[0], read_manifest(chain[0]), None)
    row = measure(chain[0], runtime, own)
    assert (row.changed_bytes, row.encoder_changed_bytes, row.encoder_output_identical) == (0, 0, True)


def change_one_level(folder: Path, runtime: Runtime) -> int:
    """Change one level of an encoder weight in place; gives the bytes of the whole weight."""
    if runtime == "onnxruntime":
        path = folder / "models/onnx/model.int8.onnx"
        model = onnx.load(path)
        (item,) = (item for item in model.graph.initializer if item.name == WEIGHT)
        levels = onnx.numpy_helper.to_array(item).copy()
        levels.flat[0] ^= 32
        item.CopyFrom(onnx.numpy_helper.from_array(levels, WEIGHT))
        onnx.save(model, path)
        return int(levels.nbytes)
    root = ElementTree.parse(folder / "models/openvino/model.int8.xml")
    (data,) = (layer.find("data") for layer in root.iter("layer") if layer.get("name") == WEIGHT)
    assert data is not None
    path = folder / "models/openvino/model.int8.bin"
    weights = bytearray(path.read_bytes())
    weights[int(data.attrib["offset"])] ^= 32
    path.write_bytes(weights)
    return int(data.attrib["size"])


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_one_changed_level_of_an_encoder_weight_is_seen(runtime: Runtime, chain: list[Path], tmp_path: Path) -> None:
    shutil.copytree(chain[1], tmp_path / "changed")
    size_bytes = change_one_level(tmp_path / "changed", runtime)
    parent = parent_of(chain, 1)
    before, after = (measure(folder, runtime, parent) for folder in (chain[1], tmp_path / "changed"))
    assert after.encoder_changed_bytes == size_bytes
    assert after.changed_bytes == before.changed_bytes + size_bytes
    assert after.encoder_output_identical is False
    with pytest.raises(ExportError, match="the encoder was frozen") as raised:
        check_delta([before, after], encoder_is_carried=True, max_changed_pct=None)
    assert raised.value.where == f"{runtime} int8"
    assert f"{size_bytes} of {after.encoder_bytes} bytes" in str(raised.value.found)
    assert "other output on the golden images" in str(raised.value.found)
    check_delta([after], encoder_is_carried=False, max_changed_pct=None)


def test_without_a_tensor_to_compare_the_output_of_the_encoder_is_left_open(chain: list[Path]) -> None:
    row = measure(chain[1], "openvino", parent_of(chain, 1), None)
    assert row.encoder_output_identical is None
    check_delta([row], encoder_is_carried=True, max_changed_pct=None)


def test_a_runtime_that_the_parent_has_no_int8_model_for_is_not_compared(chain: list[Path]) -> None:
    manifest = read_manifest(chain[0])
    models = tuple(entry for entry in manifest.models if entry.runtime == "onnxruntime")
    parent = ParentBundle(chain[0], msgspec.structs.replace(manifest, models=models), None)
    entry = read_manifest(chain[1]).model("openvino", "int8")
    assert measure_delta(chain[1], entry, parent, random_images(1), encoder_tensor=None) is None


def test_more_than_the_budget_is_refused_and_exactly_the_budget_is_not() -> None:
    row = DeltaRow("openvino", 1000, 100, 500, 0, True)
    check_delta([row], encoder_is_carried=True, max_changed_pct=10.0)
    with pytest.raises(ExportError, match="more of the int8 model is new") as raised:
        check_delta([row], encoder_is_carried=True, max_changed_pct=9.9)
    assert (raised.value.found, raised.value.expected) == (
        "10.00 % of 1000 bytes differ from the parent's",
        "at most 9.9 %",
    )
    assert "--max-changed" in str(raised.value.hint)


@pytest.mark.parametrize("row", [DeltaRow("openvino", 9, 0, 5, 1, True), DeltaRow("openvino", 9, 0, 5, 0, False)])
def test_other_bytes_or_another_output_of_a_carried_encoder_are_refused(row: DeltaRow) -> None:
    with pytest.raises(ExportError, match="its int8 form is not the parent's"):
        check_delta([row], encoder_is_carried=True, max_changed_pct=None)
    check_delta([row], encoder_is_carried=False, max_changed_pct=None)


def test_the_tensor_to_compare_is_the_encoders_last_if_its_range_is_carried(chain: list[Path]) -> None:
    ranges = read_ranges(chain[1] / "ranges.json")
    assert last_carried_encoder_tensor(ranges) == FEATURES
    assert last_carried_encoder_tensor(read_ranges(chain[0] / "ranges.json")) is None
    only_decoder = {name: item for name, item in ranges.tensors.items() if name.startswith("decoder.")}
    assert last_carried_encoder_tensor(msgspec.structs.replace(ranges, tensors=only_decoder)) is None


def changed_encoder() -> SegmentationModel:
    model = grown_model(*ADDED[:1])
    with torch.no_grad():
        model.get_parameter("encoder.stages.1.0.conv.weight")[0, 0] += 0.05
    return model


def test_an_encoder_that_was_not_frozen_after_all_is_refused_and_nothing_is_written(
    chain: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match="the encoder was frozen") as raised:
        export_grown(tmp_path / "out", model=changed_encoder(), parent=chain[0], max_old_drop_points=None)
    assert "--ranges union" in str(raised.value.hint)
    assert not list(tmp_path.iterdir())


def test_an_encoder_that_was_trained_is_counted_as_new_and_its_ranges_are_merged(
    chain: list[Path], tmp_path: Path
) -> None:
    step = step_entry(1, encoder_frozen=False)
    manifest = export_grown(
        tmp_path / "out", model=changed_encoder(), step=step, parent=chain[0], max_old_drop_points=None
    )
    record = manifest.int8
    assert record is not None
    (row,) = record.delta
    size_bytes = onnx_weight(tmp_path / "out").nbytes
    assert row.encoder_changed_bytes >= size_bytes
    assert row.encoder_output_identical is None
    tensors = read_ranges(tmp_path / "out/ranges.json").tensors
    assert tensors["encoder.stages.0.1/Clip"].origin == "carried"
    assert tensors["encoder.stages.1.0/Clip"].origin == tensors[FEATURES].origin == "merged"
    assert tensors[FEATURES].steps == ("00-step", "01-step")


def onnx_weight(folder: Path) -> NDArray[np.int8]:
    graph = onnx.load(folder / "models/onnx/model.int8.onnx").graph
    (found,) = (onnx.numpy_helper.to_array(item) for item in graph.initializer if item.name == WEIGHT)
    return found


def test_the_budget_of_a_request_stops_an_export(chain: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="more of the int8 model is new"):
        export_grown(tmp_path / "out", *ADDED[:1], parent=chain[0], max_changed_pct=0.1)
    assert not list(tmp_path.iterdir())
    assert export_grown(tmp_path / "out", *ADDED[:1], parent=chain[0], max_changed_pct=5.0).int8 is not None


def test_int8_of_other_bits_than_the_parents_is_refused_under_a_frozen_encoder(
    chain: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match="its int8 weights would not be the parent's") as raised:
        export_grown(tmp_path / "out", *ADDED[:1], parent=chain[0], reduce_range=False, max_old_drop_points=None)
    assert "--profile" in str(raised.value.hint)
    assert not list(tmp_path.iterdir())


def test_layers_of_the_encoder_that_the_parent_keeps_in_float_stay_in_float(tmp_path: Path) -> None:
    kept = ("encoder.stages.0.0", "decoder.projection")
    export_grown(tmp_path / "base", float_layers=kept)
    manifest = export_grown(tmp_path / "child", *ADDED[:1], parent=tmp_path / "base", max_old_drop_points=None)
    (entry,) = manifest.models
    assert entry.calibration is not None
    assert entry.calibration.float_layers
    assert all(name.startswith("encoder.stages.0.0") for name in entry.calibration.float_layers)
    assert manifest.int8 is not None
    (row,) = manifest.int8.delta
    assert (row.encoder_changed_bytes, row.encoder_output_identical) == (0, True)


def test_the_fixture_keeps_its_old_classes_and_shows_its_new_ones(chain: list[Path]) -> None:
    manifest = read_manifest(chain[1])
    masks_NHW = np.load(chain[1] / manifest.model("openvino", "int8").golden_masks)
    shares = [(masks_NHW == channel).mean() for channel in range(BASE_COUNT + ADDED[0])]
    assert sum(shares[:BASE_COUNT]) > 0.5
    assert sum(shares[BASE_COUNT:]) > 0.01
