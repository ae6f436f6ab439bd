"""Decide: verification reports in, one verdict out. Nothing here reads a file or runs a model.

1. A check that failed refuses the release, unless it tells of something else: the device's own images, the active
   model, or a device that is too busy to time anything. Then the release cannot be judged.
2. A limit that could not be measured is neither kept nor broken.
3. Something must have measured the old classes, and more of them than the background: labels or, without, at least
   `min_frames` frames in which the active model shows one. Else the release cannot be judged, however well it did.
4. With two sets of labels, one that fails refuses, and one that passes is proof enough where the other is too small.
5. Where memory ran out nothing is known of the model: that is a crash, not a failure.
6. A refusal names what was forgotten first, with its numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from msgspec.structs import replace

from edge_ilseg.devices.limits import Limits
from edge_ilseg.devices.retention import MAX_OLD_MIOU_DROP_PCT, ClassDrop, judge_class_drops, judge_drop
from edge_ilseg.devices.unlabelled import UnlabelledClass
from edge_ilseg.devices.update.gate_records import Evidence, Fall, GateSettings, GateVerdict
from edge_ilseg.devices.verdicts import judge_class_agreement, kept_share, shown_enough
from edge_ilseg.devices.verify_report import CHECKS, Check, CheckName, ClassScore, VerifyReport
from edge_ilseg.errors import EXIT_UNDECIDED

DROPS: tuple[CheckName, CheckName] = ("old mIoU drop", "old class drop")
RETENTION: frozenset[CheckName] = frozenset((*DROPS, "unlabelled agreement", "class agreement", "moved to new classes"))
MAY_BE_OPEN: tuple[CheckName, ...] = (*DROPS, "class agreement")
"""Checks that leave a release undecided where too few images show what they are about."""
NOT_ITS_FAULT: frozenset[CheckName] = frozenset(("images", "parent's golden outputs"))
"""Checks that fail because of this device or of the active model (rule 1)."""
OUT_OF_MEMORY = re.compile(r"alloc|out of memory|MemoryError", re.IGNORECASE)
"""What both runtimes say when they are refused memory."""
Direction = Literal["forward", "back", "alone"]
NAMED = 3
"""So many classes, and so many failed checks, are named in a sentence."""


class Run(NamedTuple):
    """One verification."""

    report: VerifyReport
    labels: Evidence | None
    """Whose labelled images it was given."""
    direction: Direction
    """Back: the active bundle was verified against the new one, which is older; alone: without the active one."""
    background: str | None
    """Name of that class."""


def decide(runs: Sequence[Run], settings: GateSettings, *, is_busy: bool) -> GateVerdict:
    """The verdict (rules 1 to 6).

    Args:
        runs: the first tells of the new model's outputs, speed and memory.
        settings: of the device.
        is_busy: the active model broke the limit on the latency too, at the same time.
    """
    found = [check for run in runs for check in findings(run)]
    failed = [check for check in found if check.verdict == "failed" and not _is_unmeasured(check)]
    seen = tuple(dict.fromkeys(item for run in runs for item in evidence(run, settings.min_frames)))
    facts = _facts(runs, seen)
    starved = next((check for check in failed if _is_out_of_memory(check)), None)
    if starved is not None:
        return replace(facts, outcome="crashed", reason=f"it ran out of the memory that it may take: {starved.detail}")
    faults = [check for check in failed if check.name not in NOT_ITS_FAULT]
    if faults and not (is_busy and all(check.name == "latency p95" for check in faults)):
        return replace(facts, outcome="refused", reason=_refusal(faults, facts))
    undecided = [check for check in failed if check.name in NOT_ITS_FAULT]
    if faults or undecided:
        reason = "; ".join(f"{check.name}: {check.detail}" for check in (*undecided, *faults))
        reason += "; the active model breaks this limit too: the device is busy" if faults else ""
        return replace(facts, outcome="cannot be judged", is_taken=settings.allow_unjudged, reason=reason)
    if not seen:
        reason = f"nothing here measures what was forgotten: {_why_unmeasured(runs, settings)}"
        return replace(facts, outcome="cannot be judged", is_taken=settings.allow_unjudged, reason=reason)
    open_checks = [check for name in MAY_BE_OPEN if (check := _too_few(found, name)) is not None]
    if open_checks:
        reason = "the images are too few to tell: " + "; ".join(f"{item.name} {_shown(item)}" for item in open_checks)
        return replace(facts, outcome="too few images", is_taken=settings.accept_too_few, reason=reason)
    return replace(facts, outcome="passed", is_taken=True, reason=_success(facts))


def findings(run: Run) -> tuple[Check, ...]:
    """The checks of a run that tell of the new bundle, as if it had been the one verified.

    A frame that cannot be read is none of them: a camera writes while the gate reads, and rule 3 counts the others.
    """
    single = _class_agreement(run)
    if run.direction != "back":
        others = (check for check in run.report.checks if check.name != "unlabelled images")
        return tuple(single if check.name == single.name else check for check in others)
    checks = {check.name: check for check in run.report.checks}
    kept = [checks[name] for name in ("images", "unlabelled agreement")]
    kept.append(replace(checks["golden outputs"], name="parent's golden outputs"))
    broken = [check for name in ("integrity", "fit") if (check := checks[name]).verdict == "failed"]
    return (*(replace(check, name="images") for check in broken), *kept, single, *_drops_back(run.report))


def _class_agreement(run: Run) -> Check:
    """What was kept of single classes on the frames: how many it takes is said by rule 3, what they cannot measure is
    open."""
    frames, limits = run.report.unlabelled, run.report.limits
    if frames is None:
        return run.report.check("class agreement")
    check = judge_class_agreement(frames, limits, is_back=run.direction == "back")
    if check.verdict != "failed" or check.value is not None:
        return check
    return replace(check, verdict="too few images", exit_code=EXIT_UNDECIDED)


def evidence(run: Run, min_frames: int) -> tuple[Evidence, ...]:
    """What of a run has measured old classes beside the background (rule 3)."""
    found: list[Evidence] = []
    report = run.report
    if run.labels is not None and run.direction != "alone" and report.scores is not None:
        old = [item for item in report.scores.classes if item.is_old and item.drop_pct is not None]
        if any(item.pixels and item.name != run.background for item in old):
            found.append(run.labels)
    frames = report.unlabelled
    if frames is not None and frames.images_of_old >= min_frames:
        shown = [item for item in frames.classes if item.agreement is not None or item.moved is not None]
        if any(item.name != run.background and item.parent_pixels for item in shown):
            found.append("frames")
    return tuple(found)


def falls(run: Run) -> tuple[Fall, ...]:
    """The old classes that fell, the gravest first; none is forgotten where the images are too few to say so."""
    scores = run.report.scores
    if scores is None or run.direction == "alone":
        return ()
    limits = run.report.limits
    is_decided = scores.images_of_old >= limits.min_images
    mean_limit = MAX_OLD_MIOU_DROP_PCT if limits.max_old_miou_drop_pct is None else limits.max_old_miou_drop_pct
    limit = mean_limit if limits.max_class_drop_pct is None else limits.max_class_drop_pct
    found = []
    for item in scores.classes:
        change = _change(item, is_back=run.direction == "back")
        if change is None:
            continue
        is_beyond = change.drop_pct > limit and (change.low_pct is None or change.low_pct > limit)
        is_forgotten = is_decided and is_beyond
        if is_forgotten or (change.low_pct is not None and change.low_pct > 0):
            found.append(replace(change, is_forgotten=is_forgotten))
    return tuple(sorted(found, key=lambda item: -item.drop_pct))


def _change(item: ClassScore, *, is_back: bool) -> Fall | None:
    if not item.is_old or item.iou is None or item.parent_iou is None:
        return None
    before, after, low, high = item.parent_iou, item.iou, item.drop_low_pct, item.drop_high_pct
    if is_back:
        before, after = after, before
        low, high = (None if high is None else -high), (None if low is None else -low)
    return Fall(item.name, 100 * before, 100 * after, 100 * (before - after), low, high, is_forgotten=False)


def _drops_back(report: VerifyReport) -> tuple[Check, ...]:
    """The two checks of retention, read the other way round: what would be lost by going back."""
    mean = report.check("old mIoU drop")
    scores, limits = report.scores, report.limits
    if mean.value is None or scores is None:
        return (mean, report.check("old class drop"))
    low, high = mean.low, mean.high
    ends = (None if high is None else -high, None if low is None else -low)
    limit = MAX_OLD_MIOU_DROP_PCT if limits.max_old_miou_drop_pct is None else limits.max_old_miou_drop_pct
    before_pct, after_pct = 100 * (scores.miou_old or 0.0), 100 * (scores.parent_miou_old or 0.0)
    drop = judge_drop(
        "old mIoU drop",
        -mean.value,
        ends,
        limit,
        f"{before_pct:.1f} -> {after_pct:.1f} %",
        images=scores.images_of_old,
        min_images=limits.min_images,
    )
    drops = [
        ClassDrop(
            change.name,
            change.before_pct,
            change.after_pct,
            change.drop_pct,
            change.low_pct,
            change.high_pct,
            item.images or 0,
        )
        for item in scores.classes
        if (change := _change(item, is_back=True)) is not None
    ]
    return drop, judge_class_drops(drops, scores.unmeasured_old, limits, images_of_old=scores.images_of_old)


def _facts(runs: Sequence[Run], seen: tuple[Evidence, ...]) -> GateVerdict:
    """All numbers, of a verdict that is still to come."""
    first = runs[0].report
    compared = [run for run in runs if run.labels is not None and run.direction != "alone"]
    told = max(compared, key=_gravity, default=None)
    drop = next((check for check in findings(told) if check.name == "old mIoU drop"), None) if told else None
    scores = told.report.scores if told else None
    ends = (scores.parent_miou_old, scores.miou_old) if scores else (None, None)
    before, after = ends[::-1] if told and told.direction == "back" else ends
    frames = next((run.report.unlabelled for run in runs if run.report.unlabelled is not None), None)
    new = next((check.value for run in runs for check in findings(run) if _tells_new(check)), None)
    counted = [run.report.scores.images_counted for run in runs if run.report.scores and run.direction != "alone"]
    return GateVerdict(
        outcome="cannot be judged",
        is_taken=False,
        reason="",
        evidence=seen,
        images=sum(counted) + (frames.images_counted if frames else 0),
        old_miou_before_pct=_pct(before),
        old_miou_after_pct=_pct(after),
        old_miou_drop_pct=drop.value if drop else None,
        drop_low_pct=drop.low if drop else None,
        drop_high_pct=drop.high if drop else None,
        falls=falls(told) if told else (),
        new_miou_pct=new,
        disagreeing=tuple(name for run in runs for name in _disagreeing(run)),
        agreement_pct=_pct(frames.agreement) if frames else None,
        moved_pct=_pct(frames.moved) if frames else None,
        golden_agreement=first.check("golden outputs").value,
        latency_p95_ms=first.check("latency p95").value,
        peak_rss_mib=first.peak_rss_mib,
        runtime=first.model.runtime if first.model else None,
        precision=first.model.precision if first.model else None,
    )


def _disagreeing(run: Run) -> tuple[str, ...]:
    """Old classes that are beyond a limit which the frames have broken, in the mean or for one class; gravest first."""
    frames, is_back = run.report.unlabelled, run.direction == "back"
    if frames is None:
        return ()
    broken = {
        check.name: check.limit
        for check in findings(run)
        if check.verdict == "failed" and check.value is not None and check.limit is not None
    }
    names: list[UnlabelledClass] = []
    if (limit := broken.get("unlabelled agreement")) is not None:
        names += [item for item in frames.classes if item.agreement is not None and 100 * item.agreement < limit]
    if (limit := broken.get("class agreement")) is not None:
        enough = shown_enough(frames, run.report.limits, is_back=is_back)
        names += [item for item in enough if 100 * kept_share(item, is_back=is_back) < limit]
    if (limit := broken.get("moved to new classes")) is not None:
        others = [item for item in frames.classes if item.name != run.background]
        names += [item for item in others if item.moved is not None and 100 * item.moved > limit]
    names.sort(key=lambda item: kept_share(item, is_back=is_back))
    return tuple(dict.fromkeys(item.name for item in names))


def _tells_new(check: Check) -> bool:
    return check.name == "new mIoU" and check.value is not None


def _gravity(run: Run) -> tuple[int, float]:
    """Of several sets of labels, the one that tells of the gravest drop."""
    order = ("not checked", "passed", "too few images", "failed")
    drops = [check for check in findings(run) if check.name in DROPS]
    return max(order.index(check.verdict) for check in drops), max(check.value or 0.0 for check in drops)


def _is_unmeasured(check: Check) -> bool:
    """Rule 2: it has a limit and no value. An error that ended a check leaves neither."""
    return check.value is None and check.limit is not None


def _is_out_of_memory(check: Check) -> bool:
    return check.value is None and check.limit is None and OUT_OF_MEMORY.search(check.detail) is not None


def _too_few(found: Iterable[Check], name: CheckName) -> Check | None:
    """The check of that name that is undecided, unless another set of images has decided it (rule 4)."""
    checks = [check for check in found if check.name == name]
    if any(check.verdict == "passed" for check in checks):
        return None
    return next((check for check in checks if check.verdict == "too few images"), None)


def _refusal(faults: Sequence[Check], facts: GateVerdict) -> str:
    """Rule 6."""
    ordered = sorted(faults, key=lambda check: (check.name not in RETENTION, CHECKS.index(check.name)))
    parts = list(dict.fromkeys(f"{check.name} {_shown(check)}" for check in ordered))[:NAMED]
    forgotten = [item for item in facts.falls if item.is_forgotten][:NAMED]
    if forgotten and any(check.name in DROPS for check in faults):
        names = ", ".join(f"{item.name} {item.before_pct:.1f} -> {item.after_pct:.1f} %" for item in forgotten)
        more = sum(item.is_forgotten for item in facts.falls) - len(forgotten)
        parts.insert(0, f"it forgot {names}" + (f" and {more} more" if more > 0 else ""))
    elif facts.disagreeing:
        parts.insert(0, f"the active model sees {', '.join(facts.disagreeing[:NAMED])} otherwise")
    return "; ".join(parts)


def _shown(check: Check) -> str:
    """Value, interval and limit of a check; what an error said, where there is no value."""
    if check.value is None:
        return f"({check.detail})"
    ends = "" if check.low is None or check.high is None else f", 95 % interval {check.low:.1f} to {check.high:.1f}"
    detail = "" if check.name in DROPS else f"; {check.detail}"
    return f"{check.value:.4g} {check.unit} (limit {check.limit:g}{ends}{detail})"


def _success(facts: GateVerdict) -> str:
    parts = []
    if facts.old_miou_drop_pct is not None and facts.drop_high_pct is not None:
        before, after = facts.old_miou_before_pct or 0.0, facts.old_miou_after_pct or 0.0
        parts.append(
            f"old mIoU {before:.1f} -> {after:.1f} %, drop at most {facts.drop_high_pct:.1f} points with 95 % certainty"
        )
    if "frames" in facts.evidence and facts.agreement_pct is not None:
        parts.append(f"agreement with the active model {facts.agreement_pct:.1f} %")
    return "; ".join((*parts, f"{facts.images} images"))


def _why_unmeasured(runs: Sequence[Run], settings: GateSettings) -> str:
    if all(run.direction == "alone" for run in runs):
        return "there is no active model to compare with"
    frames = next((run.report.unlabelled for run in runs if run.report.unlabelled is not None), None)
    if frames is not None and 0 < frames.images_of_old < settings.min_frames:
        counted = f"{frames.images_of_old} of {frames.images_counted} frames show an old class"
        return f"{counted}, and {settings.min_frames} that do are needed"
    if frames is not None or any(run.labels is not None for run in runs):
        return "the images show none of the old classes but the background"
    return "the release ships no labelled images, and [gate] names neither data nor images"


def _pct(share: float | None) -> float | None:
    return None if share is None else 100 * share


def limits_for(limits: Limits, *, labels: bool, parent: bool, frames: bool) -> Limits:
    """Those limits that can be measured with what is given (rule 2)."""
    needs = {
        "max_old_miou_drop_pct": labels and parent,
        "max_class_drop_pct": labels and parent,
        "min_new_miou_pct": labels,
        "min_agreement_pct": frames and parent,
        "min_class_agreement_pct": frames and parent,
        "max_moved_pct": frames and parent,
    }
    return replace(limits, **{name: None for name, can_be in needs.items() if not can_be})
