"""Models side by side on this device: start, latency, throughput, processor time, memory.

1. A bundle is hashed before anything of it is run; a bundle that is not whole ends the run before it begins.
2. Every model runs in processes of its own (`edge_ilseg.devices.bench_child`): one lives through all rounds, for the
   warm runs and the peak memory; a round begins with a fresh one, for the start. In the first they are the same.
3. Models take turns, round by round, A B C A B C: a device that grows hot or busy does so for all of them. When all
   rounds are over they take as many turns again, with several images side by side: the way of `verify` and `predict`.
4. The input is the bundle's first golden image, at the size of the model: decoding and resizing are not measured.
5. A cold start is everything from just before the process is made to its first mask, the import of the runtime
   included: that is what a device waits for after it was switched on. The files are in the system's cache by then.
6. A model that fails is reported with its reason and takes no more turns; the others go on. So does one that hangs:
   that has not loaded within `LOAD_S`, or takes `PATIENCE` times as long as its first run says.
7. A model of a runtime that is not installed is left out and named, unless that runtime was asked for.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import msgspec

from edge_ilseg.bundle import Manifest, ModelEntry, Precision, Runtime, check_files, read_manifest
from edge_ilseg.devices.bench_child import Load, Loaded, Measure, Measured, MeasuredSideBySide, MeasureSideBySide
from edge_ilseg.devices.bench_process import ModelProcess
from edge_ilseg.devices.bench_report import (
    FORMAT_VERSION,
    BenchReport,
    ModelBench,
    RoundSample,
    Settings,
    SideBySideSample,
    Skipped,
    StartSample,
    exit_code_of,
    summarize,
)
from edge_ilseg.devices.facts import read_device_facts
from edge_ilseg.devices.runtime import installed_runtimes
from edge_ilseg.devices.verify_report import BundleFacts
from edge_ilseg.errors import BundleError, EdgeIlsegError, check_extra
from edge_ilseg.progress import ProgressCallback, no_progress

WARM_UP_RUNS = 3
DEFAULT_ROUNDS, DEFAULT_RUNS = 5, 30
LOAD_S = 300.0
"""Compiling a large model on a small device takes a minute."""
PATIENCE = 20


class Candidate(NamedTuple):
    """A model that is to be measured."""

    folder: Path
    manifest: Manifest
    entry: ModelEntry


def bench_bundles(
    folders: Sequence[Path],
    *,
    runtime: Runtime | None = None,
    precision: Precision | None = None,
    threads: int | None = None,
    rounds: int = DEFAULT_ROUNDS,
    runs: int = DEFAULT_RUNS,
    progress: ProgressCallback = no_progress,
) -> BenchReport:
    """Measure the models of bundles (rules 1 to 7).

    Args:
        folders: the bundles. One that is named twice is measured twice: the two tell what a difference is worth.
        runtime: only models for it; `None` takes those for every runtime that is installed.
        precision: only models in it; `None` takes all.
        threads: how many threads a runtime may use; `None` leaves the choice to it.
        rounds: how many turns each model has, at least 1.
        runs: timed runs in a turn, at least 1.
        progress: told what is being done.

    Raises:
        BundleError: a bundle is not whole, or has no model of those that were asked for.
        MissingPackageError: the runtime that was asked for, or every one, is not installed.
        ValueError: `rounds` or `runs` is below 1.
    """
    if rounds < 1 or runs < 1:
        raise ValueError("rounds and runs are at least 1")
    candidates: list[Candidate] = []
    for folder in folders:
        progress("checking files", 0.0)
        candidates += find_models(folder, runtime, precision)
    candidates, skipped = leave_out_missing(candidates, runtime)
    settings = Settings(rounds=rounds, runs=runs, warm_up_runs=WARM_UP_RUNS, threads=threads)
    before, start_s = read_device_facts(), time.monotonic()
    with ExitStack() as stack:
        measuring = [stack.enter_context(_Measuring(candidate, settings)) for candidate in candidates]
        for turn in range(2 * rounds):
            is_alone = turn < rounds
            what = "measuring" if is_alone else "several side by side"
            for place, model in enumerate(measuring):
                entry = model.candidate.entry
                text = f"{what}, round {turn % rounds + 1} of {rounds}: {entry.runtime} {entry.precision}"
                progress(text, (turn * len(measuring) + place) / (2 * rounds * len(measuring)))
                model.take_turn(side_by_side=not is_alone)
        models = tuple(model.result() for model in measuring)
    return BenchReport(
        format="edge-ilseg-bench-report",
        format_version=FORMAT_VERSION,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=time.monotonic() - start_s,
        exit_code=exit_code_of(models),
        settings=settings,
        models=models,
        skipped=skipped,
        device_before=before,
        device_after=read_device_facts(),
    )


def find_models(folder: Path, runtime: Runtime | None, precision: Precision | None) -> list[Candidate]:
    """The models of a whole bundle that were asked for (rule 1).

    Raises:
        BundleError: the bundle is not whole, or has no such model.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    found = [
        Candidate(folder, manifest, entry)
        for entry in manifest.models
        if runtime in (None, entry.runtime) and precision in (None, entry.precision)
    ]
    if not found:
        raise BundleError(
            "the bundle has no such model",
            where=folder,
            found=", ".join(f"{entry.runtime}/{entry.precision}" for entry in manifest.models) or "no model at all",
            expected=f"{runtime or 'any runtime'}/{precision or 'any precision'}",
            hint="leave --runtime or --precision out, or export such a model",
        )
    return found


