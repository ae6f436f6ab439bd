"""Import one package and tell what it sees: a program that `edge-ilseg doctor` runs in a process of its own.

1. It is run by its path and imports nothing of ours, so that it says the same in a broken installation.
2. The last line of standard output is one JSON object: `version`, and what `DETAILS` gives; or `error`.
3. Whatever an import does (hang, raise, kill the process) stays in this process; the doctor has a timeout.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from typing import Any


def no_details(_module: Any) -> dict[str, Any]:
    """Nothing beside the version."""
    return {}


def onnxruntime_details(module: Any) -> dict[str, Any]:
    """What it can run on."""
    return {"providers": module.get_available_providers()}


def openvino_details(module: Any) -> dict[str, Any]:
    """What it can run on."""
    core = module.Core()
    return {"devices": {name: core.get_property(name, "FULL_DEVICE_NAME") for name in core.available_devices}}


def torch_details(module: Any) -> dict[str, Any]:
    """GPUs, what it was built for, and whether it and numpy understand each other."""
    cuda = module.cuda
    is_there = cuda.is_available()
    found = [cuda.get_device_properties(place) for place in range(cuda.device_count())] if is_there else []
    try:
        module.zeros(1).numpy()
        numpy_error = None
    except RuntimeError as error:
        numpy_error = str(error)
    return {
        "built_for": module.version.cuda or getattr(module.version, "hip", None),
        "gpus": [f"{item.name}, {item.total_memory >> 20} MiB" for item in found],
        "mps": bool(module.backends.mps.is_available()),
        "numpy_error": numpy_error,
    }


def onnx_details(module: Any) -> dict[str, Any]:
    """The newest operator set that it knows."""
    return {"opset": module.defs.onnx_opset_version()}


DETAILS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "numpy": no_details,
    "PIL": no_details,
    "onnxruntime": onnxruntime_details,
    "openvino": openvino_details,
    "torch": torch_details,
    "torchvision": no_details,
    "onnx": onnx_details,
}


def probe(name: str) -> dict[str, Any]:
    """Rule 2."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # as devices/runtime.py does
    try:
        module = importlib.import_module(name)
        return {"version": str(getattr(module, "__version__", "")), **DETAILS[name](module)}
    except Exception as error:  # noqa: BLE001  # whatever an import raises is what is asked for
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    print("\n" + json.dumps(probe(sys.argv[1])))
