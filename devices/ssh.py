"""The system's OpenSSH client: one connection to a device, shared by every command that runs there.

1. One process, the master, logs in and holds the connection; commands go through its socket, which lies in a private
   folder. A command opens no connection of its own: when the master has ended, it fails.
2. The master lives as long as this process holds its standard input: nothing is left behind, even by a kill.
3. Nobody is asked for anything. Host keys, keys and proxies are those of the user's own OpenSSH configuration.
4. Nothing in an address, an option or a path can be taken for an option of ssh or for a command of the device's shell.
5. What ssh says becomes an error that names the device. Text from a device holds no control characters.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from edge_ilseg.errors import ConfigError, EdgeIlsegError, MissingPackageError

ADDRESS = re.compile(r"ssh://(?:([^@/]*)@)?(\[[^\]@/]*\]|[^@/:\[\]]*)(?::([0-9]+))?/?")
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
IPV6 = re.compile(r"[0-9A-Fa-f:.]+(%[A-Za-z0-9_.-]+)?")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")
FIXED_OPTIONS = {
    "BatchMode": "yes",
    "ClearAllForwardings": "yes",
    "ControlPersist": "no",
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "LogLevel": "INFO",
    "PermitLocalCommand": "no",
    "RemoteCommand": "none",
    "RequestTTY": "no",
}
"""What every call sets before anything else: in OpenSSH the first value counts."""
OWN_OPTIONS = frozenset(name.lower() for name in (*FIXED_OPTIONS, "ControlMaster", "ControlPath"))
DEFAULT_OPTIONS = ("ConnectTimeout=20", "ServerAliveInterval=15", "ServerAliveCountMax=4")
"""Set last, so that `--ssh-option` goes before: a dead line is noticed within a minute."""
MAX_OUTPUT_BYTES = 64 << 20
MAX_SOCKET_FOLDER = 60
"""Characters of the folder of a socket; the system allows about 100 for the whole path, and ssh adds some."""
END_S = 5.0
GRACE_S = 2.0
"""So long after a command has failed, a master may still be about to notice that the line is dead."""

TROUBLES = (
    # pattern in what ssh says, what was wrong, what to do; the first that fits counts
    (
        "IDENTIFICATION HAS CHANGED|REVOKED HOST KEY",
        "the host key of the device is not the one that is known: this may be another machine",
        "find out why it has changed; if the new key is right: ssh-keygen -R '{known}', then ssh {device} once",
    ),
    (
        "Host key verification failed|No .* host key is known",
        "the host key of the device is not known",
        "log in once and compare its fingerprint: ssh {device}",
    ),
    (
        "Permission denied|Too many authentication failures|No supported authentication methods",
        "the device does not let us in",
        "no password is asked for: put your key there (ssh-copy-id), start ssh-agent, or correct the user",
    ),
    ("Connection refused", "nothing listens at that address", "see whether sshd runs there, and on which port"),
    ("Could not resolve hostname", "the name of the device is not known", "correct it, or use its address"),
    (
        "timed out|No route to host|Network is unreachable",
        "the device does not answer",
        "see whether it is switched on and in this network",
    ),
    (
        "Connection closed|Connection reset|closed by remote host|Broken pipe|not responding",
        "the device closed the connection before we were logged in",
        "see what its sshd says: journalctl -u ssh",
    ),
)


class RemoteError(EdgeIlsegError):
    """A device could not be reached, or could not do what it was asked."""


class Device(NamedTuple):
    """Where to log in; `None` leaves user or port to the OpenSSH configuration."""

    user: str | None
    host: str
    port: int | None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"ssh://{f'{self.user}@' if self.user else ''}{host}{f':{self.port}' if self.port else ''}"

    @property
    def known_as(self) -> str:
        """The name under which OpenSSH knows its host key."""
        return self.host if self.port in (None, 22) else f"[{self.host}]:{self.port}"


class Reply(NamedTuple):
    """What a command on the device gave."""

    exit_code: int
    output: bytes
    messages: str


def parse_device(text: str) -> Device:
    """`"ssh://pi@camera-1:2222"` to a device (rule 4).

    Raises:
        ConfigError: it is no such address, or has a password in it.
    """
    match = ADDRESS.fullmatch(text)
    if match and match[1] is not None and ":" in match[1]:
        raise ConfigError(
            "the address of a device holds a password",
            where="--on",
            expected="ssh://USER@HOST[:PORT]",
            hint="log in with a key: ssh-copy-id USER@HOST",
        )
    if match:
        user, host, port = match[1], match[2].strip("[]"), match[3]
        is_host = IPV6.fullmatch(host) if match[2].startswith("[") else NAME.fullmatch(host)
        if is_host and (user is None or NAME.fullmatch(user)) and (port is None or 0 < int(port) < 65536):
            return Device(user, host, int(port) if port else None)
    raise ConfigError(
        "the address of a device cannot be read",
        where="--on",
        found=repr(text),
        expected="ssh://[USER@]HOST[:PORT]",
        hint="write it as ssh://pi@camera-1",
    )


def parse_ssh_option(text: str) -> str:
    """`"ProxyJump=gate"`, checked (rule 4).

    Raises:
        ConfigError: it is no `KEY=VALUE`, or a key that is set here.
    """
    key, separator, value = text.partition("=")
    if not separator or not re.fullmatch(r"[A-Za-z0-9]+", key) or not value.strip() or CONTROL.search(value):
        raise ConfigError(
            "the option for ssh cannot be read",
            where="--ssh-option",
            found=repr(text),
            expected="KEY=VALUE",
            hint="write it as --ssh-option ProxyJump=gate",
        )
    if key.lower() in OWN_OPTIONS:
        raise ConfigError(
            "this option of ssh is set by edge-ilseg itself", where="--ssh-option", found=key, hint="leave it out"
        )
    return text


def check_remote_path(text: str, where: str) -> str:
    """A path on a device, as it was given (rule 4).

    Raises:
        ConfigError: it is empty, begins with `-` or holds control characters.
    """
    if not text or text.startswith("-") or CONTROL.search(text):
        raise ConfigError(
            "the path on the device cannot be used",
            where=where,
            found=repr(text),
            expected="a path that does not begin with - and holds no control characters",
            hint=f"give a plain path: {where} PATH",
        )
    return text


def shell_word(path: str) -> str:
    """A path as one word for the device's shell, whichever that is; `~/` is the home folder there."""
    return '"$HOME"/' + shlex.quote(path[2:]) if path.startswith("~/") else shlex.quote(path)


