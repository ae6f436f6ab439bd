"""What a verification leaves behind: every check with its verdict, and every number that the verdicts rest on.

1. Every report lists all checks of `CHECKS`, in that order; one that did not run is "not checked" and
   says why.
2. The exit code of the report is that of its gravest check: artefact or environment (3) over parity (2) over retention
   and the other limits (1) over too few images to tell (4).
3. A limit that the images given cannot measure is a failure, never a pass.
4. A verdict without the facts of its device proves nothing: no such report is written.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import msgspec

from edge_ilseg.bundle import Precision, Runtime
from edge_ilseg.devices.facts import DeviceFacts, lacking_facts
from edge_ilseg.devices.layers import ExecutedLayer
from edge_ilseg.devices.limits import Limits
from edge_ilseg.devices.unlabelled import Unlabelled
from edge_ilseg.errors import (
    EXIT_ARTEFACT,
    EXIT_PARITY,
    EXIT_PASSED,
    EXIT_RETENTION,
    EXIT_UNDECIDED,
    ReportError,
)
from edge_ilseg.metrics import Metrics
from edge_ilseg.records import parse_versioned

REPORT_FORMAT = "edge-ilseg-verify-report"
REPORT_FORMAT_VERSION = 5
VERIFY_AGAIN = "verify the bundle again and keep what --json prints"

CheckName = Literal[
    "integrity",
    "fit",
    "golden outputs",
    "parent's golden outputs",
    "encoder identity",
    "images",
    "old mIoU drop",
    "old class drop",
    "new mIoU",
    "unlabelled images",
    "unlabelled agreement",
    "class agreement",
    "moved to new classes",
    "latency p95",
    "peak memory",
    "model size",
]
CHECKS: tuple[CheckName, ...] = get_args(CheckName)

GRAVITY = (EXIT_PASSED, EXIT_UNDECIDED, EXIT_RETENTION, EXIT_PARITY, EXIT_ARTEFACT)
"""Exit codes, the gravest last (rule 2)."""

Verdict = Literal["passed", "failed", "too few images", "not checked"]
Confusion = tuple[tuple[int, ...], ...]


class Check(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One check. `value`, its 95 % interval from `low` to `high`, and `limit` are in `unit`; `exit_code` is what any
    verdict but passed asks for, 0 otherwise."""

    name: CheckName
    verdict: Verdict
    detail: str
    value: float | None = None
    limit: float | None = None
    unit: str = ""
    exit_code: int = 0
    low: float | None = None
    high: float | None = None


class BadImage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An image that could not be used, and why."""

    image_id: str
    reason: str


class ClassScore(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One class of the bundle on this device.

    The IoU of an old class is taken over the pixels whose truth is an old class, for the bundle and its parent alike
    (`edge_ilseg.metrics.retention_confusion`); that of a new class over all pixels. `None` where no pixel is of it.
    """

    name: str
    step: int
    is_old: bool
    pixels: int
    iou: float | None
    parent_iou: float | None
    drop_low_pct: float | None = None
    drop_high_pct: float | None = None
    """Ends of the drop's 95 % interval over images; None where too few images show the class."""
    images: int | None = None
    """That show the class; None for a new one."""

    @property
    def drop_pct(self) -> float | None:
        """Percentage points that the class has lost against the parent; negative for a gain."""
        if self.iou is None or self.parent_iou is None:
            return None
        return 100 * (self.parent_iou - self.iou)


class BundleFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which bundle, and which step it was made from."""

    folder: str
    bundle_id: str | None = None
    step_name: str | None = None
    step_index: int | None = None
    step_id: str | None = None


class ModelFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which model of the bundle was run, by what."""

    runtime: Runtime
    precision: Precision
    runtime_version: str
    executed_precisions: dict[str, int] | None
    threads: int | None
    input_height_px: int
    input_width_px: int
    model_bytes: int


