"""A child process that may crash, hang or eat memory, and takes nothing else down with it.

1. The child leads a session of its own. At its end, and whatever ends the wait (Ctrl-C too), its whole group is killed.
2. It has a deadline, and the resident memory of its group is looked at while it runs; beyond either, it is killed.
3. Before it does anything else, the child itself sets what the kernel can hold it to (`confine`): processor seconds, no
   core file, private memory, size of a file. It is also the first that the kernel kills when memory runs out, it gives
   way to others, and it dies with the process that started it.
4. `RLIMIT_AS` is not used. It counts addresses, and runtimes reserve those without ever touching them: measured on a
   network of 12 MB with two threads, OpenVINO reserves 541 MiB and touches 143, onnxruntime 348 and 126; under a limit
   of 512 MiB OpenVINO does not even start. `RLIMIT_DATA` counts private memory that can be written (187 and 162 MiB
   there): what Python and the stacks of threads reserve beyond what they touch is granted on top (`data_limit_mib`). It
   holds a model that grows faster than anybody looks; resident memory (rule 2) is the limit that a user sets. Too low a
   limit does not make onnxruntime fail, but hang: threads that cannot be made are waited for.
5. Its environment holds what is needed to find and start a runtime, and nothing else: no proxy, no token.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import edge_ilseg
from edge_ilseg.errors import UpdateError

POLL_S = 0.05
RSS_POLL_S = 0.2
OVERHEAD_MIB, PER_THREAD_MIB = 256, 48
"""Private memory beyond what is touched: Python and its packages; for each core or thread, stacks and arenas of the
threads of numpy, of the runtime and of this project."""
TAIL_BYTES = 4096
KEPT_VARIABLES = frozenset(
    {
        *("PATH", "HOME", "USER", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH"),
        *("PYTHONPATH", "PYTHONHOME", "PYTHONUSERBASE", "VIRTUAL_ENV"),
        *("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"),
    }
)
PR_SET_PDEATHSIG = 1  # linux/prctl.h
START = """
import sys
sys.path.insert(0, sys.argv[1])
import edge_ilseg
del sys.path[0]
import runpy
runpy.run_module(sys.argv.pop(2), run_name="__main__")
"""
"""Like `-m`, with the very package that runs here, and without the current folder among the places of modules."""


class Ended(NamedTuple):
    """How a child came to its end."""

    status: int
    """As of `subprocess`: negative for a signal."""
    killed_for: str | None
    """Why it was killed from here; `None`: it ended by itself."""
    peak_mib: float | None
    """The highest resident memory of its group that was seen."""
    last_words: str
    """The last line that it wrote to standard error."""

    @property
    def problem(self) -> str | None:
        """What went wrong, in words; `None`: nothing."""
        if self.killed_for is not None:
            return self.killed_for
        if self.status == 0:
            return None
        how = f"exit status {self.status}"
        if self.status < 0:
            how = f"signal {_signal_name(-self.status)}"
        return f"the process ended with {how}" + (f": {self.last_words}" if self.last_words else "")


def run_confined(module: str, request: bytes, folder: Path, *, timeout_s: float, memory_mib: int) -> Ended:
    """Run a module of this package in a child process (rules 1, 2 and 5) and wait for its end.

    Args:
        module: as `python -m` takes it; it calls `confine` first.
        request: its standard input.
        folder: for its temporary files; it works there, and its standard error is kept there.
        timeout_s: after so long it is killed.
        memory_mib: when its group has more in memory, it is killed. Without `/proc` nobody looks.

    Raises:
        UpdateError: no process can be made.
    """
    command = [sys.executable, "-P", "-c", START, str(Path(edge_ilseg.__file__).parents[1]), module]
    (folder / "request").write_bytes(request)
    errors = folder / "stderr"
    try:
        with (folder / "request").open("rb") as given, errors.open("wb") as said:
            process = subprocess.Popen(
                command,
                stdin=given,
                stdout=said,
                stderr=said,
                cwd=folder,
                env=clean_environment(os.environ, folder),
                start_new_session=True,
            )
    except OSError as error:
        raise UpdateError(
            "a process for the gate cannot be made",
            found=error.strerror or str(error),
            hint="end other programs, and run the same command again",
        ) from error
    try:
        killed_for, peak_mib = _watch(process.pid, timeout_s, memory_mib)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # not reaped yet, so that the number is still its own
        status = process.wait()
    return Ended(status, killed_for, peak_mib, _last_line(errors))


def _watch(pid: int, timeout_s: float, memory_mib: int) -> tuple[str | None, float | None]:
    """Wait for the end of a child without reaping it, or for a reason to kill it (rule 2)."""
    end_s = time.monotonic() + timeout_s
    next_look_s, peak_mib = 0.0, None
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        now_s = time.monotonic()
        if now_s >= end_s:
            return f"it took longer than {timeout_s:g} s, and was killed", peak_mib
        if now_s >= next_look_s:
            rss_mib = group_rss_mib(pid)
            next_look_s = time.monotonic() + RSS_POLL_S
            if rss_mib is not None:
                peak_mib = max(rss_mib, peak_mib or 0.0)
                if rss_mib > memory_mib:
                    return f"it took more than {memory_mib} MiB of memory ({rss_mib:.0f}), and was killed", peak_mib
        time.sleep(min(POLL_S, max(0.0, end_s - now_s)))
    return None, peak_mib


def confine(*, parent_pid: int, cpu_s: int, data_mib: int, file_mib: int, nice: int) -> None:
    """Hold this process, and those that it starts, to limits (rule 3); what a system does not know is left out."""
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_CPU, cpu_s)
    _lower(resource.RLIMIT_DATA, data_mib << 20)
    _lower(resource.RLIMIT_FSIZE, file_mib << 20)
    os.nice(nice)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:  # it has ended before the call
            os.kill(os.getpid(), signal.SIGKILL)


def data_limit_mib(memory_mib: int, threads: int | None) -> int:
    """Private memory that lets a process have `memory_mib` of it resident (rule 4), with so many threads a runtime."""
    return memory_mib + OVERHEAD_MIB + PER_THREAD_MIB * max(os.cpu_count() or 1, threads or 1)


def cpu_limit_s(timeout_s: float) -> int:
    """Processor seconds that no run within `timeout_s` can use up: a child whose parent was killed ends, too."""
    return int(timeout_s) * (os.cpu_count() or 1) + 60


def clean_environment(environment: Mapping[str, str], folder: Path) -> dict[str, str]:
    """What a child is given of this process's environment (rule 5)."""
    kept = {name: value for name, value in environment.items() if name in KEPT_VARIABLES}
    return kept | {"TMPDIR": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}


def group_rss_mib(group: int, *, proc: Path = Path("/proc")) -> float | None:
    """Resident memory of all processes of a group together; `None` where the system does not tell.

    What several of them share is counted for each: the sum is never too low.
    """
    pages, is_told = 0, False
    try:
        names = [name for name in os.listdir(proc) if name.isdigit()]
    except OSError:
        return None
    for name in names:
        try:
            fields = (proc / name / "stat").read_bytes().rpartition(b")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if len(fields) > 21:
            is_told = True
            if int(fields[2]) == group:
                pages += int(fields[21])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20) if is_told else None


def _lower(kind: int, value: int) -> None:
    with suppress(OSError, ValueError):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def _last_line(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return " ".join(lines[-1].split())[:300] if lines else ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
