"""Decide: numbers and limits in, verdicts out. Nothing here reads a file or runs a model.

1. A value that equals its limit passes. A value that is not a number fails.
2. Old classes are compared on the pixels whose truth is an old class, over the classes that have such a pixel: the same
   pixels and the same classes for a bundle and its parent.
3. A drop is judged by its 95 % interval over images: it passes when the whole interval is within the limit, fails when
   the whole interval is beyond it, and in between the images are too few to tell. That is no pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_ilseg.bundle import Manifest, ModelEntry, Precision
from edge_ilseg.devices.limits import Limits
from edge_ilseg.devices.unlabelled import Unlabelled
from edge_ilseg.devices.verify_report import CHECKS, GRAVITY, Check, CheckName, ClassScore, Scores, Verdict
from edge_ilseg.errors import (
    EXIT_ARTEFACT,
    EXIT_PARITY,
    EXIT_PASSED,
    EXIT_RETENTION,
    EXIT_UNDECIDED,
    BundleError,
    ConfigError,
    EdgeIlsegError,
)

GOLDEN_AGREEMENT: dict[Precision, float] = {"fp32": 0.999, "fp16": 0.999, "int8": 0.99}
"""Least share of golden pixels that must be the same channel as on the machine of the export.

Another processor adds floating-point numbers in another order: logits differ in their last digits, and only pixels
where two classes tie change. In int8 the kernels of two processors may round a sum to neighbouring levels, layer by
layer, so more pixels along the edges of classes change. The limits are chosen, not derived: an exact match is no
sensible demand, and a real fault goes far beyond them. Such a fault is 8-bit weights that overflow 16-bit sums on a
processor without integer dot products; measured on one small network, it took the mIoU from 0.714 to 0.537.
"""

EXIT_OF: dict[Verdict, int] = {
    "passed": EXIT_PASSED,
    "failed": EXIT_RETENTION,
    "too few images": EXIT_UNDECIDED,
    "not checked": EXIT_PASSED,
}
"""What the verdict on a drop asks for."""

MAX_OLD_MIOU_DROP_PCT = 2.0
"""Percentage points of old-class mIoU that an update may lose against its parent, unless another limit is given."""


def at_most(
    name: CheckName, value: float, limit: float | None, unit: str, detail: str, *, exit_code: int = EXIT_RETENTION
) -> Check:
    """`value` passes up to `limit`; without a limit it is shown and not checked."""
    if limit is None:
        return Check(name, "not checked", f"no limit set; {detail}" if detail else "no limit set", value, None, unit)
    passed = value <= limit
    return Check(name, "passed" if passed else "failed", detail, value, limit, unit, 0 if passed else exit_code)


def at_least(
    name: CheckName, value: float, limit: float | None, unit: str, detail: str, *, exit_code: int = EXIT_RETENTION
) -> Check:
    """`value` passes from `limit` up; without a limit it is shown and not checked."""
    if limit is None:
        return Check(name, "not checked", f"no limit set; {detail}" if detail else "no limit set", value, None, unit)
    passed = value >= limit
    return Check(name, "passed" if passed else "failed", detail, value, limit, unit, 0 if passed else exit_code)


def failed_by(name: CheckName, error: EdgeIlsegError) -> Check:
    """A check that an error ended."""
    return Check(name, "failed", error.one_line(), exit_code=error.exit_code)


def complete(checks: Sequence[Check], otherwise: str) -> tuple[Check, ...]:
    """All checks in their order; `otherwise` says why the others were not run (rule 1 of the report)."""
    done = {check.name: check for check in checks}
    return tuple(done.get(name) or Check(name, "not checked", otherwise) for name in CHECKS)


def check_limits(limits: Limits, *, has_images: bool, has_parent: bool, has_unlabelled: bool) -> None:
    """Raise `ConfigError` for a limit that cannot be measured with what was given; without one, nothing is promised."""
    needs = (
        ("on the mIoU of the new classes", limits.min_new_miou_pct, has_images, "labelled images"),
        (
            "on the drop of the old mIoU",
            limits.max_old_miou_drop_pct,
            has_images and has_parent,
            "labelled images and a parent",
        ),
        (
            "on the drop of a class",
            limits.max_class_drop_pct,
            has_images and has_parent,
            "labelled images and a parent",
        ),
        (
            "on the agreement with the parent",
            limits.min_agreement_pct,
            has_unlabelled and has_parent,
            "a folder of images and a parent",
        ),
        (
            "on pixels that moved to new classes",
            limits.max_moved_pct,
            has_unlabelled and has_parent,
            "a folder of images and a parent",
        ),
    )
    for name, limit, is_given, need in needs:
        if limit is not None and not is_given:
            raise ConfigError(f"a limit {name} needs {need}", found=f"limit {limit:g}", hint=f"give {need}")


def check_parent(manifest: Manifest, parent: Manifest) -> None:
    """Raise `BundleError` unless `manifest` was made from a step whose parent is that of the bundle `parent`.

    The bundles of a fine-tuned and a distilled step have the same parent, and two bundles of one step (another
    precision, another target) are the same parent: it is the step's id that counts, not the bundle's.
    """
    if manifest.step.parent_id is None:
        raise BundleError(
            "the bundle is of step 0, which has no parent to compare with",
            found=f"step {manifest.step.name!r}",
            hint="verify it by itself",
        )
    if manifest.step.parent_id != parent.step.id:
        raise BundleError(
            "the other bundle is not the parent of this one",
            found=f"step {parent.step.name!r}, id {parent.step.id[:12]}",
            expected=f"the parent of step {manifest.step.name!r}, id {manifest.step.parent_id[:12]}",
            hint="compare with a bundle of the step that this one was trained from",
        )
    old_names = manifest.class_names[: manifest.old_count]
    if old_names != parent.class_names:
        raise BundleError(
            "the parent's classes are not the first channels of this bundle",
            found=f"old classes {', '.join(old_names)}",
            expected=f"the parent's: {', '.join(parent.class_names)}",
            hint="one of the two was not exported from its step as trained: export both again",
        )


def judge_images(scores: Scores, limits: Limits) -> Check:
    """Whether enough of the images could be used."""
    bad = scores.bad_images
    detail = f"{scores.images_counted} of {scores.images_asked} images of {scores.dataset}, split {scores.split}"
    if bad:
        detail += f"; bad: {bad[0].image_id} ({bad[0].reason})" + (f" and {len(bad) - 1} more" if bad[1:] else "")
    if not scores.images_counted:
        return Check("images", "failed", detail, len(bad), limits.max_bad_images, "bad", EXIT_ARTEFACT)
    return at_most("images", len(bad), limits.max_bad_images, "bad", detail, exit_code=EXIT_ARTEFACT)


def judge_retention(scores: Scores, limits: Limits, *, is_compared: bool) -> tuple[Check, Check]:
    """The drop of the old-class mIoU and that of the most forgotten class, in percentage points.

    The drop is the parent's mIoU over the old classes minus the bundle's, on the same images, on this device, by the
    definition in `ClassScore`: an old pixel that turned into a new class counts as lost, a new object that is not found
    does not. Old classes that no image shows are named; where none is shown, a limit is not kept but broken.
    """
    given = limits.max_old_miou_drop_pct
    mean_limit = MAX_OLD_MIOU_DROP_PCT if given is None else given
    old = [item for item in scores.classes if item.is_old]
    if not old:
        reason = "step 0: there is no old class to retain"
        return Check("old mIoU drop", "not checked", reason), Check("old class drop", "not checked", reason)
    if not is_compared:
        shown = "unknown" if scores.miou_old is None else f"{100 * scores.miou_old:.1f} %"
        reason = f"no parent bundle to compare with; old mIoU here {shown}"
        return Check("old mIoU drop", "not checked", reason), Check("old class drop", "not checked", reason)
    if scores.miou_old is None or scores.parent_miou_old is None:
        reason = "no pixel of an old class in these images: retention cannot be judged"
        return (
            Check("old mIoU drop", "failed", reason, None, mean_limit, "points", EXIT_ARTEFACT),
            Check("old class drop", "not checked", reason)
            if limits.max_class_drop_pct is None
            else Check("old class drop", "failed", reason, None, limits.max_class_drop_pct, "points", EXIT_ARTEFACT),
        )
    worst = max(old, key=lambda item: -np.inf if item.drop_pct is None else item.drop_pct)
    change = f"{100 * scores.parent_miou_old:.1f} -> {100 * scores.miou_old:.1f} %"
    named = f"most forgotten: {worst.name} {_pct(worst.parent_iou)} -> {_pct(worst.iou)} %"
    missing = f"; not in these images: {', '.join(scores.unmeasured_old)}" if scores.unmeasured_old else ""
    drop_pct = 100 * (scores.parent_miou_old - scores.miou_old)
    mean = judge_drop(
        "old mIoU drop",
        drop_pct,
        (scores.drop_low_pct, scores.drop_high_pct),
        mean_limit,
        f"{change}; {named}{missing}",
    )
    return mean, _judge_class_drops([item for item in old if item.drop_pct is not None], limits, missing)


def judge_drop(
    name: CheckName, drop_pct: float, ends: tuple[float | None, float | None], limit: float | None, detail: str
) -> Check:
    """Judge a drop by the ends of its 95 % interval (rule 3).

    Args:
        name: of the check.
        drop_pct: the drop on these images, points.
        ends: of its interval; None where the images are too few for one.
        limit: the highest drop that is allowed; None: it is shown and not checked.
        detail: for a person.
    """
    low, high = ends
    if limit is None:
        return Check(name, "not checked", f"no limit set; {detail}", drop_pct, None, "points", 0, low, high)
    if low is None or high is None:
        text = f"no interval can be given: too few images show an old class; {detail}"
        return Check(name, "too few images", text, drop_pct, limit, "points", EXIT_UNDECIDED)
    verdict: Verdict = "passed" if high <= limit else "failed" if low > limit else "too few images"
    if not np.isfinite([drop_pct, limit]).all():
        verdict = "failed"
    text = f"95 % interval {low:.2f} to {high:.2f}; {detail}"
    return Check(name, verdict, text, drop_pct, limit, "points", EXIT_OF[verdict], low, high)


def _judge_class_drops(measured: Sequence[ClassScore], limits: Limits, missing: str) -> Check:
    """The class that is gravest under the limit, and, among those, the one that has lost most."""
    name: CheckName = "old class drop"
    checks = [
        judge_drop(
            name,
            item.drop_pct or 0.0,
            (item.drop_low_pct, item.drop_high_pct),
            limits.max_class_drop_pct,
            f"{item.name} {_pct(item.parent_iou)} -> {_pct(item.iou)} %{missing}",
        )
        for item in measured
    ]
    return max(checks, key=lambda check: (GRAVITY.index(check.exit_code), check.value or 0.0))


def judge_new_classes(scores: Scores, limits: Limits) -> Check:
    """The mean IoU of the classes that this step has added."""
    new = [item for item in scores.classes if not item.is_old]
    known = {item.name: item.iou for item in new if item.iou is not None}
    unmeasured = [item.name for item in new if item.iou is None]
    missing = f"not in these images: {', '.join(unmeasured)}" if unmeasured else ""
    if not known:
        if limits.min_new_miou_pct is None:
            return Check("new mIoU", "not checked", f"no limit set; {missing}")
        return Check("new mIoU", "failed", missing, None, limits.min_new_miou_pct, "%", EXIT_ARTEFACT)
    weakest = min(known, key=lambda name: known[name])
    detail = "; ".join(part for part in (f"weakest: {weakest} {_pct(known[weakest])} %", missing) if part)
    return at_least("new mIoU", 100 * float(np.mean(list(known.values()))), limits.min_new_miou_pct, "%", detail)


def judge_golden(
    name: CheckName, agreements: Sequence[float], precision: Precision, min_agreement: float | None
) -> Check:
    """The share of golden pixels (each image the same size) that are as they were at the export."""
    limit = GOLDEN_AGREEMENT[precision] if min_agreement is None else min_agreement
    worst = int(np.argmin(agreements))
    detail = f"{len(agreements)} golden images; the worst, number {worst}: {agreements[worst]:.4f}"
    return at_least(name, float(np.mean(agreements)), limit, "of pixels", detail, exit_code=EXIT_PARITY)


def judge_encoder(manifest: Manifest, entry: ModelEntry, parent: Manifest, parent_entry: ModelEntry) -> Check:
    """Whether a frozen encoder is the parent's, to the byte: in the step, and in the file of the model that is run."""
    name: CheckName = "encoder identity"
    step = manifest.step
    if not step.encoder_frozen:
        return Check(name, "not checked", "the step trained the encoder")
    if step.encoder_sha256 != parent.step.encoder_sha256:
        found = f"{step.encoder_sha256[:12]} here, {parent.step.encoder_sha256[:12]} in the parent"
        return Check(
            name, "failed", f"the step froze the encoder, and its weights are others: {found}", exit_code=EXIT_ARTEFACT
        )
    if entry.encoder_sha256 is None or parent_entry.encoder_sha256 is None:
        return Check(name, "passed", "the same weights; the files' constants have no hash to compare")
    if entry.encoder_sha256 == parent_entry.encoder_sha256:
        return Check(
            name, "passed", f"the same weights, and the same constants in the file: {entry.encoder_sha256[:12]}"
        )
    if entry.precision == "int8" and manifest.int8 is not None and manifest.int8.taken != "carry":
        return Check(name, "passed", f"the same weights; its int8 ranges were not carried ({manifest.int8.taken})")
    if entry.precision == "int8" and parent.int8 is not None and parent.int8.taken == "weights-only":
        return Check(name, "passed", "the same weights; the parent has them in int8 without ranges (weights-only)")
    return Check(name, "failed", "the same weights, and other constants in the file", exit_code=EXIT_ARTEFACT)


