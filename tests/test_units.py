"""The systemd units are valid, and run the agent on the folder that they were written for."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edge_ilseg.devices.update.units import NAMES, write_units
from edge_ilseg.errors import ConfigError, EdgeIlsegError

PROGRAM = f"{Path(sys.executable).parent}/edge-ilseg"


def service_lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line and not line.startswith(("#", "["))]


def test_the_service_runs_one_pass_on_the_device(tmp_path: Path) -> None:
    service, timer = write_units(tmp_path, Path("/srv/model"), PROGRAM)
    assert f"ExecStart={PROGRAM} device run --root /srv/model" in service_lines(service)
    assert "ReadWritePaths=/srv/model" in service_lines(service)
    assert "OnUnitInactiveSec=15min" in service_lines(timer)
    assert "@" not in service.read_text() + timer.read_text()


def test_without_a_program_it_is_that_of_this_installation(tmp_path: Path) -> None:
    service, _ = write_units(tmp_path, tmp_path / "device")
    assert f"ExecStart={PROGRAM} device run" in service.read_text()


@pytest.mark.parametrize("folder", ["/srv/model", "/srv/my model"])
def test_systemd_finds_nothing_to_complain_of(folder: str, tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed: the units are not checked by systemd itself")
    write_units(tmp_path, Path(folder), PROGRAM)
    names = [str(tmp_path / name) for name in NAMES]
    done = subprocess.run([analyze, "verify", "--man=no", *names], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (0, "")


def test_systemd_does_complain_of_a_wrong_unit(tmp_path: Path) -> None:
    """That the check above can fail."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    service, _ = write_units(tmp_path, Path("/srv/model"), "/nowhere/edge-ilseg")
    done = subprocess.run([analyze, "verify", "--man=no", str(service)], capture_output=True, text=True, check=False)
    assert "/nowhere/edge-ilseg" in done.stderr


@pytest.mark.parametrize("folder", ["/srv/50%", "/srv/$HOME", '/srv/"x"', "/srv/a\nb"])
def test_a_path_that_systemd_would_read_otherwise_is_refused(folder: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot stand in a systemd unit"):
        write_units(tmp_path, Path(folder), PROGRAM)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(EdgeIlsegError) as caught:
        write_units(tmp_path / "none", Path("/srv/model"), PROGRAM)
    assert "none" in str(caught.value)
