"""Judge a bundle on this device. `edge_ilseg.devices.verdicts` decides, this module acts.

1. Integrity and fit come first; when one of them fails nothing else is run.
2. After them every check is run and reported, whatever the others say.
3. A file is hashed before anything in it is parsed or run; of the parent's bundle too.
4. The parent is run by the same runtime, in the same precision, on the same images: the difference is the update's.
5. Nothing is printed, nothing is written.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_ilseg.bundle import Manifest, Precision, Runtime, check_files, read_manifest
from edge_ilseg.devices.agreement import compare_unlabelled, find_images
from edge_ilseg.devices.encoder_constants import hash_encoder
from edge_ilseg.devices.executed_layers import read_executed_layers
from edge_ilseg.devices.facts import read_device_facts
from edge_ilseg.devices.golden_loss import golden_loss_text, split_golden_loss
from edge_ilseg.devices.label_scores import score_images
from edge_ilseg.devices.layers import count_precisions
from edge_ilseg.devices.limits import Limits
from edge_ilseg.devices.loaded_bundle import (
    LoadedBundle,
    bundle_facts,
    choose_model,
    for_throughput,
    load_bundle,
    model_facts,
)
from edge_ilseg.devices.memory import measure_peak_rss_mib
from edge_ilseg.devices.retention import judge_retention
from edge_ilseg.devices.runtime import Hint, Session
from edge_ilseg.devices.verdicts import (
    check_limits,
    check_parent,
    complete,
    failed_by,
    judge_encoder,
    judge_golden,
    judge_images,
    judge_latency,
    judge_memory,
    judge_new_classes,
    judge_size,
    judge_unlabelled,
)
from edge_ilseg.devices.verify_report import (
    REPORT_FORMAT_VERSION,
    BundleFacts,
    Check,
    CheckName,
    GoldenLoss,
    ModelFacts,
    VerifyReport,
    exit_code_of,
)
from edge_ilseg.errors import EXIT_ARTEFACT, EdgeIlsegError
from edge_ilseg.progress import ProgressCallback, no_progress

if TYPE_CHECKING:
    from edge_ilseg.data.dataset import Dataset

UNLABELLED: tuple[CheckName, ...] = (
    "unlabelled images",
    "unlabelled agreement",
    "class agreement",
    "moved to new classes",
)
WARM_UP_RUNS = 3
DEFAULT_LATENCY_RUNS = 30


class VerifyRequest(msgspec.Struct, frozen=True):
    """How to verify."""

    runtime: Runtime | None = None
    """None takes the first installed runtime that the bundle has a model for."""
    precision: Precision | None = None
    """None takes int8 where the bundle has it, else fp32, else fp16."""
    split: str = "test"
    """Which of the data set's images."""
    max_images: int | None = None
    """At most so many of them, evenly spread; None takes all."""
    limits: Limits = Limits()
    threads: int | None = None
    """Of the runtime; None leaves the choice to it."""
    latency_runs: int = DEFAULT_LATENCY_RUNS
    hint: Hint = "latency"
    """Of scoring images, where the command line takes throughput by default and the agent's gate leaves the other cores
    to the application; the latency is always that of one image with all threads."""
    misfit: EdgeIlsegError | None = None
    """Why the bundle is none for the device's profile, where that is so: the check `fit` fails by it."""
    with_evidence: bool = True
    """Measure what a person reads and no verdict needs: each layer's element type, and where golden masks of int8
    change. It loads up to five more sessions; the agent's gate leaves it out."""


def verify_bundle(
    folder: Path,
    request: VerifyRequest = VerifyRequest(),  # noqa: B008 - frozen
    *,
    against: Path | None = None,
    dataset: Dataset | None = None,
    unlabelled: Path | None = None,
    progress: ProgressCallback = no_progress,
) -> VerifyReport:
    """Run every check on a bundle and report all of them; a failed check is in the report, it raises nothing.

    Args:
        folder: the bundle.
        request: which model, how, and what it must keep to.
        against: a bundle of the parent step; without it retention is not checked.
        dataset: labelled images; without them retention and new classes are not checked.
        unlabelled: a folder of the device's own images, to compare the masks of the bundle and its parent on.
        progress: told what is being done.

    Raises:
        ConfigError: a limit needs images, or a parent, that are not given.
        DataError: the folder of unlabelled images is missing or empty.
        ValueError: `latency_runs` or `max_images` is below 1.
    """
    if request.latency_runs < 1 or (request.max_images is not None and request.max_images < 1):
        raise ValueError("latency_runs and max_images are at least 1")
    limits = request.limits
    check_limits(
        limits, has_images=dataset is not None, has_parent=against is not None, has_unlabelled=unlabelled is not None
    )
    names = spread(find_images(unlabelled), request.max_images) if unlabelled is not None else ()
    report = _blank_report(folder, limits)
    try:
        manifest = _read_whole_bundle(folder, progress)
        parent_manifest = None if against is None else _read_whole_bundle(against, progress)
    except EdgeIlsegError as error:
        return _finish(report, [failed_by("integrity", error)], "the bundle is not whole")
    report = msgspec.structs.replace(report, bundle=bundle_facts(folder, manifest))
    checks = [Check("integrity", "passed", f"{len(manifest.files)} files, bundle {manifest.bundle_id[:12]}")]
    parent = None
    try:
        if request.misfit is not None:
            raise request.misfit
        which = choose_model(manifest, request.runtime, request.precision)
        loaded = load_bundle(folder, manifest, *which, request.threads)
        if against is not None and parent_manifest is not None:
            report = msgspec.structs.replace(report, parent=bundle_facts(against, parent_manifest))
            check_parent(manifest, parent_manifest)
            parent = load_bundle(against, parent_manifest, *which, request.threads)
    except EdgeIlsegError as error:
        return _finish(report, [*checks, failed_by("fit", error)], "the model does not fit")
    model = model_facts(loaded, request.threads)
    report = msgspec.structs.replace(report, model=model)
    checks.append(Check("fit", "passed", _fit_detail(model, loaded, parent)))
    if request.with_evidence:
        report = _with_layers(report, model, loaded, request.threads)
    report, found = _check_outputs(report, loaded, parent, request, progress)
    checks += found
    report, found = _check_images(report, loaded, parent, dataset, unlabelled, names, request, progress)
    checks += found
    report, found = _check_resources(report, loaded, model, request, progress)
    otherwise = "no labelled images were given" if dataset is None else "the labelled images could not be scored"
    return _finish(report, [*checks, *found], otherwise)


