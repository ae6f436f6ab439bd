"""The limits that a bundle must keep to: in a device profile, in the options of `verify`, signed into a release.

Apart from the report, because an agent that polls reads releases and must not load numpy for it.
"""

from __future__ import annotations

import math
from typing import Annotated

import msgspec
from msgspec import Meta

from edge_ilseg.errors import ConfigError


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
    max_moved_pct: float | None = None
    """Share of the pixels that moved from an old class to a new one, on images without labels. `None` takes
    `edge_ilseg.devices.verdicts.MAX_MOVED_PCT` where such images and a parent are given."""
    max_latency_p95_ms: float | None = None
    max_rss_mib: float | None = None
    max_model_mib: float | None = None
    max_bad_images: int = 0
    """Of those with labels, and of those without."""
    min_images: Annotated[int, Meta(ge=1)] = 20
    """Fewer images that show an old class than this cannot decide a drop, whatever they say: its verdict is then
    "too few images". The background counts only where it is the one old class."""


DEFAULT_MIN_IMAGES = Limits().min_images


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
