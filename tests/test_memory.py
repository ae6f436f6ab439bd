"""Peak memory of a model: measured in a real child process, and judged."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from bundles import BASE, color_network, write_bundle

from edge_ilseg.bundle import Precision, Runtime
from edge_ilseg.devices import memory
from edge_ilseg.devices.limits import Limits
from edge_ilseg.devices.memory import measure_peak_rss_mib
from edge_ilseg.devices.verdicts import judge_memory
from edge_ilseg.devices.verification import VerifyRequest, verify_bundle
from edge_ilseg.devices.verify_report import CHECKS
from edge_ilseg.errors import BundleError

BOTH = pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
MODELS: tuple[tuple[Runtime, Precision], ...] = (("onnxruntime", "fp32"), ("openvino", "fp32"))
LARGE_PX = (1200, 1600)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "a bundle"
    write_bundle(folder, BASE, step_id="a", models=MODELS)
    return folder


@pytest.fixture(scope="module")
def large_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same network for an input 625 times as large: in float, image and logits take 22 MiB each."""
    folder = tmp_path_factory.mktemp("bundles") / "large"
    network = color_network(list(BASE), height_px=LARGE_PX[0], width_px=LARGE_PX[1])
    manifest = write_bundle(folder, BASE, step_id="a", models=MODELS, network=network, input_px=LARGE_PX)
    np.save(folder / manifest.golden_images, np.zeros((1, *LARGE_PX, 3), np.uint8))
    for entry in manifest.models:
        np.save(folder / entry.golden_masks, np.zeros((1, *LARGE_PX), np.uint8))
    return folder


