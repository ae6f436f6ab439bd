"""One table of the results of several folders: whose chains are taken, and what does not belong together."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from test_scenario_results import CHAINS, PLAN, chain
from test_scenario_run import make_plan

from edge_ilseg.cli import run
from edge_ilseg.errors import WorkspaceError
from edge_ilseg.scenario_merge import load_results, merge_results
from edge_ilseg.scenario_plan import ScenarioPlan
from edge_ilseg.scenario_results import Chain, ScenarioResults, collect

HERE, THERE = Path("here"), Path("there")
FIRST, SECOND = CHAINS


def part(
    *chains: Chain, plan: ScenarioPlan = PLAN, failed: dict[tuple[str, int], str] | None = None
) -> ScenarioResults:
    return collect(plan, chains, failed or {})


def begun(whole: Chain, steps: int) -> Chain:
    return msgspec.structs.replace(whole, steps=whole.steps[:steps])


def moved(plan: ScenarioPlan, root: str) -> ScenarioPlan:
    return msgspec.structs.replace(plan, data=msgspec.structs.replace(plan.data, root=root))


def test_seeds_of_two_machines_give_the_table_of_one_that_had_both() -> None:
    there = part(SECOND, plan=moved(PLAN, "/elsewhere"))
    merged = merge_results([(HERE, part(FIRST)), (THERE, there)])
    assert merged == part(FIRST, SECOND)
    assert merged.summaries[0].seeds == (0, 1)


def test_methods_of_two_machines_stand_in_one_table() -> None:
    other = chain(0, 0.5, (0.5, 0.4), 0.1, method="finetune")
    merged = merge_results([(HERE, part(FIRST)), (THERE, part(other))])
    assert [item.method for item in merged.summaries] == ["finetune", "freeze"]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_chain_is_taken_from_where_it_goes_further(order: tuple[int, int]) -> None:
    parts = [(HERE, part(begun(FIRST, 2))), (THERE, part(FIRST))]
    merged = merge_results([parts[number] for number in order])
    assert merged.chains == (FIRST,)
    assert not merged.unfinished


def test_what_is_finished_nowhere_is_named_with_its_reason() -> None:
    failed = {("freeze", 0): "diverged at step 2: term kd_output, iteration 3"}
    merged = merge_results([(HERE, part(begun(FIRST, 2), failed=failed)), (THERE, part(SECOND))])
    assert merged.unfinished == ("freeze, seed 0 (diverged at step 2: term kd_output, iteration 3)",)
    assert merged.summaries[0].seeds == (1,)


def test_other_scores_of_the_same_chain_are_refused_and_named() -> None:
    other = chain(0, 0.8, (0.5, 0.4), 0.3)
    with pytest.raises(WorkspaceError, match="different scores") as caught:
        merge_results([(HERE, part(FIRST)), (THERE, part(other))])
    assert (caught.value.where, caught.value.found) == (THERE, "freeze, seed 0, step 2")


def test_another_scenario_is_refused() -> None:
    with pytest.raises(WorkspaceError, match="different scenarios") as caught:
        merge_results([(HERE, part(FIRST)), (THERE, part(plan=make_plan("6+2")))])
    assert "scenario, classes" in str(caught.value.found)


def write(path: Path, results: ScenarioResults) -> Path:
    path.write_bytes(msgspec.json.encode(results))
    return path


def test_files_of_results_are_shown_together_and_written_where_one_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = write(tmp_path / "a.json", part(FIRST)), write(tmp_path / "b.json", part(SECOND))
    assert run(["scenario", "show", str(first), str(second), "--out", str(tmp_path / "out" / "together")]) == 0
    shown = capsys.readouterr().out
    assert "50.0 ± 14.1" in shown
    star = [line for line in shown.splitlines() if line.startswith("│ star")]
    assert len(star) == 2  # IoU and forgetting
    assert not any("±" in line for line in star)  # of many methods they would be too wide
    assert load_results(tmp_path / "out" / "together" / "results.json") == part(FIRST, SECOND)
    assert "| freeze | 50.0 ± 14.1 |" in (tmp_path / "out" / "together" / "results.md").read_text(encoding="utf-8")
    assert run(["scenario", "show", str(first)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json", "out"]


@pytest.mark.parametrize("content", [b"{", b'{"format": "another", "format_version": 1}', b"{}"])
def test_a_file_that_holds_no_results_says_so(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_bytes(content)
    assert run(["scenario", "show", str(tmp_path / "results.json")]) == 3
    shown = capsys.readouterr().err
    assert "the results of the scenario" in shown
    assert "edge-ilseg scenario show FOLDER" in shown
