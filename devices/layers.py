"""Which layers of a model a runtime ran, and in which element type, from what the runtime tells. Pure: no session here.

1. A layer is one that the runtime ran: what it has fused into another is no layer any more.
2. Element types have OpenVINO's short names in both runtimes: `f32`, `f16`, `bf16`, `i64`; `u8` and `i8` are int8.
3. The type of a layer is that of the first tensor that it reads, as OpenVINO counts it: a quantized convolution counts
   as `u8` whatever it writes. A layer of onnxruntime that only turns int8 back into float counts as what it writes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

import msgspec

IDLE_LAYERS = frozenset({"Input", "Output", "Const"})
KERNEL = "_kernel_time"
"""How onnxruntime's profile ends the name of a node, in the event that tells of its run."""
BACK_TO_FLOAT = "DequantizeLinear"
SHORT_TYPES = {
    "float": "f32",
    "double": "f64",
    "float16": "f16",
    "bfloat16": "bf16",
    "bool": "boolean",
    **{f"{sign}int{bits}": f"{sign or 'i'}{bits}" for sign in ("", "u") for bits in (4, 8, 16, 32, 64)},
}
"""onnxruntime's names of element types in OpenVINO's short form."""


class ExecutedLayer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One layer as the runtime ran it, after it has fused what it fuses (rules 1 to 3)."""

    name: str
    operator: str
    """In the runtime's own words: "Convolution", "QLinearConv"."""
    precision: str
    """Element type: `f32`, `u8`."""


class _Event(msgspec.Struct, frozen=True):
    """What is used of one event of onnxruntime's profile."""

    name: str = ""
    cat: str = ""
    ts: float = 0.0
    args: dict[str, Any] = {}


def openvino_layers(compiled: Any) -> tuple[ExecutedLayer, ...]:
    """The layers of an `openvino.CompiledModel` in the order in which they run, without those that compute nothing."""
    layers = []
    for layer in compiled.get_runtime_model().get_ordered_ops():
        info = dict(layer.get_rt_info())
        operator, precision = info["layerType"].astype(str), info["runtimePrecision"].astype(str)
        if operator not in IDLE_LAYERS:
            layers.append(ExecutedLayer(layer.get_friendly_name(), operator, precision))
    return tuple(layers)


def parse_profile(profile: bytes) -> tuple[ExecutedLayer, ...]:
    """The layers in the profile that onnxruntime writes of one run, in the order in which they ran.

    Raises:
        ValueError: it is no such profile.
    """
    try:
        events = msgspec.json.decode(profile, type=list[_Event])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"not a profile of onnxruntime: {error}") from error
    nodes = sorted((event for event in events if event.cat == "Node" and event.name.endswith(KERNEL)), key=_start)
    return tuple(
        ExecutedLayer(event.name.removesuffix(KERNEL), str(event.args.get("op_name", "?")), _precision(event.args))
        for event in nodes
    )


def count_precisions(layers: Iterable[ExecutedLayer], operators: Collection[str] | None = None) -> dict[str, int]:
    """How many layers run in which element type: `{"f32": 3, "u8": 41}`.

    Args:
        layers: of a model.
        operators: count only these, as "Convolution"; `None` counts every layer.
    """
    counted = Counter(layer.precision for layer in layers if operators is None or layer.operator in operators)
    return dict(sorted(counted.items()))


def _start(event: _Event) -> float:
    return event.ts


def _precision(args: dict[str, Any]) -> str:
    """Rule 3, from `[{"uint8": [1, 3, 8, 8]}, ...]`: the type and shape of each tensor that is read, or written."""
    read, written = (args.get(f"{side}_type_shape") or [] for side in ("input", "output"))
    tensors = written if args.get("op_name") == BACK_TO_FLOAT or not read else read
    kinds = [kind for tensor in tensors[:1] if isinstance(tensor, dict) for kind in tensor]
    return SHORT_TYPES.get(kinds[0], kinds[0]) if kinds else "unknown"
