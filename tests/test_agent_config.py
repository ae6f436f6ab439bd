"""`agent.toml`: strict, readable, and the same after a round trip."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_ilseg.devices.limits import OwnLimits
from edge_ilseg.devices.update.agent_config import (
    CONFIG_NAME,
    AgentConfig,
    encode_agent_config,
    parse_agent_config,
    read_agent_config,
)
from edge_ilseg.devices.update.gate_records import GateSettings
from edge_ilseg.errors import ConfigError

PATH = Path("/somewhere/agent.toml")


def test_what_is_written_is_read_again() -> None:
    config = AgentConfig(
        repository="https://models.example/fleet",
        device_id="cam-17.b_2",
        group='lab "two"',
        reports="/var/spool/reports",
        timeout_s=5.5,
        gate=GateSettings(data="folder:/data/labelled", images="/data/frames", max_images=50, accept_too_few=True),
        limits=OwnLimits(max_latency_p95_ms=40.0),
    )
    assert parse_agent_config(encode_agent_config(config), PATH) == config


def test_the_smallest_configuration_is_a_repository_and_a_name() -> None:
    config = parse_agent_config('repository = "https://a.example"\ndevice_id = "d"\n', PATH)
    assert config == AgentConfig(repository="https://a.example", device_id="d")
    assert parse_agent_config(encode_agent_config(config), PATH) == config


def test_relative_places_are_those_beside_the_file() -> None:
    text = 'repository = "usb"\ndevice_id = "d"\nreports = "out"\n[gate]\ndata = "folder:mine"\nimages = "frames"\n'
    config = parse_agent_config(text, PATH)
    assert config.repository == "/somewhere/usb"
    assert config.reports == "/somewhere/out"
    assert config.gate.data == "folder:/somewhere/mine"
    assert config.gate.images == "/somewhere/frames"


def test_the_gate_gets_the_limits_of_the_device() -> None:
    text = 'repository = "https://a.example"\ndevice_id = "d"\n[gate]\nmax_images = 9\n[limits]\nmax_rss_mib = 300\n'
    assert parse_agent_config(text, PATH).gate_settings == GateSettings(
        max_images=9, limits=OwnLimits(max_rss_mib=300.0)
    )


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('repositry = "x"', "did you mean 'repository'"),
        ("[gate]\nmax_image = 3", "did you mean 'max_images'"),
        ("[limits]\nmax_rss = 3", "did you mean 'max_rss_mib'"),
        ("[gate]\n[gate.limits]\nmax_rss_mib = 3", "gate.limits"),
        ("timeout_s = 0", "timeout_s"),
        ("gate = 3", "gate"),
        ('group = "a', "no TOML"),
    ],
)
def test_a_mistake_is_named(line: str, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_agent_config(f'repository = "https://a.example"\ndevice_id = "d"\n{line}\n', PATH)
    assert named in str(caught.value)


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a b", "a\\n", "x" * 65])
def test_a_device_id_is_fit_for_a_file_name(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be used"):
        parse_agent_config(f'repository = "https://a.example"\ndevice_id = "{name}"\n', PATH)


def test_a_folder_that_was_never_set_up_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not set up"):
        read_agent_config(tmp_path)
    (tmp_path / CONFIG_NAME).write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_agent_config(tmp_path)


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
def test_a_limit_that_everything_or_nothing_keeps_to_is_refused(value: str) -> None:
    text = f'repository = "https://a.example"\ndevice_id = "d"\n[limits]\nmax_old_miou_drop_pct = {value}\n'
    with pytest.raises(ConfigError, match="max_old_miou_drop_pct is not a finite number") as caught:
        parse_agent_config(text, PATH)
    assert caught.value.where == PATH
