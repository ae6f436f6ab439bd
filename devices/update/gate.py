"""The gate: a release proves on this device, before it is used, that it forgot nothing.

1. A model is run in a child process alone (`confined.py`): one that crashes, hangs or eats memory costs the device some
   time, and the agent nothing.
2. Every way in which a run can end is a verdict; nothing of what a model does raises.
3. `passed` alone is taken, unless the device's owner has said otherwise for what is not proven (`allow_unjudged`,
   `accept_too_few`). What was measured and broke a limit is never taken.
4. Limits are those that are signed, and those of bundle, profile and device where they are stricter.
5. Nothing is left in `work` but what the next run removes.

`gate_child.py` verifies, `gate_judgement.py` decides. Nothing here loads numpy or a runtime.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

import msgspec

from edge_ilseg.devices.update.confined import Ended, cpu_limit_s, data_limit_mib, run_confined
from edge_ilseg.devices.update.gate_records import GateRequest, GateSettings, GateVerdict
from edge_ilseg.devices.update.release import Release
from edge_ilseg.errors import UpdateError

CHILD = "edge_ilseg.devices.update.gate_child"
PREFIX = "gate-"
VERDICT_NAME = "verdict.json"
MAX_VERDICT_BYTES = 1 << 20
LOG_MIB = 64


def run_gate(slot: Path, active: Path | None, release: Release, settings: GateSettings, *, work: Path) -> GateVerdict:
    """Judge the content of a slot (rules 1 to 5).

    Args:
        slot: folder with `bundle/` and, where the publisher ships labelled images, `validation/`.
        active: slot of the model that runs now; `None`: there is none, and nothing can measure what was forgotten.
        release: its limits are those that are signed.
        settings: of this device.
        work: a folder for temporary files, on the disk of the slots if it can be.

    Raises:
        UpdateError: no process can be made, or `work` cannot be written.
    """
    start_s = time.monotonic()
    try:
        work.mkdir(parents=True, exist_ok=True)
        for left in work.glob(f"{PREFIX}*"):  # of a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=work)).resolve()
    except OSError as error:
        raise UpdateError(
            "the gate has no place to work",
            where=work,
            found=error.strerror,
            hint="free some space, and let this user write there",
        ) from error
    try:
        request = GateRequest(
            slot=str(slot.resolve()),
            active=None if active is None else str(active.resolve()),
            bundle_id=release.bundle_id,
            limits=release.limits,
            settings=_absolute(settings),
            work=str(folder),
            agent_pid=os.getpid(),
            data_limit_mib=data_limit_mib(settings.memory_mib, settings.threads),
            cpu_limit_s=cpu_limit_s(settings.timeout_s),
            file_limit_mib=LOG_MIB
            + max((_largest_mib(item) for item in (slot, active) if item is not None), default=0),
        )
        ended = run_confined(
            CHILD,
            msgspec.json.encode(request),
            folder,
            timeout_s=settings.timeout_s,
            memory_mib=settings.memory_mib,
        )
        verdict = _read_verdict(folder / VERDICT_NAME, ended)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return msgspec.structs.replace(verdict, seconds=round(time.monotonic() - start_s, 3))


def _read_verdict(path: Path, ended: Ended) -> GateVerdict:
    """What the child has left, if it came to its end (rule 2)."""
    if ended.problem is not None:
        return GateVerdict("crashed", is_taken=False, reason=ended.problem)
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(MAX_VERDICT_BYTES), type=GateVerdict)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        return GateVerdict("crashed", is_taken=False, reason=f"the process left no verdict: {error}")


def _largest_mib(slot: Path) -> int:
    """Of its files, which are copied where the file system has no hard links."""
    return max((path.stat().st_size for path in slot.rglob("*") if path.is_file()), default=0) >> 20


def _absolute(settings: GateSettings) -> GateSettings:
    """The child works in another folder: places are named from the root."""
    kind, _, root = (settings.data or "").partition(":")
    profile = settings.profile
    return msgspec.structs.replace(
        settings,
        data=f"{kind}:{Path(root).resolve()}" if root else settings.data,
        images=None if settings.images is None else str(Path(settings.images).resolve()),
        profile=str(Path(profile).resolve()) if profile is not None and profile.endswith(".toml") else profile,
    )
