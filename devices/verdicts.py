"""Decide: numbers and limits in, verdicts out. Nothing here reads a file or runs a model.

1. A value that equals its limit passes. A value that is not a number fails.
2. Old classes are compared on the pixels whose truth is an old class, over the classes that have such a pixel: the same
   pixels and the same classes for a bundle and its parent.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_ilseg.bundle import Manifest, Precision
from edge_ilseg.devices.verify_report import CHECKS, Check, CheckName, ClassScore, Limits, Scores
from edge_ilseg.errors import EXIT_ARTEFACT, EXIT_PARITY, EXIT_RETENTION, BundleError, ConfigError, EdgeIlsegError
from edge_ilseg.metrics import class_iou, retention_confusion

GOLDEN_AGREEMENT: dict[Precision, float] = {"fp32": 0.999, "fp16": 0.999, "int8": 0.99}
"""Least share of golden pixels that must be the same channel as on the machine of the export.

Another processor adds floating-point numbers in another order: logits differ in their last digits, and only pixels
where two classes tie change. In int8 the kernels of two processors may round a sum to neighbouring levels, layer by
layer, so more pixels along the edges of classes change. The limits are chosen, not derived: an exact match is no
sensible demand, and a real fault goes far beyond them. Such a fault is 8-bit weights that overflow 16-bit sums on a
processor without integer dot products; measured on one small network, it took the mIoU from 0.714 to 0.537.
"""

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


def check_limits(limits: Limits, *, has_images: bool, has_parent: bool) -> None:
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


def measured_iou(confusion: NDArray[np.int64], old_count: int) -> NDArray[np.float64]:
    """IoU of each class by the definition in `ClassScore`: float64, K, `nan` for a class that no pixel is truly of."""
    iou = class_iou(confusion)
    iou[:old_count] = class_iou(retention_confusion(confusion, old_count))[:old_count]
    iou[confusion.sum(axis=1) == 0] = np.nan
    return iou


def class_scores(
    manifest: Manifest, confusion: NDArray[np.int64], parent_confusion: NDArray[np.int64] | None
) -> tuple[ClassScore, ...]:
    """Score every class of a bundle, and its parent on the old ones. Both matrices are in the bundle's channels."""
    old_count = manifest.old_count
    iou = measured_iou(confusion, old_count)
    parent_iou = np.full_like(iou, np.nan)
    if parent_confusion is not None:
        parent_iou[:old_count] = measured_iou(parent_confusion, old_count)[:old_count]
    return tuple(
        ClassScore(
            name=entry.name,
            step=entry.step,
            is_old=channel < old_count,
            pixels=int(confusion[channel].sum()),
            iou=_known(iou[channel]),
            parent_iou=_known(parent_iou[channel]),
        )
        for channel, entry in enumerate(manifest.classes)
    )


def mean_iou(values: Sequence[float | None]) -> float | None:
    """The mean of those that are known."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


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
    return (
        at_most("old mIoU drop", drop_pct, mean_limit, "points", f"{change}; {named}{missing}"),
        at_most("old class drop", worst.drop_pct or 0.0, limits.max_class_drop_pct, "points", named + missing),
    )


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


def judge_latency(latencies_ms: Sequence[float], limits: Limits) -> Check:
    """The 95th percentile of the warm runs by nearest rank: the smallest latency that 95 % of the runs keep to."""
    p95_ms = float(np.percentile(latencies_ms, 95, method="inverted_cdf"))
    detail = f"median {np.median(latencies_ms):.2f} ms of {len(latencies_ms)} warm runs"
    return at_most("latency p95", p95_ms, limits.max_latency_p95_ms, "ms", detail)


def judge_size(model_bytes: int, limits: Limits) -> Check:
    """The files of the model that was run."""
    return at_most("model size", model_bytes / (1 << 20), limits.max_model_mib, "MiB", f"{model_bytes} bytes")


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _pct(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
