"""`agent.toml`: where a device updates from, who it is, and how it judges. `device init` writes it, a person edits it.

1. Parsed once, strictly: an unknown field is refused, with what may be meant.
2. A place of agent.toml that is no URL may be relative: to the folder that agent.toml is in.

Nothing here loads numpy.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from edge_ilseg.devices.limits import OwnLimits, check_finite
from edge_ilseg.devices.update.gate_records import GateSettings
from edge_ilseg.errors import ConfigError, choice_hint

CONFIG_NAME = "agent.toml"
ROOT_NAME = "root.json"
"""The publisher's root metadata that this device was given: trust begins with it."""

Seconds = Annotated[float, Meta(gt=0)]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z", max_length=64)]


class AgentConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an update agent needs to know."""

    repository: Annotated[str, Meta(min_length=1)]
    """http(s) URL or folder of the publisher's repository."""
    device_id: Name
    """Of this device in the fleet: decides, with a roll-out, whether it is among the first."""
    group: Annotated[str, Meta(max_length=64)] = ""
    reports: str | None = None
    """URL that reports are posted to, or a folder; without it they stay in the history."""
    timeout_s: Seconds = 30.0
    """For a server that says nothing."""
    poll_deadline_s: Seconds = 120.0
    """For each small signed file, with all its tries."""
    fetch_deadline_s: Seconds = 3600.0
    """For one fetch, with all its tries; the next pass goes on where it ended."""
    lock_deadline_s: Seconds = 60.0
    """For another process of the agent to end."""
    gate: GateSettings = GateSettings()
    limits: OwnLimits = OwnLimits()
    """Stricter than what is signed; looser ones change nothing."""

    @property
    def gate_settings(self) -> GateSettings:
        """How the gate judges, with the limits of this device."""
        return msgspec.structs.replace(self.gate, limits=self.limits)


def read_agent_config(root: Path) -> AgentConfig:
    """Read `agent.toml` of a device's folder.

    Raises:
        ConfigError: it is not there, no TOML, or a field is unknown, missing or wrong.
    """
    path = root / CONFIG_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(
            "this device is not set up: there is no agent.toml",
            where=root,
            hint="edge-ilseg device init sets it up; --root names another folder",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "agent.toml cannot be read",
            where=path,
            found=str(error),
            hint="let this user read it, and save it as UTF-8",
        ) from error
    return parse_agent_config(text, path)


def parse_agent_config(text: str, path: Path) -> AgentConfig:
    """Turn the text of `agent.toml` into a configuration, its places made absolute.

    Raises:
        ConfigError: as `read_agent_config`.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            "agent.toml is no TOML", where=path, found=str(error), hint="correct this line of the file"
        ) from error
    return make_agent_config(table, path)


def make_agent_config(table: dict[str, object], path: Path) -> AgentConfig:
    """A configuration of the tables of an `agent.toml` that is, or will be, at `path`; its places are made absolute.

    Raises:
        ConfigError: a field is unknown, missing or wrong, or a limit is not finite.
    """
    for name, known in _known_fields(table).items():
        raise ConfigError(
            "agent.toml has an unknown field",
            where=path,
            found=name,
            expected=", ".join(known),
            hint=choice_hint(name.rpartition(".")[2], known),
        )
    try:
        config = msgspec.convert(table, AgentConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(
            "agent.toml has a value that cannot be used",
            where=path,
            found=str(error),
            hint="correct the value at this path of the file",
        ) from error
    check_finite(config.limits, where=path)
    folder = path.resolve().parent
    gate = msgspec.structs.replace(
        config.gate, data=_absolute_data(config.gate.data, folder), images=_absolute(config.gate.images, folder)
    )
    return msgspec.structs.replace(
        config,
        repository=_absolute(config.repository, folder) or "",
        reports=_absolute(config.reports, folder),
        gate=gate,
    )


def encode_agent_config(config: AgentConfig) -> str:
    """The text of `agent.toml`: what differs from the defaults, with a comment where a user will look first."""
    lines = ["# The update agent of this device. Every field: docs/update.md", ""]
    table = msgspec.to_builtins(config)
    defaults = msgspec.to_builtins(AgentConfig(repository="-", device_id="-"))
    for name, value in table.items():
        if not isinstance(value, dict) and value is not None and (value != defaults[name] or name == "group"):
            lines.append(f"{name} = {_toml(value)}")
    for name in ("gate", "limits"):
        changed = {
            key: value
            for key, value in table[name].items()
            if value is not None and key != "limits" and value != defaults[name].get(key)
        }
        lines += ["", f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in changed.items())]
        if name == "gate" and not {"data", "images"} & set(changed):
            lines.append('# data = "folder:images"    labelled images of this device, or')
            lines.append('# images = "frames"         frames without labels: what a release is judged by')
    return "\n".join(lines) + "\n"


def _known_fields(table: dict[str, object]) -> dict[str, tuple[str, ...]]:
    """The first unknown field, with those that are known in its place."""
    places = {"": AgentConfig, "gate": GateSettings, "limits": OwnLimits}
    for place, struct in places.items():
        inside = table if not place else table.get(place, {})
        known = tuple(name for name in struct.__struct_fields__ if (place, name) != ("gate", "limits"))
        for name in inside if isinstance(inside, dict) else ():
            if name not in known:
                return {f"{place}.{name}" if place else name: known}
    return {}


def _toml(value: object) -> str:
    """A string, number or truth value; a JSON string is a TOML string."""
    return msgspec.json.encode(value).decode()


def _is_url(text: str) -> bool:
    return "://" in text


def _absolute(text: str | None, folder: Path) -> str | None:
    if text is None or _is_url(text):
        return text
    return str(folder / text)


def _absolute_data(text: str | None, folder: Path) -> str | None:
    """Of `KIND:ROOT`, the root."""
    kind, colon, root = (text or "").partition(":")
    return text if not colon or not root else f"{kind}:{folder / root}"
