"""What a step will take: arithmetic by hand, a probe of the real loop, and an estimate beside a real export."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from edge_ilseg.checkpoint import load_model
from edge_ilseg.cli.plan_table import duration, forecast_rows, print_forecast
from edge_ilseg.config import ClassesConfig, Config, DataConfig, StepConfig, TrainConfig
from edge_ilseg.data import loader, open_data
from edge_ilseg.errors import TrainingError
from edge_ilseg.export.request import ExportRequest
from edge_ilseg.forecast import (
    MEASURED,
    Forecast,
    Probe,
    TimedSamples,
    forecast_plan,
    forecast_step,
    memory_bytes,
    training_seconds,
    untouched_random_state,
)
from edge_ilseg.models.segmentation import SegmentationModel, build_model
from edge_ilseg.models.spec import ModelSpec
from edge_ilseg.pipeline import export_step, run_plan
from edge_ilseg.planning import StepPlan, plan_base, plan_step
from edge_ilseg.terms import StepFacts
from edge_ilseg.update_estimate import estimate_update
from edge_ilseg.workspace import Workspace, create_workspace

SPEC = ModelSpec(backbone="tiny", decoder_channels=64, input_height_px=48, input_width_px=48)
DATA = DataConfig("shapes", options={"train": 40, "val": 6, "test": 4, "height_px": 48, "width_px": 48})
PROBE = Probe("cpu", (0.1, 0.3, 0.2), 0.01, 0.001, decoded_image_bytes=1000, peak_bytes=50_000)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Step 0, quickly trained."""
    names = open_data(DATA).info.classes[1:]
    train = TrainConfig(iterations=2, batch_size=2)
    config = Config(DATA, ClassesConfig(names[:-2]), SPEC, "none", train, StepConfig(iterations=3, batch_size=2))
    made = create_workspace(tmp_path_factory.mktemp("forecast") / "work", config)
    run_plan(made, plan_base(made), accelerator="cpu")
    return made


def networks(workspace: Workspace, plan: StepPlan) -> tuple[SegmentationModel, SegmentationModel]:
    assert plan.parent is not None
    folder = workspace.step_folder(plan.parent.name)
    model, teacher = load_model(folder, plan.parent), load_model(folder, plan.parent)
    model.grow(len(plan.classes) - plan.old_count)
    return model, teacher


def plan_new(workspace: Workspace, **settings: object) -> StepPlan:
    new = open_data(DATA).info.classes[-1]
    step = msgspec.structs.replace(workspace.config.step, **settings)
    return plan_step(workspace, [new], step, parent_name="00-base")


def forecast(
    workspace: Workspace, plan: StepPlan, made: tuple[SegmentationModel, SegmentationModel] | None = None
) -> Forecast:
    if made is None:
        return forecast_plan(workspace, plan, accelerator="cpu")
    return forecast_step(plan, *made, StepFacts(plan.old_count, plan.background_channel), accelerator="cpu")


def test_training_time_is_that_of_the_iterations_and_of_making_their_batches() -> None:
    settings = TrainConfig(iterations=100, batch_size=8)
    assert training_seconds(PROBE, settings, 50) == pytest.approx(100 * 0.2 + 50 * 0.01 + 750 * 0.001)
    assert training_seconds(PROBE, settings, 50, devices=2) == pytest.approx(100 * 0.2 + 50 * 0.01 + 350 * 0.001)
    assert training_seconds(PROBE, settings, 5000) == pytest.approx(100 * 0.2 + 800 * 0.01)


def test_with_workers_the_slower_of_computing_and_making_decides() -> None:
    settings = TrainConfig(iterations=100, batch_size=8)
    assert training_seconds(PROBE, settings, 800, workers=2) == pytest.approx(100 * 0.2)
    slow = msgspec.structs.replace(PROBE, new_image_s=1.0)
    assert training_seconds(slow, settings, 800, workers=2) == pytest.approx(800 * 1.0 / 2)


def test_with_cached_features_only_the_iterations_that_fill_the_cache_cost_what_the_others_do() -> None:
    settings = TrainConfig(iterations=100, batch_size=8, augment_views=2)
    cached = msgspec.structs.replace(PROBE, cached_iteration_s=0.05)
    filling = 13  # of 100 views, in batches of 8
    expected = filling * 0.2 + 50 * 0.01 + (filling * 8 - 50) * 0.001 + (100 - filling) * 0.05
    assert training_seconds(cached, settings, 50) == pytest.approx(expected)
    assert training_seconds(cached, settings, 800) == training_seconds(PROBE, settings, 800)


