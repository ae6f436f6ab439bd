"""What is wrong with this machine and this installation, and what mends it: decided from facts, without I/O.

1. A check is `ok`, a `note` (it works; this is worth knowing, or something is left out) or a `problem` (something of
   edge-ilseg does not work here). Notes and problems have a mend: a command to type, or a thing to do.
2. What is not known is never a problem.
3. The exit code is 1 where there is a problem, else 0.

`edge_ilseg.doctor_facts` reads the facts, `edge_ilseg.doctor_packages` has the checks of packages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta

from edge_ilseg import doctor_packages
from edge_ilseg.doctor_check import Check, note, ok, problem
from edge_ilseg.doctor_facts import Facts

REPORT_FORMAT = "edge-ilseg-doctor"
REPORT_VERSION = 1
LITTLE_MEMORY_MIB = 1024
"""The gate gives a model so much by default: `[gate] memory_mib`."""
LITTLE_SHM_BYTES = 256 << 20
"""Docker gives 64 MiB."""
FEW_BYTES, LITTLE_BYTES = 256 << 20, 2 << 30
"""On a disk: not enough for an update, or for training."""
EARLIEST = datetime(2025, 1, 1, tzinfo=UTC)
"""Before this program was written."""
LONG = timedelta(days=5 * 365)
DOT_PRODUCTS = frozenset({"avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm"})
"""As `edge_ilseg.devices.device_profile.DOT_PRODUCT_FLAGS`, which cannot be imported where numpy is broken."""
X86, ARM64 = ("x86_64", "AMD64"), ("aarch64", "arm64")


def diagnose(facts: Facts) -> tuple[Check, ...]:
    """All checks of `CHECKS`, in their order."""
    return tuple(found for check in CHECKS for found in check(facts))


def exit_code(checks: Iterable[Check]) -> int:
    """Rule 3."""
    return 1 if any(check.status == "problem" for check in checks) else 0


def python(facts: Facts) -> Iterator[Check]:
    """Which Python; no runtime has packages for one of 32 bits."""
    found = f"{facts.python}, {facts.bits} bits, on {facts.system or 'a system that does not name itself'}"
    if facts.bits == 64:
        yield ok("python", found)
    else:
        yield problem("python", found, "install a system and a Python of 64 bits: no runtime has packages for 32")


def processor(facts: Facts) -> Iterator[Check]:
    """Cores, and those that a container leaves."""
    found = f"{facts.processor or facts.machine or 'not known'}, {facts.cores} cores"
    if facts.quota_cores is not None:
        found += f", of which this container may use {facts.quota_cores:g}"
    yield ok("processor", found)


def memory(facts: Facts) -> Iterator[Check]:
    """Enough for the gate?"""
    if facts.memory_mib is None:
        yield ok("memory", "not known")
    elif facts.memory_mib < LITTLE_MEMORY_MIB:
        mend = "set [gate] memory_mib in agent.toml to what is free here, and max_rss_mib in a device profile"
        yield note("memory", f"{facts.memory_mib} MiB; the gate lets a model use {LITTLE_MEMORY_MIB} MiB", mend)
    else:
        yield ok("memory", f"{facts.memory_mib} MiB")


def int8(facts: Facts) -> Iterator[Check]:
    """What the processor's instructions mean for int8."""
    flags, machine = facts.cpu_flags, facts.machine
    if flags is None or machine not in (*X86, *ARM64):
        yield ok("int8", "the processor's instructions are not known here")
        return
    dots = sorted(flags & DOT_PRODUCTS)
    if dots:
        yield ok("int8", f"{', '.join(dots)}: integer dot products, 8-bit weights are safe")
    elif machine in ARM64:
        found = "no asimddp: without dot products int8 is little faster than fp32, and 8-bit weights may overflow"
        yield note("int8", found, "export with --profile raspberry-pi-4, or without one: weights then have 7 bits")
    elif "avx" not in flags:
        found = "no AVX: models run several times slower, and packages built for AVX stop with SIGILL"
        yield note("int8", found, "take a processor type with AVX2, in a virtual machine the host's (-cpu host)")
    elif "avx2" not in flags:
        found = "no AVX2: int8 is computed in vectors of 128 bits, hardly faster than fp32"
        yield note("int8", found, "compare on this machine: edge-ilseg bench BUNDLE; perhaps verify --precision fp32")
    else:
        found = "AVX2 without VNNI: sums of 8-bit products may overflow 16 bits"
        yield note("int8", found, "export with --profile x86-avx2, or without one: weights then have 7 bits")


def source_tree(facts: Facts) -> Iterator[Check]:
    """The links through which the package reaches export, devices and calibration."""
    broken = [f"edge_ilseg/{name} is a {state}" for name, state in facts.links.items() if state not in ("folder",)]
    found = "; ".join(broken).replace("is a missing", "is missing")
    mend = (
        "unpack with links (tar; git with core.symlinks=true), or install a wheel: pip install edge-ilseg"
        if broken
        else ""
    )
    yield (
        problem("source tree", found, mend)
        if broken
        else ok("source tree", "export, devices and calibration are there")
    )


