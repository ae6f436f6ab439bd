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
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", "__pycache__", ".*_cache", "demo-workspace")


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
