"""Judge a bundle on other devices: bring it there, run the same command there, bring the report back.

1. A device is asked first whether it can: its Python, the same version of edge-ilseg, a runtime. Then the files that it
   lacks are sent; then it runs.
2. The verdict is the device's own: a report is read as strictly as any other, and nothing is decided here. Paths in it
   are turned back into those that were given.
3. Devices are judged at the same time, and one that fails stops no other.
4. Whatever goes wrong on a device becomes an error that names it. `devices/remote_store.py` says what is left there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any, NamedTuple

import msgspec

from edge_ilseg import __version__
from edge_ilseg.devices.remote_call import call, send_files
from edge_ilseg.devices.remote_files import SentFile
from edge_ilseg.devices.remote_store import DEFAULT_FOLDER, DEFAULT_PYTHON
from edge_ilseg.devices.ssh import CONTROL, Connection, Device, RemoteError, last_line, plain
from edge_ilseg.devices.verify_report import VerifyReport, parse_report
from edge_ilseg.errors import EXIT_ARTEFACT, EdgeIlsegError
from edge_ilseg.progress import ProgressCallback, no_progress

STAGES = ("looking at the device", "copying", "verifying")
RUN_THERE = "run edge-ilseg verify on the device itself, and see what it says"


class RemoteSettings(NamedTuple):
    """How to work on one device."""

    python: str = DEFAULT_PYTHON
    folder: str = DEFAULT_FOLDER
    ssh_options: tuple[str, ...] = ()


class Placed(NamedTuple):
    """An argument that holds a path in the run's folder on the device."""

    prefix: str
    name: str


class Job(NamedTuple):
    """One verification, the same for every device."""

    files: tuple[SentFile, ...]
    folders: tuple[str, ...]
    """Folders on the device that are there even where they are empty."""
    arguments: tuple[str | Placed, ...]
    """Of `edge-ilseg`, from the word `verify` on; they ask for JSON."""
    places: Mapping[str, str]
    """Name in the run's folder -> what it is called here (rule 2)."""


class Copied(NamedTuple):
    """What was sent to a device, and what was there."""

    files: int
    size_bytes: int
    present: int
    damaged: int
    """Of those that were sent: how many were there, but damaged."""

    def __str__(self) -> str:
        damaged = f", {self.damaged} of them in the place of a damaged one" if self.damaged else ""
        return f"{self.files} files copied ({self.size_bytes / 2**20:.2f} MiB){damaged}, {self.present} were there"


class Outcome(NamedTuple):
    """What became of one device: a report, or an error."""

    device: Device
    report: VerifyReport | None
    error: EdgeIlsegError | None
    copied: Copied | None

    @property
    def exit_code(self) -> int:
        """The report's, or the error's."""
        if self.report is not None:
            return self.report.exit_code
        return self.error.exit_code if self.error else EXIT_ARTEFACT


class _Greeting(msgspec.Struct, frozen=True):
    edge_ilseg: str | None
    runtimes: tuple[str, ...]
    problem: str | None


class _Look(msgspec.Struct, frozen=True):
    missing: tuple[str, ...]
    damaged: int


class _Put(msgspec.Struct, frozen=True):
    stored: int


class _Run(msgspec.Struct, frozen=True):
    exit_code: int
    output: str
    messages: str
    folder: str


def verify_on_devices(
    devices: Sequence[tuple[Device, RemoteSettings]], job: Job, progress: ProgressCallback = no_progress
) -> tuple[Outcome, ...]:
    """Verify on every device at the same time (rule 3); the outcomes are in the order of the devices."""
    connections = [Connection(device, settings.ssh_options) for device, settings in devices]
    told = _SharedProgress(len(devices), progress)

    def attempt(number: int) -> Outcome:
        device, settings = devices[number]
        copied = None
        try:
            with connections[number] as connection:
                copied = bring(connection, settings, job, told.of(number))
                report = run_there(connection, settings, job, told.of(number))
        except EdgeIlsegError as error:
            return Outcome(device, None, error, copied)
        except OSError as error:
            return Outcome(device, None, _failed_here(device, error), copied)
        return Outcome(device, report, None, copied)

    with ThreadPoolExecutor(len(devices), "edge-ilseg-remote") as pool:
        try:
            return tuple(pool.map(attempt, range(len(devices))))
        except BaseException:  # above all Ctrl-C: nobody waits for the devices
            for connection in connections:
                connection.abort()
            raise


