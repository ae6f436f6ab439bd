"""What this device is, as far as it matters for a verdict: processor, int8 instructions, memory, load, versions.

1. Every fact may be missing; a missing one is `None`, and `missing` says why. Nothing is guessed.
2. Reading facts changes nothing on the device and needs no special rights.
3. A few facts are essential (`lacking_facts`): without them nobody can tell what a verdict was given on.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import msgspec

from edge_ilseg import __version__

INT8_FLAGS = (
    # x86: vectors, then integer dot products (without VNNI, 8-bit weights can overflow 16-bit sums), then matrix tiles
    *("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_bf16"),
    *("avx_vnni", "avx_vnni_int8", "avx512_vnni", "amx_tile", "amx_int8", "amx_bf16"),
    # ARM, by the kernel's names: vectors, dot products, 8-bit matrix products
    *("neon", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)
"""The processor flags that decide how int8 (and reduced float) models are computed."""

PACKAGES = ("numpy", "pillow", "onnxruntime", "openvino")

T = TypeVar("T")


class DeviceFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One device at one moment. `None`: not found out; `missing` has the reason under the field's name."""

    machine: str | None
    """Instruction set, `x86_64` or `aarch64`."""
    processor: str | None
    int8_flags: tuple[str, ...] | None
    """Those of `INT8_FLAGS` that the processor has."""
    cores: int | None
    """Logical cores that this process may use."""
    governor: str | None
    """Frequency governor of the first core, `performance` or `powersave`; a latency means little without it."""
    memory_mib: int | None
    load_average: tuple[float, float, float] | None
    """Over 1, 5 and 15 minutes."""
    system: str | None
    python: str
    edge_ilseg: str
    versions: dict[str, str | None]
    """Installed versions of `PACKAGES`."""
    missing: dict[str, str]


def read_device_facts(*, proc: Path = Path("/proc"), sysfs: Path = Path("/sys")) -> DeviceFacts:
    """Read the facts of this device.

    Args:
        proc: where the kernel's process file system is.
        sysfs: where the kernel's device file system is.
    """
    missing: dict[str, str] = {}

    def attempt(field: str, read: Callable[[], T]) -> T | None:
        try:
            return read()
        except (OSError, ValueError, AttributeError, metadata.PackageNotFoundError) as error:
            missing[field] = f"{type(error).__name__}: {error}"
            return None

    cpuinfo = attempt("cpuinfo", (proc / "cpuinfo").read_text) or ""
    return DeviceFacts(
        machine=platform.machine() or None,
        processor=attempt("processor", lambda: _processor(cpuinfo, proc)),
        int8_flags=attempt("int8_flags", lambda: parse_int8_flags(cpuinfo)),
        cores=attempt("cores", usable_cores),
        governor=attempt("governor", lambda: _line(sysfs / "devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        memory_mib=attempt("memory_mib", lambda: _memory_mib(proc)),
        load_average=attempt("load_average", os.getloadavg),
        system=attempt("system", _system),
        python=platform.python_version(),
        edge_ilseg=__version__,
        versions={name: attempt(f"versions.{name}", partial(metadata.version, name)) for name in PACKAGES},
        missing=missing,
    )


def lacking_facts(facts: DeviceFacts) -> tuple[str, ...]:
    """Which essential facts are not known (rule 3): the machine, its processor or int8 flags, its cores, its memory.

    Servers with ARM processors give flags and no name; either says what computes int8.
    """
    has_processor = facts.processor is not None or facts.int8_flags is not None
    known = {
        "machine": facts.machine is not None,
        "processor": has_processor,
        "cores": facts.cores is not None,
        "memory": facts.memory_mib is not None,
    }
    return tuple(name for name, is_known in known.items() if not is_known)


def read_available_mib(*, proc: Path = Path("/proc")) -> int | None:
    """Memory that programs can still get without swapping, MiB; `None` where the system does not tell."""
    try:
        match = re.search(r"^MemAvailable:\s*(\d+) kB$", (proc / "meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) // 1024 if match else None


def usable_cores() -> int:
    """Logical cores that this process may use; all of the machine where the system does not tell (macOS, Windows)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse_processor(cpuinfo: str) -> str:
    """The processor's name in the text of `/proc/cpuinfo`; "ARMv8 Processor rev 0 (v8l)" is none, every board has it.

    Raises:
        ValueError: the text names no processor.
    """
    for key in ("model name", "Model", "Hardware", "uarch"):
        if match := re.search(rf"^{key}\s*:\s*(?!ARMv\d+ Processor)(\S.*)$", cpuinfo, re.MULTILINE):
            return match[1].strip()
    raise ValueError("cpuinfo names no processor")


def parse_int8_flags(cpuinfo: str) -> tuple[str, ...]:
    """Those of `INT8_FLAGS` that *every* core in the text of `/proc/cpuinfo` has: cores of one chip may differ.

    Raises:
        ValueError: the text lists no flags.
    """
    lines = re.findall(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    if not lines:
        raise ValueError("cpuinfo lists no flags")
    shared = set.intersection(*(set(line.split()) for line in lines))
    return tuple(flag for flag in INT8_FLAGS if flag in shared)


def parse_memory_mib(meminfo: str) -> int:
    """The total memory in the text of `/proc/meminfo`, MiB.

    Raises:
        ValueError: the text does not say.
    """
    match = re.search(r"^MemTotal:\s*(\d+) kB$", meminfo, re.MULTILINE)
    if not match:
        raise ValueError("meminfo has no MemTotal")
    return int(match[1]) // 1024


def read_peak_rss_mib(*, proc: Path = Path("/proc")) -> float | None:
    """Highest resident memory of this process so far, MiB; `None` where the system does not tell (Windows).

    On Linux from `VmHWM`: what `getrusage` tells is at least the size that the parent had when it made this process,
    because the kernel keeps the higher of the two when a process becomes another program.
    """
    try:
        match = re.search(r"^VmHWM:\s*(\d+) kB$", (proc / "self/status").read_text(), re.MULTILINE)
    except OSError:
        match = None
    if match:
        return int(match[1]) / 1024
    try:
        import resource
    except ImportError:
        return None
    unit_bytes = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes / (1 << 20)


def _processor(cpuinfo: str, proc: Path) -> str:
    if sys.platform != "linux" and platform.processor():
        return platform.processor()
    try:
        return parse_processor(cpuinfo)
    except ValueError:  # most ARM boards name themselves in the device tree only
        return _line(proc / "device-tree/model")


def _memory_mib(proc: Path) -> int:
    if sys.platform == "darwin":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    return parse_memory_mib((proc / "meminfo").read_text())


def _line(path: Path) -> str:
    text = path.read_text().strip("\0 \n")
    if not text:
        raise ValueError(f"{path} is empty")
    return text


def _system() -> str:
    """Distribution and kernel; the kernel alone where the distribution does not name itself."""
    kernel = f"{platform.system()} {platform.release()}"
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {kernel}"
    except (OSError, KeyError):
        return kernel
