"""The benchmark: what is measured, in which order, what survives a failure, and what the figures follow from."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import numpy as np
import pytest
from bundles import BASE, GROWN, write_bundle
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from edge_ilseg.bundle import Manifest, Precision, Runtime, read_manifest, write_manifest
from edge_ilseg.cli.bench import bench
from edge_ilseg.devices import bench as bench_module
from edge_ilseg.devices import bench_process, own_process
from edge_ilseg.devices.bench import bench_bundles, find_models, leave_out_missing
from edge_ilseg.devices.bench_child import Load, Loaded, Measure, MeasureSideBySide, measure, measure_side_by_side
from edge_ilseg.devices.bench_plot import (
    BAR_COLORS,
    PAPER,
    TICKS,
    WIDTH_PX,
    draw_bench_plot,
    nice_steps,
    write_bench_plot,
)
from edge_ilseg.devices.bench_report import (
    BenchReport,
    ModelBench,
    RoundSample,
    Settings,
    SideBySideSample,
    Skipped,
    StartSample,
    encode_bench,
    exit_code_of,
    parse_bench,
    percentile,
    summarize,
)
from edge_ilseg.devices.bench_table import bench_table, bundle_names, three_digits
from edge_ilseg.errors import BundleError, ConfigError, EdgeIlsegError, MissingPackageError, ReportError

ROUNDS, RUNS = 3, 4
FAST = {"threads": 1, "rounds": 2, "runs": 2}
BOTH_RUNTIMES: tuple[tuple[Runtime, Precision], ...] = (("onnxruntime", "fp32"), ("openvino", "fp32"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "boat"
    write_bundle(path, GROWN, step_id="b" * 64, parent_id="a" * 64, models=BOTH_RUNTIMES)
    return path


@pytest.fixture(scope="module")
def report(folder: Path) -> BenchReport:
    return bench_bundles([folder], threads=1, rounds=ROUNDS, runs=RUNS)


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The processes that are made, in order; none of them is left when the test ends."""
    made: list[subprocess.Popen[bytes]] = []

    class Recorded(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(bench_process.subprocess, "Popen", Recorded)
    yield made
    assert all(process.returncode is not None for process in made)


def model_of(
    latencies_ms: tuple[tuple[float, ...], ...], *, runtime: Runtime = "onnxruntime", folder: str = "boat"
) -> ModelBench:
    """A model as if it had been measured."""
    rounds = tuple(RoundSample(item, sum(item), 2 * sum(item)) for item in latencies_ms)
    side_by_side = tuple(SideBySideSample(2 * len(item), sum(item)) for item in latencies_ms)
    starts = tuple(StartSample(300.0, 100.0, 50.0, 5.0) for _ in rounds)
    return ModelBench(
        bundle=bench_module.BundleFacts(folder=folder, step_name="01-boat"),
        runtime=runtime,
        precision="int8",
        model_bytes=3 << 20,
        input_height_px=48,
        input_width_px=64,
        runtime_version=f"{runtime} 1.0",
        executed_precisions=None,
        golden_agreement=1.0,
        starts=starts,
        rounds=rounds,
        concurrent_runs=2,
        side_by_side=side_by_side,
        peak_rss_mib=80.0,
        summary=summarize(starts, rounds, side_by_side),
        error=None,
    )


def failed_model(**changes: object) -> ModelBench:
    failed = {"summary": None, "error": "openvino refuses the model file", **changes}
    return msgspec.structs.replace(model_of(((1.0,),), runtime="openvino"), **failed)


def with_models(report: BenchReport, *models: ModelBench, **changes: object) -> BenchReport:
    exit_code = 3 if any(model.error for model in models) else 0
    return msgspec.structs.replace(report, models=models, exit_code=exit_code, **changes)


def as_text(report: BenchReport) -> str:
    console = Console(width=150, file=io.StringIO())
    console.print(bench_table(report))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def damage_model(path: Path, manifest: Manifest) -> None:
    """Make the first model one that its runtime refuses, in a bundle that is whole."""
    (path / manifest.models[0].files[0]).write_bytes(b"no model")
    write_manifest(path, manifest)


# what is measured


def test_every_model_is_measured_in_every_round_and_every_sample_is_kept(report: BenchReport) -> None:
    assert [model.label for model in report.models] == ["onnxruntime fp32", "openvino fp32"]
    for model in report.models:
        assert len(model.starts) == len(model.rounds) == ROUNDS
        assert all(len(sample.latencies_ms) == RUNS for sample in model.rounds)
        assert all(value > 0 for sample in model.rounds for value in sample.latencies_ms)
        assert model.concurrent_runs is not None
        assert [sample.images for sample in model.side_by_side] == [RUNS * model.concurrent_runs] * ROUNDS
        assert all(sample.wall_ms > 0 for sample in model.side_by_side)
        assert model.runtime_version is not None
        assert model.runtime_version.startswith(model.runtime)
        assert model.golden_agreement == 1.0
        assert model.error is None
    assert report.exit_code == 0
    assert report.models[1].executed_precisions is not None  # OpenVINO tells, onnxruntime does not


def test_the_runs_of_a_round_make_up_its_wall_time(report: BenchReport) -> None:
    for model in report.models:
        for sample in model.rounds:
            assert sum(sample.latencies_ms) == pytest.approx(sample.wall_ms)
            assert sample.cpu_ms > 0


def test_a_start_lies_within_the_benchmark_and_all_its_parts_take_time(report: BenchReport) -> None:
    """Moments of two processes are subtracted: they must be of one clock."""
    parts_ms = [msgspec.structs.astuple(start) for model in report.models for start in model.starts]
    assert all(part_ms > 0 for parts in parts_ms for part_ms in parts)
    assert sum(map(sum, parts_ms)) < 1000 * report.seconds


def test_models_take_turns_and_each_start_has_a_process_of_its_own(
    folder: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    told: list[str] = []
    bench_bundles([folder], **FAST, progress=lambda text, _: told.append(text))
    for what in ("measuring", "several side by side"):
        turns = [text.partition(": ")[2] for text in told if text.startswith(what)]
        assert turns == ["onnxruntime fp32", "openvino fp32"] * 2
    assert len(processes) == 4  # two that stay, and two fresh ones in the second round
    assert [process.returncode for process in processes] == [0] * 4


def test_memory_is_that_of_the_models_process_and_not_of_the_one_that_asks(folder: Path) -> None:
    """The kernel hands the peak of a process on to the program that it becomes, for `getrusage`; not so `VmHWM`."""
    ballast = np.ones(80_000_000)  # 610 MiB
    found = bench_bundles([folder], **FAST).models
    assert ballast.nbytes / (1 << 20) > 600
    assert all(model.peak_rss_mib is not None and 10 < model.peak_rss_mib < 400 for model in found)


def test_a_report_has_the_facts_of_the_device_and_how_it_was_measured(report: BenchReport) -> None:
    assert report.device_before.load_average is not None
    assert report.device_after.load_average is not None
    settings = msgspec.structs.asdict(report.settings)
    assert settings == {"rounds": ROUNDS, "runs": RUNS, "warm_up_runs": bench_module.WARM_UP_RUNS, "threads": 1}


def test_a_model_that_gives_other_masks_than_at_the_export_is_pointed_out(report: BenchReport, tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", BASE, step_id="a" * 64, wrong_golden_share=0.4)
    found = bench_bundles([tmp_path / "b"], **FAST)
    assert found.models[0].golden_agreement == pytest.approx(0.6, abs=0.01)
    assert "verify it first" in " ".join(as_text(found).split())
    assert "verify it first" not in " ".join(as_text(report).split())


def test_modules_in_the_current_folder_are_not_taken_for_those_of_the_models_process(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "numpy.py").write_text("raise SystemExit('a file of the user was imported')")
    monkeypatch.chdir(tmp_path)
    assert bench_bundles([folder], **FAST, runtime="onnxruntime").exit_code == 0


def test_a_bundle_is_found_by_a_relative_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    found = bench_bundles([Path("boat")], threads=1, rounds=1, runs=1, runtime="onnxruntime")
    assert (found.exit_code, found.models[0].bundle.folder) == (0, "boat")


# which models


def test_a_runtime_and_a_precision_choose_among_the_models(tmp_path: Path) -> None:
    models: tuple[tuple[Runtime, Precision], ...] = (*BOTH_RUNTIMES, ("onnxruntime", "int8"))
    write_bundle(tmp_path / "b", BASE, step_id="a" * 64, models=models)

    def labels(runtime: Runtime | None, precision: Precision | None) -> list[str]:
        found = find_models(tmp_path / "b", runtime, precision)
        return [f"{item.entry.runtime} {item.entry.precision}" for item in found]

    assert labels(None, None) == ["onnxruntime fp32", "openvino fp32", "onnxruntime int8"]
    assert labels("onnxruntime", None) == ["onnxruntime fp32", "onnxruntime int8"]
    assert labels(None, "fp32") == ["onnxruntime fp32", "openvino fp32"]
    with pytest.raises(BundleError, match="no such model") as raised:
        labels("openvino", "int8")
    assert raised.value.expected == "openvino/int8"
    assert raised.value.found == "onnxruntime/fp32, openvino/fp32, onnxruntime/int8"


def test_models_of_a_runtime_that_is_not_installed_are_left_out_and_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates = find_models(folder, None, None)
    monkeypatch.setitem(sys.modules, "openvino", None)
    kept, skipped = leave_out_missing(candidates, None)
    assert [item.entry.runtime for item in kept] == ["onnxruntime"]
    assert [(item.folder, item.runtime) for item in skipped] == [(str(folder), "openvino")]
    assert "pip install 'edge-ilseg[openvino]'" in skipped[0].reason


def test_a_runtime_that_is_asked_for_and_not_installed_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingPackageError):
        bench_bundles([folder], **FAST, runtime="openvino")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingPackageError):
        bench_bundles([folder], **FAST)


def test_a_damaged_bundle_ends_the_run_before_any_model_is_run(
    folder: Path, tmp_path: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    write_bundle(tmp_path / "b", BASE, step_id="a" * 64)
    with (tmp_path / "b/fp32.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(BundleError, match="a file of the bundle is damaged"):
        bench_bundles([folder, tmp_path / "b"], **FAST)
    assert processes == []


def test_no_round_and_no_run_are_no_benchmark(folder: Path) -> None:
    for settings in ({"rounds": 0}, {"runs": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            bench_bundles([folder], **settings)


# what fails


def test_a_model_that_its_runtime_refuses_is_reported_and_the_others_are_measured(tmp_path: Path) -> None:
    manifest = write_bundle(tmp_path / "b", BASE, step_id="a" * 64, models=BOTH_RUNTIMES)
    damage_model(tmp_path / "b", manifest)
    found = bench_bundles([tmp_path / "b"], **FAST)
    refused, measured = found.models
    assert refused.error is not None
    assert "onnxruntime refuses the model file" in refused.error
    assert (refused.summary, refused.starts, refused.rounds) == (None, (), ())
    assert measured.summary is not None
    assert len(measured.rounds) == 2
    assert found.exit_code == 3
    assert "onnxruntime refuses the model file" in as_text(found)


def test_a_process_that_dies_between_rounds_is_reported_with_its_signal_and_its_samples_are_kept(
    folder: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    def kill_the_first(text: str, _: float) -> None:
        if text == "measuring, round 2 of 3: onnxruntime fp32":
            processes[0].kill()

    found = bench_bundles([folder], threads=1, rounds=3, runs=2, progress=kill_the_first)
    died, other = found.models
    assert died.error is not None
    assert "the process of a model has ended" in died.error
    assert "exit status -9" in died.error
    assert (len(died.rounds), died.side_by_side, died.summary) == (1, (), None)
    assert len(other.rounds) == 3
    assert parse_bench(encode_bench(found)) == found


def test_a_process_that_ends_in_a_defect_tells_the_last_line_of_its_traceback(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_process, "START", "raise RuntimeError('a defect')")
    found = bench_bundles([folder], **FAST, runtime="onnxruntime")
    assert found.models[0].error is not None
    assert "exit status 1: RuntimeError: a defect" in found.models[0].error


def test_a_model_that_hangs_is_ended_and_reported_and_the_others_are_measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch, processes: list[subprocess.Popen[bytes]]
) -> None:
    """Rule 6 of `devices/bench.py`."""
    hang = """
    import sys, time
    sys.path.insert(0, sys.argv[1])
    from edge_ilseg.devices import bench_child
    original = bench_child.measure_side_by_side
    def measure(session, *arguments):
        if session.runtime_version.startswith("onnxruntime"):
            time.sleep(1000)
        return original(session, *arguments)
    bench_child.measure_side_by_side = measure
    bench_child.main()
    """
    monkeypatch.setattr(own_process, "START", textwrap.dedent(hang))
    monkeypatch.setattr(bench_module._Measuring, "_patience_s", lambda *_: 6.0)
    hung, measured = bench_bundles([folder], threads=1, rounds=1, runs=1).models
    assert hung.error is None
    assert hung.side_by_side_error is not None
    assert "a model hangs" in hung.side_by_side_error
    assert "no answer within 6 s" in hung.side_by_side_error
    assert (len(hung.rounds), hung.side_by_side) == (1, ())
    assert hung.summary is not None
    assert hung.summary.side_by_side_per_s is None
    assert hung.summary.latency_median_ms > 0
    assert exit_code_of([hung, measured]) == 3
    assert measured.summary is not None
    assert measured.summary.side_by_side_per_s is not None
    assert [process.returncode for process in processes] == [-signal.SIGKILL, 0]


def test_a_process_that_never_answers_is_killed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_process, "START", "import time; time.sleep(1000)")
    request = Load(str(folder), "onnxruntime", "fp32", 1)
    with (
        bench_process.ModelProcess("boat") as process,
        pytest.raises(EdgeIlsegError, match=r"(?s)a model hangs.*boat.*no answer within 0 s"),
    ):
        process.ask(request, Loaded, 0.3)


def test_a_slow_model_has_more_patience_than_a_fast_one(folder: Path) -> None:
    measuring = bench_module._Measuring(find_models(folder, "onnxruntime", None)[0], Settings(5, 30, 3, None))
    measuring._starts = [StartSample(300.0, 100.0, 50.0, 2000.0)]
    assert measuring._patience_s() == 300 + 20 * 33 * 2
    assert measuring._patience_s(4) == 300 + 20 * 33 * 2 * 4


def test_no_process_is_left_when_a_user_stops_the_benchmark(
    folder: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    def stop(text: str, _: float) -> None:
        if text.startswith("measuring, round 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench_bundles([folder], **FAST, progress=stop)
    assert len(processes) == 2  # the fixture looks whether they have ended


# the process of a model


def run_child(program: str, *requests: msgspec.Struct) -> subprocess.CompletedProcess[bytes]:
    lines = b"".join(msgspec.json.encode(request) + b"\n" for request in requests)
    command = [sys.executable, "-c", textwrap.dedent(program)]
    return subprocess.run(command, input=lines, capture_output=True, check=False, timeout=120)


def test_what_a_runtime_prints_is_no_answer(folder: Path) -> None:
    program = """
    import os
    from edge_ilseg.devices import bench_child
    load_session = bench_child.load_session
    def noisy(*arguments, **options):
        os.write(1, b"from a library\\n")
        print("from Python", flush=True)
        return load_session(*arguments, **options)
    bench_child.load_session = noisy
    bench_child.main()
    """
    done = run_child(program, Load(str(folder), "onnxruntime", "fp32", 1), Measure(0, 2))
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["type"] for line in done.stdout.splitlines()] == ["Loaded", "Measured"]
    assert b"from a library" in done.stderr
    assert b"from Python" in done.stderr


def test_a_runtime_that_is_not_installed_is_named_by_the_models_process(folder: Path) -> None:
    program = "import sys; sys.modules['onnxruntime'] = None; from edge_ilseg.devices import bench_child as c; c.main()"
    done = run_child(program, Load(str(folder), "onnxruntime", "fp32", None))
    (answer,) = (json.loads(line) for line in done.stdout.splitlines())
    assert answer["type"] == "Failed"
    assert "pip install 'edge-ilseg[onnxruntime]'" in answer["hint"]


def test_a_models_process_imports_neither_torch_nor_onnx_nor_the_other_runtime(folder: Path) -> None:
    program = """
    import sys
    from edge_ilseg.devices import bench_child
    bench_child.main()
    print(*sorted({"torch", "onnx", "openvino", "pydantic", "rich"} & set(sys.modules)), file=sys.stderr)
    """
    done = run_child(program, Load(str(folder), "onnxruntime", "fp32", 1))
    assert done.stderr.strip() == b""


def test_a_round_times_so_many_runs_after_others_that_are_not_timed() -> None:
    class Counting:
        runs = 0

        def mask(self, image_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
            self.runs += 1
            return image_HWC[:, :, 0]

    session = Counting()
    sample = measure(session, np.zeros((2, 2, 3), np.uint8), Measure(warm_up_runs=3, runs=5))  # type: ignore[arg-type]
    assert (session.runs, len(sample.latencies_ms)) == (8, 5)


def test_side_by_side_as_many_images_run_at_the_same_time_as_the_session_takes() -> None:
    class Meeting:
        """Nobody leaves before three are there: fewer at a time would break the barrier."""

        concurrent_runs = 3
        runs = 0

        def __init__(self) -> None:
            self.barrier = threading.Barrier(3, action=self.count)

        def count(self) -> None:
            self.runs += 3

        def mask(self, image_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
            self.barrier.wait(60)
            return image_HWC[:, :, 0]

    session = Meeting()
    request = MeasureSideBySide(warm_up_runs=2, runs=5)
    sample = measure_side_by_side(session, np.zeros((2, 2, 3), np.uint8), request)  # type: ignore[arg-type]
    assert (session.runs, sample.images) == (21, 15)


def test_a_process_that_loads_again_runs_several_at_a_time_and_has_let_go_of_the_model_before(folder: Path) -> None:
    alone = Load(str(folder), "onnxruntime", "fp32", 2)
    requests = (alone, Measure(0, 1), msgspec.structs.replace(alone, hint="throughput"), MeasureSideBySide(0, 2))
    done = run_child("from edge_ilseg.devices import bench_child as c; c.main()", *requests)
    first, _, second, measured = (json.loads(line) for line in done.stdout.splitlines())
    assert (first["concurrent_runs"], second["concurrent_runs"]) == (1, 2)
    assert measured["sample"]["images"] == 4


def test_ctrl_c_is_left_to_the_process_that_asks(folder: Path) -> None:
    command = [sys.executable, "-m", "edge_ilseg.devices.bench_child"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(msgspec.json.encode(Load(str(folder), "onnxruntime", "fp32", 1)) + b"\n")
        process.stdin.flush()
        assert b"Loaded" in process.stdout.readline()
        os.kill(process.pid, signal.SIGINT)
        process.stdin.write(msgspec.json.encode(Measure(1, 3)) + b"\n")
        process.stdin.flush()
        assert b"Measured" in process.stdout.readline()
        process.stdin.close()
        assert process.wait(60) == 0


# the figures


def test_figures_are_medians_over_rounds_of_what_is_taken_within_each() -> None:
    starts = [StartSample(300, 100, 50, 5), StartSample(310, 100, 50, 9), StartSample(900, 100, 50, 6)]
    rounds = [
        RoundSample((1.0, 2.0, 3.0, 4.0), 10.0, 20.0),
        RoundSample((2.0, 2.0, 2.0, 90.0), 96.0, 48.0),
        RoundSample((5.0, 5.0, 7.0, 7.0), 24.0, 40.0),
    ]
    side_by_side = [SideBySideSample(8, 20.0), SideBySideSample(8, 160.0), SideBySideSample(8, 40.0)]
    found = summarize(starts, rounds, side_by_side)
    assert found.cold_start_ms == 469.0  # of 455, 469, 1056
    assert found.first_frame_ms == 6.0
    assert found.latency_median_ms == 2.5  # of 2.5, 2, 6
    assert found.latency_p90_ms == found.latency_p95_ms == 7.0  # of 4, 90, 7
    assert found.latency_spread_pct == pytest.approx(160.0)  # (6 - 2) / 2.5
    assert found.frames_per_s == pytest.approx(1000 * 4 / 24)  # of 400, 41.7, 166.7
    assert found.cpu_ms_per_frame == 10.0  # of 5, 12, 10
    assert found.side_by_side_per_s == 200.0  # of 400, 50, 200


@pytest.mark.parametrize("count", [1, 2, 7, 20, 30, 99])
@pytest.mark.parametrize("share_pct", [90, 95])
def test_a_percentile_is_the_smallest_latency_that_so_many_runs_keep_to(count: int, share_pct: int) -> None:
    latencies = np.random.default_rng(count).exponential(5.0, count).tolist()
    oracle = next(
        value
        for value in sorted(latencies)
        if 100 * sum(other <= value for other in latencies) >= share_pct * len(latencies)
    )
    assert percentile(latencies, share_pct) == oracle


def test_one_disturbed_round_does_not_move_the_figures() -> None:
    quiet = RoundSample((1.0,) * 10, 10.0, 10.0)
    disturbed = RoundSample((50.0,) * 10, 500.0, 10.0)
    start = StartSample(1, 1, 1, 1)
    others = [SideBySideSample(10, 5.0)]
    calm = summarize([start], [quiet] * 5, others)
    shaken = summarize([start], [quiet, quiet, disturbed, quiet, quiet], others)
    assert msgspec.structs.replace(shaken, latency_spread_pct=0.0) == calm
    assert shaken.latency_spread_pct == pytest.approx(4900.0)


def test_the_figures_of_a_report_follow_from_its_samples(report: BenchReport) -> None:
    for model in report.models:
        assert model.summary == summarize(model.starts, model.rounds, model.side_by_side)
        medians = [median(sample.latencies_ms) for sample in model.rounds]
        assert model.summary.latency_median_ms == median(medians)


def test_a_report_comes_back_as_it_was(report: BenchReport) -> None:
    with_all = with_models(
        report,
        *report.models,
        failed_model(),
        skipped=(Skipped("boat", "openvino", "int8", "not installed"),),
    )
    assert parse_bench(encode_bench(with_all)) == with_all


def test_a_report_whose_figures_do_not_follow_from_its_samples_is_refused(report: BenchReport) -> None:
    model = report.models[0]
    faster = msgspec.structs.replace(model.summary, latency_median_ms=0.001)
    with pytest.raises(ReportError, match="do not follow from its samples"):
        parse_bench(encode_bench(with_models(report, msgspec.structs.replace(model, summary=faster))))
    for part in ("starts", "rounds"):
        with pytest.raises(ReportError, match="no usable samples"):
            parse_bench(encode_bench(with_models(report, msgspec.structs.replace(model, **{part: ()}))))
    silent = RoundSample((), 0.0, 0.0)
    with pytest.raises(ReportError, match="no usable samples"):
        parse_bench(encode_bench(with_models(report, msgspec.structs.replace(model, rounds=(silent,)))))


def test_a_failed_model_has_no_figures(report: BenchReport) -> None:
    contradiction = failed_model(summary=report.models[0].summary)
    with pytest.raises(ReportError, match="do not follow"):
        parse_bench(encode_bench(with_models(report, contradiction)))


def test_another_version_and_another_exit_code_are_refused(report: BenchReport) -> None:
    with pytest.raises(ReportError, match="a format that this version does not read"):
        parse_bench(encode_bench(msgspec.structs.replace(report, format_version=1)))
    with pytest.raises(ReportError, match="exit code"):
        parse_bench(encode_bench(msgspec.structs.replace(report, exit_code=3)))


# the table


def test_the_table_shows_each_model_and_the_load_of_the_device(report: BenchReport) -> None:
    text = as_text(with_models(report, model_of(((1.0, 2.0, 3.0),)), model_of(((20.0, 20.0, 44.0),))))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    assert rows[0][:4] == ["onnxruntime int8", "2.00", "3.00", "3.00"]
    assert rows[0][5:7] == ["500.0", "1000.0 (2)"]
    assert rows[1][:4] == ["onnxruntime int8", "20.0", "44.0", "44.0"]
    assert "bundle boat (step 01-boat)" in text
    assert report.device_before.load_average is not None
    assert f"load {report.device_before.load_average[0]:.2f} before" in text


def test_a_busy_device_is_pointed_out(report: BenchReport) -> None:
    def with_load(load: float) -> str:
        before = msgspec.structs.replace(report.device_before, load_average=(load, load, load), cores=4)
        return as_text(msgspec.structs.replace(report, device_before=before))

    assert "was busy" in with_load(2.1)
    assert "was busy" not in with_load(2.0)


def test_what_is_not_known_is_shown_as_such(report: BenchReport) -> None:
    facts = msgspec.structs.replace(report.device_before, load_average=None, processor=None, cores=None)
    model = msgspec.structs.replace(model_of(((1.0,),)), peak_rss_mib=None)
    text = as_text(with_models(report, model, device_before=facts, device_after=facts))
    assert "unknown processor, ? cores" in text
    assert "load unknown before, unknown after" in text


def test_models_that_failed_or_were_left_out_are_named_in_the_table(report: BenchReport) -> None:
    left_out = Skipped("[b]base", "openvino", "fp32", "openvino is not installed")
    text = as_text(with_models(report, model_of(((1.0,),)), failed_model(), skipped=(left_out,)))
    assert "failed: boat openvino int8: openvino refuses the model file" in text
    assert "left out: [b]base openvino fp32: openvino is not installed" in text


def test_bundles_of_one_name_are_told_apart_by_their_paths(report: BenchReport) -> None:
    models = [model_of(((1.0,),), folder=name) for name in ("a/boat", "b/boat", "b/base")]
    found = with_models(report, *models)
    assert bundle_names(found) == ("a/boat", "b/boat", "base")
    assert "a/boat" in as_text(found)


@pytest.mark.parametrize(
    ("value", "text"), [(0.01234, "0.012"), (1.234, "1.23"), (12.34, "12.3"), (123.4, "123"), (12345.6, "12346")]
)
def test_a_number_has_three_digits_that_mean_something(value: float, text: str) -> None:
    assert three_digits(value) == text


# the plot


@pytest.mark.parametrize(
    ("highest", "step", "steps"),
    [
        (56.5, 10, 6),
        (60, 10, 6),
        (61, 20, 4),
        (1, 0.2, 5),
        (0.0071, 0.002, 4),
        (1234, 500, 3),
        (5, 1, 5),
        (0.06, 0.01, 6),
    ],
)
def test_an_axis_has_steps_that_people_count_in(highest: float, step: float, steps: int) -> None:
    found_step, found_steps = nice_steps(highest)
    assert (found_step, found_steps) == (pytest.approx(step), steps)


def test_an_axis_reaches_every_value_and_has_few_steps() -> None:
    for highest in np.random.default_rng(0).lognormal(0.0, 4.0, 500):
        step, steps = nice_steps(float(highest))
        assert step * steps >= highest * (1 - 1e-9)
        assert 1 <= steps <= TICKS
        assert step * (steps - 1) < highest


def bar_px(image: Image.Image, runtime: Runtime) -> dict[int, int]:
    """Row of pixels through a bar -> the bar's width."""
    found = (np.array(image) == BAR_COLORS[runtime]).all(axis=2).sum(axis=1)
    return {int(row): int(found[row]) for row in np.flatnonzero(found)}


def test_bars_are_as_long_as_the_medians_and_whiskers_as_the_95th_percentiles(report: BenchReport) -> None:
    slow = model_of(((40.0,) * 10,), runtime="openvino")
    fast = model_of(((10.0,) * 18 + (50.0,) * 2,))
    image = draw_bench_plot(with_models(report, slow, fast))
    slow_px, fast_px = bar_px(image, "openvino"), bar_px(image, "onnxruntime")
    assert max(slow_px.values()) / max(fast_px.values()) == pytest.approx(4.0, rel=0.02)
    assert max(slow_px) < min(fast_px)  # in the order of the report
    middle = sorted(fast_px)[len(fast_px) // 2]
    row = np.array(image)[middle]
    start = int(np.flatnonzero((row == BAR_COLORS["onnxruntime"]).all(axis=1))[0])
    whisker = start + np.flatnonzero((row[start:] == (34, 34, 34)).all(axis=1))
    line = whisker[: np.flatnonzero(np.diff(whisker) > 1)[0] + 1]  # without the text behind it
    assert (line[-1] - start) / max(fast_px.values()) == pytest.approx(5.0, rel=0.02)


def test_a_failed_model_has_a_row_without_a_bar(report: BenchReport) -> None:
    alone = draw_bench_plot(with_models(report, model_of(((10.0,),))))
    both = draw_bench_plot(with_models(report, model_of(((10.0,),)), failed_model()))
    assert both.height > alone.height
    assert bar_px(both, "openvino") == {}


def test_a_picture_of_failures_alone_is_refused(report: BenchReport) -> None:
    with pytest.raises(ReportError, match="no latency to draw"):
        draw_bench_plot(with_models(report, failed_model()))


def test_long_names_leave_room_for_the_bars_and_nothing_leaves_the_picture(report: BenchReport) -> None:
    models = [model_of(((12345.6,),), folder=f"{letter * 200}-бот") for letter in "ab"]
    image = draw_bench_plot(with_models(report, *models))
    assert image.width == WIDTH_PX
    assert min(bar_px(image, "onnxruntime").values()) > WIDTH_PX / 4
    edges = np.array(image)
    for edge in (edges[:8], edges[-8:], edges[:, :8], edges[:, -8:]):
        assert (edge == PAPER).all()


def test_a_plot_is_written_as_a_png(report: BenchReport, tmp_path: Path) -> None:
    write_bench_plot(tmp_path / "plot.png", report)
    with Image.open(tmp_path / "plot.png") as image:
        assert (image.format, image.width) == ("PNG", WIDTH_PX)


# the command


def command(*arguments: object) -> Result:
    return CliRunner().invoke(bench, [*map(str, arguments), "--rounds", "1", "--runs", "2", "--threads", "1"])


def test_the_command_prints_json_and_writes_report_and_plot(folder: Path, tmp_path: Path) -> None:
    out, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    result = command(folder, "--json", "--out", out, "--plot", plot, "--runtime", "onnxruntime")
    assert result.exit_code == 0, result.output
    assert out.read_bytes() == result.stdout_bytes
    found = parse_bench(out.read_bytes())
    assert [model.label for model in found.models] == ["onnxruntime fp32"]
    assert found.models[0].bundle.bundle_id == read_manifest(folder).bundle_id
    with Image.open(plot) as image:
        assert bar_px(image.convert("RGB"), "onnxruntime")


def test_the_command_measures_several_bundles_and_ends_with_3_when_a_model_fails(folder: Path, tmp_path: Path) -> None:
    manifest = write_bundle(tmp_path / "base", BASE, step_id="a" * 64)
    damage_model(tmp_path / "base", manifest)
    result = command(folder, tmp_path / "base", "--precision", "fp32", "--runtime", "onnxruntime")
    assert result.exit_code == 3
    assert "onnxruntime refuses the model file" in result.output
    assert "rounds x runs: 1 x 2" in result.output


def test_places_of_files_are_looked_at_before_anything_is_measured(
    folder: Path, tmp_path: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    taken = tmp_path / "taken.json"
    taken.write_text("mine")
    cases: list[tuple[list[object], str]] = [
        (["--out", taken], "there already"),
        (["--plot", tmp_path, "--replace"], "there already"),
        (["--out", tmp_path / "nowhere" / "bench.json"], "folder for the file is missing"),
        (["--out", tmp_path / "a", "--plot", tmp_path / "a"], "cannot be one file"),
    ]
    for arguments, message in cases:
        result = command(folder, *arguments)
        assert isinstance(result.exception, ConfigError)
        assert isinstance(result.exception, EdgeIlsegError)
        assert message in str(result.exception)
    assert taken.read_text() == "mine"
    assert processes == []
    assert command(folder, "--out", taken, "--replace", "--runtime", "onnxruntime").exit_code == 0
    assert parse_bench(taken.read_bytes()).exit_code == 0
