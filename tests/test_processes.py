"""Two processes learn what one does: gloo on a CPU, started by torchrun as on several machines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from edge_ilseg.errors import TrainingError
from edge_ilseg.processes import Layout, gather_rows, mean_over_processes, process_count, process_layout

WORKER = Path(__file__).with_name("train_worker.py")
ITERATIONS, BATCH_SIZE = 20, 4
METHODS = (*("kd-output", "kd-similarity", "plop", "freeze+balanced", "kd-output/train"),)
TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of what one process has learned and of what two have."""
    folders = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    # A bucket's strides in an axis of length 1 may differ from a gradient's, which torch warns of and copes with.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for folder, launcher in zip(folders, ([], torchrun), strict=True):
        command = [sys.executable, *launcher, str(WORKER), str(folder), "samples", *METHODS]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, done.stderr
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_learn_what_one_does(results: tuple[Path, Path], method: str) -> None:
    one, two = (load_file(folder / f"{method.replace('/', '-')}.safetensors") for folder in results)
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_logged_losses_are_those_of_the_whole_batch(results: tuple[Path, Path], method: str) -> None:
    one, two = (json.loads((folder / f"{method.replace('/', '-')}.json").read_text()) for folder in results)
    assert two == pytest.approx(one, rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_each_sample_is_seen_by_one_process_once_and_in_the_batch_of_one_process(results: tuple[Path, Path]) -> None:
    (whole,) = (json.loads(path.read_text()) for path in results[0].glob("samples-*.json"))
    parts = [json.loads(path.read_text()) for path in sorted(results[1].glob("samples-*.json"))]
    assert len(parts) == 2
    assert whole == [list(range(k, k + BATCH_SIZE)) for k in range(0, ITERATIONS * BATCH_SIZE, BATCH_SIZE)]
    assert [sorted(first + second) for first, second in zip(*parts, strict=True)] == whole


def test_torchrun_says_how_many_processes_there_are_and_where() -> None:
    assert process_layout(1, TORCHRUN) == Layout(devices=2, nodes=2)
    assert process_layout(2, TORCHRUN).processes == 4
    assert process_layout(3, {}) == Layout(devices=3, nodes=1)


def test_another_number_of_devices_than_torchrun_has_started_is_refused() -> None:
    with pytest.raises(TrainingError, match="another number of processes"):
        process_layout(3, TORCHRUN)


def test_with_one_process_nothing_is_exchanged() -> None:
    value = torch.rand(2, requires_grad=True)
    assert process_count() == 1
    assert gather_rows(value) is value
    assert mean_over_processes(value) is value
