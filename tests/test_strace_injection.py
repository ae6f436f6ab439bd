"""Real system calls of a real process on a real file system, killed or refused at each of them by `strace -e inject`.

`update_driver.py` is set up, confirms a release and rolls one back. The process is killed as it enters its N-th
`fsync`, `rename`, ..., for each N, or gets an error from it; then the same life goes on here, with nothing injected.
What a kill does not lose, the page cache, a power cut would: that is `test_crash_explorer.py`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from crash_explorer import without_reasons
from crash_life import MAX_STARTS, NOW
from update_driver import live

from edge_ilseg.devices.update import lifecycle
from edge_ilseg.devices.update.decisions import wanted_content
from edge_ilseg.devices.update.disk import RealDisk
from edge_ilseg.devices.update.slots import check_slot, current_content, slot_names
from edge_ilseg.devices.update.state import AgentState, read_copies, read_state

pytestmark = pytest.mark.exhaustive

DRIVER = Path(__file__).with_name("update_driver.py")
MARK = "sched_yield"
KILLED = (-9, 137)
REFUSED = 3
NAMES = ("fsync", "write", "openat", "rename", "mkdir", "symlink", "unlink", "rmdir", "read", "readlink", "getdents64")
"""As a C library calls them on x86-64; elsewhere it may be `renameat2` or `mkdirat`."""


class Calls(NamedTuple):
    """The calls of one name in the driver's life, counted from the start of the process."""

    name: str
    numbers: tuple[int, ...]


