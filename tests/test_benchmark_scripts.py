"""What the scripts of `benchmarks/` measure and judge, on bundles that are known exactly."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_scripts import load_benchmark
from bundles import BASE_COUNT, grown_model, write_color_folder, write_family
from fakes import HEIGHT_PX, WIDTH_PX

from edge_ilseg.bundle import read_manifest
from edge_ilseg.data.folder import Folder
from edge_ilseg.devices.evaluation import OldCounts
from edge_ilseg.devices.limits import Limits
from edge_ilseg.devices.loaded_bundle import load_bundle
from edge_ilseg.devices.verification import VerifyRequest

device_start = load_benchmark("device_start")
planted = load_benchmark("planted_regressions")
verify_memory = load_benchmark("verify_memory")
verify_pipeline = load_benchmark("verify_pipeline")

LIMITS = Limits(max_old_miou_drop_pct=2.0, max_class_drop_pct=30.0)


# planted regressions


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(write_color_folder(tmp_path_factory.mktemp("data") / "colors", count=40))


def judged(folder: Path, images: Folder, count: int, forget: str | None) -> tuple[str, str, str]:
    """Verdict on the mean, verdict on the worst class, the printed row."""
    child, parent = write_family(folder, forget=forget)
    request = VerifyRequest(max_images=count, latency_runs=1, threads=1, limits=LIMITS, with_evidence=False)
    found = planted.judge(child, parent, images, request)
    return found.mean.verdict, found.worst.verdict, found.row()


def test_a_class_that_was_spoilt_is_refused_by_its_name(images: Folder, tmp_path: Path) -> None:
    mean, worst, row = judged(tmp_path, images, 40, "grass")
    assert (mean, worst) == ("failed", "failed")
    assert "grass" in row


def test_a_bundle_in_which_nothing_changed_passes(images: Folder, tmp_path: Path) -> None:
    mean, worst, row = judged(tmp_path, images, 40, None)
    assert (mean, worst) == ("passed", "passed")
    assert "0.00 to 0.00" in row


def test_a_few_images_are_never_enough_to_pass(images: Folder, tmp_path: Path) -> None:
    mean, worst, row = judged(tmp_path, images, 3, None)
    assert {mean, worst} == {"too few images"}
    assert row


def test_a_lowered_class_is_seen_nowhere_and_the_others_are_where_they_were() -> None:
    model, spoilt = grown_model(2), grown_model(2)
    channel = BASE_COUNT - 1
    planted.lower(spoilt, [channel])
    with torch.no_grad():
        image_NCHW = (torch.rand(2, 3, HEIGHT_PX, WIDTH_PX, generator=torch.Generator().manual_seed(0)) - 0.5) * 2
        before_NCHW, after_NCHW = model(image_NCHW).logits_NCHW, spoilt(image_NCHW).logits_NCHW
    others = [item for item in range(before_NCHW.shape[1]) if item != channel]
    torch.testing.assert_close(after_NCHW[:, others], before_NCHW[:, others])
    torch.testing.assert_close(after_NCHW[:, channel], before_NCHW[:, channel] + planted.NEVER)


# from files to scores


def test_the_long_run_scores_so_many_images_and_looks_at_the_memory_ten_times(images: Folder, tmp_path: Path) -> None:
    child, _ = write_family(tmp_path)
    manifest = read_manifest(child)
    session = load_bundle(child, manifest, "onnxruntime", "fp32", 1).session
    memory_mib, kept = verify_pipeline.long_run(session, images, images.ids("test")[:7], manifest, 30)
    assert [done for done, _ in memory_mib] == list(range(3, 31, 3))
    assert all(mib > 10 for _, mib in memory_mib)
    assert len(kept.latencies_ms) == len(kept.old_counts.true_NK) == 30


@pytest.mark.parametrize("class_count", [21, 151])
def test_of_an_image_an_evaluation_keeps_three_numbers_a_class_and_no_confusion_matrix(class_count: int) -> None:
    confusion = np.random.default_rng(0).integers(0, 100, (class_count, class_count))
    counts = OldCounts.empty(50, class_count - 1)
    for place in range(50):
        counts.put(place, confusion)
    found = verify_pipeline.Evaluation(confusion, (), counts.first(40), [1.5] * 40)
    numbers_bytes = 3 * 4 * (class_count - 1)
    assert 50 * numbers_bytes < verify_pipeline.kept_bytes(found) < 50 * (numbers_bytes + 60)


def test_the_own_tool_of_openvino_runs_the_very_file_and_one_that_is_none_ends_it(tmp_path: Path) -> None:
    child, _ = write_family(tmp_path, models=(("openvino", "fp32"),))
    model = child / read_manifest(child).models[0].files[0]
    assert verify_pipeline.own_tool(model, "throughput", 1) > 0
    model.write_text("<net/>")
    with pytest.raises(SystemExit, match="benchmark_app ended with"):
        verify_pipeline.own_tool(model, "throughput", 1)


# memory of whole commands


def test_so_many_images_are_those_of_the_data_again_and_again_and_every_command_runs_over_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    child, parent = write_family(tmp_path)
    data = write_color_folder(tmp_path / "colors", count=40)
    images = Folder(data)
    source = verify_memory.write_source(images, "test", tmp_path / "source")
    verify_memory.write_links(source, tmp_path / "95", 95)
    found = Folder(tmp_path / "95")
    ids = found.ids("all")
    assert len(ids) == len(set(ids)) == 95
    shown = [found.read_labels(image_id) for image_id in ids]
    originals = sorted(str(number) for number in range(40))
    for number, labels_HW in enumerate(shown):
        np.testing.assert_array_equal(labels_HW, images.read_labels(images.ids("test")[int(originals[number % 40])]))
    words = [str(child), "--against", str(parent), "--data", f"folder:{data}", "--few", "20", "--many", "60"]
    monkeypatch.setattr(sys, "argv", ["verify_memory.py", *words])
    verify_memory.main()
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row[:24].strip() for row in rows] == [name for name in verify_memory.commands(child, parent) for _ in "ab"]
    assert [int(row[24:].split()[0]) for row in rows] == [20, 60] * 3
    assert all(20 < float(row[24:].split()[1]) < 2000 for row in rows)
    with pytest.raises(SystemExit, match="ended with 3"):
        verify_memory.cost_of(["verify", str(tmp_path / "nothing"), "--json"])


# the start


def test_commands_take_turns_and_the_first_round_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def cost_of(command: list[str]) -> object:
        asked.append(tuple(command[1:]))
        return device_start.Cost(1.0, 0.02 * len(asked))

    monkeypatch.setattr(device_start, "cost_of", cost_of)
    costs = device_start.measure(2)
    assert asked == list(device_start.COMMANDS.values()) * 3
    assert all(len(found) == 2 for found in costs.values())
    head, first, *others = device_start.rows(costs)
    assert "CPU, s" in head
    assert first.split()[-1] == "1.0"
    assert len(others) == len(device_start.COMMANDS) - 1


def test_the_cost_of_a_process_is_its_own() -> None:
    busy = "import time; end = time.process_time() + 0.2\nwhile time.process_time() < end: pass"
    found = device_start.cost_of([sys.executable, "-c", busy])
    assert 0.2 <= found.cpu_s < 2.0
    assert found.wall_s >= 0.2
    with pytest.raises(device_start.subprocess.CalledProcessError):
        device_start.cost_of([sys.executable, "-c", "raise SystemExit(1)"])