def bring(
    connection: Connection, settings: RemoteSettings, job: Job, progress: ProgressCallback = no_progress
) -> Copied:
    """Check that a device can verify, and send it what it lacks (rule 1).

    Raises:
        RemoteError: it cannot, the connection broke, or its disk is full.
    """
    progress("looking at the device", 0.0)
    check_greeting(connection.device, call(connection, settings.python, "greet", {}, _Greeting))
    by_hash = {file.sha256: file for file in job.files}
    sizes = {sha256: file.size_bytes for sha256, file in by_hash.items()}
    found = call(connection, settings.python, "look", {"folder": settings.folder, "files": sizes}, _Look)
    sent = [by_hash[sha256] for sha256 in found.missing if sha256 in by_hash]
    if sent:
        request = {"folder": settings.folder, "files": {file.sha256: file.size_bytes for file in sent}}
        call(connection, settings.python, "put", request, _Put, feed=lambda stdin: send_files(sent, stdin, progress))
    size_bytes = sum(file.size_bytes for file in sent)
    return Copied(len(sent), size_bytes, len(by_hash) - len(sent), found.damaged)


def run_there(
    connection: Connection, settings: RemoteSettings, job: Job, progress: ProgressCallback = no_progress
) -> VerifyReport:
    """Run the verification on a device that has every file, and read its report (rule 2).

    Raises:
        RemoteError: the connection broke, or the command ended without a report.
        ReportError: the report is damaged.
    """
    progress("verifying", 0.0)
    request = {
        "folder": settings.folder,
        "files": [(file.name, file.sha256) for file in job.files],
        "folders": job.folders,
        "arguments": job.arguments,
    }
    done = call(connection, settings.python, "run", request, _Run, keep_open=True)
    progress("verifying", 1.0)
    if done.exit_code < 0:
        raise RemoteError(
            "the verification was killed on the device",
            where=connection.device,
            found=f"signal {-done.exit_code}",
            hint="see whether it ran out of memory there: dmesg",
        )
    if not done.output.strip():
        messages = "; ".join(plain(line) for line in done.messages.splitlines() if plain(line))
        raise RemoteError(
            "the verification ended on the device without a report",
            where=connection.device,
            found=f"exit code {done.exit_code}: {messages}",
            hint=RUN_THERE,
        )
    return parse_report(_localized(done, job, connection.device), where=connection.device)


def check_greeting(device: Device, greeting: _Greeting) -> None:
    """Raise `RemoteError` when a device has another edge-ilseg than we are, or no runtime (rule 1)."""
    if greeting.edge_ilseg is None or greeting.problem is not None:
        raise RemoteError(
            "the Python of the device has no edge-ilseg that can be used",
            where=device,
            found=plain(greeting.problem or ""),
            expected=f"edge-ilseg {__version__}",
            hint=f"install it there (pip install 'edge-ilseg[onnxruntime]=={__version__}'), or name the Python that "
            "has it: --remote-python",
        )
    if greeting.edge_ilseg != __version__:
        raise RemoteError(
            "the device has another version of edge-ilseg",
            where=device,
            found=plain(greeting.edge_ilseg),
            expected=__version__,
            hint=f"on the device: pip install 'edge-ilseg=={__version__}'",
        )
    if not greeting.runtimes:
        raise RemoteError(
            "the device has no runtime for a model",
            where=device,
            expected="onnxruntime or openvino",
            hint="on the device: pip install 'edge-ilseg[onnxruntime]' or 'edge-ilseg[openvino]'",
        )


def _failed_here(device: Device, error: OSError) -> RemoteError:
    """What kept this machine from its part: above all a folder for temporary files that is full (rule 3)."""
    place = f", {error.filename}" if isinstance(error.filename, str) else ""
    return RemoteError(
        "this machine could not do its part of the verification on the device",
        where=f"{device}{place}",
        found=error.strerror or str(error),
        hint="see whether there is space in the folder for temporary files (TMPDIR), and end other programs",
    )


def _localized(done: _Run, job: Job, device: Device) -> bytes:
    """A report with the paths of this machine in the place of those of the run's folder, without control characters."""
    changes = [(f"{done.folder}/{name}", here) for name, here in job.places.items()]

    def local(value: Any) -> Any:
        if isinstance(value, str):
            for there, here in changes:
                value = value.replace(there, here)
            return CONTROL.sub(" ", value)
        if isinstance(value, dict):
            return {local(key): local(item) for key, item in value.items()}
        return [local(item) for item in value] if isinstance(value, list) else value

    try:
        return msgspec.json.encode(local(msgspec.json.decode(done.output)))
    except msgspec.DecodeError as error:
        raise RemoteError(
            "the report of the device is no JSON",
            where=device,
            found=f"{error}; exit code {done.exit_code}; {last_line(done.messages)}",
            hint=RUN_THERE,
        ) from error


class _SharedProgress:
    """The progress of several devices as one: what is told is the mean share."""

    def __init__(self, count: int, progress: ProgressCallback) -> None:
        self._shares = [0.0] * count
        self._lock = Lock()
        self._progress = progress

    def of(self, number: int) -> ProgressCallback:
        """The callback for one device."""

        def tell(text: str, share: float) -> None:
            with self._lock:
                if len(self._shares) == 1:
                    self._progress(text, share)
                    return
                self._shares[number] = (STAGES.index(text) + share) / len(STAGES)
                self._progress(f"{len(self._shares)} devices", sum(self._shares) / len(self._shares))

        return tell
