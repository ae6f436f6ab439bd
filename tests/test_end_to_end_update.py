"""From training to a confirmed model: real steps, a real server, devices on different steps, one step that forgot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from lineage import DATA_TEXT, Lineage, train_lineage
from nginx import Nginx, cut_every, serving
from update_world import Device, Publisher, bundle_id

from edge_ilseg.devices.limits import Limits
from edge_ilseg.devices.update.agent_run import run_pass
from edge_ilseg.fleet import read_fleet

pytestmark = pytest.mark.slow

LIMITS = Limits(max_old_miou_drop_pct=8.0, max_class_drop_pct=30.0)
"""Of steps that were trained for a minute; what was fine-tuned lost four times as much."""
CUT_BYTES = 100_000


@pytest.fixture(scope="module")
def lineage(tmp_path_factory: pytest.TempPathFactory) -> Lineage:
    return train_lineage(tmp_path_factory.mktemp("lineage"))


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    return Publisher(tmp_path)


@pytest.fixture
def server(publisher: Publisher, tmp_path: Path) -> Iterator[Nginx]:
    with serving(publisher.repository, tmp_path / "nginx") as running:
        yield running


def follow(device: Device, passes: int = 6) -> None:
    """What a timer and an application do, until nothing is new."""
    for _ in range(passes):
        done = run_pass(device.agent)
        assert done.problems == ()
        if done.outcomes[-1].phase == "trial":
            assert device.use().is_on_trial
        elif done.outcomes[-1].message == "nothing new for this device":
            return
    raise AssertionError(f"not done after {passes} passes: {done}")


def test_every_device_ends_on_the_newest_step_and_refuses_the_one_that_forgot(
    lineage: Lineage, publisher: Publisher, server: Nginx, tmp_path: Path
) -> None:
    with cut_every(server.port, CUT_BYTES) as cut_url:
        settings = {"data": DATA_TEXT, "max_images": 150}
        publisher.publish(lineage.base, limits=LIMITS)
        publisher.publish(lineage.first, limits=LIMITS)
        devices = {
            "on-step-0": Device(tmp_path / "a", publisher, lineage.base, name="a", repository=server.url, **settings),
            "on-step-1": Device(tmp_path / "b", publisher, lineage.first, name="b", repository=server.url, **settings),
            "cut": Device(tmp_path / "c", publisher, lineage.base, name="c", repository=cut_url, **settings),
        }
        newest = publisher.publish(lineage.second, limits=LIMITS)
        devices["fresh"] = Device(tmp_path / "d", publisher, lineage.base, name="d", repository=server.url, **settings)
        for name, device in devices.items():
            follow(device)
            assert device.runs == bundle_id(lineage.second), name
            confirmed = device.told()[-1]
            assert (confirmed["event"], confirmed["release"]) == ("confirmed", newest), name

        publisher.publish(lineage.forgetful, limits=LIMITS)
        for name, device in devices.items():
            done = run_pass(device.agent)
            assert done.exit_code == 1, name
            refused = device.told()[-1]
            assert refused["event"] == "gate refused", name
            assert refused["forgotten"], name
            assert refused["forgotten"][0]["name"] in refused["reason"], name
            assert refused["retention"]["old_miou_drop_pct"] > LIMITS.max_old_miou_drop_pct, name
            assert device.runs == bundle_id(lineage.second), name
            assert not device.use().is_on_trial, name
            assert run_pass(device.agent).outcomes[-1].message == "nothing new for this device", name
    reports = tmp_path / "all-reports"
    reports.mkdir()
    for device in devices.values():
        for path in device.reports.iterdir():
            (reports / path.name).write_bytes(path.read_bytes())
    fleet = read_fleet(reports)
    assert {row.device_id for row in fleet.devices} == {"a", "b", "c", "d"}
    assert {row.active.bundle_id for row in fleet.devices if row.active} == {bundle_id(lineage.second)}
    cut = [line for line in server.requests() if " 206 " in line or "packs" in line]
    assert len(cut) > len(devices)


def test_a_step_costs_a_device_less_than_the_bundle(lineage: Lineage, publisher: Publisher, tmp_path: Path) -> None:
    publisher.publish(lineage.base, limits=LIMITS)
    device = Device(tmp_path / "a", publisher, lineage.base, data=DATA_TEXT, max_images=150)
    publisher.publish(lineage.first, limits=LIMITS)
    (fetched,) = (outcome for outcome in run_pass(device.agent).outcomes if outcome.command == "fetch")
    total = sum(path.stat().st_size for path in lineage.first.rglob("*") if path.is_file())
    assert fetched.fetched_bytes is not None
    assert 0 < fetched.fetched_bytes < total
