"""What training leaves to look at, and how long it may take (rules of edge_ilseg/training_log.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from edge_ilseg.checkpoint import StepRecord, parse_record, read_record
from edge_ilseg.config import ClassesConfig, Config, DataConfig, StepConfig, TrainConfig
from edge_ilseg.errors import MissingPackageError, WorkspaceError
from edge_ilseg.models.spec import ModelSpec
from edge_ilseg.pipeline import run_plan
from edge_ilseg.planning import plan_base, plan_step
from edge_ilseg.schedule import Schedule, scheduled_rate
from edge_ilseg.training_log import LOG_NAME, TrainingLog, parse_log, read_training_log
from edge_ilseg.workspace import Workspace, create_workspace

DATA = DataConfig("shapes", options={"train": 40, "val": 3, "test": 2, "height_px": 32, "width_px": 32})
CONFIG = Config(
    data=DATA,
    classes=ClassesConfig(("disk", "square", "ring", "cross", "bar", "crescent", "triangle")),
    model=ModelSpec(backbone="tiny", decoder_channels=8, input_height_px=32, input_width_px=32),
    weights="none",
    train=TrainConfig(iterations=23, batch_size=2),
    step=StepConfig(iterations=12, batch_size=2),
)
RATES = {"encoder_rate": 0.1, "decoder_rate": 1.0}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = create_workspace(tmp_path_factory.mktemp("log") / "work", CONFIG)
    run_plan(workspace, plan_base(workspace), accelerator="cpu", tensorboard=workspace.root / "board")
    return workspace


def teach(workspace: Workspace, name: str, **options: object) -> StepRecord:
    plan = plan_step(workspace, ["star"], parent_name="00-base", name=name)
    return run_plan(workspace, plan, accelerator="cpu", **options)  # type: ignore[arg-type]


def test_a_step_has_a_row_every_ten_iterations_and_one_for_its_end(workspace: Workspace) -> None:
    rows = read_training_log(workspace.step_folder("00-base"))
    assert [row["iteration"] for row in rows] == [10, 20, 23]
    assert set(rows[0]) == {
        *("iteration", "loss", "cross_entropy", "encoder_rate", "decoder_rate", "images_per_s"),
        *("miou_old", "miou_new", "miou_all"),
    }
    schedule = Schedule(23)
    for row in rows:
        share = schedule.share(int(row["iteration"] or 0) - 1)
        assert row["encoder_rate"] == pytest.approx(scheduled_rate(0.01, CONFIG.train, share), rel=1e-5)
        assert row["decoder_rate"] == pytest.approx(scheduled_rate(0.1, CONFIG.train, share), rel=1e-5)
        assert row["loss"] == row["cross_entropy"]
        assert (row["images_per_s"] or 0) > 0
    scores = workspace.read_step("0").metrics["val"]
    assert rows[-1]["miou_all"] == pytest.approx(scores.miou_all, rel=1e-5)
    assert [row["miou_all"] for row in rows[:-1]] == [None, None]


def test_a_distilled_step_logs_every_term_and_no_rate_of_what_is_frozen(workspace: Workspace) -> None:
    record = teach(workspace, "distilled")
    rows = read_training_log(workspace.step_folder(record.name))
    assert [row["iteration"] for row in rows] == [10, 12]
    assert {"cross_entropy", "kd_output"} <= set(rows[0])
    assert rows[0]["loss"] == pytest.approx((rows[0]["cross_entropy"] or 0) + (rows[0]["kd_output"] or 0), rel=1e-5)
    assert rows[0]["encoder_rate"] is None
    assert rows[-1]["miou_old"] == pytest.approx(record.metrics["val"].miou_old, rel=1e-5)


def test_a_row_has_the_means_of_the_terms_since_the_row_before() -> None:
    log = TrainingLog()
    wrote = [log.note(k, {"cross_entropy": k, "kd_output": 1.0}, RATES, 7.0, last=k == 12) for k in range(1, 13)]
    assert [k for k, has_row in enumerate(wrote, start=1) if has_row] == [10, 12]
    assert [row["cross_entropy"] for row in log.rows] == [5.5, 11.5]
    assert [row["loss"] for row in log.rows] == [6.5, 12.5]
    assert parse_log(log.text()) == log.rows
    again = TrainingLog()
    again.restore(log.text())
    again.note(20, {"cross_entropy": 3.0, "kd_output": 1.0}, RATES, 7.0, last=True)
    again.score(0.5, None, 0.25)
    assert [row["iteration"] for row in parse_log(again.text())] == [10, 12, 20]
    assert (again.rows[-1]["miou_old"], again.rows[-1]["miou_new"], again.rows[-1]["miou_all"]) == (0.5, None, 0.25)


def test_the_log_is_no_part_of_the_steps_identity(workspace: Workspace) -> None:
    record = teach(workspace, "plain")
    path = workspace.step_folder(record.name) / LOG_NAME
    path.write_text("iteration,loss\n")
    assert read_record(path.parent).id == record.id
    path.unlink()
    assert read_training_log(path.parent) == []
    assert parse_record(msgspec.json.encode(read_record(path.parent))) == record


@pytest.mark.parametrize("text", ["iteration,loss\n1\n", "iteration,loss\n1,x\n", "loss\n1\n", "iteration,loss\n,1\n"])
def test_a_damaged_log_is_named_with_its_line(tmp_path: Path, text: str) -> None:
    (tmp_path / LOG_NAME).write_text(text)
    with pytest.raises(WorkspaceError, match=r"log cannot be read\n.*training.csv, line 2"):
        read_training_log(tmp_path)


def test_reading_a_log_needs_no_torch() -> None:
    code = "import sys; import edge_ilseg.training_log, edge_ilseg.schedule; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_tensorboard_gets_the_rows_under_its_own_names(workspace: Workspace) -> None:
    (events,) = (workspace.root / "board" / "00-base").iterdir()
    data = events.read_bytes()
    assert events.name.startswith("events.out.tfevents")
    for tag in ("loss/total", "loss/cross_entropy", "rate/encoder", "rate/decoder", "speed/images_per_s", "miou/all"):
        assert tag.encode() in data, tag


def test_tensorboard_without_its_package_is_refused_before_training(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(MissingPackageError, match=r"edge-ilseg\[tensorboard\]"):
        teach(workspace, "board", tensorboard=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_budget_shortens_the_run_and_the_record_says_so(workspace: Workspace) -> None:
    settings = msgspec.structs.replace(CONFIG.step, iterations=1_000_000)
    plan = plan_step(workspace, ["star"], settings, parent_name="00-base", name="short")
    record = run_plan(workspace, plan, accelerator="cpu", max_minutes=2 / 60)
    ran = record.training.iterations
    assert 1 <= ran < 1_000_000
    rows = read_training_log(workspace.step_folder(record.name))
    assert rows[-1]["iteration"] == ran
    assert record.id == read_record(workspace.step_folder(record.name)).id
    assert record.training_seconds < 60


def test_a_run_with_fewer_iterations_is_a_run_of_so_many(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = msgspec.structs.replace(CONFIG.step, iterations=9)
    plan = plan_step(workspace, ["star"], settings, parent_name="00-base", name="nine")
    plain = run_plan(workspace, plan, accelerator="cpu")
    monkeypatch.setattr("edge_ilseg.training_loop.iterations_that_fit", lambda *_: 9)
    shortened = teach(workspace, "shortened", max_minutes=60.0)
    assert shortened.training == plain.training
    assert shortened.weights_sha256 == plain.weights_sha256


def test_a_run_within_its_budget_is_the_run_without_one(workspace: Workspace) -> None:
    plain, timed = teach(workspace, "untimed"), teach(workspace, "timed", max_minutes=60.0)
    assert timed.weights_sha256 == plain.weights_sha256
    assert timed.training == plain.training