def leave_out_missing(
    candidates: Sequence[Candidate], runtime: Runtime | None
) -> tuple[list[Candidate], tuple[Skipped, ...]]:
    """Part the models that can run here from those whose runtime is not installed (rule 7).

    Raises:
        MissingPackageError: the runtime that was asked for, or every one, is not installed.
    """
    installed = installed_runtimes()
    kept = [item for item in candidates if item.entry.runtime in installed]
    if not kept:
        wanted = runtime or candidates[0].entry.runtime
        check_extra(wanted, [wanted], f"a model for {wanted}")
    skipped = tuple(
        Skipped(
            folder=str(item.folder),
            runtime=item.entry.runtime,
            precision=item.entry.precision,
            reason=f"{item.entry.runtime} is not installed: pip install 'edge-ilseg[{item.entry.runtime}]'",
        )
        for item in candidates
        if item.entry.runtime not in installed
    )
    return kept, skipped


class _Measuring:
    """One model on its way through the rounds: its process, and what was measured so far."""

    def __init__(self, candidate: Candidate, settings: Settings) -> None:
        self.candidate = candidate
        entry = candidate.entry
        self._settings = settings
        self._label = f"{candidate.folder} {entry.runtime} {entry.precision}"
        self._request = Load(str(candidate.folder), entry.runtime, entry.precision, settings.threads)
        self._stack = ExitStack()
        self._child: ModelProcess | None = None
        self._loaded: Loaded | None = None
        self._concurrent_runs: int | None = None
        self._starts: list[StartSample] = []
        self._rounds: list[RoundSample] = []
        self._side_by_side: list[SideBySideSample] = []
        self._peak_rss_mib: float | None = None
        self._error: str | None = None
        self._side_by_side_error: str | None = None

    def __enter__(self) -> _Measuring:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def take_turn(self, *, side_by_side: bool = False) -> None:
        """One turn, unless the model has failed before (rule 6)."""
        if self._error is not None or (side_by_side and self._side_by_side_error is not None):
            return
        try:
            if side_by_side:
                self._run_side_by_side()
            else:
                self._run_alone()
        except EdgeIlsegError as error:
            if side_by_side:
                self._side_by_side_error = error.one_line()
            else:
                self._error = error.one_line()
            self._stack.close()

    def _run_alone(self) -> None:
        """One start and one round of warm runs, one after another (rule 2)."""
        if self._child is None:
            self._child = self._stack.enter_context(ModelProcess(self._label))
            self._loaded = self._start(self._child)
        else:
            with ModelProcess(self._label) as fresh:
                self._start(fresh)
        request = Measure(self._settings.warm_up_runs, self._settings.runs)
        measured = self._child.ask(request, Measured, self._patience_s())
        self._rounds.append(measured.sample)
        self._peak_rss_mib = measured.peak_rss_mib

    def _run_side_by_side(self) -> None:
        """One round of warm runs of several images at the same time; the model is loaded for it once (rule 3)."""
        assert self._child is not None
        if self._concurrent_runs is None:
            request = msgspec.structs.replace(self._request, hint="throughput")
            self._concurrent_runs = self._child.ask(request, Loaded, LOAD_S).concurrent_runs
        measure = MeasureSideBySide(self._settings.warm_up_runs, self._settings.runs)
        measured = self._child.ask(measure, MeasuredSideBySide, self._patience_s(self._concurrent_runs))
        self._side_by_side.append(measured.sample)

    def _patience_s(self, concurrent_runs: int = 1) -> float:
        """How long a round may take (rule 6); side by side, each run may have a thread alone."""
        runs = (self._settings.warm_up_runs + self._settings.runs) * concurrent_runs
        return LOAD_S + PATIENCE * runs * self._starts[0].first_frame_ms / 1000

    def _start(self, child: ModelProcess) -> Loaded:
        loaded = child.ask(self._request, Loaded, LOAD_S)
        self._starts.append(
            StartSample(
                process_ms=(loaded.ready_ns - child.started_ns) / 1e6,
                import_ms=(loaded.imported_ns - loaded.ready_ns) / 1e6,
                load_ms=(loaded.loaded_ns - loaded.imported_ns) / 1e6,
                first_frame_ms=(loaded.first_mask_ns - loaded.loaded_ns) / 1e6,
            )
        )
        return loaded

    def result(self) -> ModelBench:
        """What was measured."""
        folder, manifest, entry = self.candidate
        loaded = self._loaded
        return ModelBench(
            bundle=BundleFacts(
                folder=str(folder),
                bundle_id=manifest.bundle_id,
                step_name=manifest.step.name,
                step_index=manifest.step.index,
                step_id=manifest.step.id,
            ),
            runtime=entry.runtime,
            precision=entry.precision,
            model_bytes=sum(manifest.files[name].bytes for name in entry.files),
            input_height_px=manifest.preprocessing.height_px,
            input_width_px=manifest.preprocessing.width_px,
            runtime_version=loaded.runtime_version if loaded else None,
            executed_precisions=loaded.executed_precisions if loaded else None,
            golden_agreement=loaded.golden_agreement if loaded else None,
            starts=tuple(self._starts),
            rounds=tuple(self._rounds),
            concurrent_runs=self._concurrent_runs,
            side_by_side=tuple(self._side_by_side),
            peak_rss_mib=self._peak_rss_mib,
            summary=summarize(self._starts, self._rounds, self._side_by_side) if self._error is None else None,
            error=self._error,
            side_by_side_error=self._side_by_side_error,
        )
