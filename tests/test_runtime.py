"""Sessions of both runtimes; numbers are the rules on top of `devices/runtime.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from bundles import COLORS, GROWN, HEIGHT_PX, WIDTH_PX, color_images, color_network, nearest_color, write_bundle
from onnx import TensorProto

from edge_ilseg.bundle import ModelEntry, Runtime
from edge_ilseg.devices.runtime import check_fit, installed_runtimes, load_session
from edge_ilseg.errors import BundleError, MissingPackageError

BOTH = pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp(request.param) / "bundle"
    models = ((request.param, "fp32"),)
    manifest = write_bundle(folder, GROWN, step_id="b", parent_id="a", models=models, outputs=("mask", "logits"))
    return folder, manifest, load_session(folder, manifest.models[0], threads=1)


def entry_for(
    folder: Path, network: onnx.ModelProto, runtime: Runtime = "onnxruntime", **options: object
) -> ModelEntry:
    manifest = write_bundle(
        folder, GROWN, step_id="b", parent_id="a", models=((runtime, "fp32"),), network=network, **options
    )  # type: ignore[arg-type]
    return manifest.models[0]


def test_the_mask_is_what_a_plain_loop_computes(loaded) -> None:  # type: ignore[no-untyped-def]
    _, _, session = loaded
    for image_HWC in color_images(3, list(COLORS), seed=1):
        mask_HW = session.mask(image_HWC)
        assert mask_HW.dtype == np.uint8
        np.testing.assert_array_equal(mask_HW, nearest_color(image_HWC, list(GROWN)))


def test_a_mask_stays_as_it_is_when_the_next_image_runs(loaded) -> None:  # type: ignore[no-untyped-def]
    _, _, session = loaded
    first_HWC, second_HWC = color_images(2, list(COLORS), seed=2)
    first_HW = session.mask(first_HWC)
    before_HW = first_HW.copy()
    assert not np.array_equal(session.mask(second_HWC), before_HW)
    np.testing.assert_array_equal(first_HW, before_HW)


def test_logits_come_in_channels_first_and_their_largest_is_the_mask(loaded) -> None:  # type: ignore[no-untyped-def]
    _, _, session = loaded
    image_HWC = color_images(1, list(COLORS), seed=4)[0]
    logits_CHW = session.logits(image_HWC)
    assert logits_CHW.dtype == np.float32
    assert logits_CHW.shape == (len(GROWN), HEIGHT_PX, WIDTH_PX)
    np.testing.assert_array_equal(logits_CHW.argmax(axis=0), session.mask(image_HWC))


def test_an_image_that_is_a_view_is_read_in_its_own_order(loaded) -> None:  # type: ignore[no-untyped-def]
    _, _, session = loaded
    image_HWC = color_images(1, list(COLORS), seed=5)[0]
    flipped_HWC = image_HWC[:, ::-1]
    np.testing.assert_array_equal(session.mask(flipped_HWC), nearest_color(flipped_HWC, list(GROWN)))


def test_a_session_tells_its_size_and_version(loaded) -> None:  # type: ignore[no-untyped-def]
    _, manifest, session = loaded
    runtime = manifest.models[0].runtime
    assert (session.input_height_px, session.input_width_px) == (HEIGHT_PX, WIDTH_PX)
    assert session.class_count == len(GROWN)
    assert session.runtime_version.startswith(f"{runtime} ")
    if runtime == "openvino":
        assert session.executed_precisions["f32"] >= 1
        assert "bf16" not in session.executed_precisions  # rule 3
    else:
        assert session.executed_precisions is None


@pytest.mark.parametrize(
    "image_HWC",
    [
        np.zeros((HEIGHT_PX, WIDTH_PX + 1, 3), np.uint8),
        np.zeros((HEIGHT_PX, WIDTH_PX, 3), np.float32),
        np.zeros((1, HEIGHT_PX, WIDTH_PX, 3), np.uint8),
    ],
)
def test_an_image_of_another_shape_or_type_is_refused(loaded, image_HWC) -> None:  # type: ignore[no-untyped-def]
    _, _, session = loaded
    with pytest.raises(ValueError, match="expected uint8"):
        session.mask(image_HWC)


@BOTH
def test_floating_point_layers_run_in_float32_whatever_the_processor_offers(runtime: Runtime, tmp_path: Path) -> None:
    """Rule 3. In bfloat16 these logits, 16 bits and more of significand, would be rounded."""
    outputs = ("mask", "logits")
    entry = entry_for(tmp_path / "bundle", color_network([*GROWN], outputs=outputs), runtime, outputs=outputs)
    session = load_session(tmp_path / "bundle", entry)
    image_HWC = color_images(1, list(COLORS), seed=6)[0] | 1
    expected = [2 * image_HWC.astype(np.int64) @ COLORS[name] - np.sum(np.square(COLORS[name])) for name in GROWN]
    np.testing.assert_array_equal(session.logits(image_HWC), np.array(expected, dtype=np.float32))


def test_logits_that_the_model_does_not_have_are_refused(tmp_path: Path) -> None:
    session = load_session(tmp_path / "bundle", entry_for(tmp_path / "bundle", color_network(list(GROWN))))
    assert session.class_count is None
    with pytest.raises(BundleError, match="no logits output"):
        session.logits(np.zeros((HEIGHT_PX, WIDTH_PX, 3), np.uint8))


@BOTH
@pytest.mark.parametrize("damage", ["cut", "empty", "noise"])
def test_a_model_that_the_runtime_refuses_is_a_damaged_bundle(
    runtime: Runtime, damage: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bundle"
    entry = entry_for(folder, color_network(list(GROWN)), runtime)
    path = folder / entry.files[0]
    data = path.read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "noise": bytes(range(256)) * 4}[damage])
    with pytest.raises(BundleError, match="refuses the model file") as raised:
        load_session(folder, entry)
    assert raised.value.where == path
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""  # rule 4


def test_ir_without_its_weights_is_a_damaged_bundle(tmp_path: Path) -> None:
    entry = entry_for(tmp_path / "bundle", color_network(list(GROWN)), "openvino")
    (tmp_path / "bundle" / entry.files[1]).unlink()
    with pytest.raises(BundleError, match="openvino refuses the model file"):
        load_session(tmp_path / "bundle", entry)


def test_a_model_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    entry = entry_for(tmp_path / "bundle", color_network(list(GROWN)))
    (tmp_path / "bundle" / entry.files[0]).unlink()
    with pytest.raises(BundleError, match="a model file is missing"):
        load_session(tmp_path / "bundle", entry)


@BOTH
def test_an_input_of_another_name_is_refused(runtime: Runtime, tmp_path: Path) -> None:
    entry = entry_for(tmp_path / "bundle", color_network(list(GROWN), input_name="picture"), runtime)
    with pytest.raises(BundleError, match="input is not an image") as raised:
        load_session(tmp_path / "bundle", entry)
    assert "picture: uint8 1 x 48 x 64 x 3" in raised.value.found


@BOTH
def test_a_mask_of_another_type_is_refused(runtime: Runtime, tmp_path: Path) -> None:
    entry = entry_for(tmp_path / "bundle", color_network(list(GROWN), mask_type=TensorProto.FLOAT), runtime)
    with pytest.raises(BundleError, match="does not have the outputs") as raised:
        load_session(tmp_path / "bundle", entry)
    assert "mask: float32 1 x 48 x 64" in raised.value.found


def test_an_output_that_the_entry_promises_and_the_model_lacks_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    entry = entry_for(folder, color_network(list(GROWN)), outputs=("mask", "logits"))
    with pytest.raises(BundleError, match="does not have the outputs"):
        load_session(folder, entry)


def test_an_input_size_that_is_not_the_manifests_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    manifest = write_bundle(folder, GROWN, step_id="b", parent_id="a", input_px=(WIDTH_PX, HEIGHT_PX))
    with pytest.raises(BundleError, match="input is not the one") as raised:
        check_fit(load_session(folder, manifest.models[0]), manifest)
    assert (raised.value.found, raised.value.expected) == ("48 x 64 px (height x width)", "64 x 48 px")


def test_logits_for_more_classes_than_the_manifest_has_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    network = color_network([*GROWN], outputs=("mask", "logits"))
    steps = {"background": 0, "apple": 0, "boat": 1}
    outputs = ("mask", "logits")
    manifest = write_bundle(folder, steps, step_id="b", parent_id="a", network=network, outputs=outputs)
    with pytest.raises(BundleError, match="another number of channels"):
        check_fit(load_session(folder, manifest.models[0]), manifest)


@BOTH
def test_a_runtime_that_is_not_installed_names_its_extra(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = entry_for(tmp_path / "bundle", color_network(list(GROWN)), runtime)
    monkeypatch.setitem(sys.modules, runtime, None)
    assert runtime not in installed_runtimes()
    with pytest.raises(MissingPackageError) as raised:
        load_session(tmp_path / "bundle", entry)
    assert raised.value.hint == f"pip install 'edge-ilseg[{runtime}]'"


def test_a_runtime_that_is_installed_and_broken_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel for another machine fails on import, with an `ImportError` from deep inside."""
    entry = entry_for(tmp_path / "bundle", color_network(list(GROWN)))
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").write_text("raise ImportError('libonnxruntime.so: wrong ELF class')")
    for name in [item for item in sys.modules if item.split(".")[0] == "onnxruntime"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingPackageError, match="installed and does not start") as raised:
        load_session(tmp_path / "bundle", entry)
    assert "wrong ELF class" in raised.value.found


def test_openvino_is_imported_without_its_telemetry(tmp_path: Path) -> None:
    code = "from edge_ilseg.devices.runtime import import_openvino; print(import_openvino().Core().available_devices)"
    environment = {key: value for key, value in os.environ.items() if key != "CI"} | {"HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "CPU" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


SIGNAL_AFTER_TWO_MODELS = """
import signal, sys
from pathlib import Path
from edge_ilseg.devices.runtime import RUNTIMES
first, second, third = (RUNTIMES["openvino"](Path(sys.argv[1]), None, False, "latency") for _ in range(3))
del first, second, third
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
signal.raise_signal(signal.SIGUSR1)
"""


def test_a_signal_can_be_handled_after_openvino_models_have_come_and_gone(tmp_path: Path) -> None:
    """Each OpenVINO core brings a signal stack and unmaps it; Python's handlers run on it (`openvino_core`)."""
    entry = entry_for(tmp_path / "bundle", color_network(list(GROWN)), "openvino")
    model = tmp_path / "bundle" / entry.files[0]
    command = [sys.executable, "-X", "faulthandler", "-c", SIGNAL_AFTER_TWO_MODELS, str(model)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr
