"""The agent takes a release all the way, or leaves the device as it was: real bundles, keys, gates and processes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from bundles import BASE, GROWN, write_bundle, write_color_folder
from update_world import Device, Publisher, bundle_id

from edge_ilseg.cli import run
from edge_ilseg.devices.update.agent import Agent
from edge_ilseg.devices.update.agent_run import import_from, run_pass
from edge_ilseg.devices.update.lock import held
from edge_ilseg.errors import UpdateError

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


class World:
    """Bundles of two steps, one that forgot, labelled images, a publisher; devices are made by `device`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base, self.good, self.forgetful = folder / "base", folder / "good", folder / "forgetful"
        write_bundle(self.base, BASE, step_id="a" * 64)
        write_bundle(self.good, GROWN, step_id="b" * 64, parent_id="a" * 64)
        write_bundle(self.forgetful, GROWN, step_id="c" * 64, parent_id="a" * 64, forget="apple")
        self.data = write_color_folder(folder / "data", count=30)
        self.publisher = Publisher(folder)

    def device(self, name: str = "cam-1", bundle: Path | None = None, **settings: Any) -> Device:
        settings = {"data": f"folder:{self.data}", **settings}
        return Device(self.folder / name, self.publisher, bundle or self.base, name=name, **settings)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def phases(device: Device) -> list[str]:
    """Stage by stage to the trial."""
    agent = device.agent
    return [stage().phase for stage in (agent.check, agent.fetch, agent.stage, agent.gate, agent.activate)]


def test_a_good_release_is_taken_tried_and_confirmed(world: World) -> None:
    device = world.device()
    assert device.runs == bundle_id(world.base)
    number = world.publisher.publish(world.good)
    assert phases(device) == ["checked", "fetching", "staged", "gated", "trial"]
    assert device.runs == bundle_id(world.good)
    waiting = device.agent.confirm()
    assert (waiting.phase, waiting.message) == ("trial", "0 of 3 frames over 0 of 0 s so far")
    assert device.use().is_on_trial
    confirmed = device.agent.confirm()
    assert (confirmed.phase, confirmed.release) == ("idle", number)
    assert run_pass(device.agent).outcomes[-1].message == "nothing new for this device"
    assert [report["event"] for report in device.told()] == [
        "checked",
        "fetched",
        "gate passed",
        "activated",
        "confirmed",
    ]
    assert {(report["release"], report["step_name"]) for report in device.told()} == {(number, "01-boat")}
    assert device.told()[-1]["active"] == {
        "bundle_id": bundle_id(world.good),
        "step_name": "01-boat",
        "release": number,
    }


def test_a_release_that_forgot_is_refused_by_the_name_of_the_class_and_not_tried_again(world: World) -> None:
    device = world.device()
    number = world.publisher.publish(world.forgetful)
    done = run_pass(device.agent)
    verdict = done.outcomes[-1].verdict
    assert (done.exit_code, done.outcomes[-1].phase) == (1, "idle")
    assert verdict is not None
    assert verdict.forgotten[0] == "apple"
    assert "apple" in done.outcomes[-1].message
    assert device.runs == bundle_id(world.base)
    refused = device.told()[-1]
    assert (refused["event"], refused["release"], refused["active"]["step_name"]) == (
        "gate refused",
        number,
        "00-grass",
    )
    assert refused["forgotten"][0]["name"] == "apple"
    assert run_pass(device.agent).outcomes[-1].message == "nothing new for this device"
    again = world.publisher.publish(world.good)
    assert run_pass(device.agent).outcomes[-1].release == again


def test_commands_out_of_their_order_change_nothing(world: World) -> None:
    device = world.device()
    agent = device.agent
    for act in (agent.fetch, agent.stage, agent.gate, agent.activate, agent.confirm):
        outcome = act()
        assert outcome.message.startswith("nothing ")
        assert outcome.phase == "idle"
    assert agent.check().message == "nothing new for this device"
    with pytest.raises(UpdateError, match="no other model to go back to"):
        agent.roll_back("by hand")
    assert device.runs == bundle_id(world.base)


