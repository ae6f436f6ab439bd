"""A device profile against a machine, proposed for one, and put to use in a verification."""

from __future__ import annotations

import json
import platform
import shutil
import sys
from pathlib import Path

import msgspec
import pytest
from bundles import BASE, HEIGHT_PX, WIDTH_PX, write_bundle, write_color_folder, write_family

from edge_ilseg.bundle import Precision, Runtime, read_manifest, write_manifest
from edge_ilseg.cli import run
from edge_ilseg.data.folder import Folder
from edge_ilseg.devices.device_profile import (
    check_profile_fits,
    misfits,
    profile_names,
    propose_profile,
    read_profile,
)
from edge_ilseg.devices.facts import DeviceFacts, read_device_facts
from edge_ilseg.devices.limits import Limits, OwnLimits
from edge_ilseg.devices.profile_request import Measurable, fill_request
from edge_ilseg.devices.verification import VerifyRequest, verify_bundle
from edge_ilseg.errors import ConfigError

AVX2 = ("avx2", "fma")
VNNI = ("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_vnni")
A72, A76 = ("asimd",), ("asimd", "asimdhp", "asimddp")
EVERYTHING = Measurable(has_labels=True, has_parent=True, has_unlabelled=True)
MODELS: tuple[tuple[Runtime, Precision], ...] = (
    ("onnxruntime", "fp32"),
    ("onnxruntime", "int8"),
    ("openvino", "fp32"),
)


def facts_of(
    machine: str | None, flags: tuple[str, ...] | None, processor: str | None = None, **missing: str
) -> DeviceFacts:
    """A machine of which only this is known."""
    return DeviceFacts(
        machine=machine,
        processor=processor,
        int8_flags=flags,
        cores=4,
        governor=None,
        memory_mib=None,
        load_average=None,
        system=None,
        python="3.11.0",
        edge_ilseg="0",
        versions={},
        missing=missing,
    )


# Does a profile fit a machine?


@pytest.mark.parametrize("name", profile_names())
def test_a_machine_with_the_flags_of_a_profile_fits_and_without_one_the_flag_is_named(name: str) -> None:
    profile = read_profile(name)
    flags = profile.int8_flags
    assert misfits(profile, facts_of(profile.machine, flags)) == ()
    check_profile_fits(name, profile, facts_of(profile.machine, (*flags, "sve2", "amx_int8")))  # more does no harm
    for flag in flags:
        others = tuple(item for item in flags if item != flag)
        assert misfits(profile, facts_of(profile.machine, others)) == (f"no {flag}",)
        with pytest.raises(ConfigError, match=rf"does not fit this machine\n.*no {flag}\n"):
            check_profile_fits(name, profile, facts_of(profile.machine, others))


def test_a_processor_without_dot_products_is_told_every_flag_that_it_lacks_and_what_fits_it() -> None:
    with pytest.raises(ConfigError) as caught:
        check_profile_fits("x86-vnni", read_profile("x86-vnni"), facts_of("x86_64", AVX2))
    error = caught.value
    assert "'x86-vnni'" in error.what
    assert error.found == "no avx512f; no avx512bw; no avx512vl; no avx512_vnni"
    assert error.expected == f"x86_64 with {', '.join(VNNI)}"
    assert error.hint == "this machine fits the profile 'x86-avx2'"


def test_a_processor_of_another_kind_is_named() -> None:
    found = misfits(read_profile("raspberry-pi-5"), facts_of("x86_64", VNNI))
    assert found == ("machine x86_64, not aarch64", "no asimd", "no asimdhp", "no asimddp")


@pytest.mark.parametrize(("machine", "name"), [("AMD64", "x86-avx2"), ("arm64", "generic-arm64")])
def test_names_of_other_systems_for_the_same_machine_are_known(machine: str, name: str) -> None:
    profile = read_profile(name)
    assert misfits(profile, facts_of(machine, profile.int8_flags)) == ()


