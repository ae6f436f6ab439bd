"""The process of a model that is measured: it is asked (`edge_ilseg.devices.bench_child`), and never outlives us.

1. It runs the very package that runs here, and takes no module of the current folder for another.
2. An answer has so long to come; a process that is late is killed, and the error says that it hung.
3. It ends when the context is left, whatever it is doing.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from contextlib import suppress
from threading import Event, Timer
from typing import TypeVar

import msgspec

from edge_ilseg.devices.bench_child import Answer, Failed, Request
from edge_ilseg.devices.own_process import module_command
from edge_ilseg.errors import EdgeIlsegError

GOODBYE_S = 5.0
"""How long a process may take to end by itself."""
A = TypeVar("A", bound=Answer)


class ModelProcess:
    """A process with one model."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        command = module_command("edge_ilseg.devices.bench_child")
        self.started_ns = time.monotonic_ns()
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
            )
        except OSError as error:
            self._errors.close()
            raise EdgeIlsegError(
                "a process for a model cannot be made",
                where=label,
                found=error.strerror,
                hint="end other programs, and run the same command again",
            ) from error

    def __enter__(self) -> ModelProcess:
        return self

    def __exit__(self, *_: object) -> None:
        """The end of its input ends it; one that computes on is killed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(GOODBYE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def ask(self, request: Request, kind: type[A], patience_s: float) -> A:
        """Send a request and wait for its answer, which is of `kind`.

        Args:
            request: what is asked for.
            kind: of the answer.
            patience_s: how long the answer may take (rule 2).

        Raises:
            EdgeIlsegError: the model cannot be run, or the process has ended, or hangs.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended: no answer will come
            self._process.stdin.write(msgspec.json.encode(request) + b"\n")
            self._process.stdin.flush()
        late = Event()
        timer = Timer(patience_s, self._give_up, (late,))
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if not line.endswith(b"\n"):
            raise self._hung(patience_s) if late.is_set() else self._ended()
        answer = msgspec.json.decode(line, type=Answer)
        if isinstance(answer, Failed):
            raise EdgeIlsegError(
                answer.what, where=answer.where, found=answer.found, expected=answer.expected, hint=answer.hint
            )
        assert isinstance(answer, kind)
        return answer

    def _give_up(self, late: Event) -> None:
        late.set()
        self._process.kill()

    def _hung(self, patience_s: float) -> EdgeIlsegError:
        self._process.wait()
        return EdgeIlsegError(
            "a model hangs: its process was ended",
            where=self._label,
            found=f"no answer within {patience_s:.0f} s",
            hint="measure it alone while nothing else runs here (--runtime, --precision), or with another --threads",
        )

    def _ended(self) -> EdgeIlsegError:
        status = self._process.wait()
        self._errors.seek(0)
        last = self._errors.read().decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
        return EdgeIlsegError(
            "the process of a model has ended",
            where=self._label,
            found=f"exit status {status}: {last[0]}",
            hint="a negative status is a signal: -9 usually means that the memory was not enough",
        )
