"""Two bundles made comparable, where the one was not trained from the other.

A device may have slept through a step, may get the same step trained anew, or may be sent back to an older one. What it
wants to know is the same each time: of the classes that it knows now, which would it lose?

1. Two bundles can be compared when the class names of the one are the first ones of the other: channels never move.
2. The one with more classes, or the new one where they have the same, is looked at as a step made from the other: a
   copy of its manifest says so. Its files are the very same ones, and so are their hashes.
3. A bundle that is made from the other one is left as it is.
4. The model of the new bundle that this device would run is held against the one of the active bundle that it runs now,
   by the same runtime: in the same precision where the active bundle has it, else in its own. What a device would lose
   by going from fp32 to int8 is a loss, too.
5. When the older bundle is the new one (a device that is sent back), the comparison is read the other way round.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import msgspec

from edge_ilseg.bundle import MANIFEST_NAME, Manifest, ModelEntry, Precision, Runtime, manifest_id
from edge_ilseg.devices.loaded_bundle import PRECISION_PREFERENCE
from edge_ilseg.errors import BundleError


class Pair(NamedTuple):
    """What is compared: `later` as a step made from `earlier`."""

    earlier: Manifest
    later: Manifest
    is_back: bool
    """`earlier` is the new bundle (rule 5)."""


def pair_up(new: Manifest, active: Manifest, runtime: Runtime, precision: Precision) -> Pair:
    """Manifests by which two bundles can be compared, each with the one model that is run (rules 1 to 5).

    Args:
        new: of the release.
        active: of what runs now.
        runtime: by which the new one is run.
        precision: in which.

    Raises:
        BundleError: their classes or their models have too little in common.
    """
    known, offered = active.class_names, new.class_names
    is_back = len(offered) < len(known)
    earlier, later = (new, active) if is_back else (active, new)
    if later.class_names[: len(earlier.classes)] != earlier.class_names:
        raise BundleError(
            "the classes of the release and those of the active model are not the same ones in the same order",
            found=f"release {', '.join(offered)}",
            expected=f"active {', '.join(known)}",
            hint="publish a bundle of a step that was trained from the active one",
        )
    if later.step.parent_id != earlier.step.id:
        later = _as_step_of(later, earlier)
    new_entry, active_entry = new.model(runtime, precision), _entry_to_compare(active, runtime, precision)
    entries = (new_entry, active_entry) if is_back else (active_entry, new_entry)
    if active_entry.precision != precision:  # then their constants differ, whatever was trained
        later = msgspec.structs.replace(later, step=msgspec.structs.replace(later.step, encoder_frozen=False))
    models = [msgspec.structs.replace(entry, precision=precision) for entry in entries]
    earlier = msgspec.structs.replace(earlier, models=(models[0],))
    return Pair(earlier, msgspec.structs.replace(later, models=(models[1],)), is_back)


def write_view(bundle: Path, manifest: Manifest, folder: Path) -> Path:
    """A bundle with another manifest: its files are linked, or copied where the file system does not link."""
    for name in manifest.files:
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(bundle / name, place)
        except OSError:
            shutil.copyfile(bundle / name, place)
    named = msgspec.structs.replace(manifest, bundle_id=manifest_id(manifest))
    (folder / MANIFEST_NAME).write_bytes(msgspec.json.encode(named))
    return folder


def _as_step_of(later: Manifest, earlier: Manifest) -> Manifest:
    """`later`, its first classes those of `earlier`, the others added by its own step (rule 2)."""
    index = earlier.step.index + 1
    old = tuple(item.step for item in earlier.classes)
    steps = (*old, *(index for _ in later.classes[len(old) :]))
    classes = tuple(msgspec.structs.replace(item, step=step) for item, step in zip(later.classes, steps, strict=True))
    is_same_encoder = later.step.encoder_sha256 == earlier.step.encoder_sha256
    step = msgspec.structs.replace(
        later.step,
        index=index,
        parent_id=earlier.step.id,
        encoder_frozen=later.step.encoder_frozen and is_same_encoder,  # steps between them may have trained it
    )
    return msgspec.structs.replace(later, step=step, classes=classes)


def _entry_to_compare(active: Manifest, runtime: Runtime, precision: Precision) -> ModelEntry:
    """The model of the active bundle that a new one is held against (rule 4)."""
    by_precision = {entry.precision: entry for entry in active.models if entry.runtime == runtime}
    for wanted in (precision, *PRECISION_PREFERENCE):
        if wanted in by_precision:
            return by_precision[wanted]
    raise BundleError(
        f"the active bundle has no model for {runtime}, which would run the release",
        found=", ".join(f"{entry.runtime}/{entry.precision}" for entry in active.models),
        hint="name the runtime that the application uses: runtime, in [gate] of agent.toml",
    )
