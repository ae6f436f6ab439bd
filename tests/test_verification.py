"""The verdict on a bundle. Bundles and images are such that every number is known beforehand."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from bundles import (
    BASE,
    COLORS,
    ENOUGH,
    GROWN,
    color_network,
    nearest_color,
    write_bundle,
    write_color_folder,
    write_family,
)
from click.testing import CliRunner, Result
from PIL import Image
from rich.console import Console

from edge_ilseg.bundle import Runtime, read_manifest, write_manifest
from edge_ilseg.cli import run
from edge_ilseg.cli.verify import verify
from edge_ilseg.cli.verify_remote import _show
from edge_ilseg.data.folder import Folder
from edge_ilseg.devices import verification
from edge_ilseg.devices.class_scores import class_scores, measured_iou
from edge_ilseg.devices.evaluation import evaluate_session
from edge_ilseg.devices.facts import DeviceFacts, read_device_facts
from edge_ilseg.devices.layers import ExecutedLayer
from edge_ilseg.devices.limits import Limits
from edge_ilseg.devices.remote import Outcome
from edge_ilseg.devices.remote_table import encode_outcomes
from edge_ilseg.devices.retention import MIN_CLASS_IMAGES, judge_retention
from edge_ilseg.devices.runtime import load_session
from edge_ilseg.devices.ssh import parse_device
from edge_ilseg.devices.unlabelled import Unlabelled, UnlabelledClass
from edge_ilseg.devices.verdict_table import verdict_table
from edge_ilseg.devices.verdicts import judge_latency, judge_new_classes
from edge_ilseg.devices.verification import VerifyRequest, choose_model, spread, verify_bundle
from edge_ilseg.devices.verify_report import (
    CHECKS,
    BadImage,
    BundleFacts,
    Check,
    ClassScore,
    GoldenLoss,
    ModelFacts,
    Scores,
    VerifyReport,
    encode_report,
    parse_report,
)
from edge_ilseg.errors import BundleError, ConfigError, MissingPackageError, ReportError
from edge_ilseg.metrics import retention_confusion, score

BOTH = pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
FAST = {"latency_runs": 3, "threads": 1}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_color_folder(tmp_path_factory.mktemp("data") / "colors")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_family(tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="module")
def forgetful(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_family(tmp_path_factory.mktemp("bundles"), forget="grass")


def verify_here(
    folder: Path,
    *,
    dataset: Folder | None = None,
    against: Path | None = None,
    unlabelled: Path | None = None,
    **request: Any,
) -> VerifyReport:
    return verify_bundle(folder, VerifyRequest(**request), dataset=dataset, against=against, unlabelled=unlabelled)


def run_command(*arguments: object) -> Result:
    return CliRunner().invoke(verify, [*map(str, arguments), "--latency-runs", "3", "--threads", "1"])


def flip_one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def as_text(report: VerifyReport) -> str:
    console = Console(width=140, file=io.StringIO())
    console.print(verdict_table(report))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def verdicts(report: VerifyReport) -> dict[str, str]:
    return {check.name: check.verdict for check in report.checks}


def test_a_model_that_kept_everything_passes_every_check(family: tuple[Path, Path], images: Path) -> None:
    child, parent = family
    limits = Limits(
        max_class_drop_pct=0.0,
        min_new_miou_pct=100.0,
        max_latency_p95_ms=60_000,
        max_rss_mib=4096.0,
        max_model_mib=1.0,
        max_old_miou_drop_pct=0,
    )
    report = verify_here(child, dataset=Folder(images), against=parent, limits=limits, **FAST)
    assert report.exit_code == 0
    not_asked = (
        "encoder identity",
        "unlabelled images",
        "unlabelled agreement",
        "class agreement",
        "moved to new classes",
    )
    assert verdicts(report) == dict.fromkeys(CHECKS, "passed") | dict.fromkeys(not_asked, "not checked")
    assert report.scores is not None
    assert (report.scores.miou_old, report.scores.parent_miou_old) == (1.0, 1.0)
    assert report.scores.metrics.iou == dict.fromkeys(GROWN, 1.0)
    assert report.is_retention_checked


def test_a_forgotten_class_is_refused_and_named(forgetful: tuple[Path, Path], images: Path) -> None:
    child, parent = forgetful
    report = verify_here(child, dataset=Folder(images), against=parent, **FAST)
    assert report.exit_code == 1
    drop = report.check("old mIoU drop")
    assert drop.verdict == "failed"
    assert "most forgotten: grass 100.0 -> 0.0 %" in drop.detail
    assert report.scores is not None
    by_name = {item.name: item for item in report.scores.classes}
    assert (by_name["grass"].iou, by_name["grass"].parent_iou, by_name["grass"].drop_pct) == (0.0, 1.0, 100.0)
    assert by_name["apple"].drop_pct == 0.0
    mean = (by_name["background"].iou + 1.0 + 0.0) / 3
    assert drop.value == pytest.approx(100 * (1 - mean))
    assert report.check("golden outputs").verdict == "passed"  # it computes what it was exported to compute


def test_one_forgotten_class_breaks_the_limit_for_a_class_where_the_mean_is_allowed_to_fall(
    forgetful: tuple[Path, Path], images: Path
) -> None:
    child, parent = forgetful
    limits = Limits(max_old_miou_drop_pct=100.0, max_class_drop_pct=10.0)
    report = verify_here(child, dataset=Folder(images), against=parent, limits=limits, **FAST)
    assert report.check("old mIoU drop").verdict == "passed"
    assert report.check("old class drop").verdict == "failed"
    assert report.check("old class drop").value == 100.0
    assert report.exit_code == 1


def test_a_parent_is_compared_on_the_same_pixels_and_not_blamed_for_new_objects(
    family: tuple[Path, Path], images: Path
) -> None:
    """The parent calls every boat background. Pixels of boats are no old pixels, so its background keeps IoU 1."""
    child, parent = family
    report = verify_here(child, dataset=Folder(images), against=parent, **FAST)
    assert report.scores is not None
    found = np.array(report.scores.confusion)
    before = np.array(report.scores.parent_confusion)
    np.testing.assert_array_equal(found.sum(axis=1), before.sum(axis=1))
    boat = list(GROWN).index("boat")
    assert before[boat, boat] == 0
    assert before[boat, 0] == found[boat, boat] > 0
    assert report.scores.classes[0].parent_iou == 1.0


def test_an_old_pixel_that_turned_into_a_new_class_is_lost(family: tuple[Path, Path]) -> None:
    manifest = read_manifest(family[0])
    without_grass = msgspec.structs.replace(manifest, classes=(*manifest.classes[:2], manifest.classes[3]))
    confusion = np.array([[90, 0, 10], [0, 100, 0], [0, 0, 50]])
    parent_confusion = np.array([[100, 0, 0], [0, 100, 0], [50, 0, 0]])
    background, _, boat = class_scores(without_grass, confusion, parent_confusion)
    assert background.iou == pytest.approx(0.9)
    assert background.parent_iou == 1.0
    assert boat.iou == pytest.approx(50 / 60)  # the new class pays for it too
    assert boat.parent_iou is None


@BOTH
def test_both_runtimes_come_to_the_same_verdict(runtime: Runtime, tmp_path: Path, images: Path) -> None:
    child, parent = write_family(tmp_path, forget="apple", models=((runtime, "fp32"),))
    report = verify_here(child, runtime=runtime, dataset=Folder(images), against=parent, **FAST)
    assert report.exit_code == 1
    assert "most forgotten: apple" in report.check("old mIoU drop").detail
    assert report.model is not None
    assert report.model.runtime_version.startswith(runtime)
    assert report.model.model_bytes == sum(
        path.stat().st_size for path in child.iterdir() if path.suffix in (".onnx", ".xml", ".bin")
    )


def test_a_flipped_bit_in_a_file_is_found_and_nothing_is_run(tmp_path: Path, images: Path) -> None:
    child, parent = write_family(tmp_path)
    flip_one_bit(child / "golden/images.npy")
    report = verify_here(child, dataset=Folder(images), against=parent, **FAST)
    assert report.exit_code == 3
    assert report.check("integrity").verdict == "failed"
    assert "golden/images.npy" in report.check("integrity").detail
    assert set(list(verdicts(report).values())[1:]) == {"not checked"}


def test_a_flipped_bit_in_the_parent_is_found(tmp_path: Path, images: Path) -> None:
    child, parent = write_family(tmp_path)
    flip_one_bit(parent / "fp32.onnx")
    report = verify_here(child, dataset=Folder(images), against=parent, **FAST)
    assert report.exit_code == 3
    assert str(parent / "fp32.onnx") in report.check("integrity").detail


@pytest.mark.parametrize(
    ("share", "precision", "verdict"),
    [
        (0.02, "fp32", "failed"),
        (0.005, "fp32", "failed"),
        (0.0005, "fp32", "passed"),
        (0.02, "int8", "failed"),
        (0.005, "int8", "passed"),
    ],
)
def test_golden_outputs_that_differ_are_a_failure_of_parity(
    share: float, precision: str, verdict: str, tmp_path: Path
) -> None:
    write_bundle(tmp_path / "b", BASE, step_id="a", models=(("onnxruntime", precision),), wrong_golden_share=share)  # type: ignore[arg-type]
    report = verify_here(tmp_path / "b", **FAST)
    check = report.check("golden outputs")
    assert check.verdict == verdict
    assert check.value == pytest.approx(1 - share, abs=2e-4)
    assert report.exit_code == (2 if verdict == "failed" else 0)


def test_a_parent_that_does_not_compute_what_it_should_is_no_measure(tmp_path: Path, images: Path) -> None:
    write_bundle(tmp_path / "parent", BASE, step_id="a", wrong_golden_share=0.5)
    write_bundle(tmp_path / "child", GROWN, step_id="b", parent_id="a")
    report = verify_here(tmp_path / "child", dataset=Folder(images), against=tmp_path / "parent", **FAST)
    assert report.check("golden outputs").verdict == "passed"
    assert report.check("parent's golden outputs").verdict == "failed"
    assert report.exit_code == 2


def test_golden_masks_of_another_number_than_the_images_are_refused(tmp_path: Path) -> None:
    manifest = write_bundle(tmp_path / "b", BASE, step_id="a")
    path = tmp_path / "b" / manifest.models[0].golden_masks
    np.save(path, np.load(path)[:1])
    write_manifest(tmp_path / "b", manifest)
    report = verify_here(tmp_path / "b", **FAST)
    assert report.exit_code == 3
    assert "2 images, 1 masks" in report.check("fit").detail


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY garbage", b"PK\x03\x04"])
def test_a_golden_file_that_is_no_array_is_refused(content: bytes, tmp_path: Path) -> None:
    manifest = write_bundle(tmp_path / "b", BASE, step_id="a")
    (tmp_path / "b" / "golden/images.npy").write_bytes(content)
    write_manifest(tmp_path / "b", manifest)
    report = verify_here(tmp_path / "b", **FAST)
    assert report.exit_code == 3
    assert "a golden file cannot be read" in report.check("fit").detail


def test_a_golden_file_with_pickled_objects_is_never_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    manifest = write_bundle(tmp_path / "b", BASE, step_id="a")
    np.save(tmp_path / "b" / "golden/images.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    write_manifest(tmp_path / "b", manifest)
    assert verify_here(tmp_path / "b", **FAST).exit_code == 3
    assert not (tmp_path / "sprung").exists()


def test_a_bundle_of_another_step_is_no_parent(tmp_path: Path, images: Path) -> None:
    child, _ = write_family(tmp_path)
    write_bundle(tmp_path / "stranger", BASE, step_id="c" * 64)
    report = verify_here(child, dataset=Folder(images), against=tmp_path / "stranger", **FAST)
    assert report.exit_code == 3
    assert "the other bundle is not the parent of this one" in report.check("fit").detail


def test_siblings_have_the_same_parent(tmp_path: Path, images: Path) -> None:
    """A fine-tuned and a distilled step grow from one step."""
    _, parent = write_family(tmp_path)
    write_bundle(tmp_path / "sibling", GROWN, step_id="d" * 64, parent_id="a" * 64)
    assert verify_here(tmp_path / "sibling", dataset=Folder(images), against=parent, **FAST).exit_code == 0


def test_a_parent_whose_classes_are_not_the_first_channels_is_refused(tmp_path: Path, images: Path) -> None:
    write_bundle(tmp_path / "parent", {"background": 0, "grass": 0, "apple": 0}, step_id="a")
    write_bundle(tmp_path / "child", GROWN, step_id="b", parent_id="a")
    report = verify_here(tmp_path / "child", dataset=Folder(images), against=tmp_path / "parent", **FAST)
    assert report.exit_code == 3
    assert "background, apple, grass; expected the parent's: background, grass, apple" in report.check("fit").detail


def test_a_bundle_of_step_0_has_no_parent(family: tuple[Path, Path]) -> None:
    _, parent = family
    report = verify_here(parent, against=parent, **FAST)
    assert report.exit_code == 3
    assert "step 0, which has no parent" in report.check("fit").detail


def test_a_parent_without_a_model_of_the_precision_is_named(tmp_path: Path) -> None:
    write_bundle(tmp_path / "parent", BASE, step_id="a")
    write_bundle(tmp_path / "child", GROWN, step_id="b", parent_id="a", models=(("onnxruntime", "int8"),))
    report = verify_here(tmp_path / "child", against=tmp_path / "parent", **FAST)
    assert report.exit_code == 3
    detail = report.check("fit").detail
    assert f"no such model; at {tmp_path / 'parent'}; found onnxruntime/fp32; expected onnxruntime/int8" in detail


def test_images_side_by_side_come_to_the_same_verdict_and_so_do_they_where_there_is_no_room_for_it(
    forgetful: tuple[Path, Path], images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child, parent = forgetful

    def counted(hint: str) -> object:
        report = verify_here(child, dataset=Folder(images), against=parent, hint=hint, latency_runs=3, threads=2)
        assert report.scores is not None
        return verdicts(report), report.scores.metrics, report.scores.classes

    one_at_a_time = counted("latency")
    assert counted("throughput") == one_at_a_time
    refused: list[object] = []

    def refuse(*loaded: object) -> object:
        refused.append(loaded)
        raise BundleError("no memory is left", hint="-")

    monkeypatch.setattr(verification, "for_throughput", refuse)
    assert counted("throughput") == one_at_a_time
    assert len(refused) == 2  # the child's and the parent's


def test_nothing_is_loaded_to_run_side_by_side_where_no_image_is_scored(
    family: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "for_throughput", None)
    assert verify_here(family[0], against=family[1], hint="throughput", **FAST).exit_code == 0


def test_without_images_retention_is_not_checked_and_the_report_says_so(family: tuple[Path, Path]) -> None:
    child, parent = family
    report = verify_here(child, against=parent, **FAST)
    assert report.exit_code == 0
    assert not report.is_retention_checked
    assert report.check("old mIoU drop").verdict == "not checked"
    assert report.check("parent's golden outputs").verdict == "passed"
    assert "retention was NOT checked: no labelled images were given" in as_text(report)


def test_without_a_parent_the_old_miou_is_shown_and_not_judged(forgetful: tuple[Path, Path], images: Path) -> None:
    child, _ = forgetful
    report = verify_here(child, dataset=Folder(images), **FAST)
    assert report.exit_code == 0
    assert report.scores is not None
    assert f"old mIoU here {100 * report.scores.miou_old:.1f} %" in report.check("old mIoU drop").detail
    assert "retention was NOT checked: no parent bundle" in as_text(report)


def test_step_0_has_nothing_to_retain(family: tuple[Path, Path], images: Path) -> None:
    _, parent = family
    report = verify_here(parent, dataset=Folder(images), limits=Limits(min_new_miou_pct=99.0), **FAST)
    assert report.exit_code == 0
    assert "no old class" in report.check("old mIoU drop").detail
    assert report.check("new mIoU").value == 100.0  # boats are background for a model that does not know them


@pytest.mark.parametrize(
    ("limits", "name"),
    [
        (Limits(min_new_miou_pct=100.5), "new mIoU"),
        (Limits(max_latency_p95_ms=1e-9), "latency p95"),
        (Limits(max_model_mib=1e-6), "model size"),
    ],
)
def test_every_limit_can_be_broken(limits: Limits, name: str, family: tuple[Path, Path], images: Path) -> None:
    child, parent = family
    report = verify_here(child, dataset=Folder(images), against=parent, limits=limits, **FAST)
    assert [check.name for check in report.checks if check.verdict == "failed"] == [name]
    assert report.exit_code == 1


@pytest.mark.parametrize(
    "limits", [Limits(min_new_miou_pct=1.0), Limits(max_class_drop_pct=1.0), Limits(max_old_miou_drop_pct=2.0)]
)
def test_a_limit_that_cannot_be_measured_is_refused_before_anything_runs(
    limits: Limits, family: tuple[Path, Path]
) -> None:
    with pytest.raises(ConfigError, match="needs labelled images"):
        verify_here(family[0], against=family[1], limits=limits, **FAST)


@pytest.mark.parametrize("limits", [Limits(max_class_drop_pct=1.0), Limits(max_old_miou_drop_pct=2.0)])
def test_a_limit_on_a_drop_is_refused_without_a_parent(limits: Limits, family: tuple[Path, Path], images: Path) -> None:
    with pytest.raises(ConfigError, match="labelled images and a parent"):
        verify_here(family[0], dataset=Folder(images), limits=limits, **FAST)


def test_the_drop_of_the_old_miou_has_a_limit_without_asking(forgetful: tuple[Path, Path], images: Path) -> None:
    report = verify_here(forgetful[0], dataset=Folder(images), against=forgetful[1], **FAST)
    assert report.limits.max_old_miou_drop_pct is None
    assert report.check("old mIoU drop").limit == 2.0
    limits = Limits(max_old_miou_drop_pct=0.0)
    report = verify_here(forgetful[0], dataset=Folder(images), against=forgetful[1], limits=limits, **FAST)
    assert report.check("old mIoU drop").limit == 0.0


def test_bad_images_are_named_and_counted_and_the_others_judged(family: tuple[Path, Path], tmp_path: Path) -> None:
    child, parent = family
    root = write_color_folder(tmp_path / "colors")
    (root / "images/001.png").write_bytes((root / "images/001.png").read_bytes()[:100])
    Image.fromarray(np.zeros((7, 5), np.uint8)).save(root / "masks/002.png")
    limits = Limits(max_bad_images=2)
    report = verify_here(child, dataset=Folder(root), against=parent, limits=limits, **FAST)
    assert report.exit_code == 0
    assert report.scores is not None
    assert [item.image_id for item in report.scores.bad_images] == ["001", "002"]
    assert (report.scores.images_asked, report.scores.images_counted) == (ENOUGH, ENOUGH - 2)
    assert report.scores.metrics.images == ENOUGH - 2
    check = report.check("images")
    assert (check.value, check.verdict) == (2, "passed")
    assert "bad: 001 (" in check.detail


def test_a_bad_image_too_many_fails_after_all_checks_have_run(family: tuple[Path, Path], tmp_path: Path) -> None:
    child, parent = family
    root = write_color_folder(tmp_path / "colors")
    (root / "images/001.png").write_bytes(b"not an image")
    report = verify_here(child, dataset=Folder(root), against=parent, **FAST)
    assert report.exit_code == 3
    assert report.check("images").verdict == "failed"
    assert report.check("old mIoU drop").verdict == "passed"


def test_no_usable_image_at_all_never_passes(family: tuple[Path, Path], tmp_path: Path) -> None:
    child, parent = family
    root = write_color_folder(tmp_path / "colors", count=1)
    (root / "images/000.png").write_bytes(b"")
    limits = Limits(max_bad_images=100)
    report = verify_here(child, dataset=Folder(root), against=parent, limits=limits, **FAST)
    assert report.exit_code == 3
    assert report.check("images").verdict == "failed"
    assert report.check("old mIoU drop").verdict == "failed"


def test_images_without_an_old_class_cannot_prove_retention(forgetful: tuple[Path, Path], tmp_path: Path) -> None:
    child, parent = forgetful
    root = write_color_folder(tmp_path / "colors")
    for path in (root / "masks").iterdir():
        Image.fromarray(np.full((48, 64), list(GROWN).index("boat"), np.uint8)).save(path)
    report = verify_here(child, dataset=Folder(root), against=parent, **FAST)
    assert report.exit_code == 3
    assert "retention cannot be judged" in report.check("old mIoU drop").detail
    assert report.check("old class drop").verdict == "not checked"
    limits = Limits(max_class_drop_pct=50.0)
    report = verify_here(child, dataset=Folder(root), against=parent, limits=limits, **FAST)
    check = report.check("old class drop")
    assert (check.verdict, check.exit_code, check.value, check.limit) == ("failed", 3, None, 50.0)


def hide(root: Path, name: str, *, shown_in: int = 0) -> Path:
    """A data set whose masks show a class in the first images alone."""
    for number, path in enumerate(sorted((root / "masks").iterdir())):
        mask_HW = np.array(Image.open(path))
        if number >= shown_in:
            mask_HW[mask_HW == list(GROWN).index(name)] = 255
        Image.fromarray(mask_HW).save(path)
    return root


def test_an_old_class_that_no_image_shows_is_left_out_of_the_mean_and_named(
    forgetful: tuple[Path, Path], tmp_path: Path
) -> None:
    root = hide(write_color_folder(tmp_path / "colors"), "grass")
    report = verify_here(forgetful[0], dataset=Folder(root), against=forgetful[1], **FAST)
    assert report.exit_code == 0
    assert report.check("old mIoU drop").verdict == "passed"
    for name in ("old mIoU drop", "old class drop"):
        assert "not in these images: grass" in report.check(name).detail  # type: ignore[arg-type]


def test_of_an_old_class_that_no_image_shows_nothing_is_known_where_each_class_has_a_limit(
    forgetful: tuple[Path, Path], tmp_path: Path
) -> None:
    child, parent = forgetful
    root = hide(write_color_folder(tmp_path / "colors"), "grass")
    limits = Limits(max_class_drop_pct=5.0)
    report = verify_here(child, dataset=Folder(root), against=parent, limits=limits, **FAST)
    check = report.check("old class drop")
    assert (report.exit_code, check.verdict, check.exit_code) == (4, "too few images", 4)
    assert "no image shows grass" in check.detail
    assert report.check("old mIoU drop").verdict == "passed"


def test_a_class_that_failed_is_graver_than_one_that_no_image_shows(
    forgetful: tuple[Path, Path], tmp_path: Path
) -> None:
    child, parent = forgetful
    root = hide(write_color_folder(tmp_path / "colors"), "apple")
    limits = Limits(max_class_drop_pct=5.0, max_old_miou_drop_pct=100.0)
    report = verify_here(child, dataset=Folder(root), against=parent, limits=limits, **FAST)
    check = report.check("old class drop")
    assert (report.exit_code, check.verdict) == (1, "failed")
    assert "grass 100.0 -> 0.0 %" in check.detail
    assert "not in these images: apple" in check.detail


@pytest.mark.parametrize("count", [2, 10, 19])
@pytest.mark.parametrize("forget", [None, "grass"])
def test_few_images_decide_no_drop_whether_the_bundle_has_changed_or_not(
    count: int, forget: str | None, tmp_path: Path
) -> None:
    """Rule 3: an interval without width, or one that is wholly beyond the limit, and no proof."""
    child, parent = write_family(tmp_path / "bundles", forget=forget)
    root = write_color_folder(tmp_path / "colors", count=count)
    report = verify_here(child, dataset=Folder(root), against=parent, limits=Limits(max_class_drop_pct=5.0), **FAST)
    assert report.exit_code == 4
    for name in ("old mIoU drop", "old class drop"):
        check = report.check(name)  # type: ignore[arg-type]
        assert (check.verdict, check.exit_code) == ("too few images", 4)
        assert check.low is not None
        assert f"{count} images, and 20 are needed" in check.detail
    few = Limits(max_class_drop_pct=5.0, min_images=count)
    decided = verify_here(child, dataset=Folder(root), against=parent, limits=few, **FAST)
    assert decided.exit_code == (1 if forget else 0)


def test_images_of_the_background_alone_do_not_count_as_images_of_old_classes(
    family: tuple[Path, Path], tmp_path: Path
) -> None:
    child, parent = family
    root = hide(hide(write_color_folder(tmp_path / "colors"), "grass", shown_in=19), "apple", shown_in=19)
    report = verify_here(child, dataset=Folder(root), against=parent, **FAST)
    assert report.scores is not None
    assert (report.scores.images_counted, report.scores.images_of_old) == (ENOUGH, 19)
    shown = {item.name: item.images for item in report.scores.classes}
    assert shown == {"background": ENOUGH, "apple": 19, "grass": 19, "boat": None}
    assert report.check("old mIoU drop").verdict == "too few images"
    assert report.exit_code == 4


@pytest.mark.parametrize(
    ("shown_in", "verdict"), [(MIN_CLASS_IMAGES - 1, "too few images"), (MIN_CLASS_IMAGES, "failed")]
)
def test_a_single_class_has_to_be_in_some_images_to_be_judged(
    shown_in: int, verdict: str, forgetful: tuple[Path, Path], tmp_path: Path
) -> None:
    root = hide(write_color_folder(tmp_path / "colors"), "grass", shown_in=shown_in)
    limits = Limits(max_class_drop_pct=5.0, max_old_miou_drop_pct=100.0)
    report = verify_here(forgetful[0], dataset=Folder(root), against=forgetful[1], limits=limits, **FAST)
    check = report.check("old class drop")
    assert check.verdict == verdict
    assert "grass 100.0 -> 0.0 %" in check.detail


def test_a_class_that_the_data_set_does_not_know_is_told_and_not_taken_for_retained(
    family: tuple[Path, Path], tmp_path: Path
) -> None:
    root = write_color_folder(tmp_path / "colors")
    (root / "classes.txt").write_text("background\napple\nlawn\nboat\n")
    report = verify_here(family[0], dataset=Folder(root), against=family[1], **FAST)
    assert report.exit_code == 0
    assert "not in these images: grass" in report.check("old mIoU drop").detail
    assert "retention was NOT checked for: grass" in as_text(report)


def test_a_data_set_without_any_class_of_the_bundle_is_refused(family: tuple[Path, Path], tmp_path: Path) -> None:
    root = write_color_folder(tmp_path / "colors")
    (root / "classes.txt").write_text("background\npear\nlawn\nship\n")
    report = verify_here(family[0], dataset=Folder(root), against=family[1], **FAST)
    assert report.exit_code == 3
    assert "none of the classes that the model knows" in report.check("images").detail


def test_a_model_that_gives_a_channel_without_a_class_is_refused(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", BASE, step_id="a", network=color_network(list(BASE), add_to_mask=1))
    report = verify_here(tmp_path / "b", **FAST)
    assert report.exit_code == 2  # the golden masks, computed rightly, differ everywhere
    assert report.check("golden outputs").value == 0.0


def test_images_with_such_a_channel_end_the_scoring(tmp_path: Path, images: Path) -> None:
    write_bundle(tmp_path / "b", BASE, step_id="a", network=color_network(list(BASE), add_to_mask=1))
    report = verify_here(tmp_path / "b", dataset=Folder(images), **FAST)
    assert report.exit_code == 3
    assert "found channel 3; expected 0 to 2" in report.check("images").detail


def test_masks_are_compared_at_the_labels_full_size(family: tuple[Path, Path], tmp_path: Path) -> None:
    root = write_color_folder(tmp_path / "large", count=3, scale=3)
    dataset = Folder(root)
    manifest = read_manifest(family[0])
    session = load_session(family[0], manifest.models[0])
    found = evaluate_session(session, dataset, dataset.ids("test"), manifest)
    void_rows = 4 * 3
    assert found.confusion.sum() == 3 * (48 * 3 - void_rows) * 64 * 3
    assert np.trace(found.confusion) / found.confusion.sum() > 0.97  # only the blocks' edges suffer from resizing
    assert len(found.latencies_ms) == 3


def test_of_a_bad_image_no_counts_are_kept(family: tuple[Path, Path], tmp_path: Path) -> None:
    root = write_color_folder(tmp_path / "colors", count=5)
    manifest = read_manifest(family[0])
    session = load_session(family[0], manifest.models[0])
    whole = evaluate_session(session, Folder(root), Folder(root).ids("test"), manifest)
    (root / "images" / "001.png").write_bytes(b"no image")
    found = evaluate_session(session, Folder(root), Folder(root).ids("test"), manifest)
    assert [image_id for image_id, _ in found.bad_images] == ["001"]
    for part_NK, whole_NK in zip(found.old_counts, whole.old_counts, strict=True):
        np.testing.assert_array_equal(part_NK, np.delete(whole_NK, 1, axis=0))
    assert whole.old_counts.true_NK.sum(axis=1).all()


def test_the_confusion_is_that_of_a_plain_loop(forgetful: tuple[Path, Path], images: Path) -> None:
    dataset = Folder(images)
    manifest = read_manifest(forgetful[0])
    found = evaluate_session(load_session(forgetful[0], manifest.models[0]), dataset, dataset.ids("test"), manifest)
    expected = np.zeros((4, 4), np.int64)
    kept = [name for name in GROWN if name != "grass"]
    for image_id in dataset.ids("test"):
        predicted_HW = nearest_color(dataset.read_image(image_id), kept)
        for true, channel in zip(dataset.read_labels(image_id).flat, predicted_HW.flat, strict=True):
            if true != 255:
                expected[true, list(GROWN).index(kept[channel])] += 1
    np.testing.assert_array_equal(found.confusion, expected)


def test_few_images_are_taken_from_the_whole_split() -> None:
    ids = tuple("abcdefghij")
    assert spread(ids, None) == ids
    assert spread(ids, 20) == ids
    assert spread(ids, 5) == ("a", "c", "e", "g", "i")
    assert spread(ids, 3) == ("a", "d", "g")


def test_p95_is_a_latency_that_was_measured_and_that_95_in_100_keep_to() -> None:
    latencies_ms = [float(value) for value in range(1, 101)]
    check = judge_latency(latencies_ms[::-1], Limits(max_latency_p95_ms=95.0))
    assert (check.value, check.verdict) == (95.0, "passed")
    assert judge_latency(latencies_ms, Limits(max_latency_p95_ms=94.9)).verdict == "failed"


def test_a_limit_that_is_not_a_number_fails() -> None:
    assert judge_latency([1.0], Limits(max_latency_p95_ms=float("nan"))).verdict == "failed"


def test_a_drop_is_judged_by_the_ends_of_its_interval() -> None:
    classes = ["a", "b"]
    parent = np.array([[100, 0, 0], [0, 100, 0], [0, 0, 0]])
    found = np.array([[96, 0, 4], [0, 100, 0], [0, 0, 0]])
    scores = scores_of(found, parent, classes)
    scores = msgspec.structs.replace(scores, drop_low_pct=1.0, drop_high_pct=3.0, images_of_old=20)
    for limit, verdict, code in (
        (3.0, "passed", 0),
        (2.9, "too few images", 4),
        (1.0, "too few images", 4),
        (0.9, "failed", 1),
    ):
        drop, _ = judge_retention(scores, Limits(max_old_miou_drop_pct=limit), is_compared=True)
        assert (drop.verdict, drop.exit_code, drop.low, drop.high) == (verdict, code, 1.0, 3.0)
        assert drop.value == pytest.approx(2.0)
    fewer = msgspec.structs.replace(scores, images_of_old=19)
    for limit in (3.0, 0.9):
        drop, _ = judge_retention(fewer, Limits(max_old_miou_drop_pct=limit), is_compared=True)
        assert (drop.verdict, drop.exit_code, drop.low, drop.high) == ("too few images", 4, 1.0, 3.0)


def test_a_new_class_without_pixels_breaks_a_limit_and_without_one_is_told() -> None:
    confusion = np.array([[10, 0, 0], [0, 10, 0], [0, 0, 0]])
    scores = scores_of(confusion, None, ["a", "b"])
    assert judge_new_classes(scores, Limits()).verdict == "not checked"
    failed = judge_new_classes(scores, Limits(min_new_miou_pct=1.0))
    assert (failed.verdict, failed.exit_code) == ("failed", 3)
    assert "boat" in failed.detail


def test_old_classes_are_measured_on_old_pixels_and_new_ones_on_all() -> None:
    confusion = np.array([[8, 1, 1], [0, 10, 0], [4, 0, 6]])
    iou = measured_iou(confusion, 2)
    np.testing.assert_allclose(iou, [8 / 10, 10 / 11, 6 / 11])
    assert retention_confusion(confusion, 2).sum() == 20


def scores_of(confusion: np.ndarray, parent: np.ndarray | None, old: list[str]) -> Scores:
    iou = measured_iou(confusion, len(old))
    before = measured_iou(parent, len(old)) if parent is not None else None
    names = [*old, "boat"]
    classes = tuple(
        ClassScore(
            name=name,
            step=int(channel >= len(old)),
            is_old=channel < len(old),
            pixels=int(confusion[channel].sum()),
            iou=None if np.isnan(iou[channel]) else float(iou[channel]),
            parent_iou=None if before is None or channel >= len(old) else float(before[channel]),
        )
        for channel, name in enumerate(names)
    )
    return Scores(
        dataset="folder",
        split="test",
        images_asked=1,
        images_counted=1,
        images_of_old=1,
        image_ids_sha256="",
        bad_images=(),
        classes=classes,
        metrics=score(confusion, names, old_count=len(old), background=None, images=1),
        miou_old=float(np.mean(iou[: len(old)])),
        parent_miou_old=None if before is None else float(np.mean(before[: len(old)])),
        drop_low_pct=None,
        drop_high_pct=None,
        confusion=(),
        parent_confusion=None,
        latency_median_ms=None,
    )


def test_the_first_installed_runtime_and_the_smallest_precision_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = (("openvino", "fp32"), ("onnxruntime", "fp32"), ("onnxruntime", "int8"))
    manifest = write_bundle(tmp_path / "b", BASE, step_id="a", models=models)  # type: ignore[arg-type]
    assert choose_model(manifest, None, None) == ("onnxruntime", "int8")
    assert choose_model(manifest, "openvino", None) == ("openvino", "fp32")
    assert choose_model(manifest, None, "fp32") == ("onnxruntime", "fp32")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert choose_model(manifest, None, None) == ("openvino", "fp32")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingPackageError, match="this bundle needs a package"):
        choose_model(manifest, None, None)


def test_a_missing_runtime_is_a_failure_of_fit_that_names_the_extra(
    family: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    report = verify_here(family[0], runtime="onnxruntime", **FAST)
    assert report.exit_code == 3
    assert "pip install 'edge-ilseg[onnxruntime]'" in report.check("fit").detail


def test_the_table_shows_every_check_and_every_class(forgetful: tuple[Path, Path], images: Path) -> None:
    text = as_text(verify_here(forgetful[0], dataset=Folder(images), against=forgetful[1], **FAST))
    for word in (*CHECKS, *COLORS, "-100.0", "forgot too much"):
        assert word in text


def test_a_name_that_looks_like_markup_is_shown_as_it_is(family: tuple[Path, Path]) -> None:
    report = verify_here(family[0], **FAST)
    facts = msgspec.structs.replace(report.bundle, folder="/data/[red]x[/red]", step_name="[bold]")
    assert "/data/[red]x[/red] (step [bold])" in as_text(msgspec.structs.replace(report, bundle=facts))


def test_a_report_survives_its_json(forgetful: tuple[Path, Path], images: Path) -> None:
    report = verify_here(forgetful[0], dataset=Folder(images), against=forgetful[1], **FAST)
    assert parse_report(encode_report(report)) == report


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["checks"].pop(5), "does not list every check"),
        (lambda content: content["checks"].reverse(), "does not list every check"),
        (lambda content: content.update(exit_code=0), "is not that of its checks"),
        (lambda content: content.update(format_version=2), "a format that this version does not read"),
        (lambda content: content.update(opinion="fine"), "damaged"),
        (lambda content: content["checks"][0].update(verdict="maybe"), "damaged"),
    ],
)
def test_a_report_that_breaks_its_rules_is_refused(
    change: Callable[[dict[str, Any]], object], message: str, forgetful: tuple[Path, Path], images: Path
) -> None:
    report = verify_here(forgetful[0], dataset=Folder(images), against=forgetful[1], **FAST)
    content = json.loads(encode_report(report))
    change(content)
    with pytest.raises(ReportError, match=message):
        parse_report(json.dumps(content).encode())


@pytest.mark.parametrize(
    "struct",
    [
        VerifyReport,
        Check,
        Limits,
        BundleFacts,
        ModelFacts,
        Scores,
        BadImage,
        ClassScore,
        DeviceFacts,
        Unlabelled,
        UnlabelledClass,
        ExecutedLayer,
        GoldenLoss,
    ],
)
def test_the_format_page_names_every_field(struct: type[msgspec.Struct]) -> None:
    page = (Path(__file__).parents[1] / "docs/verify-report.md").read_text()
    assert [name for name in struct.__struct_fields__ if f"`{name}`" not in page] == []
    assert [name for name in CHECKS if f"`{name}`" not in page] == []


# The command


@pytest.mark.parametrize("damage", ["none", "forgotten", "golden", "flipped", "golden and forgotten"])
def test_the_command_ends_with_the_code_of_the_verdict(damage: str, tmp_path: Path, images: Path) -> None:
    share = 0.5 if "golden" in damage else 0.0
    child, parent = write_family(tmp_path, forget="grass" if "forgotten" in damage else None, wrong_golden_share=share)
    if damage == "flipped":
        flip_one_bit(child / "fp32.onnx")
    result = run_command(child, "--data", f"folder:{images}", "--against", parent)
    expected = {"none": 0, "forgotten": 1, "golden": 2, "flipped": 3, "golden and forgotten": 2}
    assert result.exit_code == expected[damage], result.output
    assert "old mIoU drop" in result.stdout


def test_json_is_the_whole_report_and_nothing_else(forgetful: tuple[Path, Path], images: Path) -> None:
    child, parent = forgetful
    result = run_command(child, "--data", f"folder:{images}", "--against", parent, "--json")
    assert result.exit_code == 1
    content = json.loads(result.stdout)
    assert content["exit_code"] == 1
    assert [check["name"] for check in content["checks"]] == list(CHECKS)
    assert len(content["latencies_ms"]) == 3
    assert content["device"]["versions"]["numpy"] == np.__version__
    assert parse_report(result.stdout_bytes).bundle.step_name == "01-boat"


def test_limits_of_the_command_reach_the_verdict(forgetful: tuple[Path, Path], images: Path) -> None:
    child, parent = forgetful
    arguments = (child, "--data", f"folder:{images}", "--against", parent, "--max-old-drop", 100)
    assert run_command(*arguments).exit_code == 0
    assert run_command(*arguments, "--max-class-drop", 99).exit_code == 1
    assert run_command(*arguments, "--min-new-iou", 100.1).exit_code == 1
    assert run_command(*arguments, "--max-latency-ms", 0).exit_code == 1
    assert run_command(*arguments, "--max-model-mib", 0).exit_code == 1
    assert run_command(*arguments, "--limit", 1, "--json").exit_code == 4  # one image has no interval
    assert run_command(*arguments, "--limit", 5).exit_code == 4
    assert run_command(*arguments, "--limit", 5, "--min-images", 5).exit_code == 0


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
@pytest.mark.parametrize("option", ["--max-old-drop", "--max-latency-ms", "--min-agreement"])
def test_a_limit_that_everything_or_nothing_keeps_to_is_refused(
    option: str, value: str, family: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["verify", str(family[0]), f"{option}={value}"]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "is not a finite number" in captured.err
    assert option in captured.err


def test_a_limit_that_is_not_finite_is_refused_by_the_verification_itself(
    family: tuple[Path, Path], images: Path
) -> None:
    for limits in (Limits(max_old_miou_drop_pct=float("inf")), Limits(max_rss_mib=float("nan"))):
        with pytest.raises(ConfigError, match="is not a finite number"):
            verify_here(family[0], dataset=Folder(images), against=family[1], limits=limits, **FAST)


def test_a_split_that_is_not_there_is_said_of_every_check_that_needs_its_images(
    family: tuple[Path, Path], images: Path
) -> None:
    result = run_command(family[0], "--data", f"folder:{images}", "--against", family[1], "--split", "nosuch", "--json")
    assert result.exit_code == 3
    report = parse_report(result.stdout_bytes)
    assert "nosuch" in report.check("images").detail
    for name in ("old mIoU drop", "old class drop", "new mIoU"):
        check = report.check(name)  # type: ignore[arg-type]
        assert (check.verdict, check.detail) == ("not checked", "the labelled images could not be scored")


def test_the_report_is_written_besides_the_table(forgetful: tuple[Path, Path], images: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    asked = (forgetful[0], "--data", f"folder:{images}", "--against", forgetful[1], "--out", out)
    out.write_text("of an earlier run")
    result = run_command(*asked)
    assert result.exit_code == 1
    assert "old mIoU drop" in result.stdout
    assert parse_report(out.read_bytes()).exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    both = run_command(*asked, "--json")
    assert both.stdout_bytes == out.read_bytes() + b"\n"


@pytest.mark.parametrize("count", [1, 2])
def test_reports_of_other_devices_are_written_here(
    count: int, forgetful: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = verify_here(forgetful[0], **FAST)
    outcomes = tuple(Outcome(parse_device(f"ssh://camera-{number}"), report, None, None) for number in range(count))
    assert _show(outcomes, as_json=False, out=tmp_path / "report.json") == report.exit_code
    written = (tmp_path / "report.json").read_bytes()
    assert written == (encode_report(report) if count == 1 else encode_outcomes(outcomes))
    capsys.readouterr()
    _show(outcomes, as_json=True, out=None)
    assert capsys.readouterr().out == written.decode() + "\n"


@pytest.mark.parametrize("place", ["", "nowhere/report.json"])
def test_a_report_that_cannot_be_written_is_refused_before_anything_runs(
    place: str, family: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["verify", str(family[0]), "--out", str(tmp_path / place)]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "--out" in captured.err


# The device


def test_a_report_of_a_device_that_tells_nothing_is_not_written(family: tuple[Path, Path], tmp_path: Path) -> None:
    report = verify_here(family[1], **FAST)
    nothing = read_device_facts(proc=tmp_path, sysfs=tmp_path)
    with pytest.raises(ReportError, match="does not tell what it is") as caught:
        encode_report(msgspec.structs.replace(report, device=nothing))
    assert "processor, memory" in str(caught.value)
    assert "FileNotFoundError" in str(caught.value.found)
    with pytest.raises(ReportError, match="everything"):
        encode_report(msgspec.structs.replace(report, device=None))
    for change in ({"machine": None}, {"cores": None}, {"memory_mib": None}):
        with pytest.raises(ReportError):
            encode_report(msgspec.structs.replace(report, device=msgspec.structs.replace(report.device, **change)))
    unnamed = msgspec.structs.replace(report.device, processor=None, governor=None, load_average=None)
    assert parse_report(encode_report(msgspec.structs.replace(report, device=unnamed))).device == unnamed


def test_the_command_says_so_before_anything_runs(
    family: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert read_device_facts.__kwdefaults__ is not None
    monkeypatch.setitem(read_device_facts.__kwdefaults__, "proc", tmp_path)
    for words in ([], ["--json"]):
        assert run(["verify", str(family[0]), *words]) == 3
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "does not tell what it is" in captured.err
        assert "edge-ilseg device facts" in captured.err


def test_the_choice_of_images_needs_images(family: tuple[Path, Path]) -> None:
    result = run_command(family[0], "--split", "val")
    assert isinstance(result.exception, ConfigError)


def test_a_folder_that_is_no_bundle_is_reported(tmp_path: Path) -> None:
    result = run_command(tmp_path)
    assert result.exit_code == 3
    assert "this folder is no bundle" in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["--runtime", "tensorrt"],
        ["--limit", "0"],
        ["--data"],
        ["--max-old-drop", "much"],
        ["--bogus"],
        ["--min-images", "0"],
    ],
)
def test_wrong_usage_ends_with_3_and_not_with_the_code_of_parity(
    arguments: list[str], family: tuple[Path, Path]
) -> None:
    assert run(["verify", str(family[0]), *arguments]) == 3


def test_the_entry_point_returns_the_code_of_the_verdict(forgetful: tuple[Path, Path], images: Path) -> None:
    child, parent = map(str, forgetful)
    assert run(["verify", child, "--data", f"folder:{images}", "--against", parent, "--latency-runs", "1"]) == 1
    assert run(["verify", child, "--data", "folder:/nowhere", "--latency-runs", "1"]) == 3