def test_what_is_not_known_of_a_machine_is_missing_and_nothing_is_proposed() -> None:
    silent = facts_of(None, None, int8_flags="OSError: no such file")
    assert misfits(read_profile("x86-avx2"), silent) == (
        "machine unknown, not x86_64",
        "processor flags are not known: OSError: no such file",
    )
    with pytest.raises(ConfigError, match="write a profile"):
        check_profile_fits("x86-avx2", read_profile("x86-avx2"), silent)
    assert propose_profile(silent) is None


# Which one fits best?


@pytest.mark.parametrize(
    ("machine", "flags", "processor", "expected"),
    [
        ("x86_64", AVX2, "Intel(R) Core(TM) i5-6500 CPU @ 3.20GHz", "x86-avx2"),
        ("x86_64", (*AVX2, "avx512f", "avx512bw", "avx512vl"), "Intel(R) Xeon(R) Gold 6148", "x86-avx2"),
        ("x86_64", VNNI, "Intel(R) Xeon(R) Platinum 8358", "x86-vnni"),
        ("x86_64", (*VNNI, "avx512_bf16", "amx_tile", "amx_int8"), None, "x86-vnni"),
        ("AMD64", VNNI, "AMD EPYC 9354", "x86-vnni"),
        ("x86_64", (*AVX2, "avx_vnni"), "Intel(R) N100", "intel-n100"),
        ("x86_64", (*AVX2, "avx_vnni"), "12th Gen Intel(R) Core(TM) i7-1260P", "x86-avx2"),
        ("x86_64", (), "Intel(R) Celeron(R) J4125", None),
        ("aarch64", A72, "Raspberry Pi 4 Model B Rev 1.4", "raspberry-pi-4"),
        ("aarch64", A72, "Raspberry Pi 4 Model B Rev 1.5", "raspberry-pi-4"),
        ("aarch64", A76, "Raspberry Pi 5 Model B Rev 1.0", "raspberry-pi-5"),
        ("aarch64", A76, "Raspberry Pi Compute Module 5 Rev 1.0", "raspberry-pi-5"),
        ("aarch64", A76, "NVIDIA Jetson Orin Nano Developer Kit", "jetson-orin-nano"),
        ("aarch64", A76, "NVIDIA Orin Nano Developer Kit", "jetson-orin-nano"),
        ("aarch64", A76, "NVIDIA Jetson AGX Orin", "generic-arm64"),
        ("aarch64", A76, None, "generic-arm64"),
        ("arm64", (*A76, "i8mm"), "Apple M2", "generic-arm64"),
        ("aarch64", A72, "Raspberry Pi 3 Model B Rev 1.2", "generic-arm64"),
        ("armv7l", ("neon",), "Raspberry Pi 4 Model B Rev 1.4", None),
        ("riscv64", (), None, None),
    ],
)
def test_the_profile_that_says_most_of_a_machine_is_proposed(
    machine: str, flags: tuple[str, ...], processor: str | None, expected: str | None
) -> None:
    facts = facts_of(machine, flags, processor)
    assert propose_profile(facts) == expected
    if expected is not None:
        check_profile_fits(expected, read_profile(expected), facts)


def test_the_revision_of_a_board_is_not_taken_for_its_model() -> None:
    facts = facts_of("aarch64", A72, "Raspberry Pi 3 Model B Plus Rev 1.4")
    assert propose_profile(facts) == "generic-arm64"


PI_4 = """processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41

{hardware}Revision\t: c03114
Model\t\t: Raspberry Pi 4 Model B Rev 1.4
"""


