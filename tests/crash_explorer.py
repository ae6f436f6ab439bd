"""Every power cut, kill and refusal of the disk in a device's life: `python tests/crash_explorer.py [--all]` counts.

The life is that of `crash_life.py`. At each operation on the disk, every image that a cut may leave (`crash_disk.py`)
is recovered, and checked against these rules:

 1. A reader who only follows `current` finds a whole model, which the state names as in use.
 2. `state.json` itself is whole, and so is every slot under its name: nothing is ever torn where it is read.
 3. Recovery does not raise, ends with `current` as the state wants it, and has nothing to write when it is done again.
 4. The state is that from before the step, or that after it, with every field; the floor rises only together with a new
    active release, and never falls.
 5. What was rejected stays refused.
 6. The slots of active, previous and factory are whole.
 7. Without a confirmation, the device ends on the old model; what is on trial is never loaded more often than allowed.
 8. The step done again ends as if nothing had happened, in a bounded number of moves.
 9. Where the disk refuses an operation, or that and all after it, the application still gets a whole model, and nothing
    but an `UpdateError` is raised.

Then the power is cut a second time, at each operation of recovery and start, and rules 1 to 7 are checked again. A kill
without a power cut is tried in the same way, with a cut after it, in recovery or in the step that is then done again:
what was not synced before the kill is not synced yet.
"""

from __future__ import annotations

import errno
import functools
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from crash_disk import CrashDisk, Image, changed
from crash_life import MAX_STARTS, NOW, SCRIPT, Agent, Step
from msgspec.structs import replace

from edge_ilseg import pack_index
from edge_ilseg.devices.update.decisions import kept_candidate, refusal, rolled_back, wanted_content
from edge_ilseg.devices.update.slots import bundle_path, current_content, is_whole, slot_names
from edge_ilseg.devices.update.state import AgentState, Installed, read_copies, read_state
from edge_ilseg.errors import UpdateError

RELIVED = 40
"""After each so many kills the whole step is lived again, and cut at each operation: it takes long."""

Loads = tuple[tuple[int, int], ...]
Possible = tuple[AgentState | None, ...]


class Violation(AssertionError):
    """A rule is broken."""


class Stop(NamedTuple):
    """What could be left at one operation: an image, or the disk of a killed process."""

    image: Image
    killed: CrashDisk | None
    loads: Loads


