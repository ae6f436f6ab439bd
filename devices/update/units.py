"""The systemd service and timer that run the agent on a device: templates of this package, filled in."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

from edge_ilseg.errors import ConfigError, EdgeIlsegError
from edge_ilseg.files import disk_error, write_bytes

TEMPLATES = Path(__file__).parent / "systemd"
NAMES = ("edge-ilseg-update.service", "edge-ilseg-update.timer")


def write_units(out: Path, root: Path, program: str | None = None) -> tuple[Path, ...]:
    """Write both files into the folder `out`.

    Args:
        out: there already, such as `/etc/systemd/system`.
        root: of the device.
        program: the command with its full path; None: that of this installation.

    Raises:
        ConfigError: a path cannot stand in a unit, or the program is not found.
        EdgeIlsegError: the folder cannot be written.
    """
    command = program or _installed_program()
    place = str(root.resolve())
    for what, text in (("the device's folder", place), ("the program", command)):
        if not text.startswith("/") or any(character in text for character in "%$\"'\\\n"):
            raise ConfigError(
                f"the path of {what} cannot stand in a systemd unit",
                found=text,
                expected="a plain path",
                hint="give a path from the root, without % $ and quotes: --root, --program",
            )
    written = []
    for name in NAMES:
        text = (TEMPLATES / name).read_text(encoding="utf-8")
        filled = text.replace("@PROGRAM@", command).replace("@ROOT@", _unit_word(place))
        try:
            write_bytes(out / name, filled.encode())
        except OSError as error:
            raise disk_error(error, out / name) from error
        written.append(out / name)
    return tuple(written)


def _unit_word(path: str) -> str:
    """One word of a unit's line."""
    return f'"{path}"' if any(character.isspace() for character in path) else path


def _installed_program() -> str:
    found = shutil.which("edge-ilseg", path=str(Path(sys.executable).parent)) or shutil.which("edge-ilseg")
    if found is not None:
        return found
    if " " in sys.executable:
        raise EdgeIlsegError("the command edge-ilseg is not found", hint="say where it is: --program /path/edge-ilseg")
    return f"{shlex.quote(sys.executable)} -m edge_ilseg"
