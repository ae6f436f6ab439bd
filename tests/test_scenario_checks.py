"""What a scenario finds out before anything is trained."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from test_scenario_run import COMMAND, CONFIG, SPEC, make_plan

from edge_ilseg import scenario_run
from edge_ilseg.cli import run
from edge_ilseg.config import Config, step_method
from edge_ilseg.errors import ConfigError
from edge_ilseg.methods import METHODS
from edge_ilseg.scenario_run import check_works, fix_plan, run_scenario


@pytest.mark.parametrize(
    ("method", "config", "message"),
    [
        (
            "analytic",
            msgspec.structs.replace(CONFIG, model=msgspec.structs.replace(SPEC, head="deeplab_v2")),
            "no closed",
        ),
        (
            "analytic",
            msgspec.structs.replace(CONFIG, step=msgspec.structs.replace(CONFIG.step, statistics=False)),
            "leave statistics at true",
        ),
        (
            "kd-similarity",
            msgspec.structs.replace(CONFIG, step=msgspec.structs.replace(CONFIG.step, batch_size=1)),
            "raise --batch-size",
        ),
    ],
)
def test_a_method_that_cannot_work_here_is_found_before_anything_is_trained(
    tmp_path: Path, method: str, config: Config, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_scenario(tmp_path / "run", make_plan(config=config), ("finetune", method), (0,), accelerator="cpu")
    assert not (tmp_path / "run").exists()


def test_of_one_increment_the_step_itself_need_leave_no_statistics() -> None:
    step = msgspec.structs.replace(CONFIG.step, statistics=False)
    check_works(make_plan("6+2", msgspec.structs.replace(CONFIG, step=step)), "analytic")


def test_each_method_is_its_preset_whatever_the_settings_of_a_step_add() -> None:
    step = msgspec.structs.replace(
        CONFIG.step, losses={"kd_output": 3.0}, freeze="stem", kd_temperature=2.0, momentum=0.5
    )
    plan = make_plan(config=msgspec.structs.replace(CONFIG, step=step))
    assert (plan.step.losses, plan.step.freeze, plan.step.kd_temperature) == ({}, None, None)
    settings = plan.step_settings(1, "finetune", 4)
    assert step_method(settings) == METHODS["finetune"]
    assert (settings.momentum, settings.seed, settings.iterations) == (0.5, 4, 3)


@pytest.mark.parametrize("scenario", ["8", "8x1"])
def test_a_scenario_without_an_increment_is_refused(scenario: str) -> None:
    with pytest.raises(ConfigError, match=r"a scenario has a step that adds classes(.|\n)*edge-ilseg train"):
        make_plan(scenario, iterations_per_class=2)


def test_all_methods_are_those_that_can_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is trained: the folder holds another run."""
    other = make_plan("6+2")
    fix_plan(tmp_path / "run", other)
    out = ["--out", str(tmp_path / "run"), "--methods", "all", "--head", "deeplab_v2"]
    assert run(["scenario", "run", *COMMAND, *out]) == 3
    text = capsys.readouterr().err
    assert re.search(r"left out: analytic: .*this head has no closed form", text)
    assert text.count("left out") == 1
    assert "the folder holds a run of another scenario" in text


def test_where_no_method_can_work_nothing_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = ["init", str(tmp_path / "work"), "--dataset", "shapes", "--later-classes", "star", "--backbone", "tiny"]
    assert run([*work, "--size", "48x48"]) == 0
    config = tmp_path / "work" / "edge-ilseg.toml"
    config.write_text(config.read_text().replace("[step]", "[step]\nkd_temperature = 2"))
    capsys.readouterr()

    def refuse(_: object, method: str) -> None:
        raise ConfigError("it cannot work", where=method)

    monkeypatch.setattr(scenario_run, "check_works", refuse)
    like = ["--like", str(tmp_path / "work"), "--methods", "all", "--out", str(tmp_path / "run")]
    assert run(["scenario", "run", "shapes:7+1", *like]) == 3
    text = capsys.readouterr().err
    assert "losses, switches and freeze of [step] are left out" in text
    assert text.count("it cannot work; at") == len(METHODS)
    assert not (tmp_path / "run").exists()
