"""What `edge-ilseg doctor` looks at: reads, decides nothing. `edge_ilseg.doctor` decides.

1. Every fact may be missing, and is then None or empty: no facts are worth a traceback in a doctor.
2. Of other packages nothing is imported in this process, of our own nothing that needs one: the doctor runs where
   numpy, msgspec or the links of the source tree are broken. `doctor_probe` imports, in processes of its own.
3. Reading changes nothing on the machine and asks nobody on a network.
"""

from __future__ import annotations

import json
import locale
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from edge_ilseg import __version__
from edge_ilseg.requirements import Requirement, parse_requirement

OURS = "edge-ilseg"
PACKAGE = Path(__file__).parent
LINKED = ("calibration", "devices", "export")
"""Folders of the source tree that the package reaches through links."""
PROBED = {
    "numpy": "numpy",
    "pillow": "PIL",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "torch": "torch",
    "torchvision": "torchvision",
    "onnx": "onnx",
}
"""Distribution -> the module that is imported in a process of its own, where the distribution is installed."""
ALSO_LOOKED_UP = ("onnxruntime-gpu", "openvino-telemetry")
NOT_FOR_USERS = frozenset({"all", "docs", "dev"})
"""Extras that bring nothing of their own, or are for those who work on this project."""
PROBE_TIMEOUT_S = 120
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LC_ALL", "LC_CTYPE", "LANG", "PYTHONUTF8")
DEFAULT_ROOT = "/var/lib/edge-ilseg"

T = TypeVar("T")


@dataclass(frozen=True)
class Probe:
    """What came of importing a package."""

    version: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    said: str = ""
    """On standard error, its end."""


@dataclass(frozen=True)
class Disk:
    """A place that will be written to."""

    purpose: str
    path: str
    free_bytes: int


@dataclass(frozen=True)
class Facts:
    """One machine and one installation at one moment."""

    python: str
    bits: int
    system: str | None
    machine: str | None
    processor: str | None
    cpu_flags: frozenset[str] | None
    """Those that every core has."""
    cores: int
    quota_cores: float | None
    """Of the control group (a container's `--cpus`); None: no limit, or not known."""
    memory_mib: int | None
    """Of the machine, or of the control group where that is less."""
    edge_ilseg: str
    metadata_version: str | None
    """What pip has installed; None: this is a source tree on the path."""
    links: Mapping[str, str]
    """Of `LINKED`: `folder`, `file`, `broken link` or `missing`."""
    requirements: Mapping[str, tuple[str, ...]]
    """Distribution -> its `Requires-Dist`: ours, and those of which an extra is asked for."""
    packages: Mapping[str, tuple[str, ...]]
    """Distribution -> the versions found on the path; the first one counts. Without those that are not there."""
    probes: Mapping[str, Probe]
    """Distribution -> what importing it gave."""
    environment: Mapping[str, str]
    filesystem_encoding: str
    output_encoding: str
    has_utf8_locale: bool | None
    """Whether the system has C.UTF-8."""
    shm_bytes: int | None
    """Size of /dev/shm."""
    disks: tuple[Disk, ...]
    now_s: float
    newest_file_s: float | None
    """When the newest file of this installation was written."""
    signed_time: str | None
    """The latest signed time that the updates of this device have confirmed, ISO 8601."""
    has_nvidia: bool


def read_facts(*, proc: Path = Path("/proc"), sysfs: Path = Path("/sys"), root: Path | None = None) -> Facts:
    """Look at this machine and this installation.

    Args:
        proc: where the kernel's process file system is.
        sysfs: where the kernel's device file system is.
        root: the folder of the updates; EDGE_ILSEG_ROOT, or /var/lib/edge-ilseg, if None.
    """
    root = root or Path(os.environ.get("EDGE_ILSEG_ROOT", DEFAULT_ROOT))
    cpuinfo = attempt((proc / "cpuinfo").read_text) or ""
    requirements = read_requirements(OURS)
    wanted = {item.name for texts in requirements.values() for item in _readable(texts)}
    packages = read_packages(sorted(wanted | set(PROBED) | set(ALSO_LOOKED_UP)))
    return Facts(
        python=platform.python_version(),
        bits=64 if sys.maxsize > 1 << 32 else 32,
        system=attempt(_system),
        machine=platform.machine() or None,
        processor=_processor(cpuinfo, proc),
        cpu_flags=parse_cpu_flags(cpuinfo),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        quota_cores=attempt(lambda: parse_quota((sysfs / "fs/cgroup/cpu.max").read_text())),
        memory_mib=_memory_mib(proc, sysfs),
        edge_ilseg=__version__,
        metadata_version=attempt(lambda: metadata.version(OURS)),
        links={name: read_link(PACKAGE / name) for name in LINKED},
        requirements=requirements,
        packages=packages,
        probes=run_probes(name for name in PROBED if name in packages),
        environment={name: os.environ[name] for name in VARIABLES if name in os.environ},
        filesystem_encoding=sys.getfilesystemencoding(),
        output_encoding=getattr(sys.stdout, "encoding", None) or locale.getpreferredencoding(False),
        has_utf8_locale=attempt(_has_utf8_locale),
        shm_bytes=attempt(lambda: shutil.disk_usage("/dev/shm").total),
        disks=_disks(root),
        now_s=time.time(),
        newest_file_s=attempt(lambda: max(path.stat().st_mtime for path in PACKAGE.glob("*.py"))),
        signed_time=attempt(lambda: str(json.loads((root / "state.json").read_bytes())["time_floor"])),
        has_nvidia=(proc / "driver/nvidia/version").exists(),
    )