def threads(facts: Facts) -> Iterator[Check]:
    """OMP_NUM_THREADS and its like against the cores that there are."""
    usable = min(facts.cores, facts.quota_cores or facts.cores)
    given = {name: text for name, text in facts.environment.items() if name.endswith("_NUM_THREADS")}
    if wrong := [f"{name}={text}" for name, text in given.items() if not _is_positive(text)]:
        yield note("threads", f"{', '.join(wrong)}: no number of threads", "unset it, or give a whole number from 1")
        return
    most = max((int(text.split(",")[0]) for text in given.values()), default=0)
    shown = ", ".join(f"{name}={text}" for name, text in given.items()) or "no limit is set"
    if not given and usable < facts.cores:
        found = f"no limit is set, and libraries start {facts.cores} threads where {usable:g} cores may be used"
        yield note("threads", found, f"export OMP_NUM_THREADS={max(1, int(usable))}; --threads for a runtime")
    elif most > usable:
        found = f"{shown}, more than the {usable:g} cores that may be used"
        yield note("threads", found, f"export OMP_NUM_THREADS={max(1, int(usable))}")
    elif given.get("OMP_NUM_THREADS") == "1" and usable > 1:
        yield note("threads", f"{shown}: training uses one of {usable:g} cores", "unset OMP_NUM_THREADS to use all")
    else:
        yield ok("threads", shown)


def text(facts: Facts) -> Iterator[Check]:
    """Class names, tables and file names need UTF-8."""
    encodings = {facts.filesystem_encoding.lower(), facts.output_encoding.lower()}
    found = f"files {facts.filesystem_encoding}, output {facts.output_encoding}"
    if all(name.replace("-", "").replace("_", "") == "utf8" for name in encodings):
        yield ok("text", found)
        return
    mend = "export LC_ALL=C.UTF-8" if facts.has_utf8_locale else "export PYTHONUTF8=1 (this system has no C.UTF-8)"
    yield note("text", f"{found}: class names outside of it cannot be shown, or be names of files", mend)


def shared_memory(facts: Facts) -> Iterator[Check]:
    """What the processes of --workers pass images through."""
    if facts.shm_bytes is None:
        return
    size = f"/dev/shm has {facts.shm_bytes >> 20} MiB"
    if facts.shm_bytes >= LITTLE_SHM_BYTES:
        yield ok("shared memory", size)
    else:
        mend = "train with --workers 0 (the default), or start the container with --shm-size=1g"
        yield note("shared memory", f"{size}: with --workers training may stop with 'Bus error'", mend)


def disk(facts: Facts) -> Iterator[Check]:
    """Room where something will be written."""
    for place in facts.disks:
        found = f"{place.purpose}: {place.free_bytes / (1 << 30):.1f} GiB free in {place.path}"
        if place.free_bytes < FEW_BYTES:
            yield problem(
                "disk", found, "make room: an update or an export would stop half-way (device gc removes old models)"
            )
        elif place.free_bytes < LITTLE_BYTES:
            yield note("disk", found, "enough for a device; make room before training or installing torch")
        else:
            yield ok("disk", found)


def clock(facts: Facts) -> Iterator[Check]:
    """Signatures expire: a clock that is far off stops updates."""
    now = datetime.fromtimestamp(facts.now_s, UTC)
    shown = f"{now:%Y-%m-%d %H:%M} UTC"
    passed = {"this program was written": EARLIEST}
    if facts.newest_file_s is not None:
        passed["this installation was made"] = datetime.fromtimestamp(facts.newest_file_s, UTC)
    signed = _time(facts.signed_time)
    if signed is not None:
        passed["the publisher signed the model in use"] = signed
    what, latest = max(passed.items(), key=lambda item: item[1])
    mend = "set the clock (timedatectl set-ntp true): signed metadata are judged by it, and updates stop"
    if now < latest - timedelta(days=1):
        yield problem("clock", f"{shown}, and {what} on {latest:%Y-%m-%d}: it is behind", mend)
    elif now > latest + LONG:
        found = f"{shown}, more than five years after {what}: an old installation, or a clock that is ahead"
        yield note("clock", found, mend)
    else:
        yield ok("clock", shown)


def _is_positive(text: str) -> bool:
    """OMP_NUM_THREADS may be a list, one number a level."""
    return all(part.strip().isdecimal() and int(part) > 0 for part in text.split(","))


def _time(text: str | None) -> datetime | None:
    try:
        found = datetime.fromisoformat(text) if text else None
    except ValueError:
        return None
    return found if found is None or found.tzinfo is not None else found.replace(tzinfo=UTC)


CHECKS: tuple[Callable[[Facts], Iterator[Check]], ...] = (
    *(python, processor, memory, int8),
    *(source_tree, doctor_packages.installation, doctor_packages.base, doctor_packages.extras),
    *(doctor_packages.runtimes, doctor_packages.numpy_abi, doctor_packages.training, doctor_packages.gpu),
    *(doctor_packages.torchvision, doctor_packages.onnx, doctor_packages.twins, doctor_packages.telemetry),
    *(threads, text, shared_memory, disk, clock),
)
