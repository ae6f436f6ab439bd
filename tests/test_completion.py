"""What a shell completes: asked of a real bash, which runs the real script."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bundles import BASE, write_bundle

from edge_ilseg.cli import COMMANDS, run
from edge_ilseg.cli.completion import SHELLS
from edge_ilseg.devices.device_profile import profile_names
from edge_ilseg.methods import METHODS

ASK = """
compopt() { printf '> compopt %s %s\\n' "$@"; }  # the builtin wants a key to be pressed
source completion.sh
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
complete -p edge-ilseg
_edge_ilseg_completion edge-ilseg
printf '> %s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the command on its path, the script, a workspace with steps, and a bundle."""
    if shutil.which("bash") is None:
        pytest.skip("there is no bash here: this test asks a real one")
    folder = tmp_path_factory.mktemp("shell")
    program = folder / "edge-ilseg"
    program.write_text(f"#!{sys.executable} -P\nfrom edge_ilseg.cli import main\nmain()\n")
    program.chmod(0o755)
    script = subprocess.run([program, "completion", "bash"], capture_output=True, check=True, text=True)
    (folder / "completion.sh").write_text(script.stdout)
    for name in ("00-base", "01-boat", "02-tv", ".being-written"):
        (folder / "work" / "steps" / name).mkdir(parents=True)
    write_bundle(folder / "work/bundles/00-base", BASE, step_id="a" * 64)
    (folder / "work/bundles/notes").mkdir()
    return folder


def complete(place: Path, *words: str) -> list[str]:
    """What bash offers for the last of the words."""
    done = subprocess.run(
        ["bash", "--norc", "-c", ASK, "bash", "edge-ilseg", *words],
        cwd=place,
        env={**os.environ, "PATH": f"{place}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stderr == ""
    registered, *answers = done.stdout.splitlines()
    assert registered.endswith("_edge_ilseg_completion edge-ilseg")
    return [line.removeprefix("> ") for line in answers if line != "> "]


def test_bash_completes_commands_and_options(place: Path) -> None:
    assert complete(place, "") == list(COMMANDS)
    assert complete(place, "ver") == ["verify"]
    assert complete(place, "device", "ro") == ["rollback"]
    assert "--against" in complete(place, "verify", "--a")
    assert complete(place, "verify", "--runtime", "o") == ["onnxruntime", "openvino"]
    assert complete(place, "completion", "") == list(SHELLS)


def test_bash_completes_the_steps_of_the_workspace_that_the_line_names(place: Path) -> None:
    assert complete(place, "export", "work", "--step", "") == ["00-base", "01-boat", "02-tv"]
    assert complete(place, "step", "work", "--from", "01") == ["01-boat"]
    assert complete(place, "export", "elsewhere", "--step", "") == []


def test_bash_completes_methods_profiles_and_data_sets(place: Path) -> None:
    assert complete(place, "step", "work", "--method", "") == list(METHODS)
    assert complete(place, "scenario", "run", "x", "--methods", "mib,kd-f") == [
        "mib,kd-feature",
        "mib,kd-feature-plain",
    ]
    assert complete(place, "verify", "x", "--profile", "") == list(profile_names())
    assert "msrc" in complete(place, "init", "w", "--dataset", "m")


@pytest.mark.parametrize("typed", ["", "work/bundles/0", "./w"])
def test_bash_completes_bundles_a_few_folders_below(place: Path, typed: str) -> None:
    expected = ("./" if typed.startswith(".") else "") + "work/bundles/00-base"
    assert complete(place, "verify", typed) == [expected]


def test_bash_completes_bundles_wherever_one_is_expected(place: Path) -> None:
    assert complete(place, "verify", "x", "--against", "work") == ["work/bundles/00-base"]
    assert complete(place, "publish", "add", "models", "work/") == ["work/bundles/00-base"]


def test_where_there_is_no_bundle_the_shell_completes_files_by_itself(place: Path) -> None:
    assert complete(place, "verify", "work/steps/") == ["compopt -o default"]


def test_a_line_with_a_mistake_completes_nothing_and_says_nothing(place: Path) -> None:
    assert complete(place, "verfy", "") == list(COMMANDS)  # as click does behind a word that it does not know


def test_completing_imports_nothing_heavy(place: Path) -> None:
    program = (
        "import sys, atexit; atexit.register(lambda: print(sorted(sys.modules), file=sys.stderr));"
        "sys.argv = ['edge-ilseg']; from edge_ilseg.cli import main; main()"
    )
    environment = {"_EDGE_ILSEG_COMPLETE": "bash_complete", "COMP_WORDS": "edge-ilseg ver", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=place,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "plain,verify\n"
    for module in ("numpy", "msgspec", "rich", "torch", "edge_ilseg.cli.verify"):
        assert f"'{module}'" not in done.stderr, module


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_gets_a_script_that_asks_this_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert f"_EDGE_ILSEG_COMPLETE={shell}_complete" in script
    assert "edge-ilseg" in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)
