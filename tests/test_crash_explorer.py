"""Every power cut and every kill, at every operation; and the same for implementations that do it wrong.

`crash_explorer.py` holds the life, the rules and the counts: `python tests/crash_explorer.py` prints them.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from crash_disk import CrashDisk
from crash_explorer import Explorer, Violation
from crash_life import MAX_STARTS, NOW, SCRIPT, Agent, Content
from msgspec.structs import replace

from edge_ilseg.devices.update import decisions, lifecycle
from edge_ilseg.devices.update.disk import NewFile, join
from edge_ilseg.devices.update.lifecycle import Recovery, Start
from edge_ilseg.devices.update.slots import collect, current_content, flip, is_whole, slot_path
from edge_ilseg.devices.update.state import read_state, write_state

FIRST_STEPS = SCRIPT[:3]


def told(counts: Counter[str], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print("\n" + ", ".join(f"{count:,} {name}" for name, count in counts.items()))


def test_no_cut_in_the_life_of_one_update_breaks_a_rule() -> None:
    """The short form of the next test."""
    assert Explorer(second=False, relived=0).explore(SCRIPT[:2])["images after a cut"] > 300


@pytest.mark.slow
def test_no_cut_and_no_kill_breaks_a_rule_and_neither_does_a_second_one(capsys: pytest.CaptureFixture[str]) -> None:
    counts = Explorer().explore()
    told(counts, capsys)
    assert counts["operations"] > 900
    assert counts["images after a cut"] > 1500
    assert counts["images after a second cut"] > 5000
    assert counts["kills"] > 1000
    assert counts["images of a cut after a kill"] > 1000


@pytest.mark.exhaustive
def test_no_cut_breaks_a_rule_in_all_that_follows_a_kill(capsys: pytest.CaptureFixture[str]) -> None:
    counts = Explorer(second=False, relived=1).explore()
    told(counts, capsys)
    assert counts["images of a cut after a kill"] > 15_000


@pytest.mark.slow
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_a_disk_that_refuses_breaks_no_rule(code: int, lasting: bool) -> None:
    assert Explorer().refuse(code, lasting=lasting)["operations refused"] > 900


class FlipsBeforeTheRecord(Agent):
    def enter_trial(self) -> None:
        state = read_state(self.disk)
        flip(self.disk, decisions.kept_candidate(state).content_id)
        write_state(self.disk, decisions.on_trial(state, MAX_STARTS, NOW))


class CountsAfterTheLoad(Agent):
    def start_application(self) -> Start:
        state = self.check_running().state
        if state.trial is not None and state.trial.starts < state.trial.max_starts:
            candidate = decisions.kept_candidate(state)
            self.load(Start(candidate.content_id, candidate.release, "", is_on_trial=True, starts=0, notes=()))
        return lifecycle.count_start(self.disk, NOW)


class ConfirmsInTwoWrites(Agent):
    def confirm(self, release: int) -> None:
        state = read_state(self.disk)
        write_state(self.disk, replace(state, release_floor=release))
        lifecycle.confirm(self.disk, release)


class RaisesTheFloorAtTheTrial(Agent):
    def enter_trial(self) -> None:
        state = read_state(self.disk)
        write_state(self.disk, replace(state, release_floor=decisions.kept_candidate(state).release))
        super().enter_trial()


class DeletesThePreviousAtActivation(Agent):
    def enter_trial(self) -> None:
        super().enter_trial()
        collect(self.disk, {str(current_content(self.disk))})


class IsIdleBeforeTheFlipBack(Agent):
    def roll_back(self, release: int) -> None:
        state = read_state(self.disk)
        leaving = decisions.leaving_trial(state, "the masks are empty")
        write_state(self.disk, decisions.rolled_back(leaving, state.active, NOW))
        flip(self.disk, state.active.content_id)


class ForgetsTheRejection(Agent):
    def roll_back(self, release: int) -> None:
        super().roll_back(release)
        write_state(self.disk, replace(read_state(self.disk), rejected=()))


class StagesUnderTheSlotsName(Agent):
    def stage(self, content: Content) -> None:
        self.disk.make_folder(slot_path(content.content_id))
        for file in content.index.files:
            self.write(join(slot_path(content.content_id), file.path), content, file.chunks)
        super().stage(content)

    def write(self, path: str, content: Content, numbers: tuple[int, ...]) -> None:
        folders = path.split("/")[:-1]
        for count in range(1, len(folders) + 1):
            if self.disk.kind("/".join(folders[:count])) is None:
                self.disk.make_folder("/".join(folders[:count]))
        with self.disk.create(path) as file:
            file.append(b"".join(content.chunks[number] for number in numbers))
            file.sync()


class TrustsTheNameOfASlot(Agent):
    """Which a killed process may have left unsynced."""

    def stage(self, content: Content) -> None:
        if not is_whole(self.disk, content.content_id):
            super().stage(content)


class DoesNotFinishTheFlip(Agent):
    def recover(self) -> Recovery:
        return Recovery(read_state(self.disk), ())


class ReplacesTheLinkInTwo(CrashDisk):
    def rename(self, old: str, new: str) -> None:
        if new == "current" and self.kind(new) is not None:
            self.unlink(new)
        super().rename(old, new)


class WritesTheStateInPlace(CrashDisk):
    def rename(self, old: str, new: str) -> None:
        if self.kind(new) != "file":
            return super().rename(old, new)
        self.overwrite(new, self.read(old, 1 << 20))
        return self.unlink(old)


class SyncsNoRootFolder(CrashDisk):
    def sync_folder(self, path: str) -> None:
        if path != "." or self.kind("state.json") is None:
            super().sync_folder(path)


class SyncsNoSlotFolder(CrashDisk):
    def sync_folder(self, path: str) -> None:
        if not path.startswith("slots"):
            super().sync_folder(path)


class RenamesALinkThatIsNotSynced(CrashDisk):
    def sync_folder(self, path: str) -> None:
        if path != "." or self.kind(".current.part") is None:
            super().sync_folder(path)


class SyncsNoState(CrashDisk):
    @contextmanager
    def create(self, path: str) -> Iterator[NewFile]:
        with super().create(path) as file:
            yield file if "/" in path else AppendsAlone(file)


class SyncsNoModel(CrashDisk):
    @contextmanager
    def create(self, path: str) -> Iterator[NewFile]:
        with super().create(path) as file:
            yield AppendsAlone(file) if path.endswith("model.bin") else file


class AppendsAlone:
    def __init__(self, file: NewFile) -> None:
        self.file = file

    def append(self, data: bytes) -> None:
        self.file.append(data)

    def sync(self) -> None:
        """Forgotten."""


@pytest.mark.parametrize(
    ("agent", "disk", "rule"),
    [
        (FlipsBeforeTheRecord, CrashDisk, "rule 1"),
        (CountsAfterTheLoad, CrashDisk, "rule 7"),
        (ConfirmsInTwoWrites, CrashDisk, "rule 4"),
        (RaisesTheFloorAtTheTrial, CrashDisk, "rule 4"),
        (DeletesThePreviousAtActivation, CrashDisk, "rule 6"),
        (IsIdleBeforeTheFlipBack, CrashDisk, "rule 1"),
        (ForgetsTheRejection, CrashDisk, "not done"),
        (StagesUnderTheSlotsName, CrashDisk, "rule 2"),
        (DoesNotFinishTheFlip, CrashDisk, "rule 3"),
        pytest.param(TrustsTheNameOfASlot, CrashDisk, "rule 4", marks=pytest.mark.slow),
        (Agent, ReplacesTheLinkInTwo, "rule 1"),
        (Agent, WritesTheStateInPlace, "the device's state is"),
        (Agent, SyncsNoRootFolder, "there is no state.json|rule 1"),
        (Agent, SyncsNoSlotFolder, "rule [12]"),
        (Agent, RenamesALinkThatIsNotSynced, "rule 1"),
        (Agent, SyncsNoState, "the device's state is"),
        (Agent, SyncsNoModel, "rule 2"),
    ],
    ids=lambda item: item.__name__ if isinstance(item, type) else "",
)
def test_an_implementation_that_does_it_wrong_is_caught(agent: type[Agent], disk: type[CrashDisk], rule: str) -> None:
    """Of each, first cuts are enough, but of the one that has to be killed first."""
    with pytest.raises(Violation, match=rule):
        Explorer(agent, disk, second=False, relived=int(agent is TrustsTheNameOfASlot)).explore(FIRST_STEPS)
