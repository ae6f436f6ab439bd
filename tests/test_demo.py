"""The demo, with a few iterations: every stage runs, and the bundle that it names is whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_ilseg.bundle import check_files, read_manifest
from edge_ilseg.cli import run
from edge_ilseg.demo import run_demo
from edge_ilseg.errors import ConfigError, WorkspaceError


@pytest.mark.slow
def test_the_demo_runs_from_data_to_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "demo"
    few = ["--base-iterations", "3", "--step-iterations", "2"]
    assert run(["demo", str(folder), *few, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = [(row["model"], row["precision"], row["verdict"] is not None) for row in result["rows"]]
    runs = (("torch fp32", False), ("onnxruntime int8", True), ("openvino int8", True))
    assert rows == [
        (name, precision, judged and name != "before")
        for name in ("before", "fine-tuned", "distilled")
        for precision, judged in runs
    ]
    bundle = Path(result["bundle"])
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    assert manifest.int8 is not None
    assert manifest.int8.asked == "carry"
    assert {row.images for row in manifest.int8.attempts[0].rows} >= {"images at hand", "labelled images"}
    assert [row.runtime for row in manifest.int8.delta] == ["onnxruntime", "openvino"]
    base = folder / "bundles" / "00-base"
    verify = ["verify", str(bundle), "--data", "shapes:", "--against", str(base), "--limit", "5", "--json"]
    assert run(verify) in (0, 1, 4)
    assert run(["demo", str(folder), *few]) == 3
    assert "workspace already" in capsys.readouterr().err


def test_replacing_a_demo_deletes_nothing_that_is_anything_else(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(WorkspaceError, match="not the workspace of a demo"):
        run_demo(tmp_path / "mine", replace=True)
    own = ["--dataset", "shapes", "--later-classes", "star", "--backbone", "tiny"]
    assert run(["init", str(tmp_path / "work"), *own]) == 0
    with pytest.raises(WorkspaceError, match="not the workspace of a demo"):
        run_demo(tmp_path / "work", replace=True)
    (tmp_path / "work" / "edge-ilseg.toml").write_text("[")
    with pytest.raises(ConfigError):
        run_demo(tmp_path / "work", replace=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    assert (tmp_path / "work" / "edge-ilseg.toml").exists()
