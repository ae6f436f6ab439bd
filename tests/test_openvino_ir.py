"""The OpenVINO IR: the same bytes for the same ONNX, the right types, int8 that runs in int8."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fakes import HEIGHT_PX, WIDTH_PX, measure, random_images, small_model

from edge_ilseg.bundle import Precision
from edge_ilseg.calibration.merge import make_ranges
from edge_ilseg.devices.runtime import import_openvino, openvino_core
from edge_ilseg.errors import ExportError, MissingPackageError
from edge_ilseg.export import sessions
from edge_ilseg.export.float_onnx import write_float_onnx
from edge_ilseg.export.openvino_ir import model_api_info, write_ir
from edge_ilseg.export.quantize import write_int8_onnx, write_weights_only

ov = import_openvino()

INFO = {"model_info": model_api_info(["background", "dining table"]), "edge_ilseg": {"step_id": "ab12"}}
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")


def source(folder: Path, precision: Precision) -> Path:
    return folder / ("int8.onnx" if precision == "int8" else "float.onnx")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ir")
    write_float_onnx(small_model(), folder / "float.onnx")
    ranges = make_ranges(measure(folder / "float.onnx", random_images(4)), "carry", None)
    write_int8_onnx(folder / "float.onnx", folder / "int8.onnx", ranges)
    for precision in PRECISIONS:
        write_ir(source(folder, precision), folder / f"{precision}.xml", precision, INFO)
    return folder


@pytest.mark.parametrize("precision", PRECISIONS)
def test_two_conversions_are_the_same_bytes(folder: Path, tmp_path: Path, precision: Precision) -> None:
    write_ir(source(folder, precision), tmp_path / "again.xml", precision, INFO)
    for suffix in (".xml", ".bin"):
        assert (tmp_path / f"again{suffix}").read_bytes() == (folder / f"{precision}{suffix}").read_bytes()


def test_fp32_is_not_compressed_and_fp16_takes_half(folder: Path) -> None:
    onnx_bytes = (folder / "float.onnx").stat().st_size
    fp32, fp16, int8 = ((folder / f"{name}.bin").stat().st_size for name in PRECISIONS)
    assert 0.95 * onnx_bytes < fp32
    assert fp16 == pytest.approx(fp32 / 2, rel=0.02)
    assert int8 == pytest.approx(fp32 / 4, rel=0.10)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_input_is_uint8_nhwc_and_the_outputs_keep_their_names_and_types(folder: Path, precision: Precision) -> None:
    model = openvino_core().read_model(folder / f"{precision}.xml")
    assert [(item.any_name, item.element_type, list(item.shape)) for item in model.inputs] == [
        ("image", ov.Type.u8, [1, HEIGHT_PX, WIDTH_PX, 3])
    ]
    assert str(model.inputs[0].node.layout) == "[N,H,W,C]"
    outputs = {next(iter(item.names)): item.element_type for item in model.outputs}
    assert outputs == {"logits": ov.Type.f32, "mask": ov.Type.u8}


def test_labels_and_our_notes_can_be_read_from_the_file(folder: Path) -> None:
    model = openvino_core().read_model(folder / "int8.xml")
    assert model.get_rt_info(["model_info", "labels"]).astype(str) == "background dining_table"
    assert model.get_rt_info(["model_info", "model_type"]).astype(str) == "segmentation"
    assert model.get_rt_info(["edge_ilseg", "step_id"]).astype(str) == "ab12"


def test_the_file_says_nothing_of_the_folder_it_was_made_in(folder: Path) -> None:
    assert str(folder) not in (folder / "int8.xml").read_text()


def test_an_ir_of_weights_alone_is_small_the_same_bytes_twice_and_takes_and_gives_the_same(
    folder: Path, tmp_path: Path
) -> None:
    write_weights_only(folder / "float.onnx", tmp_path / "weights.onnx")
    for name in ("one", "two"):
        write_ir(tmp_path / "weights.onnx", tmp_path / f"{name}.xml", "int8", INFO)
    for suffix in (".xml", ".bin"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()
    size, whole = (tmp_path / "one.bin").stat().st_size, (folder / "fp32.bin").stat().st_size
    assert size == pytest.approx(whole / 4, rel=0.10)
    small, fp32 = (openvino_core().read_model(path) for path in (tmp_path / "one.xml", folder / "fp32.xml"))
    for ports in ("inputs", "outputs"):
        kinds = [
            {(item.any_name, str(item.element_type), str(item.partial_shape)) for item in getattr(model, ports)}
            for model in (small, fp32)
        ]
        assert kinds[0] == kinds[1]
    image_NHWC = random_images(1, seed=3)
    expected = sessions.load_onnx(tmp_path / "weights.onnx")(image_NHWC)
    found = sessions.load_openvino(tmp_path / "one.xml")(image_NHWC)
    np.testing.assert_allclose(found.logits_NCHW, expected.logits_NCHW, rtol=1e-3, atol=1e-3)


def test_a_file_that_is_no_onnx_is_refused(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "damaged.onnx"
    path.write_bytes((folder / "float.onnx").read_bytes()[:500])
    with pytest.raises(ExportError, match=r"damaged\.onnx"):
        write_ir(path, tmp_path / "damaged.xml", "fp32", {})


def test_simulated_int8_is_not_the_integer_arithmetic_but_close_to_it(folder: Path) -> None:
    image_NHWC = random_images(1, seed=3)
    real = sessions.load_openvino(folder / "int8.xml")(image_NHWC)
    try:
        simulated = sessions.load_openvino(folder / "int8.xml", simulated=True)(image_NHWC)
    except MissingPackageError as error:
        pytest.skip(str(error))
    expected = sessions.load_onnx(folder / "int8.onnx", simulated=True)(image_NHWC)
    spread = np.abs(expected.logits_NCHW).max()
    assert np.abs(simulated.logits_NCHW - expected.logits_NCHW).max() < 0.05 * spread
    assert (real.mask_NHW == simulated.mask_NHW).mean() > 0.9
