"""Whether a model of a bundle can fit this device: what can be known before a runtime opens its file.

1. It is checked first, because a runtime says less clearly what is wrong. Its input and its channels are looked at once
   it is loaded (`edge_ilseg.devices.runtime`).
2. What is not known (a runtime newer than the table, a system that does not tell its free memory) refuses nothing.
"""

from __future__ import annotations

from pathlib import Path

from edge_ilseg.bundle import ModelEntry
from edge_ilseg.devices.facts import read_available_mib
from edge_ilseg.devices.runtime import runtime_release
from edge_ilseg.errors import BundleError

# onnxruntime's documentation, "ONNX opset support" (docs/reference/compatibility.md), which goes up to release 1.20
HIGHEST_OPSET = dict(
    zip([(1, minor) for minor in range(10, 21)], [15, 16, 17, 17, 18, 19, 19, 20, 21, 21, 21], strict=True)
)
"""Release of onnxruntime -> the highest ONNX opset that it implements. One that is not here is not judged (rule 2)."""


def check_opset(entry: ModelEntry, *, where: object = None) -> None:
    """Raise `BundleError` when the installed runtime is older than the operators of the model.

    An OpenVINO model has no ONNX operators any more: its opset is that of the file it was made from.

    Raises:
        BundleError: as said; the error has both numbers.
        MissingPackageError: the runtime is not installed.
    """
    if entry.runtime != "onnxruntime":
        return
    release = runtime_release(entry.runtime)
    highest = highest_opset(release)
    if highest is not None and entry.opset > highest:
        raise BundleError(
            "the model's operators are newer than the installed onnxruntime",
            where=where,
            found=f"ONNX opset {entry.opset}; onnxruntime {release} knows up to {highest}",
            expected=f"opset {highest} or lower, or a newer onnxruntime",
            hint="on this device: pip install -U onnxruntime",
        )


def highest_opset(release: str) -> int | None:
    """The highest ONNX opset that a release of onnxruntime (`"1.20.1"`) implements; None: not known."""
    numbers = release.split(".")[:2]
    if len(numbers) < 2 or not all(number.isdigit() for number in numbers):
        return None
    return HIGHEST_OPSET.get((int(numbers[0]), int(numbers[1])))


def check_memory(model_bytes: int, *, where: object = None, proc: Path = Path("/proc")) -> None:
    """Raise `BundleError` when the model's files alone are larger than the memory that is available.

    Args:
        model_bytes: of its files; a runtime holds its constants, and more, in memory.
        where: of the model, for the error.
        proc: where the kernel's process file system is.
    """
    available_mib = read_available_mib(proc=proc)
    if available_mib is not None and model_bytes > available_mib << 20:
        raise BundleError(
            "the model is larger than the memory that is available",
            where=where,
            found=f"{model_bytes / (1 << 20):.1f} MiB of files, {available_mib} MiB available",
            expected="memory for the model, and for what it computes besides",
            hint="end other programs, or export a smaller model",
        )
