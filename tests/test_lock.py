"""Locks between processes: a deadline, the holder's name, and nothing left of one that was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edge_ilseg.devices.update.lock import held
from edge_ilseg.errors import UpdateError

HOLD = """
import subprocess, sys, time
from pathlib import Path
from edge_ilseg.devices.update.lock import held
with held(Path(sys.argv[1]), deadline_s=20):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=subprocess.DEVNULL)
    print(child.pid, flush=True)
    time.sleep(60)
"""
COUNT = """
import sys
from pathlib import Path
from edge_ilseg.devices.update.lock import held
lock, number = Path(sys.argv[1]), Path(sys.argv[2])
for _ in range(50):
    with held(lock, deadline_s=60):
        value = int(number.read_text())
        number.write_text("")  # what the other one would read without a lock
        number.write_text(str(value + 1))
"""


@contextmanager
def holder(lock: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that holds the lock, and the one that it has started."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        yield process, child
    finally:
        process.kill()
        process.communicate()
        os.kill(child, signal.SIGKILL)


def test_who_waits_too_long_is_told_which_process_holds_the_lock(tmp_path: Path) -> None:
    with (
        holder(tmp_path / "lock") as (process, _),
        pytest.raises(UpdateError, match="another command is at work") as caught,
        held(tmp_path / "lock", deadline_s=0.1),
    ):
        pass
    assert f"held by process {process.pid} " in str(caught.value.found)


def test_a_killed_holder_leaves_no_lock_though_a_program_that_it_started_lives_on(tmp_path: Path) -> None:
    with holder(tmp_path / "lock") as (process, child):
        process.kill()
        process.wait()
        os.kill(child, 0)  # it is there
        with held(tmp_path / "lock", deadline_s=5):
            assert (tmp_path / "lock").read_text() == str(os.getpid())


def test_two_processes_take_turns(tmp_path: Path) -> None:
    number = tmp_path / "number"
    number.write_text("0")
    command = [sys.executable, "-c", COUNT, str(tmp_path / "lock"), str(number)]
    both = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert number.read_text() == "100"


def test_the_lock_is_free_after_the_block_and_after_an_error_in_it(tmp_path: Path) -> None:
    with held(tmp_path / "lock", deadline_s=0):
        pass
    assert (tmp_path / "lock").read_text() == ""
    with pytest.raises(RuntimeError), held(tmp_path / "lock", deadline_s=0):
        raise RuntimeError
    with held(tmp_path / "lock", deadline_s=0):
        pass


def test_a_lock_that_cannot_be_opened_is_an_error_that_names_it(tmp_path: Path) -> None:
    with (
        pytest.raises(UpdateError, match="a lock cannot be opened"),
        held(tmp_path / "missing" / "lock", deadline_s=0),
    ):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to any file")
def test_a_reader_may_lock_a_file_that_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "lock").touch(mode=0o444)
    with held(tmp_path / "lock", deadline_s=0):
        pass


def test_the_lock_may_be_taken_by_the_group_whatever_the_umask(tmp_path: Path) -> None:
    former = os.umask(0o077)
    try:
        with held(tmp_path / "lock", deadline_s=0):
            pass
    finally:
        os.umask(former)
    assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o664


def test_two_holders_in_one_process_exclude_each_other_too(tmp_path: Path) -> None:
    start_s = time.monotonic()
    with (
        held(tmp_path / "lock", deadline_s=0),
        pytest.raises(UpdateError, match="another command"),
        held(tmp_path / "lock", deadline_s=0.05),
    ):
        pass
    assert time.monotonic() >= start_s + 0.05
