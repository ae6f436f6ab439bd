"""Decide what an update has forgotten: drops and their intervals in, verdicts out. Nothing here reads or runs anything.

1. Old classes are compared on the pixels whose truth is an old class, over the classes that have such a pixel: the same
   pixels and the same classes for a bundle and its parent.
2. A drop is judged by its 95 % interval over images: it passes when the whole interval is within the limit, fails when
   the whole interval is beyond it, and in between the images are too few to tell. That is no pass.
3. Fewer than `min_images` images that show an old class decide nothing, whatever they say: images on which a bundle and
   its parent agree give an interval without any width, and two of them are no proof. Of a single class,
   `MIN_CLASS_IMAGES` must show it.
4. Of an old class that no image shows nothing is known. Where a limit is set for each class, that is no pass either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from msgspec.structs import replace

from edge_ilseg.devices.limits import Limits
from edge_ilseg.devices.verify_report import GRAVITY, Check, CheckName, Scores, Verdict
from edge_ilseg.errors import EXIT_ARTEFACT, EXIT_PASSED, EXIT_RETENTION, EXIT_UNDECIDED

EXIT_OF: dict[Verdict, int] = {
    "passed": EXIT_PASSED,
    "failed": EXIT_RETENTION,
    "too few images": EXIT_UNDECIDED,
    "not checked": EXIT_PASSED,
}
"""What the verdict on a drop asks for."""

MAX_OLD_MIOU_DROP_PCT = 2.0
"""Percentage points of old-class mIoU that an update may lose against its parent, unless another limit is given."""
MIN_CLASS_IMAGES = 5
"""Fewer images that show a class decide nothing about that class alone, unless `Limits.min_images` is lower still.

Chosen: single classes of a test set of some hundred images are in ten to twenty of them, so that `min_images` for each
would leave most sets undecided; below five, a sample drawn from the images is often the same image over and over.
"""


class ClassDrop(NamedTuple):
    """An old class before and after, per cent; its drop, points, and the ends of its interval, None: too few images."""

    name: str
    before_pct: float
    after_pct: float
    drop_pct: float
    low_pct: float | None
    high_pct: float | None
    images: int
    """That show it."""


def judge_retention(scores: Scores, limits: Limits, *, is_compared: bool) -> tuple[Check, Check]:
    """The drop of the old-class mIoU and that of the most forgotten class, in percentage points (rules 1 to 4).

    The drop is the parent's mIoU over the old classes minus the bundle's, on the same images, on this device, by the
    definition in `ClassScore`: an old pixel that turned into a new class counts as lost, a new object that is not found
    does not. Where no image shows an old class, a limit is not kept but broken.
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
    drops = [
        ClassDrop(
            item.name,
            100 * item.parent_iou,
            100 * item.iou,
            100 * (item.parent_iou - item.iou),
            item.drop_low_pct,
            item.drop_high_pct,
            item.images or 0,
        )
        for item in old
        if item.iou is not None and item.parent_iou is not None
    ]
    worst = max(drops, key=lambda item: item.drop_pct)
    missing = f"; not in these images: {', '.join(scores.unmeasured_old)}" if scores.unmeasured_old else ""
    mean = judge_drop(
        "old mIoU drop",
        100 * (scores.parent_miou_old - scores.miou_old),
        (scores.drop_low_pct, scores.drop_high_pct),
        mean_limit,
        f"{100 * scores.parent_miou_old:.1f} -> {100 * scores.miou_old:.1f} %; most forgotten: {shown_drop(worst)}"
        f"{missing}",
        images=scores.images_of_old,
        min_images=limits.min_images,
    )
    return mean, judge_class_drops(drops, scores.unmeasured_old, limits, images_of_old=scores.images_of_old)


def judge_drop(
    name: CheckName,
    drop_pct: float,
    ends: tuple[float | None, float | None],
    limit: float | None,
    detail: str,
    *,
    images: int,
    min_images: int,
) -> Check:
    """Judge a drop by the ends of its 95 % interval (rules 2 and 3).

    Args:
        name: of the check.
        drop_pct: the drop on these images, points.
        ends: of its interval; None where the images are too few for one.
        limit: the highest drop that is allowed; None: it is shown and not checked.
        detail: for a person.
        images: that it rests on.
        min_images: fewer decide nothing.
    """
    low, high = ends
    if limit is None:
        return Check(name, "not checked", f"no limit set; {detail}", drop_pct, None, "points", 0, low, high)
    if low is None or high is None:
        text = f"no interval can be given: too few images show an old class; {detail}"
        return Check(name, "too few images", text, drop_pct, limit, "points", EXIT_UNDECIDED)
    between = f"95 % interval {low:.2f} to {high:.2f}; {detail}"
    if images < min_images:
        count = f"{images} image{'s' if images != 1 else ''}, and {min_images} are needed"
        return Check(
            name, "too few images", f"{count}; {between}", drop_pct, limit, "points", EXIT_UNDECIDED, low, high
        )
    verdict: Verdict = "passed" if high <= limit else "failed" if low > limit else "too few images"
    if not np.isfinite([drop_pct, limit]).all():
        verdict = "failed"
    return Check(name, verdict, between, drop_pct, limit, "points", EXIT_OF[verdict], low, high)


def judge_class_drops(
    drops: Sequence[ClassDrop], unseen: Sequence[str], limits: Limits, *, images_of_old: int
) -> Check:
    """The class that is gravest under the limit, and, among those, the one that has lost most (rules 2 to 4).

    Args:
        drops: of the old classes that an image shows, one at least.
        unseen: names of the others.
        limits: for each class, and the number of images.
        images_of_old: images that show any old class.
    """
    limit, enough = limits.max_class_drop_pct, images_of_old >= limits.min_images
    missing = f"; not in these images: {', '.join(unseen)}" if unseen else ""
    checks = [
        judge_drop(
            "old class drop",
            item.drop_pct,
            (item.low_pct, item.high_pct),
            limit,
            f"{shown_drop(item)}{missing}",
            images=item.images if enough else images_of_old,
            min_images=min(MIN_CLASS_IMAGES, limits.min_images) if enough else limits.min_images,
        )
        for item in drops
    ]
    gravest = max(checks, key=lambda check: (GRAVITY.index(check.exit_code), check.value or 0.0))
    if limit is None or not unseen or gravest.verdict != "passed":
        return gravest
    text = f"no image shows {', '.join(unseen)}: nothing is known of what became of it; {gravest.detail}"
    return replace(gravest, verdict="too few images", exit_code=EXIT_UNDECIDED, detail=text)


def shown_drop(item: ClassDrop) -> str:
    """`"grass 88.1 -> 12.0 %"`."""
    return f"{item.name} {item.before_pct:.1f} -> {item.after_pct:.1f} %"