def test_each_stage_can_be_run_twice(world: World) -> None:
    device = world.device()
    world.publisher.publish(world.good)
    agent = device.agent
    for act, phase in ((agent.check, "checked"), (agent.fetch, "fetching"), (agent.fetch, "fetching")):
        assert act().phase == phase
    assert agent.fetch().fetched_bytes == 0
    for act, phase in ((agent.stage, "staged"), (agent.check, "staged"), (agent.stage, "staged")):
        assert act().phase == phase
    for act, phase in ((agent.gate, "gated"), (agent.gate, "gated"), (agent.activate, "trial")):
        assert act().phase == phase
    assert agent.activate().phase == agent.check().phase == "trial"


def test_a_release_that_is_halted_on_trial_goes_back(world: World) -> None:
    device = world.device()
    number = world.publisher.publish(world.good)
    phases(device)
    world.publisher.halt(number, "grass was seen as boats")
    outcome = device.agent.check()
    assert (outcome.phase, outcome.exit_code) == ("idle", 1)
    assert "grass was seen as boats" in outcome.message
    assert device.runs == bundle_id(world.base)


def test_a_release_that_is_halted_before_the_trial_is_left(world: World) -> None:
    device = world.device()
    number = world.publisher.publish(world.good)
    device.agent.check()
    device.agent.fetch()
    world.publisher.halt(number, "too many fell")
    left = device.agent.check()
    assert (left.phase, left.release) == ("idle", number)
    assert "too many fell" in left.message
    assert device.agent.check().message == "nothing new for this device"


def test_an_application_that_fails_brings_the_model_before_back(world: World) -> None:
    from edge_ilseg.devices.application import Application

    device = world.device()
    world.publisher.publish(world.good)
    phases(device)
    with Application(device.root) as application:
        application.current()
        application.failed("no memory for the model")
        assert application.current().folder.resolve() == (device.root / "current/bundle").resolve()
    assert device.runs == bundle_id(world.base)
    assert run_pass(device.agent).outcomes[-1].message == "nothing new for this device"


def test_bit_rot_in_the_model_that_runs_makes_room_for_the_one_before_and_is_mended(world: World) -> None:
    device = world.device()
    number = world.publisher.publish(world.good)
    phases(device)
    device.use()
    device.agent.confirm()
    model = device.root / "current/bundle/fp32.onnx"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    outcome = device.agent.verify_running()
    assert any("damaged" in note for note in outcome.notes)
    assert device.runs == bundle_id(world.base)
    done = run_pass(device.agent)
    assert (done.outcomes[-1].phase, done.outcomes[-1].release) == ("trial", number)
    assert device.runs == bundle_id(world.good)


def test_what_nothing_here_can_judge_is_left_and_taken_once_something_can(world: World) -> None:
    device = world.device(data=None)
    world.publisher.publish(world.good)
    done = run_pass(device.agent)
    assert (done.outcomes[-1].phase, done.exit_code) == ("idle", 1)
    assert device.told()[-1]["event"] == "not judged"
    gate = msgspec.structs.replace(device.agent.config.gate, data=f"folder:{world.data}")
    config = msgspec.structs.replace(device.agent.config, gate=gate)
    done = run_pass(Agent(device.root, config))
    assert done.outcomes[-1].phase == "trial"
    (fetched,) = (outcome for outcome in done.outcomes if outcome.command == "fetch")
    assert fetched.fetched_bytes is not None
    assert fetched.fetched_bytes < 5000  # the index alone: what was staged is still there


def test_images_that_the_publisher_ships_are_enough_to_judge_by(world: World) -> None:
    device = world.device(data=None)
    world.publisher.publish(world.forgetful, validation=world.data)
    done = run_pass(device.agent)
    verdict = done.outcomes[-1].verdict
    assert verdict is not None
    assert (verdict.forgotten[0], verdict.evidence) == ("apple", ("shipped labels",))


def test_a_release_of_what_came_with_the_device_is_nothing_new(world: World) -> None:
    device = world.device()
    world.publisher.publish(world.base, validation=world.data)  # the same bundle in another content
    assert device.agent.check().message == "nothing new for this device"
    assert device.agent.check().phase == "idle"


