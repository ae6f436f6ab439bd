"""One call of an operation of `devices/remote_store.py` on a device: source, request and files in, one answer out.

1. The source of `remote_store` is sent with every call: nothing is installed there, and nothing can be out of date.
2. The device's Python is asked for its version before any of our source is compiled there.
3. An answer is recognized by a token of this call, whatever a login script prints around it, and is read strictly.
"""

from __future__ import annotations

import json
import secrets
import shlex
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

import msgspec

from edge_ilseg.devices import remote_store
from edge_ilseg.devices.remote_files import SentFile
from edge_ilseg.devices.ssh import Connection, Device, RemoteError, Reply, last_line, plain, shell_word
from edge_ilseg.errors import ACCESS_HINT, DataError
from edge_ilseg.progress import ProgressCallback

LEAST_PYTHON = (3, 11)
BOOTSTRAP = (
    "import sys;v=sys.version_info[:2];"
    'sys.stdout.write("\\n%s python %d.%d\\n"%((sys.argv[3],)+v));sys.stdout.flush();'
    f"v<{LEAST_PYTHON} and sys.exit(1);i=sys.stdin.buffer;"
    'exec(compile(i.read(int(sys.argv[1])),"remote_store","exec"));main(i.read(int(sys.argv[2])),sys.argv[3])'
)
"""Runs in any Python (rule 2). One line without `!` and `'`, so that any shell can quote it."""
RUN_AGAIN = "run the same command again"
SAME_VERSION = "use the same version of edge-ilseg here and on the device"

T = TypeVar("T")


class _Failure(msgspec.Struct, frozen=True):
    what: str
    where: str | None
    found: str | None
    hint: str | None


class _Head(msgspec.Struct, frozen=True):
    error: _Failure | None = None


def call(
    connection: Connection,
    python: str,
    operation: str,
    request: Mapping[str, Any],
    answer: type[T],
    *,
    feed: Callable[[IO[bytes]], None] | None = None,
    keep_open: bool = False,
) -> T:
    """Run an operation of `remote_store` on a device.

    Args:
        connection: to the device.
        python: its Python.
        operation: a key of `remote_store.OPERATIONS`.
        request: its arguments.
        answer: the type of its result.
        feed: writes what the operation reads.
        keep_open: see `Connection.run`.

    Raises:
        RemoteError: it failed, or gave no such answer.
    """
    token = secrets.token_hex(16)
    source = Path(remote_store.__file__).read_bytes()
    body = json.dumps({"do": operation, **request}).encode()
    command = f"{shell_word(python)} -I -c {shlex.quote(BOOTSTRAP)} {len(source)} {len(body)} {token}"

    def send(stdin: IO[bytes]) -> None:
        stdin.write(source + body)
        if feed is not None:
            feed(stdin)

    reply = connection.run(command, send, keep_open=keep_open)
    _, *parts = reply.output.split(f"\n{token} ".encode())
    if len(parts) != 2:
        raise _no_answer(connection.device, python, reply, parts)
    line = parts[1].partition(b"\n")[0]
    try:
        failure = msgspec.json.decode(line, type=_Head).error
        if failure is None:
            return msgspec.json.decode(line, type=answer)
    except msgspec.DecodeError as error:
        raise RemoteError(
            "the answer of the device cannot be read", where=connection.device, found=error, hint=SAME_VERSION
        ) from error
    raise RemoteError(
        plain(failure.what),
        where=f"{connection.device}{f', {plain(failure.where)}' if failure.where else ''}",
        found=None if failure.found is None else plain(failure.found),
        hint=plain(failure.hint or SAME_VERSION),
    )


def _no_answer(device: Device, python: str, reply: Reply, parts: Sequence[bytes]) -> RemoteError:
    """Why there is a greeting at most, and no answer."""
    found = last_line(reply.messages) or f"exit code {reply.exit_code}"
    if not parts:
        return RemoteError(
            "Python could not be started on the device",
            where=device,
            found=found,
            expected=f"Python {'.'.join(map(str, LEAST_PYTHON))} or later as {python}",
            hint="install it there, or say where it is: --remote-python PATH",
        )
    version = plain(parts[0].decode(errors="replace").partition("\n")[0].removeprefix("python "))
    numbers = version.split(".")
    if all(number.isdigit() for number in numbers) and tuple(map(int, numbers)) < LEAST_PYTHON:
        return RemoteError(
            "the Python of the device is too old",
            where=device,
            found=f"Python {version}",
            expected=f"Python {'.'.join(map(str, LEAST_PYTHON))} or later",
            hint="name another one: --remote-python PATH",
        )
    return RemoteError(
        "what ran on the device ended before it answered: it was killed, or has crashed",
        where=device,
        found=found,
        hint=f"see whether it ran out of memory there (dmesg), and {RUN_AGAIN}",
    )


def send_files(files: Sequence[SentFile], stdin: IO[bytes], progress: ProgressCallback) -> None:
    """Write files as a tar stream, each named by its hash: what `remote_store.put` reads.

    Raises:
        DataError: a file cannot be read, or is shorter than it was.
        BrokenPipeError: nobody reads any more.
    """
    total, done = max(sum(file.size_bytes for file in files), 1), 0
    for file in files:
        member = tarfile.TarInfo(file.sha256)
        member.size = left = file.size_bytes
        try:
            with file.path.open("rb") as opened:
                stdin.write(member.tobuf(tarfile.GNU_FORMAT))
                while left and (chunk := opened.read(min(remote_store.CHUNK_BYTES, left))):
                    stdin.write(chunk)
                    left -= len(chunk)
                    done += len(chunk)
                    progress("copying", done / total)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise DataError(
                "a file cannot be read", where=file.path, found=error.strerror or str(error), hint=ACCESS_HINT
            ) from error
        if left:
            raise DataError("a file became shorter while it was copied", where=file.path, hint=RUN_AGAIN)
        stdin.write(bytes(-file.size_bytes % tarfile.BLOCKSIZE))
    stdin.write(bytes(2 * tarfile.BLOCKSIZE))