def _with_layers(report: VerifyReport, model: ModelFacts, loaded: LoadedBundle, threads: int | None) -> VerifyReport:
    """The report with what each layer runs in."""
    layers = read_executed_layers(loaded, threads)
    if layers is None:
        return report
    counted = msgspec.structs.replace(model, executed_precisions=count_precisions(layers))
    return msgspec.structs.replace(report, model=counted, executed_layers=layers)


def _check_images(
    report: VerifyReport,
    loaded: LoadedBundle,
    parent: LoadedBundle | None,
    dataset: Dataset | None,
    unlabelled: Path | None,
    names: Sequence[str],
    request: VerifyRequest,
    progress: ProgressCallback,
) -> tuple[VerifyReport, list[Check]]:
    """Retention and new classes on labelled images, agreement on the others."""
    checks: list[Check] = []
    limits = request.limits
    if request.hint == "throughput" and (dataset is not None or (unlabelled is not None and parent is not None)):
        loaded, parent = _side_by_side(loaded, request.threads), parent and _side_by_side(parent, request.threads)
    if dataset is not None:
        try:
            ids = spread(dataset.ids(request.split), request.max_images)
            scores = score_images(loaded, parent, dataset, request.split, ids, progress)
        except EdgeIlsegError as error:
            checks.append(failed_by("images", error))
        else:
            report = msgspec.structs.replace(report, scores=scores)
            checks += [judge_images(scores, limits), judge_new_classes(scores, limits)]
            checks += judge_retention(scores, limits, is_compared=parent is not None)
    reason = "no folder of unlabelled images was given"
    if unlabelled is not None and parent is not None:
        try:
            compared = compare_unlabelled(loaded, parent, unlabelled, names, progress)
        except EdgeIlsegError as error:
            checks.append(failed_by("unlabelled agreement", error))
        else:
            report = msgspec.structs.replace(report, unlabelled=compared)
            checks += judge_unlabelled(compared, limits)
            return report, checks
        reason = "the images could not be compared"
    elif unlabelled is not None:
        reason = "no parent bundle to compare with"
    for name in UNLABELLED:
        if name not in {check.name for check in checks}:
            checks.append(Check(name, "not checked", reason))
    return report, checks


def _side_by_side(loaded: LoadedBundle, threads: int | None) -> LoadedBundle:
    """The model loaded to run several images at the same time; as it is, where there is no room for it once more."""
    try:
        return for_throughput(loaded, threads)
    except EdgeIlsegError:
        return loaded


def _check_resources(
    report: VerifyReport,
    loaded: LoadedBundle,
    model: ModelFacts,
    request: VerifyRequest,
    progress: ProgressCallback,
) -> tuple[VerifyReport, list[Check]]:
    """Time, memory and size of the model."""
    limits = request.limits
    checks = [judge_size(model.model_bytes, limits)]
    try:
        latencies_ms = measure_latency(loaded.session, loaded.golden_images_NHWC[0], request.latency_runs, progress)
        report = msgspec.structs.replace(report, latencies_ms=latencies_ms)
        checks.append(judge_latency(latencies_ms, limits))
    except EdgeIlsegError as error:
        checks.append(failed_by("latency p95", error))
    progress("measuring memory", 0.0)
    try:
        peak_mib = measure_peak_rss_mib(loaded.folder, model.runtime, model.precision, request.threads)
        report = msgspec.structs.replace(report, peak_rss_mib=peak_mib)
        checks.append(judge_memory(peak_mib, limits))
    except EdgeIlsegError as error:
        checks.append(failed_by("peak memory", error))
    progress("measuring memory", 1.0)
    return report, checks


