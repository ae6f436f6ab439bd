"""What the agent says of a bundle: its id, its step, its classes. Read from the manifest of a slot, without numpy.

`edge_ilseg.bundle` reads a manifest whole and strictly; here it was read so before, by the publisher or the gate.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

MAX_MANIFEST_BYTES = 16 << 20


class ClassHead(msgspec.Struct, frozen=True):
    """One class."""

    name: str


class StepHead(msgspec.Struct, frozen=True):
    """The training step."""

    index: int
    name: str


class ManifestHead(msgspec.Struct, frozen=True):
    """The part of a manifest that is told."""

    bundle_id: str
    step: StepHead
    classes: tuple[ClassHead, ...]

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of the channels."""
        return tuple(item.name for item in self.classes)


def read_bundle_head(bundle: Path) -> ManifestHead | None:
    """The head of the manifest in the folder `bundle`; `None` where it cannot be read."""
    try:
        with (bundle / "manifest.json").open("rb") as file:
            return msgspec.json.decode(file.read(MAX_MANIFEST_BYTES), type=ManifestHead)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
