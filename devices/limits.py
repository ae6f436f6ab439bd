"""The limits that a bundle must keep to: in a device profile, in the options of `verify`, signed into a release.

Apart from the report, because an agent that polls reads releases and must not load numpy for it.
"""

from __future__ import annotations

import msgspec


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a bundle must keep to; `None` sets no limit. Shares in 0..1, `_pct` in percentage points of IoU."""

    min_golden_agreement: float | None = None
    """`None` takes `edge_ilseg.devices.verdicts.GOLDEN_AGREEMENT` for the precision."""
    max_old_miou_drop_pct: float | None = None
    """`None` takes `edge_ilseg.devices.verdicts.MAX_OLD_MIOU_DROP_PCT` where images and a parent are given."""
    max_class_drop_pct: float | None = None
    min_new_miou_pct: float | None = None
    min_agreement_pct: float | None = None
    """Mean IoU of the old classes' masks with the parent's, on images without labels."""
    max_moved_pct: float | None = None
    """Share of the pixels that moved from an old class to a new one, on images without labels."""
    max_latency_p95_ms: float | None = None
    max_rss_mib: float | None = None
    max_model_mib: float | None = None
    max_bad_images: int = 0
