"""Means over seeds, forgetting and tables, on chains whose numbers are known."""

from __future__ import annotations

import pytest
from test_scenario_run import make_plan

from edge_ilseg.metrics import Metrics
from edge_ilseg.scenario_results import (
    FORMAT,
    FORMAT_VERSION,
    Chain,
    ScenarioResults,
    Spread,
    StepScore,
    class_rows,
    forgotten,
    markdown,
    percent_spread,
    remarks,
    spread,
    step_rows,
    summarize,
    summary_rows,
)

PLAN = make_plan("6+1x2")
OLD = PLAN.classes[0]


def metrics(all_: float, **iou: float | None) -> Metrics:
    return Metrics(2, 10, dict(iou), None, None, all_, None, None, all_ / 2, all_ / 4, None)


def chain(seed: int, base: float, star: tuple[float, float], triangle: float, method: str = "freeze") -> Chain:
    """Old classes at `base`, then a tenth less at each step; star after the steps 1 and 2; triangle after step 2."""
    ious = [
        dict.fromkeys(OLD, base),
        {**dict.fromkeys(OLD, base - 0.1), "star": star[0]},
        {**dict.fromkeys(OLD, base - 0.2), "star": star[1], "triangle": triangle},
    ]
    new = [OLD, ("star",), ("triangle",)]
    return Chain(
        method,
        seed,
        tuple(
            StepScore(index, new[index], 5, 10, 2.0 + seed, 100, metrics(0.6 - 0.1 * index + 0.1 * seed, **iou))
            for index, iou in enumerate(ious)
        ),
    )


CHAINS = (chain(0, 0.8, (0.5, 0.4), 0.2), chain(1, 0.6, (0.7, 0.2), 0.4))


def results(*chains: Chain, unfinished: tuple[str, ...] = ()) -> ScenarioResults:
    summaries = tuple(
        summarize(PLAN, [item for item in chains if item.method == m]) for m in {c.method: 0 for c in chains}
    )
    return ScenarioResults(FORMAT, FORMAT_VERSION, PLAN, chains, summaries, unfinished)


def test_old_are_the_classes_of_step_0_and_new_all_that_came_later() -> None:
    summary = summarize(PLAN, CHAINS)
    assert summary.miou_old is not None
    assert summary.miou_new is not None
    assert summary.miou_old.mean == pytest.approx((0.6 + 0.4) / 2)
    assert summary.miou_new.mean == pytest.approx(((0.4 + 0.2) / 2 + (0.2 + 0.4) / 2) / 2)
    assert summary.miou_old.std == pytest.approx(0.2 / 2**0.5)


def test_the_mean_over_steps_starts_with_step_0() -> None:
    summary = summarize(PLAN, CHAINS)
    assert summary.miou_steps is not None
    assert summary.miou_steps.mean == pytest.approx(((0.6 + 0.5 + 0.4) / 3 + (0.7 + 0.6 + 0.5) / 3) / 2)


def test_forgetting_is_what_was_lost_since_the_class_was_taught() -> None:
    assert forgotten(CHAINS[1], "star") == pytest.approx(0.5)
    assert forgotten(CHAINS[0], "disk") == pytest.approx(0.2)
    assert forgotten(CHAINS[0], "triangle") == 0.0
    assert forgotten(Chain("joint", 0, CHAINS[0].steps[:1]), "disk") is None


def test_seconds_are_those_of_the_increments() -> None:
    assert summarize(PLAN, CHAINS).training_seconds == Spread(pytest.approx(5.0), pytest.approx(2**0.5))  # type: ignore[arg-type]


def test_a_class_that_no_image_shows_is_left_out_and_not_zero() -> None:
    assert spread([None, 0.5]) == Spread(0.5, None)
    assert spread([None]) is None
    assert percent_spread(None) == "-"
    assert percent_spread(Spread(0.5, None)) == "50.0"
    assert percent_spread(Spread(0.5, 0.012)) == "50.0 ± 1.2"


def test_tables_have_a_row_a_method_and_a_row_a_class() -> None:
    joint = Chain("joint", 0, (StepScore(0, (*OLD, "star", "triangle"), 9, 30, 9.0, 100, metrics(0.9, star=0.9)),))
    found = results(*CHAINS, joint)
    rows = summary_rows(found)
    assert [row[0] for row in rows] == ["freeze", "joint"]
    assert rows[0][1:4] == ("50.0 ± 14.1", "30.0 ± 0.0", "45.0 ± 7.1")
    assert rows[1][6] == "-"
    header, cells = class_rows(found, "iou")
    assert header == ("class", "step", "freeze", "joint")
    assert ("star", "1", "30.0 ± 14.1", "90.0") in cells
    assert ("star", "1", "30.0", "90.0") in class_rows(found, "iou", with_std=False)[1]
    header, cells = class_rows(found, "forgetting")
    assert header == ("class", "step", "freeze")
    assert ("star", "1", "30.0 ± 28.3") in cells
    assert ("star", "1", "30.0") in class_rows(found, "forgetting", with_std=False)[1]
    header, cells = step_rows(found, "miou_all")
    assert header == ("method", "step 0", "step 1", "step 2")
    assert cells == (("freeze", "65.0 ± 7.1", "55.0 ± 7.1", "45.0 ± 7.1"),)
    _, cells = step_rows(found, "miou_new")
    assert cells == (("freeze", "-", "-", "-"),)  # where no step has such a score


def test_markdown_says_what_was_run_and_what_is_missing() -> None:
    text = markdown(results(*CHAINS, unfinished=("plop, seed 0",)))
    assert "shapes 6+1x2, setup sequential" in text
    assert "the background counts as an old class" in text
    assert "Not finished, and left out: plop, seed 0." in text
    assert "| freeze | 50.0 ± 14.1 |" in text
    assert "| star | 1 | 30.0 ± 28.3 |" in text
    assert "fewer seeds" not in text


def test_rows_of_fewer_seeds_than_others_are_named() -> None:
    other = chain(0, 0.9, (0.5, 0.4), 0.2, method="plop")
    found = remarks(results(*CHAINS, other, unfinished=("plop, seed 1",)))
    assert found == ["Of fewer seeds than others: plop (0).", "Not finished, and left out: plop, seed 1."]