class Explorer:
    """Lives a script once, and checks at each operation what a cut or a kill would leave there."""

    def __init__(
        self,
        agent: type[Agent] = Agent,
        disk: type[CrashDisk] = CrashDisk,
        *,
        second: bool = True,
        relived: int = RELIVED,
    ) -> None:
        self.agent_type, self.disk_type, self.second, self.relived = agent, disk, second, relived
        self.counts: Counter[str] = Counter()
        self._seen: set[object] = set()
        self._step, self._goal = SCRIPT[0], None
        self._damaged: str | None = None

    def explore(self, script: tuple[Step, ...] = SCRIPT) -> Counter[str]:
        """Cut and kill. Raises `Violation` at the first one."""
        for disk in self._steps(script):
            self._live(disk)
        return self.counts

    def refuse(self, code: int, *, lasting: bool, script: tuple[Step, ...] = SCRIPT) -> Counter[str]:
        """Let each operation fail with an error of the disk: it alone, or all after it, too (rule 9)."""
        for disk in self._steps(script):
            before = read_copies(disk).state
            for number in range(self._operations(disk)):
                self._refuse_one(disk.killed(), number, code, lasting=lasting, is_set_up=before is not None)
            self._step.do(Agent(disk))
        return self.counts

    def _steps(self, script: tuple[Step, ...]) -> Iterator[CrashDisk]:
        """The disk at the beginning of each step, on which the step is then to be done."""
        disk = self.disk_type()
        with parsed_once():
            for step in script:
                self._step, self._damaged = step, step.rot
                if step.rot is not None:
                    disk = self.disk_type(rotten(disk.kept(), step.rot))
                rehearsal = self.agent_type(disk.killed())
                with self._told():
                    step.do(rehearsal)
                self._goal = read_state(rehearsal.disk)
                yield disk

    def _operations(self, disk: CrashDisk) -> int:
        rehearsal, operations = disk.killed(), list[str]()
        rehearsal.before = operations.append
        self._step.do(self.agent_type(rehearsal))
        return len(operations)

    def _live(self, disk: CrashDisk) -> None:
        """Do a step; what the operations between two returns may leave is judged by the states at both."""
        agent = self.agent_type(disk)

        def stop(operation: str) -> list[Stop]:
            self.counts["operations"] += bool(operation)
            loads = tuple(sorted(agent.loads.items()))
            stops = [Stop(image, None, loads) for image in disk.images()]
            return [*stops, Stop(disk.kept(), disk.killed(), loads)]

        self._watch(agent, disk, stop, self._check_stop)

    def _live_again(self, killed: Stop, disk: CrashDisk, durable: AgentState, going: AgentState | None) -> None:
        """The same after a kill: what that has left unsynced may be lost at any time after, and is `durable` then."""
        agent = self.agent_type(disk, dict(killed.loads))

        def stop(operation: str) -> list[Stop]:
            self.counts["operations after a kill"] += bool(operation)
            return [Stop(image, None, tuple(sorted(agent.loads.items()))) for image in disk.images()]

        def check(item: Stop, before: AgentState | None, after: AgentState | None) -> None:
            possible = (durable, going, before, after)
            if self._is_new("images of a cut after a kill", item, possible):
                with self._told():
                    self._check(item, durable, possible)

        self._watch(agent, disk, stop, check)

    def _watch(
        self, agent: Agent, disk: CrashDisk, stop: Callable[[str], list[Stop]], check: Callable[..., None]
    ) -> None:
        waiting: list[Stop] = []
        before = read_copies(disk).state

        def returned() -> None:
            nonlocal before
            waiting.extend(stop(""))
            after = read_copies(disk).state
            with self._told():
                check_floor(before, after)
            for item in waiting:
                check(item, before, after)
            waiting.clear()
            before = after

        disk.before, agent.on_step = lambda operation: waiting.extend(stop(operation)), returned
        self._step.do(agent)
        returned()
        disk.before = None

    def _check_stop(self, item: Stop, before: AgentState | None, after: AgentState | None) -> None:
        if item.killed is not None:
            self.counts["kills"] += 1  # its image is among those of a cut: only what follows differs
            if before is not None and self.relived and self.counts["kills"] % self.relived == 0:
                self._live_again(item, item.killed.killed(), before, after)
        elif not self._is_new("images after a cut", item, (before, after)):
            return
        else:
            with self._told():
                if before is not None:
                    self._check(item, before, (before, after))
                again = self.agent_type(self.disk_type(item.image), dict(item.loads))
                self._step.do(again)
                self._check_goal(again)
        if self.second and before is not None:
            disk = item.killed if item.killed is not None else self.disk_type(item.image)
            self._cut_again(disk, item.loads, before, after)

    def _cut_again(self, disk: CrashDisk, loads: Loads, before: AgentState, after: AgentState | None) -> None:
        agent = self.agent_type(disk, dict(loads))
        waiting: list[Stop] = []

        def stop(operation: str) -> None:
            self.counts["operations of recovery"] += bool(operation)
            now = tuple(sorted(agent.loads.items()))
            waiting.extend(Stop(image, None, now) for image in disk.images())

        disk.before = stop
        for do in (agent.recover, agent.check_running, agent.start_application):
            former = read_copies(disk).state
            do()
            stop("")
            possible = (before, after, former, read_copies(disk).state)
            for item in waiting:
                if self._is_new("images after a second cut", item, possible):
                    with self._told():
                        self._check(item, before, possible)
            waiting.clear()

    def _refuse_one(self, disk: CrashDisk, number: int, code: int, *, lasting: bool, is_set_up: bool) -> None:
        operations = list[str]()

        def refuse(operation: str) -> None:
            operations.append(operation)
            if len(operations) > number if lasting else len(operations) == number + 1:
                raise OSError(code, os.strerror(code), operation)

        agent = self.agent_type(disk)
        disk.before = refuse
        self.counts["operations refused"] += 1
        with self._told():
            try:
                self._step.do(agent)
            except UpdateError:
                self.counts["of these, told as an error"] += 1
            if is_set_up:
                start = agent.start_application()
                require(is_whole(disk, start.content_id, bundle_only=True), "rule 9: a damaged model is loaded")
            disk.before = None
            if is_set_up:
                self._check_as_found(disk)
            self._step.do(agent)
            require(max(agent.loads.values(), default=0) <= MAX_STARTS, f"rule 7: loaded {agent.loads}")

    def _check(self, item: Stop, before: AgentState, possible: Possible) -> None:
        """Rules 1 to 7."""
        disk = self.disk_type(item.image)
        self._check_as_found(disk)
        agent = self.agent_type(disk, dict(item.loads))
        self._check_recovered(disk, agent.recover().state, before, possible)
        disk.before = refuse_to_write
        agent.recover()
        disk.before = None
        loaded = {agent.start_application().content_id for _ in range(MAX_STARTS + 1)}
        self.counts["starts"] += MAX_STARTS + 1
        for content_id in loaded:
            require(is_whole(disk, content_id, bundle_only=True), f"rule 7: {content_id[:8]} is loaded, and damaged")
        require(max(agent.loads.values(), default=0) <= MAX_STARTS, f"rule 7: loaded {agent.loads}")
        end = read_state(disk)
        require(end.phase not in ("trial", "rollback"), f"rule 7: still {end.phase}")
        require(end.active in actives(possible), f"rule 7: ends on {end.active}")
        require(current_content(disk) == end.active.content_id, "rule 7: current is not the active model")

    def _check_as_found(self, disk: CrashDisk) -> None:
        """Rules 1 and 2, before anything is mended."""
        state = read_state(disk)  # no look at the copy
        content = current_content(disk)
        require(content is not None, "rule 1: current is missing or names nothing")
        in_use = {state.active.content_id, wanted_content(state)}
        if state.rollback is not None:
            in_use.add(state.rollback.bad.content_id)
        require(content in in_use, "rule 1: current names what the state does not know as in use")
        require(disk.kind(bundle_path(str(content))) == "folder", "rule 1: current leads nowhere")
        for name in slot_names(disk):
            require(name == self._damaged or is_whole(disk, name), f"rule 2: slot {name[:8]} is not whole")

    def _check_recovered(self, disk: CrashDisk, state: AgentState, before: AgentState, possible: Possible) -> None:
        """Rules 3 to 6."""
        require(current_content(disk) == wanted_content(state), "rule 3: current is not what the state wants")
        known = set(possible)
        if state.phase == "idle":  # a roll-back that recovery has finished
            known |= {rolled_back(item, item.rollback.good, NOW) for item in possible if item and item.rollback}
        require(state in known, f"rule 4: {state}")
        for entry in before.rejected:
            require(refusal(state, entry.release, entry.content_id) is not None, f"rule 5: {entry.release} is taken")
        if state.candidate is not None:
            rejected = {entry.release for entry in state.rejected}
            require(kept_candidate(state).release not in rejected, "rule 5: a rejected release is on its way")
        for item in (state.active, state.previous, state.factory):
            is_kept = item is None or item.content_id == self._damaged or is_whole(disk, item.content_id)
            require(is_kept, f"rule 6: the slot of {item} is not whole")

    def _check_goal(self, agent: Agent) -> None:
        state, goal = read_state(agent.disk), self._goal
        require(goal is not None and without_reasons(state) == without_reasons(goal), f"rule 8: {state}\nnot {goal}")

    def _is_new(self, what: str, item: Stop, possible: Possible) -> bool:
        key = (what, item.image, item.loads, possible, self._step.name)
        if key in self._seen:
            return False
        self._seen.add(key)
        self.counts[what] += 1
        return True

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise Violation(f"step {self._step.name!r}: {error}") from error


