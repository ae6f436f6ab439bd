"""A killed run goes on where it was, to the bit (rules of edge_ilseg/training_state.py)."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import edge_ilseg.train
from edge_ilseg.checkpoint import StepRecord
from edge_ilseg.config import ClassesConfig, Config, DataConfig, StepConfig, TrainConfig
from edge_ilseg.data.loader import training_batches
from edge_ilseg.data.shapes import Shapes
from edge_ilseg.data.step_view import StepView
from edge_ilseg.errors import EdgeIlsegError, NotFiniteError, WorkspaceError
from edge_ilseg.models.segmentation import build_model
from edge_ilseg.models.spec import ModelSpec
from edge_ilseg.pipeline import run_plan
from edge_ilseg.planning import plan_base, plan_step
from edge_ilseg.scenario import label_lookup
from edge_ilseg.schedule import Schedule
from edge_ilseg.train import make_optimizer
from edge_ilseg.training_log import read_training_log
from edge_ilseg.training_state import (
    STATE_NAME,
    StateKeeper,
    TrainingState,
    capture_tensors,
    new_header,
    read_state,
    restore_tensors,
    training_folder,
)
from edge_ilseg.tuning import FIXED, Timing, Tuning
from edge_ilseg.workspace import Workspace, create_workspace

DATA = DataConfig("shapes", options={"train": 40, "val": 2, "test": 2, "height_px": 32, "width_px": 32})
SPEC = ModelSpec(backbone="tiny", decoder_channels=8, input_height_px=32, input_width_px=32)
BASE = ("disk", "square", "ring", "cross", "bar", "crescent", "triangle")
CONFIG = Config(
    data=msgspec.structs.replace(DATA, setup="disjoint"),
    classes=ClassesConfig(BASE),
    model=SPEC,
    weights="none",
    train=TrainConfig(iterations=7, batch_size=2, learning_rate=0.02),
    step=StepConfig(iterations=7, batch_size=2, learning_rate=0.01),
)


class Killed(BaseException):
    """In the place of a kill, where a process of its own would only take longer."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with step 0; never written to by a test."""
    workspace = create_workspace(tmp_path_factory.mktemp("state") / "work", CONFIG)
    run_plan(workspace, plan_base(workspace), accelerator="cpu")
    return workspace


@pytest.fixture
def workspace(base: Workspace, tmp_path: Path) -> Workspace:
    shutil.copytree(base.root, tmp_path / "work")
    return Workspace(tmp_path / "work", base.config)


class Run:
    """The same command again and again, in one workspace."""

    def __init__(self, workspace: Workspace, **settings: object) -> None:
        self.workspace = workspace
        self.settings = msgspec.structs.replace(CONFIG.step, **settings)
        self.said: list[str] = []

    def __call__(self, **options: object) -> StepRecord:
        plan = plan_step(self.workspace, ["star"], self.settings)
        how = {"checkpoint_seconds": 0.0, **options}
        return run_plan(self.workspace, plan, accelerator="cpu", say=self.said.append, **how)  # type: ignore[arg-type]

    @property
    def folder(self) -> Path:
        return training_folder(self.workspace.step_folder("01-star"))

    def killed(self, monkeypatch: pytest.MonkeyPatch, writes: int, **options: object) -> None:
        """Run until the checkpoint has been written so many times more, and no further."""
        write, count = StateKeeper.write, 0

        def stop(keeper: StateKeeper, state: TrainingState) -> None:
            nonlocal count
            write(keeper, state)
            count += 1
            if count == writes:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(StateKeeper, "write", stop)
            with pytest.raises(Killed):
                self(**options)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("freeze+kd-output", {}),
        ("plop", {"batch_norm": "train"}),
        ("freeze", {"freeze": "stages:1", "batch_norm": "train"}),
        ("kd-output", {"momentum": 0.0}),
    ],
)
def test_a_run_that_was_stopped_twice_ends_with_the_same_bits(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, settings: dict[str, object]
) -> None:
    other = shutil.copytree(workspace.root, tmp_path / "other")
    expected = Run(Workspace(other, workspace.config), method=method, **settings)()
    run = Run(workspace, method=method, **settings)
    run.killed(monkeypatch, writes=2)
    run.killed(monkeypatch, writes=3)
    with monkeypatch.context() as patch:  # what was measured once is in the checkpoint
        patch.setattr("edge_ilseg.pseudo_labels.entropy_thresholds", lambda *_: pytest.fail("measured again"))
        found = run()
    assert run.said == ["training goes on from iteration 2", "training goes on from iteration 5"]
    assert found.weights_sha256 == expected.weights_sha256
    assert found.metrics == expected.metrics
    assert found.training == expected.training
    logs = [read_training_log(place.step_folder("01-star")) for place in (workspace, Workspace(other, CONFIG))]
    for ours, theirs in zip(*logs, strict=True):
        assert ours["iteration"] == theirs["iteration"]
    assert sorted(path.name for path in workspace.steps_folder.iterdir()) == ["00-base", "01-star"]