@pytest.mark.parametrize(
    "hardware",
    [
        "",
        "Hardware\t: BCM2835\n",
    ],
)
def test_a_raspberry_pi_is_known_by_what_its_kernel_writes(
    hardware: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    (tmp_path / "cpuinfo").write_text(PI_4.format(hardware=hardware))
    facts = read_device_facts(proc=tmp_path, sysfs=tmp_path)
    assert facts.int8_flags == ("asimd",)
    assert propose_profile(facts) == "raspberry-pi-4"


# What a profile makes of a verification


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "b"
    write_bundle(folder, BASE, step_id="a", models=MODELS)
    return folder


def own_profile(folder: Path, *lines: str, limits: Limits | None = None) -> str:
    """A profile that fits this machine, whatever it is."""
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    text = [f'description = "mine"\nmachine = "{machine}"\nint8_flags = []', *lines]
    if limits is not None:
        text.append("[limits]")
        text += [f"{name} = {value}" for name, value in msgspec.structs.asdict(limits).items() if value]
    path = folder / "mine.toml"
    path.write_text("\n".join(text) + "\n")
    return str(path)


ALL_LIMITS = Limits(
    min_golden_agreement=0.9,
    max_old_miou_drop_pct=3.0,
    max_class_drop_pct=9.0,
    min_new_miou_pct=40.0,
    min_agreement_pct=80.0,
    min_class_agreement_pct=20.0,
    max_moved_pct=7.0,
    max_latency_p95_ms=90.0,
    max_rss_mib=500.0,
    max_model_mib=8.0,
    max_bad_images=2,
)


def test_without_a_profile_the_limits_are_those_that_were_given(bundle: Path) -> None:
    given = {"max_old_miou_drop_pct": 0.0, "max_class_drop_pct": None, "max_bad_images": 3, "max_rss_mib": None}
    request = VerifyRequest(runtime="openvino", threads=2, split="val", latency_runs=7)
    found = fill_request(request, None, given, bundle, measurable=EVERYTHING)
    assert found == msgspec.structs.replace(request, limits=Limits(max_old_miou_drop_pct=0.0, max_bad_images=3))


def test_every_limit_of_a_profile_is_taken(bundle: Path, tmp_path: Path) -> None:
    name = own_profile(tmp_path, limits=ALL_LIMITS)
    found = fill_request(VerifyRequest(), name, {}, bundle, measurable=EVERYTHING)
    assert found.limits == ALL_LIMITS


def test_what_the_user_gave_goes_before_the_profile_and_nought_is_given(bundle: Path, tmp_path: Path) -> None:
    name = own_profile(tmp_path, limits=ALL_LIMITS)
    given = {"max_old_miou_drop_pct": 0.0, "max_rss_mib": 900.0, "max_bad_images": 0, "max_class_drop_pct": None}
    found = fill_request(VerifyRequest(), name, given, bundle, measurable=EVERYTHING)
    expected = msgspec.structs.replace(ALL_LIMITS, max_old_miou_drop_pct=0.0, max_rss_mib=900.0, max_bad_images=0)
    assert found.limits == expected


NEEDS = {
    "max_old_miou_drop_pct": {"has_labels", "has_parent"},
    "max_class_drop_pct": {"has_labels", "has_parent"},
    "min_new_miou_pct": {"has_labels"},
    "min_agreement_pct": {"has_unlabelled", "has_parent"},
    "min_class_agreement_pct": {"has_unlabelled", "has_parent"},
    "max_moved_pct": {"has_unlabelled", "has_parent"},
}


@pytest.mark.parametrize("has_labels", [False, True])
@pytest.mark.parametrize("has_parent", [False, True])
@pytest.mark.parametrize("has_unlabelled", [False, True])
def test_a_limit_of_a_profile_that_cannot_be_measured_is_left_out_and_the_rest_can_be_verified(
    has_labels: bool, has_parent: bool, has_unlabelled: bool, tmp_path: Path
) -> None:
    child, parent = write_family(tmp_path)
    measurable = Measurable(has_labels, has_parent, has_unlabelled)
    has = {name for name, value in measurable._asdict().items() if value}
    name = own_profile(tmp_path, limits=ALL_LIMITS)
    found = fill_request(VerifyRequest(latency_runs=1), name, {}, child, measurable=measurable)
    for limit, value in msgspec.structs.asdict(ALL_LIMITS).items():
        assert getattr(found.limits, limit) == (value if NEEDS.get(limit, set()) <= has else None)
    data = write_color_folder(tmp_path / "data")
    report = verify_bundle(  # nothing that is left is refused
        child,
        found,
        dataset=Folder(data) if has_labels else None,
        against=parent if has_parent else None,
        unlabelled=data / "images" if has_unlabelled else None,
    )
    assert report.check("integrity").verdict == "passed"


@pytest.mark.parametrize("limit", NEEDS)
def test_a_limit_that_the_user_gave_stays_and_is_refused_where_it_cannot_be_measured(
    limit: str, bundle: Path, tmp_path: Path
) -> None:
    name = own_profile(tmp_path, limits=ALL_LIMITS)
    nothing = Measurable(has_labels=False, has_parent=False, has_unlabelled=False)
    found = fill_request(VerifyRequest(), name, {limit: 5.0}, bundle, measurable=nothing)
    assert getattr(found.limits, limit) == 5.0
    with pytest.raises(ConfigError, match="needs"):
        verify_bundle(bundle, found)


def test_a_limit_of_a_profile_reaches_the_verdict(bundle: Path, tmp_path: Path) -> None:
    name = own_profile(tmp_path, limits=Limits(max_model_mib=1e-6, max_rss_mib=4096.0))
    nothing = Measurable(has_labels=False, has_parent=False, has_unlabelled=False)
    request = fill_request(VerifyRequest(latency_runs=1), name, {}, bundle, measurable=nothing)
    report = verify_bundle(bundle, request)
    assert report.exit_code == 1
    size, memory = report.check("model size"), report.check("peak memory")
    assert (size.verdict, size.limit) == ("failed", 1e-6)
    assert (memory.verdict, memory.limit) == ("passed", 4096.0)
    assert report.limits.max_model_mib == 1e-6


# What a bundle says of itself


@pytest.fixture
def strict(bundle: Path, tmp_path: Path) -> Path:
    """The bundle, which wants this of itself."""
    folder = tmp_path / "strict"
    shutil.copytree(bundle, folder)
    own = OwnLimits(max_old_miou_drop_pct=1.0, min_new_miou_pct=50.0, max_model_mib=9.0, max_bad_images=3)
    write_manifest(folder, msgspec.structs.replace(read_manifest(folder), limits=own))
    return folder


def test_a_bundles_limits_hold_without_a_profile_as_far_as_they_can_be_measured(strict: Path) -> None:
    found = fill_request(VerifyRequest(), None, {}, strict, measurable=EVERYTHING)
    assert found.limits == Limits(max_old_miou_drop_pct=1.0, min_new_miou_pct=50.0, max_model_mib=9.0)
    nothing = Measurable(has_labels=False, has_parent=True, has_unlabelled=True)
    found = fill_request(VerifyRequest(), None, {}, strict, measurable=nothing)
    assert found.limits == Limits(max_model_mib=9.0)


@pytest.mark.parametrize("has_profile", [False, True])
def test_a_bundle_never_loosens_what_it_is_judged_by(has_profile: bool, bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "easy"
    shutil.copytree(bundle, folder)
    easy = OwnLimits(
        min_golden_agreement=0.0,
        max_old_miou_drop_pct=100.0,
        min_agreement_pct=0.0,
        max_moved_pct=100.0,
        max_bad_images=1000,
        min_images=1,
    )
    write_manifest(folder, msgspec.structs.replace(read_manifest(folder), limits=easy))
    name = own_profile(tmp_path, "[limits]", "max_bad_images = 0", "min_images = 20") if has_profile else None
    assert fill_request(VerifyRequest(), name, {}, folder, measurable=EVERYTHING).limits == Limits()
    hard = OwnLimits(min_golden_agreement=0.995, min_agreement_pct=70.0, max_moved_pct=5.0, min_images=21)
    write_manifest(folder, msgspec.structs.replace(read_manifest(folder), limits=hard))
    request = VerifyRequest(runtime="onnxruntime")
    held = fill_request(msgspec.structs.replace(request, precision="int8"), name, {}, folder, measurable=EVERYTHING)
    assert held.limits == Limits(min_golden_agreement=0.995, min_agreement_pct=70.0, max_moved_pct=5.0, min_images=21)
    fp32 = fill_request(msgspec.structs.replace(request, precision="fp32"), name, {}, folder, measurable=EVERYTHING)
    assert fp32.limits.min_golden_agreement is None  # 0.999 holds without it


def test_of_a_bundles_limit_and_a_profiles_the_stricter_holds_and_the_users_goes_before_both(
    strict: Path, tmp_path: Path
) -> None:
    name = own_profile(tmp_path, limits=ALL_LIMITS)
    found = fill_request(VerifyRequest(), name, {}, strict, measurable=EVERYTHING)
    changed = {"max_old_miou_drop_pct": 1.0, "min_new_miou_pct": 50.0}
    assert found.limits == msgspec.structs.replace(ALL_LIMITS, **changed)
    given = {"max_old_miou_drop_pct": 4.0, "min_new_miou_pct": 10.0, "max_bad_images": 0}
    found = fill_request(VerifyRequest(), name, given, strict, measurable=EVERYTHING)
    assert found.limits == msgspec.structs.replace(ALL_LIMITS, **given)


def test_a_bundles_limit_reaches_the_verdict(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heavy = tmp_path / "heavy"
    shutil.copytree(bundle, heavy)
    command = ["verify", str(heavy), "--latency-runs", "1", "--json"]
    assert run(command) == 0
    write_manifest(heavy, msgspec.structs.replace(read_manifest(heavy), limits=OwnLimits(max_model_mib=1e-6)))
    capsys.readouterr()
    assert run(command) == 1
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert (checks["model size"]["verdict"], checks["model size"]["limit"]) == ("failed", 1e-6)
    assert run([*command, "--max-model-mib", "5"]) == 0


def test_threads_are_the_profiles_unless_the_user_gave_some(bundle: Path, tmp_path: Path) -> None:
    name = own_profile(tmp_path, "threads = 3")
    for threads, expected in ((None, 3), (1, 1)):
        found = fill_request(VerifyRequest(threads=threads), name, {}, bundle, measurable=EVERYTHING)
        assert found.threads == expected


@pytest.mark.parametrize(
    ("size", "fits"),
    [
        ((WIDTH_PX, HEIGHT_PX), True),
        ((WIDTH_PX - 1, HEIGHT_PX), False),
        ((WIDTH_PX, HEIGHT_PX - 1), False),
        ((HEIGHT_PX, WIDTH_PX), False),  # width first
        ((1000, 1000), True),
    ],
)
def test_an_input_that_is_larger_than_the_profile_allows_does_not_fit(
    size: tuple[int, int], fits: bool, bundle: Path, tmp_path: Path
) -> None:
    name = own_profile(tmp_path, f"[input_size]\nwidth_px = {size[0]}\nheight_px = {size[1]}")
    found = fill_request(VerifyRequest(), name, {}, bundle, measurable=EVERYTHING)
    assert (found.misfit is None) == fits
    if found.misfit is None:
        return
    assert "input is larger than the device profile" in found.misfit.what
    assert found.misfit.found == f"{WIDTH_PX} x {HEIGHT_PX} px"
    assert found.misfit.expected == f"at most {size[0]} x {size[1]} px"


@pytest.mark.parametrize(
    ("runtimes", "precisions", "expected"),
    [
        (["onnxruntime", "openvino"], ["int8", "fp32"], ("onnxruntime", "int8")),
        (["onnxruntime", "openvino"], ["fp32", "int8"], ("onnxruntime", "fp32")),
        (["openvino", "onnxruntime"], ["int8", "fp32"], ("openvino", "fp32")),  # the runtime counts for more
        (["openvino", "onnxruntime"], ["int8"], ("onnxruntime", "int8")),
        (["openvino"], ["fp16", "fp32"], ("openvino", "fp32")),
    ],
)
def test_the_first_runtime_of_the_profile_and_then_its_first_precision_is_taken(
    runtimes: list[str], precisions: list[str], expected: tuple[str, str], bundle: Path, tmp_path: Path
) -> None:
    name = own_profile(tmp_path, f"runtimes = {runtimes}", f"precisions = {precisions}")
    found = fill_request(VerifyRequest(), name, {}, bundle, measurable=EVERYTHING)
    assert (found.runtime, found.precision) == expected


def test_what_the_user_chose_of_runtime_and_precision_goes_before_the_profile(bundle: Path, tmp_path: Path) -> None:
    name = own_profile(tmp_path, 'runtimes = ["onnxruntime"]', 'precisions = ["int8", "fp32"]')
    for request, expected in (
        (VerifyRequest(runtime="openvino"), ("openvino", "fp32")),
        (VerifyRequest(precision="fp32"), ("onnxruntime", "fp32")),
        (VerifyRequest(runtime="openvino", precision="fp32"), ("openvino", "fp32")),
    ):
        found = fill_request(request, name, {}, bundle, measurable=EVERYTHING)
        assert (found.runtime, found.precision) == expected


def test_a_runtime_that_is_not_installed_is_passed_over_unless_the_user_names_it(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    name = own_profile(tmp_path, 'runtimes = ["openvino", "onnxruntime"]')
    found = fill_request(VerifyRequest(), name, {}, bundle, measurable=EVERYTHING)
    assert found.runtime == "onnxruntime"
    asked = fill_request(VerifyRequest(runtime="openvino"), name, {}, bundle, measurable=EVERYTHING)
    assert asked.runtime == "openvino"
    report = verify_bundle(bundle, msgspec.structs.replace(asked, limits=Limits()))
    assert "pip install 'edge-ilseg[openvino]'" in report.check("fit").detail


def test_a_bundle_without_a_model_for_the_profile_does_not_fit_and_is_told_what_it_has(
    bundle: Path, tmp_path: Path
) -> None:
    name = own_profile(tmp_path, 'runtimes = ["openvino"]', 'precisions = ["int8", "fp16"]')
    misfit = fill_request(VerifyRequest(), name, {}, bundle, measurable=EVERYTHING).misfit
    assert misfit is not None
    assert "has no model that the device profile" in misfit.what
    assert "models onnxruntime/fp32, onnxruntime/int8, openvino/fp32" in str(misfit.found)
    assert misfit.expected == "one of openvino in one of int8, fp16"


@pytest.mark.parametrize(
    "line", ["[input_size]\nwidth_px = 1\nheight_px = 1", 'runtimes = ["openvino"]\nprecisions = ["int8"]']
)
def test_a_bundle_that_is_none_for_the_profile_has_a_report_that_says_so(
    line: str, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Integrity comes first, and everything after `fit` was not run."""
    out = tmp_path / "report.json"
    words = ["verify", str(bundle), "--profile", own_profile(tmp_path, line), "--out", str(out), "--json"]
    assert run(words) == 3
    report = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == report
    verdicts = {check["name"]: check["verdict"] for check in report["checks"]}
    assert (verdicts.pop("integrity"), verdicts.pop("fit"), set(verdicts.values())) == (
        "passed",
        "failed",
        {"not checked"},
    )
    detail = next(check["detail"] for check in report["checks"] if check["name"] == "fit")
    assert "device profile" in detail
    assert "mine.toml" in detail


def test_a_bundle_that_cannot_be_read_is_left_to_the_verification(tmp_path: Path) -> None:
    name = own_profile(tmp_path, "threads = 2", limits=Limits(max_rss_mib=500.0))
    found = fill_request(VerifyRequest(), name, {}, tmp_path / "nowhere", measurable=EVERYTHING)
    assert (found.runtime, found.threads, found.limits) == (None, 2, Limits(max_rss_mib=500.0))
    report = verify_bundle(tmp_path / "nowhere", found)
    assert (report.exit_code, report.check("integrity").verdict) == (3, "failed")


def test_a_profile_that_does_not_fit_this_machine_is_refused(bundle: Path) -> None:
    foreign = "x86-vnni" if platform.machine() in ("aarch64", "arm64") else "raspberry-pi-5"
    with pytest.raises(ConfigError, match="does not fit this machine"):
        fill_request(VerifyRequest(), foreign, {}, bundle, measurable=EVERYTHING)


def test_a_profile_that_is_not_there_is_refused(bundle: Path) -> None:
    with pytest.raises(ConfigError, match="no such device profile"):
        fill_request(VerifyRequest(), "raspberry-pi-6", {}, bundle, measurable=EVERYTHING)


@pytest.mark.parametrize(
    "line", ["threads = 0", "threads = -1", "[input_size]\nwidth_px = 0\nheight_px = 10", "runtimes = []"]
)
def test_numbers_of_a_profile_that_cannot_be_are_refused(line: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be used"):
        read_profile(own_profile(tmp_path, line))
