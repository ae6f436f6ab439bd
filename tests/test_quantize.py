"""int8 from ranges or of the weights alone: the ranges decide, and what must stay in float stays in float."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from fakes import measure, random_images, small_model, with_constant
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from onnx import numpy_helper

from edge_ilseg.calibration.collect import quantized_nodes
from edge_ilseg.calibration.merge import make_ranges
from edge_ilseg.calibration.ranges import Ranges
from edge_ilseg.errors import ExportError
from edge_ilseg.export.float_onnx import write_float_onnx
from edge_ilseg.export.openvino_ir import write_ir
from edge_ilseg.export.quantize import (
    INT8_HIGHEST,
    find_float_layers,
    quantize_weights,
    write_int8_onnx,
    write_weights_only,
)
from edge_ilseg.export.sessions import Outputs, load_onnx, load_openvino
from edge_ilseg.files import sha256_file

CONVOLUTIONS = 18
FIRST, LAST = ("encoder.stem.conv/Conv",), tuple(f"decoder.classifiers.0.steps.{step}/Conv" for step in (0, 1))
KEPT = ("encoder.stages.1.0.conv/Conv", "decoder.projection.conv/Conv")


def calibrate(path: Path) -> Ranges:
    return make_ranges(measure(path, random_images(4)), "carry", None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8")
    write_float_onnx(small_model(), folder / "float.onnx")
    write_int8_onnx(folder / "float.onnx", folder / "int8.onnx", calibrate(folder / "float.onnx"))
    write_weights_only(folder / "float.onnx", folder / "weights.onnx")
    return folder


@pytest.fixture(scope="module")
def ranges(folder: Path) -> Ranges:
    return calibrate(folder / "float.onnx")


@pytest.fixture(scope="module")
def model(folder: Path) -> onnx.ModelProto:
    return onnx.load(folder / "float.onnx")


@pytest.fixture(scope="module")
def grown_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("grown") / "float.onnx"
    grown = small_model()
    grown.grow(2, "scaled")
    write_float_onnx(grown, path)
    return path


def constants_of(path: Path) -> dict[str, np.ndarray]:
    return {item.name: numpy_helper.to_array(item) for item in onnx.load(path).graph.initializer}


def encoder_of(path: Path) -> list[onnx.TensorProto]:
    return [item for item in onnx.load(path).graph.initializer if item.name.startswith("encoder.")]


def rounded_to_levels(weight_OIHW: NDArray[np.float32]) -> NDArray[np.float32]:
    levels_OIHW, scales_O = quantize_weights(weight_OIHW)
    return levels_OIHW * scales_O.reshape(-1, 1, 1, 1)


def relative_rmse(expected: Outputs, found: Outputs) -> float:
    error = np.square(found.logits_NCHW - expected.logits_NCHW).sum()
    return float(np.sqrt(error / np.square(expected.logits_NCHW).sum()))


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
    write_weights_only(folder / "float.onnx", tmp_path / "weights.onnx")
    assert (tmp_path / "weights.onnx").read_bytes() == (folder / "weights.onnx").read_bytes()


def test_a_wider_range_changes_the_scale_of_its_tensor(folder: Path, ranges: Ranges, tmp_path: Path) -> None:
    name = "encoder.stages.1.0/Clip"
    item = msgspec.structs.replace(ranges.tensors[name], lowest=0.0, highest=51.0)
    wider = msgspec.structs.replace(ranges, tensors={**ranges.tensors, name: item})
    write_int8_onnx(folder / "float.onnx", tmp_path / "wider.onnx", wider)
    before, after = constants_of(folder / "int8.onnx"), constants_of(tmp_path / "wider.onnx")
    changed = {key for key in before if key.endswith("Clip_scale") and before[key] != after[key]}
    assert changed == {f"{name}_scale"}
    assert float(after[f"{name}_scale"]) == pytest.approx(0.2)


def test_weights_are_int8_per_channel_and_use_seven_bits_when_the_range_is_reduced(
    folder: Path, ranges: Ranges, tmp_path: Path
) -> None:
    write_int8_onnx(folder / "float.onnx", tmp_path / "full.onnx", ranges, reduce_range=False)
    for path, limit in ((folder / "int8.onnx", 64), (tmp_path / "full.onnx", INT8_HIGHEST)):
        weights = {name: value for name, value in constants_of(path).items() if name.endswith(".weight_quantized")}
        scales = constants_of(path)
        assert len(weights) == CONVOLUTIONS
        for name, value in weights.items():
            assert value.dtype == np.int8
            is_depthwise = value.shape[1] == 1
            assert int(np.abs(value.astype(int)).max()) == (INT8_HIGHEST if is_depthwise else limit)
            assert scales[name.replace("_quantized", "_scale")].shape == (len(value),)


@pytest.fixture(scope="module")
def depthwise(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    """A network of depthwise and pointwise convolutions in int8, weights of 7 bits where products are added."""
    folder = tmp_path_factory.mktemp("depthwise")
    write_float_onnx(small_model(backbone="efficientnet_lite0"), folder / "float.onnx")
    write_int8_onnx(folder / "float.onnx", folder / "int8.onnx", calibrate(folder / "float.onnx"))
    return onnx.load(folder / "int8.onnx")


def test_depthwise_weights_keep_all_bits(depthwise: onnx.ModelProto) -> None:
    highest = {
        item.name: (item.dims[1] == 1, int(np.abs(numpy_helper.to_array(item).astype(int)).max()))
        for item in depthwise.graph.initializer
        if item.name.endswith(".weight_quantized")
    }
    assert sum(is_depthwise for is_depthwise, _ in highest.values()) > 15
    assert set(highest.values()) == {(True, 127), (False, 64)}


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


def test_the_encoder_is_the_same_bytes_when_only_the_head_grows_and_its_ranges_are_carried(
    folder: Path, ranges: Ranges, grown_path: Path, tmp_path: Path
) -> None:
    own_images = measure(grown_path, random_images(2, seed=8) // 2, step="01-boat")
    for policy in ("carry", "new-only"):
        write_int8_onnx(grown_path, tmp_path / f"{policy}.onnx", make_ranges(own_images, policy, ranges))
    before = encoder_of(folder / "int8.onnx")
    assert len(before) > 30
    assert encoder_of(tmp_path / "carry.onnx") == before
    assert encoder_of(tmp_path / "new-only.onnx") != before


def test_the_encoder_of_weights_alone_is_the_same_bytes_when_only_the_head_grows(
    folder: Path, grown_path: Path, tmp_path: Path
) -> None:
    write_weights_only(grown_path, tmp_path / "grown.onnx")
    before = encoder_of(folder / "weights.onnx")
    assert len(before) > 20
    assert encoder_of(tmp_path / "grown.onnx") == before


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


@pytest.mark.parametrize(("lowest", "highest"), [(float("nan"), 1.0), (0.0, float("inf")), (2.0, 1.0)])
def test_what_is_no_range_is_refused_by_name(
    folder: Path, ranges: Ranges, tmp_path: Path, lowest: float, highest: float
) -> None:
    item = msgspec.structs.replace(ranges.tensors["Div"], lowest=lowest, highest=highest)
    broken = msgspec.structs.replace(ranges, tensors={**ranges.tensors, "Div": item})
    with pytest.raises(ExportError, match="'Div'"):
        write_int8_onnx(folder / "float.onnx", tmp_path / "int8.onnx", broken)
    assert not list(tmp_path.iterdir())


def test_first_and_last_are_convolutions_whatever_they_are_called(model: onnx.ModelProto, grown_path: Path) -> None:
    assert find_float_layers(model, ["first"]) == FIRST
    assert find_float_layers(model, ["last"]) == LAST
    assert find_float_layers(model, ["last", "first"]) == FIRST + LAST
    new = ("decoder.classifiers.0.steps.2/Conv",)
    assert find_float_layers(onnx.load(grown_path), ["last"]) == LAST + new


def test_a_node_or_all_of_a_module_can_stay_in_float(model: onnx.ModelProto) -> None:
    assert find_float_layers(model, ["encoder.stages.0.1/Clip"]) == ("encoder.stages.0.1/Clip",)
    assert find_float_layers(model, ["encoder.stages.0.1"]) == (
        "encoder.stages.0.1.conv/Conv",
        "encoder.stages.0.1/Clip",
    )
    encoder = tuple(name for name in quantized_nodes(model) if name.startswith("encoder."))
    assert find_float_layers(model, ["encoder"]) == encoder
    assert len(encoder) == 14
    assert find_float_layers(model, ["decoder"]) == tuple(x for x in quantized_nodes(model) if x not in encoder)
    assert find_float_layers(model, ["decoder.pooling"]) == ("decoder.pooling.conv/Conv", "decoder.pooling/Relu")


def test_layers_that_stay_in_float_are_in_graph_order_and_named_once(model: onnx.ModelProto) -> None:
    names = ["decoder.projection", "encoder.stem", "first", "encoder.stem.conv/Conv"]
    assert find_float_layers(model, names) == (
        *("encoder.stem.conv/Conv", "encoder.stem/Clip"),
        *("decoder.projection.conv/Conv", "decoder.projection/Relu"),
    )
    assert find_float_layers(model, []) == ()


@pytest.mark.parametrize(
    "name", ["encoder.stage.0", "encoder.stages.1.", "encoder.sta", "Resize", "Firs", "", "encoder.stem.conv.weight"]
)
def test_a_layer_that_is_not_there_is_refused_with_what_would_be_right(model: onnx.ModelProto, name: str) -> None:
    with pytest.raises(ExportError, match=rf"found: +'{name}'\n +expected: first, last, .*'encoder\.stem\.conv/Conv'"):
        find_float_layers(model, ["first", name])


def test_the_nearest_name_is_offered_for_one_that_is_not_there(model: onnx.ModelProto) -> None:
    with pytest.raises(ExportError, match=r"do: +did you mean 'decoder\.projection\.conv/Conv'\?"):
        find_float_layers(model, ["decoder.projektion.conv/Conv"])


def test_layers_that_stay_in_float_keep_their_weights_and_the_others_are_as_before(
    folder: Path, ranges: Ranges, tmp_path: Path
) -> None:
    write_int8_onnx(folder / "float.onnx", tmp_path / "mixed.onnx", ranges, float_layers=KEPT)
    before, after = constants_of(folder / "float.onnx"), constants_of(tmp_path / "mixed.onnx")
    int8 = constants_of(folder / "int8.onnx")
    for name in (item.replace("/Conv", ".weight") for item in KEPT):
        np.testing.assert_array_equal(after[name], before[name])
        assert f"{name}_quantized" in int8
        assert f"{name}_quantized" not in after
    quantized = {name for name in after if name.endswith(".weight_quantized")}
    assert len(quantized) == CONVOLUTIONS - len(KEPT)
    for name in quantized:
        np.testing.assert_array_equal(after[name], int8[name])
    image_NHWC = random_images(1, seed=9)
    expected = load_onnx(folder / "float.onnx")(image_NHWC)
    found = load_onnx(tmp_path / "mixed.onnx")(image_NHWC)
    assert (expected.mask_NHW == found.mask_NHW).mean() > 0.9


def test_with_every_layer_in_float_there_is_no_int8_model(
    folder: Path, ranges: Ranges, model: onnx.ModelProto, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match="float"):
        write_int8_onnx(folder / "float.onnx", tmp_path / "none.onnx", ranges, float_layers=quantized_nodes(model))


def test_less_is_lost_the_more_layers_stay_in_float(
    folder: Path, ranges: Ranges, model: onnx.ModelProto, tmp_path: Path
) -> None:
    image_NHWC = random_images(1, seed=9)
    expected = load_onnx(folder / "float.onnx")(image_NHWC)
    lost = [relative_rmse(expected, load_onnx(folder / "int8.onnx", simulated=True)(image_NHWC))]
    for names in (["encoder"], ["encoder", "decoder.branches", "decoder.pooling"]):
        layers = find_float_layers(model, names)
        write_int8_onnx(folder / "float.onnx", tmp_path / "mixed.onnx", ranges, float_layers=layers)
        lost.append(relative_rmse(expected, load_onnx(tmp_path / "mixed.onnx", simulated=True)(image_NHWC)))
    assert lost[0] > lost[1] > lost[2] > 0.0


weights = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 3), st.sampled_from([1, 3]), st.sampled_from([1, 3])),
    elements=st.one_of(st.just(0.0), st.floats(-100, 100, width=32).filter(lambda value: abs(value) > 1e-30)),
)


@given(weights)
@settings(max_examples=200, deadline=None)
def test_weight_levels_are_those_of_a_plain_loop(weight_OIHW: NDArray[np.float32]) -> None:
    levels_OIHW, scales_O = quantize_weights(weight_OIHW)
    assert levels_OIHW.dtype == np.int8
    assert scales_O.dtype == np.float32
    assert levels_OIHW.shape == weight_OIHW.shape
    for kernel, levels, scale in zip(weight_OIHW, levels_OIHW, scales_O, strict=True):
        highest = max(abs(float(value)) for value in kernel.flat)
        if highest == 0.0:
            assert scale == 1.0
        else:
            assert float(scale) == pytest.approx(highest / INT8_HIGHEST, rel=1e-6)
            assert max(abs(int(level)) for level in levels.flat) == INT8_HIGHEST
        for value, level in zip(kernel.flat, levels.flat, strict=True):
            assert abs(float(value) - int(level) * float(scale)) <= float(scale) * (0.5 + 1e-4)
            assert int(level) == 0 or (level > 0) == (value > 0)


def test_weight_levels_by_hand() -> None:
    weight_OI = np.array([[127.0, -1.4, 1.6, 0.5], [0.0, 0.0, 0.0, 0.0], [-2.54, 1.26, 0.02, 0.0]], np.float32)
    levels_OI, scales_O = quantize_weights(weight_OI)
    assert levels_OI.tolist() == [[127, -1, 2, 0], [0, 0, 0, 0], [-127, 63, 1, 0]]
    np.testing.assert_allclose(scales_O, [1.0, 1.0, 0.02], rtol=1e-6)


def test_a_channel_that_has_all_but_decayed_to_nothing_is_nothing() -> None:
    levels_OI, scales_O = quantize_weights(np.array([[1e-44, 0.0], [1.0, 0.5]], np.float32))
    assert (scales_O > 0.0).all()
    assert np.abs(levels_OI[0] * scales_O[0]).max() <= 1e-38


def test_weights_alone_are_stored_in_int8_within_half_a_scale_and_nothing_else_changes(folder: Path) -> None:
    before, after = constants_of(folder / "float.onnx"), constants_of(folder / "weights.onnx")
    quantized = {name.removesuffix("_quantized") for name in after if name.endswith("_quantized")}
    assert len(quantized) == CONVOLUTIONS
    for name in quantized:
        levels, scales = after[f"{name}_quantized"], after[f"{name}_scale"]
        assert levels.dtype == np.int8
        assert scales.shape == (len(levels),)
        for channel, scale in enumerate(scales):
            error = np.abs(levels[channel] * scale - before[name][channel])
            assert error.max() <= scale * (0.5 + 1e-4)
    for name in before.keys() - quantized:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    assert len(after) == len(before) + CONVOLUTIONS
    nodes = [node.op_type for node in onnx.load(folder / "weights.onnx").graph.node]
    assert nodes.count("DequantizeLinear") == CONVOLUTIONS
    assert "QuantizeLinear" not in nodes


def test_weights_alone_compute_what_the_float_graph_does_with_the_rounded_weights(folder: Path, tmp_path: Path) -> None:
    rounded = onnx.load(folder / "float.onnx")
    for name in [item.name for item in rounded.graph.initializer if item.name.endswith(".weight")]:
        rounded = with_constant(rounded, name, rounded_to_levels)
    onnx.save(rounded, tmp_path / "rounded.onnx")
    image_NHWC = random_images(1, seed=9)
    expected = load_onnx(tmp_path / "rounded.onnx")(image_NHWC)
    found = load_onnx(folder / "weights.onnx")(image_NHWC)
    np.testing.assert_allclose(found.logits_NCHW, expected.logits_NCHW, rtol=1e-4, atol=1e-4)
    assert not np.array_equal(expected.logits_NCHW, load_onnx(folder / "float.onnx")(image_NHWC).logits_NCHW)


def test_weights_alone_are_a_quarter_of_the_size_and_lose_little_in_both_runtimes(folder: Path, tmp_path: Path) -> None:
    for name in ("float", "weights"):
        write_ir(folder / f"{name}.onnx", tmp_path / f"{name}.xml", "fp32" if name == "float" else "int8", {})
    for suffix, where in ((".onnx", folder), (".bin", tmp_path)):
        whole, small = ((where / f"{name}{suffix}").stat().st_size for name in ("float", "weights"))
        assert small == pytest.approx(whole / 4, rel=0.12)
    predictors = (load_onnx(folder / "weights.onnx"), load_openvino(tmp_path / "weights.xml"))
    float_model, int8_model = load_onnx(folder / "float.onnx"), load_onnx(folder / "int8.onnx")
    for image_HWC in random_images(2, seed=9):
        expected, int8 = float_model(image_HWC[np.newaxis]), int8_model(image_HWC[np.newaxis])
        for predict in predictors:
            found = predict(image_HWC[np.newaxis])
            assert 0.0 < relative_rmse(expected, found) < min(0.05, relative_rmse(expected, int8))
            assert (found.mask_NHW == expected.mask_NHW).mean() > 0.97


def test_weights_alone_leave_layers_in_float_where_they_are_asked_to(folder: Path, tmp_path: Path) -> None:
    write_weights_only(folder / "float.onnx", tmp_path / "mixed.onnx", float_layers=KEPT)
    before, after = constants_of(folder / "float.onnx"), constants_of(tmp_path / "mixed.onnx")
    for name in (item.replace("/Conv", ".weight") for item in KEPT):
        np.testing.assert_array_equal(after[name], before[name])
    assert sum(name.endswith("_quantized") for name in after) == CONVOLUTIONS - len(KEPT)


def test_inputs_and_outputs_stay_what_they_are(folder: Path) -> None:
    graphs = [onnx.load(folder / f"{name}.onnx").graph for name in ("float", "int8", "weights")]
    assert graphs[0].input == graphs[1].input == graphs[2].input
    assert graphs[0].output == graphs[1].output == graphs[2].output


def test_a_misspelt_module_is_corrected(model: onnx.ModelProto) -> None:
    with pytest.raises(ExportError) as raised:
        find_float_layers(model, ["encodr"])
    assert raised.value.hint == "did you mean 'encoder'?"