def plain(text: str) -> str:
    """Text from a device without control characters (rule 5)."""
    return CONTROL.sub(" ", text).strip()


def last_line(text: str) -> str | None:
    """The last line of what a program said, without control characters; `None` where it said nothing."""
    return next((plain(line) for line in reversed(text.splitlines()) if plain(line)), None)


class Connection:
    """One connection to a device (rules 1 and 2)."""

    def __init__(self, device: Device, options: Sequence[str] = ()) -> None:
        self.device = device
        self._options = tuple(options)
        self._folder: Path | None = None
        self._master: subprocess.Popen[bytes] | None = None
        self._is_closed = False

    def __enter__(self) -> Connection:
        self.open()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def open(self) -> None:
        """Log in.

        Raises:
            RemoteError: the device cannot be reached, or does not let us in.
            MissingPackageError: there is no OpenSSH client here.
        """
        program = shutil.which("ssh")
        if program is None:
            raise MissingPackageError(
                "a remote device needs the OpenSSH client",
                found="no program named ssh",
                hint="install it: apt-get install openssh-client",
            )
        try:
            self._log_in(program)
        except BaseException:
            self.close()
            raise

    def _log_in(self, program: str) -> None:
        self._folder = _private_folder()
        ready = secrets.token_hex(16)
        settings = ("ControlMaster=yes", *self._options, *DEFAULT_OPTIONS)
        command = self._command(program, settings, f"echo {ready}; exec cat > /dev/null")
        with (self._folder / "messages").open("wb") as messages:
            self._master = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=messages, bufsize=0
            )
        if self._is_closed:
            self._master.kill()
        said = ""
        while line := _read_line(self._master):
            if line.strip() == ready:
                return
            said = line
        self._master.wait()
        raise connection_error(self.device, self._messages() or said)

    def abort(self) -> None:
        """Cut the connection, from any thread; whatever waits for it fails, and `close` is still to be called."""
        self._is_closed = True
        if self._master is not None:
            self._master.kill()

    def close(self) -> None:
        """End the connection, and remove its socket."""
        if self._master is not None:
            _end(self._master)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def run(self, command: str, feed: Callable[[IO[bytes]], None], *, keep_open: bool = False) -> Reply:
        """Run a command on the device.

        Args:
            command: for the device's shell.
            feed: writes the command's standard input. What it writes after the command has ended is lost; the reply
                tells why.
            keep_open: keep the standard input open until the command ends, so that its end tells that we are gone.

        Raises:
            RemoteError: the connection is broken, or the device refuses to run another command on it.
        """
        program = shutil.which("ssh") or "ssh"
        # Without the master, ssh would log in anew (rule 1): a proxy that ends at once prevents that.
        settings = ("ControlMaster=no", "ProxyCommand=false")
        with tempfile.TemporaryFile() as messages:
            process = subprocess.Popen(
                self._command(program, settings, command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
            )
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                with contextlib.suppress(BrokenPipeError):
                    feed(process.stdin)
                    process.stdin.flush()
                    if not keep_open:
                        process.stdin.close()
                output = process.stdout.read(MAX_OUTPUT_BYTES)
            except BaseException:
                process.kill()
                raise
            finally:
                _end(process)
            messages.seek(0)
            reply = Reply(process.returncode, output, messages.read().decode(errors="replace"))
        self._check(reply)
        return reply

    def _command(self, program: str, settings: Sequence[str], command: str) -> list[str]:
        words = [program, "-S", f"{self._folder}/socket"]
        for setting in (*(f"{name}={value}" for name, value in FIXED_OPTIONS.items()), *settings):
            words += ["-o", setting]
        if self.device.user is not None:
            words += ["-l", self.device.user]
        if self.device.port is not None:
            words += ["-p", str(self.device.port)]
        return [*words, "--", self.device.host, command]

    def _check(self, reply: Reply) -> None:
        """Raise `RemoteError` when a reply tells of the connection, and not of the command."""
        if reply.exit_code != 255 or self._master is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._master.wait(GRACE_S)
        if self._master.poll() is not None or self._is_closed:
            raise RemoteError(
                "the connection to the device broke",
                where=self.device,
                found=last_line(self._messages()) or last_line(reply.messages),
                hint="run the same command again: files that have arrived whole are not copied twice",
            )
        if "session request failed" in reply.messages:
            raise RemoteError(
                "the device allows one command for each connection only",
                where=self.device,
                found=plain(reply.messages),
                hint="raise MaxSessions in the sshd_config of the device to 2 or more",
            )

    def _messages(self) -> str:
        if self._folder is None:
            return ""
        try:
            return (self._folder / "messages").read_bytes().decode(errors="replace")
        except FileNotFoundError:
            return ""


def connection_error(device: Device, messages: str) -> EdgeIlsegError:
    """What kept us from logging in, read from what ssh said (rule 5)."""
    for pattern, what, hint in TROUBLES:
        if re.search(pattern, messages):
            key = re.search(r"SHA256:[A-Za-z0-9+/=]+", messages)
            found = f"a key with the fingerprint {key[0]}" if key else last_line(messages)
            return RemoteError(what, where=device, found=found, hint=hint.format(device=device, known=device.known_as))
    if "command-line" in messages:
        return ConfigError(
            "ssh refuses an option", where="--ssh-option", found=last_line(messages), hint="correct it, or leave it out"
        )
    return RemoteError(
        "the device cannot be logged in to",
        where=device,
        found=last_line(messages) or "ssh ended without a word",
        hint=f"see whether this works: ssh {device} true",
    )


def _private_folder() -> Path:
    """A folder for a socket: its path is short, and ssh finds nothing in it to expand."""
    parent = tempfile.gettempdir()
    if len(parent) > MAX_SOCKET_FOLDER or not re.fullmatch(r"[A-Za-z0-9_./-]+", parent):
        parent = "/tmp"
    return Path(tempfile.mkdtemp(prefix="edge-ilseg-ssh-", dir=parent))


def _read_line(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    return process.stdout.readline(4096).decode(errors="replace")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Close a process's input and wait for it; one that does not end is killed."""
    with contextlib.suppress(OSError, ValueError):
        if process.stdin is not None:
            process.stdin.close()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
