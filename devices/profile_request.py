"""A device profile put to use: the request of a verification filled in from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from edge_ilseg.bundle import Manifest, Precision, Runtime, read_manifest
from edge_ilseg.devices.device_profile import DeviceProfile, check_profile_fits, read_profile
from edge_ilseg.devices.facts import read_device_facts
from edge_ilseg.devices.limits import Limits
from edge_ilseg.devices.runtime import installed_runtimes
from edge_ilseg.devices.verification import VerifyRequest
from edge_ilseg.errors import BundleError, ConfigError, EdgeIlsegError


class Measurable(NamedTuple):
    """What was given to measure by."""

    has_labels: bool
    has_parent: bool
    has_unlabelled: bool


def with_profile(
    request: VerifyRequest,
    profile_name: str | None,
    given: Mapping[str, float | None],
    bundle: Path,
    *,
    measurable: Measurable,
) -> VerifyRequest:
    """The request with its limits, and with what it leaves open taken from a device profile.

    Args:
        request: what the user asked for.
        profile_name: of a profile, or a file; None: there is none.
        given: limits that the user gave, by name in `Limits`; None: not given. They go before the profile's.
        bundle: its models decide which of the profile's runtimes and precisions is taken.
        measurable: a limit of the profile that cannot be measured with what was given is left out; one that the user
            gave is not.

    Raises:
        ConfigError: there is no such profile, it does not fit this machine, or the bundle's input is larger than it
            allows.
        BundleError: the bundle has no model that the profile takes.
    """
    own = {name: value for name, value in given.items() if value is not None}
    if profile_name is None:
        return msgspec.structs.replace(request, limits=msgspec.convert(own, Limits))
    profile = read_profile(profile_name)
    check_profile_fits(profile_name, profile, read_device_facts())
    limits = {**_measurable_limits(profile.limits, measurable), **own}
    request = msgspec.structs.replace(
        request, limits=msgspec.convert(limits, Limits), threads=request.threads or profile.threads
    )
    try:
        manifest = read_manifest(bundle)
    except EdgeIlsegError:
        return request  # the verification itself reports what is wrong with the bundle
    _check_input_size(profile_name, profile, manifest)
    runtime, precision = _choose(profile_name, profile, manifest, request)
    return msgspec.structs.replace(request, runtime=runtime, precision=precision)


def _measurable_limits(limits: Limits, measurable: Measurable) -> dict[str, float]:
    labels, parent, unlabelled = measurable
    needs = {
        "max_old_miou_drop_pct": labels and parent,
        "max_class_drop_pct": labels and parent,
        "min_new_miou_pct": labels,
        "min_agreement_pct": unlabelled and parent,
        "max_moved_pct": unlabelled and parent,
    }
    values = msgspec.structs.asdict(limits)
    return {name: value for name, value in values.items() if value is not None and needs.get(name, True)}


def _check_input_size(name: str, profile: DeviceProfile, manifest: Manifest) -> None:
    size, has = profile.input_size, manifest.preprocessing
    if size is not None and (has.width_px > size.width_px or has.height_px > size.height_px):
        raise ConfigError(
            f"the bundle's input is larger than the device profile {name!r} allows",
            found=f"{has.width_px} x {has.height_px} px",
            expected=f"at most {size.width_px} x {size.height_px} px",
            hint="export a smaller model, or change the profile's input_size",
        )


def _choose(name: str, profile: DeviceProfile, manifest: Manifest, request: VerifyRequest) -> tuple[Runtime, Precision]:
    """The first installed runtime of the profile, and of its precisions the first, that the bundle has a model for."""
    has = {(entry.runtime, entry.precision) for entry in manifest.models}
    installed = installed_runtimes()
    for runtime in (request.runtime,) if request.runtime else profile.runtimes:
        for precision in (request.precision,) if request.precision else profile.precisions:
            if (runtime, precision) in has and (runtime in installed or request.runtime):
                return runtime, precision
    models = ", ".join(f"{runtime}/{precision}" for runtime, precision in sorted(has))
    raise BundleError(
        f"the bundle has no model that the device profile {name!r} takes and that a runtime here can run",
        found=f"models {models}; installed {', '.join(installed) or 'no runtime'}",
        expected=f"one of {', '.join(profile.runtimes)} in one of {', '.join(profile.precisions)}",
        hint="export the model, install the runtime, or name both: --runtime, --precision",
    )
