"""The update agent of one device: each stage of an update as one repeatable command, and `run`, which is all of them.

1. Every command takes the lock, finishes what a power cut has left (`lifecycle.recover`), and does one stage; done
   again, it changes nothing.
2. What is decided, is decided elsewhere: `trust` what to believe, `decisions` what to take, `gate_judgement` whether it
   forgot, `watch` whether it works. This module calls them in their order and tells the history.
3. No stage touches the model that runs; `activate` switches, and `confirm` or `rollback` ends the trial.
4. A stage that cannot go on for now (no network, a full disk) raises, and leaves the state where it was.

Nothing here loads numpy: the gate runs in a process of its own.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edge_ilseg.devices.update import decisions, lifecycle
from edge_ilseg.devices.update.agent_config import ROOT_NAME, AgentConfig
from edge_ilseg.devices.update.agent_journal import Journal
from edge_ilseg.devices.update.candidate_file import read_candidate, write_candidate
from edge_ilseg.devices.update.disk import RealDisk
from edge_ilseg.devices.update.gate_records import GateVerdict
from edge_ilseg.devices.update.lock import held
from edge_ilseg.devices.update.release import Release, RolloutEntry
from edge_ilseg.devices.update.slots import slot_path, stage
from edge_ilseg.devices.update.state import AgentState
from edge_ilseg.errors import EXIT_PASSED, EXIT_RETENTION, EXIT_UNDECIDED, UpdateError
from edge_ilseg.progress import ProgressCallback, no_progress

if TYPE_CHECKING:
    from edge_ilseg.chunks import ChunkSource
    from edge_ilseg.devices.update.fetching import FetchedContent
    from edge_ilseg.devices.update.transport import Transport
    from edge_ilseg.devices.update.trust import TrustedRepository

AGENT_LOCK = "lock"
INCOMING = "incoming"
TUF = "tuf"
WORK = "work"
GATE_EXITS = {"refused": EXIT_RETENTION, "too few images": EXIT_UNDECIDED}


class Outcome(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a command did, and where the device stands after it."""

    command: str
    phase: str
    """Of the state: `idle`, `checked`, `fetching`, `staged`, `gated`, `trial`."""
    message: str
    release: int | None = None
    """The one that the command is about."""
    notes: tuple[str, ...] = ()
    """What had to be mended first, and what could not be told."""
    fetched_bytes: int | None = None
    reused_bytes: int | None = None
    verdict: GateVerdict | None = None
    exit_code: int = EXIT_PASSED