def attempt(read: Callable[[], T]) -> T | None:
    """Rule 1."""
    try:
        return read()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, metadata.PackageNotFoundError):
        return None


def read_link(path: Path) -> str:
    """What stands in the place of a link of the source tree: an unpacker without links leaves a file with its text."""
    if path.is_dir():
        return "folder"
    if path.is_symlink():
        return "broken link"
    return "file" if path.exists() else "missing"


def read_requirements(name: str) -> dict[str, tuple[str, ...]]:
    """`Requires-Dist` of a distribution and, through extras that it asks for, of others; those that are installed."""
    found: dict[str, tuple[str, ...]] = {}
    waiting = [name]
    while waiting:
        current = waiting.pop()
        texts = attempt(lambda current=current: metadata.requires(current))  # type: ignore[misc]
        if current in found or texts is None:
            continue
        found[current] = tuple(texts)
        waiting += [item.name for item in _readable(texts) if item.extras]
    return found


def read_packages(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The versions of distributions on the path, in the order in which Python finds them."""
    found = {}
    for name in names:
        versions = attempt(lambda name=name: tuple(item.version for item in metadata.distributions(name=name)))  # type: ignore[misc]
        if versions:
            found[name] = tuple(dict.fromkeys(version or "unknown" for version in versions))
    return found


def run_probes(names: Iterable[str], timeout_s: float = PROBE_TIMEOUT_S) -> dict[str, Probe]:
    """Import each in a process of its own (rule 2), some at the same time."""
    names = tuple(names)
    with ThreadPoolExecutor(max_workers=4) as pool:
        return dict(zip(names, pool.map(lambda name: run_probe(PROBED[name], timeout_s), names), strict=True))


def run_probe(module: str, timeout_s: float) -> Probe:
    """Import one module in a process of its own; a crash or a hang is an answer, too."""
    # -P: nothing beside the program (`data`, `metrics`) may be taken for a package of that name
    command = [sys.executable, "-P", str(PACKAGE / "doctor_probe.py"), module]
    try:
        done = subprocess.run(command, capture_output=True, timeout=timeout_s, check=False, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return Probe(error=f"no answer within {timeout_s:g} s")
    except OSError as error:
        return Probe(error=f"no process could be started: {error.strerror}")
    said = done.stderr.decode(errors="replace")[-2000:]
    answer = attempt(lambda: json.loads(done.stdout.splitlines()[-1]) if done.stdout else {})
    if done.returncode < 0:
        return Probe(error=f"the process was killed by {signal_name(-done.returncode)}", said=said)
    if done.returncode or not isinstance(answer, dict) or not answer:
        return Probe(error=f"the process ended with {done.returncode}", said=said)
    return Probe(answer.pop("version", None), answer, answer.pop("error", None), said)


def signal_name(number: int) -> str:
    """`SIGILL` of 4."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def parse_cpu_flags(cpuinfo: str) -> frozenset[str] | None:
    """The flags of every core in the text of `/proc/cpuinfo`; None where it lists none."""
    lines = re.findall(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    return frozenset(set.intersection(*(set(line.split()) for line in lines))) if lines else None


def parse_quota(cpu_max: str) -> float | None:
    """`"150000 100000"` to 1.5 cores, `"max 100000"` to None."""
    quota, period = cpu_max.split()
    return None if quota == "max" else int(quota) / int(period)


def _readable(texts: Iterable[str]) -> list[Requirement]:
    """Those that can be read, and are for users; `edge_ilseg.doctor_packages` names the others."""
    found = (attempt(lambda text=text: parse_requirement(text)) for text in texts)  # type: ignore[misc]
    return [item for item in found if item is not None and item.extra not in NOT_FOR_USERS]


def _processor(cpuinfo: str, proc: Path) -> str | None:
    match = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(\S.*)$", cpuinfo, re.MULTILINE)
    if match:
        return match[1].strip()
    return attempt(lambda: (proc / "device-tree/model").read_text().strip("\0 \n")) or platform.processor() or None


def _memory_mib(proc: Path, sysfs: Path) -> int | None:
    match = re.search(r"^MemTotal:\s*(\d+) kB$", attempt((proc / "meminfo").read_text) or "", re.MULTILINE)
    limit = attempt(lambda: int((sysfs / "fs/cgroup/memory.max").read_text()) >> 20)  # "max": a ValueError, no limit
    known = [size for size in (int(match[1]) // 1024 if match else None, limit) if size is not None]
    return min(known, default=None)


def _system() -> str:
    kernel = f"{platform.system()} {platform.release()}"
    name = attempt(lambda: platform.freedesktop_os_release()["PRETTY_NAME"])
    return f"{name}, {kernel}" if name else kernel


def _has_utf8_locale() -> bool:
    """In a process of its own: a locale is of a whole process."""
    code = "import locale; locale.setlocale(locale.LC_CTYPE, 'C.UTF-8')"
    done = subprocess.run([sys.executable, "-P", "-S", "-c", code], capture_output=True, timeout=30, check=False)
    return done.returncode == 0


def _disks(root: Path) -> tuple[Disk, ...]:
    places = [("this folder", Path.cwd()), ("temporary files", Path(tempfile.gettempdir()))]
    if root.is_dir():
        places.append(("models of this device", root))
    found = ((purpose, path, attempt(lambda path=path: shutil.disk_usage(path).free)) for purpose, path in places)  # type: ignore[misc]
    return tuple(Disk(purpose, str(path), free) for purpose, path, free in found if free is not None)
