"""May this bundle go out? Decided from the verification reports alone, without I/O.

1. A report counts when it is about the very bundle that the workspace holds; with no bundle here, about the step.
2. The gravest report decides: not usable, over other arithmetic, over a broken limit, over too few images, over passed.
3. A pass in which old classes were not compared with the parent's is no yes: what a step has forgotten is then unknown.
   Step 0 has no parent, and nothing to forget.
4. Without a report nobody has judged, and the page says so.
"""

from __future__ import annotations

from collections.abc import Sequence

from edge_ilseg.devices.verify_report import GRAVITY, Check, VerifyReport
from edge_ilseg.errors import EXIT_ARTEFACT, EXIT_PARITY, EXIT_PASSED, EXIT_RETENTION, EXIT_UNDECIDED
from edge_ilseg.report.blocks import Banner, VerdictKind
from edge_ilseg.report.charts import MINUS
from edge_ilseg.report.gather import Gathered, Verification

KINDS: dict[int, VerdictKind] = {
    EXIT_PASSED: "passed",
    EXIT_UNDECIDED: "undecided",
    EXIT_RETENTION: "failed",
    EXIT_PARITY: "failed",
    EXIT_ARTEFACT: "failed",
}
TEXTS = {
    EXIT_PASSED: ("May go out", "Every check of every verification passed."),
    EXIT_UNDECIDED: ("Not decided", "Nothing is broken, and the images are too few to tell what was forgotten."),
    EXIT_RETENTION: ("May not go out", "A limit is broken."),
    EXIT_PARITY: ("May not go out", "A device does not compute what the exporting machine computed."),
    EXIT_ARTEFACT: ("May not go out", "The bundle, the images or a device could not be used."),
}


def counted(gathered: Gathered) -> tuple[Verification, ...]:
    """The reports that count (rule 1)."""
    bundle = gathered.step.bundle
    return tuple(
        item
        for item in gathered.verifications
        if bundle is None or item.report.bundle.bundle_id in (None, bundle.bundle_id)
    )


def judge(gathered: Gathered) -> Banner:
    """The verdict on the step (rules 1 to 4)."""
    items = counted(gathered)
    if not items:
        stale = len(gathered.verifications)
        return Banner(
            "unknown",
            "Not judged yet",
            f"The {stale} verification reports here are about another bundle of this step."
            if stale
            else "No verification report of this step was found.",
            ("Verify the bundle, and keep what it prints: edge-ilseg verify BUNDLE --data KIND:ROOT "
             "--against PARENT --json > reports/NAME.json",),
        )  # fmt: skip
    gravest = max((item.report.exit_code for item in items), key=GRAVITY.index)
    text, sentence = TEXTS[gravest]
    if gravest == EXIT_PASSED and gathered.step.record.parent_id is not None:
        compared = [item for item in items if item.report.is_retention_checked]
        if not compared:
            return Banner(
                "unknown",
                "Not judged yet",
                "What was checked passed, but the old classes were not compared with the parent's.",
                ("Verify with --data KIND:ROOT and --against PARENT.",),
            )
    return Banner(KINDS[gravest], text, sentence, _reasons(items, gravest))


def _reasons(items: Sequence[Verification], gravest: int) -> tuple[str, ...]:
    if gravest == EXIT_PASSED:
        return ()
    return tuple(
        f"{check_text(check)} ({device_name(item.report)})"
        for item in items
        for check in item.report.checks
        if check.exit_code == gravest
    )


def check_text(check: Check) -> str:
    """One check in a line: name, value with its interval, limit; its own words where it has no value."""
    if check.value is None or check.limit is None:
        return f"{check.name}: {check.detail}"
    between = f", 95 % interval {check.low:.1f} to {check.high:.1f}" if None not in (check.low, check.high) else ""
    text = f"{check.name}: {check.value:.4g} {check.unit}{between}; the limit is {check.limit:.4g}".replace("-", MINUS)
    return f"{text}; {check.detail}" if check.verdict == "too few images" else text


def device_name(report: VerifyReport) -> str:
    """`"Cortex-A76, onnxruntime int8"`: which device, which model."""
    device = report.device.processor or report.device.machine or "a device"
    model = f", {report.model.runtime} {report.model.precision}" if report.model is not None else ""
    return f"{device}{model}"