class Agent:
    """The agent of the device whose folder is `root`."""

    def __init__(
        self,
        root: Path,
        config: AgentConfig,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        progress: ProgressCallback = no_progress,
    ) -> None:
        self.root = root
        self.config = config
        self.disk = RealDisk(root)
        self.clock = clock
        self.progress = progress
        self._notes: tuple[str, ...] = ()
        self._journal: Journal | None = None

    def check(self) -> Outcome:
        """Look for a release; take the highest that is for this device, and leave one that was halted.

        Raises:
            UpdateError: the repository is not reached, or not believed.
        """
        with self._working() as (state, journal):
            trusted, _ = self._refresh(state)
            halted = decisions.halted_reason(trusted.rollouts, state)
            if halted is not None and state.candidate is not None:
                number = state.candidate.release
                if state.phase == "trial":
                    return self._go_back(journal, number, halted, "check")
                lifecycle.drop(self.disk)
                journal.tell("dropped", number=number, reason=halted)
                return self._outcome("check", halted, release=number)
            if state.phase == "trial":
                return self._outcome("check", "a release is on trial: watch, confirm or roll back first")
            entry = decisions.choose_release(
                trusted.rollouts, state, device_id=self.config.device_id, group=self.config.group, now=self.clock()
            )
            if entry is None or self._runs(entry, state, journal):
                lifecycle.drop(self.disk)
                return self._outcome("check", "nothing new for this device")
            after = lifecycle.begin(self.disk, decisions.candidate_of(entry, trusted.rollouts))
            if after.candidate is None:
                return self._outcome("check", f"release {entry.release} is what runs", release=entry.release)
            if after != state:
                journal.tell("checked", release=entry)
            return self._outcome("check", f"release {entry.release} ({entry.step_name})", release=entry.release)

    def fetch(self) -> Outcome:
        """Fetch what the device lacks of the candidate.

        Raises:
            UpdateError: it does not come, is not what was signed, or the disk is full; the next call goes on.
        """
        with self._working() as (state, journal):
            if state.candidate is None or state.phase not in ("checked", "fetching"):
                return self._outcome("fetch", "nothing is to be fetched")
            release, transport = self._release_of(state, may_ask=True)
            lifecycle.mark_fetching(self.disk)
            fetched = self._fetch(release, state, transport)
            journal.tell(
                "fetched",
                release=release,
                numbers={"fetched_bytes": fetched.fetched_bytes, "reused_bytes": fetched.reused_bytes},
            )
            total = sum(file.bytes for file in fetched.index.files)
            message = f"{fetched.fetched_bytes} bytes fetched for a content of {total} bytes"
            return msgspec.structs.replace(
                self._outcome("fetch", message, release=release.release),
                fetched_bytes=fetched.fetched_bytes,
                reused_bytes=fetched.reused_bytes,
            )

    def stage(self) -> Outcome:
        """Put the candidate together in a slot of its own, and read it back.

        Raises:
            UpdateError: a part of it is missing, or the disk is full or fails.
        """
        from edge_ilseg.devices.update.fetching import open_chunks

        with self._working() as (state, _):
            if state.candidate is None or state.phase != "fetching":
                return self._outcome("stage", "nothing is to be staged")
            release, transport = self._release_of(state, may_ask=True)
            fetched = self._fetch(release, state, transport)  # asks for nothing that is there
            self.progress("staging", 0.0)
            stage(self.disk, release.content_id, fetched.index, open_chunks(fetched, self._source(state)))
            lifecycle.mark_staged(self.disk)
            lifecycle.collect_garbage(self.disk)
            return self._outcome("stage", f"slot {release.content_id[:12]} is whole", release=release.release)

    def gate(self) -> Outcome:
        """Prove the candidate on this device, beside the model that runs.

        Raises:
            UpdateError: the gate cannot be run.
        """
        from edge_ilseg.devices.update.gate import run_gate

        with self._working() as (state, journal):
            if state.candidate is None or state.phase != "staged":
                return self._outcome("gate", "nothing is to be judged")
            release, _ = self._release_of(state, may_ask=False)
            state = lifecycle.begin_gate(self.disk, self.clock())
            if state.phase != "staged":
                reason = "its slot is damaged: fetch it again" if state.phase == "checked" else "it crashed every time"
                journal.tell("rejected", release=release, reason=reason)
                return self._outcome("gate", reason, release=release.release)
            self.progress("gate", 0.0)
            verdict = run_gate(
                self.root / slot_path(release.content_id),
                self.root / slot_path(state.active.content_id),
                release,
                self.config.gate_settings,
                work=self.root / WORK,
            )
            return self._judged(journal, release, verdict)

    def activate(self) -> Outcome:
        """Switch to the candidate that has passed, for now."""
        from edge_ilseg.devices.update.heartbeat import keep_baseline
        from edge_ilseg.devices.update.trial_clock import forget_trial_time, trial_seconds

        with self._working() as (state, journal):
            if state.candidate is None or state.phase != "gated":
                return self._outcome("activate", "nothing has passed the gate")
            release, _ = self._release_of(state, may_ask=False)
            keep_baseline(self.root, state.active.content_id)
            forget_trial_time(self.root)
            state = lifecycle.enter_trial(self.disk, max_starts=release.watch.max_starts, now=self.clock())
            if state.phase == "trial":
                trial_seconds(self.root, release.content_id)
                journal.tell("activated", release=release)
                message = f"release {release.release} is on trial: {release.watch.min_frames} frames will decide"
                return self._outcome("activate", message, release=release.release)
            what = "its slot is damaged: fetch it again" if state.phase == "checked" else "it is what runs already"
            return self._outcome("activate", what, release=release.release)

    def confirm(self, *, force: bool = False) -> Outcome:
        """End the trial by what the application has seen: confirm, go back, or wait. With `force`: confirm."""
        from edge_ilseg.devices.update.heartbeat import read_baseline, read_heartbeat
        from edge_ilseg.devices.update.trial_clock import trial_seconds
        from edge_ilseg.devices.update.watch import judge_trial

        with self._working() as (state, journal):
            if state.candidate is None or state.trial is None:
                return self._outcome("confirm", "nothing is on trial")
            number = state.candidate.release
            release = read_candidate(self.disk, state.candidate)
            if not force:
                if release is None:
                    return self._go_back(journal, number, "its signed limits are lost", "confirm")
                verdict = judge_trial(
                    read_heartbeat(self.root),
                    read_baseline(self.root),
                    release.watch,
                    state.trial,
                    content_id=state.candidate.content_id,
                    old_classes=self._class_names(state, journal),
                    elapsed_s=trial_seconds(self.root, state.candidate.content_id),
                )
                if verdict.decision == "roll back":
                    return self._go_back(journal, number, verdict.reason, "confirm")
                if verdict.decision == "wait":
                    return self._outcome("confirm", verdict.reason, release=number)
            lifecycle.confirm(self.disk, number)
            lifecycle.collect_garbage(self.disk)
            journal.tell("confirmed", release=release, number=number)
            return self._outcome("confirm", f"release {number} is permanent", release=number)

    def roll_back(self, reason: str) -> Outcome:
        """Leave the release on trial or, where there is none, the one that runs; it is not taken again.

        Raises:
            UpdateError: there is nothing else to run.
        """
        with self._working() as (state, journal):
            number = state.candidate.release if state.phase == "trial" and state.candidate else state.active.release
            return self._go_back(journal, number, reason, "rollback")

    def collect(self) -> Outcome:
        """Remove slots and downloads that nothing needs."""
        with self._working():
            removed = lifecycle.collect_garbage(self.disk)
            shutil.rmtree(self.root / WORK, ignore_errors=True)
            return self._outcome("gc", f"{len(removed)} removed" if removed else "nothing to remove")

    def verify_running(self) -> Outcome:
        """Read the whole model that runs: bit rot makes room for the model before it."""
        with self._working():
            recovery = lifecycle.check_running(self.disk, self.clock())
            self._notes = (*self._notes, *recovery.notes)
            message = "the model that runs is whole" if recovery.is_whole else "there is no whole model on this device"
            return msgspec.structs.replace(
                self._outcome("verify", message), exit_code=EXIT_PASSED if recovery.is_whole else EXIT_RETENTION
            )

    def _refresh(self, state: AgentState) -> tuple[TrustedRepository, Transport]:
        from edge_ilseg.devices.update.transport import open_transport
        from edge_ilseg.devices.update.trust import refresh

        self.progress("looking", 0.0)
        try:
            bootstrap = (self.root / ROOT_NAME).read_bytes()
        except OSError as error:
            raise UpdateError(
                "the root metadata that this device was given cannot be read",
                where=self.root / ROOT_NAME,
                found=error.strerror,
                hint="copy the publisher's metadata/1.root.json there",
            ) from error
        transport = open_transport(self.config.repository, timeout_s=self.config.timeout_s)
        now = decisions.believed_time(self.clock(), state.time_floor)
        deadline_s = self.config.poll_deadline_s
        return refresh(transport, self.root / TUF, bootstrap, now, deadline_s=deadline_s), transport

    @staticmethod
    def _runs(entry: RolloutEntry, state: AgentState, journal: Journal) -> bool:
        """Whether the bundle of a release runs already, though it came in another way, such as with the device."""
        head = journal.bundle(state.active.content_id)
        return head is not None and head.bundle_id == entry.bundle_id and entry.content_id != state.active.content_id

    @staticmethod
    def _class_names(state: AgentState, journal: Journal) -> tuple[str, ...]:
        head = journal.bundle(state.active.content_id)
        return () if head is None else head.class_names

    def _release_of(self, state: AgentState, *, may_ask: bool) -> tuple[Release, Transport | None]:
        """The candidate's release: kept here, or else asked for."""
        candidate = decisions.kept_candidate(state)
        release = read_candidate(self.disk, candidate)
        if release is not None:
            return release, None
        if not may_ask:
            lifecycle.drop(self.disk)
            raise UpdateError(
                "the signed limits of the release are lost",
                where=self.root,
                found=f"release {candidate.release}",
                hint="it is left for now, and the next check takes it again",
            )
        trusted, transport = self._refresh(state)
        release = trusted.release(candidate.release)
        write_candidate(self.disk, release)
        return release, transport

    def _source(self, state: AgentState) -> ChunkSource:
        from edge_ilseg.chunks import ChunkSource

        """The slots of this device; that of the candidate too, if it was staged before and left."""
        kept = [item.content_id for item in (state.candidate, state.active, state.previous, state.factory) if item]
        return ChunkSource([self.root / slot_path(name) for name in dict.fromkeys(kept)])

    def _fetch(self, release: Release, state: AgentState, transport: Transport | None) -> FetchedContent:
        from edge_ilseg.devices.update.fetching import fetch_content
        from edge_ilseg.devices.update.transport import open_transport

        return fetch_content(
            transport or open_transport(self.config.repository, timeout_s=self.config.timeout_s),
            release.pack,
            self._source(state),
            self.root / INCOMING,
            deadline_s=self.config.fetch_deadline_s,
            progress=self.progress,
        )

    def _judged(self, journal: Journal, release: Release, verdict: GateVerdict) -> Outcome:
        """Record what the gate has said."""
        number = release.release
        if verdict.is_taken:
            lifecycle.mark_gated(self.disk, "passed", verdict.reason, self.clock())
            journal.tell("gate passed", release=release, verdict=verdict)
        elif verdict.is_final:
            lifecycle.mark_gated(self.disk, "failed", verdict.reason, self.clock())
            journal.tell("gate refused", release=release, verdict=verdict)
        elif verdict.outcome == "crashed":
            state = lifecycle.mark_gated(self.disk, "no verdict", verdict.reason, self.clock())
            journal.tell("rejected" if state.phase == "idle" else "gate crashed", release=release, verdict=verdict)
        else:  # nothing here can judge it; once something can, it is taken again
            lifecycle.drop(self.disk)
            journal.tell("not judged", release=release, verdict=verdict)
        exit_code = EXIT_PASSED if verdict.is_taken else GATE_EXITS.get(verdict.outcome, EXIT_RETENTION)
        return msgspec.structs.replace(
            self._outcome("gate", verdict.reason, release=number), verdict=verdict, exit_code=exit_code
        )

    def _go_back(self, journal: Journal, number: int, reason: str, command: str) -> Outcome:
        recovery = lifecycle.roll_back(self.disk, number, reason, self.clock())
        self._notes = (*self._notes, *recovery.notes)
        journal.tell("rolled back", number=number, reason=reason)
        return msgspec.structs.replace(
            self._outcome(command, f"release {number} was rolled back: {reason}", release=number),
            exit_code=EXIT_RETENTION,
        )

    @contextmanager
    def _working(self) -> Iterator[tuple[AgentState, Journal]]:
        """Rule 1."""
        with held(self.root / AGENT_LOCK, deadline_s=self.config.lock_deadline_s):
            recovery = lifecycle.recover(self.disk, self.clock())
            self._notes = recovery.notes
            with Journal(self.root, self.config, self.disk, self.clock) as journal:
                self._journal = journal
                if recovery.notes:
                    journal.tell("damaged", reason="; ".join(recovery.notes))
                yield recovery.state, journal

    def _outcome(self, command: str, message: str, *, release: int | None = None) -> Outcome:
        phase = lifecycle.recover(self.disk, self.clock()).state.phase
        untold = self._journal.problems if self._journal is not None else ()
        return Outcome(command, phase, message, release=release, notes=(*self._notes, *untold))