def test_going_back_on_purpose_is_a_higher_release_of_older_bytes(world: World) -> None:
    device = world.device()
    world.publisher.publish(world.good)
    phases(device)
    device.use()
    device.agent.confirm()
    number = world.publisher.publish(world.base)
    done = run_pass(device.agent)
    assert done.outcomes[-1].release == number


def test_a_device_outside_of_the_rollout_takes_nothing(world: World) -> None:
    inside, outside = world.device("cam-in", group="lab"), world.device("cam-out", group="field")
    world.publisher.publish(world.good, groups=("lab",))
    assert inside.agent.check().phase == "checked"
    assert outside.agent.check().message == "nothing new for this device"


def test_a_copy_of_the_repository_is_as_good_as_a_network(world: World, tmp_path: Path) -> None:
    device = world.device(repository="https://127.0.0.1:9/nobody-is-there")
    world.publisher.publish(world.good)
    stick = shutil.copytree(world.publisher.repository, tmp_path / "stick")
    done = import_from(device.agent, stick)
    assert done.outcomes[-1].phase == "staged"
    shutil.rmtree(stick)
    assert device.agent.gate().phase == "gated"
    assert device.agent.activate().phase == "trial"
    with pytest.raises(UpdateError, match="no copy of a repository"):
        import_from(device.agent, tmp_path / "data")


def test_a_pass_without_a_network_is_a_problem_and_not_the_end(world: World) -> None:
    device = world.device(repository="http://127.0.0.1:9/nobody-is-there", poll_deadline_s=1.0)
    done = run_pass(device.agent)
    assert done.exit_code == 3
    assert "reached" in done.problems[0] or "connect" in done.problems[0].lower()
    assert device.runs == bundle_id(world.base)


def test_a_history_that_cannot_be_written_stops_nothing_and_is_said(world: World) -> None:
    device = world.device()
    world.publisher.publish(world.good)
    (device.root / "history.sqlite").mkdir()
    outcome = device.agent.check()
    assert outcome.phase == "checked"
    assert any("history" in note for note in outcome.notes)
    assert device.agent.fetch().phase == "fetching"


def test_lost_limits_are_asked_for_again(world: World) -> None:
    device = world.device()
    world.publisher.publish(world.good)
    device.agent.check()
    device.agent.fetch()
    device.agent.stage()
    (device.root / "candidate.json").write_bytes(b"{}")
    with pytest.raises(UpdateError, match="limits of the release are lost"):
        device.agent.gate()
    assert run_pass(device.agent).outcomes[-1].phase == "trial"


def test_a_trial_whose_limits_are_lost_goes_back(world: World) -> None:
    device = world.device()
    world.publisher.publish(world.good)
    phases(device)
    device.use()
    (device.root / "candidate.json").unlink()
    assert device.agent.confirm().phase == "idle"
    assert device.runs == bundle_id(world.base)


def test_a_clock_of_1970_takes_nothing_old_and_one_of_2040_leaves_nothing_behind(world: World) -> None:
    device = world.device()
    world.publisher.publish(world.good)
    far = Agent(device.root, device.agent.config, clock=lambda: datetime(2040, 1, 1, tzinfo=UTC))
    with pytest.raises(UpdateError, match="expired"):
        far.check()
    early = Agent(device.root, device.agent.config, clock=lambda: datetime(1970, 1, 1, tzinfo=UTC))
    assert early.check().phase == "checked"
    assert run_pass(device.agent).outcomes[-1].phase == "trial"
    device.use()
    device.agent.confirm()
    late = Agent(device.root, device.agent.config, clock=lambda: datetime.now(UTC) + timedelta(days=8))
    with pytest.raises(UpdateError, match="expired"):
        late.check()


