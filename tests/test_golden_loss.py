"""Golden masks that changed: how much the quantization costs, and how much the kernels of this device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import export_grown

from edge_ilseg.bundle import ModelEntry, Runtime, read_manifest, write_manifest
from edge_ilseg.devices import golden_loss
from edge_ilseg.devices.golden_loss import golden_loss_text, split_golden_loss
from edge_ilseg.devices.loaded_bundle import load_bundle
from edge_ilseg.devices.runtime import Session, load_session
from edge_ilseg.devices.verification import VerifyRequest, verify_bundle
from edge_ilseg.devices.verify_report import GoldenLoss, encode_report, parse_report


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "b"
    export_grown(folder, targets=("onnx", "openvino"), precisions=("int8", "fp32"))
    return folder


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_the_two_losses_are_those_of_a_plain_comparison(bundle: Path, runtime: Runtime) -> None:
    manifest = read_manifest(bundle)
    loaded = load_bundle(bundle, manifest, runtime, "int8", 1)
    sessions = {
        "real": loaded.session,
        "simulated": load_session(bundle, loaded.entry, threads=1, simulated=True),
        "fp32": load_session(bundle, manifest.model(runtime, "fp32"), threads=1),
    }
    masks = {
        name: np.stack([session.mask(np.array(image)) for image in loaded.golden_images_NHWC])
        for name, session in sessions.items()
    }
    kernels = (masks["real"] != masks["simulated"]).mean(axis=(1, 2))
    quantization = (masks["simulated"] != masks["fp32"]).mean(axis=(1, 2))
    loss = split_golden_loss(loaded, 1)
    assert loss == GoldenLoss(tuple(kernels), tuple(quantization), None)
    assert (loss.mean_device, loss.mean_quantization) == pytest.approx((kernels.mean(), quantization.mean()))
    assert golden_loss_text(loss) == (
        f"kernels of this device: {kernels.mean():.2%} of the pixels against simulated int8; "
        f"quantization: {quantization.mean():.2%} against fp32"
    )
    assert quantization.mean() > 0


def test_the_simulated_model_is_compared_and_it_really_is_simulated(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a processor with integer dot products real and simulated masks may be the same: the masks do not tell."""
    loaded = load_bundle(bundle, read_manifest(bundle), "openvino", "int8", 1)
    found: list[tuple[str, dict[str, int] | None]] = []

    def spy(folder: Path, entry: ModelEntry, **options: Any) -> Session:
        session = load_session(folder, entry, **options)
        found.append((entry.precision, session.executed_precisions))
        return session

    monkeypatch.setattr(golden_loss, "load_session", spy)
    split_golden_loss(loaded, 1)
    assert [precision for precision, _ in found] == ["int8", "fp32"]
    executed = found[0][1]
    assert executed is not None
    assert loaded.session.executed_precisions is not None
    assert loaded.session.executed_precisions.get("u8", 0) > executed.get("u8", 0) + 10


def test_a_changed_golden_mask_is_told_with_both_losses(bundle: Path, tmp_path: Path) -> None:
    manifest = read_manifest(bundle)
    copy = tmp_path / "b"
    copy.mkdir()
    for name in manifest.files:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((bundle / name).read_bytes())
    golden = copy / manifest.model("onnxruntime", "int8").golden_masks
    masks_NHW = np.load(golden)
    masks_NHW[0, 0, 0] = (masks_NHW[0, 0, 0] + 1) % 2
    np.save(golden, masks_NHW)
    write_manifest(copy, manifest)
    check = verify_bundle(copy, VerifyRequest(runtime="onnxruntime", latency_runs=1, threads=1)).check("golden outputs")
    assert check.verdict == "passed"
    assert "kernels of this device" in check.detail
    assert "quantization" in check.detail


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_the_report_has_both_losses_also_where_no_golden_mask_has_changed(bundle: Path, runtime: Runtime) -> None:
    request = VerifyRequest(runtime=runtime, latency_runs=1, threads=1)
    report = parse_report(encode_report(verify_bundle(bundle, request)))
    assert report.check("golden outputs").value == 1.0
    assert report.golden_loss == split_golden_loss(load_bundle(bundle, read_manifest(bundle), runtime, "int8", 1), 1)
    assert "quantization" in report.check("golden outputs").detail
    assert report.parent_golden_loss is None


def test_the_parents_losses_are_beside_those_of_the_bundle(bundle: Path, tmp_path: Path) -> None:
    export_grown(tmp_path / "child", 2, parent=bundle)
    request = VerifyRequest(runtime="onnxruntime", latency_runs=1, threads=1)
    report = verify_bundle(tmp_path / "child", request, against=bundle)
    assert report.golden_loss is not None
    assert report.golden_loss.mean_device is not None
    assert (report.golden_loss.quantization, report.golden_loss.mean_quantization) == (None, None)
    assert "no fp32 model" in str(report.golden_loss.reason)
    assert report.parent_golden_loss is not None
    assert report.parent_golden_loss.quantization is not None


def test_there_is_no_loss_of_quantization_where_nothing_is_quantized_or_nobody_reads_it(bundle: Path) -> None:
    float_request = VerifyRequest(runtime="onnxruntime", precision="fp32", latency_runs=1, threads=1)
    assert verify_bundle(bundle, float_request).golden_loss is None
    gate = VerifyRequest(runtime="onnxruntime", latency_runs=1, threads=1, with_evidence=False)
    report = verify_bundle(bundle, gate)
    assert (report.golden_loss, report.executed_layers) == (None, None)
    assert "kernels" not in report.check("golden outputs").detail