class GoldenLoss(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Shares of an int8 model's golden pixels that change, in 0..1, one number a golden image: `golden_loss.py`."""

    device: tuple[float, ...] | None
    """Between simulated int8 and this device's kernels; None: the runtime cannot simulate."""
    quantization: tuple[float, ...] | None
    """Between fp32 and simulated int8; None: that, or the bundle has no fp32."""
    reason: str | None
    """Why a part is missing."""

    @property
    def mean_device(self) -> float | None:
        """Mean over the golden images."""
        return sum(self.device) / len(self.device) if self.device else None

    @property
    def mean_quantization(self) -> float | None:
        """Mean over the golden images."""
        return sum(self.quantization) / len(self.quantization) if self.quantization else None


class Scores(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was counted on labelled images. Confusion matrices are in the bundle's channels, rows are the truth."""

    dataset: str
    split: str
    images_asked: int
    images_counted: int
    images_of_old: int
    """Those counted that show an old class: what a drop rests on. The background counts only where there is no other.
    """
    image_ids_sha256: str
    bad_images: tuple[BadImage, ...]
    classes: tuple[ClassScore, ...]
    metrics: Metrics
    miou_old: float | None
    """Over the old classes that have pixels, by the definition in `ClassScore`."""
    parent_miou_old: float | None
    drop_low_pct: float | None
    drop_high_pct: float | None
    """Ends of the 95 % interval of the drop of the old mIoU: `edge_ilseg.devices.bootstrap`. None: too few images."""
    confusion: Confusion
    parent_confusion: Confusion | None
    latency_median_ms: float | None
    """One run an image, between decoding images: a cold cache, unlike `VerifyReport.latencies_ms`."""

    @property
    def unmeasured_old(self) -> tuple[str, ...]:
        """Old classes that no pixel of these images is truly of: nothing is known of their retention."""
        return tuple(item.name for item in self.classes if item.is_old and not item.pixels)


class VerifyReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The verdict on one bundle on one device."""

    format: Literal["edge-ilseg-verify-report"]
    format_version: int
    created: str
    """UTC, ISO 8601."""
    exit_code: int
    """0 passed, 1 retention or another limit, 2 parity, 3 artefact or environment, 4 too few images to tell."""
    checks: tuple[Check, ...]
    limits: Limits
    bundle: BundleFacts
    parent: BundleFacts | None
    model: ModelFacts | None
    executed_layers: tuple[ExecutedLayer, ...] | None
    """Of the model, in the order in which they ran; None where the runtime did not tell."""
    golden_loss: GoldenLoss | None
    parent_golden_loss: GoldenLoss | None
    """Where the golden masks of an int8 model change, its own and its parent's; None: not int8, or not run."""
    scores: Scores | None
    unlabelled: Unlabelled | None
    latencies_ms: tuple[float, ...]
    """Warm runs of one golden image, in the order in which they ran."""
    peak_rss_mib: float | None
    """Highest resident memory of a process that only loads this model and runs it on the golden images."""
    device: DeviceFacts

    def check(self, name: CheckName) -> Check:
        """The check of that name."""
        return self.checks[CHECKS.index(name)]

    @property
    def is_retention_checked(self) -> bool:
        """Whether the old classes were compared with the parent's."""
        return self.check("old mIoU drop").verdict != "not checked"


def exit_code_of(checks: Iterable[Check]) -> int:
    """The exit code of the gravest check (rule 2)."""
    return max((check.exit_code for check in checks), key=GRAVITY.index)


def check_device(device: DeviceFacts | None) -> None:
    """Raise `ReportError` where too little is known of a device to say whose verdict a report has (rule 4)."""
    if device is None:
        lacking: tuple[str, ...] = ("everything",)
        found = "no facts at all"
    else:
        lacking = lacking_facts(device)
        found = "; ".join(f"{name}: {reason}" for name, reason in sorted(device.missing.items())) or "no reason"
    if lacking:
        raise ReportError(
            f"this device does not tell what it is, and a report without that is not written: {', '.join(lacking)}",
            found=found,
            expected="the machine, its processor or int8 flags, its cores and its memory",
            hint="run it where /proc can be read, and see: edge-ilseg device facts",
        )


def encode_report(report: VerifyReport) -> bytes:
    """The report as JSON.

    Raises:
        ReportError: too little is known of the device (rule 4).
    """
    check_device(report.device)
    return msgspec.json.format(msgspec.json.encode(report), indent=2)


def parse_report(data: bytes, *, where: object = None) -> VerifyReport:
    """Turn JSON from `encode_report` into a report again.

    Raises:
        ReportError: not such a report, of another version, or one that breaks rule 1 or 2.
    """
    report = parse_versioned(
        data,
        VerifyReport,
        format=REPORT_FORMAT,
        version=REPORT_FORMAT_VERSION,
        error=ReportError,
        what="the report",
        where=where,
        hint=VERIFY_AGAIN,
    )
    names = tuple(check.name for check in report.checks)
    if names != CHECKS:
        raise ReportError(
            "the report does not list every check",
            where=where,
            found=", ".join(names),
            expected=", ".join(CHECKS),
            hint=VERIFY_AGAIN,
        )
    gravest = exit_code_of(report.checks)
    if report.exit_code != gravest:
        raise ReportError(
            "the exit code of the report is not that of its checks",
            where=where,
            found=report.exit_code,
            expected=gravest,
            hint=VERIFY_AGAIN,
        )
    return report