def test_step_0_goes_on_as_well(base: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = create_workspace(tmp_path / "work", CONFIG)

    def stop(keeper: StateKeeper, state: TrainingState) -> None:
        write(keeper, state)
        raise Killed

    write = StateKeeper.write
    with monkeypatch.context() as patch:
        patch.setattr(StateKeeper, "write", stop)
        plan = plan_base(workspace)
        with pytest.raises(Killed):
            run_plan(workspace, plan, accelerator="cpu", checkpoint_seconds=0)
    assert workspace.step_names() == ()
    found = run_plan(workspace, plan_base(workspace), accelerator="cpu")
    assert found.weights_sha256 == base.read_step("0").weights_sha256


def test_what_is_frozen_is_not_in_the_checkpoint(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(workspace, freeze="stages:2")
    run.killed(monkeypatch, writes=1)
    state = read_state(run.folder / STATE_NAME)
    names = {name.removeprefix("model.") for name in state.tensors if name.startswith("model.")}
    assert {name.split(".")[0] for name in names} == {"encoder", "decoder"}
    assert all(name.startswith(("encoder.stages.2.", "decoder.")) for name in names)
    assert state.header.iteration == 1
    assert set(path.name for path in run.folder.iterdir()) == {STATE_NAME}


def test_another_plan_of_the_same_name_starts_anew_and_says_so(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Run(workspace, learning_rate=0.02).killed(monkeypatch, writes=2)
    run = Run(workspace)
    other = Run(Workspace(shutil.copytree(workspace.root, tmp_path / "other"), CONFIG))
    shutil.rmtree(other.folder)
    assert run().weights_sha256 == other().weights_sha256
    assert len(run.said) == 1
    assert run.said[0].startswith("training starts anew: ")
    assert "other settings, data or packages" in run.said[0]
    assert other.said == []
    assert not run.folder.exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "another version", "another network"])
def test_a_checkpoint_that_cannot_be_used_is_left_and_named(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    run = Run(workspace)
    run.killed(monkeypatch, writes=1)
    path = run.folder / STATE_NAME
    data = path.read_bytes()
    if damage == "another network":
        state = read_state(path)
        keeper = StateKeeper(run.folder, state.header.plan)
        keeper.write(TrainingState(state.header, {**state.tensors, "model.more": torch.zeros(1)}))
        with pytest.raises(WorkspaceError, match="of another network"):
            run()
        return
    newer = data.replace(b'\\"format_version\\":1', b'\\"format_version\\":7')
    assert newer != data
    path.write_bytes({"cut": data[:-1], "empty": b"", "another version": newer}[damage])
    run()
    assert len(run.said) == 1
    assert run.said[0].startswith("training starts anew, the checkpoint cannot be used: ")


def test_a_loss_that_is_not_finite_takes_its_checkpoint_along(workspace: Workspace) -> None:
    run = Run(workspace, learning_rate=1e30, method="finetune")
    with pytest.raises(NotFiniteError):
        run()
    assert [path.name for path in workspace.steps_folder.iterdir()] == ["00-base"]


def test_a_short_run_leaves_no_checkpoint_behind(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StateKeeper, "write", lambda *_: pytest.fail("written"))
    Run(workspace)(checkpoint_seconds=3600.0)


def make_state(iteration: int, fill: float, count: int = 1000) -> TrainingState:
    header = new_header(iteration, Schedule(9), 1.5, {}, "iteration\n", FIXED)
    return TrainingState(header, {"model.weight": torch.full((count,), fill)})


def test_a_state_survives_a_round_trip(tmp_path: Path) -> None:
    keeper = StateKeeper(tmp_path / ".01-a.training", "key")
    assert (keeper.found, keeper.first_iteration, keeper.is_due()) == (None, 0, False)
    schedule = Schedule(9).bent(3, 7)
    state = make_state(4, 0.1)
    keeper.write(TrainingState(msgspec.structs.replace(state.header, schedule=schedule), state.tensors))
    again = StateKeeper(keeper.folder, "key", seconds=0)
    assert again.found is not None
    assert again.is_due()
    assert again.first_iteration == 4
    assert again.found.header == msgspec.structs.replace(state.header, schedule=schedule, plan="key")
    assert torch.equal(again.found.tensors["model.weight"], state.tensors["model.weight"])
    keeper.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a small tmpfs cannot be mounted here (it takes root)")
    try:
        keeper = StateKeeper(disk / ".01-a.training", "key")
        keeper.write(make_state(1, 0.5, count=150_000))
        with pytest.raises(EdgeIlsegError, match="the disk is full; nothing that was there before has changed"):
            keeper.write(make_state(2, 0.7, count=150_000))
        assert [path.name for path in keeper.folder.iterdir()] == [STATE_NAME]
        left = shutil.copytree(keeper.folder, tmp_path / "left")  # a tensor that was read holds its file open
        found = StateKeeper(left, "key").found
        assert found is not None
        assert found.header.iteration == 1
        assert torch.equal(found.tensors["model.weight"], torch.full((150_000,), 0.5))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_restored_tensors_are_those_that_were_captured() -> None:
    torch.manual_seed(0)
    model = build_model(SPEC, (3,)).train()
    model.set_frozen("stem")
    optimizer = make_optimizer(model, TrainConfig())

    def learn() -> None:
        optimizer.zero_grad()
        model(torch.randn(2, 3, 32, 32)).logits_NCHW.square().mean().backward()
        optimizer.step()

    learn()
    captured = capture_tensors(model, optimizer, torch.ones(3))
    learn()
    moved = capture_tensors(model, optimizer)
    assert not torch.equal(
        moved["model.decoder.projection.conv.weight"], captured["model.decoder.projection.conv.weight"]
    )
    restore_tensors(model, optimizer, captured)
    again = capture_tensors(model, optimizer, torch.ones(3))
    assert set(again) == set(captured)
    assert any(name.startswith("momentum.encoder.stages") for name in again)
    for name, tensor in captured.items():
        assert torch.equal(again[name], tensor), name


class CountedShapes(Shapes):
    """Generated images that note which were decoded."""

    def __init__(self) -> None:
        super().__init__(train=12, height_px=32, width_px=32)
        self.read: list[str] = []

    def read_image(self, image_id: str) -> NDArray[np.uint8]:
        self.read.append(image_id)
        return super().read_image(image_id)


def test_batches_from_an_iteration_on_are_those_of_the_whole_and_skip_without_decoding() -> None:
    dataset = CountedShapes()
    *old, new = dataset.info.classes
    lookup = label_lookup("sequential", dataset.info.classes, "background", old=old, new=[new])
    view = StepView(dataset, dataset.ids("train"), lookup)
    settings = TrainConfig(iterations=5, batch_size=2)
    whole = list(training_batches(view, SPEC, settings))
    dataset.read.clear()
    rest = list(training_batches(view, SPEC, settings, first_iteration=3))
    assert len(dataset.read) == 4
    for (images, labels), (images_2, labels_2) in zip(whole[3:], rest, strict=True):
        assert torch.equal(images, images_2)
        assert torch.equal(labels, labels_2)


def command(workspace: Path, *more: str) -> list[str]:
    step = ["step", str(workspace), "--add-classes", "star", "--accelerator", "cpu", "--checkpoint-seconds", "0.05"]
    step += ["--tuning", "usual"]
    return [sys.executable, "-m", "edge_ilseg", *step, *more]


def finish(arguments: list[str]) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def kill_at(arguments: list[str], state: Path, delay_s: float) -> int:
    """Start a run, and kill it and its children so long after its next checkpoint.

    Returns the iteration that it left to go on from.
    """
    before = state.stat().st_mtime_ns if state.exists() else 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(arguments, env=environment, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        end = time.monotonic() + 240
        while time.monotonic() < end and process.poll() is None:
            if state.exists() and state.stat().st_mtime_ns != before:
                break
            time.sleep(0.005)
        time.sleep(delay_s)
        os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    return read_state(state).header.iteration


@pytest.mark.slow
def test_five_kills_at_random_moments_change_no_bit(workspace: Workspace, tmp_path: Path) -> None:
    other = shutil.copytree(workspace.root, tmp_path / "other")
    run = ["--iterations", "150", "--method", "plop"]
    finish(command(other, *run))
    moments = random.Random(7)
    state = training_folder(workspace.step_folder("01-star")) / STATE_NAME
    reached = [kill_at(command(workspace.root, *run), state, moments.uniform(0, 0.3)) for _ in range(5)]
    assert reached == sorted(set(reached))
    said = finish(command(workspace.root, *run))
    assert f"training goes on from iteration {reached[-1]}" in said
    found, expected = workspace.read_step("1"), Workspace(other, CONFIG).read_step("1")
    assert found.weights_sha256 == expected.weights_sha256
    assert found.metrics == expected.metrics
    assert sorted(path.name for path in workspace.steps_folder.iterdir()) == ["00-base", "01-star"]


@pytest.mark.slow
def test_two_processes_go_on_from_the_same_iteration(workspace: Workspace, tmp_path: Path) -> None:
    other = shutil.copytree(workspace.root, tmp_path / "other")
    run = ["--iterations", "30", "--batch-size", "4", "--devices", "2", "--learning-rate", "0.0005"]
    finish(command(other, *run))
    state = training_folder(workspace.step_folder("01-star")) / STATE_NAME
    kill_at(command(workspace.root, *run), state, 0.1)
    said = finish(command(workspace.root, *run))
    assert said.count("training goes on from iteration") == 1
    assert workspace.read_step("1").weights_sha256 == Workspace(other, CONFIG).read_step("1").weights_sha256


def test_a_run_goes_on_with_the_memory_format_and_the_threads_that_it_was_begun_with(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = Tuning("contiguous", 1, (Timing("contiguous", 1, 2.5, 3),), 0.5)
    used: list[Tuning] = []
    threads_of = edge_ilseg.train.threads_of

    def noted(tuning: Tuning) -> AbstractContextManager[None]:
        used.append(tuning)
        return threads_of(tuning)

    monkeypatch.setattr("edge_ilseg.train.threads_of", noted)
    run = Run(workspace)
    with monkeypatch.context() as patch:
        patch.setattr("edge_ilseg.tuning.tune_step", lambda *_, **__: begun)
        run.killed(monkeypatch, writes=2, tuning="auto")
    with monkeypatch.context() as patch:
        patch.setattr("edge_ilseg.tuning.tune_step", lambda *_, **__: pytest.fail("measured again"))
        run(tuning="auto")
    assert used == [begun, begun]
    assert run.said[0] == "computed in contiguous, 1 thread; measured in 0.5 s (contiguous 1: 2 ms)"
    assert run.said[1] == "training goes on from iteration 2"
