"""What a benchmark leaves behind: every sample that was taken, and the figures that follow from them.

1. Raw samples are kept, in the order in which they were taken. Every figure of a `Summary` follows from them by
   `summarize`: a report in which one does not is refused when it is read.
2. A figure is computed within each round, then its median over the rounds is taken: a disturbed round is one vote.
3. A percentile is one by nearest rank: the smallest latency that so many of the runs keep to. So is `verify`'s.
4. A model that failed has no summary and the reason; the exit code then is 3.
5. A report has the facts of the device of before and after, the load among them. Format page: docs/bench-report.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Literal, TypeVar

import msgspec
import numpy as np

from edge_ilseg.bundle import Precision, Runtime
from edge_ilseg.devices.facts import DeviceFacts
from edge_ilseg.devices.verify_report import BundleFacts
from edge_ilseg.errors import EXIT_ARTEFACT, EXIT_PASSED, ReportError
from edge_ilseg.records import parse_versioned

FORMAT = "edge-ilseg-bench-report"
FORMAT_VERSION = 2
MEASURE_AGAIN = "measure again: edge-ilseg bench BUNDLE --out FILE.json"

S = TypeVar("S")


class StartSample(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A process that was started, to its first mask. The four parts follow one another without a gap; wall time, ms."""

    process_ms: float
    """From just before the process was made to its readiness: Python and this package with numpy and Pillow."""
    import_ms: float
    """The runtime was imported."""
    load_ms: float
    """The manifest was read, the model opened and compiled, the image read."""
    first_frame_ms: float
    """The model ran for the first time."""

    @property
    def cold_start_ms(self) -> float:
        """All of it."""
        return self.process_ms + self.import_ms + self.load_ms + self.first_frame_ms