def measure_latency(
    session: Session, image_HWC: NDArray[np.uint8], runs: int, progress: ProgressCallback = no_progress
) -> tuple[float, ...]:
    """Wall time of `runs` runs of one image after `WARM_UP_RUNS` others, in ms, in the order in which they ran."""
    image_HWC = np.array(image_HWC)
    for _ in range(WARM_UP_RUNS):
        session.mask(image_HWC)
    latencies_ms = []
    for run in range(runs):
        start_ns = time.perf_counter_ns()
        session.mask(image_HWC)
        latencies_ms.append((time.perf_counter_ns() - start_ns) / 1e6)
        progress("timing", (run + 1) / runs)
    return tuple(latencies_ms)


def spread(ids: Sequence[str], count: int | None) -> tuple[str, ...]:
    """At most `count` of `ids`, evenly spread, in their order."""
    if count is None or count >= len(ids):
        return tuple(ids)
    return tuple(ids[position * len(ids) // count] for position in range(count))


def _read_whole_bundle(folder: Path, progress: ProgressCallback) -> Manifest:
    """Manifest and hashes (rule 3)."""
    progress("checking files", 0.0)
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    return manifest


def _check_outputs(
    report: VerifyReport,
    loaded: LoadedBundle,
    parent: LoadedBundle | None,
    request: VerifyRequest,
    progress: ProgressCallback,
) -> tuple[VerifyReport, list[Check]]:
    """Compare what the models give here with what they gave at the export.

    The parent too: on a device where it does not compute what it should, its mIoU is too low a bar.
    """
    own, loss = _compare_golden("golden outputs", loaded, request, progress)
    report = msgspec.structs.replace(report, golden_loss=loss)
    if parent is None:
        reason = "no parent bundle to compare with"
        names: tuple[CheckName, ...] = ("parent's golden outputs", "encoder identity")
        return report, [own, *(Check(name, "not checked", reason) for name in names)]
    others, loss = _compare_golden("parent's golden outputs", parent, request, progress)
    try:
        encoder = _check_encoder(loaded, parent)
    except EdgeIlsegError as error:
        encoder = failed_by("encoder identity", error)
    return msgspec.structs.replace(report, parent_golden_loss=loss), [own, others, encoder]


def _check_encoder(loaded: LoadedBundle, parent: LoadedBundle) -> Check:
    """Hash the constants of both encoders as they are in the files (`edge_ilseg.devices.encoder_constants`)."""
    entries = []
    for side in (loaded, parent):
        found = None
        if loaded.manifest.step.encoder_frozen:
            found = hash_encoder(side.folder, side.entry)
        entries.append(msgspec.structs.replace(side.entry, encoder_sha256=found))
    return judge_encoder(loaded.manifest, entries[0], parent.manifest, entries[1])


def _compare_golden(
    name: CheckName, loaded: LoadedBundle, request: VerifyRequest, progress: ProgressCallback
) -> tuple[Check, GoldenLoss | None]:
    """The check, and where an int8 model's masks change: always as evidence, else only where they do."""
    agreements = []
    try:
        for image_HWC, golden_HW in zip(loaded.golden_images_NHWC, loaded.golden_masks_NHW, strict=True):
            agreements.append(float((loaded.session.mask(np.array(image_HWC)) == golden_HW).mean()))
            progress(name, len(agreements) / len(loaded.golden_images_NHWC))
    except EdgeIlsegError as error:
        return failed_by(name, error), None
    check = judge_golden(name, agreements, loaded.entry.precision, request.limits.min_golden_agreement)
    if loaded.entry.precision != "int8" or (min(agreements) == 1.0 and not request.with_evidence):
        return check, None
    try:
        loss = split_golden_loss(loaded, request.threads)
    except EdgeIlsegError as error:
        loss = GoldenLoss(None, None, error.one_line())
    return msgspec.structs.replace(check, detail=f"{check.detail}; {golden_loss_text(loss)}"), loss


def _blank_report(folder: Path, limits: Limits) -> VerifyReport:
    return VerifyReport(
        format="edge-ilseg-verify-report",
        format_version=REPORT_FORMAT_VERSION,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        exit_code=EXIT_ARTEFACT,
        checks=(),
        limits=limits,
        bundle=BundleFacts(folder=str(folder)),
        parent=None,
        model=None,
        executed_layers=None,
        golden_loss=None,
        parent_golden_loss=None,
        scores=None,
        unlabelled=None,
        latencies_ms=(),
        peak_rss_mib=None,
        device=read_device_facts(),
    )


def _finish(report: VerifyReport, checks: Sequence[Check], otherwise: str) -> VerifyReport:
    """Fill in the checks that were not run, and the exit code."""
    filled = complete(checks, otherwise)
    return msgspec.structs.replace(report, checks=filled, exit_code=exit_code_of(filled))


def _fit_detail(model: ModelFacts, loaded: LoadedBundle, parent: LoadedBundle | None) -> str:
    detail = f"{model.runtime_version}, {model.precision}, {model.input_width_px} x {model.input_height_px} px"
    detail += f", {len(loaded.manifest.classes)} classes"
    return detail + (f"; parent {parent.manifest.step.name!r}" if parent else "")
