"""Verification on other devices, against a real sshd on the loopback. The device is this machine, in another folder."""

from __future__ import annotations

import ast
import errno
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import write_color_folder, write_family
from PIL import Image
from rich.console import Console
from sshd import Sshd, running_sshd, write_key, write_known_host

import edge_ilseg
from edge_ilseg.cli import run, verify_remote
from edge_ilseg.data import DATASETS, GENERATED, open_dataset
from edge_ilseg.devices import remote, remote_store
from edge_ilseg.devices.remote import Job, Outcome, Placed, RemoteSettings, verify_on_devices
from edge_ilseg.devices.remote_call import BOOTSTRAP
from edge_ilseg.devices.remote_files import DATA_LAYOUTS, FilesNeeded, bundle_files, data_files, hash_files
from edge_ilseg.devices.remote_store import StoreError, receive, work_folder
from edge_ilseg.devices.remote_table import device_table, encode_outcomes
from edge_ilseg.devices.ssh import (
    Connection,
    Device,
    RemoteError,
    check_remote_path,
    parse_device,
    parse_ssh_option,
    plain,
    shell_word,
)
from edge_ilseg.devices.verification import spread
from edge_ilseg.errors import BundleError, ConfigError
from edge_ilseg.images import IMAGE_SUFFIXES
from edge_ilseg.progress import ProgressCallback, no_progress

ROOT = Path(edge_ilseg.__file__).parents[1]
FAST = ("--latency-runs", "2", "--threads", "1", "--min-images", "2")
WAIT_S = 60.0
BLOCK = "import sys\nfor name in ('onnxruntime', 'openvino'): sys.modules[name] = None\n"
AT_VERIFY = "import os, sys, time\nif 'verify' in sys.orig_argv: "


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with running_sshd(tmp_path_factory.mktemp("sshd")) as found:
        yield found


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_family(tmp_path_factory.mktemp("bundles"), forget="grass")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_color_folder(tmp_path_factory.mktemp("data") / "colors", count=6)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_python(tmp_path_factory.mktemp("python"))


def write_python(folder: Path, start: str = "", *, modules: Path = ROOT, program: str = sys.executable) -> str:
    """A Python for the device that has edge-ilseg from `modules` and runs `start` when it starts outside `-I`."""
    (folder / "sitecustomize.py").write_text(start)
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}:{modules}" exec "{program}" "$@"\n')
    path.chmod(0o755)
    return str(path)


def remote_words(server: Sshd, python: str, *stores: Path, **changes: object) -> list[str]:
    """The options that lead to one device a store."""
    words = [word for option in server.options(**changes) for word in ("--ssh-option", option)]
    for store in stores:
        words += ["--on", server.address, "--remote-folder", str(store)]
    return [*words, "--remote-python", python]


def job_for(family: tuple[Path, Path], images: Path | None = None, *extra: FilesNeeded) -> Job:
    needed = [bundle_files(family[0], "bundle"), bundle_files(family[1], "parent"), *extra]
    arguments: list[str | Placed] = ["verify", Placed("", "bundle"), Placed("--against=", "parent"), "--json", *FAST]
    if images is not None:
        needed.append(data_files("folder", images, open_dataset("folder", images), "test", None))
        arguments += [Placed("--data=folder:", "data"), "--split=test"]
    folders = tuple(folder for item in needed for folder in item.folders)
    return Job(hash_files(needed), folders, tuple(arguments), {})


def attempt(
    server: Sshd, job: Job, store: Path, python: str, progress: ProgressCallback = no_progress, **changes: object
) -> Outcome:
    settings = RemoteSettings(python, str(store), server.options(**changes))
    (outcome,) = verify_on_devices([(parse_device(server.address), settings)], job, progress)
    return outcome


def error_of(outcome: Outcome) -> str:
    assert outcome.report is None
    assert outcome.error is not None
    assert outcome.exit_code == 3
    assert str(outcome.error.where).startswith(str(outcome.device)) or isinstance(outcome.error, ConfigError)
    return str(outcome.error)


def blobs(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (store / "blobs").rglob("*") if path.is_file()}


def assert_only_whole_blobs(store: Path) -> None:
    for name, data in blobs(store).items():
        assert hashlib.sha256(data).hexdigest() == name


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def is_idle(store: Path) -> bool:
    """Whether no run's folder is left, and no lock."""
    return not list((store / "work").iterdir())


