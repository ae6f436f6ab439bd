"""A real sshd on the loopback, for this user alone: own port, own keys; no configuration of the system is touched.

Debian has it in the package openssh-server. Where it is not installed, the tests that need it are skipped.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

SSHD = "/usr/sbin/sshd"
SEPARATION_FOLDER = Path("/run/sshd")
"""Empty; sshd wants to find it when root starts it, and a system that has never started its own has none. It stays: a
test beside this one may be using it."""
CONFIG = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
MaxSessions {max_sessions}
{more}
"""
START_S = 20.0


class Sshd:
    """A running sshd. `options` let ssh know its key, and log in."""

    def __init__(self, folder: Path, port: int, process: subprocess.Popen[bytes]) -> None:
        self.folder = folder
        self.port = port
        self.address = f"ssh://127.0.0.1:{port}"
        self.process = process
        self.known_hosts = folder / "known_hosts"

    @property
    def settings(self) -> dict[str, str]:
        """Options of ssh that make it independent of the user's own configuration."""
        return {
            "UserKnownHostsFile": str(self.known_hosts),
            "GlobalKnownHostsFile": "/dev/null",
            "StrictHostKeyChecking": "yes",
            "IdentityFile": str(self.folder / "user_key"),
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
        }

    def options(self, **changes: object) -> tuple[str, ...]:
        """`KEY=VALUE` of `settings`, with changes."""
        return tuple(f"{key}={value}" for key, value in {**self.settings, **changes}.items())

    def sessions(self) -> list[int]:
        """The processes that hold a connection."""
        return _children(self.process.pid)

    def kill_sessions(self) -> None:
        """Cut every connection: kill the processes of sshd that hold one."""
        for child in self.sessions():
            for process in (*_children(child), child):
                if _name(process) == "sshd":
                    with suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)


@contextmanager
def running_sshd(folder: Path, *, max_sessions: int = 10, more: str = "") -> Iterator[Sshd]:
    """Start an sshd with new keys in `folder` and `more` lines of settings; skips the test where there is none."""
    if not Path(SSHD).is_file() or shutil.which("ssh") is None:
        pytest.skip(f"there is no {SSHD} or no ssh: install openssh-server and openssh-client to run this test")
    for name in ("host_key", "user_key"):
        write_key(folder / name)
    if os.geteuid() == 0:
        SEPARATION_FOLDER.mkdir(mode=0o755, exist_ok=True)
    port = _free_port()
    config = CONFIG.format(folder=folder, port=port, max_sessions=max_sessions, more=more)
    (folder / "sshd_config").write_text(config)
    with (folder / "sshd.log").open("wb") as log:
        process = subprocess.Popen([SSHD, "-D", "-e", "-f", folder / "sshd_config"], stderr=log)
    server = Sshd(folder, port, process)
    try:
        _wait_until_it_listens(server)
        write_known_host(server.known_hosts, port, folder / "host_key.pub")
        yield server
    finally:
        server.kill_sessions()
        process.terminate()
        process.wait()


def write_key(path: Path) -> None:
    """A new key pair: `path` and `path.pub`."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)


def write_known_host(path: Path, port: int, public_key: Path) -> None:
    """A list of known hosts with this key for the loopback."""
    path.write_text(f"[127.0.0.1]:{port} {public_key.read_text()}")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _wait_until_it_listens(server: Sshd) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and server.process.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", server.port), timeout=1):
            return
        time.sleep(0.05)
    pytest.fail(f"sshd did not start: {(server.folder / 'sshd.log').read_text()}")


def _children(process: int) -> list[int]:
    with suppress(OSError):
        return [int(item) for item in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    return []


def _name(process: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{process}/comm").read_text().strip()
    return ""
