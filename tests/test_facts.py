"""What is found out of a device, also where the system tells little."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_ilseg.devices.facts import (
    DeviceFacts,
    parse_int8_flags,
    parse_memory_mib,
    parse_processor,
    read_device_facts,
    read_peak_rss_mib,
)

X86 = """processor\t: 0
model name\t: Intel(R) Core(TM) i5-1135G7 @ 2.40GHz
flags\t\t: fpu sse4_2 fma avx2 avx512f avx512_vnni

processor\t: 1
model name\t: Intel(R) Core(TM) i5-1135G7 @ 2.40GHz
flags\t\t: fpu sse4_2 fma avx2 avx512f avx512_vnni
"""
HYBRID = X86.replace("avx512f avx512_vnni\n\nprocessor", "avx_vnni\n\nprocessor")
ARM = """processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm asimddp i8mm
CPU implementer\t: 0x41
"""


def fake_device(folder: Path, *, cpuinfo: str = X86, governor: str = "powersave\n") -> tuple[Path, Path]:
    proc, sysfs = folder / "proc", folder / "sys"
    cpufreq = sysfs / "devices/system/cpu/cpu0/cpufreq"
    cpufreq.mkdir(parents=True)
    (proc / "device-tree").mkdir(parents=True)
    (proc / "cpuinfo").write_text(cpuinfo)
    (proc / "meminfo").write_text("MemTotal:        1999872 kB\nMemFree:  5 kB\n")
    (proc / "device-tree/model").write_text("Raspberry Pi 5 Model B Rev 1.0\0")
    (cpufreq / "scaling_governor").write_text(governor)
    return proc, sysfs


def test_facts_of_an_x86_processor(tmp_path: Path) -> None:
    proc, sysfs = fake_device(tmp_path)
    facts = read_device_facts(proc=proc, sysfs=sysfs)
    assert facts.processor == "Intel(R) Core(TM) i5-1135G7 @ 2.40GHz"
    assert facts.int8_flags == ("avx2", "fma", "avx512f", "avx512_vnni")
    assert facts.memory_mib == 1953
    assert facts.governor == "powersave"


def test_an_arm_board_is_named_by_its_device_tree(tmp_path: Path) -> None:
    proc, sysfs = fake_device(tmp_path, cpuinfo=ARM)
    facts = read_device_facts(proc=proc, sysfs=sysfs)
    assert facts.processor == "Raspberry Pi 5 Model B Rev 1.0"
    assert facts.int8_flags == ("asimd", "asimddp", "i8mm")


def test_the_name_that_every_arm_board_has_is_none(tmp_path: Path) -> None:
    """As kernels of Jetson boards write it."""
    text = f"model name\t: ARMv8 Processor rev 1 (v8l)\n{ARM}"
    proc, sysfs = fake_device(tmp_path, cpuinfo=text)
    assert read_device_facts(proc=proc, sysfs=sysfs).processor == "Raspberry Pi 5 Model B Rev 1.0"
    with pytest.raises(ValueError, match="no processor"):
        parse_processor(text)
    assert parse_processor(f"{text}Hardware\t: BCM2835\n") == "BCM2835"


def test_a_flag_counts_only_when_every_core_has_it() -> None:
    assert parse_int8_flags(HYBRID) == ("avx2", "fma")


def test_a_flag_is_a_whole_word() -> None:
    assert parse_int8_flags("flags : avx512_vnni_extra avx21") == ()


@pytest.mark.parametrize("parse", [parse_int8_flags, parse_memory_mib, parse_processor])
def test_a_text_that_does_not_tell_is_an_error_and_not_a_guess(parse) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError):
        parse("nothing : here\n")


def test_a_device_that_tells_nothing_has_none_and_the_reasons(tmp_path: Path) -> None:
    facts = read_device_facts(proc=tmp_path / "proc", sysfs=tmp_path / "sys")
    unknown = ("processor", "int8_flags", "governor", "memory_mib")
    assert {name: getattr(facts, name) for name in unknown} == dict.fromkeys(unknown)
    assert set(unknown) <= set(facts.missing)
    assert "FileNotFoundError" in facts.missing["governor"]


def test_an_empty_file_of_the_kernel_is_no_fact(tmp_path: Path) -> None:
    proc, sysfs = fake_device(tmp_path, governor="\n")
    facts = read_device_facts(proc=proc, sysfs=sysfs)
    assert facts.governor is None
    assert "empty" in facts.missing["governor"]


def test_a_package_that_is_not_installed_has_no_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_ilseg.devices import facts as module

    monkeypatch.setattr(module, "PACKAGES", ("numpy", "no-such-runtime"))
    facts = read_device_facts(proc=tmp_path, sysfs=tmp_path)
    assert facts.versions == {"numpy": np.__version__, "no-such-runtime": None}
    assert "versions.no-such-runtime" in facts.missing


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
def test_facts_of_this_machine_are_plausible_and_survive_json() -> None:
    facts = read_device_facts()
    assert facts.machine == platform.machine()
    assert facts.cores == len(os.sched_getaffinity(0))
    assert facts.memory_mib > 128
    assert "Linux" in facts.system
    assert len(facts.load_average) == 3
    assert msgspec.json.decode(msgspec.json.encode(facts), type=DeviceFacts) == facts


def test_peak_memory_never_falls_and_counts_what_is_held() -> None:
    before_mib = read_peak_rss_mib()
    held = np.ones((1 << 20) * 64, np.uint8)
    after_mib = read_peak_rss_mib()
    assert after_mib >= before_mib
    assert 10 < after_mib < 1 << 20
    assert held.nbytes / (1 << 20) < after_mib


def test_peak_memory_is_that_of_this_program_and_not_of_the_one_that_started_it() -> None:
    held = np.ones((1 << 20) * 300, np.uint8)  # a child inherits the peak that getrusage tells
    code = "from edge_ilseg.devices.facts import read_peak_rss_mib as peak; print(peak())"
    child_mib = float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout)
    assert child_mib < held.nbytes / (1 << 20)


def test_memory_is_asked_from_the_system_where_the_kernel_has_no_such_file(tmp_path: Path) -> None:
    assert read_peak_rss_mib(proc=tmp_path) == pytest.approx(read_peak_rss_mib(), abs=4096)
    (tmp_path / "self").mkdir()
    (tmp_path / "self/status").write_text("Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t     10 kB\n")
    assert read_peak_rss_mib(proc=tmp_path) == 2.0