def test_images_that_do_not_fit_into_memory_are_decoded_again() -> None:
    settings = TrainConfig(iterations=100, batch_size=8)
    large = msgspec.structs.replace(PROBE, decoded_image_bytes=2 * loader.DECODED_CACHE_BYTES // 100)
    assert training_seconds(large, settings, 100) == pytest.approx(20 + 100 * 0.01 + 700 * (0.01 + 0.001) / 2)


def test_memory_is_the_peak_and_on_a_cpu_the_decoded_images_too() -> None:
    assert memory_bytes(PROBE, 7) == 50_000 + 7 * 1000
    assert memory_bytes(PROBE, 10**9) == 50_000 + loader.DECODED_CACHE_BYTES
    assert memory_bytes(msgspec.structs.replace(PROBE, device="cuda:0"), 7) == 50_000
    assert memory_bytes(msgspec.structs.replace(PROBE, peak_bytes=None), 7) is None


def test_an_iteration_lasts_from_its_first_image_to_the_next_iteration_without_the_making() -> None:
    samples = TimedSamples([], 4)  # type: ignore[arg-type]
    samples.asked, samples.seconds = [10.0, 11.0, 20.0, 21.0], [1.0, 2.0, 1.0, 1.0]
    assert samples.iteration_seconds(2, ended=27.0) == (10.0 - 3.0, 7.0 - 2.0)


def test_a_forecast_counts_what_can_be_counted(workspace: Workspace) -> None:
    plan = plan_new(workspace, iterations=60)
    found = forecast(workspace, plan)
    model, _ = networks(workspace, plan)
    decoder = sum(parameter.numel() for parameter in model.decoder.parameters())
    encoder = sum(parameter.numel() for parameter in model.encoder.parameters())
    assert (found.trainable_parameters, found.frozen_parameters) == (decoder, encoder)
    assert (found.images, found.iterations, found.epochs) == (len(plan.view), 60, 120 / len(plan.view))
    assert len(found.probe.iteration_s) == MEASURED
    assert found.scored_images == 6
    assert found.scoring_s == pytest.approx(2 * 6 * found.probe.scored_image_s)
    assert min(found.preparing_s, found.training_s, found.scoring_s, found.memory_bytes or 0) > 0


def test_a_forecast_writes_nothing_and_leaves_every_generator_as_it_was(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    before = sorted((path, path.stat().st_mtime_ns) for path in workspace.root.rglob("*"))
    plan = plan_new(workspace)
    made = networks(workspace, plan)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    forecast(workspace, plan, made)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
    assert "PL_GLOBAL_SEED" not in os.environ
    assert sorted((path, path.stat().st_mtime_ns) for path in workspace.root.rglob("*")) == before


def test_the_random_state_is_put_back_after_an_error_too() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    with pytest.raises(ZeroDivisionError), untouched_random_state():
        torch.rand(7).tolist()[0] / 0
    assert torch.equal(torch.rand(1), expected)


def test_a_method_with_pseudo_labels_is_forecast_with_its_thresholds(workspace: Workspace) -> None:
    data = msgspec.structs.replace(DATA, setup="overlapped")
    step = msgspec.structs.replace(workspace.config.step, method="plop")
    plan = plan_step(workspace, [open_data(DATA).info.classes[-1]], step, data=data, parent_name="00-base")
    found = forecast(workspace, plan)
    assert found.probe.threshold_image_s > 0
    assert found.preparing_s >= found.images * found.probe.threshold_image_s


def test_a_batch_that_cannot_be_divided_is_refused_in_a_forecast_too(workspace: Workspace) -> None:
    plan = plan_new(workspace)
    with pytest.raises(TrainingError, match="cannot be divided"):
        forecast_step(plan, *networks(workspace, plan), StepFacts(plan.old_count), accelerator="cpu", devices=3)


@pytest.mark.slow
@pytest.mark.parametrize("freeze", ["encoder", "all_but_head"])
def test_step_and_update_sizes_are_near_those_of_a_real_step_and_its_bundle(workspace: Workspace, freeze: str) -> None:
    request = ExportRequest(precisions=("int8",), max_old_drop_points=None, golden_count=2)
    base = workspace.bundle_folder("00-base")
    if not base.exists():
        export_step(workspace, workspace.read_step("00-base"), request, base, calibration_count=4)
    new = open_data(DATA).info.classes[-1]
    settings = msgspec.structs.replace(workspace.config.step, method="kd-output", freeze=freeze)
    plan = plan_step(workspace, [new], settings, parent_name="00-base", name=f"freeze-{freeze}")
    found = forecast(workspace, plan)
    record = run_plan(workspace, plan, accelerator="cpu")
    manifest = export_step(workspace, record, request, workspace.bundle_folder(record.name), calibration_count=4)
    assert manifest.int8 is not None
    real = {row.runtime: row.changed_bytes for row in manifest.int8.delta}
    assert set(real) == {"onnxruntime", "openvino"}
    for runtime, size in real.items():
        assert size / 1.25 < found.update.changed_bytes[runtime] < size * 1.25, (runtime, real, found.update)
    on_disk = sum(path.stat().st_size for path in workspace.step_folder(record.name).iterdir())
    assert found.step_bytes == pytest.approx(on_disk, rel=0.02)


def test_the_less_is_trained_the_smaller_the_update() -> None:
    sizes = []
    for freeze in ("none", "stages:1", "encoder", "all_but_head"):
        model = build_model(SPEC, (3, 1))
        model.set_frozen(freeze)
        sizes.append(estimate_update(model, is_first=False).changed_bytes["onnxruntime"])
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4


def test_at_step_0_every_layer_is_new() -> None:
    found = estimate_update(build_model(SPEC, (3,)), is_first=True)
    assert found.changed_bytes["onnxruntime"] == found.parameter_bytes


def test_a_forecast_is_printed_for_people_and_for_programs(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    found = forecast(workspace, plan_new(workspace))
    print_forecast(found, as_json=True)
    plain = json.loads(capsys.readouterr().out)
    assert plain["total_s"] == pytest.approx(plain["preparing_s"] + plain["training_s"] + plain["scoring_s"])
    assert msgspec.convert({key: value for key, value in plain.items() if key != "total_s"}, Forecast) == found
    print_forecast(found, as_json=False)
    text = capsys.readouterr().out
    assert "nothing was written" in text
    assert [row[0].strip() for row in forecast_rows(found)] == [
        "images", "iterations", "trainable parameters", "time", "preparing", "training", "scoring", "memory",
        "step on the disk", "update",
    ]  # fmt: skip


def test_a_forecast_with_cached_features_says_what_they_take(workspace: Workspace) -> None:
    few = {"iterations": 200, "batch_size": 2, "method": "freeze+kd-output"}
    found = forecast(workspace, plan_new(workspace, augment_views=2, **few))
    assert found.probe.cached_iteration_s is not None
    assert found.probe.cached_iteration_s > 0
    assert found.cache_bytes > 2 * found.images * SPEC.input_height_px * SPEC.input_width_px  # the labels are kept, too
    rows = {name: text for name, _, text in forecast_rows(found)}
    assert "of features until it is trained" in rows["step on the disk"]
    without = forecast(workspace, plan_new(workspace, **few))
    assert (without.cache_bytes, without.probe.cached_iteration_s) == (0, None)


def test_durations_are_written_as_people_say_them() -> None:
    assert [duration(seconds) for seconds in (4.23, 59.94, 725, 12000)] == [
        "4.2 s", "59.9 s", "12 min 5 s", "3 h 20 min",
    ]  # fmt: skip


def test_the_forecast_does_not_change_what_a_run_learns(workspace: Workspace, tmp_path: Path) -> None:
    """The same plan trained after a forecast in the same process gives the same bits."""
    plan = plan_new(workspace)
    first = run_plan(workspace, plan, accelerator="cpu")
    workspace.step_folder(plan.name).rename(tmp_path / "first")
    forecast(workspace, plan)
    second = run_plan(workspace, plan, accelerator="cpu")
    workspace.step_folder(plan.name).rename(tmp_path / "second")
    assert first.weights_sha256 == second.weights_sha256
