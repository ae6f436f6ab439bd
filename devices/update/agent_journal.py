"""What the agent tells: each thing that happened goes into the history, and as a report into the outbox.

1. A history that cannot be written stops nothing: the state is the authority. What could not be told is kept in
   `problems`, and said by the command.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from types import TracebackType

from edge_ilseg.devices.update.agent_config import AgentConfig
from edge_ilseg.devices.update.bundle_head import ManifestHead, read_bundle_head
from edge_ilseg.devices.update.candidate_file import kept_release
from edge_ilseg.devices.update.disk import Disk
from edge_ilseg.devices.update.gate_records import GateVerdict
from edge_ilseg.devices.update.history import History
from edge_ilseg.devices.update.release import Release, RolloutEntry
from edge_ilseg.devices.update.reporting import (
    ActiveModel,
    DeviceReport,
    ForgottenClass,
    MachineInShort,
    ReportEvent,
    RetentionNumbers,
    machine_in_short,
    queue_report,
)
from edge_ilseg.devices.update.slots import bundle_path
from edge_ilseg.devices.update.state import read_copies
from edge_ilseg.errors import EdgeIlsegError

HISTORY_NAME = "history.sqlite"


class Journal:
    """The history of a device, opened when the first thing is told."""

    def __init__(self, root: Path, config: AgentConfig, disk: Disk, clock: Callable[[], datetime]) -> None:
        self._root = root
        self._config = config
        self._disk = disk
        self._clock = clock
        self._history: History | None = None
        self.problems: tuple[str, ...] = ()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._history is not None:
            self._history.close()

    def bundle(self, content_id: str) -> ManifestHead | None:
        """What the bundle of a content says of itself; `None` where it cannot be read."""
        return read_bundle_head(self._root / bundle_path(content_id))

    def tell(
        self,
        event: ReportEvent,
        *,
        release: Release | RolloutEntry | None = None,
        number: int | None = None,
        reason: str | None = None,
        verdict: GateVerdict | None = None,
        numbers: Mapping[str, object] | None = None,
    ) -> None:
        """Write down what happened, and queue its report (rule 1).

        Args:
            event: what.
            release: that it is about.
            number: of the release, where it is not at hand; it is looked up in what the device keeps.
            reason: in one sentence.
            verdict: of the gate.
            numbers: whatever was measured, for the history.
        """
        import msgspec

        if release is None and number:
            release = kept_release(self._disk, number)
        number = release.release if release is not None else number
        told = dict(numbers or {})
        if verdict is not None:
            told, reason = msgspec.to_builtins(verdict), verdict.reason
        try:
            if self._history is None:
                self._history = History(self._root / HISTORY_NAME, now=self._clock)
            self._history.record(
                event,
                release=number,
                content_id=release.content_id if release is not None else None,
                verdict=None if verdict is None else verdict.outcome,
                reason=reason,
                numbers=told,
            )
            queue_report(self._history, self._report(event, release, number, reason, verdict))
        except EdgeIlsegError as error:
            self.problems = (*self.problems, error.one_line())

    def _report(
        self,
        event: ReportEvent,
        release: Release | RolloutEntry | None,
        number: int | None,
        reason: str | None,
        verdict: GateVerdict | None,
    ) -> DeviceReport:
        return DeviceReport(
            device_id=self._config.device_id,
            group=self._config.group,
            created=self._clock().isoformat(timespec="seconds"),
            event=event,
            release=number or None,
            bundle_id=None if release is None else release.bundle_id,
            step_name=None if release is None else release.step_name,
            step_index=None if release is None else release.step_index,
            active=self._active(),
            verdict=None if verdict is None else verdict.outcome,
            reason=reason,
            forgotten=()
            if verdict is None
            else tuple(ForgottenClass(item.name, item.drop_pct) for item in verdict.falls if item.is_forgotten),
            retention=None if verdict is None else _retention(verdict),
            machine=_machine(),
        )

    def _active(self) -> ActiveModel | None:
        state = read_copies(self._disk).state
        head = None if state is None else self.bundle(state.active.content_id)
        if state is None or head is None:
            return None
        return ActiveModel(head.bundle_id, head.step.name, state.active.release or None)


def _retention(verdict: GateVerdict) -> RetentionNumbers:
    low, high = verdict.drop_low_pct, verdict.drop_high_pct
    return RetentionNumbers(
        old_miou_drop_pct=verdict.old_miou_drop_pct,
        old_miou_drop_interval_pct=None if low is None or high is None else (low, high),
        new_miou_pct=verdict.new_miou_pct,
        latency_p95_ms=verdict.latency_p95_ms,
        peak_rss_mib=verdict.peak_rss_mib,
    )


def _machine() -> MachineInShort:
    from edge_ilseg.devices.facts import read_device_facts

    return machine_in_short(read_device_facts())
