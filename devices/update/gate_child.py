"""The part of the gate in which a model runs: `python -m edge_ilseg.devices.update.gate_child`, started by `gate.py`.

1. Limits come first (`confined.confine`), then the request is read, and only then is anything of a bundle opened.
2. The answer is a file, `verdict.json`, put into its place whole. A process that left none has crashed.
3. Labels of the device and labels shipped with the release are both used, each with the limits that it can measure;
   frames without labels beside them.
4. Whatever is wrong with this device (its data, its profile, its active model) is no verdict on the release.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from edge_ilseg.devices.limits import Limits, set_limits, tighten, tightening
from edge_ilseg.devices.update.confined import confine
from edge_ilseg.devices.update.gate_records import (
    DEFAULT_MAX_MOVED_PCT,
    DEFAULT_MIN_AGREEMENT_PCT,
    Evidence,
    GateRequest,
    GateVerdict,
)
from edge_ilseg.errors import BundleError, ConfigError, DataError, EdgeIlsegError

if TYPE_CHECKING:
    from edge_ilseg.bundle import Manifest
    from edge_ilseg.data.dataset import Dataset
    from edge_ilseg.devices.update.gate_judgement import Direction, Run
    from edge_ilseg.devices.verification import VerifyRequest

VERDICT_NAME = "verdict.json"
VALIDATION, BUNDLE = "validation", "bundle"


class Labels(NamedTuple):
    """A set of labelled images."""

    evidence: Evidence
    dataset: Dataset
    split: str


class Sides(NamedTuple):
    """The bundles, in a form in which they can be verified against each other."""

    new: Path
    active: Path | None
    is_back: bool
    """The new one is the older one: the active bundle is verified against it (`comparable.py`)."""
    background: str | None


class Pass(NamedTuple):
    """One verification that is to be run."""

    bundle: Path
    against: Path | None
    labels: Labels | None
    frames: Path | None
    direction: Direction


def main() -> None:
    """Answer one request (rules 1 and 2)."""
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=GateRequest)
    confine(
        parent_pid=request.agent_pid,
        cpu_s=request.cpu_limit_s,
        data_mib=request.data_limit_mib,
        file_mib=request.file_limit_mib,
        nice=request.settings.nice,
    )
    verdict = judge(request)
    part = Path(request.work) / f"{VERDICT_NAME}.part"
    part.write_bytes(msgspec.json.encode(verdict))
    part.replace(part.with_name(VERDICT_NAME))


def judge(request: GateRequest) -> GateVerdict:
    """Verify the bundle of a slot as the request says, and judge what comes out."""
    from edge_ilseg.bundle import read_manifest
    from edge_ilseg.devices.update.gate_judgement import decide

    bundle = Path(request.slot) / BUNDLE
    try:
        manifest = read_manifest(bundle)  # its files are hashed by the verification
        if manifest.bundle_id != request.bundle_id:
            raise BundleError(
                "the slot holds another bundle than the release names",
                found=manifest.bundle_id[:12],
                expected=request.bundle_id[:12],
                hint="publish the bundle again",
            )
    except EdgeIlsegError as error:
        return GateVerdict("refused", is_taken=False, reason=error.one_line())
    try:
        labels = tuple(_labels(request, manifest))
        verify = _verify_request(request, bundle, manifest, has_labels=bool(labels))
        sides = _sides(request, manifest, verify)
    except EdgeIlsegError as error:
        return GateVerdict("cannot be judged", is_taken=False, reason=error.one_line())
    if not any((entry.runtime, entry.precision) == (verify.runtime, verify.precision) for entry in manifest.models):
        reason = f"it has no model for {verify.runtime} in {verify.precision}, which this device runs"
        return GateVerdict("refused", is_taken=False, reason=reason)
    try:
        images = request.settings.images
        runs = _verify(verify, sides, labels, Path(images) if images is not None else None)
        is_busy = _is_busy(verify, sides, runs[0])
    except (ConfigError, DataError) as error:  # images that are not there, a limit that nothing measures
        return GateVerdict("cannot be judged", is_taken=False, reason=error.one_line())
    return decide(runs, request.settings, is_busy=is_busy)


def _labels(request: GateRequest, manifest: Manifest) -> Iterator[Labels]:
    """The labelled images that there are (rule 3)."""
    from edge_ilseg.cli.options import parse_data_text
    from edge_ilseg.data import open_data, open_dataset

    if request.settings.data is not None:
        own = open_data(parse_data_text(request.settings.data))
        yield Labels("own labels", own, request.settings.split or _all_or_test(own, None))
    shipped = Path(request.slot) / VALIDATION
    if shipped.is_dir():
        dataset = open_dataset("folder", shipped)
        yield Labels("shipped labels", dataset, _all_or_test(dataset, manifest.expected_data))


def _all_or_test(dataset: Dataset, expected_data: str | None) -> str:
    """The split to judge by: all images where nobody has split them, for nothing was learned from them here."""
    from edge_ilseg.cli.verify import default_split
    from edge_ilseg.data.folder import BY_HASH, FolderInfo

    info = dataset.info
    if isinstance(info, FolderInfo) and info.split_source == BY_HASH:
        return "+".join(info.splits)
    return default_split(info.splits, expected_data)


def _verify_request(request: GateRequest, bundle: Path, manifest: Manifest, *, has_labels: bool) -> VerifyRequest:
    """Which model, by what, and the limits: what is signed, made stricter by bundle, profile and device."""
    from edge_ilseg.devices.device_profile import read_profile
    from edge_ilseg.devices.loaded_bundle import choose_model
    from edge_ilseg.devices.profile_request import Measurable, fill_request
    from edge_ilseg.devices.retention import MAX_OLD_MIOU_DROP_PCT
    from edge_ilseg.devices.verdicts import GOLDEN_AGREEMENT
    from edge_ilseg.devices.verification import VerifyRequest

    settings = request.settings
    asked = VerifyRequest(
        runtime=settings.runtime,
        precision=settings.precision,
        threads=settings.threads,
        max_images=settings.max_images,
        latency_runs=settings.latency_runs,
        with_evidence=False,
    )
    profiled = fill_request(asked, settings.profile, {}, bundle, measurable=Measurable(True, True, True))
    if profiled.misfit is not None:
        raise profiled.misfit
    runtime, precision = choose_model(manifest, profiled.runtime, profiled.precision)
    defaults = {
        "min_golden_agreement": GOLDEN_AGREEMENT[precision],
        "max_old_miou_drop_pct": MAX_OLD_MIOU_DROP_PCT,
    }
    limits = request.limits
    for own in (settings.limits, *([] if settings.profile is None else [read_profile(settings.profile).limits])):
        limits = tighten(limits, set_limits(own), defaults)
    if manifest.limits is not None:
        if not has_labels:
            defaults |= {"min_agreement_pct": DEFAULT_MIN_AGREEMENT_PCT, "max_moved_pct": DEFAULT_MAX_MOVED_PCT}
        stricter = tightening(set_limits(manifest.limits), {**defaults, **set_limits(limits)})
        limits = msgspec.structs.replace(limits, **stricter)
    return msgspec.structs.replace(profiled, runtime=runtime, precision=precision, limits=limits)


def _sides(request: GateRequest, manifest: Manifest, verify: VerifyRequest) -> Sides:
    """Bundles in `work` that can be verified against each other; the new one alone where nothing is active.

    Raises:
        BundleError: the active bundle is damaged, or has nothing in common with the new one (rule 4).
    """
    from edge_ilseg.bundle import check_files, read_manifest
    from edge_ilseg.devices.update.comparable import pair_up, write_view

    bundle, work = Path(request.slot) / BUNDLE, Path(request.work)
    runtime, precision = verify.runtime, verify.precision
    has_model = any((entry.runtime, entry.precision) == (runtime, precision) for entry in manifest.models)
    if request.active is None or runtime is None or precision is None or not has_model:
        return Sides(bundle, None, is_back=False, background=manifest.background)
    active = Path(request.active) / BUNDLE
    active_manifest = read_manifest(active)
    check_files(active, active_manifest)
    pair = pair_up(manifest, active_manifest, runtime, precision)
    new, old = (pair.earlier, pair.later) if pair.is_back else (pair.later, pair.earlier)
    return Sides(
        new=write_view(bundle, new, work / "new"),
        active=write_view(active, old, work / "active"),
        is_back=pair.is_back,
        background=manifest.background,
    )


def _passes(sides: Sides, labels: tuple[Labels, ...], frames: Path | None) -> Iterator[Pass]:
    """The verifications: the first tells of outputs, speed and memory; each set of labels, of the old classes."""
    first = labels[0] if labels else None
    if sides.active is None or sides.is_back:
        yield Pass(sides.new, None, first, None, "alone")
    if sides.active is not None:
        for given in labels or (None,):
            images = frames if given is first else None
            if sides.is_back:
                yield Pass(sides.active, sides.new, given, images, "back")
            else:
                yield Pass(sides.new, sides.active, given, images, "forward")


def _verify(verify: VerifyRequest, sides: Sides, labels: tuple[Labels, ...], frames: Path | None) -> list[Run]:
    """Run all verifications, each with the limits that it can measure (rule 3)."""
    from edge_ilseg.devices.update.gate_judgement import Run, limits_for
    from edge_ilseg.devices.verification import verify_bundle

    limits = verify.limits if frames is None else _with_limits_for_frames(verify.limits, has_labels=bool(labels))
    runs: list[Run] = []
    for item in _passes(sides, labels, frames):
        given = item.labels
        asked = msgspec.structs.replace(
            verify,
            split=given.split if given is not None else verify.split,
            limits=limits_for(
                limits,
                labels=given is not None,
                parent=item.against is not None,
                frames=item.frames is not None,
            ),
        )
        if runs:  # speed and memory are known
            left = msgspec.structs.replace(asked.limits, max_latency_p95_ms=None, max_rss_mib=None)
            asked = msgspec.structs.replace(asked, limits=left, latency_runs=1)
        dataset = given.dataset if given is not None else None
        report = verify_bundle(item.bundle, asked, against=item.against, dataset=dataset, unlabelled=item.frames)
        runs.append(Run(report, given.evidence if given is not None else None, item.direction, sides.background))
    return runs


def _with_limits_for_frames(limits: Limits, *, has_labels: bool) -> Limits:
    """Where no limit says it: the gate's own without labels; beside labels, which decide, frames refuse nothing."""
    agreement, moved = limits.min_agreement_pct, limits.max_moved_pct
    otherwise = (0.0, 100.0) if has_labels else (DEFAULT_MIN_AGREEMENT_PCT, DEFAULT_MAX_MOVED_PCT)
    return msgspec.structs.replace(
        limits,
        min_agreement_pct=otherwise[0] if agreement is None else agreement,
        max_moved_pct=otherwise[1] if moved is None else moved,
    )


def _is_busy(verify: VerifyRequest, sides: Sides, first: Run) -> bool:
    """Whether the active model, too, is slower than the limit that the new one has just broken."""
    import numpy as np

    from edge_ilseg.bundle import read_manifest
    from edge_ilseg.devices.loaded_bundle import load_bundle
    from edge_ilseg.devices.verdicts import judge_latency
    from edge_ilseg.devices.verification import measure_latency

    active = sides.active
    if active is None or first.report.check("latency p95").verdict != "failed":
        return False
    assert verify.runtime is not None
    assert verify.precision is not None
    try:
        loaded = load_bundle(active, read_manifest(active), verify.runtime, verify.precision, verify.threads)
        image_HWC = np.array(loaded.golden_images_NHWC[0])
        latencies_ms = measure_latency(loaded.session, image_HWC, verify.latency_runs)
    except EdgeIlsegError:
        return False  # the active model says nothing: the limit stays broken
    return judge_latency(latencies_ms, verify.limits).verdict == "failed"


if __name__ == "__main__":
    main()
