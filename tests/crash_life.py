"""The life of a device: `crash_explorer.py` cuts it off at every operation, `update_driver.py` lives it on a real disk.

Set up; a release that is confirmed; one that the watch refuses; one that the gate refuses; one that the application
never confirms; one on which the gate crashes; older bytes under a higher number; the factory's bytes; bit rot in the
model in use, and its repair; an operator's way back. Old slots and downloads are removed after each.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from edge_ilseg.devices.update import lifecycle
from edge_ilseg.devices.update.decisions import choose_release
from edge_ilseg.devices.update.disk import Disk
from edge_ilseg.devices.update.lifecycle import GateVerdict, Recovery, Start
from edge_ilseg.devices.update.release import Rollout, RolloutEntry, Rollouts
from edge_ilseg.devices.update.slots import stage
from edge_ilseg.devices.update.state import AgentState, Candidate, read_state
from edge_ilseg.errors import UpdateError
from edge_ilseg.pack_index import PackChunk, PackFile, PackIndex, encode_index, parse_index

NOW = datetime(2026, 6, 1, tzinfo=UTC)
MAX_STARTS = 2
MAX_MOVES = 60


class Content(NamedTuple):
    """What a pack brings."""

    content_id: str
    index: PackIndex
    chunks: tuple[bytes, ...]


class Published(NamedTuple):
    """A release, and how it fares on this device."""

    release: int
    content: Content
    gate: GateVerdict = "passed"
    is_good: bool | None = True
    """What the watch says; `None`: nothing, because the application dies at each start."""


def make_content(name: str, *, validation: bool = False) -> Content:
    """Two files, or three, of which the second has two chunks."""
    texts = [f"manifest of {name}".encode(), b"first half of " + name.encode(), b"second half of " + name.encode()]
    texts += [f"list of {name}".encode()] if validation else []
    chunks = tuple(PackChunk(hashlib.sha256(text).digest(), len(text), 0, len(text), 0) for text in texts)
    places = {"bundle/manifest.json": (0,), "bundle/models/model.bin": (1, 2)}
    places |= {"validation/list.txt": (3,)} if validation else {}
    files = []
    for path, numbers in places.items():
        data = b"".join(texts[number] for number in numbers)
        files.append(PackFile(path, len(data), hashlib.sha256(data).digest(), numbers))
    head = encode_index(PackIndex(tuple(files), chunks, ()))
    index = parse_index(head, pack_bytes=len(head) + sum(map(len, texts)))
    return Content(hashlib.sha256(head).hexdigest(), index, tuple(texts))


FACTORY, A, B, C, D, E = (make_content(name, validation=name == "A") for name in ("factory", *"ABCDE"))
RELEASES = (
    Published(1, A),
    Published(2, B, is_good=False),
    Published(3, C, gate="failed"),
    Published(4, D, is_good=None),
    Published(5, E, gate="no verdict"),
    Published(6, B),
    Published(7, FACTORY),
)
CONTENTS = {item.content.content_id: item.content for item in RELEASES}


def rollouts_of(published: tuple[Published, ...]) -> Rollouts:
    """The signed list that has these releases."""
    entries = tuple(
        RolloutEntry(item.release, "b" * 64, item.content.content_id, item.release, "step", Rollout(str(item.release)))
        for item in published
    )
    return Rollouts("edge-ilseg-rollouts", 1, (NOW - timedelta(days=30 - len(entries))).isoformat(), entries)


class Agent:
    """The agent and the application of a device, as short as can be. Variants that do it wrong override a method."""

    def __init__(self, disk: Disk, loads: dict[int, int] | None = None) -> None:
        self.disk = disk
        self.loads: Counter[int] = Counter(loads or {})
        """Releases on trial: how often each was loaded."""
        self.on_step: Callable[[], None] = lambda: None
        """Called when a step has returned: what it did is durable."""

    def set_up(self) -> None:
        content = FACTORY
        stage(self.disk, content.content_id, content.index, content.chunks.__getitem__)
        lifecycle.install(self.disk, content.content_id, release=0, time_floor=NOW - timedelta(days=60), now=NOW)
        self.on_step()

    def take(self, count: int) -> None:
        """Do all that is to be done while the first `count` releases are published."""
        published = RELEASES[:count]
        for _ in range(MAX_MOVES):
            state = self.recover().state
            self.on_step()
            if state.phase == "idle" and not self._begin(published, state):
                self.collect()
                self.on_step()
                return
            plan = next(
                (item for item in published if state.candidate and item.release == state.candidate.release), None
            )
            if state.phase == "trial" and plan is None:
                return  # of a later step, which was killed; it goes on there
            if state.candidate is not None:
                self.move(state, plan)
            self.on_step()
        raise AssertionError(f"rule 8: not done after {MAX_MOVES} moves")

    def move(self, state: AgentState, plan: Published | None) -> None:
        if plan is None:
            lifecycle.drop(self.disk)
        elif state.phase == "checked":
            lifecycle.mark_fetching(self.disk)
        elif state.phase == "fetching":
            self.stage(plan.content)
            lifecycle.mark_staged(self.disk)
        elif state.phase == "staged":
            if lifecycle.begin_gate(self.disk, NOW).phase == "staged":
                self.on_step()
                lifecycle.mark_gated(self.disk, plan.gate, "forgets the boats", NOW)
        elif state.phase == "gated":
            self.enter_trial()
        else:
            self.watch(plan, self.start_application())

    def watch(self, plan: Published, start: Start) -> None:
        self.on_step()
        if not start.is_on_trial and read_state(self.disk).phase == "trial":
            raise UpdateError("the start was not counted, so that the old model runs", found="; ".join(start.notes))
        if start.is_on_trial and plan.is_good is True:
            self.confirm(plan.release)
        elif start.is_on_trial and plan.is_good is False:
            self.roll_back(plan.release)

    def take_after_rot(self, count: int) -> None:
        self.check_running()
        self.on_step()
        self.take(count)

    def go_back(self, release: int, count: int) -> None:
        self.recover()
        self.roll_back(release)
        self.on_step()
        self.take(count)

    def start_application(self) -> Start:
        start = lifecycle.count_start(self.disk, NOW)
        self.load(start)
        return start

    def load(self, start: Start) -> None:
        if start.is_on_trial:
            self.loads[start.release] += 1

    def recover(self) -> Recovery:
        return lifecycle.recover(self.disk, NOW)

    def check_running(self) -> Recovery:
        return lifecycle.check_running(self.disk, NOW)

    def stage(self, content: Content) -> None:
        stage(self.disk, content.content_id, content.index, content.chunks.__getitem__)

    def enter_trial(self) -> None:
        lifecycle.enter_trial(self.disk, max_starts=MAX_STARTS, now=NOW)

    def confirm(self, release: int) -> None:
        lifecycle.confirm(self.disk, release)

    def roll_back(self, release: int) -> None:
        lifecycle.roll_back(self.disk, release, "the masks are empty", NOW)

    def collect(self) -> None:
        lifecycle.collect_garbage(self.disk)

    def _begin(self, published: tuple[Published, ...], state: AgentState) -> bool:
        entry = choose_release(rollouts_of(published), state, device_id="d", group="g", now=NOW)
        if entry is None:
            return False
        published_at = datetime.fromisoformat(rollouts_of(published).published)
        lifecycle.begin(self.disk, Candidate(entry.release, entry.content_id, entry.bundle_id, published_at))
        return True


class Step(NamedTuple):
    """A part of the life that is done again, from its start, after a power cut."""

    name: str
    do: Callable[[Agent], None]
    rot: str | None = None
    """A content of which a bit turns before the step."""


def taking(name: str, count: int) -> Step:
    return Step(name, lambda agent: agent.take(count))


SCRIPT = (
    Step("set up", lambda agent: agent.set_up()),
    taking("confirmed", 1),
    taking("rolled back by the watch", 2),
    taking("refused by the gate", 3),
    taking("never confirmed", 4),
    taking("the gate crashes", 5),
    taking("older bytes, higher number", 6),
    taking("the factory's bytes again", 7),
    Step("bit rot and repair", lambda agent: agent.take_after_rot(7), rot=FACTORY.content_id),
    Step("an operator goes back", lambda agent: agent.go_back(7, 7)),
)
