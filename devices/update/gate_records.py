"""What the gate is told, and what it answers. Plain data: an agent reads it without numpy or a runtime.

1. Limits in the bundle and a device's own make what is signed stricter, never looser; what stands where a limit is
   left out counts as signed.
2. A verdict carries every number that it rests on, in per cent and points, so that the history can be read alone.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edge_ilseg.devices.limits import AtLeastOne, Limits, OwnLimits

DEFAULT_MIN_AGREEMENT_PCT = 80.0
DEFAULT_MAX_MOVED_PCT = 10.0
"""What the device's own frames must show where no limit says it, and no labels do: a class of five that is forgotten
whole takes 20 points of agreement, or moves to a new class."""

Outcome = Literal["passed", "refused", "too few images", "cannot be judged", "crashed"]
Evidence = Literal["own labels", "shipped labels", "frames"]
RuntimeName = Literal["onnxruntime", "openvino"]
PrecisionName = Literal["fp32", "fp16", "int8"]
"""`edge_ilseg.bundle` has the same; importing it takes numpy."""


class GateSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a device judges a release: `[gate]` of agent.toml, and `[limits]`."""

    data: str | None = None
    """The device's own labelled images: `folder:/path`, or another kind of data set."""
    split: str | None = None
    """Which of them; left out: `test`, `val`, or the only one."""
    images: str | None = None
    """A folder of the device's own frames, without labels."""
    runtime: RuntimeName | None = None
    """The one that the application uses. `None`: the first installed that both bundles have a model for."""
    precision: PrecisionName | None = None
    profile: str | None = None
    """A device profile: threads, preferences, and limits."""
    threads: AtLeastOne | None = None
    timeout_s: Annotated[float, Meta(gt=0)] = 900.0
    memory_mib: Annotated[int, Meta(ge=64)] = 1024
    """Resident memory of all processes of the gate together."""
    max_images: AtLeastOne | None = None
    """At most so many of each set, evenly spread."""
    min_frames: AtLeastOne = 10
    """Fewer frames without labels prove nothing."""
    latency_runs: AtLeastOne = 30
    nice: Annotated[int, Meta(ge=0, le=19)] = 10
    """The application goes first. On a busy device that makes latencies look higher, never lower."""
    allow_unjudged: bool = False
    """Take a release that nothing here can judge."""
    accept_too_few: bool = False
    """Take a release that broke no limit, and for which the images were too few to tell."""
    limits: OwnLimits = OwnLimits()


class GateRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the child process is asked."""

    slot: str
    active: str | None
    """Slot of the model that runs now."""
    bundle_id: str
    limits: Limits
    """As signed."""
    settings: GateSettings
    work: str
    agent_pid: int
    """The child ends with it."""
    data_limit_mib: int
    """Private memory of one process."""
    cpu_limit_s: int
    file_limit_mib: int
    """Of one file that is written: a runtime that logs without end does not fill the disk."""


class Fall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An old class that has lost IoU: before, after, and the 95 % interval of the drop, points."""

    name: str
    before_pct: float
    after_pct: float
    drop_pct: float
    low_pct: float | None
    high_pct: float | None
    is_forgotten: bool
    """Beyond a limit, not only lower."""


class GateVerdict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the gate says of a release, and by which numbers."""

    outcome: Outcome
    is_taken: bool
    reason: str
    """One sentence."""
    evidence: tuple[Evidence, ...] = ()
    """What measured the old classes."""
    images: int = 0
    """That were counted."""
    old_miou_before_pct: float | None = None
    old_miou_after_pct: float | None = None
    old_miou_drop_pct: float | None = None
    drop_low_pct: float | None = None
    drop_high_pct: float | None = None
    falls: tuple[Fall, ...] = ()
    """Old classes that certainly fell (the whole interval above zero) or fell beyond a limit; the gravest first."""
    new_miou_pct: float | None = None
    disagreeing: tuple[str, ...] = ()
    """Old classes that the active model sees otherwise on the frames, beyond a limit; the gravest first."""
    agreement_pct: float | None = None
    moved_pct: float | None = None
    golden_agreement: float | None = None
    latency_p95_ms: float | None = None
    peak_rss_mib: float | None = None
    runtime: str | None = None
    precision: str | None = None
    seconds: float = 0.0

    @property
    def forgotten(self) -> tuple[str, ...]:
        """Names of the classes that broke a limit, by labels or by frames."""
        return tuple(dict.fromkeys((*(item.name for item in self.falls if item.is_forgotten), *self.disagreeing)))

    @property
    def is_final(self) -> bool:
        """Whether running the gate again would say the same: not after a crash, or when it could not judge."""
        return self.outcome not in ("crashed", "cannot be judged") or self.is_taken
