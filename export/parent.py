"""The bundle of the parent step, as far as an export looks at it: its ranges and its int8 models."""

from __future__ import annotations

from pathlib import Path

import msgspec

from edge_ilseg.bundle import Manifest, ModelEntry, Runtime, StepEntry, check_files, read_manifest
from edge_ilseg.calibration.ranges import Ranges, read_ranges
from edge_ilseg.errors import ExportError
from edge_ilseg.export.pieces import read_constants


class ParentBundle(msgspec.Struct, frozen=True):
    """A whole bundle of the parent step."""

    folder: Path
    manifest: Manifest
    ranges: Ranges | None
    """None where it has no int8 model, or weights alone were asked for."""

    def int8(self, runtime: Runtime) -> ModelEntry | None:
        """Its int8 model for a runtime."""
        for entry in self.manifest.models:
            if (entry.runtime, entry.precision) == (runtime, "int8"):
                return entry
        return None

    def subgraphs(self) -> frozenset[str]:
        """Hashes of what its ranges are of."""
        return frozenset(item.subgraph_sha256 for item in self.ranges.tensors.values()) if self.ranges else frozenset()

    def has_int8_ranges(self) -> bool:
        """Whether its int8 models compute in int8: not where the ranges are kept beside weights alone."""
        return any(
            entry.calibration is not None and entry.calibration.method is not None for entry in self.manifest.models
        )

    def int8_constants(self) -> dict[str, bytes]:
        """Constants of its int8 model, by name, in whichever runtime's form; none where it has weights alone."""
        if not self.has_int8_ranges():
            return {}
        entry = next(item for item in self.manifest.models if item.precision == "int8")
        return read_constants([self.folder / name for name in entry.files])


def load_parent(folder: Path, step: StepEntry) -> ParentBundle:
    """Read the bundle of a step's parent, every byte checked.

    Args:
        folder: of the bundle.
        step: the step that is exported.

    Raises:
        BundleError: there is no bundle, or it is damaged.
        ExportError: it is the bundle of another step, or its ranges are not ranges.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    if manifest.step.id != step.parent_id:
        raise ExportError(
            f"this is not the bundle of the parent of step {step.name!r}",
            where=folder,
            found=f"step {manifest.step.name!r} ({manifest.step.id[:12]})",
            expected=f"the step {step.parent_id[:12]}" if step.parent_id else "no parent at all: this is step 0",
            hint="give the bundle of the step that this one was trained from (--parent)",
        )
    names = {
        entry.calibration.ranges_file
        for entry in manifest.models
        if entry.calibration is not None and entry.calibration.ranges_file is not None
    }
    return ParentBundle(folder, manifest, read_ranges(folder / min(names)) if names else None)
