"""What a verification is asked for, filled in from a device profile and from the limits in the bundle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from edge_ilseg.bundle import Manifest, Precision, Runtime, read_manifest
from edge_ilseg.devices.device_profile import DeviceProfile, check_profile_fits, read_profile
from edge_ilseg.devices.facts import read_device_facts
from edge_ilseg.devices.limits import Limits, set_limits, tightening
from edge_ilseg.devices.loaded_bundle import choose_model
from edge_ilseg.devices.retention import MAX_OLD_MIOU_DROP_PCT
from edge_ilseg.devices.runtime import installed_runtimes
from edge_ilseg.devices.verdicts import GOLDEN_AGREEMENT, MAX_MOVED_PCT, MIN_AGREEMENT_PCT
from edge_ilseg.devices.verification import VerifyRequest
from edge_ilseg.errors import BundleError, EdgeIlsegError


class Measurable(NamedTuple):
    """What was given to measure by."""

    has_labels: bool
    has_parent: bool
    has_unlabelled: bool


def fill_request(
    request: VerifyRequest,
    profile_name: str | None,
    given: Mapping[str, float | None],
    bundle: Path,
    *,
    measurable: Measurable,
) -> VerifyRequest:
    """The request with its limits, and with what it leaves open taken from a device profile.

    What the user gave goes before all else; then come the profile's limits, and those in the bundle that are stricter
    than what holds without them (rule 1 of `edge_ilseg.devices.limits`).

    Args:
        request: what the user asked for.
        profile_name: of a profile, or a file; None: there is none.
        given: limits that the user gave, by name in `Limits`; None: not given.
        bundle: its models decide which of the profile's runtimes and precisions is taken.
        measurable: a limit of the profile or the bundle that cannot be measured with what was given is left out; one
            that the user gave is not.

    Returns:
        The request; its `misfit` says so where the bundle's input is larger than the profile allows, or where it has no
        model that the profile takes.

    Raises:
        ConfigError: there is no such profile, or it does not fit this machine.
    """
    try:
        manifest = read_manifest(bundle)
    except EdgeIlsegError:
        manifest = None  # the verification itself reports what is wrong with the bundle
    limits: dict[str, float] = {}
    if profile_name is not None:
        profile = read_profile(profile_name)
        check_profile_fits(profile_name, profile, read_device_facts())
        request = msgspec.structs.replace(request, threads=request.threads or profile.threads)
        if manifest is not None:
            try:
                _check_input_size(profile_name, profile, manifest)
                runtime, precision = _choose(profile_name, profile, manifest, request)
                request = msgspec.structs.replace(request, runtime=runtime, precision=precision)
            except EdgeIlsegError as error:
                request = msgspec.structs.replace(request, misfit=error)
        limits = set_limits(profile.limits)
    if manifest is not None and manifest.limits is not None:
        limits |= tightening(set_limits(manifest.limits), {**_default_limits(manifest, request), **limits})
    own = {name: limit for name, limit in given.items() if limit is not None}
    limits = {**_measurable(limits, measurable), **own}
    return msgspec.structs.replace(request, limits=msgspec.convert(limits, Limits))


def _default_limits(manifest: Manifest, request: VerifyRequest) -> dict[str, float]:
    """What holds where nobody sets a limit, as far as it can be measured."""
    try:
        _, precision = choose_model(manifest, request.runtime, request.precision)
    except EdgeIlsegError:  # as above; the precision then decides nothing
        precision = "fp32"
    return {
        **set_limits(Limits()),
        "min_golden_agreement": GOLDEN_AGREEMENT[precision],
        "max_old_miou_drop_pct": MAX_OLD_MIOU_DROP_PCT,
        "min_agreement_pct": MIN_AGREEMENT_PCT,
        "max_moved_pct": MAX_MOVED_PCT,
    }


def _measurable(limits: Mapping[str, float], measurable: Measurable) -> dict[str, float]:
    labels, parent, unlabelled = measurable
    needs = {
        "max_old_miou_drop_pct": labels and parent,
        "max_class_drop_pct": labels and parent,
        "min_new_miou_pct": labels,
        "min_agreement_pct": unlabelled and parent,
        "min_class_agreement_pct": unlabelled and parent,
        "max_moved_pct": unlabelled and parent,
    }
    return {name: limit for name, limit in limits.items() if needs.get(name, True)}


def _check_input_size(name: str, profile: DeviceProfile, manifest: Manifest) -> None:
    size, has = profile.input_size, manifest.preprocessing
    if size is not None and (has.width_px > size.width_px or has.height_px > size.height_px):
        raise BundleError(
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
