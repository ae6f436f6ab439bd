"""The checks of `edge-ilseg doctor` on packages: ours, the extras', the runtimes, and how they get on with each other.

Rules in `edge_ilseg.doctor`. Nothing is imported here: `facts.probes` has what importing gave in other processes.
"""

from __future__ import annotations

from collections.abc import Iterator

from edge_ilseg.doctor_check import Check, note, ok, problem
from edge_ilseg.doctor_facts import NOT_FOR_USERS, OURS, Facts, Probe
from edge_ilseg.requirements import Requirement, numbers_of, parse_requirement

RUNTIMES = ("onnxruntime", "openvino")
EXPORT_OPSET = 18
"""As `edge_ilseg.export.float_onnx.OPSET`, which cannot be imported without torch."""
ABI_SIGNS = (
    "_ARRAY_API not found",
    "compiled using NumPy 1.x",
    "numpy.core.multiarray failed to import",
    "numpy.dtype size changed",
    "Numpy is not available",
)
"""What packages say that were built for another numpy."""
DELETE_AND_INSTALL = "pip uninstall -y {0}  (until none is left), then pip install {0}"


def installation(facts: Facts) -> Iterator[Check]:
    """Whether pip and the code speak of the same version."""
    if facts.metadata_version is None:
        found = f"{facts.edge_ilseg} from a folder on the path, not installed: extras are not known"
        yield note("edge-ilseg", found, "pip install -e .  in the source tree")
    elif facts.metadata_version != facts.edge_ilseg:
        found = f"the code is {facts.edge_ilseg}, pip has installed {facts.metadata_version}"
        yield problem(
            "edge-ilseg", found, "install it again: pip install --force-reinstall --no-deps edge-ilseg, or -e ."
        )
    else:
        yield ok("edge-ilseg", facts.edge_ilseg)


def base(facts: Facts) -> Iterator[Check]:
    """What every command needs."""
    wrong = [
        *_lacking(facts, None),
        *(f"{name} {error}" for name in ("numpy", "pillow") for error in _errors(facts, name)),
    ]
    if wrong:
        yield problem("base packages", "; ".join(wrong), f"pip install --force-reinstall {OURS}")
    elif facts.requirements:
        names = [item.name for item in _needed(facts, None)]
        yield ok("base packages", ", ".join(f"{name} {facts.packages[name][0]}" for name in names))


def extras(facts: Facts) -> Iterator[Check]:
    """Each extra: there, partly there, too old, or left out."""
    unreadable = []
    names: dict[str, None] = {}
    for text in facts.requirements.get(OURS, ()):
        try:
            extra = parse_requirement(text).extra
        except ValueError:
            unreadable.append(text)
            continue
        if extra is not None and extra not in NOT_FOR_USERS:
            names[extra] = None
    for extra in names:
        mend = f"pip install '{OURS}[{extra}]'"
        lacking = _lacking(facts, extra)
        old = [item for item in lacking if not item.startswith("no ")]
        if not lacking:
            needed = dict.fromkeys(item.name for item in _needed(facts, extra))
            yield ok(f"extra {extra}", ", ".join(f"{name} {facts.packages[name][0]}" for name in needed))
        elif len(old) == len(lacking):  # all are there: somebody wants it
            yield problem(f"extra {extra}", "; ".join(lacking), mend)
        else:
            yield note(f"extra {extra}", "not installed: " + "; ".join(lacking), mend)
    if unreadable:
        found = f"requirements that this doctor cannot read: {'; '.join(unreadable)}"
        yield note("extras", found, "look at them by hand: pip check")


def runtimes(facts: Facts) -> Iterator[Check]:
    """What runs models here."""
    there = [name for name in RUNTIMES if name in facts.packages]
    if "onnxruntime-gpu" in facts.packages and "onnxruntime" not in there:
        found = f"onnxruntime-gpu {facts.packages['onnxruntime-gpu'][0]}; models run on the processor all the same"
        yield note("runtimes", found, f"pip install '{OURS}[onnxruntime]'")
    elif not there:
        found = "none: verify, predict, bench and device run have nothing to run a model with"
        mend = f"pip install '{OURS}[onnxruntime]'  or  '{OURS}[openvino]'"
        is_publisher = bool(facts.requirements) and not _lacking(facts, "publish")
        yield (note if is_publisher else problem)("runtimes", found, mend)
    for name in there:
        probe = facts.probes.get(name, Probe())
        if probe.error is not None:
            yield problem(f"runtime {name}", *_failure(facts, name, probe))
            continue
        places = probe.details.get("devices") or {}
        kinds = [*probe.details.get("providers", ()), *(f"{key} ({text})" for key, text in places.items())]
        yield ok(f"runtime {name}", f"{facts.packages[name][0]} on {', '.join(map(str, kinds)) or 'CPU'}")


def numpy_abi(facts: Facts) -> Iterator[Check]:
    """One numpy, and packages that were built for it."""
    versions = facts.packages.get("numpy", ())
    loaded = facts.probes.get("numpy", Probe()).version
    if len(versions) > 1:
        found = (
            f"{' and '.join(versions)} are both on the path: one half of the program may load another than the other"
        )
        yield problem("numpy", found, DELETE_AND_INSTALL.format("numpy"))
    elif loaded and versions and loaded != versions[0]:
        found = f"pip has installed {versions[0]}, and {loaded} is what is imported"
        yield problem("numpy", found, DELETE_AND_INSTALL.format("numpy"))
    victims = []
    for name, probe in facts.probes.items():
        texts = (probe.error or "", probe.said, str(probe.details.get("numpy_error") or ""))
        if any(sign in text for sign in ABI_SIGNS for text in texts):
            victims.append(name)
    if victims and loaded:
        major = numbers_of(loaded)[:1] or (1,)
        found = f"{', '.join(victims)}: built for another major version of numpy than {loaded}"
        other = f"an older numpy: pip install 'numpy<{major[0]}'" if major > (1,) else "pip install --upgrade numpy"
        yield problem("numpy", found, f"pip install --upgrade {' '.join(victims)}, or {other}")