@contextmanager
def parsed_once() -> Iterator[None]:
    """The same few indexes are parsed a million times: equal bytes give the value from before."""
    parse = pack_index.parse_index
    pack_index.parse_index = functools.lru_cache(parse)  # type: ignore[assignment]
    try:
        yield
    finally:
        pack_index.parse_index = parse


def require(is_so: bool, what: str) -> None:
    """Raise `Violation` unless it is so."""
    if not is_so:
        raise Violation(what)


def check_floor(before: AgentState | None, after: AgentState | None) -> None:
    """Rule 4, for a step that was not cut off."""
    if before is None or after is None:
        return
    is_new = after.active.release == after.release_floor and after.active != before.active
    require(after.release_floor >= before.release_floor, "rule 4: the floor falls")
    require(after.release_floor == before.release_floor or is_new, "rule 4: the floor rises without an active model")


def rotten(image: Image, content_id: str) -> Image:
    """An image in which a bit of the model in a slot has turned."""
    path = f"{bundle_path(content_id)}/models/model.bin"
    return changed(image, path, lambda data: bytes([data[0] ^ 1]) + data[1:])


def actives(possible: Possible) -> set[Installed]:
    """What may be active after a cut."""
    states = [item for item in possible if item is not None]
    return {item.active for item in states} | {item.rollback.good for item in states if item.rollback is not None}


def without_reasons(state: AgentState) -> AgentState:
    """A gate that was cut off counts as one without a verdict, and is told so."""
    return replace(state, rejected=tuple(replace(entry, reason="") for entry in state.rejected))


def refuse_to_write(operation: str) -> None:
    """For `CrashDisk.before`, where nothing is left to be written."""
    raise Violation(f"rule 3: recovery is not done: {operation}")


def main() -> int:
    """Explore, and print the counts. With `--all`, the step is lived again after every kill."""
    start_s = time.process_time()
    explorer = Explorer(relived=1 if "--all" in sys.argv[1:] else RELIVED)
    explorer.explore()
    for code in (errno.ENOSPC, errno.EIO):
        for lasting in (False, True):
            explorer.refuse(code, lasting=lasting)
    for name, count in explorer.counts.items():
        print(f"{count:8,} {name}")
    print("       0 violations")
    print(f"{time.process_time() - start_s:8.1f} s of CPU time", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
