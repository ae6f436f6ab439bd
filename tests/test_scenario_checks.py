"""What a scenario finds out before anything is trained."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from test_scenario_run import COMMAND, CONFIG, ORDER, SPEC, make_plan

from edge_ilseg import scenario_plan
from edge_ilseg.cli import run
from edge_ilseg.cli.scenario import parse_seeds
from edge_ilseg.config import Config, DataConfig, step_method
from edge_ilseg.errors import ConfigError
from edge_ilseg.methods import METHODS
from edge_ilseg.scenario_plan import check_works, fix_plan, plan_scenario, replacements
from edge_ilseg.scenario_results import markdown, read_results
from edge_ilseg.scenario_run import run_scenario
from edge_ilseg.workspace import open_workspace


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

    monkeypatch.setattr(scenario_plan, "check_works", refuse)
    like = ["--like", str(tmp_path / "work"), "--methods", "all", "--out", str(tmp_path / "run")]
    assert run(["scenario", "run", "shapes:7+1", *like]) == 3
    text = capsys.readouterr().err
    assert "losses, switches and freeze of [step] are left out" in text
    assert text.count("it cannot work; at") == len(METHODS)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("order", [ORDER, (*ORDER[:4], "background", *ORDER[4:])])
def test_the_background_belongs_to_step_0_whether_an_order_names_it_or_not(order: tuple[str, ...]) -> None:
    plan = plan_scenario(CONFIG, "6+2", class_order=order)
    assert plan.classes == (("background", *ORDER[:6]), ORDER[6:])


def test_an_order_names_every_class() -> None:
    with pytest.raises(ConfigError, match=r"names every class(.|\n)*3 of 8 classes, without (.|\n)*triangle"):
        plan_scenario(CONFIG, "2+1", class_order=ORDER[:3])


def test_a_scenario_needs_a_split_to_score_on() -> None:
    config = msgspec.structs.replace(CONFIG, data=msgspec.structs.replace(CONFIG.data, eval_split=""))
    with pytest.raises(ConfigError, match="no split to score on"):
        make_plan(config=config)


def test_a_preallocated_head_without_room_for_the_last_classes_is_refused_before_anything_is_trained() -> None:
    for room, fits in ((1, False), (2, True), (0, True)):
        config = msgspec.structs.replace(CONFIG, model=msgspec.structs.replace(SPEC, preallocated_classes=room))
        if fits:
            check_works(make_plan("6+1x2", config), "kd-output")
        else:
            with pytest.raises(ConfigError, match=r"no room for(.|\n)*1 channels, 2 classes(.|\n)*= 2"):
                make_plan("6+1x2", config)


def test_a_closed_form_whose_sums_step_0_would_not_leave_is_refused() -> None:
    """Of ResNet-50 with 16 classes they are 290 MiB; nothing of it is built."""
    large = msgspec.structs.replace(SPEC, backbone="resnet50", decoder_channels=128)
    plan = make_plan(config=msgspec.structs.replace(CONFIG, model=large))
    check_works(plan, "analytic")
    sixteen = tuple(f"class {number}" for number in range(16))
    with pytest.raises(ConfigError, match=r"larger than a step leaves(.|\n)*MiB for 16 classes with resnet50"):
        check_works(msgspec.structs.replace(plan, classes=(sixteen, *plan.classes[1:])), "analytic")


@pytest.mark.parametrize("option", ["--iterations", "--step-iterations", "--iterations-per-class", "--batch-size"])
def test_a_count_below_one_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["scenario", "run", *COMMAND, option, "0"]) != 0
    assert "0 is not in the range x>=1" in capsys.readouterr().err


def test_a_seed_named_twice_is_run_once() -> None:
    assert parse_seeds("3,0,3") == (3, 0)
    with pytest.raises(ConfigError, match="1 or more"):
        parse_seeds("0")


def test_a_method_at_another_cut_point_is_that_method_with_less_frozen() -> None:
    plan = make_plan()
    settings = plan.step_settings(1, "freeze+kd-output@stages:1", 0)
    assert (settings.method, settings.freeze) == ("freeze+kd-output", "stages:1")
    check_works(plan, "freeze+kd-output@stages:1")
    for unknown in ("freeze@stagse:1", "kd-output@"):
        with pytest.raises(ConfigError, match="unknown cut point"):
            check_works(plan, unknown)
    with pytest.raises(ConfigError, match="always zero"):
        check_works(plan, "kd-feature@encoder")


def test_weights_and_switches_of_a_method_can_be_set_by_hand() -> None:
    plan = make_plan()
    settings = plan.step_settings(1, "kd-output@stages:2:kd_output=2:kd_temperature=3:head_init=scaled", 1)
    assert (settings.method, settings.freeze, settings.losses) == ("kd-output", "stages:2", {"kd_output": 2.0})
    assert (settings.kd_temperature, settings.head_init, settings.seed) == (3.0, "scaled", 1)
    method = step_method(settings)
    assert (method.freeze, method.losses, method.kd_temperature) == ("stages:2", {"kd_output": 2.0}, 3.0)
    beside = step_method(plan.step_settings(1, "kd-output:kd_similarity=0.5", 0))
    assert (beside.freeze, beside.losses) == ("none", {"kd_output": 1.0, "kd_similarity": 0.5})
    assert plan.step_settings(1, "kd-output", 0) == msgspec.structs.replace(plan.step, method="kd-output")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kd-output:kd_outptu=2", "no loss term and no switch(.|\n)*did you mean 'kd_output'"),
        ("kd-output:kd_output=two", "cannot be used(.|\n)*kd_output=two(.|\n)*float"),
        ("kd-output:kd_temperature=0", "cannot be used(.|\n)*kd_temperature=0"),
        ("kd-output:kd_mask=old", "cannot be used(.|\n)*kd_mask=old"),
        ("kd-output:kd_output=1:kd_output=2", "twice"),
        ("kd-output:kd_output=-1", "out of range"),
        ("kd-output:kd_output=2@stages:2", "cannot be used"),
        ("kd-output@stages:kd_output=2:2", "no loss term and no switch"),
        ("kd-output:kd_temperature=inf", "cannot be used(.|\n)*a finite number"),
        ("kd-output:kd_temperature=null", "cannot be used"),
        (f"kd-output:kd_temperature=2.{'0' * 200}1", "too long"),
        ("finetune:kd_temperature=2", "changes nothing here"),
        ("freeze:kd_feature=1", "same features"),
        ("analytic:kd_output=1", "closed form"),
        ("kd-outptu:kd_output=1", "did you mean 'kd-output'"),
        (":kd_output=1", "no such method"),
    ],
)
def test_a_setting_of_a_method_that_cannot_be_used_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_works(make_plan(), text)


def test_two_names_of_one_method_are_refused(tmp_path: Path) -> None:
    for names in (("kd-output", "kd-output:kd_output=1"), ("kd-output:kd_output=2", "kd-output:kd_output=2.0")):
        with pytest.raises(ConfigError, match=f"two methods are the same(.|\n)*{names[0]} and {names[1]}"):
            run_scenario(tmp_path / "run", make_plan(), names, (0,), accelerator="cpu")
    assert not (tmp_path / "run").exists()


def test_chains_that_are_set_by_hand_stand_beside_their_preset(tmp_path: Path) -> None:
    folder, name = tmp_path / "run", "kd-output:kd_output=5:kd_temperature=2"
    run_scenario(folder, make_plan("6+2"), ("kd-output", name), (0,), joint=False, accelerator="cpu")
    workspace = open_workspace(folder / "seed-0")
    assert workspace.step_names() == ("00-base", "01-kd-output", f"01-{name}")
    record = workspace.read_step(f"01-{name}")
    assert record.method is not None
    assert (record.method.losses, record.method.kd_temperature) == ({"kd_output": 5.0}, 2.0)
    assert record.weights_sha256 != workspace.read_step("01-kd-output").weights_sha256
    assert {item.method for item in read_results(folder).summaries} == {"kd-output", name}
    assert f"| {name} |" in markdown(read_results(folder))


def test_a_step_that_was_named_by_hand_does_not_hide_the_tables(tmp_path: Path) -> None:
    """`step --name` takes what no method's name could be."""
    folder = tmp_path / "run"
    run_scenario(folder, make_plan("6+2"), ("kd-output",), (0,), joint=False, accelerator="cpu")
    command = ["step", str(folder / "seed-0"), "--add-classes", "star,triangle", "--from", "00-base"]
    assert run([*command, "--name", "mine:lr=1", "--iterations", "1", "--accelerator", "cpu"]) == 0
    assert {item.method for item in read_results(folder).summaries} == {"kd-output", "mine:lr=1"}
    assert "| mine:lr=1 |" in markdown(read_results(folder))


def test_what_is_replaced_on_this_data_is_told_with_the_results(msrc_root: Path) -> None:
    data = DataConfig("msrc", str(msrc_root), eval_split="test")
    plan = plan_scenario(msgspec.structs.replace(CONFIG, data=data), "20+1", class_order="listed")
    mib, plop = replacements(plan, "mib"), replacements(plan, "plop")
    assert [note.split(":")[0] for note in mib] == [
        "plain cross-entropy",
        "distillation over the old channels in place of the unbiased one",
        "new classes start from random weights",
    ]
    assert plop[0] == "no pseudo-labels: this setup hides no label"
    assert replacements(plan, "freeze+kd-output") == ()
