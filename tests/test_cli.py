"""The command line as a user meets it: help, typos, missing extras, bad input, an interrupt."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from edge_ilseg import errors
from edge_ilseg.cli import COMMANDS, run
from edge_ilseg.errors import EXIT_CLOSED_PIPE, EXIT_DEFECT, EXIT_INTERRUPTED

OPTIONS = ("train=40", "val=4", "test=4", "height_px=48", "width_px=48")
INIT = ["--dataset", "shapes", "--later-classes", "star,triangle", "--backbone", "tiny", "--size", "48x48"]
INIT += [word for option in OPTIONS for word in ("--option", option)]


def command(*arguments: str, blocked: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, with some modules made impossible to import."""
    block = "".join(f"sys.modules[{name!r}] = None; " for name in blocked)
    code = f"import sys; {block}from edge_ilseg.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    assert run(["init", str(tmp_path / "work"), *INIT]) == 0
    return tmp_path / "work"


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from edge_ilseg.cli import run; run(['--help']); print(sorted(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "verify" in done.stdout
    for module in ("numpy", "torch", "PIL", "rich", "msgspec", "onnx", "onnxruntime", "openvino"):
        assert f"'{module}'" not in done.stderr, module


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A command that raises the built-in exception whose name it is given."""
    code = (
        "import builtins, errno, click\n\n"
        "@click.command()\n@click.argument('name')\n"
        "def broken(name):\n"
        "    raise getattr(builtins, name)(errno.EPIPE if name == 'BrokenPipeError' else errno.EIO, 'words')\n"
    )
    (tmp_path / "broken_command.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(COMMANDS, "broken", ("broken_command", "broken", "Fails."))
    return "broken"


@pytest.mark.parametrize("name", ["ZeroDivisionError", "KeyError", "AssertionError"])
def test_a_defect_has_its_traceback_and_an_exit_code_that_no_verdict_has(
    name: str, broken: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python's own would be 1, and a release engineer would read: the model forgot."""
    assert run([broken, name]) == EXIT_DEFECT == 70
    captured = capsys.readouterr()
    assert "Traceback (most recent call last)" in captured.err
    assert f"\n{name}" in captured.err
    assert "defect of edge-ilseg" in captured.err
    assert captured.out == ""


def test_an_interrupt_is_no_defect(broken: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([broken, "KeyboardInterrupt"]) == EXIT_INTERRUPTED == 130
    assert "Traceback" not in capsys.readouterr().err


def test_somebody_who_reads_no_further_is_no_defect(broken: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([broken, "BrokenPipeError"]) == EXIT_CLOSED_PIPE == 141
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["MemoryError", "PermissionError"])
def test_what_the_machine_refuses_is_no_defect(name: str, broken: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([broken, name]) == 3
    text = capsys.readouterr().err
    assert "this machine did not do what was asked of it" in text
    assert "Traceback" not in text
    assert "words" in text


def test_no_exit_code_has_two_meanings() -> None:
    codes = {name: value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert len(set(codes.values())) == len(codes) == 8


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Usage:" in text
    if name not in ("data", "demo", "device", "scenario", "steps"):
        assert f"edge-ilseg {name} " in text


@pytest.mark.parametrize("words", [("data", "inspect"), ("device", "facts"), ("scenario", "run"), ("scenario", "show")])
def test_every_command_of_a_group_has_help_with_an_example(
    words: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*words, "--help"]) == 0
    assert f"edge-ilseg {' '.join(words)} " in capsys.readouterr().out


def test_the_list_of_commands_and_their_help_agree() -> None:
    import importlib

    for name, (module, attribute, text) in COMMANDS.items():
        assert getattr(importlib.import_module(module), attribute).name == name
        assert text.endswith(".")


def test_a_misspelt_command_gets_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verfy"]) == 3
    assert "did you mean 'verify'" in capsys.readouterr().err


def test_wrong_usage_and_bad_input_exit_with_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["step", "--no-such-option"]) == 3
    assert run(["train", str(tmp_path)]) == 3
    assert "this folder is no workspace" in capsys.readouterr().err
    assert run(["init", str(tmp_path / "w"), "--dataset", "mrsc", "--base-classes", "a"]) == 3
    assert "did you mean 'msrc'" in capsys.readouterr().err
    assert run(["init", str(tmp_path / "w"), *INIT, "--size", "96"]) == 3
    assert "do:       --size 160x112" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (("train",), "train"),
        (("step", "--add-classes", "star"), "train"),
        (("evaluate",), "train"),
        (("export",), "export"),
    ],
)
def test_without_torch_a_command_says_which_extra_is_missing(
    workspace: Path, arguments: tuple[str, ...], extra: str
) -> None:
    name, *rest = arguments
    done = command(name, str(workspace), *rest, blocked=("torch",))
    assert done.returncode == 3
    if name == "evaluate":
        assert "no step yet" in done.stderr or "edge-ilseg[train]" in done.stderr
    else:
        assert f"pip install 'edge-ilseg[{extra}]'" in done.stderr


def test_looking_at_data_needs_no_torch(workspace: Path) -> None:
    done = command("data", "inspect", str(workspace), "--json", blocked=("torch", "onnx", "safetensors"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"][0]["images"] > 0


def test_train_step_evaluate_and_list(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--iterations", "3", "--batch-size", "2", "--accelerator", "cpu"]
    assert run(["train", str(workspace), *quick]) == 0
    assert run(["step", str(workspace), "--add-classes", "star", "--loss", "kd_output=2", *quick, "--json"]) == 0
    record = json.loads(capsys.readouterr().out.split("s of training)\n")[-1])
    assert record["name"] == "01-star"
    assert record["method"]["losses"] == {"kd_output": 2.0}
    assert run(["step", str(workspace), "--add-classes", "triangle", "--method", "finetune", *quick]) == 0
    assert "triangle" in capsys.readouterr().out
    assert run(["evaluate", str(workspace), "--step", "1", "--split", "test", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 4
    assert run(["steps", str(workspace), "--json"]) == 0
    listing = json.loads(capsys.readouterr().out)
    assert [step["name"] for step in listing["steps"]] == ["00-base", "01-star", "02-triangle"]

    weights = workspace / "steps" / "01-star" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert run(["steps", str(workspace)]) == 3
    assert "weights of step 01-star are damaged" in capsys.readouterr().err
    assert run(["evaluate", str(workspace), "--step", "1"]) == 3
    assert run(["evaluate", str(workspace), "--step", "0"]) == 0


def test_an_interrupt_leaves_the_workspace_as_it_was(workspace: Path) -> None:
    assert run(["train", str(workspace), "--iterations", "2", "--batch-size", "2", "--accelerator", "cpu"]) == 0
    endless = ["step", str(workspace), "--add-classes", "star", "--iterations", "1000000", "--accelerator", "cpu"]
    # A test run in the background inherits an ignored SIGINT, with which Python installs no handler.
    restore = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{restore}; from edge_ilseg.cli import main; main()"
    with subprocess.Popen([sys.executable, "-c", code, *endless], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if "01-star" in line:
                    break
            time.sleep(5)  # into the training loop, as a rule; wherever it is, nothing may be left behind
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "nothing half-done was written" in error
    assert [path.name for path in (workspace / "steps").iterdir()] == ["00-base"]
    assert run(["steps", str(workspace)]) == 0


def test_a_wrong_loss_option_is_explained(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["step", str(workspace), "--add-classes", "star", "--loss", "kd_output"]) == 3
    assert "such as kd_output=1.0" in capsys.readouterr().err


def test_any_setting_can_be_changed_for_one_step(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--iterations", "1", "--batch-size", "2", "--accelerator", "cpu"]
    assert run(["train", str(workspace), *quick, "--set", "momentum=0.5", "--set", "flip=false", "--json"]) == 0
    training = json.loads(capsys.readouterr().out.split("edge-ilseg.toml\n")[-1])["training"]
    assert (training["momentum"], training["flip"]) == (0.5, False)
    step = ["step", str(workspace), "--add-classes", "star", *quick]
    assert run([*step, "--set", "kd_temperature=2", "--set", "kd_mask=all", "--json"]) == 0
    method = json.loads(capsys.readouterr().out)["method"]
    assert (method["kd_temperature"], method["kd_mask"]) == (2.0, "all")


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("kd_temprature=2", "did you mean 'kd_temperature'"),
        ("kd_mask=some", "cannot be used"),
        ("kd_temperature=warm", "cannot be used"),
        ("momentum", "KEY=VALUE"),
    ],
)
def test_a_wrong_setting_is_explained(
    workspace: Path, item: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["step", str(workspace), "--add-classes", "star", "--set", item]) == 3
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("method", ["freeze+kd-output", "kd-output+kd-feature"])
def test_two_processes_learn_what_one_does(workspace: Path, method: str) -> None:
    quick = ["--iterations", "6", "--batch-size", "4", "--accelerator", "cpu"]
    assert run(["train", str(workspace), *quick]) == 0
    step = ["step", str(workspace), "--add-classes", "star", "--from", "00-base", "--method", method, *quick]
    assert run([*step, "--name", "one"]) == 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    two = [sys.executable, "-m", "edge_ilseg", *step, "--name", "two", "--devices", "2"]
    done = subprocess.run(two, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("method " + method) == 1
    one, both = (load_file(workspace / "steps" / name / "model.safetensors") for name in ("01-one", "01-two"))
    for key, tensor in one.items():
        torch.testing.assert_close(both[key], tensor, rtol=1e-5, atol=1e-5, msg=key)


def test_a_batch_that_cannot_be_divided_is_refused(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", str(workspace), "--batch-size", "3", "--devices", "2"]) == 3
    assert "cannot be divided among the devices" in capsys.readouterr().err


def test_a_plan_is_forecast_and_nothing_is_written(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--iterations", "12", "--batch-size", "4", "--accelerator", "cpu"]
    assert run(["train", str(workspace), *quick]) == 0
    before = sorted(workspace.rglob("*"))
    capsys.readouterr()
    assert run(["step", str(workspace), "--add-classes", "star", *quick, "--plan"]) == 0
    table = capsys.readouterr().out
    assert {"trainable parameters", "memory", "update"} <= {
        line.split("│")[1].strip() for line in table.splitlines() if "│" in line
    }
    assert run(["step", str(workspace), "--add-classes", "star", *quick, "--plan", "--json"]) == 0
    forecast = json.loads(capsys.readouterr().out)
    assert (forecast["iterations"], forecast["batch_size"]) == (12, 4)
    assert forecast["total_s"] > 0
    assert sorted(workspace.rglob("*")) == before


def test_memory_format_and_threads_are_measured_and_told_unless_given(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ["--iterations", "2", "--batch-size", "2", "--accelerator", "cpu"]
    assert run(["train", str(workspace), *quick]) == 0
    assert "; measured in " in capsys.readouterr().err
    step = ["step", str(workspace), "--add-classes", "star", *quick]
    assert run([*step, "--name", "given", "--tuning", "contiguous:1"]) == 0
    assert "measured" not in capsys.readouterr().err
    assert run([*step, "--name", "wrong", "--from", "0", "--tuning", "sideways"]) == 3
    assert "--tuning" in capsys.readouterr().err
