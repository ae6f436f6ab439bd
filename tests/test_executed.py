"""What the runtimes of this machine really compute in int8, convolution by convolution."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from fakes import measure, random_images, small_model

from edge_ilseg.bundle import Runtime
from edge_ilseg.calibration.collect import quantized_nodes
from edge_ilseg.calibration.merge import make_ranges
from edge_ilseg.calibration.ranges import Ranges
from edge_ilseg.devices.device_profile import DOT_PRODUCT_FLAGS
from edge_ilseg.devices.facts import read_device_facts
from edge_ilseg.devices.runtime import OPENVINO_SETTINGS, openvino_core
from edge_ilseg.errors import ExportError
from edge_ilseg.export.executed import check_int8_runs, executed_convolutions
from edge_ilseg.export.float_onnx import write_float_onnx
from edge_ilseg.export.openvino_ir import write_ir
from edge_ilseg.export.quantize import find_float_layers, write_int8_onnx, write_weights_only
from edge_ilseg.export.sessions import load_onnx, load_openvino
from edge_ilseg.models.spec import Backbone, Head

pytestmark = pytest.mark.skipif(
    platform.machine() not in {"x86_64", "AMD64"}, reason="which layers run in int8 is known for x86-64 only"
)
RUNTIMES: tuple[Runtime, ...] = ("onnxruntime", "openvino")
MIXED = ("first", "last", "encoder.stages.1", "decoder.branches.1.1.conv/Conv", "decoder.pooling/Relu")


def write_forms(folder: Path) -> Ranges:
    """Every form of `float.onnx`, with the IR beside it."""
    float_path = folder / "float.onnx"
    ranges = make_ranges(measure(float_path, random_images(3)), "carry", None)
    write_int8_onnx(float_path, folder / "int8.onnx", ranges)
    write_weights_only(float_path, folder / "weights.onnx")
    for name in ("float", "int8", "weights"):
        write_ir(folder / f"{name}.onnx", folder / f"{name}.xml", "fp32" if name == "float" else "int8", {})
    return ranges


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("executed")
    write_float_onnx(small_model(), folder / "float.onnx")
    ranges = write_forms(folder)
    layers = find_float_layers(onnx.load(folder / "float.onnx"), MIXED)
    write_int8_onnx(folder / "float.onnx", folder / "mixed.onnx", ranges, float_layers=layers)
    write_ir(folder / "mixed.onnx", folder / "mixed.xml", "int8", {})
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> onnx.ModelProto:
    return onnx.load(folder / "float.onnx")


def widest(path: Path, groups: int, *, kernel: int = 3, **attributes: Any) -> None:
    """One quantized convolution of 16 channels whose 8-bit weights and inputs are all near their highest level."""
    random = np.random.default_rng(0)
    weight = random.integers(100, 128, (16, 16 // groups, kernel, kernel)).astype(np.int8)
    scale = {"image": np.float32(1), "out": np.float32(weight[0].size * 127)}
    constants = {
        "weight_quantized": weight,
        "weight_scale": np.ones(16, np.float32),
        "weight_zero": np.zeros(16, np.int8),
        "zero": np.uint8(0),
        **{f"{name}_scale": value for name, value in scale.items()},
    }
    node = onnx.helper.make_node
    nodes = [
        node("DequantizeLinear", ["image", "image_scale", "zero"], ["values"]),
        node(
            "DequantizeLinear",
            ["weight_quantized", "weight_scale", "weight_zero"],
            ["weight_DequantizeLinear_Output"],
            axis=0,
        ),
        node(
            "Conv",
            ["values", "weight_DequantizeLinear_Output"],
            ["sums"],
            name="layer/Conv",
            group=groups,
            **{"pads": [kernel // 2] * 4, **attributes},
        ),
        node("QuantizeLinear", ["sums", "out_scale", "zero"], ["levels"]),
        node("DequantizeLinear", ["levels", "out_scale", "zero"], ["out"]),
    ]
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "widest",
        [info("image", onnx.TensorProto.UINT8, [1, 16, 8, 8])],
        [info("out", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), path)


def largest_error(path: Path, runtime: Runtime) -> float:
    """Of the kernels of this machine against the graph computed step by step, in levels of the output."""
    image = np.random.default_rng(1).integers(230, 256, (1, 16, 8, 8)).astype(np.uint8)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    exact = onnxruntime.InferenceSession(path, options).run(None, {"image": image})[0]
    assert exact.max() > 2 * exact.min() > 0
    if runtime == "onnxruntime":
        found = onnxruntime.InferenceSession(path).run(None, {"image": image})[0]
    else:
        found = openvino_core().compile_model(path, "CPU", OPENVINO_SETTINGS)(image)[0]
    scale = next(item for item in onnx.load(path).graph.initializer if item.name == "out_scale")
    return float(np.abs(found - exact).max() / onnx.numpy_helper.to_array(scale))


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("shape", [{}, {"kernel": 5}, {"strides": [2, 2]}, {"dilations": [2, 2], "pads": [2] * 4}])
def test_a_depthwise_convolution_of_8_bit_weights_does_not_overflow_on_the_kernels_of_this_machine(
    runtime: Runtime, shape: dict[str, Any], tmp_path: Path
) -> None:
    """Why depthwise weights keep 8 bits where others have 7 (`edge_ilseg.export.quantize`, rule 2)."""
    widest(tmp_path / "depthwise.onnx", 16, **shape)
    assert largest_error(tmp_path / "depthwise.onnx", runtime) <= 1.001  # a tie may be rounded to either side
    assert executed_convolutions(tmp_path / "depthwise.onnx", runtime) == {"layer/Conv": "u8"}


@pytest.mark.skipif(
    not DOT_PRODUCT_FLAGS.isdisjoint(read_device_facts().int8_flags or ()),
    reason="integer dot products do not overflow",
)
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_any_other_convolution_of_8_bit_weights_does(runtime: Runtime, tmp_path: Path) -> None:
    widest(tmp_path / "dense.onnx", 1)
    assert largest_error(tmp_path / "dense.onnx", runtime) > 10


def convolutions_of(model: onnx.ModelProto) -> list[str]:
    return [node.name for node in model.graph.node if node.op_type == "Conv"]


def form(folder: Path, name: str, runtime: Runtime) -> Path:
    return folder / (f"{name}.xml" if runtime == "openvino" else f"{name}.onnx")


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(("name", "expected"), [("float", "f32"), ("int8", "u8"), ("weights", "f32")])
def test_every_convolution_is_there_by_its_name_in_the_float_graph_and_in_its_element_type(
    folder: Path, model: onnx.ModelProto, runtime: Runtime, name: str, expected: str
) -> None:
    executed = executed_convolutions(form(folder, name, runtime), runtime)
    assert executed == dict.fromkeys(sorted(convolutions_of(model)), expected)
    assert list(executed) == sorted(executed)
    assert len(executed) == 18


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_layers_that_are_kept_in_float_really_are_computed_in_f32_and_the_others_in_u8(
    folder: Path, model: onnx.ModelProto, runtime: Runtime
) -> None:
    executed = executed_convolutions(form(folder, "mixed", runtime), runtime)
    in_float = {
        *("encoder.stem.conv/Conv", "encoder.stages.1.0.conv/Conv", "encoder.stages.1.1.conv/Conv"),
        *("decoder.branches.1.1.conv/Conv", "decoder.classifiers.0.steps.0/Conv"),
        "decoder.classifiers.0.steps.1/Conv",
    }
    assert executed == {name: "f32" if name in in_float else "u8" for name in convolutions_of(model)}
    quantized = set(quantized_nodes(model, find_float_layers(model, MIXED)))
    check_int8_runs(executed, [name for name in executed if name in quantized], folder)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_each_single_convolution_can_be_kept_in_float(
    folder: Path, model: onnx.ModelProto, runtime: Runtime, tmp_path: Path
) -> None:
    ranges = make_ranges(measure(folder / "float.onnx", random_images(1)), "carry", None)
    for name in ("encoder.stages.0.1.conv/Conv", "decoder.pooling.conv/Conv", "decoder.projection.conv/Conv"):
        write_int8_onnx(folder / "float.onnx", tmp_path / "one.onnx", ranges, float_layers=[name])
        write_ir(tmp_path / "one.onnx", tmp_path / "one.xml", "int8", {})
        executed = executed_convolutions(form(tmp_path, "one", runtime), runtime)
        assert [item for item, kind in executed.items() if kind == "f32"] == [name]
        assert len(executed) == len(convolutions_of(model))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_form_runs_and_gives_nearly_the_mask_of_fp32(folder: Path, runtime: Runtime) -> None:
    load = load_openvino if runtime == "openvino" else load_onnx
    image_NHWC = random_images(1, seed=9)
    expected = load_onnx(folder / "float.onnx")(image_NHWC).mask_NHW
    agreement = {
        name: np.mean(load(form(folder, name, runtime))(image_NHWC).mask_NHW == expected)
        for name in ("float", "weights", "mixed", "int8")
    }
    assert agreement["float"] > 0.999
    assert min(agreement.values()) > 0.9


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_an_int8_model_passes_and_one_that_runs_in_float_is_refused_by_name(
    folder: Path, model: onnx.ModelProto, runtime: Runtime
) -> None:
    names = convolutions_of(model)
    path = form(folder, "int8", runtime)
    check_int8_runs(executed_convolutions(path, runtime), names, path)
    path = form(folder, "weights", runtime)
    with pytest.raises(ExportError, match=r"weights\.(.|\n)*18 of 18 .*'encoder\.stem\.conv/Conv' in f32(.|\n)*--keep"):
        check_int8_runs(executed_convolutions(path, runtime), names, path)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_convolution_that_was_to_be_int8_and_is_not_is_named(folder: Path, runtime: Runtime) -> None:
    path = form(folder, "mixed", runtime)
    names = ["encoder.stages.0.0.conv/Conv", "encoder.stages.1.1.conv/Conv", "decoder.projection.conv/Conv"]
    with pytest.raises(ExportError, match=r"1 of 3 in another element type, 'encoder\.stages\.1\.1\.conv/Conv' in f32"):
        check_int8_runs(executed_convolutions(path, runtime), names, path)


def test_a_convolution_that_the_runtime_does_not_have_is_named(folder: Path) -> None:
    with pytest.raises(ExportError, match=r"1 of 2 .*'two/Conv' in None"):
        check_int8_runs({"one/Conv": "i8"}, ["one/Conv", "two/Conv"], folder)
    check_int8_runs({"one/Conv": "f32", "two/Conv": "u8"}, ["two/Conv"], folder)
    check_int8_runs({}, [], folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "head"),
    [("tiny", "deeplab_v2"), ("resnet18", "deeplab_v3"), ("efficientnet_lite0", "deeplab_v3")],
)
def test_of_every_kind_of_network_each_convolution_runs_in_int8(backbone: Backbone, head: Head, tmp_path: Path) -> None:
    write_float_onnx(small_model(backbone=backbone, head=head), tmp_path / "float.onnx")
    write_forms(tmp_path)
    names = convolutions_of(onnx.load(tmp_path / "float.onnx"))
    for runtime in RUNTIMES:
        for name, expected in (("float", "f32"), ("int8", "u8"), ("weights", "f32")):
            executed = executed_convolutions(form(tmp_path, name, runtime), runtime)
            assert executed == dict.fromkeys(names, expected), f"{runtime} {name}"


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["resnet18", "efficientnet_lite0"])
def test_any_third_of_the_layers_can_stay_in_float(backbone: Backbone, tmp_path: Path) -> None:
    write_float_onnx(small_model(backbone=backbone), tmp_path / "float.onnx")
    ranges = make_ranges(measure(tmp_path / "float.onnx", random_images(2)), "carry", None)
    model = onnx.load(tmp_path / "float.onnx")
    nodes, names = quantized_nodes(model), convolutions_of(model)
    for seed in range(3):
        kept = set(np.random.default_rng(seed).choice(nodes, len(nodes) // 3, replace=False).tolist())
        write_int8_onnx(tmp_path / "float.onnx", tmp_path / "mixed.onnx", ranges, float_layers=kept)
        write_ir(tmp_path / "mixed.onnx", tmp_path / "mixed.xml", "int8", {})
        expected = {name: "f32" if name in kept else "u8" for name in names}
        for runtime in RUNTIMES:
            assert executed_convolutions(form(tmp_path, "mixed", runtime), runtime) == expected
