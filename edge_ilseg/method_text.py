"""How a chain of a scenario names its method: a preset, another cut point, and what is set by hand, in one word.

    METHOD[@CUT][:KEY=VALUE]...        kd-output@stages:2:kd_output=2:kd_temperature=2

1. A key is a loss term (`methods.TERM_NAMES`), whose value is its weight, or a switch (`methods.SWITCHES`).
2. The word is the chain's name in folders and tables, as it was written.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec

from edge_ilseg.config import StepConfig
from edge_ilseg.errors import ConfigError, choice_hint
from edge_ilseg.methods import SWITCHES, TERM_NAMES

LONGEST = 200
"""Bytes of a chain's name: a file system takes 255 for a folder's, and a folder that is written has more."""


class MethodText(NamedTuple):
    """What a chain's name says."""

    preset: str
    freeze: str | None
    """The cut point that takes the place of the preset's own; None: not said."""
    losses: dict[str, float]
    switches: dict[str, object]

    def settings(self, step: StepConfig) -> StepConfig:
        """The settings of a step with this method."""
        changed = {"method": self.preset, "freeze": self.freeze, "losses": self.losses, **self.switches}
        return msgspec.structs.replace(step, **changed)


def parse_method(text: str) -> MethodText:
    """Read a chain's name.

    Raises:
        ConfigError: a key is unknown or stands twice, its value cannot be read, or the name is too long. Whether the
            preset and the cut point are known, and whether all of it can work together, `config.step_method` finds out.
    """
    if len(text.encode()) > LONGEST:
        raise ConfigError(
            "a method's name is too long",
            where=repr(text),
            found=f"{len(text.encode())} bytes",
            expected=f"{LONGEST} at most",
            hint="set less by hand: a folder has this name",
        )
    head, *parts = text.split(":")
    while parts and "=" not in parts[0]:  # of a cut point, such as stages:2
        head += f":{parts.pop(0)}"
    preset, at, freeze = head.partition("@")
    found_values: dict[str, object] = {}
    for part in parts:
        key, _, value = part.partition("=")
        if key in found_values:
            raise ConfigError("a method has a setting twice", where=repr(text), found=key, hint="leave one out")
        found_values[key] = _value(key, value, text)
    losses = {key: value for key, value in found_values.items() if isinstance(value, float) and key in TERM_NAMES}
    switches = {key: value for key, value in found_values.items() if key not in TERM_NAMES}
    return MethodText(preset, freeze if at else None, losses, switches)


def _value(key: str, value: str, text: str) -> object:
    """The value of a term or a switch, of the type that `StepConfig` has for it."""
    known = (*TERM_NAMES, *SWITCHES)
    if key not in known:
        raise ConfigError(
            "a method has a setting that is no loss term and no switch",
            where=repr(text),
            found=repr(key),
            expected=", ".join(known),
            hint=choice_hint(key, known),
        )
    table = {"losses": {key: value}} if key in TERM_NAMES else {key: value}
    try:
        settings = msgspec.convert(table, StepConfig, strict=False)
    except msgspec.ValidationError as error:
        raise _unusable(key, value, text, str(error)) from error
    found: object = settings.losses[key] if key in TERM_NAMES else getattr(settings, key)
    if found is None or (isinstance(found, float) and not math.isfinite(found)):
        raise _unusable(key, value, text, "a finite number, or a word that the switch has")
    return found


def _unusable(key: str, value: str, text: str, expected: str) -> ConfigError:
    return ConfigError(
        "a method has a setting whose value cannot be used",
        where=repr(text),
        found=f"{key}={value}",
        expected=expected,
        hint=f"write {key}=VALUE with a value of this type",
    )
