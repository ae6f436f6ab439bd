"""The float ONNX: the same function as the torch model, the same bytes for the same weights, names one can read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from fakes import HEIGHT_PX, WIDTH_PX, random_images, small_model
from onnx import TensorProto, helper, numpy_helper

from edge_ilseg.errors import ExportError
from edge_ilseg.export.float_onnx import OPSET, check_float_graph, write_float_onnx
from edge_ilseg.export.graph import fold_padding, keep_outputs, set_metadata
from edge_ilseg.models.segmentation import SegmentationModel
from edge_ilseg.models.spec import normalization


@pytest.fixture(scope="module")
def model() -> SegmentationModel:
    return small_model()


@pytest.fixture(scope="module")
def float_path(model: SegmentationModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float") / "float.onnx"
    write_float_onnx(model, path)
    return path


def run(model: onnx.ModelProto, image_NHWC: np.ndarray) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    inputs = {session.get_inputs()[0].name: image_NHWC}
    return dict(zip(names, session.run(names, inputs), strict=True))


def test_logits_are_those_of_torch_and_the_mask_is_their_argmax(model: SegmentationModel, float_path: Path) -> None:
    mean, std = (np.array(item, dtype=np.float32) for item in normalization(model.spec.backbone))
    for image_HWC in random_images(3):
        pixels = torch.from_numpy((image_HWC.astype(np.float32) - mean) / std).permute(2, 0, 1)[None]
        with torch.no_grad():
            expected_NCHW = model(pixels).logits_NCHW.numpy()
        outputs = run(onnx.load(float_path), image_HWC[np.newaxis])
        np.testing.assert_allclose(outputs["logits"], expected_NCHW, atol=1e-4 * np.abs(expected_NCHW).max())
        assert outputs["mask"].dtype == np.uint8
        assert outputs["mask"].shape == (1, HEIGHT_PX, WIDTH_PX)
        np.testing.assert_array_equal(outputs["mask"], outputs["logits"].argmax(axis=1))


@pytest.mark.parametrize(("backbone", "head"), [("efficientnet_lite0", "deeplab_v3"), ("resnet18", "deeplab_v2")])
@pytest.mark.slow
def test_other_networks_compute_the_same_as_torch_too(tmp_path: Path, backbone: str, head: str) -> None:
    model = small_model(backbone=backbone, head=head)  # type: ignore[arg-type]
    write_float_onnx(model, tmp_path / "float.onnx")
    mean, std = (np.array(item, dtype=np.float32) for item in normalization(backbone))
    image_HWC = random_images(1)[0]
    with torch.no_grad():
        pixels = torch.from_numpy((image_HWC.astype(np.float32) - mean) / std).permute(2, 0, 1)[None]
        expected_NCHW = model(pixels).logits_NCHW.numpy()
    graph = onnx.load(tmp_path / "float.onnx")
    assert not [node.name for node in graph.graph.node if node.op_type == "Pad"]
    logits_NCHW = run(graph, image_HWC[np.newaxis])["logits"]
    np.testing.assert_allclose(logits_NCHW, expected_NCHW, atol=1e-4 * np.abs(expected_NCHW).max())


def test_input_is_uint8_nhwc_with_a_static_shape(float_path: Path) -> None:
    (image,) = onnx.load(float_path).graph.input
    assert image.name == "image"
    assert image.type.tensor_type.elem_type == TensorProto.UINT8
    assert [size.dim_value for size in image.type.tensor_type.shape.dim] == [1, HEIGHT_PX, WIDTH_PX, 3]


def test_two_exports_are_the_same_bytes_and_leave_the_model_as_it_was(
    model: SegmentationModel, float_path: Path, tmp_path: Path
) -> None:
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    write_float_onnx(model, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == float_path.read_bytes()
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    model.eval()


@pytest.mark.slow
def test_another_process_writes_the_same_bytes(float_path: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from fakes import small_model\n"
        "from edge_ilseg.export.float_onnx import write_float_onnx\n"
        "write_float_onnx(small_model(), Path(sys.argv[1]))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "other.onnx")], check=True, env=environment)
    assert (tmp_path / "other.onnx").read_bytes() == float_path.read_bytes()


def test_parameters_keep_their_state_dict_names_and_folded_biases_are_named_after_their_convolution(
    model: SegmentationModel, float_path: Path
) -> None:
    names = {item.name for item in onnx.load(float_path).graph.initializer}
    convolutions = {name for name in model.state_dict() if name.endswith(".weight") and ".bn." not in name}
    assert convolutions <= names
    assert "encoder.stem.conv.bias" in names
    assert not {name for name in names if name.startswith("val_")}


def test_a_larger_head_renames_nothing_in_the_encoder(float_path: Path, tmp_path: Path) -> None:
    grown = small_model()
    grown.grow(2, "scaled")
    write_float_onnx(grown, tmp_path / "grown.onnx")
    small, large = (onnx.load(path).graph for path in (float_path, tmp_path / "grown.onnx"))
    parts = [
        [node for node in graph.node if node.name.startswith("encoder.")]
        + [item for item in graph.initializer if item.name.startswith("encoder.")]
        for graph in (small, large)
    ]
    assert len(parts[0]) > 20
    assert parts[0] == parts[1]
    assert len(large.node) > len(small.node)


def test_the_file_says_nothing_of_the_machine_it_was_made_on(float_path: Path) -> None:
    model = onnx.load(float_path)
    data = float_path.read_bytes()
    for text in (str(Path(__file__).parents[1]), "site-packages", "stack_trace", ".py"):
        assert text.encode() not in data
    assert not model.metadata_props
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


def test_batch_norms_are_folded_and_the_opset_is_the_one_asked_for(float_path: Path) -> None:
    model = onnx.load(float_path)
    assert not [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]


def test_the_exporter_is_quiet(model: SegmentationModel, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_float_onnx(model, tmp_path / "float.onnx")
    assert capfd.readouterr() == ("", "")


def test_a_model_with_nan_weights_is_refused_by_the_name_of_the_tensor(tmp_path: Path) -> None:
    model = small_model()
    model.encoder.stem.conv.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(ExportError, match=r"'encoder\.stem\.conv\.weight'"):
        write_float_onnx(model, tmp_path / "float.onnx")
    assert not list(tmp_path.iterdir())


def test_more_classes_than_a_mask_can_hold_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="256"):
        write_float_onnx(small_model((256,)), tmp_path / "float.onnx")


def test_a_batch_norm_that_is_left_and_another_opset_are_errors() -> None:
    norm = helper.make_node("BatchNormalization", ["x", "s", "b", "m", "v"], ["y"], name="lonely")
    graph = helper.make_graph([norm], "g", [], [])
    with pytest.raises(ExportError, match="lonely"):
        check_float_graph(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)]))
    with pytest.raises(ExportError, match="another opset"):
        check_float_graph(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET + 2)]))


def test_a_dropped_output_leaves_the_others_as_they_were(float_path: Path) -> None:
    model = onnx.load(float_path)
    image_NHWC = random_images(1, seed=5)
    whole = run(model, image_NHWC)
    mask_only = keep_outputs(model, ["mask"])
    set_metadata(mask_only, {"b": "2", "a": "1"})
    onnx.checker.check_model(mask_only, full_check=True)
    assert [output.name for output in mask_only.graph.output] == ["mask"]
    assert [entry.key for entry in mask_only.metadata_props] == ["a", "b"]
    np.testing.assert_array_equal(run(mask_only, image_NHWC)["mask"], whole["mask"])
    logits_only = keep_outputs(model, ["logits"])
    assert not [node for node in logits_only.graph.node if node.op_type == "ArgMax"]
    np.testing.assert_array_equal(run(logits_only, image_NHWC)["logits"], whole["logits"])
    assert [output.name for output in model.graph.output] == ["logits", "mask"]


def test_an_output_that_is_not_there_cannot_be_kept(float_path: Path) -> None:
    with pytest.raises(ValueError, match="heatmap"):
        keep_outputs(onnx.load(float_path), ["heatmap"])


def padded_convolution(*, value: float = 0.0, channels: int = 0, second_reader: bool = False) -> onnx.ModelProto:
    """Pad (0 above and left, 1 below and right) and a strided convolution, as TensorFlow's "same" padding has it."""
    rng = np.random.default_rng(0)
    pads = np.array([0, channels, 0, 0, 0, channels, 1, 1], dtype=np.int64)
    weight = rng.normal(size=(2, 3 + 2 * channels, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Pad", ["x", "pads", "value"], ["padded"]),
        helper.make_node("Conv", ["padded", "w"], ["y"], strides=[2, 2], pads=[0, 1, 0, 0]),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    if second_reader:
        nodes.append(helper.make_node("Relu", ["padded"], ["z"]))
        outputs.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    constants = [
        numpy_helper.from_array(pads, "pads"),
        numpy_helper.from_array(np.float32(value), "value"),
        numpy_helper.from_array(weight, "w"),
    ]
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])
    graph = helper.make_graph(nodes, "g", [image], outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


def test_zeros_padded_before_a_convolution_move_into_it() -> None:
    model = padded_convolution()
    pixels_NCHW = np.random.default_rng(1).normal(size=(1, 3, 8, 8)).astype(np.float32)
    before = run(model, pixels_NCHW)["y"]
    fold_padding(model)
    assert [node.op_type for node in model.graph.node] == ["Conv"]
    np.testing.assert_allclose(run(model, pixels_NCHW)["y"], before, rtol=1e-6)


@pytest.mark.parametrize("kept", [{"value": 1.0}, {"channels": 1}, {"second_reader": True}])
def test_a_pad_that_a_convolution_cannot_do_stays(kept: dict[str, float]) -> None:
    model = padded_convolution(**kept)  # type: ignore[arg-type]
    before = model.SerializeToString()
    fold_padding(model)
    assert model.SerializeToString() == before
