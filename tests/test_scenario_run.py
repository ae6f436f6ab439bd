"""Scenarios over methods and seeds: shared step 0, going on after a kill, chains that diverge, fixed settings."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
import torch

from edge_ilseg import analytic_step
from edge_ilseg.checkpoint import load_model, read_record
from edge_ilseg.cli import run
from edge_ilseg.config import ClassesConfig, Config, DataConfig, StepConfig, TrainConfig
from edge_ilseg.errors import ClassNameError, ConfigError, NotFiniteError, TrainingError, WorkspaceError
from edge_ilseg.methods import METHODS
from edge_ilseg.models.spec import ModelSpec
from edge_ilseg.scenario_plan import ScenarioPlan, fix_plan, plan_scenario, read_plan
from edge_ilseg.scenario_results import read_results
from edge_ilseg.scenario_run import joint_folder, run_scenario
from edge_ilseg.workspace import open_workspace

DATA = DataConfig("shapes", options={"train": 80, "val": 6, "test": 4, "height_px": 48, "width_px": 48})
SPEC = ModelSpec(backbone="tiny", decoder_channels=16, input_height_px=48, input_width_px=48)
CONFIG = Config(
    DATA,
    ClassesConfig(()),
    SPEC,
    "none",
    TrainConfig(iterations=4, batch_size=4, learning_rate=0.05),
    StepConfig(iterations=3, batch_size=2, learning_rate=0.01),
)
ORDER = ("disk", "square", "ring", "cross", "bar", "crescent", "star", "triangle")


def make_plan(scenario: str = "6+1x2", config: Config = CONFIG, **options: object) -> ScenarioPlan:
    return plan_scenario(config, scenario, class_order=ORDER, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenario") / "run"
    run_scenario(folder, make_plan(), ("finetune", "freeze+kd-output"), (0, 1), accelerator="cpu")
    return folder


def test_all_chains_of_a_seed_start_from_one_step_0(finished: Path) -> None:
    for seed in (0, 1):
        workspace = open_workspace(finished / f"seed-{seed}")
        chains = [f"{k:02}-{method}" for k in (1, 2) for method in ("finetune", "freeze+kd-output")]
        assert workspace.step_names() == ("00-base", *chains)
        base = workspace.read_step("00-base")
        assert base.training.seed == seed
        for method in ("finetune", "freeze+kd-output"):
            first, second = (workspace.read_step(f"{k:02}-{method}") for k in (1, 2))
            assert (first.parent_id, second.parent_id) == (base.id, first.id)
            assert (first.new_classes, second.new_classes) == (("star",), ("triangle",))
            assert (first.training.seed, first.training.iterations) == (seed, 3)
    weights = [open_workspace(finished / f"seed-{seed}").read_step("00-base").weights_sha256 for seed in (0, 1)]
    assert weights[0] != weights[1]


def test_joint_training_is_one_step_on_all_classes_with_the_iterations_of_all_steps(finished: Path) -> None:
    record = open_workspace(joint_folder(finished, 0)).read_step("00-base")
    assert record.class_names == ("background", *ORDER)
    assert record.training.iterations == 4 + 3 + 3


def test_what_is_finished_is_not_run_again(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("step.json")}
    run_scenario(finished, make_plan(), ("finetune", "freeze+kd-output"), (0, 1), accelerator="cpu")
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("step.json")} == before


def test_progress_covers_the_whole_and_never_goes_back(tmp_path: Path) -> None:
    shares: list[float] = []
    plan = make_plan("7+1")
    run_scenario(
        tmp_path / "run", plan, ("freeze",), (0,), accelerator="cpu", progress=lambda _, share: shares.append(share)
    )
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    assert any(0 < share < 4 / 14 for share in shares)


def test_a_killed_run_goes_on_to_the_result_of_one_that_was_not(finished: Path, tmp_path: Path) -> None:
    """The process dies by SIGKILL in the middle; the same command then ends with the weights of `finished`."""
    plan, folder = make_plan(), tmp_path / "run"
    fix_plan(folder, plan)
    code = (
        "import sys, msgspec; from pathlib import Path; from edge_ilseg.scenario_plan import read_plan\n"
        "from edge_ilseg.scenario_run import run_scenario\n"
        "folder = Path(sys.argv[1])\n"
        "run_scenario(folder, read_plan(folder), ('finetune', 'freeze+kd-output'), (0,), accelerator='cpu')"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(folder)]) as process:
        try:
            deadline = time.monotonic() + 120
            while not (folder / "seed-0" / "steps" / "01-finetune").is_dir() and time.monotonic() < deadline:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        finally:
            process.kill()
    before = {path for path in folder.rglob("step.json")}
    assert before
    assert len(before) < len(list((finished / "seed-0").rglob("step.json")))
    run_scenario(folder, plan, ("finetune", "freeze+kd-output"), (0,), accelerator="cpu")
    for part in ("seed-0", "seed-0-joint"):
        mine, theirs = open_workspace(folder / part), open_workspace(finished / part)
        assert mine.step_names() == theirs.step_names()
        for name in mine.step_names():
            assert mine.read_step(name).weights_sha256 == theirs.read_step(name).weights_sha256, name


def test_a_folder_keeps_the_settings_of_its_first_run(finished: Path) -> None:
    other = msgspec.structs.replace(CONFIG, train=msgspec.structs.replace(CONFIG.train, learning_rate=0.5))
    with pytest.raises(WorkspaceError, match=r"with other settings(.|\n)*other train(.|\n)*--out"):
        run_scenario(finished, make_plan(config=other), ("finetune",), (0,), accelerator="cpu")
    assert read_plan(finished) == make_plan()


def test_a_damaged_step_is_named_and_not_trained_over(finished: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    weights = folder / "seed-0" / "steps" / "01-finetune" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(WorkspaceError, match="weights of step 01-finetune are damaged"):
        run_scenario(folder, make_plan(), ("finetune",), (0,), accelerator="cpu")


def test_a_chain_that_diverges_is_left_out_and_the_others_go_on(tmp_path: Path) -> None:
    wild = msgspec.structs.replace(CONFIG.step, learning_rate=1e30, iterations=6)
    plan = make_plan(config=msgspec.structs.replace(CONFIG, step=wild))
    folder = tmp_path / "run"
    run_scenario(folder, plan, ("finetune", "freeze"), (0,), joint=False, accelerator="cpu")
    failed = folder / "seed-0" / "failed" / "01-finetune.txt"
    assert "the loss is not finite" in failed.read_text()
    results = read_results(folder)
    assert results.unfinished[0].startswith("finetune, seed 0 (diverged at step 1: term cross_entropy, iteration")
    stamp = failed.stat().st_mtime_ns
    run_scenario(folder, plan, ("finetune", "freeze"), (0,), joint=False, accelerator="cpu")
    assert failed.stat().st_mtime_ns == stamp


def test_a_step_of_another_parent_or_of_other_settings_is_not_taken_for_finished(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    steps = folder / "seed-0" / "steps"
    shutil.rmtree(steps / "01-finetune")
    with pytest.raises(WorkspaceError, match=r"goes on from another 01-finetune(.|\n)*delete its folder"):
        run_scenario(folder, make_plan(), ("finetune",), (0,), joint=False, accelerator="cpu")
    shutil.rmtree(steps / "02-finetune")
    run_scenario(folder, make_plan(), ("finetune",), (0,), joint=False, accelerator="cpu")
    changed = msgspec.structs.replace(METHODS["freeze+kd-output"], kd_temperature=2.0)
    monkeypatch.setitem(METHODS, "freeze+kd-output", changed)
    with pytest.raises(WorkspaceError, match=r"other settings(.|\n)*kd_temperature 1\.0(.|\n)*kd_temperature 2\.0"):
        run_scenario(folder, make_plan(), ("freeze+kd-output",), (0,), joint=False, accelerator="cpu")


def test_a_closed_form_that_cannot_be_solved_ends_its_own_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsolvable(*_: object) -> None:
        raise TrainingError("a class has no pixel to fit its scores to", found="star")

    monkeypatch.setattr(analytic_step, "fit_head", unsolvable)
    run_scenario(tmp_path / "run", make_plan(), ("analytic", "freeze"), (0,), joint=False, accelerator="cpu")
    results = read_results(tmp_path / "run")
    assert [item.method for item in results.summaries] == ["freeze"]
    assert results.unfinished == ("analytic, seed 0 (step 1: a class has no pixel to fit its scores to)",)


def test_overlapped_without_a_background_hides_as_void_and_says_what_it_replaces(
    msrc_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole command on files in the layout of MSRC-v2; every pixel of an old class is void in the increments."""
    arguments = ["msrc:20+1", "--root", str(msrc_root), "--train-split", "train", "--eval-split", "test"]
    arguments += ["--setup", "overlapped", "--backbone", "tiny", "--size", "48x48", "--iterations", "2"]
    arguments += ["--step-iterations", "2", "--batch-size", "2", "--class-order", "listed", "--no-joint"]
    arguments += ["--methods", "kd-output,mib,plop,analytic", "--accelerator", "cpu", "--out", str(tmp_path / "run")]
    assert run(["scenario", "run", *arguments]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "setup overlapped" in text
    assert "On this data kd-output is run with distillation on every pixel that is not new" in text
    assert "On this data mib is run with plain cross-entropy" in text
    results = read_results(tmp_path / "run")
    assert set(results.replaced) == {"kd-output", "mib", "plop"}
    assert {item.method for item in results.summaries} == {"kd-output", "mib", "plop", "analytic"}


def test_iterations_may_grow_with_the_classes_of_a_step() -> None:
    plan = make_plan("5+2+1", iterations_per_class=10)
    assert [plan.step_settings(index, "finetune", 0).iterations for index in (1, 2)] == [20, 10]
    assert plan.joint_settings(0).iterations == 4 + 20 + 10


@pytest.mark.parametrize("order", ["listed", "alphabetical", "frequency", "random"])
def test_a_class_order_is_by_name_by_pixels_or_drawn(order: str) -> None:
    plan = plan_scenario(CONFIG, "6+2", class_order=order, order_seed=3)
    assert plan.class_order == order
    names = [name for step in plan.classes for name in step]
    assert names[0] == "background"
    assert sorted(names[1:]) == sorted(ORDER)
    if order == "alphabetical":
        assert names[1:] == sorted(ORDER)
    assert plan == plan_scenario(CONFIG, "6+2", class_order=order, order_seed=3)


def test_a_plan_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not fit the data set"):
        make_plan("6+3")
    with pytest.raises(ConfigError, match="unknown class order"):
        plan_scenario(CONFIG, "6+2", class_order="alphabetic")
    with pytest.raises(ClassNameError, match="did you mean 'star'"):
        plan_scenario(CONFIG, "6+2", class_order=(*ORDER[:6], "strar", "triangle"))


def test_an_unknown_method_is_found_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'finetune'"):
        run_scenario(tmp_path / "run", make_plan(), ("freeze", "finetun"), (0,), accelerator="cpu")
    assert not (tmp_path / "run").exists()


COMMAND = [
    "shapes:6+1x2",
    "--backbone",
    "tiny",
    "--size",
    "48x48",
    "--class-order",
    ",".join(ORDER),
    "--batch-size",
    "2",
]
COMMAND += ["--iterations", "3", "--iterations-per-class", "2", "--accelerator", "cpu"]
COMMAND += [word for item in ("train=80", "val=4", "height_px=48", "width_px=48") for word in ("--option", item)]


def test_the_command_prints_the_tables_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "run"), "--methods", "finetune,balanced"]
    assert run(["scenario", "run", *COMMAND, *out, "--seeds", "1"]) == 0
    text = capsys.readouterr().out
    assert "shapes 6+1x2, setup sequential, class order given (star / triangle)" in text
    assert "forgetting of each class" in text
    assert run(["scenario", "run", *COMMAND, *out, "--seeds", "0,1", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [item["method"] for item in results["summaries"]] == ["finetune", "balanced", "joint"]
    assert [item["seeds"] for item in results["summaries"]] == [[0, 1]] * 3
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results
    assert (tmp_path / "run" / "results.md").read_text().count("| balanced |") == 8
    assert run(["scenario", "show", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == results


def test_settings_can_come_from_a_workspace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    init = [
        "--dataset",
        "shapes",
        "--later-classes",
        "star",
        "--backbone",
        "tiny",
        "--size",
        "32x32",
        "--setup",
        "disjoint",
    ]
    assert run(["init", str(tmp_path / "work"), *init, "--option", "train=40", "--option", "val=2"]) == 0
    capsys.readouterr()
    few = ["--iterations", "2", "--step-iterations", "1", "--batch-size", "2", "--no-joint", "--accelerator", "cpu"]
    command = ["shapes:7+1", "--like", str(tmp_path / "work"), "--out", str(tmp_path / "run"), *few, "--json"]
    assert run(["scenario", "run", *command]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert (plan["model"]["backbone"], plan["model"]["input_width_px"], plan["weights"]) == ("tiny", 32, "none")
    assert (plan["data"]["setup"], plan["data"]["options"]["train"]) == ("disjoint", 40)
    assert (plan["train"]["iterations"], plan["step"]["iterations"]) == (2, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shapes"], "such as msrc:16+5"),
        (["shape:6+2"], "did you mean 'shapes'"),
        (["shapes:6+x"], "cannot be read"),
        (["shapes:6+2", "--seeds", "two"], "or a list such as 0,4"),
        (["shapes:6+2", "--methods", "freez"], "did you mean 'freeze'"),
        (["shapes:6+2", "--like", "."], "no edge-ilseg.toml"),
    ],
)
def test_a_mistake_in_the_command_is_explained(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["scenario", "run", *arguments]) == 3
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_showing_a_folder_without_a_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["scenario", "show", str(tmp_path)]) == 3
    assert "holds no run of a scenario" in capsys.readouterr().err


def test_a_preallocated_head_is_that_of_the_chains_and_joint_training_has_its_classes_alone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = msgspec.structs.replace(CONFIG, model=msgspec.structs.replace(SPEC, preallocated_classes=2))
    run_scenario(folder, make_plan(config=config), ("balanced", "kd-output"), (0,), accelerator="cpu")
    reserved = {}
    for part in (folder / "seed-0", joint_folder(folder, 0)):
        workspace = open_workspace(part)
        for name in workspace.step_names():
            model = load_model(workspace.step_folder(name), workspace.read_step(name))
            reserved[part.name, name] = (model.class_count, model.reserved_count)
    chains = {("seed-0", f"{k:02}-{method}"): (7 + k, 2 - k) for k in (1, 2) for method in ("balanced", "kd-output")}
    base = {("seed-0", "00-base"): (7, 2), ("seed-0-joint", "00-base"): (9, None)}  # with the background
    assert reserved == base | chains


def test_a_step_costs_the_same_however_many_were_taken(tmp_path: Path) -> None:
    """Size: each step adds one row of the classifier to the weights, and nothing else."""
    folder = tmp_path / "run"
    run_scenario(folder, make_plan("4+1x4"), ("freeze",), (0,), joint=False, accelerator="cpu")
    workspace = open_workspace(folder / "seed-0")
    records = [workspace.read_step(name) for name in workspace.step_names()]
    numbers = [
        sum(tensor.numel() for tensor in load_model(workspace.step_folder(record.name), record).state_dict().values())
        for record in records
    ]
    grown = {later - earlier for earlier, later in itertools.pairwise(numbers)}
    assert grown == {SPEC.decoder_channels + 1}


def test_a_closed_form_grows_by_its_classes_and_not_by_its_steps(tmp_path: Path) -> None:
    """Its sums: of each class a triangle of the features' products, their sum and a number, whatever step taught it."""
    sizes: dict[str, list[int]] = {}
    for scenario in ("4+1x4", "4+4"):
        folder = tmp_path / scenario
        run_scenario(folder, make_plan(scenario), ("analytic",), (0,), joint=False, accelerator="cpu")
        workspace = open_workspace(folder / "seed-0")
        sizes[scenario] = [
            (workspace.step_folder(name) / "statistics.safetensors").stat().st_size for name in workspace.step_names()
        ]
    grown = [later - earlier for earlier, later in itertools.pairwise(sizes["4+1x4"])]
    assert max(grown) - min(grown) < 100  # digits in the file's head
    assert sizes["4+1x4"][-1] == pytest.approx(sizes["4+4"][-1], abs=200)


def test_steps_trained_at_the_same_time_have_the_weights_of_those_trained_one_after_another(tmp_path: Path) -> None:
    shares: list[float] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        folders = tmp_path / "one", tmp_path / "several"
        for folder, jobs in zip(folders, (1, 3), strict=True):
            run_scenario(
                folder,
                make_plan(),
                ("finetune", "freeze+kd-output"),
                (0, 1),
                accelerator="cpu",
                jobs=jobs,
                progress=lambda _, share: shares.append(share),
            )
    finally:
        torch.set_num_threads(threads)
    one, several = ({p.parent.relative_to(f): p for p in f.rglob("step.json")} for f in folders)
    assert one.keys() == several.keys()
    assert len(one) == 2 * (1 + 2 * 2 + 1)
    for name, path in one.items():
        assert read_record(path.parent).weights_sha256 == read_record(several[name].parent).weights_sha256, name
    assert shares[-1] == pytest.approx(1.0)


def test_an_error_in_one_of_several_processes_is_told_and_ends_the_run(tmp_path: Path) -> None:
    wild = msgspec.structs.replace(CONFIG.train, learning_rate=1e30, iterations=20)
    plan = make_plan(config=msgspec.structs.replace(CONFIG, train=wild))
    with pytest.raises(NotFiniteError, match=r"the loss is not finite(.|\n)*learning-rate"):
        run_scenario(tmp_path / "run", plan, ("finetune",), (0,), joint=False, accelerator="cpu", jobs=2)
    assert not list(tmp_path.rglob("step.json"))


def test_a_chain_that_diverges_in_another_process_is_left_out_and_the_others_go_on(tmp_path: Path) -> None:
    wild = msgspec.structs.replace(CONFIG.step, learning_rate=1e30, iterations=6)
    plan = make_plan("6+1x2", config=msgspec.structs.replace(CONFIG, step=wild))
    folder = tmp_path / "run"
    run_scenario(folder, plan, ("finetune", "freeze"), (0,), joint=False, accelerator="cpu", jobs=2)
    assert "the loss is not finite" in (folder / "seed-0" / "failed" / "01-finetune.txt").read_text()
    assert not (folder / "seed-0" / "steps" / "02-finetune").exists()


def children(pid: int) -> list[int]:
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def processor_seconds(pid: int) -> float:
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's list of a process's children")
def test_processes_end_with_the_run_that_started_them(tmp_path: Path) -> None:
    """Left behind they would go on to write steps beside those of the run that follows."""
    long = msgspec.structs.replace(CONFIG.train, iterations=10**6)
    folder = tmp_path / "run"
    fix_plan(folder, make_plan(config=msgspec.structs.replace(CONFIG, train=long)))
    code = (
        "import sys; from pathlib import Path; from edge_ilseg.scenario_plan import read_plan\n"
        "from edge_ilseg.scenario_run import run_scenario\n"
        "if __name__ == '__main__':\n"
        "    folder = Path(sys.argv[1])\n"
        "    run_scenario(folder, read_plan(folder), ('finetune',), (0, 1), accelerator='cpu', jobs=2)"
    )
    script = tmp_path / "run.py"
    script.write_text(code)
    deadline = time.monotonic() + 240
    with subprocess.Popen([sys.executable, script, str(folder)]) as process:
        try:
            left: list[int] = []  # those that have computed for longer than it takes to start
            while len(left) < 2 and time.monotonic() < deadline:
                time.sleep(0.1)
                left = [pid for pid in children(process.pid) if processor_seconds(pid) > 4]
        finally:
            process.kill()
    assert len(left) >= 2
    while any(Path(f"/proc/{pid}").is_dir() for pid in left) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in left if Path(f"/proc/{pid}").is_dir()]