class RoundSample(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Warm runs of one round, one after another, in the process that lives through all rounds."""

    latencies_ms: tuple[float, ...]
    """Wall time of each run."""
    wall_ms: float
    """From the start of the first to the end of the last."""
    cpu_ms: float
    """Processor time of the whole process in that while, all threads together."""


class SideBySideSample(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Warm runs of one round, as many at the same time as the model takes when it was loaded for throughput."""

    images: int
    wall_ms: float
    """From the start of the first to the end of the last."""


class Summary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The figures of one model: medians over the rounds (rule 2)."""

    cold_start_ms: float
    first_frame_ms: float
    latency_median_ms: float
    latency_p90_ms: float
    latency_p95_ms: float
    latency_spread_pct: float
    """Median latency of the slowest round less that of the fastest, per cent of `latency_median_ms`."""
    frames_per_s: float
    """Runs of a round over its wall time: one frame after another, the model alone."""
    cpu_ms_per_frame: float
    side_by_side_per_s: float | None
    """Images of a round over its wall time, several side by side as `verify` and `predict` run them, model alone; None
    where they could not be run so."""


class ModelBench(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model of one bundle. What was measured before a failure is kept."""

    bundle: BundleFacts
    runtime: Runtime
    precision: Precision
    model_bytes: int
    input_height_px: int
    input_width_px: int
    runtime_version: str | None
    executed_precisions: dict[str, int] | None
    golden_agreement: float | None
    """Share of the image's pixels that are as they were at the export: a figure for a wrong mask is worth nothing."""
    starts: tuple[StartSample, ...]
    """One a round, each of a process of its own."""
    rounds: tuple[RoundSample, ...]
    concurrent_runs: int | None
    """How many images ran side by side."""
    side_by_side: tuple[SideBySideSample, ...]
    """One a round."""
    peak_rss_mib: float | None
    """Highest resident memory of the process that lived through all rounds, before it ran images side by side; `None`
    where the system does not tell."""
    summary: Summary | None
    error: str | None
    side_by_side_error: str | None = None
    """Why there is no round side by side, or not all of them: as a rule for want of memory. The rest stands."""

    @property
    def label(self) -> str:
        """`"openvino int8"`."""
        return f"{self.runtime} {self.precision}"


class Skipped(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model that was not asked for by name and cannot run here."""

    folder: str
    runtime: Runtime
    precision: Precision
    reason: str


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How it was measured."""

    rounds: int
    runs: int
    """Timed runs of a model in a round; side by side, of each of the images that run at the same time."""
    warm_up_runs: int
    """Runs before them, in every round."""
    threads: int | None
    """`None`: the runtime's own choice."""


class BenchReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Models side by side on one device."""

    format: Literal["edge-ilseg-bench-report"]
    format_version: int
    created: str
    """UTC, ISO 8601; of the end."""
    seconds: float
    exit_code: int
    settings: Settings
    models: tuple[ModelBench, ...]
    """In the order of their turns."""
    skipped: tuple[Skipped, ...]
    device_before: DeviceFacts
    device_after: DeviceFacts


def percentile(latencies_ms: Sequence[float], share_pct: int) -> float:
    """The percentile by nearest rank (rule 3): a latency that was measured."""
    return float(np.percentile(latencies_ms, share_pct, method="inverted_cdf"))


def summarize(
    starts: Sequence[StartSample], rounds: Sequence[RoundSample], side_by_side: Sequence[SideBySideSample]
) -> Summary:
    """The figures of one model (rules 2 and 3).

    Raises:
        ValueError: there is no start or no round.
    """
    if not starts or not rounds:
        raise ValueError("a summary needs a start and a round")
    medians_ms = [median(sample.latencies_ms) for sample in rounds]
    middle_ms = median(medians_ms)
    return Summary(
        cold_start_ms=_median(starts, lambda sample: sample.cold_start_ms),
        first_frame_ms=_median(starts, lambda sample: sample.first_frame_ms),
        latency_median_ms=middle_ms,
        latency_p90_ms=_median(rounds, lambda sample: percentile(sample.latencies_ms, 90)),
        latency_p95_ms=_median(rounds, lambda sample: percentile(sample.latencies_ms, 95)),
        latency_spread_pct=100 * (max(medians_ms) - min(medians_ms)) / middle_ms,
        frames_per_s=_median(rounds, lambda sample: 1000 * len(sample.latencies_ms) / sample.wall_ms),
        cpu_ms_per_frame=_median(rounds, lambda sample: sample.cpu_ms / len(sample.latencies_ms)),
        side_by_side_per_s=_median(side_by_side, lambda sample: 1000 * sample.images / sample.wall_ms)
        if side_by_side
        else None,
    )


def exit_code_of(models: Sequence[ModelBench]) -> int:
    """Rule 4."""
    failed = any(model.error is not None or model.side_by_side_error is not None for model in models)
    return EXIT_ARTEFACT if failed else EXIT_PASSED


def encode_bench(report: BenchReport) -> bytes:
    """The report as JSON."""
    return msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n"


def parse_bench(data: bytes, *, where: object = None) -> BenchReport:
    """Turn JSON from `encode_bench` into a report again.

    Raises:
        ReportError: not such a report, one of another version, or one that breaks rule 1 or 4.
    """
    report = parse_versioned(
        data,
        BenchReport,
        format=FORMAT,
        version=FORMAT_VERSION,
        error=ReportError,
        what="the benchmark report",
        where=where,
        hint=MEASURE_AGAIN,
    )
    for model in report.models:
        expected = None if model.error is not None else _summary_of(model, where)
        if model.summary != expected:
            raise ReportError(
                "the figures of a benchmark do not follow from its samples",
                where=where,
                found=f"{model.label}: {model.summary}",
                expected=expected,
                hint=MEASURE_AGAIN,
            )
    if report.exit_code != exit_code_of(report.models):
        raise ReportError(
            "the exit code of the benchmark is not that of its models",
            where=where,
            found=report.exit_code,
            hint=MEASURE_AGAIN,
        )
    return report


def _summary_of(model: ModelBench, where: object) -> Summary:
    try:
        return summarize(model.starts, model.rounds, model.side_by_side)
    except (ValueError, IndexError, ArithmeticError) as error:  # no sample, or a while of no length
        raise ReportError(
            "a model of the benchmark has no usable samples",
            where=where,
            found=f"{model.label}: {error}",
            hint=MEASURE_AGAIN,
        ) from error


def _median(samples: Sequence[S], figure: Callable[[S], float]) -> float:
    return median(figure(sample) for sample in samples)