def strace(arguments: list[str], root: Path, log: Path) -> subprocess.CompletedProcess[str]:
    # Faster with --seccomp-bpf, but strace 6.1 then delivers no signal.
    fast = [] if any("signal=" in argument for argument in arguments) else ["--seccomp-bpf"]
    command = ["strace", "-f", *fast, "-qq", "-o", str(log), *arguments]
    environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, sys.executable, "-B", str(DRIVER), str(root)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Calls]:
    """Which calls of each name belong to the life; `create` are the `openat` that make a file."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed: no system call can be killed or refused")
    tried = subprocess.run(["strace", "-qq", "-e", "trace=none", "true"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        pytest.skip(f"strace may not trace here (ptrace is not allowed): {tried.stderr.strip()[:200]}")
    folder = tmp_path_factory.mktemp("counted")
    (folder / "root").mkdir()
    variants = [f"?{name}{suffix}" for name in NAMES for suffix in ("", "at", "at2")]
    log = folder / "log"
    done = strace(["-e", f"trace={MARK},{','.join(variants)}"], folder / "root", log)
    assert done.returncode == 0, done.stderr
    found: dict[str, Calls] = {}
    counts = Counter[str]()
    for line in log.read_text().splitlines():
        name = line.split("(")[0].split()[-1]
        counts[name] += 1
        kinds = [item for item in NAMES if name in (item, f"{item}at", f"{item}at2")]
        for kind in [*kinds, *(["create"] if "O_CREAT" in line else [])] if counts[MARK] else ():
            numbers = found[kind].numbers if kind in found else ()
            found[kind] = Calls(name, (*numbers, counts[name]))
    return found


@pytest.fixture(scope="module")
def goal(tmp_path_factory: pytest.TempPathFactory) -> AgentState:
    """The end of a life in which nothing happened."""
    root = tmp_path_factory.mktemp("goal")
    live(root)
    return read_state(RealDisk(root))


def inject(
    effect: str,
    calls: Calls,
    expected: tuple[int, ...],
    goal: AgentState,
    tmp_path: Path,
    *,
    every: int = 1,
    lasting: bool = False,
) -> Counter[int]:
    """Live with an effect at each of the calls, judge what is left, and live on; how often each exit status came."""

    def one(number: int) -> int:
        root = tmp_path / f"{effect.replace('=', '-')}-{number}"
        root.mkdir()
        when = f"{number}+" if lasting else str(number)
        arguments = ["-e", f"trace={calls.name}", "-e", f"inject={calls.name}:{effect}:when={when}"]
        done = strace(arguments, root, root.with_suffix(".log"))
        assert done.returncode in expected, f"{calls.name} {number}: {done.returncode}\n{done.stdout}{done.stderr}"
        check_left(root, goal)
        shutil.rmtree(root)
        return done.returncode

    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        return Counter(pool.map(one, calls.numbers[::every]))


def check_left(root: Path, goal: AgentState) -> None:
    """The invariants, and that the life goes on to the same end."""
    disk = RealDisk(root)
    if current_content(disk) is not None:
        check_found(disk)
        twin = root.with_suffix(".twin")
        shutil.copytree(root, twin, symlinks=True)
        check_starts(RealDisk(twin))
        shutil.rmtree(twin)
    live(root)
    state = read_state(disk)
    assert without_reasons(state) == without_reasons(goal)
    assert current_content(disk) == state.active.content_id
    assert {path.name for path in (root / "slots").iterdir()} == {item.content_id for item in kept(state)}


def kept(state: AgentState) -> list[lifecycle.Installed]:
    return [item for item in (state.active, state.previous, state.factory) if item is not None]


def check_found(disk: RealDisk) -> None:
    """Before anything is mended: a reader finds a whole model, and no slot is half there."""
    state = read_state(disk)
    content = current_content(disk)
    assert content in {state.active.content_id, wanted_content(state)} or state.rollback is not None
    for name in slot_names(disk):
        check_slot(disk, name)


def check_starts(disk: RealDisk) -> None:
    """Recovery ends; without a confirmation, the device is on a permanent model after the starts that it may have."""
    before = read_copies(disk).state
    state = lifecycle.recover(disk, NOW).state
    assert current_content(disk) == wanted_content(state)
    assert before is not None
    assert state.release_floor == before.release_floor
    trials = [lifecycle.count_start(disk, NOW).is_on_trial for _ in range(MAX_STARTS + 1)]
    assert trials.count(True) <= MAX_STARTS
    end = read_state(disk)
    assert end.phase not in ("trial", "rollback")
    assert current_content(disk) == end.active.content_id
    assert all(entry in end.rejected for entry in before.rejected)


Told = Callable[[str, str, Counter[int]], None]


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Told:
    def tell(name: str, effect: str, counts: Counter[int]) -> None:
        with capsys.disabled():
            print(f"\n{name} {effect}: {counts.total()} lives, {counts[0]} went on to their end", end="")

    return tell


@pytest.mark.parametrize(
    ("name", "every"),
    [
        ("fsync", 1),
        ("write", 3),
        ("rename", 1),
        ("mkdir", 1),
        ("symlink", 1),
        ("unlink", 1),
        ("rmdir", 1),
        ("openat", 9),
    ],
)
def test_a_kill_at_any_system_call_loses_nothing(
    name: str, every: int, calls: dict[str, Calls], goal: AgentState, tmp_path: Path, told: Told
) -> None:
    counts = inject("signal=KILL", calls[name], KILLED, goal, tmp_path, every=every)
    told(name, "killed", counts)
    assert counts.total() >= 3


@pytest.mark.parametrize(("name", "every"), [("write", 2), ("create", 3), ("mkdir", 1), ("symlink", 1), ("rename", 2)])
def test_a_full_disk_is_told_and_loses_nothing(
    name: str, every: int, calls: dict[str, Calls], goal: AgentState, tmp_path: Path, told: Told
) -> None:
    counts = inject("error=ENOSPC", calls[name], (0, REFUSED), goal, tmp_path, every=every)
    told(name, "ENOSPC", counts)
    assert counts[REFUSED] > 0


def test_a_disk_that_stays_full_is_told_and_loses_nothing(
    calls: dict[str, Calls], goal: AgentState, tmp_path: Path, told: Told
) -> None:
    counts = inject("error=ENOSPC", calls["write"], (REFUSED,), goal, tmp_path, every=3, lasting=True)
    told("write", "ENOSPC from then on", counts)


@pytest.mark.parametrize(
    ("name", "every"),
    [
        ("fsync", 1),
        ("write", 4),
        ("rename", 2),
        ("mkdir", 2),
        ("symlink", 1),
        ("unlink", 1),
        ("rmdir", 1),
        ("openat", 7),
        ("read", 7),
        ("readlink", 4),
        ("getdents64", 4),
    ],
)
def test_an_io_error_is_mended_or_told_and_loses_nothing(
    name: str, every: int, calls: dict[str, Calls], goal: AgentState, tmp_path: Path, told: Told
) -> None:
    counts = inject("error=EIO", calls[name], (0, REFUSED), goal, tmp_path, every=every)
    told(name, "EIO", counts)
    assert counts.total() >= 3