def judge_unlabelled(found: Unlabelled, limits: Limits) -> tuple[Check, Check]:
    """Agreement with the parent on images without labels, and the share of old pixels that became new ones.

    A limit that these images cannot measure is broken, not kept: a bundle that calls every old pixel new has no
    agreement at all.
    """
    images = f"{found.images_counted} of {found.images_asked} images"
    if found.bad_images:
        images += f"; bad: {found.bad_images[0][0]} ({found.bad_images[0][1]})"
    shown = [item for item in found.classes if item.agreement is not None]
    if found.agreement is None or not shown:
        reason = f"both models show no pixel of an old class where neither says new: {images}"
        agreement = _unmeasured("unlabelled agreement", limits.min_agreement_pct, "%", reason)
    else:
        worst = min(shown, key=lambda item: item.agreement or 0.0)
        detail = f"{images}; least: {worst.name} {_pct(worst.agreement)} %"
        agreement = at_least("unlabelled agreement", 100 * found.agreement, limits.min_agreement_pct, "%", detail)
    if found.moved is None:
        reason = f"the parent shows no pixel of an old class: {images}"
        return agreement, _unmeasured("moved to new classes", limits.max_moved_pct, "%", reason)
    gone = max(found.classes, key=lambda item: item.moved or 0.0)
    detail = f"most: {gone.name} {_pct(gone.moved)} % of its pixels"
    return agreement, at_most("moved to new classes", 100 * found.moved, limits.max_moved_pct, "%", detail)


