"""The paper's experiments: its configuration, and the whole path on a small data set in VOC's layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_scenario_results import CHAINS, results
from voc_folder import write_voc

from edge_ilseg.cli import run
from edge_ilseg.errors import ConfigError
from edge_ilseg.reproduce import PAPERS_METHODS, PUBLISHED, comparison_rows, plan_reproduction
from edge_ilseg.workspace import open_workspace


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `write_voc`."""
    return write_voc(tmp_path_factory.mktemp("voc") / "VOC2012")


def test_the_configuration_is_the_papers(voc: Path) -> None:
    plan = plan_reproduction("voc-15+1x5", voc, "none")
    assert (plan.model.backbone, plan.model.head, plan.model.output_stride) == ("resnet101", "deeplab_v2", 8)
    assert (plan.model.input_height_px, plan.model.input_width_px) == (321, 321)
    assert [len(names) for names in plan.classes] == [16, 1, 1, 1, 1, 1]
    assert plan.classes[-1] == ("tvmonitor",)
    base, step = plan.base_settings(0), plan.step_settings(5, "kd-output", 0)
    assert (base.iterations, base.learning_rate, base.learning_rate_end) == (16000, 1e-4, 1e-6)
    assert (step.iterations, step.learning_rate, step.learning_rate_end) == (1000, 5e-5, 1e-6)
    for settings in (base, step):
        assert (settings.batch_size, settings.momentum, settings.weight_decay) == (4, 0.9, 1e-4)
        assert (settings.batch_norm, settings.geometry, settings.schedule_power) == ("eval", "native", 0.9)
    assert plan.joint_settings(0).iterations == 21000


def test_published_rows_are_means_over_all_classes_of_their_parts() -> None:
    """A misprint would show: all = (old * |old| + new * |new|) / 21, background among the old, to rounding."""
    for name, rows in PUBLISHED.items():
        old_count = 20 if name == "voc-19+1" else 16
        for method, row in rows.items():
            expected = (row.old * old_count + row.new * (21 - old_count)) / 21
            assert row.all == pytest.approx(expected, abs=0.11), (name, method)


def test_our_rows_stand_beside_the_published_ones() -> None:
    ours = results(*CHAINS)  # method freeze: old 50 ± 14.1, new 30 ± 0, all 45 ± 7.1
    rows = {row[0]: row[1:] for row in comparison_rows("voc-19+1", ours)}
    assert list(rows) == [*PAPERS_METHODS, "joint"]
    assert rows["freeze"] == ("50.0 ± 14.1", "30.0 ± 0.0", "45.0 ± 7.1", "71.9", "43.3", "70.5")
    assert rows["joint"] == ("-", "-", "-", "73.7", "70.5", "73.6")


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("voc-10+10", [11, 10]), ("voc-10+1x10", [11] + 10 * [1]), ("voc-10+5+5", [11, 5, 5])],
)
def test_experiments_without_a_published_row_have_the_papers_configuration(
    name: str, sizes: list[int], voc: Path
) -> None:
    plan = plan_reproduction(name, voc, "none")
    assert [len(names) for names in plan.classes] == sizes
    assert [plan.step_settings(index, "finetune", 0).iterations for index in range(1, len(sizes))] == [
        1000 * size for size in sizes[1:]
    ]
    assert comparison_rows(name, results(*CHAINS)) == ()


def test_an_unknown_experiment_gets_the_nearest_name(voc: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'voc-19"):
        plan_reproduction("voc-19-1", voc, "none")


def test_the_whole_path_runs_on_a_small_network(voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["reproduce", "voc-15+1x5", "--root", str(voc), "--weights", "none", "--out", str(tmp_path / "run")]
    few = ["--backbone", "tiny", "--size", "33x33", "--iterations-per-class", "1", "--accelerator", "cpu"]
    assert run([*command, *few, "--methods", "finetune,freeze+kd-output"]) == 0
    text, page = capsys.readouterr().out, (tmp_path / "run" / "published.md").read_text()
    assert "published old" in text
    for lines in (text.partition("published old")[2].splitlines(), page.splitlines()):
        rows = {method: line for line in lines for method in ("finetune", "freeze+kd-output") if f" {method} " in line}
        for method, published in (
            ("finetune", ("47.8", "33.0", "44.2")),
            ("freeze+kd-output", ("70.5", "44.2", "64.3")),
        ):
            assert all(number in rows[method] for number in published), rows[method]
    assert run([*command, *few, "--methods", "finetune", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["published"]["finetune"] == {"old": 47.8, "new": 33.0, "all": 44.2}
    assert printed["chains"][0]["method"] == "finetune"
    workspace = open_workspace(tmp_path / "run" / "seed-0")
    record = workspace.read_step("05-freeze+kd-output")
    assert record.training.geometry == "native"
    assert record.metrics["val"].pixels == 20 * 37 * 50
    assert len(record.data.image_ids) == 2
    assert (record.method.losses, record.method.freeze) == ({"kd_output": 1.0}, "encoder")  # type: ignore[union-attr]
