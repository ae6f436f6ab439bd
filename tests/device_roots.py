"""Devices with real slots, made by the very functions that a device uses, and what a test does to them."""

from __future__ import annotations

import tempfile
from datetime import UTC, datetime
from pathlib import Path

from edge_ilseg.bundle import read_manifest
from edge_ilseg.devices.update import lifecycle
from edge_ilseg.devices.update.disk import RealDisk
from edge_ilseg.devices.update.slots import stage
from edge_ilseg.devices.update.state import AgentState, Candidate
from edge_ilseg.fetch_plan import fetch_plan, rebuild_chunk
from edge_ilseg.pack import write_pack

TIME = datetime(2026, 6, 1, tzinfo=UTC)


def stage_bundle(root: Path, bundle: Path) -> str:
    """Make the slot of a bundle below `root`, as after a fetch; returns its content id."""
    with tempfile.TemporaryDirectory() as folder:
        pack = Path(folder) / "pack"
        facts = write_pack(pack, bundle)
        data = pack.read_bytes()
    plan = fetch_plan(facts.index, lambda _: False)
    stored = {item.chunk: item for item in plan.chunks}

    def chunk(number: int) -> bytes:
        item = stored[number]
        return rebuild_chunk(facts.index, item, data[item.offset : item.offset + item.stored_bytes])

    stage(RealDisk(root), facts.content_id, facts.index, chunk)
    return facts.content_id


def install(root: Path, bundle: Path) -> str:
    """A device that runs a bundle; returns its content id."""
    root.mkdir(exist_ok=True)
    content_id = stage_bundle(root, bundle)
    lifecycle.install(RealDisk(root), content_id, release=0, time_floor=TIME, now=TIME)
    return content_id


def put_on_trial(root: Path, bundle: Path, release: int = 1, *, max_starts: int = 3) -> str:
    """Take a bundle as far as the trial; returns its content id."""
    disk = RealDisk(root)
    content_id = stage_bundle(root, bundle)
    lifecycle.begin(disk, Candidate(release, content_id, read_manifest(bundle).bundle_id, TIME))
    lifecycle.mark_staged(disk)
    lifecycle.begin_gate(disk, TIME)
    lifecycle.mark_gated(disk, "passed", "", TIME)
    lifecycle.enter_trial(disk, max_starts=max_starts, now=TIME)
    return content_id


def state_of(root: Path) -> AgentState:
    """What the device knows."""
    return lifecycle.recover(RealDisk(root), TIME).state