def training(facts: Facts) -> Iterator[Check]:
    """Whether torch can be imported, where it is installed."""
    if "torch" not in facts.packages:
        return
    probe = facts.probes.get("torch", Probe())
    if probe.error is not None:
        yield problem("torch", *_failure(facts, "torch", probe))
        return
    gpus = [*map(str, probe.details.get("gpus", ())), *(["Apple GPU (mps)"] if probe.details.get("mps") else [])]
    yield ok("torch", f"{facts.packages['torch'][0]}, trains on {', '.join(gpus) or 'the processor'}")


def gpu(facts: Facts) -> Iterator[Check]:
    """A GPU that is there and not used."""
    probe = facts.probes.get("torch")
    if not facts.has_nvidia or probe is None or probe.error is not None or probe.details.get("gpus"):
        return
    built_for = probe.details.get("built_for")
    if built_for is None:
        found = f"there is an NVIDIA GPU, and torch {facts.packages['torch'][0]} was built without CUDA"
        yield note("gpu", found, "install the same version of torch from an index of CUDA builds")
    else:
        found = f"there is an NVIDIA GPU, and torch, built for CUDA {built_for}, does not see it"
        mend = "compare the driver's CUDA (nvidia-smi) with that of torch; look at CUDA_VISIBLE_DEVICES"
        yield note("gpu", found, mend)


def torchvision(facts: Facts) -> Iterator[Check]:
    """Not ours, but other packages import it where it is there, and fail with it."""
    if "torchvision" not in facts.packages:
        return
    probe = facts.probes.get("torchvision", Probe())
    own, other = facts.packages["torchvision"][0], facts.packages.get("torch", ("none",))[0]
    if probe.error is None:
        yield ok("torchvision", f"{own} beside torch {other}; edge-ilseg does not use it")
        return
    why = "built for another torch" if "torchvision::nms" in probe.error else "cannot be imported"
    mend = "pip uninstall -y torchvision  (edge-ilseg does not use it), or install both from one index, CPU or CUDA"
    yield problem("torchvision", f"{own} beside torch {other}: {why}: {probe.error}", mend)


def onnx(facts: Facts) -> Iterator[Check]:
    """Whether onnx knows the operators that an export writes."""
    if "onnx" not in facts.packages:
        return
    version, probe = facts.packages["onnx"][0], facts.probes.get("onnx", Probe())
    opset = probe.details.get("opset")
    if probe.error is not None:
        yield problem("onnx", *_failure(facts, "onnx", probe))
    elif isinstance(opset, int) and opset < EXPORT_OPSET:
        found = f"{version} knows opset {opset}, and an export writes {EXPORT_OPSET}"
        yield problem("onnx", found, f"pip install --upgrade '{OURS}[export]'")
    else:
        yield ok("onnx", f"{version}, opset {opset or 'not known'}; an export writes {EXPORT_OPSET}")


def twins(facts: Facts) -> Iterator[Check]:
    """Two builds of a runtime in one folder."""
    if {"onnxruntime", "onnxruntime-gpu"} <= set(facts.packages):
        found = "onnxruntime and onnxruntime-gpu write the same files: which one runs is by chance"
        mend = "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install --force-reinstall onnxruntime"
        yield problem("onnxruntime", found, mend)


def telemetry(facts: Facts) -> Iterator[Check]:
    """Rule 6 of `devices/runtime.py`: we do not load it; others may."""
    if "openvino-telemetry" in facts.packages:
        found = "openvino-telemetry is installed; edge-ilseg never loads it, other programs with OpenVINO do"
        yield note("telemetry", found, "opt_in_out --opt_out  (for this user), if other programs are to be silent, too")


def _needed(facts: Facts, extra: str | None, of: str = OURS) -> list[Requirement]:
    """What an extra brings, through extras of other packages, too; None: what is always needed."""
    found = []
    for text in facts.requirements.get(of, ()):
        try:
            item = parse_requirement(text)
        except ValueError:
            continue
        if item.extra != extra or not item.applies_to(facts.python):
            continue
        if item.name != OURS:
            found.append(item)
        for name in item.extras:
            found += _needed(facts, name, item.name)
    return found


def _lacking(facts: Facts, extra: str | None) -> list[str]:
    """`no torch`, or `onnx 1.14 is not >=1.18`."""
    found: dict[str, None] = {}
    for item in _needed(facts, extra):
        versions = facts.packages.get(item.name)
        if versions is None:
            found[f"no {item.name}"] = None
        elif bound := item.broken_bound(versions[0]):
            found[f"{item.name} {versions[0]} is not {bound}"] = None
    return list(found)


def _errors(facts: Facts, name: str) -> Iterator[str]:
    probe = facts.probes.get(name)
    if probe is not None and probe.error is not None:
        yield f"cannot be imported: {probe.error}"


def _failure(facts: Facts, name: str, probe: Probe) -> tuple[str, str]:
    """Found and mend of a package that cannot be imported."""
    error = probe.error or ""
    found = f"{facts.packages[name][0]} cannot be imported: {error}"
    if "SIGILL" in error:
        return found, f"this build needs instructions that the processor lacks: an older {name}, or another processor"
    if "no answer within" in error:
        return found, "try it by hand: python -c 'import " + name + "'; a slow disk, or a driver that hangs"
    if "GLIBC" in error or "cannot open shared object" in error:
        return found, "a library of the system is missing or too old: install it, or take a newer system"
    return found, f"pip install --force-reinstall {name}"
