"""The doctor on made-up machines, on this one, and in installations that are broken."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_ilseg import __version__, doctor_facts
from edge_ilseg.cli.doctor import table
from edge_ilseg.doctor import CHECKS, DOT_PRODUCTS, diagnose, exit_code
from edge_ilseg.doctor_check import Check, note, ok, one_line, problem
from edge_ilseg.doctor_facts import (
    LINKED,
    Disk,
    Facts,
    Probe,
    parse_cpu_flags,
    parse_quota,
    read_facts,
    read_link,
    read_packages,
    run_probe,
)

ROOT = Path(__file__).parents[1]
NOW_S = 1_795_000_000.0
"""In November 2026."""
REQUIREMENTS = (
    "numpy>=1.26",
    'onnxruntime>=1.20; extra == "onnxruntime"',
    'onnx>=1.18; extra == "export"',
    'torch>=2.9; extra == "export"',
    'tuf<8,>=7.0; extra == "update"',
    'edge-ilseg[update]; extra == "publish"',
    'securesystemslib[crypto]>=1.6; extra == "publish"',
    'edge-ilseg[export]; extra == "all"',
    'pytest>=8; extra == "dev"',
)
GOOD = Facts(
    python="3.11.7",
    bits=64,
    system="Debian 12",
    machine="x86_64",
    processor="A processor",
    cpu_flags=frozenset({"avx", "avx2", "avx512_vnni"}),
    cores=4,
    quota_cores=None,
    memory_mib=8000,
    edge_ilseg=__version__,
    metadata_version=__version__,
    links=dict.fromkeys(LINKED, "folder"),
    requirements={
        "edge-ilseg": REQUIREMENTS,
        "securesystemslib": ('cryptography>=48; extra == "crypto"', 'boto3; extra == "awskms"'),
    },
    packages={"numpy": ("2.4.6",), "onnxruntime": ("1.32.0",)},
    probes={
        "numpy": Probe("2.4.6"),
        "onnxruntime": Probe("1.32.0", {"providers": ["CPUExecutionProvider"]}),
    },
    environment={},
    filesystem_encoding="utf-8",
    output_encoding="utf-8",
    has_utf8_locale=True,
    shm_bytes=1 << 30,
    disks=(Disk("this folder", "/home/pi", 9 << 30),),
    now_s=NOW_S,
    newest_file_s=NOW_S - 86_400,
    signed_time=None,
    has_nvidia=False,
)


def examine(**changes: Any) -> dict[str, Check]:
    """The checks of `GOOD` with some facts changed, by name; the gravest of each name."""
    found: dict[str, Check] = {}
    for check in diagnose(replace(GOOD, **changes)):
        if check.name not in found or found[check.name].status == "ok":
            found[check.name] = check
    return found


def with_package(name: str, version: str, probe: Probe, **others: tuple[str, ...]) -> dict[str, Any]:
    return {
        "packages": {**GOOD.packages, name: (version,), **others},
        "probes": {**GOOD.probes, name: probe},
    }


def test_a_machine_in_order_has_no_problem_and_says_which_extras_are_left_out() -> None:
    checks = diagnose(GOOD)
    assert exit_code(checks) == 0
    assert {check.name for check in checks if check.status != "ok"} == {
        "extra export",
        "extra update",
        "extra publish",
    }
    assert examine()["extra export"].mend == "pip install 'edge-ilseg[export]'"
    assert examine()["extra publish"].found == "not installed: no tuf; no securesystemslib; no cryptography"
    assert examine()["runtime onnxruntime"].found == "1.32.0 on CPUExecutionProvider"


def test_notes_and_problems_have_a_mend_and_whatever_is_in_order_has_none() -> None:
    assert exit_code([ok("a", "b"), note("a", "b", "c")]) == 0
    assert exit_code([ok("a", "b"), problem("a", "b", "c")]) == 1
    nothing = replace(GOOD, cpu_flags=frozenset(), bits=32, packages={}, probes={}, disks=(Disk("here", "/", 0),))
    for check in diagnose(nothing):
        assert (check.mend is None) == (check.status == "ok"), check
        assert check.mend != ""


def test_what_is_not_known_is_no_problem() -> None:
    unknown = {"cpu_flags", "quota_cores", "memory_mib", "processor", "system", "machine", "shm_bytes"}
    unknown |= {"newest_file_s", "has_utf8_locale"}
    assert exit_code(diagnose(replace(GOOD, **dict.fromkeys(unknown)))) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "name", "status", "text"),
    [
        ({"bits": 32}, "python", "problem", "32 bits"),
        ({"quota_cores": 1.5}, "processor", "ok", "may use 1.5"),
        ({"memory_mib": 500}, "memory", "note", "500 MiB"),
        ({"cpu_flags": frozenset({"sse2"})}, "int8", "note", "no AVX:"),
        ({"cpu_flags": frozenset({"avx"})}, "int8", "note", "no AVX2"),
        ({"cpu_flags": frozenset({"avx", "avx2"})}, "int8", "note", "without VNNI"),
        ({"cpu_flags": frozenset({"asimd"}), "machine": "aarch64"}, "int8", "note", "no asimddp"),
        ({"cpu_flags": frozenset({"asimddp"}), "machine": "aarch64"}, "int8", "ok", "asimddp"),
        ({"links": {**GOOD.links, "export": "file"}}, "source tree", "problem", "edge_ilseg/export is a file"),
        ({"links": {**GOOD.links, "devices": "missing"}}, "source tree", "problem", "edge_ilseg/devices is missing"),
        ({"metadata_version": None}, "edge-ilseg", "note", "not installed"),
        ({"metadata_version": "0.0.1"}, "edge-ilseg", "problem", "pip has installed 0.0.1"),
        ({"environment": {"OMP_NUM_THREADS": "none"}}, "threads", "note", "OMP_NUM_THREADS=none"),
        ({"environment": {"OMP_NUM_THREADS": "0"}}, "threads", "note", "no number"),
        ({"environment": {"OMP_NUM_THREADS": "8,2"}}, "threads", "note", "more than the 4 cores"),
        ({"environment": {"OMP_NUM_THREADS": "1"}}, "threads", "note", "one of 4 cores"),
        ({"environment": {"OMP_NUM_THREADS": "4"}}, "threads", "ok", "OMP_NUM_THREADS=4"),
        ({"quota_cores": 1.5}, "threads", "note", "4 threads where 1.5 cores"),
        ({"filesystem_encoding": "ascii"}, "text", "note", "files ascii"),
        ({"output_encoding": "ANSI_X3.4-1968"}, "text", "note", "output ANSI_X3.4-1968"),
        ({"output_encoding": "UTF_8"}, "text", "ok", "UTF_8"),
        ({"shm_bytes": 64 << 20}, "shared memory", "note", "64 MiB"),
        ({"disks": (Disk("here", "/", 100 << 20),)}, "disk", "problem", "0.1 GiB free"),
        ({"disks": (Disk("here", "/", 1 << 30),)}, "disk", "note", "1.0 GiB free"),
        ({"now_s": 100.0}, "clock", "problem", "1970-01-01"),
        ({"now_s": NOW_S - 9 * 86_400}, "clock", "problem", "this installation was made"),
        ({"signed_time": "2026-12-24T00:00:00+00:00"}, "clock", "problem", "the publisher signed"),
        ({"signed_time": "not a time"}, "clock", "ok", "2026"),
        ({"now_s": NOW_S + 14 * 365 * 86_400}, "clock", "note", "ahead"),
    ],
)
def test_a_trap_of_the_machine_is_found(changes: dict[str, Any], name: str, status: str, text: str) -> None:
    check = examine(**changes)[name]
    assert check.status == status
    assert text in check.found


def test_the_locale_that_a_mend_names_is_there() -> None:
    assert examine(output_encoding="ascii")["text"].mend == "export LC_ALL=C.UTF-8"
    assert "PYTHONUTF8=1" in str(examine(output_encoding="ascii", has_utf8_locale=False)["text"].mend)


def test_no_runtime_is_a_problem_on_a_device_and_none_for_a_publisher() -> None:
    bare = {"numpy": ("2.4.6",)}
    publisher = {**bare, "tuf": ("7.0.1",), "securesystemslib": ("1.6.0",), "cryptography": ("50.0",)}
    assert examine(packages=bare)["runtimes"].status == "problem"
    assert examine(packages=publisher)["runtimes"].status == "note"
    del publisher["cryptography"]
    assert examine(packages=publisher)["runtimes"].status == "problem"
    assert "onnxruntime-gpu" in examine(packages={**bare, "onnxruntime-gpu": ("1.32.0",)})["runtimes"].found


def test_an_extra_is_there_left_out_or_too_old() -> None:
    newer = {**GOOD.packages, "torch": ("2.13.0+cpu",), "onnx": ("1.23",)}
    assert examine(packages=newer)["extra export"].status == "ok"
    assert examine(packages={**newer, "onnx": ("1.14.0",)})["extra export"] == problem(
        "extra export", "onnx 1.14.0 is not >=1.18", "pip install 'edge-ilseg[export]'"
    )
    assert "extra dev" not in examine()
    assert "a; b or c" in examine(requirements={"edge-ilseg": ("a; b or c",)})["extras"].found


def test_torchvision_of_another_torch_is_named_with_its_mend() -> None:
    error = "RuntimeError: operator torchvision::nms does not exist"
    torch = {"torch": ("2.13.0+cpu",)}
    check = examine(**with_package("torchvision", "0.28.0+cu130", Probe(error=error), **torch))["torchvision"]
    assert check.status == "problem"
    assert "0.28.0+cu130 beside torch 2.13.0+cpu: built for another torch" in check.found
    assert "pip uninstall -y torchvision" in str(check.mend)
    assert examine(**with_package("torchvision", "0.28.0", Probe("0.28.0"), **torch))["torchvision"].status == "ok"


def test_an_onnx_that_does_not_know_what_an_export_writes_is_a_problem() -> None:
    from edge_ilseg.doctor_packages import EXPORT_OPSET
    from edge_ilseg.export.float_onnx import OPSET

    assert EXPORT_OPSET == OPSET
    for opset, status in ((OPSET - 1, "problem"), (OPSET, "ok")):
        assert examine(**with_package("onnx", "1.23", Probe("1.23", {"opset": opset})))["onnx"].status == status


def test_the_instructions_for_dot_products_are_those_of_the_profiles() -> None:
    from edge_ilseg.devices.device_profile import DOT_PRODUCT_FLAGS

    assert DOT_PRODUCTS == DOT_PRODUCT_FLAGS


def test_two_numpys_are_found() -> None:
    twice = {**GOOD.packages, "numpy": ("2.4.6", "1.26.4")}
    assert "2.4.6 and 1.26.4 are both on the path" in examine(packages=twice)["numpy"].found
    other = {**GOOD.probes, "numpy": Probe("1.26.4")}
    assert "1.26.4 is what is imported" in examine(probes=other)["numpy"].found


def test_a_package_that_was_built_for_another_numpy_is_found() -> None:
    said = "A module that was compiled using NumPy 1.x cannot be run in NumPy 2.4.6 as it may crash."
    built = with_package("onnxruntime", "1.18.0", Probe(error="ImportError: no", said=said))
    assert "onnxruntime: built for another major version of numpy than 2.4.6" in examine(**built)["numpy"].found
    assert "numpy<2" in str(examine(**built)["numpy"].mend)
    deaf = Probe("2.9", {"numpy_error": "Numpy is not available"})
    assert "torch: built for another" in examine(**with_package("torch", "2.9", deaf))["numpy"].found


@pytest.mark.parametrize(
    ("error", "mend"),
    [
        ("the process was killed by SIGILL", "instructions that the processor lacks"),
        ("no answer within 120 s", "try it by hand"),
        ("ImportError: libgomp.so.1: cannot open shared object file", "a library of the system"),
        ("ImportError: something else", "pip install --force-reinstall onnxruntime"),
    ],
)
def test_a_runtime_that_cannot_be_imported_gets_the_mend_of_its_error(error: str, mend: str) -> None:
    check = examine(**with_package("onnxruntime", "1.32.0", Probe(error=error)))["runtime onnxruntime"]
    assert (check.status, error in check.found) == ("problem", True)
    assert mend in str(check.mend)


def test_a_gpu_that_nobody_uses_is_told() -> None:
    for built_for, text in ((None, "without CUDA"), ("13.0", "does not see it")):
        torch = with_package("torch", "2.13.0", Probe("2.13.0", {"built_for": built_for, "gpus": []}))
        assert text in examine(**torch, has_nvidia=True)["gpu"].found
        assert "gpu" not in examine(**torch)
    seen = with_package("torch", "2.13.0", Probe("2.13.0", {"built_for": "13.0", "gpus": ["A GPU, 80000 MiB"]}))
    assert "gpu" not in examine(**seen, has_nvidia=True)
    assert examine(**seen)["torch"].found == "2.13.0, trains on A GPU, 80000 MiB"


def test_twins_and_telemetry_are_told() -> None:
    assert examine(**with_package("onnxruntime-gpu", "1.32", Probe()))["onnxruntime"].status == "problem"
    assert examine(**with_package("openvino-telemetry", "1", Probe()))["telemetry"].status == "note"


def test_what_a_package_says_cannot_move_the_cursor_or_fill_the_screen() -> None:
    assert one_line("a\x1b[2Jb\n\nc\u202ed") == "a [2Jb c d"
    assert len(one_line("x" * 10_000)) < 500


def test_the_table_wraps_into_its_columns() -> None:
    lines = table([ok("python", "3.11"), note("int8", "word " * 30, "do " * 40)], width=60)
    assert lines[0].endswith("python  3.11")
    assert all(line.startswith(" " * 17) for line in lines[2:])
    assert sum("do: " in line for line in lines) == 1


def test_facts_are_read_from_what_the_kernel_gives(tmp_path: Path) -> None:
    assert parse_cpu_flags("flags : avx avx2\nflags : avx fma\n") == frozenset({"avx"})
    assert parse_cpu_flags("nothing") is None
    assert (parse_quota("150000 100000\n"), parse_quota("max 100000\n")) == (1.5, None)
    (tmp_path / "broken").symlink_to("nowhere")
    (tmp_path / "file").write_text("../export")
    (tmp_path / "folder").mkdir()
    states = [read_link(tmp_path / name) for name in ("broken", "file", "folder", "none")]
    assert states == ["broken link", "file", "folder", "missing"]


def test_a_package_that_is_there_twice_has_two_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("1.26.4", "2.0.0"):
        info = tmp_path / version / "nmpy.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: nmpy\nVersion: {version}\n")
        monkeypatch.syspath_prepend(str(tmp_path / version))
    assert read_packages(["nmpy", "no-such-package"]) == {"nmpy": ("2.0.0", "1.26.4")}


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "killed by SIGILL"),
        ("import time; time.sleep(60)", "no answer within 3 s"),
        ("import os; os._exit(7)", "ended with 7"),
        ("raise RuntimeError('operator torchvision::nms does not exist')", "operator torchvision::nms does not exist"),
        ("import sys; sys.stdout.write('noise')\nraise SystemExit(3)", "ended with 3"),
    ],
)
def test_a_package_that_kills_whoever_imports_it_cannot_kill_the_doctor(
    code: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torchvision.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert error in str(run_probe("torchvision", 3).error)


def test_a_file_that_lies_near_is_not_taken_for_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(ROOT / "edge_ilseg/doctor_probe.py", tmp_path)
    (tmp_path / "PIL.py").write_text("raise RuntimeError('the wrong file')")
    monkeypatch.chdir(tmp_path)  # beside the program, and in the folder that a user is in
    monkeypatch.setattr(doctor_facts, "PACKAGE", tmp_path)
    assert run_probe("PIL", 60).error is None


@pytest.fixture(scope="module")
def here() -> Facts:
    return read_facts()


def test_this_machine_is_examined_and_torch_is_not_imported_here(here: Facts) -> None:
    checks = {check.name: check for check in diagnose(here)}
    assert checks["source tree"].status == "ok"
    assert checks["torch"].found.startswith(here.packages["torch"][0])
    assert checks["onnx"].status == "ok"
    assert {"runtime onnxruntime", "runtime openvino", "base packages", "clock", "disk"} <= set(checks)
    assert here.requirements["securesystemslib"]
    assert len(CHECKS) == len(set(CHECKS))


COMMAND = """
import sys
for name in {blocked!r}: sys.modules[name] = None
import edge_ilseg.doctor_facts as facts
facts.run_probes = lambda names: {{}}
from edge_ilseg.cli import run
code = run(sys.argv[1:])
assert not {{"torch", "numpy", "onnx", "openvino", "onnxruntime"}} & {{name for name, m in sys.modules.items() if m}}
sys.exit(code)
"""


def doctor(cwd: Path, *arguments: str, blocked: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, without the probes."""
    command = [sys.executable, "-c", COMMAND.format(blocked=blocked), "doctor", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=120)


def test_the_command_runs_where_numpy_msgspec_and_rich_are_broken() -> None:
    done = doctor(ROOT, "--json", blocked=("numpy", "msgspec", "rich", "PIL", "torch", "jinja2"))
    assert done.returncode in (0, 1), done.stderr
    report = json.loads(done.stdout)
    assert (report["format"], report["format_version"]) == ("edge-ilseg-doctor", 1)
    assert report["exit_code"] == done.returncode
    assert {"name", "status", "found", "mend"} == set(report["checks"][0])


def test_the_command_runs_in_a_source_tree_that_lost_its_links(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "edge_ilseg", tmp_path / "edge_ilseg", symlinks=True)
    for name in LINKED:
        (tmp_path / "edge_ilseg" / name).unlink()
        (tmp_path / "edge_ilseg" / name).write_text(f"../{name}")
    done = doctor(tmp_path, "--quiet")
    assert done.returncode == 1, done.stderr
    assert "edge_ilseg/calibration is a file" in done.stdout
    assert "do: unpack with links" in done.stdout
    assert not any(line.startswith("ok ") for line in done.stdout.splitlines())
