"""What a report is made of: read from files; what is missing is a sentence, and the user's own mistakes are errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import pytest
from report_world import NEW, make_workspace, verify

from edge_ilseg.devices.verify_report import Check, VerifyReport, encode_report
from edge_ilseg.errors import ReportError, WorkspaceError
from edge_ilseg.report.gather import gather
from edge_ilseg.report.judgement import check_text, judge
from edge_ilseg.report.training_curves import MOST_POINTS, read_curves
from edge_ilseg.workspace import Workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return make_workspace(tmp_path, images=4)


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, VerifyReport]:
    """A workspace and the real report on its step 1. Tests leave it as it is."""
    workspace = make_workspace(tmp_path_factory.mktemp("judged"))
    return workspace, verify(workspace)


def test_the_lineage_goes_from_the_base_to_the_step(workspace: Workspace) -> None:
    found = gather(workspace, None)
    assert [facts.record.name for facts in found.lineage] == ["00-base", "01-step"]
    assert found.step.bundle is not None
    assert found.step.bundle.step.id == found.step.record.id
    assert found.parent is not None
    assert found.parent.record.index == 0
    assert (found.missing, found.passed_over, found.workspace) == ({}, 0, "work")


def test_step_zero_has_no_parent_and_the_later_step_is_another_one(workspace: Workspace) -> None:
    found = gather(workspace, "0")
    assert found.parent is None
    assert [(other.name, other.parent_name) for other in found.others] == [("01-step", "00-base")]


def test_a_parent_that_is_gone_leaves_a_sentence(workspace: Workspace) -> None:
    shutil.rmtree(workspace.step_folder("00-base"))
    found = gather(workspace, None)
    assert [facts.record.name for facts in found.lineage] == ["01-step"]
    assert "before 01-step are left out" in found.missing["lineage"]


def test_a_damaged_bundle_leaves_a_sentence_that_names_the_file(workspace: Workspace) -> None:
    path = workspace.bundle_folder("01-step") / "int8.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    found = gather(workspace, None)
    assert found.step.bundle is None
    assert "int8.onnx" in str(found.step.bundle_problem)


def test_a_bundle_of_another_step_of_that_name_is_not_this_steps(workspace: Workspace) -> None:
    shutil.rmtree(workspace.bundle_folder("01-step"))
    shutil.copytree(workspace.bundle_folder("00-base"), workspace.bundle_folder("01-step"))
    assert "another step" in str(gather(workspace, None).step.bundle_problem)


def test_a_step_that_is_not_there_is_an_error(workspace: Workspace) -> None:
    with pytest.raises(WorkspaceError, match="no such step"):
        gather(workspace, "02-step")


def test_reports_in_the_conventional_places_are_found_once(judged: tuple[Workspace, VerifyReport]) -> None:
    workspace, report = judged
    path = workspace.root / "reports" / "01-step.verify.json"
    found = gather(workspace, None, verify_files=[path])
    assert [item.report for item in found.verifications] == [report]


def test_reports_about_other_steps_and_damaged_ones_are_passed_over_and_counted(workspace: Workspace) -> None:
    verify(workspace, "00-base")
    (workspace.root / "reports" / "broken.json").write_text('{"format": "edge-ilseg-verify-report"}')
    (workspace.root / "reports" / "list.json").write_text("[1]")
    (workspace.root / "reports" / "other.json").write_text('{"format": "something"}')
    found = gather(workspace, "01-step")
    assert (found.verifications, found.passed_over) == ((), 2)


def test_a_named_report_about_another_step_is_an_error(workspace: Workspace, tmp_path: Path) -> None:
    path = tmp_path / "base.json"
    path.write_bytes(encode_report(verify(workspace, "00-base")))
    with pytest.raises(ReportError, match="another step") as error:
        gather(workspace, "01-step", verify_files=[path])
    assert "00-base" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b'{"format": 3}'])
def test_a_named_report_that_cannot_be_read_is_an_error(workspace: Workspace, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(content)
    with pytest.raises(ReportError):
        gather(workspace, None, verify_files=[path])
    with pytest.raises(ReportError):
        gather(workspace, None, bench_files=[path])
    with pytest.raises(ReportError, match="cannot be read"):
        gather(workspace, None, bench_files=[tmp_path / "absent.json"])


# The verdict on top: edge_ilseg/report/judgement.py


def judged_with(
    workspace: Workspace, report: VerifyReport, *, exit_code: int = 0, compared: bool = True, bundle_id: str | None = ""
) -> tuple[str, str]:
    """Kind and text of the verdict when the one report says so."""
    found = gather(workspace, "01-step")
    checks = tuple(
        msgspec.structs.replace(
            check,
            exit_code=exit_code if check.name == "latency p95" else 0,
            verdict="not checked" if check.name == "old mIoU drop" and not compared else "passed",
        )
        for check in report.checks
    )
    bundle = report.bundle if bundle_id == "" else msgspec.structs.replace(report.bundle, bundle_id=bundle_id)
    changed = msgspec.structs.replace(report, checks=checks, exit_code=exit_code, bundle=bundle)
    item = msgspec.structs.replace(found.verifications[0], report=changed)
    banner = judge(msgspec.structs.replace(found, verifications=(item,)))
    return banner.verdict, banner.text


@pytest.mark.parametrize(
    ("exit_code", "expected"),
    [
        (0, ("passed", "May go out")),
        (1, ("failed", "May not go out")),
        (2, ("failed", "May not go out")),
        (3, ("failed", "May not go out")),
        (4, ("undecided", "Not decided")),
    ],
)
def test_the_gravest_report_decides(
    judged: tuple[Workspace, VerifyReport], exit_code: int, expected: tuple[str, str]
) -> None:
    assert judged_with(*judged, exit_code=exit_code) == expected


def test_a_pass_without_a_comparison_with_the_parent_is_no_yes(judged: tuple[Workspace, VerifyReport]) -> None:
    assert judged_with(*judged, compared=False) == ("unknown", "Not judged yet")


def test_a_report_about_another_bundle_does_not_count(judged: tuple[Workspace, VerifyReport]) -> None:
    assert judged_with(*judged, bundle_id="f" * 64) == ("unknown", "Not judged yet")


def test_the_broken_limit_is_named_with_value_interval_and_limit(judged: tuple[Workspace, VerifyReport]) -> None:
    workspace, report = judged
    banner = judge(gather(workspace, None))
    drop = report.check("old mIoU drop")
    assert banner.text == "May not go out"
    assert f"{drop.value:.4g} points" in banner.reasons[0]
    assert f"{drop.low:.1f} to {drop.high:.1f}" in banner.reasons[0]
    assert "the limit is 2" in banner.reasons[0]


def test_too_few_images_say_so_beside_a_value_that_keeps_its_limit() -> None:
    detail = "3 images show an old class, and 20 are needed; least: a 99.0 %"
    check = Check("unlabelled agreement", "too few images", detail, 99.5, 55.0, "%", 4)
    assert check_text(check) == f"unlabelled agreement: 99.5 %; the limit is 55; {detail}"


def test_without_a_report_nobody_has_judged(workspace: Workspace) -> None:
    banner = judge(gather(workspace, None))
    assert (banner.verdict, banner.text) == ("unknown", "Not judged yet")
    assert NEW not in banner.sentence
    assert "edge-ilseg verify" in banner.reasons[0]


# Training curves


def test_curves_are_read_where_they_are_and_nowhere_else(tmp_path: Path) -> None:
    assert read_curves(tmp_path) is None
    path = tmp_path / "training.csv"
    for nothing in ("", "iteration,loss\n", "a,b\nx,y\n", "\x00", "iteration,loss\n1,nan\n"):
        path.write_text(nothing)
        assert read_curves(tmp_path) is None, nothing
    rows = [f"{number},{1 / number},,inf,0.5" for number in range(1, 1001)]
    path.write_text("\n".join(["iteration,kd_output,encoder_rate,images_per_s,miou_all", *rows]))
    curves = read_curves(tmp_path)
    assert curves is not None
    (column,) = curves.columns
    assert curves.losses == (column,)
    assert (column.name, curves.rows) == ("kd_output", 1000)
    assert len(column.values) == MOST_POINTS
    assert column.values[0] == pytest.approx(sum(1 / number for number in range(1, 6)) / 5)


def test_a_bench_report_of_the_lineage_is_shown(workspace: Workspace) -> None:
    from edge_ilseg.devices.bench import bench_bundles
    from edge_ilseg.devices.bench_report import encode_bench
    from edge_ilseg.report.deployment import devices_section

    report = bench_bundles([workspace.bundle_folder("01-step")], precision="int8", rounds=1, runs=2)
    (workspace.root / "reports").mkdir()
    (workspace.root / "reports" / "bench.json").write_bytes(encode_bench(report))
    found = gather(workspace, None)
    assert [item.report for item in found.benchmarks] == [report]
    section = devices_section(found)
    summary = report.models[0].summary
    assert summary is not None
    text = json.dumps(msgspec.to_builtins(section.blocks[-1]))
    assert "onnxruntime int8" in text
    assert f"{summary.frames_per_s:.0f}"[:1] in text
