"""The part of `verify --on` that runs on the device: a cache of files by hash, and one verification of files in it.

Its source is sent and run by the device's Python. It is importable on its own: Python 3.11, standard library alone.

1. A blob is a file named by its SHA-256. It is written in a work folder, hashed as it arrives, and renamed into place
   when it is whole: what a broken transfer leaves is never under a blob's name.
2. A name is not trusted either: every run hashes the blobs that it needs, and a damaged one is removed and sent again.
3. A run sees hard links to blobs (copies where there can be none) in a work folder, which is removed at its end. One
   that a killed run has left is removed by the next: nobody holds its lock.
4. Where the disk fills up, everything that this transfer has brought is removed again.
5. The folder belongs to this user, and nobody else may write into it.
6. The standard input ends when the caller has gone: the verification is then killed.
7. A reply is one line that begins with the request's token; what login scripts print is none.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

CHUNK_BYTES = 1 << 20
DEFAULT_PYTHON = "python3"
DEFAULT_FOLDER = "~/.cache/edge-ilseg/remote"
"""Where nobody says otherwise: the Python that runs this, and the folder of the store."""
LOOK_FOR_OURSELVES = """
import json
found = {"edge_ilseg": None, "runtimes": [], "problem": None}
try:
    import edge_ilseg
    found["edge_ilseg"] = edge_ilseg.__version__
    from edge_ilseg.devices.runtime import installed_runtimes
    found["runtimes"] = installed_runtimes()
except Exception as error:
    found["problem"] = f"{type(error).__name__}: {error}"
print()
print(json.dumps(found))
"""


class StoreError(Exception):
    """What was wrong on the device; the caller makes an error for its user of it."""

    def __init__(self, what: str, *, where: object = None, found: str | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.parts = {"what": what, "where": None if where is None else str(where), "found": found, "hint": hint}


def greet() -> dict[str, Any]:
    """Which edge-ilseg this Python has, and which runtimes; `problem` is why one of them cannot be imported."""
    command = [sys.executable, "-P", "-c", LOOK_FOR_OURSELVES]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    lines = done.stdout.decode(errors="replace").splitlines()
    try:
        found: dict[str, Any] = json.loads(lines[-1])
    except (IndexError, ValueError):
        messages = done.stderr.decode(errors="replace").strip() or f"exit code {done.returncode}"
        return {"edge_ilseg": None, "runtimes": [], "problem": messages.splitlines()[-1]}
    return found


def look(folder: str, files: dict[str, int]) -> dict[str, Any]:
    """Which of `files` (hash -> size in bytes) are not here whole (rule 2), and how many of those were damaged.

    Raises:
        StoreError: what is missing does not fit on the disk, or the folder cannot be used.
    """
    store = _open_store(folder)
    missing, damaged = [], 0
    for sha256, size_bytes in files.items():
        blob = _blob(store, sha256)
        if not _is_whole(blob, sha256, size_bytes):
            missing.append(sha256)
            damaged += os.path.lexists(blob)
            blob.unlink(missing_ok=True)
    needed, free = sum(files[sha256] for sha256 in missing), shutil.disk_usage(store).free
    if needed > free:
        raise _full(store, f"{free / 2**20:.1f} MiB are free, {needed / 2**20:.1f} MiB are needed")
    return {"missing": missing, "damaged": damaged}


def put(folder: str, files: dict[str, int]) -> dict[str, Any]:
    """Store `files` (hash -> size in bytes), which come as members of a tar stream on standard input, named by hash.

    Raises:
        StoreError: the disk is full, the stream breaks off, or a file is not what its name says.
    """
    store = _open_store(folder)
    stored: list[Path] = []
    with work_folder(store) as work:
        try:
            with tarfile.open(fileobj=sys.stdin.buffer, mode="r|") as tar:
                for member in tar:
                    source = tar.extractfile(member)
                    if source is None or files.get(member.name) != member.size:
                        raise StoreError("a file that was not announced has arrived", found=member.name)
                    stored.append(receive(source, member.name, work, _blob(store, member.name)))
        except tarfile.TarError as error:
            raise StoreError("the transfer broke off", found=str(error)) from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                for blob in stored:
                    blob.unlink(missing_ok=True)
            raise
    if len(stored) != len(files):
        raise StoreError("the transfer broke off", found=f"{len(stored)} of {len(files)} files")
    return {"stored": len(stored)}


def receive(source: IO[bytes], sha256: str, work: Path, blob: Path) -> Path:
    """Write what `source` gives as a blob (rule 1), and return its path.

    Raises:
        StoreError: it is not what its name says.
    """
    part, digest = work / sha256, hashlib.sha256()
    with part.open("wb") as file:
        while chunk := source.read(CHUNK_BYTES):
            digest.update(chunk)
            file.write(chunk)
    if digest.hexdigest() != sha256:
        part.unlink()
        raise StoreError(
            "a file has arrived with another content than was announced",
            found=f"sha256 {digest.hexdigest()[:12]}, announced {sha256[:12]}",
            hint="do not change the files while they are copied; run the same command again",
        )
    part.chmod(0o400)
    blob.parent.mkdir(parents=True, exist_ok=True)
    part.replace(blob)
    return blob


def run(
    folder: str, files: list[tuple[str, str]], folders: list[str], arguments: list[str | tuple[str, str]]
) -> dict[str, Any]:
    """Lay blobs out in a work folder and run `edge-ilseg` there (rules 3 and 6).

    Args:
        folder: the store.
        files: (name in the work folder, hash of the blob).
        folders: names of folders that are there even if they are empty.
        arguments: of the command; a pair is a prefix and a name in the work folder.

    Raises:
        StoreError: a blob is gone.
    """
    store = _open_store(folder)
    with work_folder(store) as work:
        for name in folders:
            (work / name).mkdir(parents=True, exist_ok=True)
        for name, sha256 in files:
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            _lay_out(_blob(store, sha256), work / name)
        words = [item if isinstance(item, str) else f"{item[0]}{work / item[1]}" for item in arguments]
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "edge_ilseg", *words],
            cwd=work,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        threading.Thread(target=_kill_at_the_end_of_input, args=(child,), daemon=True).start()
        output, messages = (part.decode(errors="replace") for part in child.communicate())
        return {"exit_code": child.returncode, "output": output, "messages": messages, "folder": str(work)}


def _kill_at_the_end_of_input(child: subprocess.Popen[bytes]) -> None:
    """Rule 6. Not by `sys.stdin`: its lock, held by a thread, would stop Python from ending."""
    while os.read(0, CHUNK_BYTES):
        pass
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # with the processes that it has started


@contextlib.contextmanager
def work_folder(store: Path) -> Iterator[Path]:
    """A new folder in the store, locked while it is in use, and removed after; first those of killed runs (rule 3)."""
    parent = store / "work"
    parent.mkdir(exist_ok=True)
    for left in parent.glob("*.lock"):
        _remove_if_free(left)
    while True:
        descriptor, name = tempfile.mkstemp(suffix=".lock", dir=parent)
        lock = Path(name)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if lock.exists():  # else another run took it for one that was left, just before it was locked
            break
        os.close(descriptor)
    folder = lock.with_suffix("")
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _remove_if_free(lock: Path) -> None:
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
        lock.unlink(missing_ok=True)
    except BlockingIOError:
        pass
    finally:
        os.close(descriptor)


def _open_store(folder: str) -> Path:
    """The store's folder, made if it is not there (rule 5)."""
    store = Path(os.path.abspath(os.path.expanduser(folder)))
    store.mkdir(parents=True, exist_ok=True)
    facts = store.stat()
    if facts.st_uid != os.geteuid() or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise StoreError(
            "others may change the folder for files on the device",
            where=store,
            found=f"owner {facts.st_uid}, mode {stat.S_IMODE(facts.st_mode):04o}",
            hint="choose a folder of your own: --remote-folder",
        )
    return store