def judge_memory(peak_rss_mib: float | None, limits: Limits) -> Check:
    """The peak of a process that does nothing but run the model."""
    if peak_rss_mib is None:
        return _unmeasured("peak memory", limits.max_rss_mib, "MiB", "this system does not tell the peak of a process")
    return at_most("peak memory", peak_rss_mib, limits.max_rss_mib, "MiB", "a process that only runs this model")


def _unmeasured(name: CheckName, limit: float | None, unit: str, reason: str) -> Check:
    """Not checked without a limit; with one it is broken (rule 3 of the report)."""
    if limit is None:
        return Check(name, "not checked", reason)
    return Check(name, "failed", reason, None, limit, unit, EXIT_ARTEFACT)


def judge_latency(latencies_ms: Sequence[float], limits: Limits) -> Check:
    """The 95th percentile of the warm runs by nearest rank: the smallest latency that 95 % of the runs keep to."""
    p95_ms = float(np.percentile(latencies_ms, 95, method="inverted_cdf"))
    detail = f"median {np.median(latencies_ms):.2f} ms of {len(latencies_ms)} warm runs"
    return at_most("latency p95", p95_ms, limits.max_latency_p95_ms, "ms", detail)


def judge_size(model_bytes: int, limits: Limits) -> Check:
    """The files of the model that was run."""
    return at_most("model size", model_bytes / (1 << 20), limits.max_model_mib, "MiB", f"{model_bytes} bytes")


def _pct(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