def without_measurements(report: dict[str, Any]) -> dict[str, Any]:
    """What two runs on one machine have in common."""
    report = json.loads(json.dumps(report))
    for name in ("created", "latencies_ms", "peak_rss_mib"):
        del report[name]
    del report["device"]["load_average"]
    if report["scores"]:
        del report["scores"]["latency_median_ms"]
    for check in report["checks"]:
        if check["name"] in ("latency p95", "peak memory"):
            del check["value"], check["detail"]
    return report


# the whole way


@pytest.mark.parametrize("kind", ["labelled", "unlabelled"])
def test_a_report_from_a_device_is_that_of_a_local_run(
    kind: str,
    server: Sshd,
    family: tuple[Path, Path],
    images: Path,
    python: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["verify", str(family[0]), "--against", str(family[1]), "--max-model-mib=0.0001", *FAST, "--json"]
    words += ["--data", f"folder:{images}", "--limit", "3"] if kind == "labelled" else ["--images", f"{images}/images"]
    local_code = run(words)
    local = json.loads(capsys.readouterr().out)
    assert run([*words, *remote_words(server, python, tmp_path / "store")]) == local_code == 1
    remote = json.loads(capsys.readouterr().out)
    assert without_measurements(remote) == without_measurements(local)
    assert (remote["scores"] is None, remote["unlabelled"] is None) == (kind == "unlabelled", kind == "labelled")


@pytest.mark.slow
def test_a_missing_image_is_named_by_its_path_on_this_machine(
    server: Sshd,
    family: tuple[Path, Path],
    images: Path,
    python: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "data"
    shutil.copytree(images, data)
    (data / "images/001.png").unlink()
    words = ["verify", str(family[0]), "--data", f"folder:{data}", *FAST, "--json"]
    assert run([*words, *remote_words(server, python, tmp_path / "store")]) == 3
    (bad,) = json.loads(capsys.readouterr().out)["scores"]["bad_images"]
    assert bad["image_id"] == "001"
    assert str(data / "images/001.png") in bad["reason"]


def test_a_second_run_copies_nothing(
    server: Sshd, family: tuple[Path, Path], images: Path, python: str, tmp_path: Path
) -> None:
    job = job_for(family, images)
    first = attempt(server, job, tmp_path / "store", python)
    assert first.copied is not None
    assert first.copied.files == len({file.sha256 for file in job.files})
    second = attempt(server, job, tmp_path / "store", python)
    assert second.copied is not None
    assert (second.copied.files, second.copied.size_bytes) == (0, 0)
    assert second.copied.present == first.copied.files
    assert second.exit_code == first.exit_code == 1
    assert is_idle(tmp_path / "store")
    assert_only_whole_blobs(tmp_path / "store")


@pytest.mark.slow
def test_only_the_images_that_are_verified_are_copied(
    server: Sshd,
    family: tuple[Path, Path],
    images: Path,
    python: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["verify", str(family[0]), "--data", f"folder:{images}", "--limit", "2", *FAST, "--json"]
    assert run([*words, *remote_words(server, python, tmp_path / "store")]) == 0
    assert json.loads(capsys.readouterr().out)["scores"]["images_counted"] == 2
    there = set(blobs(tmp_path / "store"))
    for path in (*images.glob("images/*"), *images.glob("masks/*")):
        assert (hashlib.sha256(path.read_bytes()).hexdigest() in there) == (path.stem in ("000", "003"))


@pytest.mark.slow
def test_what_stays_on_a_device_is_readable_by_its_user_alone(
    server: Sshd, family: tuple[Path, Path], python: str, tmp_path: Path
) -> None:
    attempt(server, job_for(family), tmp_path / "store", python)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "store").rglob("*")}
    assert modes
    assert {mode & 0o077 for mode in (*modes.values(), stat.S_IMODE((tmp_path / "store").stat().st_mode))} == {0}


@pytest.mark.slow
def test_what_a_login_script_prints_is_no_answer(
    server: Sshd, family: tuple[Path, Path], python: str, tmp_path: Path
) -> None:
    noisy = tmp_path / "noisy"
    noisy.write_text(f'#!/bin/sh\nprintf "Welcome to the device"\nexec "{python}" "$@"\n')
    noisy.chmod(0o755)
    assert attempt(server, job_for(family), tmp_path / "store", str(noisy)).report is not None


@pytest.mark.slow
def test_a_profile_of_ones_own_is_copied_too(
    server: Sshd,
    family: tuple[Path, Path],
    python: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    profile = tmp_path / "mine.toml"
    profile.write_text('description = "none like it"\nmachine = "pdp11"\nint8_flags = []\n')
    words = ["verify", str(family[0]), "--profile", str(profile), *FAST]
    assert run([*words, *remote_words(server, python, tmp_path / "store")]) == 3
    assert "pdp11" in capsys.readouterr().err


# several devices


@pytest.mark.slow
def test_devices_are_judged_at_the_same_time_and_shown_in_one_table(
    server: Sshd,
    family: tuple[Path, Path],
    images: Path,
    python: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["verify", str(family[0]), "--against", str(family[1]), "--data", f"folder:{images}", *FAST]
    assert run([*words, *remote_words(server, python, tmp_path / "a", tmp_path / "b")]) == 1
    text = capsys.readouterr().out
    assert text.count("failed") == 2
    assert text.count("100.00") == 2
    assert text.count(f"{server.address}: old mIoU drop: ") == 2
    assert blobs(tmp_path / "a") == blobs(tmp_path / "b") != {}


def test_a_device_that_fails_stops_no_other(
    server: Sshd,
    family: tuple[Path, Path],
    python: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["verify", str(family[0]), *FAST, "--json", *remote_words(server, python, tmp_path / "store")]
    silent = f"ssh://127.0.0.1:{closed_port()}"
    assert run([*words, "--on", silent, "--remote-folder", "elsewhere"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert found["exit_code"] == 3
    good, bad = found["devices"]
    assert (good["device"], good["exit_code"], good["error"]) == (server.address, 0, None)
    assert good["report"]["exit_code"] == 0
    assert (bad["device"], bad["exit_code"], bad["report"]) == (silent, 3, None)
    assert "Connection refused" in bad["error"]


def test_what_this_machine_cannot_do_for_one_device_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule 3 of `devices/remote.py`: a full folder for temporary files is an `OSError`."""
    report = object()

    def private_folder() -> Path:
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/edge-ilseg-ssh-x")

    class Fine(Connection):
        def __enter__(self) -> Fine:
            if self.device.host == "full":
                private_folder()
            return self

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(remote, "Connection", Fine)
    monkeypatch.setattr(remote, "bring", lambda *_: None)
    monkeypatch.setattr(remote, "run_there", lambda *_: report)
    devices = [(parse_device(f"ssh://{name}"), RemoteSettings()) for name in ("full", "good")]
    bad, good = verify_on_devices(devices, Job((), (), (), {}))
    assert good.report is report
    assert "No space left on device" in error_of(bad)
    assert "/tmp/edge-ilseg-ssh-x" in error_of(bad)


def test_command_and_library_have_one_place_on_a_device() -> None:
    ours = (verify_remote.DEFAULT_PYTHON, verify_remote.DEFAULT_FOLDER)
    assert ours == (remote_store.DEFAULT_PYTHON, remote_store.DEFAULT_FOLDER)


def test_the_row_of_a_device_without_a_report_says_why() -> None:
    error = ConfigError("no [bold]luck[/bold]", where="ssh://a")
    outcomes = (Outcome(Device(None, "a", None), None, error, None),)
    console = Console(width=140, file=io.StringIO())
    console.print(device_table(outcomes))
    assert isinstance(console.file, io.StringIO)
    assert "no [bold]luck[/bold]" in console.file.getvalue()
    assert json.loads(encode_outcomes(outcomes))["devices"][0]["error"] == str(error)


# what goes wrong on the way


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def large_images(folder: Path) -> Path:
    """Images that take several writes each: uncompressed, 2.3 MB."""
    root = write_color_folder(folder, count=4, scale=16)
    for path in root.glob("images/*.png"):
        with Image.open(path) as image:
            image.save(path.with_suffix(".bmp"))
        path.unlink()
    return root


def test_a_connection_that_breaks_in_a_transfer_leaves_nothing_half_copied(
    server: Sshd, family: tuple[Path, Path], python: str, tmp_path: Path
) -> None:
    job, store = job_for(family, large_images(tmp_path / "data")), tmp_path / "store"
    cut = []

    def cut_in_the_middle(text: str, share: float) -> None:
        if text == "copying" and share > 0.5 and not cut:
            cut.append(share)
            server.kill_sessions()

    error = error_of(attempt(server, job, store, python, cut_in_the_middle))
    assert cut
    assert "the connection to the device broke" in error
    wait_until(lambda: is_idle(store))
    assert_only_whole_blobs(store)
    there = len(blobs(store))
    again = attempt(server, job, store, python)
    assert again.report is not None
    assert again.copied is not None
    assert again.copied.present == there < again.copied.files + there
    assert_only_whole_blobs(store)


@pytest.mark.slow
def test_a_connection_that_breaks_while_a_device_verifies_ends_the_verification_there(
    server: Sshd, family: tuple[Path, Path], tmp_path: Path
) -> None:
    pid_file, store = tmp_path / "pid", tmp_path / "store"
    sleeps = AT_VERIFY + f"open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(600)\n"
    python = write_python(tmp_path, sleeps)

    def cut() -> None:
        wait_until(lambda: pid_file.exists() and bool(pid_file.read_text()))
        server.kill_sessions()

    cutter = threading.Thread(target=cut)
    cutter.start()
    error = error_of(attempt(server, job_for(family), store, python))
    cutter.join()
    assert "the connection to the device broke" in error
    wait_until(lambda: is_idle(store))
    assert not Path(f"/proc/{pid_file.read_text()}").exists()


@pytest.mark.slow
def test_ctrl_c_here_ends_the_verification_there(server: Sshd, family: tuple[Path, Path], tmp_path: Path) -> None:
    pid_file, store = tmp_path / "pid", tmp_path / "store"
    sleeps = AT_VERIFY + f"open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(600)\n"
    python = write_python(tmp_path, sleeps)
    words = ["verify", str(family[0]), *FAST, *remote_words(server, python, store)]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background job
    here = subprocess.Popen([sys.executable, "-m", "edge_ilseg", *words], cwd=ROOT, stderr=subprocess.PIPE)
    wait_until(lambda: pid_file.exists() and bool(pid_file.read_text()))
    here.send_signal(signal.SIGINT)
    try:
        _, messages = here.communicate(timeout=WAIT_S)
    finally:
        here.kill()
    assert here.returncode == 130, messages.decode()
    wait_until(lambda: is_idle(store))
    assert not Path(f"/proc/{pid_file.read_text()}").exists()


def test_a_command_opens_no_connection_of_its_own_when_the_shared_one_has_ended(server: Sshd) -> None:
    log = server.folder / "sshd.log"
    with Connection(parse_device(server.address), server.options()) as connection:
        assert connection.run("echo here", lambda _: None).output == b"here\n"
        before = log.read_text().count("[preauth]")
        server.kill_sessions()
        with pytest.raises(RemoteError, match="the connection to the device broke"):
            connection.run("echo here", lambda _: None)
        with pytest.raises(RemoteError, match="the connection to the device broke"):
            connection.run("echo here", lambda _: None)
    assert log.read_text().count("[preauth]") == before


def test_nothing_is_left_of_a_connection_that_has_ended(server: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        with Connection(parse_device(server.address), server.options()):
            (private,) = Path(folder).iterdir()
            assert stat.S_IMODE(private.stat().st_mode) == 0o700
            assert (private / "socket").is_socket()
            assert server.sessions()
        assert list(Path(folder).iterdir()) == []
    wait_until(lambda: not server.sessions())


def test_a_wrong_host_key_is_refused(server: Sshd, family: tuple[Path, Path], python: str, tmp_path: Path) -> None:
    write_key(tmp_path / "other_key")
    write_known_host(tmp_path / "known", server.port, tmp_path / "other_key.pub")
    outcome = attempt(server, job_for(family), tmp_path / "store", python, UserKnownHostsFile=tmp_path / "known")
    error = error_of(outcome)
    assert "the host key of the device is not the one that is known" in error
    assert "SHA256:" in error
    assert f"ssh-keygen -R '[127.0.0.1]:{server.port}'" in error
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("strictness", ["yes", "ask"])
def test_an_unknown_host_key_is_refused(
    strictness: str, server: Sshd, family: tuple[Path, Path], python: str, tmp_path: Path
) -> None:
    changes = {"UserKnownHostsFile": tmp_path / "none", "StrictHostKeyChecking": strictness}
    error = error_of(attempt(server, job_for(family), tmp_path / "store", python, **changes))
    assert "the host key of the device is not known" in error
    assert not (tmp_path / "store").exists()


def test_a_device_that_does_not_let_us_in_is_named_and_no_password_is_asked_for(
    server: Sshd, family: tuple[Path, Path], python: str, tmp_path: Path
) -> None:
    write_key(tmp_path / "key")
    error = error_of(attempt(server, job_for(family), tmp_path / "store", python, IdentityFile=tmp_path / "key"))
    assert "the device does not let us in" in error
    assert "Permission denied" in error


def test_an_option_that_ssh_does_not_know_is_named(
    server: Sshd, family: tuple[Path, Path], python: str, tmp_path: Path
) -> None:
    error = error_of(attempt(server, job_for(family), tmp_path / "store", python, Sneeze="yes"))
    assert "ssh refuses an option" in error
    assert "sneeze" in error.lower()


@pytest.mark.slow
def test_a_device_that_allows_one_command_for_each_connection_is_told_apart(
    family: tuple[Path, Path], python: str, tmp_path: Path
) -> None:
    (tmp_path / "sshd").mkdir()
    with running_sshd(tmp_path / "sshd", max_sessions=1) as server:
        error = error_of(attempt(server, job_for(family), tmp_path / "store", python))
    assert "MaxSessions" in error


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "tmpfs", place]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small disk can be mounted by root alone")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def test_files_that_do_not_fit_on_a_device_are_not_sent(
    server: Sshd, family: tuple[Path, Path], python: str, tmp_path: Path, small_disk: Path
) -> None:
    stages = []
    job = job_for(family, large_images(tmp_path / "data"))
    error = error_of(attempt(server, job, small_disk / "store", python, lambda *told: stages.append(told[0])))
    assert "the disk of the device is full" in error
    assert "MiB are needed" in error
    assert "copying" not in stages


def test_a_disk_that_fills_up_in_a_transfer_is_left_as_it_was(
    server: Sshd, family: tuple[Path, Path], python: str, tmp_path: Path, small_disk: Path
) -> None:
    """Small files take more than their size."""
    many = tmp_path / "many"
    many.mkdir()
    for number in range(400):
        (many / f"{number}").write_text(str(number))
    extra = FilesNeeded(tuple((path, f"many/{path.name}") for path in many.iterdir()), ())
    free = shutil.disk_usage(small_disk).free
    error = error_of(attempt(server, job_for(family, None, extra), small_disk / "store", python))
    assert "the disk of the device is full" in error
    assert "No space left on device" in error
    assert blobs(small_disk / "store") == {}
    assert is_idle(small_disk / "store")
    assert shutil.disk_usage(small_disk).free > free / 2
    assert attempt(server, job_for(family), small_disk / "store", python).report is not None


@pytest.mark.slow
def test_a_damaged_file_on_a_device_is_found_and_replaced(
    server: Sshd, family: tuple[Path, Path], images: Path, python: str, tmp_path: Path
) -> None:
    job, store = job_for(family, images), tmp_path / "store"
    before = attempt(server, job, store, python)
    damaged, cut, *_ = sorted((store / "blobs").rglob("?" * 64))
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    for path, content in ((damaged, data), (cut, cut.read_bytes()[:-1])):
        path.chmod(0o600)
        path.write_bytes(content)
    after = attempt(server, job, store, python)
    assert after.copied is not None
    assert (after.copied.files, after.copied.damaged) == (2, 2)
    assert_only_whole_blobs(store)
    assert after.exit_code == before.exit_code == 1


# what is wrong with the Python there


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False)
    return str(folder / "bin/python")


def test_a_device_without_python_is_named(server: Sshd, family: tuple[Path, Path], tmp_path: Path) -> None:
    error = error_of(attempt(server, job_for(family), tmp_path / "store", "/no/python; touch $HOME/x"))
    assert "Python could not be started on the device" in error
    assert "--remote-python" in error
    assert not Path.home().joinpath("x").exists()


def test_a_python_without_edge_ilseg_is_named(
    server: Sshd, family: tuple[Path, Path], bare_python: str, tmp_path: Path
) -> None:
    error = error_of(attempt(server, job_for(family), tmp_path / "store", bare_python))
    assert "the Python of the device has no edge-ilseg that can be used" in error
    assert "No module named 'edge_ilseg'" in error
    assert not (tmp_path / "store").exists()


def test_a_python_that_lacks_what_edge_ilseg_needs_is_named(
    server: Sshd, family: tuple[Path, Path], bare_python: str, tmp_path: Path
) -> None:
    python = write_python(tmp_path, program=bare_python)
    assert "No module named 'msgspec'" in error_of(attempt(server, job_for(family), tmp_path / "store", python))


def test_another_version_on_a_device_is_refused(server: Sshd, family: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("__init__.py", "devices/__init__.py"):
        (tmp_path / "edge_ilseg" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "edge_ilseg" / name).write_text("__version__ = '99.1'\n")
    (tmp_path / "edge_ilseg/devices/runtime.py").write_text("def installed_runtimes(): return ['onnxruntime']\n")
    error = error_of(attempt(server, job_for(family), tmp_path / "store", write_python(tmp_path, modules=tmp_path)))
    assert "the device has another version of edge-ilseg" in error
    assert "99.1" in error


def test_a_device_without_a_runtime_is_refused(server: Sshd, family: tuple[Path, Path], tmp_path: Path) -> None:
    error = error_of(attempt(server, job_for(family), tmp_path / "store", write_python(tmp_path, BLOCK)))
    assert "the device has no runtime for a model" in error
    assert not (tmp_path / "store").exists()


def test_a_python_that_is_too_old_is_named(server: Sshd, family: tuple[Path, Path], tmp_path: Path) -> None:
    old = tmp_path / "old"
    program = "import sys; sys.version_info = (3, 8, 0); code = sys.argv[3]; sys.argv[:4] = ['-c']; exec(code)"
    old.write_text(f"#!{sys.executable}\n{program}\n")
    old.chmod(0o755)
    error = error_of(attempt(server, job_for(family), tmp_path / "store", str(old)))
    assert "the Python of the device is too old" in error
    assert "Python 3.8" in error


@pytest.mark.slow
def test_a_verification_that_is_killed_is_told_from_one_that_fails(
    server: Sshd, family: tuple[Path, Path], tmp_path: Path
) -> None:
    python = write_python(tmp_path, AT_VERIFY + "os.kill(os.getpid(), 9)\n")
    error = error_of(attempt(server, job_for(family), tmp_path / "store", python))
    assert "the verification was killed on the device" in error
    assert "signal 9" in error
    assert is_idle(tmp_path / "store")


@pytest.mark.slow
def test_a_python_that_is_killed_before_it_answers_is_told_from_a_broken_connection(
    server: Sshd, family: tuple[Path, Path], python: str, tmp_path: Path
) -> None:
    killed = tmp_path / "killed"
    killed.write_text(f'#!/bin/sh\n"{python}" "$1" "$2" "$3" 0 0 "$6"\nkill -9 $$\n')
    killed.chmod(0o755)
    error = error_of(attempt(server, job_for(family), tmp_path / "store", str(killed)))
    assert "ended before it answered" in error


@pytest.mark.slow
def test_a_command_line_that_a_device_refuses_is_shown(
    server: Sshd, family: tuple[Path, Path], python: str, tmp_path: Path
) -> None:
    job = job_for(family)._replace(arguments=("verify", "--no-such-option"))
    error = error_of(attempt(server, job, tmp_path / "store", python))
    assert "without a report" in error
    assert "--no-such-option" in error


@pytest.mark.slow
def test_a_report_is_read_as_strictly_as_any_other(server: Sshd, family: tuple[Path, Path], tmp_path: Path) -> None:
    python = write_python(tmp_path, AT_VERIFY + 'print(\'{"format": "other"}\', flush=True); os._exit(0)\n')
    error = error_of(attempt(server, job_for(family), tmp_path / "store", python))
    assert "has a format that this version does not read" in error


# the store, without a connection


def test_the_part_that_is_sent_needs_the_standard_library_alone() -> None:
    tree = ast.parse(Path(remote_store.__file__).read_text())
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module).split(".")[0])
    assert names <= sys.stdlib_module_names


def test_any_shell_can_quote_the_start_of_the_part_that_is_sent() -> None:
    assert BOOTSTRAP.isascii()
    assert not set(BOOTSTRAP) & set("'!\n")


def test_a_file_that_is_not_what_its_name_says_is_not_stored(tmp_path: Path) -> None:
    name = hashlib.sha256(b"right").hexdigest()
    with pytest.raises(StoreError, match="another content"):
        receive(io.BytesIO(b"wrong"), name, tmp_path, tmp_path / "blobs/blob")
    assert list(tmp_path.iterdir()) == []
    assert receive(io.BytesIO(b"right"), name, tmp_path, tmp_path / "blobs/blob").read_bytes() == b"right"


def test_a_folder_that_others_may_write_into_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(StoreError, match="others may change"):
        remote_store.look(str(tmp_path), {})


def test_the_folder_of_a_killed_run_is_removed_and_that_of_a_running_one_is_not(tmp_path: Path) -> None:
    with work_folder(tmp_path) as running:
        (tmp_path / "work/killed.lock").touch()
        (tmp_path / "work/killed").mkdir()
        (tmp_path / "work/killed/file").touch()
        with work_folder(tmp_path) as other:
            assert running.is_dir()
            assert other != running
            assert not (tmp_path / "work/killed").exists()
    assert is_idle(tmp_path)


# which files are sent


def lay_out(needed: FilesNeeded, folder: Path) -> Path:
    for name in needed.folders:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for path, name in needed.files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
    return folder / "data"


def in_sub_folders(root: Path) -> Path:
    shutil.rmtree(root / "splits")
    for part in ("images", "masks"):
        for path in sorted((root / part).iterdir()):
            place = path.parent / ("test" if int(path.stem) % 2 else "train") / path.name
            place.parent.mkdir(exist_ok=True)
            path.rename(place)
    return root


def by_hash(root: Path) -> Path:
    shutil.rmtree(root / "splits")
    return root


def as_voc(root: Path) -> Path:
    """The augmented masks lack the first image, which has an official one."""
    data = root / "VOCdevkit/VOC2012"
    data.mkdir(parents=True)
    (root / "images").rename(data / "JPEGImages")
    (root / "masks").rename(data / "SegmentationClassAug")
    (data / "SegmentationClass").mkdir()
    (data / "SegmentationClassAug/000.png").rename(data / "SegmentationClass/000.png")
    (data / "ImageSets").mkdir()
    (root / "splits").rename(data / "ImageSets/Segmentation")
    (data / "ImageSets/Segmentation/test.txt").rename(data / "ImageSets/Segmentation/train_aug.txt")
    for path in (data / "JPEGImages").iterdir():
        with Image.open(path) as image:
            image.save(path.with_suffix(".jpg"))
        path.unlink()
    return root


def as_msrc(root: Path) -> Path:
    (root / "images").rename(root / "Images")
    (root / "splits/test.txt").rename(root / "test.txt")
    (root / "GroundTruth").mkdir()
    for path in (root / "masks").iterdir():
        Image.new("RGB", (64, 48), (0, 128, 0)).save(root / "GroundTruth" / f"{path.stem}_GT.bmp")
    return root


LAYOUTS: dict[str, tuple[str, str, Callable[[Path], Path]]] = {
    "lists": ("folder", "test", lambda root: root),
    "sub-folders": ("folder", "test", in_sub_folders),
    "a hash": ("folder", "train+val", by_hash),
    "VOC": ("voc", "train", as_voc),
    "MSRC": ("msrc", "test", as_msrc),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("max_images", [None, 2])
def test_a_device_sees_the_same_images_and_masks_of_a_split(name: str, max_images: int | None, tmp_path: Path) -> None:
    kind, split, change = LAYOUTS[name]
    here = change(write_color_folder(tmp_path / "here", count=40))
    whole = open_dataset(kind, here)
    ids = spread(whole.ids(split), max_images)
    needed = data_files(kind, here, whole, split, max_images)
    there = open_dataset(kind, lay_out(needed, tmp_path / "there"))
    assert spread(there.ids(split), max_images) == ids
    for image_id in ids:
        assert np.array_equal(there.read_image(image_id), whole.read_image(image_id))
        assert np.array_equal(there.read_labels(image_id), whole.read_labels(image_id))
    pictures = [path for path, _ in needed.files if path.suffix in IMAGE_SUFFIXES]
    assert len(pictures) == 2 * len(whole.ids(split) if name in ("sub-folders", "a hash") else ids)


def test_every_kind_of_data_set_that_reads_files_can_be_sent() -> None:
    assert set(DATA_LAYOUTS) == set(DATASETS) - GENERATED


def test_a_folder_that_is_no_bundle_is_not_sent(tmp_path: Path) -> None:
    (tmp_path / "private").touch()
    with pytest.raises(BundleError, match="no bundle"):
        bundle_files(tmp_path, "bundle")


def test_a_link_in_a_bundle_is_not_followed(family: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(family[0], tmp_path / "bundle")
    (tmp_path / "bundle/more").symlink_to("/etc/passwd")
    with pytest.raises(BundleError, match="a link"):
        bundle_files(tmp_path / "bundle", "bundle")


# addresses, options, paths


@pytest.mark.parametrize(
    ("text", "device"),
    [
        ("ssh://pi@camera-1", Device("pi", "camera-1", None)),
        ("ssh://camera_1.local:2222/", Device(None, "camera_1.local", 2222)),
        ("ssh://pi@[fe80::1%eth0]:22", Device("pi", "fe80::1%eth0", 22)),
    ],
)
def test_an_address_is_read(text: str, device: Device) -> None:
    assert parse_device(text) == device
    assert parse_device(str(device)) == device


@pytest.mark.parametrize(
    "text",
    [
        "pi@camera",
        "http://camera",
        "ssh://",
        "ssh://pi@",
        "ssh://@camera",
        "ssh://-oProxyCommand=sh",
        "ssh://-l@camera",
        "ssh://pi@-camera",
        "ssh://pi@cam\nera",
        "ssh://pi@cam era",
        "ssh://pi@$(reboot)",
        "ssh://pi;reboot@camera",
        "ssh://pi@camera:0",
        "ssh://pi@camera:65536",
        "ssh://pi@camera:port",
        "ssh://pi@camera/folder",
        "ssh://pi@[camera]",
    ],
)
def test_an_address_that_could_be_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        parse_device(text)


def test_a_password_in_an_address_is_refused_and_not_shown() -> None:
    with pytest.raises(ConfigError, match="holds a password") as raised:
        parse_device("ssh://pi:raspberry@camera")
    assert "raspberry" not in str(raised.value)


@pytest.mark.parametrize("text", ["ProxyJump", "=x", "-v=x", "Proxy Jump=x", "ProxyJump=", "ProxyJump=a\nb", "a b"])
def test_an_ssh_option_that_is_no_pair_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        parse_ssh_option(text)


@pytest.mark.parametrize("key", ["BatchMode", "controlpath", "REMOTECOMMAND"])
def test_an_ssh_option_that_is_set_here_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="set by edge-ilseg itself"):
        parse_ssh_option(f"{key}=no")


@pytest.mark.parametrize("text", ["", "-c", "a\nb", "a\x1bb"])
def test_a_path_that_could_be_an_option_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="path on the device"):
        check_remote_path(text, "--remote-python")


def test_a_path_is_one_word_for_a_shell_and_knows_the_home_folder_there() -> None:
    for path in ("a b", "$(touch x)", "it's", "~x"):
        done = subprocess.run(["sh", "-c", f"printf %s {shell_word(path)}"], capture_output=True, text=True, check=True)
        assert done.stdout == path
    command = f"printf %s {shell_word('~/my venv/python')}"
    environment = {**os.environ, "HOME": "/home/pi"}
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "/home/pi/my venv/python"


def test_text_from_a_device_cannot_steer_a_terminal() -> None:
    assert plain("bad\x1b[2J\x07 \x9bnews\r\n") == "bad [2J   news"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--remote-python", "python3"], "none is given"),
        (["--on", "ssh://a", "--on", "ssh://a"], "given twice"),
        (["--on", "ssh://a", "--remote-python", "p", "--remote-python", "q"], "not one value for each device"),
        (["--on", "ssh://a", "--images", "photos"], "one on the device"),
        (["--on", "ssh://a", "--max-old-drop", "1"], "needs labelled images"),
        (["--on", "camera"], "cannot be read"),
    ],
)
def test_a_command_line_that_cannot_work_is_refused_before_a_device_is_asked(
    words: list[str], message: str, family: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["verify", str(family[0]), *words]) == 3
    assert message in " ".join(capsys.readouterr().err.split())
