"""Whether a model can fit a device: opset and memory, before a runtime opens the file."""

from __future__ import annotations

from pathlib import Path

import msgspec
import onnxruntime
import pytest
from bundles import BASE, write_bundle

from edge_ilseg.bundle import Runtime, write_manifest
from edge_ilseg.devices.facts import read_available_mib
from edge_ilseg.devices.fit import HIGHEST_OPSET, check_memory, highest_opset
from edge_ilseg.devices.verification import VerifyRequest, verify_bundle
from edge_ilseg.errors import BundleError


def bundle_of_opset(folder: Path, opset: int, runtime: Runtime = "onnxruntime") -> Path:
    """A bundle whose manifest declares an opset."""
    manifest = write_bundle(folder, BASE, step_id="a", models=((runtime, "fp32"),))
    entry = msgspec.structs.replace(manifest.models[0], opset=opset)
    write_manifest(folder, msgspec.structs.replace(manifest, models=(entry,)))
    return folder


def fit_of(folder: Path) -> tuple[str, int, str]:
    report = verify_bundle(folder, VerifyRequest(latency_runs=1, threads=1))
    return report.check("fit").verdict, report.exit_code, report.check("fit").detail


def test_an_opset_that_the_installed_runtime_does_not_know_fails_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.17.3")
    assert fit_of(bundle_of_opset(tmp_path / "known", 20))[:2] == ("passed", 0)
    verdict, code, detail = fit_of(bundle_of_opset(tmp_path / "new", 21))
    assert (verdict, code) == ("failed", 3)
    assert "ONNX opset 21; onnxruntime 1.17.3 knows up to 20" in detail


def test_a_runtime_that_is_not_in_the_table_is_not_judged(tmp_path: Path) -> None:
    assert highest_opset(onnxruntime.__version__) is None
    assert fit_of(bundle_of_opset(tmp_path / "b", 99))[:2] == ("passed", 0)


def test_the_opset_of_the_source_does_not_matter_to_openvino(tmp_path: Path) -> None:
    assert fit_of(bundle_of_opset(tmp_path / "b", 99, "openvino"))[:2] == ("passed", 0)


def test_a_release_is_known_by_its_first_two_numbers() -> None:
    assert (highest_opset("1.20.1"), highest_opset("1.14.0"), highest_opset("1.15.0+cu")) == (21, 18, 19)
    assert [highest_opset(text) for text in ("1.99.0", "2", "nightly", "")] == [None] * 4
    assert sorted(HIGHEST_OPSET.values()) == list(HIGHEST_OPSET.values())


def test_a_model_that_is_larger_than_the_memory_is_refused_with_numbers(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 4096000 kB\nMemAvailable:  102400 kB\n")
    check_memory(100 << 20, proc=tmp_path)
    with pytest.raises(BundleError, match="larger than the memory") as caught:
        check_memory((100 << 20) + 1, where="model", proc=tmp_path)
    assert caught.value.found == "100.0 MiB of files, 100 MiB available"
    assert caught.value.exit_code == 3


def test_where_the_memory_is_not_known_nothing_is_refused(tmp_path: Path) -> None:
    check_memory(1 << 60, proc=tmp_path)
    (tmp_path / "meminfo").write_text("MemTotal: 4096000 kB\n")
    check_memory(1 << 60, proc=tmp_path)


def test_too_little_memory_is_a_failure_of_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bundle_of_opset(tmp_path / "b", 18)
    (tmp_path / "meminfo").write_text("MemAvailable:  0 kB\n")
    assert check_memory.__kwdefaults__ is not None
    monkeypatch.setitem(check_memory.__kwdefaults__, "proc", tmp_path)
    verdict, code, detail = fit_of(folder)
    assert (verdict, code) == ("failed", 3)
    assert "0 MiB available" in detail


def test_this_machine_has_memory_left() -> None:
    assert (read_available_mib() or 0) > 50
