"""A device profile: what is known of a kind of device, and what it asks of a model. TOML; ours are in `profiles/`.

1. A flag is named as the kernel names it in `/proc/cpuinfo`, and is one of `edge_ilseg.devices.facts.INT8_FLAGS`.
2. Without a flag for integer dot products, int8 weights get 7 of their 8 bits, depthwise ones excepted: sums of
   products must fit 16 bits.
3. A profile that claims what a machine does not have is an error that names it; what the machine has besides is not.
4. Unknown fields are refused.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from edge_ilseg.bundle import Precision, Runtime
from edge_ilseg.devices.facts import INT8_FLAGS, DeviceFacts
from edge_ilseg.devices.limits import OwnLimits, check_finite
from edge_ilseg.errors import ConfigError, choice_hint

PROFILES = Path(__file__).parent / "profiles"
DOT_PRODUCT_FLAGS = frozenset({"avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm"})
MACHINES = {"AMD64": "x86_64", "arm64": "aarch64"}
"""Other systems' names of what Linux calls so."""


class InputSize(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The largest input that a model should have on this device, pixels."""

    width_px: Annotated[int, Meta(ge=1)]
    height_px: Annotated[int, Meta(ge=1)]


class DeviceProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One kind of device."""

    description: str
    machine: str
    """As Linux gives it: `x86_64`, `aarch64`."""
    int8_flags: tuple[str, ...]
    """Those that every device of this kind has."""
    runtimes: Annotated[tuple[Runtime, ...], Meta(min_length=1)] = ("onnxruntime", "openvino")
    """In the order of preference."""
    precisions: Annotated[tuple[Precision, ...], Meta(min_length=1)] = ("int8", "fp32", "fp16")
    """In the order of preference."""
    threads: Annotated[int, Meta(ge=1)] | None = None
    """Of the runtime; None leaves the choice to it."""
    input_size: InputSize | None = None
    limits: OwnLimits = OwnLimits()

    @property
    def allows_8_bit_weights(self) -> bool:
        """Rule 2."""
        return not DOT_PRODUCT_FLAGS.isdisjoint(self.int8_flags)


def profile_names() -> tuple[str, ...]:
    """Names of the profiles that come with this package."""
    return tuple(sorted(path.stem for path in PROFILES.glob("*.toml")))


def read_profile(name: str) -> DeviceProfile:
    """Read one of `profile_names()`, or a file of one's own (a path that ends in `.toml`).

    Raises:
        ConfigError: there is no such profile or file, or it is not a profile; the error names the field.
    """
    path = Path(name) if name.endswith(".toml") else PROFILES / f"{name}.toml"
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            "the device profile is no UTF-8 text", where=path, found=str(error), hint="save it as UTF-8"
        ) from error
    except OSError as error:
        known = profile_names()
        raise ConfigError(
            "there is no such device profile",
            found=repr(name),
            expected=f"{', '.join(known)}, or a file that ends in .toml",
            hint=choice_hint(name, known),
        ) from error
    try:
        profile = msgspec.convert(tomllib.loads(text), DeviceProfile)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ConfigError(
            "the device profile cannot be used",
            where=path,
            found=str(error),
            hint="correct this field, and check it: edge-ilseg device facts --profile FILE",
        ) from error
    check_finite(profile.limits, where=path)
    unknown = [flag for flag in profile.int8_flags if flag not in INT8_FLAGS]
    if unknown:
        raise ConfigError(
            "the device profile names a processor flag that is not known here",
            where=path,
            found=repr(unknown[0]),
            expected=", ".join(INT8_FLAGS),
            hint=choice_hint(unknown[0], INT8_FLAGS),
        )
    return profile


def misfits(profile: DeviceProfile, facts: DeviceFacts) -> tuple[str, ...]:
    """What the profile claims and the machine does not have (rule 3), in words; what is not known counts as missing."""
    found = []
    machine = MACHINES.get(facts.machine or "", facts.machine)
    if machine != profile.machine:
        found.append(f"machine {machine or 'unknown'}, not {profile.machine}")
    if facts.int8_flags is None:
        found.append(f"processor flags are not known: {facts.missing.get('int8_flags', 'no reason')}")
    else:
        found += [f"no {flag}" for flag in profile.int8_flags if flag not in facts.int8_flags]
    return tuple(found)


def check_profile_fits(name: str, profile: DeviceProfile, facts: DeviceFacts) -> None:
    """Raise `ConfigError` when the profile does not fit the machine; the error names the flags that are missing."""
    wrong = misfits(profile, facts)
    if wrong:
        proposed = propose_profile(facts)
        raise ConfigError(
            f"the device profile {name!r} does not fit this machine",
            found="; ".join(wrong),
            expected=f"{profile.machine} with {', '.join(profile.int8_flags)}",
            hint=f"this machine fits the profile {proposed!r}"
            if proposed
            else "write a profile: edge-ilseg device facts",
        )


def propose_profile(facts: DeviceFacts) -> str | None:
    """The profile of ours that fits and claims the most flags; None where none fits.

    Profiles of single products (`raspberry-pi-5`) are proposed only where the processor or the system says its name.
    """
    fitting = []
    for name in profile_names():
        profile = read_profile(name)
        if misfits(profile, facts):
            continue
        is_generic = name.startswith(("x86-", "generic-"))
        words = re.split(r"[^a-z0-9.]+", (facts.processor or "").lower())
        is_named = all(word in words for word in name.split("-") if word not in ("intel", "jetson"))
        if is_generic or is_named:
            fitting.append((is_named, len(profile.int8_flags), name))
    return max(fitting)[2] if fitting else None
