"""A verification on one screen, whatever the number of classes."""

from __future__ import annotations

import io
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest
from bundles import write_color_folder, write_family
from rich.console import Console

from edge_ilseg.data.folder import Folder
from edge_ilseg.devices.limits import Limits
from edge_ilseg.devices.unlabelled import Unlabelled, UnlabelledClass
from edge_ilseg.devices.verdict_table import verdict_table
from edge_ilseg.devices.verification import VerifyRequest, verify_bundle
from edge_ilseg.devices.verify_report import CHECKS, BundleFacts, ClassScore, VerifyReport
from edge_ilseg.metrics import score

FAST = VerifyRequest(latency_runs=1, threads=1, with_evidence=False)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_color_folder(tmp_path_factory.mktemp("data") / "colors")


@pytest.fixture(scope="module")
def forgetful(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_family(tmp_path_factory.mktemp("bundles"), forget="grass")


def verify_here(bundles: tuple[Path, Path], images: Path, limits: Limits | None = None) -> VerifyReport:
    request = msgspec.structs.replace(FAST, limits=limits or Limits())
    return verify_bundle(bundles[0], request, dataset=Folder(images), against=bundles[1])


def lines_of(report: VerifyReport, width: int = 100) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    console.print(verdict_table(report))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def large_report(report: VerifyReport, *, old: int, new: int, unlabelled: bool, all_fail: bool) -> VerifyReport:
    """A report with many classes, and checks with long words."""
    confusion = np.eye(old + new, dtype=int) * 100
    confusion[1:, 0] = np.arange(1, old + new)
    names = [f"class {number}" for number in range(old + new)]
    classes = tuple(
        ClassScore(name, int(number >= old), number < old, 100, 0.9 - 0.01 * number, 0.9 if number < old else None)
        for number, name in enumerate(names)
    )
    assert report.scores is not None
    scores = msgspec.structs.replace(
        report.scores,
        classes=classes,
        metrics=score(confusion, names, old_count=old, background=None, images=9),
        miou_old=0.8,
        parent_miou_old=0.9,
    )
    seen = tuple(
        UnlabelledClass(name, 1000, 9, 9, 0.9 - 0.01 * number, None, 0.1, 0.8 - 0.01 * number)
        for number, name in enumerate(names[:old])
    )
    checks = tuple(
        msgspec.structs.replace(check, verdict="failed", exit_code=1, detail="the reason is long " * 20)
        if all_fail
        else check
        for check in report.checks
    )
    others = Unlabelled("f", 9, 9, 9, "", (), seen, 0.8, 0.1) if unlabelled else None
    return msgspec.structs.replace(report, scores=scores, unlabelled=others, checks=checks)


@pytest.fixture(scope="module")
def forgotten(forgetful: tuple[Path, Path], images: Path) -> VerifyReport:
    return verify_here(forgetful, images)


@pytest.mark.parametrize(("old", "new"), [(16, 5), (20, 1), (1, 20), (10, 11), (150, 50)])
@pytest.mark.parametrize("unlabelled", [False, True])
@pytest.mark.parametrize("all_fail", [False, True])
def test_a_report_of_many_classes_fits_on_one_screen(
    old: int, new: int, unlabelled: bool, all_fail: bool, forgotten: VerifyReport
) -> None:
    report = large_report(forgotten, old=old, new=new, unlabelled=unlabelled, all_fail=all_fail)
    for width in (100, 140):
        lines = lines_of(msgspec.structs.replace(report, bundle=BundleFacts("b"), parent=BundleFacts("p")), width)
        assert len(lines) <= 50
        assert max(map(len, lines)) <= width
        text = "\n".join(lines)
        assert all(re.search(f"^{re.escape(name)} ", text, re.MULTILINE) for name in CHECKS)
        assert re.search(r"^and \d+ more: --json or --out", text, re.MULTILINE)
        assert f"class {old - 1} " in text  # it lost most
        assert f"class {old + new - 1} " in text  # new, and the weakest
        assert "forgot too much" in text


def test_the_classes_that_are_left_out_are_counted(forgotten: VerifyReport) -> None:
    lines = lines_of(large_report(forgotten, old=16, new=5, unlabelled=False, all_fail=False))
    shown = [line for line in lines if re.match(r"class \d+ +(old|new)", line)]
    assert [line.split()[1] for line in shown] == [*map(str, range(15, 7, -1)), *map(str, range(16, 21))]
    assert "and 8 more: --json or --out" in "\n".join(lines)


def test_what_did_not_pass_is_told_in_full_and_the_gravest_first(forgetful: tuple[Path, Path], images: Path) -> None:
    limits = Limits(max_class_drop_pct=5.0, max_old_miou_drop_pct=2.0)
    report = verify_here(forgetful, images, limits=limits)
    text = " ".join(" ".join(lines_of(report)).split())
    assert f"old mIoU drop: {report.check('old mIoU drop').detail}" in text
    assert f"old class drop: {report.check('old class drop').detail}" in text


def test_classes_without_labels_are_shown_the_least_agreement_first(forgetful: tuple[Path, Path], images: Path) -> None:
    report = verify_bundle(forgetful[0], FAST, against=forgetful[1], unlabelled=images / "images")
    lines = lines_of(report)
    start = next(number for number, line in enumerate(lines) if line.startswith("class, without labels"))
    assert [line.split()[0] for line in lines[start + 2 : start + 5]] == ["grass", "background", "apple"]
    assert report.unlabelled is not None
    grass = {item.name: item for item in report.unlabelled.classes}["grass"]
    assert lines[start + 2].split() == ["grass", str(grass.parent_pixels), "0.0", "-", "0.0", "0.0"]
