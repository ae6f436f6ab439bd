"""`edge-ilseg device`, and what `edge-ilseg verify` can be asked on a device: images, a profile, limits, few images."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from bundles import BASE, ENOUGH, GROWN, color_images, nearest_color, write_color_folder, write_family
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from PIL import Image

from edge_ilseg.cli import run
from edge_ilseg.cli.device import device
from edge_ilseg.cli.verify import verify
from edge_ilseg.devices import facts as facts_module
from edge_ilseg.devices.device_profile import misfits, profile_names, propose_profile, read_profile
from edge_ilseg.devices.facts import DeviceFacts, read_device_facts
from edge_ilseg.devices.verify_report import VerifyReport, parse_report
from edge_ilseg.errors import ConfigError

ROOT = Path(__file__).parents[1]
GREEN_AND_BLUE = (0, 120, 130)
"""Grass to the parent, a boat to the bundle: what was grass is forgotten where an image shows it in this colour."""
FOREIGN = "x86-vnni" if platform.machine() in ("aarch64", "arm64") else "raspberry-pi-5"
"""A profile that cannot fit this machine."""


def ask_facts(*arguments: str) -> Result:
    return CliRunner().invoke(device, ["facts", *arguments])


def pretend(monkeypatch: pytest.MonkeyPatch, **changes: object) -> DeviceFacts:
    """The command meets a machine of which some facts are others."""
    found = msgspec.structs.replace(read_device_facts(), **changes)
    monkeypatch.setattr(facts_module, "read_device_facts", lambda: found)
    return found


def test_the_table_shows_every_fact_of_this_machine_and_the_profile_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = pretend(monkeypatch, governor="performance", memory_mib=7812, load_average=(0.25, 1.5, 3.0))
    result = ask_facts()
    assert result.exit_code == 0
    rows = dict(re.findall(r"│ (\S.*?) +│ (.*?) +│", result.stdout))
    assert rows["machine"] == facts.machine
    assert rows["processor"] == (facts.processor or "-")
    assert rows["int8 flags"] == " ".join(facts.int8_flags or ("-",))
    assert (rows["cores"], rows["governor"], rows["memory"]) == (str(facts.cores), "performance", "7812 MiB")
    assert rows["load"] == "0.25 1.50 3.00"
    assert rows["python"] == platform.python_version()
    for name, version in facts.versions.items():
        assert rows[name] == (version or "not installed")
    assert rows["profile"].startswith(propose_profile(facts) or "none of ours fits")


def test_what_is_not_known_is_a_dash_and_a_machine_that_no_profile_fits_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, machine="riscv64", processor=None, int8_flags=None, memory_mib=None, load_average=None)
    result = ask_facts()
    rows = dict(re.findall(r"│ (\S.*?) +│ (.*?) +│", result.stdout))
    assert result.exit_code == 0
    assert {rows[name] for name in ("processor", "int8 flags", "memory", "load")} == {"-"}
    assert rows["profile"].startswith("none of ours fits")
    assert json.loads(ask_facts("--json").stdout)["profile"] is None


def test_the_page_that_the_command_names_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, machine="riscv64")
    (page,) = re.findall(r"docs/\S+\.md", ask_facts().stdout)
    assert (ROOT / page).is_file()


@pytest.mark.parametrize("processor", ["Board [red]2[/red]", "Board [/x]"])
def test_a_name_that_looks_like_markup_is_shown_as_it_is(processor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, processor=processor)
    assert processor in ask_facts().stdout


def test_json_holds_the_facts_and_the_profile_and_nothing_else() -> None:
    result = ask_facts("--json")
    assert result.exit_code == 0
    content = json.loads(result.stdout)
    assert set(content) == {"facts", "profile"}
    found = msgspec.convert(content["facts"], DeviceFacts)
    now = read_device_facts()
    assert msgspec.structs.replace(found, load_average=None) == msgspec.structs.replace(now, load_average=None)
    assert content["profile"] == propose_profile(now)


def test_a_profile_that_fits_is_named_in_the_place_of_the_one_that_would_be_proposed(tmp_path: Path) -> None:
    path = write_profile(tmp_path)
    assert json.loads(ask_facts("--profile", path, "--json").stdout)["profile"] == path
    for name in profile_names():
        fits = not misfits(read_profile(name), read_device_facts())
        assert ask_facts("--profile", name).exit_code == (0 if fits else 1)


def test_a_profile_that_does_not_fit_is_an_error_that_names_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["device", "facts", "--profile", FOREIGN]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"the device profile '{FOREIGN}' does not fit this machine" in captured.err
    assert all(f"no {flag}" in captured.err for flag in read_profile(FOREIGN).int8_flags)


def test_a_profile_that_is_not_there_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["device", "facts", "--profile", "raspberry-pi5"]) == 3
    assert "did you mean 'raspberry-pi-5'" in capsys.readouterr().err


# verify


def write_profile(folder: Path, *lines: str) -> str:
    """A profile that fits this machine, whatever it is."""
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    path = folder / "mine.toml"
    path.write_text("\n".join([f'description = "mine"\nmachine = "{machine}"\nint8_flags = []', *lines]) + "\n")
    return str(path)


def verify_command(*arguments: object) -> Result:
    return CliRunner().invoke(verify, [*map(str, arguments), "--latency-runs", "1", "--threads", "1"])


def verify_json(*arguments: object) -> tuple[int, VerifyReport]:
    result = verify_command(*arguments, "--json")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, parse_report(result.stdout_bytes)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_family(tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough images of old classes; in one of four a quarter of the pixels was grass to the parent and is boat now."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, image_HWC in enumerate(color_images(ENOUGH, list(BASE), seed=21)):
        if number % 4 == 2:
            image_HWC[:12] = GREEN_AND_BLUE
        Image.fromarray(image_HWC).save(folder / f"{number:02}.png")
    return folder


def test_images_without_labels_are_compared_with_the_parent_and_are_in_the_json(
    family: tuple[Path, Path], pictures: Path
) -> None:
    child, parent = family
    code, report = verify_json(child, "--against", parent, "--images", pictures)
    assert code == 0
    found = report.unlabelled
    assert found is not None
    assert (found.folder, found.images_asked, found.images_counted) == (str(pictures), ENOUGH, ENOUGH)
    grass = {item.name: item for item in found.classes}["grass"]
    assert grass.moved == pytest.approx(ENOUGH // 4 * 12 * 64 / grass.parent_pixels)
    check = report.check("moved to new classes")
    assert (check.verdict, check.value, check.limit) == ("passed", pytest.approx(100 * (found.moved or 0.0)), 15.0)
    assert not report.is_retention_checked


def test_the_table_shows_the_comparison(family: tuple[Path, Path], pictures: Path) -> None:
    result = verify_command(family[0], "--against", family[1], "--images", pictures, "--min-agreement", 90)
    assert result.exit_code == 0
    assert re.search(r"unlabelled agreement +passed +100.00 % +90.00 +least: ", result.stdout)
    assert re.search(rf"unlabelled images +passed +0 bad +0 +{ENOUGH} of {ENOUGH} images", result.stdout)
    assert re.search(r"^grass +\d+ +100.0 +- +\d+\.\d", result.stdout, re.MULTILINE)
    assert "retention was NOT checked" in result.stdout


def test_limits_on_images_without_labels_reach_the_verdict(tmp_path: Path, pictures: Path) -> None:
    child, parent = write_family(tmp_path, forget="apple")
    asked = (child, "--against", parent, "--images", pictures)
    code, report = verify_json(*asked, "--min-agreement", 90)
    assert (code, report.check("unlabelled agreement").verdict) == (1, "failed")
    assert "least: apple 0.0 %" in report.check("unlabelled agreement").detail
    code, report = verify_json(*asked, "--max-moved", 1.5)
    assert (code, report.check("moved to new classes").verdict) == (1, "failed")
    assert (report.limits.min_agreement_pct, report.limits.max_moved_pct) == (None, 1.5)
    assert verify_json(*asked, "--max-moved", 99)[0] == 1  # the agreement has a limit without asking
    assert verify_json(*asked, "--max-moved", 99, "--min-agreement", 0)[0] == 0
    code, report = verify_json(*asked, "--max-moved", 99, "--min-agreement", 0, "--min-class-agreement", 10)
    single = report.check("class agreement")
    assert (code, single.verdict, single.value, single.limit) == (1, "failed", 0.0, 10.0)
    assert single.detail.startswith("least: apple, in ")


def test_few_of_the_images_are_taken_without_labelled_ones(family: tuple[Path, Path], pictures: Path) -> None:
    _, report = verify_json(family[0], "--against", family[1], "--images", pictures, "--limit", 2)
    assert report.unlabelled is not None
    assert report.unlabelled.images_asked == 2
    assert isinstance(verify_command(family[0], "--limit", 2).exception, ConfigError)


@pytest.mark.parametrize("option", ["--min-agreement", "--min-class-agreement", "--max-moved"])
def test_a_limit_on_images_needs_images_and_a_parent(
    option: str, family: tuple[Path, Path], pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    child, parent = map(str, family)
    for arguments in ([], ["--images", str(pictures)], ["--against", parent]):
        assert run(["verify", child, *arguments, option, "50"]) == 3
        captured = capsys.readouterr()
        assert (captured.out, "needs a folder of images and a parent" in captured.err) == ("", True)


def test_a_folder_without_images_cannot_be_used(family: tuple[Path, Path], tmp_path: Path) -> None:
    child, parent = map(str, family)
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert run(["verify", child, "--against", parent, "--images", str(folder)]) == 3


def test_labelled_images_and_others_go_together(family: tuple[Path, Path], pictures: Path, tmp_path: Path) -> None:
    data = write_color_folder(tmp_path / "data")
    child, parent = family
    code, report = verify_json(child, "--data", f"folder:{data}", "--against", parent, "--images", pictures)
    assert code == 0
    assert report.scores is not None
    assert report.unlabelled is not None
    assert report.is_retention_checked


def test_the_peak_of_memory_has_a_limit(family: tuple[Path, Path]) -> None:
    code, report = verify_json(family[1], "--max-rss-mib", 1)
    assert (code, report.check("peak memory").verdict, report.check("peak memory").limit) == (1, "failed", 1.0)
    code, report = verify_json(family[1], "--max-rss-mib", 1 << 20)
    assert (code, report.check("peak memory").verdict) == (0, "passed")
    assert report.check("peak memory").value == report.peak_rss_mib


def test_a_profile_gives_runtime_and_limits_and_an_option_goes_before_it(tmp_path: Path) -> None:
    models = (("onnxruntime", "fp32"), ("openvino", "fp32"))
    child, parent = write_family(tmp_path, models=models)
    limits = "[limits]\nmax_model_mib = 0.000001\nmax_class_drop_pct = 10\nmin_agreement_pct = 50"
    profile = write_profile(tmp_path, 'runtimes = ["openvino", "onnxruntime"]', limits)
    code, report = verify_json(child, "--profile", profile)
    assert (code, report.check("model size").verdict) == (1, "failed")
    assert report.model is not None
    assert report.model.runtime == "openvino"
    assert (report.limits.max_class_drop_pct, report.limits.min_agreement_pct) == (None, None)  # nothing to measure by
    code, report = verify_json(child, "--profile", profile, "--max-model-mib", 8, "--runtime", "onnxruntime")
    assert (code, report.check("model size").verdict, report.limits.max_model_mib) == (0, "passed", 8.0)
    assert report.model is not None
    assert report.model.runtime == "onnxruntime"
    data = write_color_folder(tmp_path / "data")
    asked = (child, "--profile", profile, "--data", f"folder:{data}", "--against", parent, "--max-model-mib", 8)
    _, report = verify_json(*asked)
    assert report.check("old class drop").limit == 10.0
    _, report = verify_json(*asked, "--max-class-drop", 0)
    assert report.check("old class drop").limit == 0.0


def test_a_profile_that_does_not_fit_ends_the_command_before_anything_runs(
    family: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["verify", str(family[0]), "--profile", FOREIGN]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"no {read_profile(FOREIGN).int8_flags[0]}" in captured.err


# Few images


def write_data(
    folder: Path,
    count: int,
    forgotten_in: Iterable[int] = (),
    change: Callable[[int, NDArray[np.uint8]], None] = lambda number, mask_HW: None,  # noqa: ARG005
) -> str:
    """A data set `folder:...` in which grass is shown to the bundle as a boat in some images alone.

    The masks call it grass all the same, and so does the parent.
    """
    for part in ("images", "masks", "splits"):
        (folder / part).mkdir(parents=True)
    forgotten = set(forgotten_in)
    for number, image_HWC in enumerate(color_images(count, list(GROWN), seed=31)):
        mask_HW = nearest_color(image_HWC, list(GROWN))
        change(number, mask_HW)
        if number in forgotten:
            image_HWC[mask_HW == list(GROWN).index("grass")] = GREEN_AND_BLUE
        Image.fromarray(image_HWC).save(folder / f"images/{number:03d}.png")
        Image.fromarray(mask_HW).save(folder / f"masks/{number:03d}.png")
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in GROWN))
    (folder / "splits/test.txt").write_text("".join(f"{number:03d}\n" for number in range(count)))
    return f"folder:{folder}"


def grass_pixels(folder: Path, numbers: Iterable[int]) -> int:
    channel = list(GROWN).index("grass")
    masks = (np.array(Image.open(folder / f"masks/{number:03d}.png")) for number in numbers)
    return sum(int((mask_HW == channel).sum()) for mask_HW in masks)


def check_drop(report: VerifyReport, name: str, verdict: str) -> dict[str, Any]:
    check = report.check(name)  # type: ignore[arg-type]
    assert check.verdict == verdict
    assert check.value is not None
    assert check.low is not None
    assert check.high is not None
    assert check.low <= check.value <= check.high
    return {"value": check.value, "low": check.low, "high": check.high, "detail": check.detail}


def test_what_12_images_cannot_tell_120_images_can(family: tuple[Path, Path], tmp_path: Path) -> None:
    """In one image of six grass is forgotten: 17 points of its IoU, and 5.6 of the mean of three classes."""
    child, parent = family
    few = write_data(tmp_path / "few", 12, range(0, 12, 6))
    many = write_data(tmp_path / "many", 120, range(0, 120, 6))
    code, report = verify_json(child, "--data", few, "--against", parent)
    assert code == report.exit_code == 4
    drop = check_drop(report, "old mIoU drop", "too few images")
    assert drop["low"] < 2.0 < drop["high"]
    lost = grass_pixels(tmp_path / "few", (0, 6)) / grass_pixels(tmp_path / "few", range(12))
    assert drop["value"] == pytest.approx(100 * lost / 3)
    assert "most forgotten: grass" in drop["detail"]
    code, report = verify_json(child, "--data", many, "--against", parent)
    assert code == 1
    assert check_drop(report, "old mIoU drop", "failed")["low"] > 2.0
    assert verify_json(child, "--data", many, "--against", parent, "--max-old-drop", 15)[0] == 0


def test_an_undecided_verdict_is_told_in_words_and_by_the_exit_code(
    family: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    child, parent = map(str, family)
    data = write_data(tmp_path / "few", 12, range(0, 12, 6))
    assert run(["verify", child, "--data", data, "--against", parent, "--latency-runs", "1"]) == 4
    text = capsys.readouterr().out
    assert "too few images" in text
    assert "undecided: the images are too few" in text


def test_an_unchanged_bundle_passes_with_enough_images_and_not_with_few(
    family: tuple[Path, Path], tmp_path: Path
) -> None:
    data = write_data(tmp_path / "data", 20)
    asked = (family[0], "--data", data, "--against", family[1], "--max-class-drop", 0)
    code, report = verify_json(*asked, "--limit", 10)
    assert code == 4
    assert check_drop(report, "old mIoU drop", "too few images")["detail"].startswith("10 images, and 20 are needed")
    code, report = verify_json(*asked)
    assert code == 0
    for name in ("old mIoU drop", "old class drop"):
        drop = check_drop(report, name, "passed")
        assert (drop["low"], drop["value"], drop["high"]) == (0.0, 0.0, 0.0)


def test_a_planted_regression_is_refused_and_its_class_is_named(tmp_path: Path) -> None:
    child, parent = write_family(tmp_path, forget="apple")
    data = write_data(tmp_path / "data", 40)
    asked = (child, "--data", data, "--against", parent, "--max-class-drop", 10)
    code, report = verify_json(*asked)
    assert code == 1
    drop = check_drop(report, "old class drop", "failed")
    assert (drop["low"], drop["value"], drop["high"]) == (100.0, 100.0, 100.0)
    assert "apple 100.0 -> 0.0 %" in drop["detail"]
    assert "most forgotten: apple" in check_drop(report, "old mIoU drop", "failed")["detail"]


def test_a_class_that_lost_too_much_in_some_images_is_named_where_the_mean_is_within_its_limit(
    family: tuple[Path, Path], tmp_path: Path
) -> None:
    data = write_data(tmp_path / "data", 120, range(0, 120, 4))
    code, report = verify_json(
        family[0], "--data", data, "--against", family[1], "--max-old-drop", 15, "--max-class-drop", 10
    )
    assert code == 1
    check_drop(report, "old mIoU drop", "passed")
    drop = check_drop(report, "old class drop", "failed")
    assert "; grass 100.0 -> " in drop["detail"]
    assert report.scores is not None
    grass = {item.name: item for item in report.scores.classes}["grass"]
    assert (grass.drop_pct, grass.drop_low_pct, grass.drop_high_pct) == (drop["value"], drop["low"], drop["high"])
    assert drop["value"] == pytest.approx(
        100 * grass_pixels(tmp_path / "data", range(0, 120, 4)) / grass_pixels(tmp_path / "data", range(120))
    )


def test_a_class_that_one_image_shows_cannot_be_told_and_a_broken_limit_is_graver(
    family: tuple[Path, Path], tmp_path: Path
) -> None:
    def only_in_one(number: int, mask_HW: NDArray[np.uint8]) -> None:
        if number:
            mask_HW[mask_HW == list(GROWN).index("apple")] = 255

    data = write_data(tmp_path / "data", 20, change=only_in_one)
    asked = (family[0], "--data", data, "--against", family[1])
    assert verify_json(*asked)[0] == 0
    code, report = verify_json(*asked, "--max-class-drop", 10)
    check = report.check("old class drop")
    assert (code, check.verdict, check.low, check.high) == (4, "too few images", None, None)
    assert "no interval can be given" in check.detail
    assert "apple" in check.detail
    assert verify_json(*asked, "--max-class-drop", 10, "--max-model-mib", 0)[0] == 1
