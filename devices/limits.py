"""The limits that a bundle must keep to: in a device profile, in a bundle, in the options of `verify`, in a release.

1. A limit in a bundle can only make stricter what holds without it: whoever makes a bundle does not judge it.
2. Apart from the report, because an agent that polls reads releases and must not load numpy for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated

import msgspec
from msgspec import Meta

from edge_ilseg.errors import ConfigError

Percent = Annotated[float, Meta(ge=0, le=100)]
AtLeastOne = Annotated[int, Meta(ge=1)]
LimitValue = Annotated[float, Meta(ge=0)]


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a bundle must keep to; `None` sets no limit. Shares in 0..1, `_pct` in percentage points of IoU."""

    min_golden_agreement: float | None = None
    """`None` takes `edge_ilseg.devices.verdicts.GOLDEN_AGREEMENT` for the precision."""
    max_old_miou_drop_pct: float | None = None
    """`None` takes `edge_ilseg.devices.retention.MAX_OLD_MIOU_DROP_PCT` where images and a parent are given."""
    max_class_drop_pct: float | None = None
    min_new_miou_pct: float | None = None
    min_agreement_pct: float | None = None
    """Mean IoU of the old classes' masks with the parent's, on images without labels. `None` takes
    `edge_ilseg.devices.verdicts.MIN_AGREEMENT_PCT` where such images and a parent are given."""
    min_class_agreement_pct: float | None = None
    """What is kept of each single old class, on the same images; `None` sets no limit."""
    max_moved_pct: float | None = None
    """Share of the pixels that moved from an old class to a new one, on images without labels. `None` takes
    `edge_ilseg.devices.verdicts.MAX_MOVED_PCT` where such images and a parent are given."""
    max_latency_p95_ms: float | None = None
    max_rss_mib: float | None = None
    max_model_mib: float | None = None
    max_bad_images: int = 0
    """Of those with labels, and of those without."""
    min_images: AtLeastOne = 20
    """Fewer images that show an old class than this cannot decide a drop, whatever they say, and without labels keep no
    limit: the verdict is then "too few images". The background counts only where it is the one old class."""


class OwnLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Those that a device or a bundle sets beside others; `None`: not set. Names and units as in `Limits`."""

    min_golden_agreement: Annotated[float, Meta(ge=0, le=1)] | None = None
    max_old_miou_drop_pct: float | None = None
    max_class_drop_pct: float | None = None
    min_new_miou_pct: Percent | None = None
    min_agreement_pct: Percent | None = None
    min_class_agreement_pct: Percent | None = None
    max_moved_pct: Percent | None = None
    max_latency_p95_ms: LimitValue | None = None
    max_rss_mib: LimitValue | None = None
    max_model_mib: LimitValue | None = None
    max_bad_images: Annotated[int, Meta(ge=0)] | None = None
    min_images: AtLeastOne | None = None


def set_limits(limits: Limits | OwnLimits) -> dict[str, float]:
    """Those that are not `None`, by name."""
    return {name: limit for name, limit in msgspec.structs.asdict(limits).items() if limit is not None}


def tightening(asked: Mapping[str, float], held: Mapping[str, float]) -> dict[str, float]:
    """Those of `asked`, by name in `Limits`, that are no looser than what is held (rule 1)."""
    return {name: limit for name, limit in asked.items() if _stricter(name, limit, held.get(name)) == limit}


def tighten(signed: Limits, own: Mapping[str, float | None], defaults: Mapping[str, float]) -> Limits:
    """The stricter of a release's limits and others.

    Args:
        signed: limits of the release; its defaults count as signed.
        own: of this device, by name in `Limits`; `None` or a name that is missing sets none.
        defaults: what holds where a limit of the release is `None`.
    """
    found: dict[str, float | None] = msgspec.structs.asdict(signed)
    for name, limit in own.items():
        if limit is not None:
            before = found[name]
            found[name] = _stricter(name, limit, defaults.get(name) if before is None else before)
    return msgspec.convert(found, Limits)


def _stricter(name: str, limit: float, held: float | None) -> float:
    return limit if held is None else (max if name.startswith("min_") else min)(limit, held)


def check_finite(limits: msgspec.Struct, where: object = None) -> None:
    """Raise `ConfigError` for a limit that is infinite or not a number: everything would keep to it, or nothing.

    Args:
        limits: a struct of limits, by whatever names; what is not a number is passed over.
        where: the file that they come from.
    """
    for name, limit in msgspec.structs.asdict(limits).items():
        if isinstance(limit, float) and not math.isfinite(limit):
            raise ConfigError(
                f"the limit {name} is not a finite number",
                where=where,
                found=str(limit),
                expected="a finite number",
                hint="give a number, or leave the limit out",
            )