def _blob(store: Path, sha256: str) -> Path:
    return store / "blobs" / sha256[:2] / sha256


def _is_whole(blob: Path, sha256: str, size_bytes: int) -> bool:
    """Whether a blob is here and is what its name says (rule 2)."""
    try:
        with open(os.open(blob, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode) or facts.st_size != size_bytes:
                return False
            return hashlib.file_digest(file, "sha256").hexdigest() == sha256
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.EIO):
            return False
        raise


def _lay_out(blob: Path, path: Path) -> None:
    try:
        os.link(blob, path)
    except FileNotFoundError as error:
        raise StoreError(
            "a file that was just stored is gone from the device", where=blob, hint="run the same command again"
        ) from error
    except OSError:  # a file system without hard links, or with too many of this one
        shutil.copyfile(blob, path)


def _full(where: object, found: str | None) -> StoreError:
    return StoreError(
        "the disk of the device is full",
        where=where,
        found=found,
        hint="free some space there, or choose a folder on another disk: --remote-folder",
    )


OPERATIONS: dict[str, Callable[..., dict[str, Any]]] = {"greet": greet, "look": look, "put": put, "run": run}


def main(request: bytes, token: str) -> None:
    """Do what a request asks for, and reply (rule 7)."""
    os.umask(0o077)
    asked = json.loads(request)
    try:
        reply = OPERATIONS[asked.pop("do")](**asked)
    except StoreError as error:
        reply = {"error": error.parts}
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            failure = _full(error.filename or asked.get("folder"), error.strerror)
        else:
            failure = StoreError(
                "a file on the device cannot be read or written",
                where=error.filename or asked.get("folder"),
                found=error.strerror or str(error),
                hint="choose another folder there: --remote-folder",
            )
        reply = {"error": failure.parts}
    sys.stdout.write(f"\n{token} {json.dumps(reply)}\n")
    sys.stdout.flush()
