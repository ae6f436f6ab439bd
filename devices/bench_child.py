"""One model in a process of its own, which a benchmark asks in turn: `python -m edge_ilseg.devices.bench_child`.

1. One JSON object a line: each request on standard input has one answer on standard output, in order. The end of the
   input ends the process.
2. What a runtime prints goes to standard error: the descriptor of standard output is turned there before one is loaded.
3. The first request is `Load`; a later one lets go of the model before it. The others measure.
4. What a user can mend is answered by `Failed`; anything else ends the process with a traceback.
5. Moments that two processes compare are of the monotonic clock, which is one for the whole machine.
6. Ctrl-C reaches every process of a terminal; this one leaves it to the one that asks.
"""

from __future__ import annotations

import importlib
import itertools
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_ilseg.bundle import Precision, Runtime, read_manifest
from edge_ilseg.devices.bench_report import RoundSample, SideBySideSample
from edge_ilseg.devices.facts import read_peak_rss_mib
from edge_ilseg.devices.loaded_bundle import read_golden
from edge_ilseg.devices.runtime import Hint, Session, check_fit, import_openvino, load_session
from edge_ilseg.errors import EdgeIlsegError

A = TypeVar("A", bound=msgspec.Struct)


class Load(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Load a model and run it once on the bundle's first golden image; for throughput, to run several at a time."""

    folder: str
    runtime: Runtime
    precision: Precision
    threads: int | None
    hint: Hint = "latency"


class Measure(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Run the model `warm_up_runs` times, then time `runs` runs."""

    warm_up_runs: int
    runs: int


class MeasureSideBySide(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """As `Measure`, as many images at the same time as the model takes, and so many times the runs."""

    warm_up_runs: int
    runs: int


class Loaded(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """What loading came to; `_ns` are moments of the monotonic clock (rule 5)."""

    ready_ns: int
    """The request was read: Python and this package are there."""
    imported_ns: int
    loaded_ns: int
    first_mask_ns: int
    runtime_version: str
    executed_precisions: dict[str, int] | None
    golden_agreement: float
    concurrent_runs: int


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """One round, and the highest resident memory of this process so far."""

    sample: RoundSample
    peak_rss_mib: float | None


class MeasuredSideBySide(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """One round."""

    sample: SideBySideSample


class Failed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """An `EdgeIlsegError`, its parts as text."""

    what: str
    where: str | None
    found: str | None
    expected: str | None
    hint: str | None


Request = Load | Measure | MeasureSideBySide
Answer = Loaded | Measured | MeasuredSideBySide | Failed


def failed(error: EdgeIlsegError) -> Failed:
    """An error as an answer."""
    where, found, expected = (
        None if part is None else str(part) for part in (error.where, error.found, error.expected)
    )
    return Failed(error.what, where, found, expected, error.hint)


def main() -> None:
    """Answer requests until there are no more (rules 1 to 4)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        model: tuple[Session, NDArray[np.uint8]] | None = None
        for line in sys.stdin.buffer:
            request = msgspec.json.decode(line, type=Request)
            answer: Answer
            try:
                if isinstance(request, Load):
                    model = None
                    answer, model = load(request, time.monotonic_ns())
                elif model is None:
                    raise ValueError("the first request is Load")
                elif isinstance(request, Measure):
                    answer = Measured(measure(*model, request), read_peak_rss_mib())
                else:
                    answer = MeasuredSideBySide(measure_side_by_side(*model, request))
            except EdgeIlsegError as error:
                answer = failed(error)
            answers.write(msgspec.json.encode(answer) + b"\n")
            answers.flush()


def load(request: Load, ready_ns: int) -> tuple[Loaded, tuple[Session, NDArray[np.uint8]]]:
    """Load a model, run it once, and compare the mask with the one of the export.

    Args:
        request: which model.
        ready_ns: when the request was read.

    Returns:
        The answer; the session and its image, uint8, H x W x 3.

    Raises:
        BundleError: the bundle has no such model, or it cannot be run.
        MissingPackageError: the runtime is not installed, or does not start.
    """
    import_runtime(request.runtime)
    imported_ns = time.monotonic_ns()
    folder = Path(request.folder)
    manifest = read_manifest(folder)
    entry = manifest.model(request.runtime, request.precision)
    session = load_session(folder, entry, threads=request.threads, hint=request.hint)
    check_fit(session, manifest, where=folder / entry.files[0])
    size = (session.input_height_px, session.input_width_px)
    image_HWC = np.array(read_golden(folder / manifest.golden_images, (*size, 3))[0])
    loaded_ns = time.monotonic_ns()
    mask_HW = session.mask(image_HWC)
    first_mask_ns = time.monotonic_ns()
    golden_HW = read_golden(folder / entry.golden_masks, size)[0]
    answer = Loaded(
        ready_ns=ready_ns,
        imported_ns=imported_ns,
        loaded_ns=loaded_ns,
        first_mask_ns=first_mask_ns,
        runtime_version=session.runtime_version,
        executed_precisions=session.executed_precisions,
        golden_agreement=float((mask_HW == golden_HW).mean()),
        concurrent_runs=session.concurrent_runs,
    )
    return answer, (session, image_HWC)


def measure(session: Session, image_HWC: NDArray[np.uint8], request: Measure) -> RoundSample:
    """Time warm runs of one image.

    Raises:
        BundleError: the runtime cannot run the model.
    """
    for _ in range(request.warm_up_runs):
        session.mask(image_HWC)
    moments_ns = [0] * (request.runs + 1)
    cpu_start_ns = time.process_time_ns()
    moments_ns[0] = time.perf_counter_ns()
    for run in range(request.runs):
        session.mask(image_HWC)
        moments_ns[run + 1] = time.perf_counter_ns()
    cpu_ns = time.process_time_ns() - cpu_start_ns
    return RoundSample(
        latencies_ms=tuple((after - before) / 1e6 for before, after in itertools.pairwise(moments_ns)),
        wall_ms=(moments_ns[-1] - moments_ns[0]) / 1e6,
        cpu_ms=cpu_ns / 1e6,
    )


def measure_side_by_side(
    session: Session, image_HWC: NDArray[np.uint8], request: MeasureSideBySide
) -> SideBySideSample:
    """Time warm runs of one image, as many at the same time as the session takes.

    Raises:
        BundleError: the runtime cannot run the model.
    """
    count = session.concurrent_runs
    with ThreadPoolExecutor(count, "edge-ilseg-run") as pool:

        def run(images: int) -> int:
            """Wall time, ns."""
            start_ns = time.perf_counter_ns()
            for _ in pool.map(session.mask, itertools.repeat(image_HWC, images)):
                pass
            return time.perf_counter_ns() - start_ns

        run(count * request.warm_up_runs)
        return SideBySideSample(images=count * request.runs, wall_ms=run(count * request.runs) / 1e6)


def import_runtime(runtime: Runtime) -> None:
    """Import a runtime before its model is loaded, so that the two are timed apart.

    What goes wrong is left to `load_session`, which imports again and says it properly.
    """
    with suppress(ImportError, OSError):
        if runtime == "openvino":
            import_openvino()
        else:
            importlib.import_module(runtime)


if __name__ == "__main__":
    main()
