"""What each layer of a model is executed in: asked of real runtimes, and read from profiles."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bundles import BASE, export_grown, write_bundle

from edge_ilseg.bundle import Precision, Runtime, read_manifest
from edge_ilseg.devices.executed_layers import read_executed_layers
from edge_ilseg.devices.layers import ExecutedLayer, count_precisions, parse_profile
from edge_ilseg.devices.loaded_bundle import load_bundle
from edge_ilseg.devices.verification import VerifyRequest, verify_bundle
from edge_ilseg.devices.verify_report import encode_report, parse_report

BOTH = pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
INT8 = {"u8", "i8"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "b"
    export_grown(folder, targets=("onnx", "openvino"), precisions=("int8", "fp32"))
    return folder


def layers_of(bundle: Path, runtime: Runtime, precision: Precision) -> tuple[ExecutedLayer, ...]:
    found = read_executed_layers(load_bundle(bundle, read_manifest(bundle), runtime, precision, 1), 1)
    assert found is not None
    return found


@BOTH
def test_the_convolutions_of_an_int8_model_run_in_int8_and_those_of_fp32_in_float(
    bundle: Path, runtime: Runtime
) -> None:
    for precision, expected in (("int8", INT8), ("fp32", {"f32"})):
        layers = layers_of(bundle, runtime, precision)  # type: ignore[arg-type]
        convolutions = [layer for layer in layers if layer.operator.endswith(("Conv", "Convolution"))]
        assert len(convolutions) > 10
        counted = {kind: sum(layer.precision == kind for layer in convolutions) for kind in ("f32", "u8", "i8")}
        assert sum(counted[kind] for kind in expected) > 0.8 * len(convolutions), counted
        assert all(layer.name for layer in layers)


@BOTH
def test_the_report_has_every_layer_and_counts_them(bundle: Path, runtime: Runtime) -> None:
    request = VerifyRequest(runtime=runtime, precision="int8", latency_runs=1, threads=1)
    report = parse_report(encode_report(verify_bundle(bundle, request)))
    assert report.executed_layers is not None
    assert {(layer.operator, layer.precision) for layer in report.executed_layers} == {
        (layer.operator, layer.precision) for layer in layers_of(bundle, runtime, "int8")
    }
    assert report.model is not None
    assert report.model.executed_precisions == count_precisions(report.executed_layers)
    assert report.model.executed_precisions.get("u8", 0) > 10


def test_a_profile_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bundle(tmp_path / "b", BASE, step_id="a")
    (tmp_path / "tmp").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.chdir(tmp_path / "here")
    layers = layers_of(tmp_path / "b", "onnxruntime", "fp32")
    assert [layer.operator for layer in layers if layer.operator in ("Conv", "ArgMax")] == ["Conv", "ArgMax"]
    assert list((tmp_path / "tmp").iterdir()) == list((tmp_path / "here").iterdir()) == []


def test_where_no_profile_can_be_written_the_layers_are_not_known_and_nothing_else_suffers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bundle(tmp_path / "b", BASE, step_id="a")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    report = verify_bundle(tmp_path / "b", VerifyRequest(latency_runs=1, threads=1))
    assert report.exit_code == 0
    assert report.executed_layers is None
    assert report.model is not None
    assert report.model.executed_precisions is None


def test_layers_are_told_without_torch_and_onnx(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", BASE, step_id="a")
    script = f"""
import sys
sys.modules.update(torch=None, onnx=None)
from pathlib import Path
from edge_ilseg.bundle import read_manifest
from edge_ilseg.devices.executed_layers import read_executed_layers
from edge_ilseg.devices.loaded_bundle import load_bundle
folder = Path({str(tmp_path / "b")!r})
print(len(read_executed_layers(load_bundle(folder, read_manifest(folder), "onnxruntime", "fp32", 1), 1)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) >= 4


def event(name: str, operator: str, read: str | None, written: str, **changes: object) -> dict[str, object]:
    args = {"op_name": operator, "output_type_shape": [{written: [1]}]}
    args["input_type_shape"] = [] if read is None else [{read: [1]}, {"float": []}]
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": 1, "dur": 2, "args": args, **changes}


def test_a_layer_counts_as_what_it_reads_and_the_way_back_to_float_as_what_it_writes() -> None:
    events = [
        {"cat": "Session", "name": "model_loading_uri", "ts": 0},
        event("last", "ArgMax", "float", "int64", ts=9),
        event("conv", "QLinearConv", "uint8", "uint8"),
        event("back", "DequantizeLinear", "int8", "float", ts=2),
        event("there", "QuantizeLinear", "float", "uint8", ts=3),
        event("half", "Conv", "float16", "float16", ts=4),
        event("made", "ConstantOfShape", None, "int64", ts=5),
        {"cat": "Node", "name": "conv_fence_before", "ts": 1, "args": {"op_name": "QLinearConv"}},
    ]
    layers = parse_profile(json.dumps(events).encode())
    assert [(layer.name, layer.precision) for layer in layers] == [
        *(("conv", "u8"), ("back", "f32"), ("there", "f32"), ("half", "f16"), ("made", "i64"), ("last", "f32"))
    ]
    assert count_precisions(layers) == {"f16": 1, "f32": 3, "i64": 1, "u8": 1}
    assert count_precisions(layers, {"QLinearConv"}) == {"u8": 1}


@pytest.mark.parametrize("profile", [b"", b"{}", b"[1]", b'[{"name": 3}]', b"\xff"])
def test_what_is_no_profile_is_an_error(profile: bytes) -> None:
    with pytest.raises(ValueError, match="not a profile"):
        parse_profile(profile)
