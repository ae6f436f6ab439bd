"""What a device installs is enough: the package with one runtime, in an environment that has nothing else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from bundles import write_color_folder, write_family

ROOT = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "site", "*.egg-info", "__pycache__", ".*_cache", "demo-workspace"
)


@pytest.mark.slow
def test_a_device_verifies_a_bundle_with_one_runtime_and_nothing_of_training(tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", ROOT / "constraints.txt"]
    shutil.copytree(ROOT, tmp_path / "source", symlinks=True, ignore=LEFT_OUT)  # a build writes into its source
    done = subprocess.run(
        [*install, f"{tmp_path / 'source'}[onnxruntime]"], capture_output=True, text=True, check=False
    )
    if done.returncode and "No matching distribution" in done.stderr:
        pytest.skip("the package index cannot be reached: this test installs onnxruntime into a new environment")
    assert done.returncode == 0, done.stderr
    installed = json.loads(subprocess.run([python, "-m", "pip", "list", "--format=json"], capture_output=True).stdout)
    names = {item["name"].lower() for item in installed}
    assert {"edge-ilseg", "numpy", "pillow", "onnxruntime"} <= names
    assert not names & {"torch", "onnx", "openvino", "safetensors", "lightning-fabric", "pydantic", "scipy"}
    child, parent = write_family(tmp_path / "bundles", forget="grass")
    data = write_color_folder(tmp_path / "data")
    command = [python, "-m", "edge_ilseg", "verify", child, "--data", f"folder:{data}", "--against", parent, "--json"]
    judged = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert judged.returncode == 1, judged.stderr
    report = json.loads(judged.stdout)
    (drop,) = (check for check in report["checks"] if check["name"] == "old mIoU drop")
    assert drop["verdict"] == "failed"
    assert "most forgotten: grass" in drop["detail"]
    assert report["device"]["versions"]["openvino"] is None
    look_around(python, child, tmp_path)


def look_around(python: Path, bundle: Path, folder: Path) -> None:
    """What else has to run on a device: help, doctor, model card, completion."""

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        command = [python, "-m", "edge_ilseg", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)

    assert "Usage:" in run("--help").stdout
    examined = run("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(examined.stdout)["checks"]}
    assert examined.returncode in (0, 1), examined.stderr
    for name in ("python", "source tree", "edge-ilseg", "base packages", "extra onnxruntime", "runtime onnxruntime"):
        assert checks[name]["status"] == "ok", checks[name]
    assert checks["extra train"]["mend"] == "pip install 'edge-ilseg[train]'"
    assert "torch" not in checks
    assert run("card", bundle).stdout.startswith("---\nlicense")
    assert "_EDGE_ILSEG_COMPLETE=bash_complete" in run("completion", "bash").stdout
    assert "edge-ilseg[report]" in run("fleet", "report", folder, "--out", "fleet.html").stderr