def pretend_python(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next child process runs a shell script in the place of Python."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


@BOTH
def test_the_peak_is_that_of_the_model(runtime: Runtime, bundle: Path, large_bundle: Path) -> None:
    small_mib, large_mib = (measure_peak_rss_mib(item, runtime, "fp32", 1) for item in (bundle, large_bundle))
    assert small_mib is not None
    assert large_mib is not None
    assert 20 < small_mib < 400
    assert 40 < large_mib - small_mib < 400


@BOTH
def test_what_the_process_that_asks_holds_is_not_counted(runtime: Runtime, bundle: Path) -> None:
    """Linux carries the peak of the process that starts a child over into the child's `ru_maxrss`."""
    ballast = np.ones(400 << 17)  # 400 MiB
    assert (measure_peak_rss_mib(bundle, runtime, "fp32", 1) or 0.0) < 300
    assert ballast[-1] == 1


@pytest.mark.parametrize("threads", [None, 2])
def test_a_peak_is_measured_with_any_number_of_threads_and_from_any_folder(
    threads: int | None, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bundle.parent)
    peak_mib = measure_peak_rss_mib(Path(bundle.name), "onnxruntime", "fp32", threads)
    assert peak_mib is not None
    assert peak_mib > 20


@BOTH
def test_a_model_that_cannot_be_loaded_is_an_error_with_the_last_line_of_the_child(
    runtime: Runtime, tmp_path: Path
) -> None:
    manifest = write_bundle(tmp_path / "b", BASE, step_id="a", models=((runtime, "fp32"),))
    (tmp_path / "b" / manifest.models[0].files[0]).write_bytes(b"no model")
    with pytest.raises(BundleError, match="does not run in a process of its own") as caught:
        measure_peak_rss_mib(tmp_path / "b", runtime, "fp32", 1)
    assert caught.value.where == tmp_path / "b"
    assert str(caught.value.found).startswith("exit status ")
    assert "copy or export the bundle again" in str(caught.value.found)


@BOTH
def test_a_model_that_cannot_be_loaded_is_an_error_that_says_why(runtime: Runtime, tmp_path: Path) -> None:
    manifest = write_bundle(tmp_path / "b", BASE, step_id="a", models=((runtime, "fp32"),))
    (tmp_path / "b" / manifest.models[0].files[0]).write_bytes(b"no model")
    with pytest.raises(BundleError) as caught:
        measure_peak_rss_mib(tmp_path / "b", runtime, "fp32", 1)
    assert f"{runtime} refuses the model file" in str(caught.value)


def test_a_bundle_without_such_a_model_is_an_error(bundle: Path) -> None:
    with pytest.raises(BundleError, match="does not run in a process of its own"):
        measure_peak_rss_mib(bundle, "onnxruntime", "int8", 1)


def test_a_child_that_is_killed_is_an_error_that_names_the_signal(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_python(tmp_path, "echo loading >&2; kill -9 $$", monkeypatch)
    with pytest.raises(BundleError) as caught:
        measure_peak_rss_mib(bundle, "onnxruntime", "fp32", 1)
    assert caught.value.found == "exit status -9: loading"
    assert "memory was not enough" in str(caught.value.hint)


def test_a_child_without_a_word_is_an_error_too(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_python(tmp_path, "exit 7", monkeypatch)
    with pytest.raises(BundleError) as caught:
        measure_peak_rss_mib(bundle, "onnxruntime", "fp32", 1)
    assert caught.value.found == "exit status 7: no message"


def test_a_system_that_does_not_tell_gives_no_number(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_python(tmp_path, "echo peak_rss_mib=unknown", monkeypatch)
    assert measure_peak_rss_mib(bundle, "onnxruntime", "fp32", 1) is None


def test_what_else_is_printed_in_the_child_does_not_matter(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hook of its Python that prints, before and after."""
    hook = "import atexit\nprint('warning: 99.9', end='')\natexit.register(print, 'goodbye 7')\n"
    (tmp_path / "sitecustomize.py").write_text(hook)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    peak_mib = measure_peak_rss_mib(bundle, "onnxruntime", "fp32", 1)
    assert peak_mib is not None
    assert peak_mib > 20


def test_a_child_without_an_answer_is_an_error(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_python(tmp_path, "echo 17.5", monkeypatch)
    with pytest.raises(BundleError, match="gave no answer") as caught:
        measure_peak_rss_mib(bundle, "onnxruntime", "fp32", 1)
    assert caught.value.found == "17.5"


def test_a_module_in_the_current_folder_is_not_taken_for_one_of_ours(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "numpy.py").write_text("raise SystemExit('not this one')\n")
    (tmp_path / "edge_ilseg").mkdir()
    (tmp_path / "edge_ilseg/__init__.py").write_text("raise SystemExit('nor this one')\n")
    monkeypatch.chdir(tmp_path)
    assert measure_peak_rss_mib(bundle, "onnxruntime", "fp32", 1) is not None


def test_a_child_that_does_not_end_is_ended_and_is_an_error(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_python(tmp_path, f"echo $$ > '{tmp_path}/pid'; exec sleep 600", monkeypatch)
    monkeypatch.setattr(memory, "TIMEOUT_S", 1.0)
    with pytest.raises(BundleError, match="did not run in time") as caught:
        measure_peak_rss_mib(bundle, "onnxruntime", "fp32", 1)
    assert caught.value.found == "more than 1.0 s"
    pid = (tmp_path / "pid").read_text().strip()
    assert not Path("/proc", pid, "exe").exists()


# The verdict


@pytest.mark.parametrize(
    ("peak_mib", "limit", "verdict", "code"),
    [(120.0, 120.0, "passed", 0), (120.1, 120.0, "failed", 1), (120.0, None, "not checked", 0)],
)
def test_the_peak_is_judged_by_its_limit(peak_mib: float, limit: float | None, verdict: str, code: int) -> None:
    check = judge_memory(peak_mib, Limits(max_rss_mib=limit))
    assert (check.name, check.verdict, check.exit_code) == ("peak memory", verdict, code)
    assert (check.value, check.limit, check.unit) == (peak_mib, limit, "MiB")


def test_a_peak_that_is_not_known_is_not_checked() -> None:
    check = judge_memory(None, Limits())
    assert (check.verdict, check.value) == ("not checked", None)
    assert "does not tell" in check.detail


def test_a_limit_on_a_peak_that_is_not_known_is_not_kept() -> None:
    assert judge_memory(None, Limits(max_rss_mib=400.0)).exit_code != 0


@BOTH
def test_a_report_has_the_peak_and_a_limit_can_be_broken(runtime: Runtime, bundle: Path) -> None:
    request = VerifyRequest(runtime=runtime, latency_runs=1, threads=1, limits=Limits(max_rss_mib=1.0))
    report = verify_bundle(bundle, request)
    check = report.check("peak memory")
    assert report.peak_rss_mib is not None
    assert (check.verdict, check.value, check.limit) == ("failed", report.peak_rss_mib, 1.0)
    assert report.peak_rss_mib > 20
    assert report.exit_code == 1


def test_a_child_that_fails_fails_its_check_and_no_other(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "TIMEOUT_S", 0.01)
    report = verify_bundle(bundle, VerifyRequest(latency_runs=1, threads=1))
    assert (report.check("peak memory").verdict, report.exit_code, report.peak_rss_mib) == ("failed", 3, None)
    assert "did not run in time" in report.check("peak memory").detail
    assert [check.name for check in report.checks if check.verdict == "failed"] == ["peak memory"]
    assert tuple(check.name for check in report.checks) == CHECKS
    assert report.latencies_ms
