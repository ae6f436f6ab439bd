"""How a device stands: what runs, what is on its way, what was refused, what happened last. Changes nothing."""

from __future__ import annotations

from pathlib import Path

import msgspec

from edge_ilseg.devices.update.agent_config import read_agent_config
from edge_ilseg.devices.update.agent_journal import HISTORY_NAME
from edge_ilseg.devices.update.bundle_head import read_bundle_head
from edge_ilseg.devices.update.disk import RealDisk
from edge_ilseg.devices.update.heartbeat import Heartbeat, read_heartbeat
from edge_ilseg.devices.update.history import History, HistoryEvent
from edge_ilseg.devices.update.slots import bundle_path, current_content, slot_names
from edge_ilseg.devices.update.state import AgentState, Installed, read_copies
from edge_ilseg.errors import EdgeIlsegError, UpdateError

LAST_EVENTS = 10


class ModelStatus(msgspec.Struct, frozen=True):
    """One model on the device."""

    role: str
    """`active`, `previous`, `factory`, `on trial`, or the phase of the one that is on its way."""
    release: int
    """0: it came with the device."""
    content_id: str
    bundle_id: str | None
    step_name: str | None
    is_current: bool
    is_there: bool
    """Its slot is on the disk."""


class DeviceStatus(msgspec.Struct, frozen=True):
    """How a device stands."""

    device_id: str
    group: str
    repository: str
    phase: str
    release_floor: int
    models: tuple[ModelStatus, ...]
    starts: int | None
    """Of the model on trial."""
    heartbeat: Heartbeat | None
    state: AgentState
    events: tuple[HistoryEvent, ...]
    reports_waiting: int
    notes: tuple[str, ...]


def read_status(root: Path) -> DeviceStatus:
    """Read it all.

    Raises:
        ConfigError: the device is not set up.
        UpdateError: its state is lost.
    """
    config = read_agent_config(root)
    disk = RealDisk(root)
    copies = read_copies(disk)
    if copies.state is None:
        raise UpdateError(
            "the state of this device is damaged",
            where=root,
            found="; ".join(copies.notes),
            hint="edge-ilseg device run mends it from the slots",
        )
    notes = list(copies.notes)
    events: tuple[HistoryEvent, ...] = ()
    waiting = 0
    if (root / HISTORY_NAME).exists():
        try:
            with History(root / HISTORY_NAME) as history:
                events, waiting = history.events(LAST_EVENTS), history.count_waiting()
        except EdgeIlsegError as error:
            notes.append(error.one_line())
    state = copies.state
    return DeviceStatus(
        device_id=config.device_id,
        group=config.group,
        repository=config.repository,
        phase=state.phase,
        release_floor=state.release_floor,
        models=_models(root, disk, state),
        starts=None if state.trial is None else state.trial.starts,
        heartbeat=read_heartbeat(root),
        state=state,
        events=events,
        reports_waiting=waiting,
        notes=tuple(notes),
    )


def _models(root: Path, disk: RealDisk, state: AgentState) -> tuple[ModelStatus, ...]:
    roles: list[tuple[str, Installed | None]] = []
    if state.candidate is not None:
        role: str = "on trial" if state.phase == "trial" else state.phase
        roles.append((role, Installed(state.candidate.content_id, state.candidate.release)))
    roles += [("active", state.active), ("previous", state.previous), ("factory", state.factory)]
    current, slots = current_content(disk), slot_names(disk)
    found = []
    for role, item in roles:
        if item is None:
            continue
        head = read_bundle_head(root / bundle_path(item.content_id))
        found.append(
            ModelStatus(
                role=role,
                release=item.release,
                content_id=item.content_id,
                bundle_id=None if head is None else head.bundle_id,
                step_name=None if head is None else head.step.name,
                is_current=item.content_id == current,
                is_there=item.content_id in slots,
            )
        )
    return tuple(found)