def test_a_second_agent_waits_and_then_names_the_first(world: World) -> None:
    device = world.device(lock_deadline_s=0.2)
    program = """
    import sys, time
    from pathlib import Path
    from edge_ilseg.devices.update.lock import held
    with held(Path(sys.argv[1]), deadline_s=5):
        print("held", flush=True)
        time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(device.root / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UpdateError) as caught:
            device.agent.check()
        assert str(other.pid) in str(caught.value)
        other.kill()
    assert device.agent.check().phase == "idle"
    with held(device.root / "lock", deadline_s=1):
        pass


def test_a_poll_loads_neither_numpy_nor_a_runtime_nor_torch(world: World) -> None:
    device = world.device()
    blocked = ["numpy", "onnxruntime", "openvino", "torch", "onnx", "PIL"]
    program = f"""
    import sys
    for name in {blocked}: sys.modules[name] = None
    from edge_ilseg.cli import run
    sys.exit(run(["device", *sys.argv[1:]]))
    """
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(program)]
    for arguments in (["check"], ["run", "--json"], ["status", "--json"], ["report"], ["gc"], ["confirm"]):
        done = subprocess.run([*command, *arguments, "--root", device.root], capture_output=True, text=True, cwd=ROOT)
        assert (done.returncode, done.stderr) == (0, ""), arguments


def test_the_command_line_takes_a_release_all_the_way(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    root = world.folder / "by-hand"
    given = ["--root", str(root), "--repository", str(world.publisher.repository), "--data", f"folder:{world.data}"]
    assert run(["device", "init", str(world.base), *given, "--device-id", "cam-7"]) == 0
    assert run(["device", "init", str(world.base), *given, "--device-id", "cam-7"]) == 0
    assert run(["device", "init", str(world.base), *given, "--device-id", "cam-8"]) == 3
    assert "set up already" in capsys.readouterr().err
    world.publisher.publish(world.good)
    for command in ("check", "fetch", "stage", "gate", "activate"):
        assert run(["device", command, "--root", str(root)]) == 0
    capsys.readouterr()
    assert run(["device", "status", "--root", str(root), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert [(model["role"], model["is_current"]) for model in status["models"]] == [
        ("on trial", True),
        ("active", False),
        ("factory", False),
    ]
    assert run(["device", "confirm", "--root", str(root)]) == 0
    assert "0 of 3 frames" in capsys.readouterr().out
    assert run(["device", "rollback", "--root", str(root), "--reason", "not today"]) == 0
    assert run(["device", "status", "--root", str(root)]) == 0
    assert "not today" in capsys.readouterr().out


def test_reports_that_cannot_be_delivered_are_kept_and_the_reason_is_told(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    root = world.folder / "no-place"
    given = ["--root", str(root), "--repository", str(world.publisher.repository), "--data", f"folder:{world.data}"]
    address = ["--reports", "http://127.0.0.1:1/reports"]
    assert run(["device", "init", str(world.base), *given, *address, "--device-id", "cam-9"]) == 0
    world.publisher.publish(world.good)
    assert run(["device", "check", "--root", str(root)]) == 0
    capsys.readouterr()
    assert run(["device", "report", "--root", str(root)]) == 3
    told = capsys.readouterr()
    assert told.out.startswith("0 reports delivered, ")
    assert not told.out.startswith("0 reports delivered, 0")
    assert told.err.startswith("not now: ")


def test_a_device_that_was_never_set_up_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("check", "run", "status", "report", "rollback"):
        assert run(["device", command, "--root", str(tmp_path)]) == 3
        assert "edge-ilseg device init" in capsys.readouterr().err


def test_a_server_is_not_believed_about_whom_to_trust(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--root", str(world.folder / "x"), "--repository", "https://127.0.0.1/repo"]
    assert run(["device", "init", str(world.base), *given]) == 3
    assert "--trust" in capsys.readouterr().err
    wrong = world.folder / "wrong.json"
    for data in (b"{}", b"\xff", (world.publisher.repository / "metadata/timestamp.json").read_bytes()):
        wrong.write_bytes(data)
        assert run(["device", "init", str(world.base), *given, "--trust", str(wrong)]) == 3
        assert "root metadata" in capsys.readouterr().err
    assert not (world.folder / "x" / "agent.toml").exists()
