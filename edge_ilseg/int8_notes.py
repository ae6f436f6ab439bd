"""What a reader of a bundle must be told of its int8 models."""

from __future__ import annotations

from edge_ilseg.bundle import Manifest
from edge_ilseg.int8_record import Int8Record


def unmeasured(manifest: Manifest, record: Int8Record) -> list[str]:
    """A warning for the runtimes whose int8 model was compared with nothing, though a limit was set."""
    taken = record.attempts[-1]
    compared = {row.runtime for row in taken.rows if row.images != "golden images"}
    missing = sorted({entry.runtime for entry in manifest.models if entry.precision == "int8"} - compared)
    if not missing or record.max_old_drop_points is None:
        return []
    reason = taken.reason if taken.max_drop_points is None else "the parent has no int8 model for it"
    return [f"warning: what int8 costs in {', '.join(missing)} was not measured ({reason})"]
